"""Opening log folders: sources, indices, categories, and which items have content."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data.logs import all_examples, distributions, random_events, write_log
from torchrec_sid.data import LogFolder, NegativeSampling, PrepareConfig, prepare
from torchrec_sid.data.schema import ItemIndex
from torchrec_sid.errors import SidError
from torchrec_sid.item_content import ItemContent

EVENTS = random_events(60)


def write_embeddings(folder: Path, name: str, ids: list[int], dim: int = 4) -> np.ndarray:
    values = np.random.default_rng(len(name)).standard_normal((len(ids), dim)).astype(np.float32)
    table = {
        "item_id": pa.array(ids, pa.int64()),
        "embedding": pa.array(values.tolist(), pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(table), folder / name)
    return values


def test_opens_aligned_embeddings_memory_mapped(tmp_path: Path) -> None:
    folder = LogFolder.open(write_log(tmp_path, EVENTS))
    assert folder.item_ids.tolist() == list(range(100, 120)) and len(folder) == 20
    assert folder.sources == ("content",) and folder.default_source == "content"
    matrix = folder.embedding_matrix()
    assert isinstance(matrix, np.memmap) and matrix.shape == (20, 4)
    stream = folder.embeddings()
    assert (stream.dim, stream.rows) == (4, 20)
    assert torch.cat(list(stream)).equal(torch.from_numpy(np.array(matrix)))


def test_keyed_embeddings_come_in_item_order(tmp_path: Path) -> None:
    write_log(tmp_path, EVENTS)
    (tmp_path / "item_emb.npy").unlink()
    ids = list(range(100, 120))
    shuffled = ids[::3] + ids[1::3] + ids[2::3]
    values = write_embeddings(tmp_path, "item_emb.parquet", shuffled)
    same = write_embeddings(tmp_path, "item_emb_image.parquet", ids, dim=6)
    folder = LogFolder.open(tmp_path)
    expected = values[[shuffled.index(i) for i in ids]]
    assert np.array_equal(folder.embedding_matrix(), expected)
    assert torch.cat(list(folder.embeddings())).equal(torch.from_numpy(expected))
    assert torch.cat(list(folder.embeddings("image"))).equal(torch.from_numpy(same))


def test_a_second_source_may_lack_items(tmp_path: Path) -> None:
    write_log(tmp_path, EVENTS)
    values = write_embeddings(tmp_path, "item_emb_image.parquet", [105, 103])
    folder = LogFolder.open(tmp_path)
    assert folder.sources == ("content", "image")
    source = folder.source("image")
    assert np.flatnonzero(source.present).tolist() == [3, 5]
    assert np.array_equal(source.matrix[[5, 3]], values)
    assert not source.matrix[[0, 1, 2, 4]].any()
    assert folder.embeddings("image").rows == 2
    # As the default source it decides which items there are.
    small = LogFolder.open(tmp_path, source="image", missing_embedding="drop")
    assert small.item_ids.tolist() == [103, 105] and len(small.bare_keys) == 18
    assert small.embedding_matrix("content").shape == (2, 4)


def test_the_richest_text_names_the_default_source(tmp_path: Path) -> None:
    columns = {"text": ["short"] * 20, "text_plot": [f"a long story about item {i}" for i in range(20)]}
    write_log(tmp_path, EVENTS, item_columns=columns)
    write_embeddings(tmp_path, "item_emb_plot.parquet", list(range(100, 120)))
    assert LogFolder.open(tmp_path).default_source == "plot"
    assert LogFolder.open(tmp_path, source="content").default_source == "content"
    (tmp_path / "dataset.json").write_text(json.dumps({"default_source": "content"}))
    assert LogFolder.open(tmp_path).default_source == "content"


def test_declared_items_leave_the_others_out(tmp_path: Path) -> None:
    """item_emb_rows.parquet says which items have content; events on the others are left out."""
    write_log(tmp_path / "log", EVENTS)
    np.save(tmp_path / "log" / "item_emb.npy", np.ones((12, 4), np.float16))
    rows = pa.table({"item_id": pa.array(range(108, 120), pa.int64())})
    pq.write_table(rows, tmp_path / "log" / "item_emb_rows.parquet")
    folder = LogFolder.open(tmp_path / "log")
    assert folder.item_ids.tolist() == list(range(108, 120)) and folder.drop_bare
    log = prepare(folder, tmp_path / "out", PrepareConfig(block_rows=4))
    kept = [r for r in range(60) if EVENTS["item"][r] >= 108]
    examples = all_examples(log)
    assert sorted(row["event"] for row in examples) == kept
    assert {h[0] for row in examples for h in row["history"]} <= set(range(108, 120))
    assert log.manifest["dropped"]["without_embedding"] == 60 - len(kept)
    strict = LogFolder.open(tmp_path / "log", missing_embedding="error")
    with pytest.raises(SidError, match=r"has no embedding\. Add one, or open the folder with missing"):
        prepare(strict, tmp_path / "b")


@pytest.mark.parametrize("ids", [[5, 6, 7], [7, -3, 10**15, 6], [2**62, -(2**62)]])
def test_index_of_any_ids(ids: list[int]) -> None:
    index = ItemIndex(np.array(ids))
    assert index(np.array(ids)).tolist() == list(range(len(ids)))
    assert index(np.array([4, 8, 2**63 - 1, -(2**63)])).tolist() == [-1] * 4


def test_texts_for_reports(tmp_path: Path) -> None:
    folder = LogFolder.open(write_log(tmp_path / "a", EVENTS))
    assert folder.texts([1, 0]) == ["101", "100"]
    titled = write_log(tmp_path / "b", EVENTS, item_columns={"title": [f"item {i}" for i in range(20)]})
    assert LogFolder.open(titled).texts()[3] == "item 3"


def test_categories_as_distributions(tmp_path: Path) -> None:
    genres = ["drama, war", "war", "", "comedy"] * 5
    folder = LogFolder.open(
        write_log(tmp_path, EVENTS, item_columns={"genres": genres, "size": list(range(20))})
    )
    names, probabilities = distributions(folder.category("genres", separator=", "))
    assert names == ("comedy", "drama", "war")
    assert probabilities[:4].tolist() == [[0, 0.5, 0.5], [0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert folder.category("genres").names == ("comedy", "drama, war", "war")
    assert distributions(folder.category("size"))[1].shape == (20, 20)
    with pytest.raises(SidError, match="no column 'colour'"):
        folder.category("colour")


def test_categories_of_every_type_are_trimmed_and_missing_where_missing(tmp_path: Path) -> None:
    columns = {
        "lists": [["war ", "drama"], [], None, [" war", None]] * 5,
        "text": [" war", "war  | war |drama", None, "  "] * 5,
        "real": [1.0, float("nan"), None, 2.0] * 5,
        "codes": pa.array(["x", None, "y", "x"] * 5).dictionary_encode(),
        "flags": [True, False, None, True] * 5,
    }
    folder = LogFolder.open(write_log(tmp_path, EVENTS, item_columns=columns))

    def of(name: str, separator: str | None = None) -> tuple[object, object]:
        names, shares = distributions(folder.category(name, separator))
        return names, shares[:4].tolist()

    third, rest = pytest.approx(1 / 3, abs=1e-7), pytest.approx(2 / 3, abs=1e-7)
    assert of("lists") == (("drama", "war"), [[0.5, 0.5], [0, 0], [0, 0], [0, 1]])
    assert of("text", "|") == (("drama", "war"), [[0, 1], [third, rest], [0, 0], [0, 0]])
    assert of("real")[1] == [[1, 0], [0, 0], [0, 0], [0, 1]]
    assert of("codes") == (("x", "y"), [[1, 0], [0, 0], [0, 1], [1, 0]])
    assert of("flags") == (("false", "true"), [[0, 1], [1, 0], [0, 0], [0, 1]])


def test_a_hundred_thousand_classes_take_the_memory_of_their_values(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    n, classes = 200_000, 100_000
    values = random.integers(0, classes, n)
    folder = write_log(tmp_path, EVENTS, items=range(100, 100 + n), item_columns={"shop": values}, dim=1)
    tracemalloc.start()
    found = LogFolder.open(folder).category("shop")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2**20, "dense it would be 75 GiB"
    content = ItemContent.choose(folder, fuses=True, categories=("shop",))
    data = content.data(np.arange(n) < 10_000)
    shares = content.shape["shop"]
    assert shares.classes == len(found.names) == len(np.unique(values))
    first = next(iter(data))
    assert first.shape[1] == 1 + shares.classes + 2 and len(first) < 1_000
    assert [found.names[int(c)] for c in first[:5, 1:-2].argmax(1)] == [str(v) for v in values[:5]]
    assert content.label("shop", None)[:5].tolist() == found.classes[:5].tolist()


def test_every_public_log_opens_and_prepares(shared_data: Path, tmp_path: Path) -> None:
    expected = {
        "ml1m": (3_883, "plot", False),
        "amazon_beauty": (12_086, "content", True),
        "amazon_industrial": (3_686, "content", True),
        "hm_week": (17_986, "content", True),
        "mind_sample": (2_000, "content", False),
    }
    for name, (items, source, sampled) in expected.items():
        folder = LogFolder.open(shared_data / name)
        assert (len(folder), folder.default_source) == (items, source)
        config = PrepareConfig(negatives=NegativeSampling(per_positive=1), block_rows=4096)
        log = prepare(folder, tmp_path / name, config)
        assert log.manifest["sampled_negatives"] is sampled
        assert log.manifest["splits"]["test"]["segments"]["cold"]["rows"] > 300


def test_histories_of_ml1m_have_the_published_lengths(shared_data: Path, tmp_path: Path) -> None:
    log = prepare(shared_data / "ml1m", tmp_path / "out", PrepareConfig(holdout=False, block_rows=4096))
    published = pq.read_table(shared_data / "ml1m" / "events.parquet", columns=["hist_len"])[
        "hist_len"
    ].to_numpy()
    for split in ("train", "valid", "test"):
        table = pq.read_table(log.path / split / "00000", columns=["event", "hist_begin", "hist_end"])
        lengths = table["hist_end"].to_numpy() - table["hist_begin"].to_numpy()
        assert np.array_equal(lengths, published[table["event"].to_numpy()])
