"""The rankers that apps.train trains export: DLRM, DCN-v2 and transformer, tables, content and SIDE."""

import logging
from dataclasses import replace

import pytest
import torch

from apps.export import normalized_entropy, to_request
from tests.models.test_ranking import CODES, CONFIG, DIGITS, ITEMS, SIDE, SIZES, SPEC, _batch
from torchrec_sid.models.build import build_ranking
from torchrec_sid.models.stores import ContentStore, SideStore, SidStore
from torchrec_sid.serving.exporter import ExportOptions, export_model
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


def test_padding_is_left_out():
    batch = _batch()
    assert to_request(batch).rows == int(batch.weights.sum()) == len(batch.labels) - 1


def test_normalized_entropy_of_the_base_rate_is_one():
    labels = torch.tensor([1.0, 0, 0, 0])
    assert normalized_entropy(torch.full((4,), -1.0986123), labels) == pytest.approx(1.0, abs=1e-6)
    assert normalized_entropy(torch.zeros(4), torch.ones(4)) is None
