"""Embeddings of titles: alike titles are near, and what is wrong is named."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apps.embed import EmbedConfig, embed
from torchrec_sid.data.schema import LogFolder
from torchrec_sid.errors import SidError

COLOURS, THINGS = ("red", "green", "blue", "black"), ("cotton shirt", "leather boot", "steel kettle")
TITLES = [f"{colour} {thing}" for thing in THINGS for colour in COLOURS]


def _folder(path: Path, **columns) -> Path:
    path.mkdir()
    pq.write_table(pa.table({"item_id": np.arange(len(TITLES)), **columns}), path / "items.parquet")
    return path


def test_items_of_a_kind_are_neighbours(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "shop", title=TITLES)
    done = embed(EmbedConfig(str(folder), dim=6))
    assert done == ((folder / "item_emb.npy",), 12, 6, 0)
    x = np.array(LogFolder.open(folder, events=False).embedding_matrix()).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=2e-3)
    cosine = x @ x.T - 2 * np.eye(len(x))
    nearest = cosine.argmax(1)
    assert (nearest // len(COLOURS) == np.arange(len(x)) // len(COLOURS)).all()


def test_every_option_counts(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "shop", title=TITLES, text=TITLES[::-1])

    def vectors(**changes) -> np.ndarray:
        embed(EmbedConfig(str(folder), **{"dim": 6, "overwrite": True, **changes}))
        return np.load(folder / "item_emb.npy")

    first = vectors()
    made = (folder / "item_emb.npy").stat()
    embed(EmbedConfig(str(folder), dim=6))
    assert (folder / "item_emb.npy").stat() == made, "the same is not made twice"
    assert np.array_equal(first, vectors())
    assert not np.array_equal(first, vectors(columns=("title",)))
    assert not np.array_equal(first, vectors(min_items=4))
    assert vectors(dim=3).shape == (12, 3)
    with pytest.raises(SidError, match="exists.*--overwrite"):
        vectors(overwrite=False)


def test_shards_are_one_source_and_texts_may_be_missing(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "shop", title=[None, *TITLES[1:]])
    whole = embed(EmbedConfig(str(folder), output=str(tmp_path / "whole"), dim=6))
    assert whole.without_text == 1 and not (folder / "item_emb.npy").exists()
    embed(EmbedConfig(str(folder), dim=6))
    done = embed(EmbedConfig(str(folder), dim=6, shard_rows=5, overwrite=True))
    assert [file.name for file in done.files] == [f"item_emb_0000{n}.npy" for n in range(3)]
    assert not (folder / "item_emb.npy").exists(), "what was replaced is gone"
    opened = LogFolder.open(folder, events=False)
    assert opened.sources == ("content",)
    x = np.array(opened.embedding_matrix())
    np.testing.assert_array_equal(x, np.load(whole.files[0]))
    assert not x[0].any() and x[1:].any(1).all()
    apart = LogFolder.open(folder, events=False, embeddings=tmp_path / "whole")
    np.testing.assert_array_equal(apart.embedding_matrix(), x)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(SidError, match=r"none of the columns.*item_id"):
        embed(EmbedConfig(str(_folder(tmp_path / "bare"))))
    with pytest.raises(SidError, match="Give items a title"):
        embed(EmbedConfig(str(_folder(tmp_path / "empty", title=[""] * len(TITLES)))))
    with pytest.raises(SidError, match="At most 11"):
        embed(EmbedConfig(str(_folder(tmp_path / "few", title=TITLES)), dim=50))
    with pytest.raises(SidError, match="1 or more"):
        EmbedConfig("x", dim=0)
