"""Content embeddings from titles: `torchrec-sid embed --data FOLDER` writes FOLDER/item_emb.npy.

Latent semantic analysis of items.parquet's text: no model to download, a few seconds per 10^5 items. Any
better embedding can stand in its place: `[N, d]` floats in the order of items.parquet (docs/data.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import Normalizer

from torchrec_sid.artifact import write_atomically
from torchrec_sid.data.parquet import open_parquet
from torchrec_sid.data.schema import ITEMS
from torchrec_sid.errors import SidError

from .cli import parse_config, plain_errors

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class EmbedConfig:
    """What to embed, and how wide."""

    data: str
    """Folder with items.parquet."""
    columns: tuple[str, ...] = ("title", "text")
    """Text columns that are joined; those that the file does not have are left out."""
    dim: int = 128
    """d, at most one less than the number of items."""
    min_items: int = 2
    """Words and letter groups of fewer items are ignored."""
    overwrite: bool = False
    """Replace an item_emb.npy that is there."""
    seed: int = 0
    """Of the randomised decomposition."""

    def __post_init__(self) -> None:
        if min(self.dim, self.min_items) < 1:
            raise SidError("dim, min_items", f"{self.dim}, {self.min_items}", "Choose 1 or more.")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with plain_errors():
        config = parse_config(EmbedConfig, __doc__, argv)
    with plain_errors(), Console().status("embedding titles"):
        path, shape = embed(config)
    print(f"{path}: {shape[0]:,} items x {shape[1]} dimensions")


def embed(config: EmbedConfig) -> tuple[Path, tuple[int, ...]]:
    """Write the embeddings; returns where they are, and their shape.

    Raises:
        SidError: no text column, too little text, or a file that is there already.
    """
    folder = Path(config.data)
    target = folder / "item_emb.npy"
    if target.exists() and not config.overwrite:
        raise SidError(str(target), "exists", "Pass --overwrite, or remove it.")
    texts = _read_texts(folder / ITEMS, config.columns)
    vectors = _embed(texts, config)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, vectors)

    write_atomically(target, write)
    return target, vectors.shape


def _read_texts(path: Path, columns: tuple[str, ...]) -> list[str]:
    file = open_parquet(path)
    found = [name for name in columns if name in file.schema_arrow.names]
    if not found:
        names = file.schema_arrow.names
        raise SidError(str(path), f"none of the columns {list(columns)}", f"Choose --columns from {names}.")
    table = file.read(columns=found)
    parts = [[str(value or "") for value in table.column(name).to_pylist()] for name in found]
    return [" ".join(words) for words in zip(*parts, strict=True)]


def _embed(texts: list[str], config: EmbedConfig) -> Array:
    """TF-IDF of words, word pairs and letter groups, reduced to ``[N, dim]`` float16 unit vectors."""
    terms = FeatureUnion(
        [
            ("words", TfidfVectorizer(ngram_range=(1, 2), min_df=config.min_items, sublinear_tf=True)),
            (
                "letters",
                TfidfVectorizer(
                    analyzer="char_wb", ngram_range=(3, 4), min_df=config.min_items, sublinear_tf=True
                ),
            ),
        ]
    )
    try:
        counts = terms.fit_transform(texts)
    except ValueError as error:
        raise SidError("text", str(error), "Give items a title or a text of some words.") from error
    room = min(counts.shape) - 1
    if config.dim > room:
        raise SidError(
            "dim",
            f"{config.dim} for {counts.shape[0]} items of {counts.shape[1]} terms",
            f"At most {room}.",
        )
    reduce = make_pipeline(TruncatedSVD(config.dim, random_state=config.seed), Normalizer(copy=False))
    vectors: Array = reduce.fit_transform(counts)
    return vectors.astype(np.float16)


if __name__ == "__main__":
    main()
