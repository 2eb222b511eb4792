"""Item ids in, scores out: what the ranker makes of a request is what the reader makes of a log."""

import numpy as np
import pytest
import torch

from apps.predict import PredictConfig, predict
from tests.models.test_ranking import CODES, DIGITS, SIDE, SPEC
from tests.models.test_ranking import ITEMS as LOG_ITEMS
from tests.serving.test_rankers import make_ranking, make_request
from torchrec_sid.ages import NO_TIME, age_bucket
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.serving.exporter import export_model
from torchrec_sid.serving.ranker import Ranker, RankRequest
from torchrec_sid.serving.served_model import ITEMS, ServedItems

VALUES = {"sid": SPEC.pack(CODES), "bytes": SIDE.pack_bytes(DIGITS)}
DENSE = ("a", "b", "c")


@pytest.fixture(
    scope="module",
    params=[
        "hashed_prefix+side",
        pytest.param("full_id", marks=pytest.mark.slow),
        pytest.param("sentencepiece+dense", marks=pytest.mark.slow),
    ],
)
def served(request, tmp_path_factory):
    """(folder, the model, item ids in the order of the model's indices, the ranker)."""
    folder = tmp_path_factory.mktemp("served") / "float"
    ranking = make_ranking(request.param)
    ids = 1000 + 7 * torch.randperm(LOG_ITEMS, generator=torch.Generator().manual_seed(1))
    export_items(ranking, folder, ids)
    return folder, ranking, ids, Ranker.load_checked(folder)


def export_items(ranking, folder, ids):
    example = make_request(ranking).shared(2)
    limits = {name: 8 for name in example.features if name.startswith("history")}
    items = ServedItems(ids, VALUES, tuple(DENSE[: example.dense.shape[1]]))
    export_model(ranking.module.model, example, folder, max_lengths=limits, items=items)


def a_request(ids, ranker, events, rows, seed=0, **changes):
    draw = np.random.default_rng(seed)
    parts = {
        "candidates": draw.choice(ids.numpy(), rows),
        "history": draw.choice(ids.numpy(), events),
        "actions": draw.integers(0, 2, events),
        "times": np.sort(draw.integers(1, 10**6, events)),
        "now": 10**6 + 5,
        "dense": draw.normal(size=(rows, len(ranker.dense_names))).astype(np.float32),
    }
    return RankRequest(**{**parts, **changes})


def one_by_one(served, request, length):
    """The model on a batch of one candidate each, from plain loops."""
    _, ranking, ids, _ = served
    index = {int(item): i for i, item in enumerate(ids)}
    known = [i for i, item in enumerate(request.history.tolist()) if item in index][-length:]
    model = ranking.module.model.eval()
    scores = []
    for row, candidate in enumerate(request.candidates.tolist()):
        place, past = index[candidate], [index[request.history.tolist()[i]] for i in known]
        then = np.array([NO_TIME if request.times[i] < 0 else request.times[i] for i in known], np.int64)
        now = np.full(len(known), NO_TIME if request.now < 0 else request.now)
        given = {
            "item": [place],
            "history": past,
            "history_action": [int(request.actions[i]) for i in known],
            "history_age": age_bucket(now, then).tolist(),
        }
        rows = {}
        for name, values in VALUES.items():
            for field, at in ((f"item_{name}", [place]), (f"history_{name}", past)):
                if field in ranking.fields and values.dim() == 1:
                    given[field] = values[torch.tensor(at, dtype=torch.int64)].tolist()
                elif field in ranking.fields:
                    rows[field] = values[torch.tensor(at, dtype=torch.int64)]
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        keys = [name for name in ranking.fields if name in given]
        kjt = KeyedJaggedTensor(
            keys=keys,
            values=torch.tensor(sum((given[k] for k in keys), []), dtype=torch.int64),
            lengths=torch.tensor([len(given[k]) for k in keys]),
        )
        with torch.no_grad():
            scores.append(torch.sigmoid(model(torch.from_numpy(request.dense[row : row + 1]), kjt, **rows)))
    return torch.cat(scores).numpy()


def test_scores_are_those_of_the_model_whatever_is_asked_together(served):
    _, _, ids, ranker = served
    requests = [
        a_request(ids, ranker, 5, 7),
        a_request(ids, ranker, 0, 1, seed=1),
        a_request(ids, ranker, 30, 3, seed=2),
        a_request(ids, ranker, 4, 2, seed=3, times=np.array([-1, -1, -1, -1])),
        a_request(ids, ranker, 4, 2, seed=4, now=-1),
    ]
    together = ranker.rank(requests)
    for request, ranked in zip(requests, together, strict=True):
        ranker.check(request)
        expected = one_by_one(served, request, ranker.history_length)
        np.testing.assert_allclose(ranked.scores, expected, atol=1e-5, rtol=0)
        np.testing.assert_allclose(ranker.rank([request])[0].scores, expected, atol=1e-5, rtol=0)
        assert ranked.unknown_history == 0


