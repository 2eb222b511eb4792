"""The synthetic log: planted hierarchy, power laws, arrivals, signal, reproducibility."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from torch import from_numpy

from tests.data.logs import distributions
from torchrec_sid.data import (
    LogFolder,
    PrepareConfig,
    PreparedLog,
    SyntheticConfig,
    prepare,
    write_synthetic,
)
from torchrec_sid.data.planted import World
from torchrec_sid.data.synthetic import FIRST_ITEM_ID
from torchrec_sid.errors import SidError

CONFIG = SyntheticConfig(items=2_000, users=400, events=60_000, topics=8, subtopics=4, max_history=1_500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> LogFolder:
    return write_synthetic(tmp_path_factory.mktemp("synthetic") / "log", CONFIG)


@pytest.fixture(scope="module")
def events(folder: LogFolder) -> dict[str, np.ndarray]:
    table = pq.read_table(folder.path / "events.parquet")
    columns = {name: table[name].to_numpy() for name in table.column_names}
    return columns | {"item": columns["item"] - FIRST_ITEM_ID}


@pytest.fixture(scope="module")
def log(folder: LogFolder, tmp_path_factory: pytest.TempPathFactory) -> PreparedLog:
    return prepare(folder, tmp_path_factory.mktemp("prepared") / "out", PrepareConfig(shuffle_window=0))


def digests(path: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir()}


def auc(score: np.ndarray, label: np.ndarray) -> float:
    rank = np.empty(len(score))
    rank[np.argsort(score)] = np.arange(1, len(score) + 1)
    positives = label.sum()
    return (rank[label == 1].sum() - positives * (positives + 1) / 2) / (
        positives * (len(label) - positives)
    )


def test_is_the_documented_format(folder: LogFolder) -> None:
    assert len(folder) == 2_000 and folder.sources == ("content", "image")
    assert folder.item_ids[0] == FIRST_ITEM_ID and folder.default_source == "content"
    folder.validate()
    assert folder.texts([7])[0].startswith("topic ")
    names, probabilities = distributions(folder.category("category"))
    assert len(names) == 8 and (probabilities.sum(1) == 1).all()
    topic = folder.item_column("topic").to_numpy()
    agree = np.mean(
        [names[p.argmax()] == f"category {t}" for p, t in zip(probabilities, topic, strict=True)]
    )
    assert agree == pytest.approx(1 - 0.1 * 7 / 8, abs=0.03)


@pytest.mark.parametrize("source", ["content", "image"])
def test_plants_a_hierarchy_in_the_embeddings(folder: LogFolder, source: str) -> None:
    x = np.asarray(folder.embedding_matrix(source), np.float32)
    assert np.linalg.norm(x, axis=1) == pytest.approx(1, abs=2e-3)
    topic, subtopic = (folder.item_column(n).to_numpy() for n in ("topic", "subtopic"))
    cosine = x @ x.T
    same_topic = topic[:, None] == topic
    same_subtopic = same_topic & (subtopic[:, None] == subtopic)
    off = ~np.eye(len(x), dtype=bool)
    within = cosine[same_subtopic & off].mean()
    near = cosine[same_topic & ~same_subtopic].mean()
    far = cosine[~same_topic].mean()
    assert within > 0.6 > near > 0.3 > abs(far)
    # And each topic by itself, not only on average.
    for t in range(8):
        assert (
            cosine[np.ix_(topic == t, topic == t)].mean()
            > cosine[np.ix_(topic == t, topic != t)].mean() + 0.2
        )


def test_popularity_and_activity_follow_power_laws(events: dict[str, np.ndarray]) -> None:
    old = World(CONFIG).old_items
    counts = np.sort(np.bincount(events["item"], minlength=2_000)[:old])[::-1]
    rank = np.arange(10, 600)
    slope = np.polyfit(np.log(rank), np.log(counts[10:600]), 1)[0]
    assert slope == pytest.approx(-0.8, abs=0.15)
    assert counts[: old // 10].sum() > 0.45 * counts.sum()
    longest = np.bincount(events["user"]).max()
    assert longest == pytest.approx(1_500, rel=0.1), "the most active user is capped at max_history"


def test_items_arrive_over_time_and_are_cold_in_test(
    events: dict[str, np.ndarray], log: PreparedLog
) -> None:
    world = World(CONFIG)
    arrival = world.arrival(events["item"]) + CONFIG.start
    assert (events["ts"] >= arrival).all()
    assert (np.diff(events["ts"]) >= 0).all()
    assert world.old_items == 1_200
    assert (world.arrival(np.arange(1_200)) == 0).all() and (
        np.diff(world.arrival(np.arange(1_199, 2_000))) > 0
    ).all()
    cold = log.manifest["splits"]["test"]["segments"]["cold"]
    assert cold["rows"] > 0.1 * log.rows("test")
    assert 0.3 < cold["positives"] / cold["rows"] < 0.7


def test_labels_follow_the_planted_odds(events: dict[str, np.ndarray]) -> None:
    odds = World(CONFIG).log_odds(events["user"], events["item"])
    chance = 1 / (1 + np.exp(-odds))
    for low in np.arange(0.1, 0.9, 0.1):
        inside = (chance >= low) & (chance < low + 0.1)
        assert events["label"][inside].mean() == pytest.approx(chance[inside].mean(), abs=0.03)
    assert auc(odds, events["label"]) > 0.75


def test_content_predicts_the_labels_of_cold_items(folder: LogFolder, log: PreparedLog) -> None:
    """From the past alone: what the user liked so far, and what kind of item was liked by all."""
    x = np.asarray(folder.embedding_matrix(), np.float64)
    train, test = (pq.read_table(log.path / split / "00000") for split in ("train", "test"))
    item, label = train["item"].to_numpy(), train["label"].to_numpy()
    shown, liked = (np.bincount(item, w, minlength=2_000) for w in (np.ones(len(item)), label))
    seen = shown > 0
    rate = (liked[seen] + 2) / (shown[seen] + 4) - 0.5
    weighted = x[seen] * np.sqrt(shown[seen, None])
    quality = np.linalg.solve(
        weighted.T @ weighted + np.eye(64), weighted.T @ (rate * np.sqrt(shown[seen]))
    )

    cold = test["segment"].to_numpy() == 3
    rows = {n: test[n].to_numpy()[cold] for n in ("item", "label", "hist_begin", "hist_end")}
    taste = np.zeros((len(rows["item"]), 64))
    for k, (begin, end) in enumerate(zip(rows["hist_begin"], rows["hist_end"], strict=True)):
        sign = 2.0 * log.store.action[begin:end] - 1
        taste[k] = sign @ x[log.store.item[begin:end]]
    by_taste = (taste * x[rows["item"]]).sum(1)
    assert auc(by_taste, rows["label"]) > 0.62
    assert auc(x[rows["item"]] @ quality, rows["label"]) > 0.55
    shuffled = x[np.random.default_rng(0).permutation(2_000)]
    assert abs(auc((taste * shuffled[rows["item"]]).sum(1), rows["label"]) - 0.5) < 0.06


def test_sources_complement_each_other(folder: LogFolder) -> None:
    """Two sources together tell more of the item's own latent than either one."""
    latent = World(CONFIG).latent(np.arange(2_000))
    sources = [np.asarray(folder.embedding_matrix(s), np.float64) for s in folder.sources]

    def unexplained(x: np.ndarray) -> float:
        x = np.column_stack([x, np.ones(len(x))])
        weights = np.linalg.lstsq(x[:1_000], latent[:1_000], rcond=None)[0]
        return float(((latent[1_000:] - x[1_000:] @ weights) ** 2).mean())

    assert unexplained(np.column_stack(sources)) < 0.85 * min(unexplained(x) for x in sources)


