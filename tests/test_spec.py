"""SidSpec: packing is a bijection, prefixes are shifts, and what does not fit is refused."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec

CARDINALITIES = st.lists(
    st.integers(2, 300) | st.sampled_from([2, 3, 5, 243, 256, 257, 2048]), min_size=1, max_size=12
)


def draw(spec: SidSpec, rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(k, (rows,), generator=generator) for k in spec.cardinalities]
    codes = torch.stack(columns, dim=1)
    # The corners of the alphabet are where packing breaks.
    corners = torch.tensor([[0] * spec.levels, [k - 1 for k in spec.cardinalities]])
    return torch.cat([corners, codes])


@given(CARDINALITIES, st.integers(0, 20), st.integers(0, 1000))
@example([65, *[129] * 7], 4, 0)  # 63 bits: the widest that fits
def test_packing_is_a_bijection(cardinalities: list[int], rows: int, seed: int) -> None:
    spec = SidSpec(tuple(cardinalities))
    codes = draw(spec, rows, seed)
    packed = spec.pack_bytes(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (len(codes), spec.nbytes)
    assert torch.equal(spec.unpack_bytes(packed), codes)
    if spec.fits_int64:
        sids = spec.pack(codes)
        assert sids.dtype == torch.int64
        # Not `sids < 2**bits`: 2**63 is no int64.
        assert bool((sids >= 0).all()) and not bool((sids >> spec.bits).any())
        assert torch.equal(spec.unpack(sids), codes)


@given(CARDINALITIES, st.integers(0, 1000), st.data())
def test_a_prefix_is_the_packed_sid_of_the_truncated_spec(
    cardinalities: list[int], seed: int, data: st.DataObject
) -> None:
    spec = SidSpec(tuple(cardinalities))
    if not spec.fits_int64:
        return
    depth = data.draw(st.integers(1, spec.levels))
    codes = draw(spec, 8, seed)
    prefix = spec.prefix(spec.pack(codes), depth)
    assert torch.equal(prefix, spec.truncated(depth).pack(codes[:, :depth]))
    assert torch.equal(prefix, spec.pack(codes) >> spec.shifts[depth - 1])
    assert spec.truncated(depth).bits == sum(spec.level_bits[:depth])


@given(CARDINALITIES, st.integers(0, 1000))
def test_packed_order_is_lexicographic(cardinalities: list[int], seed: int) -> None:
    spec = SidSpec(tuple(cardinalities))
    if spec.fits_int64:
        codes = draw(spec, 12, seed)
        order = spec.pack(codes).argsort(stable=True)
        assert codes[order].tolist() == sorted(codes.tolist())


@given(CARDINALITIES)
def test_bytes_hold_the_bits_and_no_more_than_needed(cardinalities: list[int]) -> None:
    spec = SidSpec(tuple(cardinalities))
    entropy = sum(math.log2(k) for k in cardinalities)
    assert entropy <= spec.bits and entropy <= 8 * spec.nbytes + 1e-9 and spec.nbytes <= -(-spec.bits // 8)


@pytest.mark.parametrize(
    ("cardinalities", "bits", "nbytes"),
    [
        ((3,) * 25, 50, 5),  # five trits a byte
        ((3,) * 26, 52, 6),
        ((3,) * 80, 160, 16),
        ((64,) * 4, 24, 3),
        ((256,) * 3, 24, 3),
        ((2048,) * 3, 33, 5),
        ((2,) * 8, 8, 1),
        ((5,) * 7, 21, 3),
        ((2,), 1, 1),
    ],
)
def test_sizes(cardinalities: tuple[int, ...], bits: int, nbytes: int) -> None:
    spec = SidSpec(cardinalities)
    assert (spec.bits, spec.nbytes) == (bits, nbytes)


def test_the_byte_layout_is_the_documented_one() -> None:
    spec = SidSpec((3,) * 7)
    codes = torch.tensor([[1, 2, 0, 1, 2, 2, 1]])
    byte = sum(int(c) * 3**i for i, c in enumerate(codes[0, :5]))
    assert spec.pack_bytes(codes).tolist() == [[byte, 2 + 3 * 1]]
    assert spec.byte_groups == ((0, 5), (5, 7))
    wide = SidSpec((2048, 2048, 2048))
    value = 5 << 22 | 6 << 11 | 7
    assert wide.pack(torch.tensor([[5, 6, 7]])).item() == value
    assert wide.pack_bytes(torch.tensor([[5, 6, 7]]))[0].tolist() == list(value.to_bytes(5, "big"))


def test_the_sign_bit_stays_free() -> None:
    full = SidSpec((2**31, 2**31, 2))
    assert full.bits == 63 and full.fits_int64
    top = torch.tensor([[2**31 - 1, 2**31 - 1, 1]])
    assert int(full.pack(top)) == 2**63 - 1 and torch.equal(full.unpack(full.pack(top)), top)
    assert torch.equal(full.unpack_bytes(full.pack_bytes(top)), top)
    beyond = SidSpec((2**31, 2**31, 4))
    assert not beyond.fits_int64
    for call in (beyond.pack, beyond.unpack, lambda x: beyond.prefix(x, 1)):
        with pytest.raises(SidError, match="64 bits do not fit"):
            call(torch.zeros(1, 3, dtype=torch.int64))


def test_empty_batches_and_small_dtypes() -> None:
    spec = SidSpec((4, 300))
    none = torch.zeros(0, 2, dtype=torch.int64)
    assert spec.pack(none).shape == (0,) and spec.unpack(spec.pack(none)).shape == (0, 2)
    assert spec.pack_bytes(none).shape == (0, 2)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        codes = torch.tensor([[3, 200]], dtype=dtype)
        assert spec.unpack(spec.pack(codes)).tolist() == [[3, 200]]
        assert spec.unpack_bytes(spec.pack_bytes(codes)).tolist() == [[3, 200]]
        assert spec.pack(codes).dtype == torch.int64


def test_packing_leaves_its_input_alone() -> None:
    spec, codes = SidSpec((4, 4)), torch.tensor([[1, 2]])
    spec.pack(codes), spec.pack_bytes(codes)
    assert codes.tolist() == [[1, 2]]


@pytest.mark.parametrize("cardinalities", [(), (1,), (4, 0), (2**31 + 1,), (-3,)])
def test_impossible_specs_are_refused(cardinalities: tuple[int, ...]) -> None:
    with pytest.raises(SidError, match="SidSpec"):
        SidSpec(cardinalities)


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        (torch.tensor([[0, 0], [0, 4]]), "code 4 at row 1, level 2, outside 0..3"),
        (torch.tensor([[-1, 0]]), "code -1 at row 0, level 1"),
        (torch.tensor([[0, 0, 0]]), r"shape \(1, 3\)"),
        (torch.tensor([0, 0]), r"shape \(2,\)"),
        (torch.tensor([[0.0, 0.0]]), "dtype torch.float32"),
        (torch.tensor([[True, False]]), "dtype torch.bool"),
    ],
)
def test_bad_codes_are_named(codes: Tensor, words: str) -> None:
    spec = SidSpec((4, 4))
    for call in (spec.pack, spec.pack_bytes, spec.validate):
        with pytest.raises(SidError, match=words):
            call(codes)


def test_bad_bytes_and_depths_are_named() -> None:
    spec = SidSpec((3,) * 7)
    for data in (
        torch.zeros(1, 3, dtype=torch.uint8),
        torch.zeros(1, 2),
        torch.zeros(2, dtype=torch.uint8),
    ):
        with pytest.raises(SidError, match=r"packs into \[N, 2\] uint8"):
            spec.unpack_bytes(data)
    for depth in (0, 8):
        with pytest.raises(SidError, match=f"depth {depth}"):
            spec.prefix(torch.zeros(1, dtype=torch.int64), depth)


def test_specs_are_values() -> None:
    assert SidSpec((3, 4)) == SidSpec([3, 4]) != SidSpec((4, 3))  # type: ignore[arg-type]
    assert len({SidSpec((3, 4)), SidSpec((3, 4))}) == 1
