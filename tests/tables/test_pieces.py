"""Training a vocabulary, keeping it, and cutting SIDs exactly as the sentencepiece library does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import PieceTrainerConfig, SidPieces, SidTokenizer, train_pieces
from torchrec_sid.tables.sentencepiece import to_sentences


def skewed(spec, count, seed=0):
    """Codes with runs that repeat, as real SIDs have: a few common prefixes and suffixes."""
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for level, k in enumerate(spec.cardinalities):
        column = (torch.rand(count, generator=generator) ** 3 * k).long()
        if level:
            follow = torch.rand(count, generator=generator) < 0.7
            column = torch.where(follow, (columns[-1] * 5 + level) % k, column)
        columns.append(column)
    return torch.stack(columns, dim=1)


def library(pieces, codes):
    return pieces.processor().encode(to_sentences(pieces.spec, codes))


def ours(pieces, codes):
    tokens = SidTokenizer(pieces)(pieces.spec.pack(codes))
    per_item = [row[row >= 0].tolist() for row in tokens.ids]
    assert [len(ids) for ids in per_item] == tokens.counts.tolist()
    assert tokens.flat().tolist() == [i for ids in per_item for i in ids]
    return per_item


@pytest.mark.parametrize("model", ["unigram", "bpe"])
@pytest.mark.parametrize(
    "cardinalities", [(256,) * 4, (32,) * 8, (3,) * 14, (2048, 1024, 512), (7,), (300, 2), (16, 3, 5, 16)]
)
def test_cuts_equal_the_library(model, cardinalities):
    spec = SidSpec(cardinalities)
    seen = skewed(spec, 3000)
    pieces = train_pieces(spec, seen, PieceTrainerConfig(sum(cardinalities) + 400, model))
    random = torch.stack([torch.randint(0, k, (1000,)) for k in cardinalities], dim=1)
    codes = torch.cat([seen, random])
    assert ours(pieces, codes) == library(pieces, codes)
    if len(cardinalities) > 1:
        assert int((pieces.stops - pieces.starts).max()) > 1, "there must be something to cut"


@settings(max_examples=25)
@given(st.data())
def test_cuts_equal_the_library_on_small_vocabularies(data):
    """Few items make equal scores, and symbols that no piece holds."""
    sizes = tuple(data.draw(st.lists(st.integers(2, 4), min_size=1, max_size=6)))
    spec = SidSpec(sizes)
    item = st.tuples(*[st.integers(0, k - 1) for k in sizes])
    codes = torch.tensor(data.draw(st.lists(item, min_size=1, max_size=12)))
    weights = torch.tensor(data.draw(st.lists(st.integers(1, 5), min_size=len(codes), max_size=len(codes))))
    everything = torch.cartesian_prod(*[torch.arange(k) for k in sizes]).view(-1, len(sizes))
    config = PieceTrainerConfig(
        vocab_size=sum(sizes) + 1 + data.draw(st.integers(0, 20)),
        model=data.draw(st.sampled_from(["unigram", "bpe"])),
        all_symbols=data.draw(st.booleans()),
    )
    pieces = train_pieces(spec, codes, config, weights)
    assert ours(pieces, everything) == library(pieces, everything)


def test_every_way_to_cut_a_batch_is_the_same(monkeypatch):
    spec = SidSpec((32,) * 4)
    codes = skewed(spec, 1000)
    tokenizer = SidTokenizer(train_pieces(spec, codes, PieceTrainerConfig(400)))
    whole = tokenizer(spec.pack(codes))
    monkeypatch.setattr("torchrec_sid.tables.sentencepiece.tokenizer._CHUNK", 77)
    parts = tokenizer(spec.pack(codes))
    assert torch.equal(whole.ids, parts.ids)
    assert torch.equal(whole.counts, parts.counts)
    assert not tokenizer(spec.pack(codes[:0])).flat().numel()


def test_the_tokenizer_never_lives_on_meta():
    spec = SidSpec((4, 4))
    pieces = train_pieces(spec, skewed(spec, 20), PieceTrainerConfig(20))
    assert not [b for b in SidTokenizer(pieces, torch.device("meta")).buffers() if b.is_meta]


def pieces_of(**options):
    spec = SidSpec((16, 16, 16))
    codes = skewed(spec, 500)
    weights = options.pop("weights", None)
    return train_pieces(spec, codes, PieceTrainerConfig(**{"vocab_size": 150, **options}), weights)


def test_training_repeats_itself():
    assert pieces_of().fingerprint == pieces_of().fingerprint


def heavy():
    weights = torch.ones(500, dtype=torch.int64)
    weights[:20] = 500
    return weights


@pytest.mark.parametrize(
    "options",
    [{"vocab_size": 120}, {"model": "bpe"}, {"max_piece_levels": 2}, {"weights": heavy()}],
)
def test_every_field_changes_the_pieces(options):
    base, other = pieces_of(), pieces_of(**options)
    assert (base.starts.tolist(), base.bits.tolist()) != (other.starts.tolist(), other.bits.tolist())


def test_all_symbols_gives_every_code_a_piece():
    spec = SidSpec((16, 16, 16))
    codes = skewed(spec, 500) // 2  # codes 8..15 never occur
    for all_symbols, singles in ((True, 48), (False, 24)):
        pieces = train_pieces(spec, codes, PieceTrainerConfig(200, all_symbols=all_symbols))
        assert int((pieces.stops - pieces.starts == 1).sum()) == singles


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_pieces_are_runs_of_impressed_items(model):
    """Weight 0 takes an item out; runs that end at the last level are found as well."""
    spec = SidSpec((16, 16, 16))
    common = torch.tensor([[1, 2, 3], [4, 2, 3], [5, 6, 7]]).repeat(50, 1)
    unseen = torch.tensor([[9, 10, 11]]).repeat(50, 1)
    weights = torch.cat([torch.ones(150, dtype=torch.int64), torch.zeros(50, dtype=torch.int64)])
    pieces = train_pieces(spec, torch.cat([common, unseen]), PieceTrainerConfig(80, model), weights)
    runs = set(zip(pieces.starts.tolist(), pieces.stops.tolist(), pieces.bits.tolist(), strict=True))
    assert any(stop == 3 and stop - start > 1 for start, stop, _ in runs)
    assert not any(stop - start > 1 and bits & 15 == 11 for start, stop, bits in runs)


def test_max_piece_levels_bounds_every_piece():
    assert int((pieces_of(max_piece_levels=2).stops - pieces_of(max_piece_levels=2).starts).max()) == 2


def test_pieces_per_item_is_the_weighted_mean():
    spec = SidSpec((16, 16, 16))
    codes, weights = skewed(spec, 500), heavy()
    pieces = pieces_of(weights=weights)
    counts = torch.tensor([len(ids) for ids in library(pieces, codes)])
    assert pieces.pieces_per_item == pytest.approx(float((counts * weights).sum() / weights.sum()))


def test_saved_pieces_come_back(tmp_path):
    pieces = pieces_of(model="bpe")
    assert pieces.save(tmp_path / "p.safetensors") == pieces.fingerprint
    again = SidPieces.load(tmp_path / "p.safetensors")
    assert again.fingerprint == pieces.fingerprint
    assert (again.spec, again.config, again.pieces_per_item) == (
        pieces.spec,
        pieces.config,
        pieces.pieces_per_item,
    )
    codes = skewed(pieces.spec, 50, seed=1)
    assert ours(again, codes) == library(pieces, codes)


def test_a_broken_file_is_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    pieces_of().save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError):
        SidPieces.load(path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PieceTrainerConfig(1), "vocab_size=1"),
        (lambda: PieceTrainerConfig(10, "word"), "'word'"),
        (lambda: PieceTrainerConfig(10, max_piece_levels=0), "max_piece_levels=0"),
        (lambda: pieces_of(vocab_size=48), "Give at least 49"),
        (lambda: pieces_of(weights=torch.ones(500)), "float32"),
        (lambda: pieces_of(weights=torch.full((500,), -1)), "weights: -1"),
        (lambda: pieces_of(weights=torch.zeros(500, dtype=torch.int64)), "weight above 0"),
        (lambda: pieces_of(weights=torch.ones(3, dtype=torch.int64)), r"\(3,\)"),
        (lambda: train_pieces(SidSpec((4,)), torch.tensor([[4]]), PieceTrainerConfig(9)), "code 4"),
        (
            lambda: train_pieces(SidSpec((256,) * 8), torch.zeros(1, 8).long(), PieceTrainerConfig(9999)),
            "64 bits",
        ),
        (
            lambda: train_pieces(SidSpec((70_000,)), torch.zeros(1, 1).long(), PieceTrainerConfig(99_999)),
            "70000 symbols",
        ),
        (
            lambda: SidTokenizer(
                train_pieces(SidSpec((2,) * 15), torch.zeros(1, 15).long(), PieceTrainerConfig(40))
            ),
            "15 levels",
        ),
    ],
)
def test_senseless_training_is_refused(make, says):
    with pytest.raises(SidError, match=says):
        make()