def test_the_same_seed_gives_the_same_bytes(folder: LogFolder, tmp_path: Path) -> None:
    again = write_synthetic(tmp_path / "again", CONFIG)
    assert digests(again.path) == digests(folder.path)
    other = write_synthetic(tmp_path / "other", replace(CONFIG, seed=1))
    same = {name for name, digest in digests(other.path).items() if digests(folder.path)[name] == digest}
    assert same == {"dataset.json"}


def test_is_reused_and_replaced_as_a_whole(tmp_path: Path) -> None:
    small = SyntheticConfig(items=100, users=20, events=500)
    path = write_synthetic(tmp_path / "log", small).path
    stamp = (path / "events.parquet").stat().st_ino
    assert (write_synthetic(path, small).path / "events.parquet").stat().st_ino == stamp
    write_synthetic(path, replace(small, items=150))
    assert len(LogFolder.open(path)) == 150
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(SidError, match="not a synthetic log"):
        write_synthetic(tmp_path / "mine", small)


CHANGES: dict[str, Any] = {
    "items": 150,
    "users": 30,
    "events": 600,
    "topics": 5,
    "subtopics": 3,
    "dim": 32,
    "sources": ("content", "audio"),
    "noise": 0.6,
    "category_noise": 0.5,
    "popularity": 1.2,
    "activity": 1.5,
    "max_history": 30,
    "new_items": 0.1,
    "freshness": 0.5,
    "topic_signal": 0.0,
    "subtopic_signal": 0.0,
    "item_signal": 0.0,
    "quality_signal": 0.0,
    "taste_days": 10,
    "bias": 2.0,
    "days": 30,
    "start": 0,
    "seed": 5,
}