def test_events_of_unknown_items_are_left_out_and_counted(served):
    ranker = served[3]
    request = a_request(served[2], ranker, 12, 3)
    history = request.history.copy()
    history[[0, 5, 11]] = (-9, 1, 10**12)
    request = request._replace(history=history)
    (ranked,) = ranker.rank([request])
    assert ranked.unknown_history == 3
    expected = one_by_one(served, request, ranker.history_length)
    np.testing.assert_allclose(ranked.scores, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"candidates": np.empty(0, np.int64), "dense": np.empty((0, 3), np.float32)}, "candidates: none"),
        ({"candidates": np.array([12])}, "item 12 is not in this model"),
        ({"actions": np.array([1])}, "history_action has 1"),
        ({"times": np.array([5, 4, 3])}, "times fall"),
        ({"now": 2, "times": np.array([1, 2, 3])}, "3 is after ts 2"),
        ({"dense": np.array([[np.nan, 0, 0]], np.float32)}, "a: nan"),
        ({"dense": np.zeros((2, 3), np.float32)}, "dense: shape"),
    ],
)
def test_what_cannot_be_ranked_is_refused_by_name(served, changes, named):
    ranker = served[3]
    width = len(ranker.dense_names)
    if "dense" in changes:
        changes = {**changes, "dense": changes["dense"][:, :width]}
    with pytest.raises(SidError, match=named):
        ranker.check(a_request(served[2], ranker, 3, 1, **changes))


def test_a_folder_without_its_items_is_refused(served, tmp_path):
    import shutil

    folder = tmp_path / "served"
    shutil.copytree(served[0], folder)
    other = ServedItems(served[2] + 1, VALUES, served[3].dense_names)
    (folder / ITEMS).unlink()
    other.write(folder / ITEMS)
    with pytest.raises(ArtifactError, match="items"):
        Ranker.load(folder)
    (folder / ITEMS).unlink()
    with pytest.raises(ArtifactError, match="items"):
        Ranker.load(folder)


def test_items_are_part_of_the_version(served, tmp_path):
    _, ranking, ids, _ = served
    export_items(ranking, tmp_path / "again", ids + 1)
    assert Ranker.version_of(tmp_path / "again") != Ranker.version_of(served[0])


def test_a_file_of_requests_is_scored_and_goes_on(served, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, _, ids, ranker = served
    requests = [a_request(ids, ranker, 3 + n % 4, 1 + n % 3, seed=n) for n in range(25)]
    columns = {
        "request": list(range(25)),
        "candidates": [r.candidates.tolist() for r in requests],
        "history": [r.history.tolist() for r in requests],
        "history_action": [r.actions.tolist() for r in requests],
        "history_ts": [r.times.tolist() for r in requests],
        "ts": [r.now for r in requests],
        **{n: [float(r.dense[0, i]) for r in requests] for i, n in enumerate(ranker.dense_names)},
    }
    file = tmp_path / "requests.parquet"
    pq.write_table(pa.table(columns), file)
    config = PredictConfig(str(folder), str(file), str(tmp_path / "scores"), rows=10, batch_candidates=4)
    assert predict(config) == (3, 25)
    parts = sorted((tmp_path / "scores").glob("part-*.parquet"))
    stamps = [part.stat().st_mtime_ns for part in parts]
    parts[1].unlink()
    assert predict(config) == (3, 25)
    assert parts[0].stat().st_mtime_ns == stamps[0], "what is done is not done again"
    table = pa.concat_tables(pq.read_table(part) for part in parts)
    assert table.column("request").to_pylist() == list(range(25))
    for request, scores in zip(requests, table.column("scores").to_pylist(), strict=True):
        same = request._replace(dense=np.repeat(request.dense[:1], len(request.candidates), 0))
        np.testing.assert_allclose(scores, ranker.rank([same])[0].scores, atol=1e-6)
    pq.write_table(pa.table({**columns, "ts": [5] * 25}), file)
    with pytest.raises(SidError, match="other requests"):
        predict(config)
    with pytest.raises(SidError, match="request 0, history_ts"):
        predict(PredictConfig(str(folder), str(file), str(tmp_path / "other")))
