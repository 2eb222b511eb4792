"""Streams of embeddings: every pass is whole, every row is looked at, and what is wrong is named."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.quantizers import ResidualKMeans, ResidualKMeansConfig, RqVae, RqVaeConfig
from torchrec_sid.streams import EmbeddingStream, open_stream

X = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))


def refused(match: str, data: Any, kind: type[SidError] = SidError) -> None:
    with pytest.raises(kind, match=match):
        for _ in open_stream(data):
            pass


# ---- passes


def test_a_callable_that_hands_out_one_generator_serves_one_whole_pass_and_no_more() -> None:
    quantizer = ResidualKMeans(6, ResidualKMeansConfig(cardinalities=(8, 8)))
    quantizer.fit(X)

    def batches() -> Iterator[torch.Tensor]:
        yield from X.split(100)

    only = batches()
    assert torch.equal(quantizer.encode(lambda: only), quantizer.encode(X)), "all 1,000 codes, not 900"
    again = batches()
    stream = open_stream(lambda: again)
    assert sum(len(batch) for batch in stream) == 1000
    with pytest.raises(
        SidError, match="a pass over 0 rows, where the first pass had 1,000.*fresh iterator"
    ):
        list(stream)
    # A fit in several passes would loop for ever, or see a part of the items.
    for unfitted in (
        ResidualKMeans(6, ResidualKMeansConfig((8, 8), buffer_rows=200)),
        RqVae(6, RqVaeConfig(cardinalities=(8, 8), epochs=2)),
    ):
        used_up = batches()
        with pytest.raises(SidError, match="a pass over 0 rows"):
            unfitted.fit(lambda used_up=used_up: used_up)


def test_passes_of_different_lengths_are_an_error_and_abandoned_ones_are_not() -> None:
    sizes = iter([1000, 1000, 900])
    stream = open_stream(lambda: iter(X[: next(sizes)].split(100)))
    for batch in stream:
        assert len(batch) == 100
        break  # abandoned: it says nothing of the length
    assert sum(map(len, stream)) == 1000
    with pytest.raises(SidError, match="over 900 rows, where the first pass had 1,000"):
        list(stream)
    declared = EmbeddingStream(lambda: iter(X.split(100)), 6, 1001, "mine")
    with pytest.raises(SidError, match="mine: a pass over 1,000 rows, where it has 1,001"):
        list(declared)


# ---- what comes


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.astype(">f4"),
        lambda x: x.astype(np.float64),
        lambda x: x.astype(np.longdouble),
        lambda x: np.asfortranarray(x),
        lambda x: x[::-1][::-1],
    ],
    ids=["big-endian", "double", "long double", "by columns", "negative strides"],
)
def test_arrays_of_any_layout_are_read(convert: Callable[[Any], Any], tmp_path: Path) -> None:
    x = convert(X.numpy())
    np.save(tmp_path / "x.npy", x)
    for data in (x, tmp_path / "x.npy", lambda: iter(np.array_split(x, 7))):
        assert torch.equal(torch.cat(list(open_stream(data))), X)


def test_what_is_no_embedding_is_named(tmp_path: Path) -> None:
    refused("dtype object", np.array([[1.0, None]], dtype=object))
    refused("dtype complex64", X.numpy().astype(np.complex64))
    refused("floating point", X.long())
    refused("a list.*Batches are tensors", lambda: iter([[1.0, 2.0]]))
    refused("a callable that returns a int", lambda: 3)
    refused(r"a batch of shape \(6,\)", lambda: iter(X))
    refused("no batch", lambda: iter([]))
    np.save(tmp_path / "objects.npy", np.array([[1.0, None]], dtype=object))
    refused("no whole .npy file", tmp_path / "objects.npy", ArtifactError)
    np.save(tmp_path / "cut.npy", X.numpy())
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:500])
    refused("no whole .npy file", tmp_path / "cut.npy", ArtifactError)
    with (tmp_path / "zip.npy").open("wb") as file:
        np.savez(file, x=X.numpy())
    refused("an archive", tmp_path / "zip.npy", ArtifactError)


def test_parquet_is_looked_at_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"

    def written(rows: list[Any], kind: Any = None) -> Path:
        pq.write_table(pa.table({"embedding": pa.array(rows, kind or pa.list_(pa.float32()))}), path)
        return path

    good = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    for kind in (pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 2)):
        assert torch.equal(torch.cat(list(open_stream(written(good, kind)))), torch.tensor(good))
    refused("row 1 is null", written([good[0], None, good[2]]))
    refused("row 2 is null", written([good[0], good[1], None], pa.list_(pa.float32(), 2)))
    refused("row 1 holds a null", written([good[0], [1.0, None], good[2]]))
    # Lengths that make up for each other must not shift the vectors.
    refused("row 1 holds 3 numbers, the first one 2", written([good[0], [1.0, 2.0, 3.0], [4.0]]))
    refused("row 0 holds 0 numbers", written([[], []]))
    refused("has type string", written(["a", "b"], pa.string()))
    refused("has type list<.*int", written([[1, 2]], pa.list_(pa.int64())))
    refused("no rows", written([]))
    whole = written(good * 1000).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("no whole Parquet file", path, ArtifactError)


def test_values_that_would_overflow_are_named() -> None:
    x = X.clone()
    x[41] *= 1e19
    refused("row 41 has norm .*e.19, beyond 1e.15", x)
    refused("row 0 has norm", X.double() * 1e30)
    x[41, 2] = torch.inf
    refused("row 41 holds a NaN or an infinity", x)
    large = X * 1e14
    quantizer = ResidualKMeans(6, ResidualKMeansConfig(cardinalities=(8, 8)))
    quantizer.fit(large)
    assert bool(torch.isfinite(quantizer.decode(quantizer.encode(large))).all())


def test_more_codes_than_items_cost_no_more_than_the_items() -> None:
    quantizer = ResidualKMeans(6, ResidualKMeansConfig(cardinalities=(100_000,)))
    report = quantizer.fit(X)
    assert len(quantizer.encode(X).unique()) == 1000 and report.fvu[0] < 0.05
