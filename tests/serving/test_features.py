"""Named features in, scores out: a served folder encodes what training read from the log."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from apps.predict import PredictConfig, predict
from tests.data.test_example_features import SPEC, write
from torchrec_sid.data.batch import RankingBatch
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.reader import BatchReader
from torchrec_sid.data.specification import Specification
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.models.build import RankingConfig, build_ranking
from torchrec_sid.serving.exporter import export_model
from torchrec_sid.serving.ranker import Ranker, RankRequest
from torchrec_sid.serving.request import Bags, Request
from torchrec_sid.serving.served_features import FEATURES, ServedFeatures
from torchrec_sid.serving.served_model import ServedItems
from torchrec_sid.training.log_features import log_sizes
from torchrec_sid.training.run import batch_config

LENGTH, USERS = 5, {"age": [10, 20, 30, 40, 50, 60, 70], "city": list("aabbccd")}


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Ranker, list[RankingBatch], PreparedLog, list]:
    """A ranker, batches of the test period, the log, and what the model says of each batch."""
    folder = tmp_path_factory.mktemp("features")
    log = write(folder, 1)
    torch.manual_seed(0)
    ranking = build_ranking(
        RankingConfig("full_id", dim=8, heads=2, history_length=LENGTH), log_sizes(log, 8)
    )
    model = ranking.module.model.eval()
    for parameter in model.parameters():  # so that no feature is lost in rounding
        parameter.data += 0.2 * torch.randn(parameter.shape)
    reads = batch_config(ranking, 16, LENGTH)
    batches = list(BatchReader(log, "test", reads))
    first = batches[0]
    features = {name: Bags(*_bags(first, name)) for name in first.features.keys()}  # noqa: SIM118
    rows_of = dict.fromkeys(first.rows, "history_action")
    example = Request(first.dense, features, first.rows, rows_of).shared(2)
    items = ServedItems(torch.from_numpy(np.array(log.item_ids)), {}, log.dense_names)
    limits = {name: LENGTH for name in features if name.startswith("history")}
    export_model(model, example, folder / "served", max_lengths=limits, items=items, log=log)
    with torch.no_grad():
        logits = [model(batch.dense, batch.features, batch.rows) for batch in batches]
    return Ranker.load_checked(folder / "served"), batches, log, logits


def _bags(batch: RankingBatch, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.features[name].values(), batch.features[name].lengths()


def requests(log: PreparedLog) -> list[RankRequest]:
    """The rows of the test period as a caller has them: raw columns and times."""
    events = pq.read_table(log.path.parent / "log" / "events.parquet").to_pylist()
    users, ids = log.user_keys.to_pylist(), np.array(log.item_ids)
    found = []
    for row in pq.read_table(log.path / "test" / "00000").to_pylist():
        user, ts = users[row["user"]], row["ts"]
        event = events[row["event"]]
        past = sorted((e["ts"], i) for i, e in enumerate(events) if e["user"] == user and e["ts"] < ts)
        seen = [events[i] for _, i in past]
        found.append(
            RankRequest(
                np.array([ids[row["item"]]]),
                np.array([e["item"] for e in seen], np.int64),
                np.array([e["label"] for e in seen], np.int64),
                np.array([e["ts"] for e in seen], np.int64),
                ts,
                np.array([[row[name] for name in log.dense_names]], np.float32),
                {
                    "device": pa.array([event["device"]]),
                    "price": pa.array([event["price"]]),
                    "age": pa.array([USERS["age"][user]]),
                    "city": pa.array([USERS["city"][user]]),
                    "history_device": pa.array([e["device"] for e in seen], pa.string()),
                    "history_price": pa.array([e["price"] for e in seen], pa.float64()),
                },
            )
        )
    return found


def test_scores_are_those_of_training_from_raw_columns(served) -> None:
    ranker, batches, log, logits = served
    asked = requests(log)
    for request in asked:
        ranker.check(request)
    weights = torch.cat([batch.weights for batch in batches])
    expected = torch.sigmoid(torch.cat(logits))[weights > 0].numpy()
    together = np.concatenate([ranked.scores for ranked in ranker.rank(asked)])
    np.testing.assert_allclose(together, expected, atol=1e-5)
    assert expected.std() > 1e-2
    alone = ranker.rank(asked[:1])[0].scores
    np.testing.assert_allclose(alone, expected[:1], atol=1e-5)


def test_every_feature_that_is_stated_counts(served) -> None:
    ranker, _, log, _ = served
    request = max(requests(log), key=lambda request: len(request.history))
    plain = ranker.rank([request])[0].scores
    for name in request.features:
        fewer = {key: value for key, value in request.features.items() if key != name}
        missing = ranker.rank([request._replace(features=fewer)])[0].scores
        assert not np.allclose(missing, plain, atol=1e-6), name


def test_values_of_each_candidate_and_of_all(served) -> None:
    ranker, _, log, _ = served
    one = requests(log)[0]
    wide = one._replace(
        candidates=ranker.item_ids[:3],
        dense=one.dense.repeat(3, 0),
        features={**one.features, "device": pa.array(["tv", None, "never seen"])},
    )
    scores = ranker.rank([wide])[0].scores
    for row, device in enumerate(("tv", None, "never seen")):
        alone = one._replace(
            candidates=wide.candidates[row : row + 1],
            features={**one.features, "device": pa.array([device], pa.string())},
        )
        np.testing.assert_allclose(ranker.rank([alone])[0].scores, scores[row : row + 1], atol=1e-6)


@pytest.mark.parametrize(
    ("features", "named"),
    [
        ({"colour": pa.array(["red"])}, "colour: no feature"),
        ({"brand": pa.array(["b1"])}, "brand: no feature"),
        ({"device": pa.array(["tv", "tv"])}, "device: 2 values"),
        ({"history_device": pa.array(["tv"])}, "history_device: 1 values"),
        ({"price": pa.array(["dear"])}, "price"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(served, features, named: str) -> None:
    ranker, _, log, _ = served
    request = next(r for r in requests(log) if len(r.history) > 3)
    with pytest.raises(SidError, match=named):
        ranker.check(request._replace(features={**request.features, **features}))


def test_a_file_of_requests_has_features_by_name(served, tmp_path: Path) -> None:
    ranker, _, log, _ = served
    asked = requests(log)[:6]
    columns = {
        "candidates": [r.candidates.tolist() for r in asked],
        "history": [r.history.tolist() for r in asked],
        "history_action": [r.actions.tolist() for r in asked],
        "history_ts": [r.times.tolist() for r in asked],
        "ts": [r.now for r in asked],
        **{name: [float(r.dense[0, i]) for r in asked] for i, name in enumerate(ranker.dense_names)},
        **{
            name: [r.features[name][0].as_py() for r in asked]
            for name in ("device", "price", "age", "city")
        },
        **{n: [r.features[n].to_pylist() for r in asked] for n in ("history_device", "history_price")},
    }
    pq.write_table(pa.table(columns), tmp_path / "requests.parquet")
    predict(
        PredictConfig(str(ranker.model.folder), str(tmp_path / "requests.parquet"), str(tmp_path / "out"))
    )
    scores = pq.read_table(tmp_path / "out" / "part-00000.parquet").column("scores").to_pylist()
    for found, ranked in zip(scores, ranker.rank(asked), strict=True):
        np.testing.assert_allclose(found, ranked.scores, atol=1e-6)


def test_what_was_written_is_read(served, tmp_path: Path) -> None:
    _, _, log, _ = served
    assert ServedFeatures.write(log, tmp_path / FEATURES)
    found = ServedFeatures.read(tmp_path / FEATURES, lambda ids: np.zeros(len(ids), np.int64))
    assert dataclasses.asdict(found.specification) == dataclasses.asdict(log.specification)
    plain = json.loads(json.dumps(log.manifest["specification"]))
    assert Specification.from_plain(plain) == SPEC
    assert set(found.asked) == {"device", "price", "age", "city", "history_device", "history_price"}
    with (tmp_path / FEATURES).open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    with pytest.raises(ArtifactError):
        ServedFeatures.read(tmp_path / FEATURES, lambda ids: np.zeros(len(ids), np.int64))
