"""Content embeddings from titles: `torchrec-sid embed --data FOLDER` writes FOLDER/item_emb.npy.

Latent semantic analysis of items.parquet's text: no model to download, a few seconds per 10^5 items. With
`--model FOLDER` a sentence-transformers model of this machine embeds instead (extra `text`). Any other
embedding can stand in its place: `[N, d]` floats in the order of items.parquet (docs/data.md).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import Normalizer

from torchrec_sid.artifact import save_array, write_atomically, write_json
from torchrec_sid.data.embeddings import find_embeddings
from torchrec_sid.data.lake import ParquetTable, folder_at
from torchrec_sid.errors import SidError
from torchrec_sid.progress import track

from .cli import parse_config, plain_errors

Array = np.ndarray[Any, Any]

_DIM = 128
_STAMP = "item_emb.json"
"""What embeddings were made of, so that they are not made twice."""


@dataclass(frozen=True)
class EmbedConfig:
    """What to embed, and how wide."""

    data: str
    """Folder with items.parquet."""
    output: str | None = None
    """Folder of the embeddings; default: DATA."""
    columns: tuple[str, ...] = ("title", "text")
    """Text columns that are joined; those that the file does not have are left out."""
    model: str | None = None
    """Folder of a sentence-transformers model on this machine; default: latent semantic analysis."""
    dim: int | None = None
    """d; default: 128 or one less than the number of items, and with a model all that it gives. With a
    model the first d, normalised again."""
    min_items: int = 2
    """Words and letter groups of fewer items are ignored."""
    shard_rows: int = 1 << 20
    """Items of one file; more are written in several."""
    overwrite: bool = False
    """Replace embeddings that are there."""
    seed: int = 0
    """Of the randomised decomposition."""

    def __post_init__(self) -> None:
        if min(self.dim or 1, self.min_items, self.shard_rows) < 1 or self.dim == 0:
            found = f"{self.dim}, {self.min_items}, {self.shard_rows}"
            raise SidError("dim, min_items, shard_rows", found, "Choose 1 or more.")


class Embedded(NamedTuple):
    """What :func:`embed` wrote."""

    files: tuple[Path, ...]
    """``item_emb.npy``, or shards ``item_emb_00000.npy``, ..."""
    items: int
    dim: int
    without_text: int
    """Items without any text; their embedding is 0."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with plain_errors():
        config = parse_config(EmbedConfig, __doc__, argv)
        with Console().status("embedding titles"):
            done = embed(config)
    more = f" in {len(done.files)} files" if len(done.files) > 1 else ""
    print(f"{done.files[0]}{more}: {done.items:,} items x {done.dim} dimensions")
    if done.without_text:
        print(f"{done.without_text:,} items have no text: their embedding is 0")


def embed(config: EmbedConfig) -> Embedded:
    """Write the embeddings; what was made of the same texts in the same way is left as it is.

    Raises:
        SidError: no text column, too little text, embeddings that are there already, or a model that
            cannot be read.
    """
    items = folder_at(config.data)
    folder = Path(config.output) if config.output else items
    if not isinstance(folder, Path):
        raise SidError("output", "none, for items behind a URI", "Pass --output FOLDER.")
    texts = _read_texts(ParquetTable.find(items, "items"), config.columns)
    stamp = _stamp(config, texts)
    earlier = _content_files(folder)
    if earlier and not config.overwrite:
        if _same(folder / _STAMP, stamp):
            shape = (len(texts), int(np.load(earlier[0], mmap_mode="r").shape[1]))
            return Embedded(earlier, *shape, sum(not text for text in texts))
        raise SidError(str(earlier[0]), "exists", "Pass --overwrite, or remove it.")
    blocks = _encode(texts, config) if config.model else _analyse(texts, config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _STAMP).unlink(missing_ok=True)
    files, dim = _write_shards(folder, blocks, len(texts) > config.shard_rows)
    for stale in set(earlier) - set(files):
        stale.unlink()
    write_json(folder / _STAMP, stamp)
    return Embedded(files, len(texts), dim, sum(not text for text in texts))


def _content_files(folder: Path) -> tuple[Path, ...]:
    """Files of the source ``content`` that are there."""
    if not folder.is_dir():
        return ()
    found = [f for f in find_embeddings(folder) if f.name == "content"]
    return tuple(Path(str(path)) for file in found for path in file.paths)


def _stamp(config: EmbedConfig, texts: Sequence[str]) -> dict[str, Any]:
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    how = {k: v for k, v in asdict(config).items() if k not in ("data", "output", "overwrite")}
    return {"texts": digest, **how, "columns": list(config.columns)}


def _same(file: Path, stamp: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(file.read_text()) == stamp)
    except (OSError, ValueError):
        return False


def _write_shards(folder: Path, blocks: Iterator[Array], several: bool) -> tuple[tuple[Path, ...], int]:
    files, dim = [], 0
    for number, block in enumerate(blocks):
        file = folder / (f"item_emb_{number:05d}.npy" if several else "item_emb.npy")
        write_atomically(file, functools.partial(save_array, values=block))
        files.append(file)
        dim = block.shape[1]
    return tuple(files), dim


def _read_texts(table: ParquetTable, columns: tuple[str, ...]) -> list[str]:
    found = [name for name in columns if name in table.names]
    if not found:
        raise SidError(
            table.where, f"none of the columns {list(columns)}", f"Choose --columns from {table.names}."
        )
    parts = [[str(value or "") for value in table.column(name).to_pylist()] for name in found]
    return [" ".join(words).strip() for words in zip(*parts, strict=True)]


def _analyse(texts: list[str], config: EmbedConfig) -> Iterator[Array]:
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
    if (config.dim or 1) > room:
        raise SidError(
            "dim",
            f"{config.dim or 1} for {counts.shape[0]} items of {counts.shape[1]} terms",
            f"At most {room}.",
        )
    dim = config.dim or min(_DIM, room)
    reduce = make_pipeline(TruncatedSVD(dim, random_state=config.seed), Normalizer(copy=False))
    vectors: Array = reduce.fit_transform(counts)
    for begin in range(0, len(vectors), config.shard_rows):
        yield vectors[begin : begin + config.shard_rows].astype(np.float16)


def _encode(texts: list[str], config: EmbedConfig) -> Iterator[Array]:
    """What the model says of each text, a shard at a time; 0 where there is none."""
    model = _open_model(str(config.model))
    shards = range(0, len(texts), config.shard_rows)
    for begin in track(shards, "embedding", total=len(shards), show=True):
        part = texts[begin : begin + config.shard_rows]
        vectors = model.encode(part, normalize_embeddings=True, truncate_dim=config.dim)
        vectors = np.asarray(vectors, np.float32)
        if config.dim is not None and vectors.shape[1] < config.dim:
            raise SidError("dim", str(config.dim), f"The model gives {vectors.shape[1]}.")
        known = np.array([bool(text) for text in part])
        yield (vectors * known[:, None]).astype(np.float16)


def _open_model(folder: str) -> Any:
    if not (Path(folder) / "modules.json").is_file():
        raise SidError(
            folder, "is no folder of a sentence-transformers model", "Name one that holds modules.json."
        )
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise SidError(
            "model", "sentence-transformers is not installed", "Install torchrec-sid[text]."
        ) from error
    try:
        # Weights in safetensors alone, and no code of the folder's own.
        return SentenceTransformer(
            folder, local_files_only=True, trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise SidError(folder, f"cannot be read ({reason})", "Copy the whole folder again.") from error


if __name__ == "__main__":
    main()
