"""The rankers that apps.train trains export: DLRM, DCN-v2 and transformer, tables, content and SIDE."""

import logging
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apps.export import normalized_entropy, to_request
from tests.models.test_ranking import CODES, CONFIG, DIGITS, ITEMS, SIDE, SIZES, SPEC, _batch
from torchrec_sid.errors import SidError
from torchrec_sid.models.build import build_ranking
from torchrec_sid.models.stores import ContentStore, SideStore, SidStore
from torchrec_sid.serving.exporter import ExportOptions, Program, export_model
from torchrec_sid.serving.request import Bags, Request
from torchrec_sid.serving.served_model import ServedModel
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.tables import PieceTrainerConfig, train_pieces


def make_ranking(arm, **changes):
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    pieces = train_pieces(SPEC, CODES, PieceTrainerConfig(vocab_size=16))
    basis = FrozenBasis.from_digits(SIDE, torch.randn(10, 6, generator=generator))
    stores = (
        SidStore(SPEC, pieces),
        SideStore(basis, values={"bytes": SIDE.pack_bytes(DIGITS)}),
        ContentStore(torch.randn(ITEMS, 6, generator=generator)),
    )
    return build_ranking(replace(CONFIG, arm=arm, **changes), SIZES, stores)


def make_request(ranking):
    """Of the fields that the ranking reads, as the reader of a log gives them."""
    whole = to_request(_batch())
    extras = {name: tensor for name, tensor in whole.extras.items() if name in ranking.fields}
    return whole._replace(
        features={name: bags for name, bags in whole.features.items() if name in ranking.fields},
        extras=extras,
        rows_of={name: of for name, of in whole.rows_of.items() if name in extras},
    )


@pytest.mark.parametrize(
    ("arm", "changes", "precision"),
    [
        ("hashed_prefix+sentencepiece+side", {"interaction": "dcn", "recent": 2}, "int8"),
        ("hashed_prefix+dense", {"encoder_layers": 1}, "float"),
    ],
)
def test_it_answers_as_the_model(arm, changes, precision, tmp_path):
    ranking = make_ranking(arm, **changes)
    request = make_request(ranking)
    limits = {name: 8 for name in request.features if name.startswith("history")}
    logging.disable(logging.DEBUG)
    try:
        report = export_model(
            ranking.module.model, request, tmp_path, ExportOptions(precision), max_lengths=limits
        )
    finally:
        logging.disable(logging.NOTSET)
    batch = _batch()
    with torch.no_grad():
        _, output = ranking.module(batch)
    expected = output.logits[batch.weights > 0]
    assert report.difference <= 1e-5
    torch.testing.assert_close(
        report.outputs, expected, atol=1e-5 if precision == "float" else 1e-2, rtol=0
    )
    served = ServedModel.load(tmp_path)
    torch.testing.assert_close(served(request.take([2])), report.outputs[[2]], atol=1e-5, rtol=0)
    assert float(report.outputs.std()) > 1e-3


BY_USER = [
    ("hashed_prefix+dense", {"encoder_layers": 1, "recent": 2}),
    pytest.param("side", {"recent": 2}, marks=pytest.mark.slow),
    pytest.param("none", {}, marks=pytest.mark.slow),
    pytest.param("full_id+sentencepiece+side", {"interaction": "dcn"}, marks=pytest.mark.slow),
    pytest.param("random_hash+side", {"encoder_layers": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("arm", "changes"), BY_USER)
def test_users_with_many_candidates_get_the_answers_of_their_rows(arm, changes, tmp_path):
    ranking = make_ranking(arm, **changes)
    single = make_request(ranking)
    limits = {name: 8 for name in single.features if name.startswith("history")}
    example = single.shared(2)
    assert (example.users, example.rows) == (3, 5)
    report = export_model(ranking.module.model, example, tmp_path, max_lengths=limits)
    model = ServedModel.load(tmp_path)
    program = Program(ranking.module.model.eval(), tuple(single.features))
    for request in (single.shared(1), single.shared(5), example.of_size(70), example.take([1, 0, 1])):
        with torch.no_grad():
            expected = program(*request.by_row().arguments())
        torch.testing.assert_close(model(request), expected, atol=1e-5, rtol=0)
        assert len(expected) == request.rows
    assert float(report.outputs.std()) > 1e-3
    graph = zipfile.ZipFile(tmp_path / "program.pt2").read("program/models/model.json").decode()
    assert "stack_trace" not in graph and str(Path(__file__).parents[2]) not in graph
    with pytest.raises(SidError, match="by user"):
        model(single)
    for counts in (torch.tensor([2, 2, 2]), torch.tensor([5, 0]), torch.tensor([2.0, 2, 1])):
        with pytest.raises(SidError, match="counts"):
            model(example._replace(counts=counts))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 9))
def test_requests_by_user_and_by_row_are_the_same_rows(counts, seed):
    draw = torch.Generator().manual_seed(seed)
    users, rows = len(counts), sum(counts)
    lengths = torch.randint(0, 4, (users,), generator=draw)
    events = int(lengths.sum())
    request = Request(
        torch.randn(rows, 2),
        {
            "item": Bags(torch.arange(rows), torch.ones(rows, dtype=torch.int64)),
            "history": Bags(torch.arange(events), lengths),
        },
        {"history_bytes": torch.arange(events)[:, None], "item_bytes": torch.arange(rows)[:, None]},
        {"history_bytes": "history"},
        torch.tensor(counts),
        ("history",),
    )
    alone = request.by_row()
    bags = request.features["history"].values.split(lengths.tolist())
    wanted = [bags[user] for user, count in enumerate(counts) for _ in range(count)]
    found = alone.features["history"].values.split(alone.features["history"].lengths.tolist())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(alone.extras["history_bytes"][:, 0], alone.features["history"].values)
    assert torch.equal(alone.dense, request.dense)
    order = torch.randperm(users, generator=draw).tolist()
    moved = request.take(order)
    assert torch.equal(moved.take(torch.tensor(order).argsort().tolist()).dense, request.dense)
    assert moved.rows == rows and moved.counts.tolist() == [counts[user] for user in order]


def test_padding_is_left_out():
    batch = _batch()
    assert to_request(batch).rows == int(batch.weights.sum()) == len(batch.labels) - 1


def test_normalized_entropy_of_the_base_rate_is_one():
    labels = torch.tensor([1.0, 0, 0, 0])
    assert normalized_entropy(torch.full((4,), -1.0986123), labels) == pytest.approx(1.0, abs=1e-6)
    assert normalized_entropy(torch.zeros(4), torch.ones(4)) is None