def test_every_field_changes_the_log(tmp_path: Path) -> None:
    base = SyntheticConfig(items=100, users=20, events=500)
    assert set(CHANGES) == {field.name for field in fields(SyntheticConfig)}
    data = {"events.parquet", "items.parquet", "item_emb.npy", "item_emb_image.npy"}
    before = digests(write_synthetic(tmp_path / "base", base).path)
    for name, value in CHANGES.items():
        after = digests(write_synthetic(tmp_path / name, replace(base, **{name: value})).path)
        assert {n: after.get(n) for n in data} != {n: before[n] for n in data}, name


@pytest.mark.parametrize(
    "change",
    [
        {"items": 0},
        {"new_items": 1.0},
        {"sources": ()},
        {"sources": ("a", "a")},
        {"noise": -1},
        {"events": 10**9},
    ],
)
def test_refuses_a_bad_configuration(change: dict[str, Any]) -> None:
    with pytest.raises(SidError):
        replace(SyntheticConfig(), **change)


def test_embeddings_feed_a_quantizer(folder: LogFolder) -> None:
    stream = folder.embeddings()
    total = sum(len(batch) for batch in stream)
    assert total == stream.rows == 2_000
    first = next(iter(stream))
    assert first.equal(from_numpy(np.asarray(folder.embedding_matrix(), np.float32)[: len(first)]))


def test_tastes_last_or_are_drawn_anew():
    import numpy as np

    from torchrec_sid.data.planted import World

    user, topic = np.repeat(np.arange(50), 30), np.tile(np.arange(30) % 16, 50)
    ts = np.tile(np.arange(30) * 86_400, 50)
    lasting = World(SyntheticConfig())
    assert np.array_equal(lasting.tasting(user, ts), user)
    drifting = World(SyntheticConfig(taste_days=10))
    eras = drifting.tasting(user, ts).reshape(50, 30)
    # In 30 days every user changes tastes three times, or two and on days of their own.
    assert {len(set(mine)) for mine in eras.tolist()} <= {3, 4}
    assert len({tuple(np.diff(mine) > 0) for mine in eras}) == 10
    same = [
        np.corrcoef(world.likes_topic(user, topic), world.likes_topic(world.tasting(user, ts), topic))[0, 1]
        for world in (lasting, drifting)
    ]
    assert same[0] == pytest.approx(1) and abs(same[1]) < 0.6
