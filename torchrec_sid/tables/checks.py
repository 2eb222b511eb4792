"""Checks on a batch, run inside the transforms so that they hold in eager mode, under DMP and pipelined.

On the CPU they name the first bad value. On an accelerator a range check would have to wait for the
device, and in an exported program there is no Python to look: it is an assertion of the graph there, which
stops the run and names the feature, not the value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec


def check_kjt(features: KeyedJaggedTensor, needed: Sequence[str], *, weighted: bool) -> None:
    """Refuse a KJT that TorchRec would look up wrongly without a word.

    Raises:
        SidError: a key twice, a feature that is missing, values that are not one-dimensional, contiguous
            and integer, lengths that are negative, do not add up or contradict the offsets, or weights that
            are missing or do not match.
    """
    present = features.keys()
    name = f"features {list(needed)}" if len(needed) > 1 else f"feature {needed[0]!r}"
    if len(set(present)) < len(present):
        key = next(key for key in present if present.count(key) > 1)
        raise SidError(f"feature {key!r}", f"twice in the keys {present}", "Give every feature one key.")
    missing = [key for key in needed if key not in present]
    if missing:
        raise SidError(
            f"feature {missing[0]!r}",
            f"not in the KeyedJaggedTensor, whose keys are {present}",
            "Add it to the batch, or rename it in feature_names.",
        )
    check_layout(name, features.values())
    weights = features.weights_or_none()
    if weighted and weights is None:
        raise SidError(
            name, "no weights", "The collection has is_weighted=True: give every feature weights."
        )
    if torch.compiler.is_compiling():  # what follows compares data; a program's inputs have one length each
        return
    if weights is not None and weights.shape != features.values().shape:
        raise SidError(
            name,
            f"{tuple(weights.shape)} weights for {tuple(features.values().shape)} values",
            "Give one weight per value, of every feature of the batch.",
        )
    _check_lengths(features, name)


def _check_lengths(features: KeyedJaggedTensor, name: str) -> None:
    lengths, present = features.lengths(), features.keys()
    wanted = sum(features.stride_per_key())
    if lengths.numel() != wanted:
        raise SidError(
            name,
            f"{lengths.numel()} lengths for {len(present)} keys",
            "Give one length per key and example, key by key.",
        )
    if lengths.is_meta:
        return
    total = features.offset_per_key()[-1]
    if total != features.values().numel():
        raise SidError(
            name,
            f"lengths sum to {total} but there are {features.values().numel()} values",
            "Make one length per key and example, in the order of the keys.",
        )
    offsets = features.offsets_or_none()
    if offsets is not None and offsets.numel() != lengths.numel() + 1:
        raise SidError(
            name, f"{offsets.numel()} offsets for {lengths.numel()} lengths", "Give one more offset."
        )
    if lengths.device.type != "cpu":
        # Reading the values would wait for the device: an assertion there stops the run.
        torch._assert_async((lengths >= 0).all(), f"{name}: a negative length")
        if offsets is not None:
            agree = (offsets.diff() == lengths).all()
            torch._assert_async(agree, f"{name}: lengths contradict offsets")
        return
    if lengths.numel() and int(lengths.min()) < 0:
        place = int((lengths < 0).nonzero()[0])
        raise SidError(name, f"length {int(lengths[place])} at position {place}", "Lengths are 0 or more.")
    if offsets is not None and not bool((offsets.diff() == lengths).all()):
        raise SidError(
            name, "lengths that contradict the offsets", "Give one of them: TorchRec computes the other."
        )


def check_layout(name: str, values: Tensor) -> None:
    """Refuse values that are not a contiguous ``[n]`` of int32 or int64.

    Raises:
        SidError: naming the feature and what was found.
    """
    if values.dtype not in (torch.int64, torch.int32):
        raise SidError(
            name,
            f"values of dtype {values.dtype}",
            "Pass integer ids or SidSpec.pack(codes), which are int64.",
        )
    if values.dim() != 1:
        raise SidError(
            name,
            f"values of shape {tuple(values.shape)}",
            "A KeyedJaggedTensor permutes 2-D values wrongly: pack the codes with SidSpec.pack.",
        )
    if not values.is_contiguous():
        raise SidError(
            name,
            f"values with stride {values.stride()}, not contiguous",
            "FBGEMM reads them as if they were: call .contiguous() where the batch is made.",
        )


def check_packed(feature: str, packed: Tensor, spec: SidSpec) -> Tensor | None:
    """Check packed SIDs ``[n]`` int64 against the alphabet.

    Returns:
        ``[n]`` bool where the value is -1, the unknown item, or None where it is known that none is.

    Raises:
        SidError: naming the feature, the value and its codes (on the CPU).
    """
    if packed.is_meta:
        return packed < 0
    if packed.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(
            (_within(packed, spec) | (packed == -1)).all(),
            f"feature {feature!r}: a packed SID is outside its alphabet {spec.cardinalities}",
        )
        return packed < 0
    if not packed.numel():
        return None
    low, high = (int(bound) for bound in packed.aminmax())
    if low >= -1 and high >> spec.bits == 0 and not _odd_levels(spec):
        return packed < 0 if low < 0 else None
    bad = ~(_within(packed, spec) | (packed == -1))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        value = int(packed[row])
        raise SidError(f"feature {feature!r}", _describe(value, row, spec), _REMEDY)
    return packed < 0 if low < 0 else None


_REMEDY = "Pack codes with the SidSpec of the table; or give the collection the catalog of raw ids."


def _odd_levels(spec: SidSpec) -> list[int]:
    """Levels whose bits can hold more than their codes."""
    return [i for i, k in enumerate(spec.cardinalities) if k != 1 << spec.level_bits[i]]


def _within(packed: Tensor, spec: SidSpec) -> Tensor:
    good = (packed >> spec.bits) == 0
    for i in _odd_levels(spec):
        good &= ((packed >> spec.shifts[i]) & ((1 << spec.level_bits[i]) - 1)) < spec.cardinalities[i]
    return good


def _describe(value: int, row: int, spec: SidSpec) -> str:
    if value < 0 or value >> spec.bits:
        return f"packed SID {value} at position {row} is outside 0..2**{spec.bits} - 1"
    for i in _odd_levels(spec):
        code = value >> spec.shifts[i] & ((1 << spec.level_bits[i]) - 1)
        if code >= spec.cardinalities[i]:
            limit = spec.cardinalities[i] - 1
            return (
                f"packed SID {value} at position {row} has code {code} at level {i + 1}, outside 0..{limit}"
            )
    raise AssertionError("called for a value within the alphabet")
