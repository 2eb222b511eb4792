"""Score a file of requests with an exported model: ids in, ids and scores out.

    torchrec-sid predict --folder out/run/served/float --requests requests.parquet --output scores/

The Parquet file has a row per request: ``candidates`` (list of item ids), ``history``, ``history_action``,
``history_ts`` (lists), ``ts``, and every dense feature and feature of the log's specification by its name;
other columns travel through. OUTPUT
gets ``part-NNNNN.parquet`` with ``scores`` beside them, in the order of the requests; started again, it
goes on.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track

from torchrec_sid.artifact import write_atomically
from torchrec_sid.errors import SidError
from torchrec_sid.serving.ranker import Ranker, RankRequest

from .cli import parse_config, plain_errors

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PredictConfig:
    """One file of requests."""

    folder: str
    """Folder written by export, of one precision."""
    requests: str
    """Parquet file of requests."""
    output: str
    """Folder of the scores; one of another model or file of requests is refused."""
    rows: int = 4096
    """Requests of one part."""
    batch_candidates: int = 4096
    """Candidates of one run of the model."""

    def __post_init__(self) -> None:
        if min(self.rows, self.batch_candidates) < 1:
            raise SidError(
                "rows, batch_candidates", f"{self.rows}, {self.batch_candidates}", "Choose 1 or more."
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse_config(PredictConfig, __doc__, argv)
    with plain_errors():
        parts, requests = predict(config)
    print(f"{config.output}: {requests:,} requests in {parts} parts")


def predict(config: PredictConfig) -> tuple[int, int]:
    """Score what is not scored yet; returns the parts and the requests in all.

    Raises:
        SidError: a column that is missing or of the wrong type, a request that cannot be ranked (named by
            its row), or an output of another model or of other requests.
    """
    try:
        file = pq.ParquetFile(config.requests)
    except (OSError, pa.ArrowInvalid) as error:
        raise SidError(
            config.requests, str(error).splitlines()[0], "Pass a Parquet file of requests."
        ) from error
    ranker = Ranker.load_checked(config.folder)
    output = Path(config.output)
    stamp = {
        b"model": Ranker.version_of(config.folder).encode(),
        b"requests": f"{_sha256(config.requests)} {config.rows}".encode(),
    }
    parts = 0
    total = -(-file.metadata.num_rows // config.rows)
    for number, batch in track(enumerate(file.iter_batches(config.rows)), "scoring", total=total):
        path = output / f"part-{number:05d}.parquet"
        if path.is_file():
            _same(path, stamp)
        else:
            table = _scored(ranker, pa.Table.from_batches([batch]), number * config.rows, config)
            table = table.replace_schema_metadata({**(table.schema.metadata or {}), **stamp})
            write_atomically(path, functools.partial(pq.write_table, table))
        parts += 1
    return parts, file.metadata.num_rows


def _sha256(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _same(path: Path, stamp: dict[bytes, bytes]) -> None:
    found = pq.read_schema(path).metadata or {}
    if any(found.get(key) != value for key, value in stamp.items()):
        raise SidError(str(path), "of another model or other requests", "Choose another --output.")


def _scored(ranker: Ranker, table: pa.Table, first: int, config: PredictConfig) -> pa.Table:
    requests = [_request(ranker, table, row, first + row) for row in range(len(table))]
    scores: list[Array] = []
    unknown: list[int] = []
    waiting: list[RankRequest] = []
    for request in [*requests, None]:
        size = sum(len(r.candidates) for r in waiting)
        if waiting and (request is None or size + len(request.candidates) > config.batch_candidates):
            for ranked in ranker.rank(waiting):
                scores.append(ranked.scores)
                unknown.append(ranked.unknown_history)
            waiting = []
        if request is not None:
            waiting.append(request)
    return table.append_column("scores", pa.array([s.tolist() for s in scores])).append_column(
        "unknown_history", pa.array(unknown, pa.int64())
    )


def _request(ranker: Ranker, table: pa.Table, row: int, number: int) -> RankRequest:
    def of(name: str, default: Any) -> Any:
        if name not in table.column_names:
            if default is None:
                raise SidError(f"column {name!r}", "missing", f"The file has {table.column_names}.")
            return default
        value = table.column(name)[row].as_py()
        return default if value is None else value

    try:
        candidates = np.asarray(of("candidates", None), np.int64)
        history = np.asarray(of("history", []), np.int64)
        actions = np.asarray(of("history_action", []), np.int64)
        times = np.asarray(of("history_ts", []), np.int64)
        dense = [
            np.broadcast_to(np.asarray(of(n, None), np.float32), len(candidates))
            for n in ranker.dense_names
        ]
    except (TypeError, ValueError) as error:
        raise SidError(
            f"request {number}", str(error), "Give integers, and one number per dense feature."
        ) from error
    columns = np.stack(dense, 1) if dense else np.empty((len(candidates), 0), np.float32)
    features = {}
    for name in () if ranker.features is None else ranker.features.asked:
        value = of(name, [])
        if value != []:
            features[name] = pa.array(value if isinstance(value, list) else [value])
    request = RankRequest(candidates, history, actions, times, int(of("ts", -1)), columns, features)
    try:
        ranker.check(request)
    except SidError as error:
        raise SidError(f"request {number}, {error.where}", error.found, error.remedy) from error
    return request


if __name__ == "__main__":
    main()
