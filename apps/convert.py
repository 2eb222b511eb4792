"""Make a log of ours from a public archive, as its site gives it.

    torchrec-sid convert --layout ml1m --source ml-1m.zip --output data/ml1m
    torchrec-sid convert --layout amazon --source FOLDER --output data/beauty
    torchrec-sid convert --layout kuairand --source KuaiRand-Pure.zip --output data/kuairand

SOURCE is the archive (zip) or the folder it unpacks to. ``ml1m``: ratings.dat, movies.dat, users.dat; the
first 2,999 users (``--users``), label 1 for four stars or more. ``amazon``: one file of reviews and one of
metadata, JSON lines, of 2014, 2018 or 2023, plain or gzipped; every review is a positive. ``kuairand``:
log_standard_*.csv, video_features_basic_*.csv, user_features_*.csv, columns as they are, which
``--specification kuairand_pure`` reads. Times split the events 80 / 10 / 10, and a fixed 15% of the items
of ml1m and amazon are held out as cold. Next: `torchrec-sid embed --data OUTPUT` embeds the text.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from torchrec_sid.artifact import write_atomically
from torchrec_sid.errors import SidError

from .cli import parse_config, plain_errors


@dataclass(frozen=True)
class ConvertConfig:
    """One archive."""

    layout: Literal["ml1m", "amazon", "kuairand"]
    """Whose files they are."""
    source: str
    """The archive, or the folder that it unpacks to."""
    output: str
    """Folder of the log."""
    users: int = 2999
    """Of ml1m: the first so many users; 6040 are all."""

    def __post_init__(self) -> None:
        if self.users < 1:
            raise SidError("users", str(self.users), "Take 1 or more.")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with plain_errors():
        config = parse_config(ConvertConfig, __doc__, argv)
        tables = convert(config)
    print(f"{config.output}: " + ", ".join(f"{len(table):,} {name}" for name, table in tables.items()))


def convert(config: ConvertConfig) -> dict[str, pa.Table]:
    """Write the tables of a log.

    Returns:
        What was written: name of the Parquet file, without its ending -> table.

    Raises:
        SidError: no such archive, a file that is missing in it, or a line of another layout (named).
    """
    source = _Source(config.source)
    if config.layout == "ml1m":
        tables = _ml1m(source, config.users)
    elif config.layout == "amazon":
        tables = _amazon(source)
    else:
        tables = _kuairand(source)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_atomically(output / f"{name}.parquet", partial(pq.write_table, table))
    return tables


class _Source:
    """Files of a folder or of a zip archive, by a pattern of their names."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise SidError(path, "no such file or folder", "Download the archive first, and pass its path.")
        self.archive: zipfile.ZipFile | None = None
        if self.path.is_file():
            try:
                self.archive = zipfile.ZipFile(self.path)
            except zipfile.BadZipFile as error:
                raise SidError(path, "is no zip archive", "Pass the folder that it unpacks to.") from error
            self.names = [name for name in self.archive.namelist() if not name.endswith("/")]
        else:
            self.names = [
                str(file.relative_to(self.path)) for file in self.path.rglob("*") if file.is_file()
            ]

    def find(self, pattern: str) -> list[str]:
        """Names of the files whose last part matches, sorted.

        Raises:
            SidError: there is none.
        """
        found = sorted(name for name in self.names if re.fullmatch(pattern, name.rpartition("/")[2]))
        if not found:
            raise SidError(
                str(self.path), f"holds no file {pattern}", "Pass the whole archive, as it is given."
            )
        return found

    def read(self, name: str) -> bytes:
        """The bytes of a file, unpacked where it is gzipped."""
        data = self.archive.read(name) if self.archive else (self.path / name).read_bytes()
        return gzip.decompress(data) if name.endswith(".gz") else data

    def lines(self, name: str, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
        """Number, from 1, and text of each line that is not empty."""
        text = io.TextIOWrapper(io.BytesIO(self.read(name)), encoding, newline=None)
        return ((number, line.rstrip("\n")) for number, line in enumerate(text, 1) if line.strip())


def _ml1m(source: _Source, users: int) -> dict[str, pa.Table]:
    movies = _separated(source, "movies.dat", 3)
    people = _separated(source, "users.dat", 5)
    ratings = [[int(value) for value in row] for row in _separated(source, "ratings.dat", 4)]
    place = {int(row[0]): number for number, row in enumerate(movies)}
    who = {int(row[0]): number for number, row in enumerate(people)}
    kept = [row for row in ratings if who.get(row[0], users) < users]
    unknown = next((row[1] for row in kept if row[1] not in place), None)
    if unknown is not None or not kept:
        found = "has no rating of these users" if unknown is None else f"rates movie {unknown}, of no movie"
        raise SidError("ratings.dat", found, "Pass the three files of one archive.")
    items = []
    for raw, title, genres in movies:
        match = re.fullmatch(r"(.*?) ?\((\d{4})\)", title)
        name, year = (match[1], int(match[2])) if match else (title, None)
        name = re.sub(r"^(.*), (The|A|An|Les|La|Le|Das|Der|Die|El|Il|L')$", r"\2 \1", name)
        listed = genres.replace("|", ", ")
        text = f"{name} ({year}). Genres: {listed}." if match else f"{name}. Genres: {listed}."
        items.append({"raw_id": raw, "title": name, "year": year, "genres": listed, "text": text})
    user, item, rating, ts = np.array(kept, np.int64).T
    index, position = (np.array([to[int(v)] for v in of]) for to, of in ((who, user), (place, item)))
    return {
        "items": _items(items),
        "users": pa.table(
            {
                "user": pa.array(range(len(people)), pa.int32()),
                "gender": [row[1] for row in people],
                "age": pa.array([int(row[2]) for row in people], pa.int8()),
                "occupation": pa.array([int(row[3]) for row in people], pa.int8()),
            }
        ),
        "events": _events(
            index, position, ts, (rating >= 4).astype(np.int8), rating=rating.astype(np.int8)
        ),
    }


def _separated(source: _Source, name: str, columns: int) -> list[list[str]]:
    (file, *_) = source.find(re.escape(name))
    rows = []
    for number, line in source.lines(file, "latin-1"):
        row = line.split("::")
        if len(row) != columns:
            raise SidError(
                f"{file}, line {number}", repr(line[:60]), f"It should have {columns} parts, by '::'."
            )
        rows.append(row)
    return rows


_USER, _ITEM = ("reviewerID", "user_id"), ("parent_asin", "asin")
"""Names of one thing in the releases of Amazon's reviews."""


def _amazon(source: _Source) -> dict[str, pa.Table]:
    meta_files = source.find(r"meta.*\.jsonl?(\.gz)?")
    review_files = [name for name in source.find(r".*\.jsonl?(\.gz)?") if name not in meta_files]
    if len(meta_files) != 1 or len(review_files) != 1:
        found = f"{len(review_files)} files of reviews, {len(meta_files)} of metadata"
        raise SidError(str(source.path), found, "Put one of each into a folder of their own.")
    reviews = [
        (_of(row, where, *_USER), _of(row, where, *_ITEM), _seconds(row, where))
        for where, row in _records(source, review_files[0])
    ]
    if not reviews:
        raise SidError(review_files[0], "no reviews", "Pass the files as they are given.")
    wanted = {asin for _, asin, _ in reviews}
    about: dict[str, dict[str, Any]] = {}
    for where, row in _records(source, meta_files[0]):
        if (asin := _of(row, where, *_ITEM)) in wanted:
            about.setdefault(asin, row)
    names = sorted(wanted)
    place = {asin: number for number, asin in enumerate(names)}
    who = {name: number for number, name in enumerate(sorted({user for user, _, _ in reviews}))}
    items = [{"raw_id": asin, **_product(about.get(asin, {}))} for asin in names]
    user, item = (np.array(v) for v in zip(*((who[u], place[a]) for u, a, _ in reviews), strict=True))
    ts = np.array([when for _, _, when in reviews], np.int64)
    return {"items": _items(items), "events": _events(user, item, ts, np.ones(len(ts), np.int8))}


def _records(source: _Source, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in source.lines(name):
        where = f"{name}, line {number}"
        try:
            # Metadata of 2014 are literals of Python; literal_eval runs nothing.
            row = json.loads(line) if line.startswith('{"') else ast.literal_eval(line)
        except (ValueError, SyntaxError) as error:
            raise SidError(where, f"no JSON ({error})", "Pass the files as they are given.") from error
        if not isinstance(row, dict):
            raise SidError(where, repr(line[:60]), "A line should be one object.")
        yield where, row


def _of(row: dict[str, Any], where: str, *names: str) -> str:
    for name in names:
        if row.get(name):
            return str(row[name])
    raise SidError(where, f"no {' and no '.join(names)}", "Pass reviews or metadata of Amazon's layout.")


def _seconds(row: dict[str, Any], where: str) -> int:
    if "unixReviewTime" in row:
        return int(row["unixReviewTime"])
    return int(_of(row, where, "timestamp")) // 1000


def _product(row: dict[str, Any]) -> dict[str, Any]:
    title = str(row.get("title") or "")
    paths = row.get("categories") or row.get("category") or []
    flat = paths[0] if paths and isinstance(paths[0], list) else paths
    category = ", ".join(str(each) for each in flat)
    brand = str(row.get("brand") or row.get("store") or "")
    details = row.get("description") or ""
    words = " ".join(details) if isinstance(details, list) else str(details)
    text = ". ".join(part for part in (title, brand, category, words) if part)
    return {"title": title, "brand": brand, "category": category, "text": text}


def _kuairand(source: _Source) -> dict[str, pa.Table]:
    def joined(pattern: str) -> pa.Table:
        tables = [_csv(source, name) for name in source.find(pattern)]
        return pa.concat_tables(tables, promote_options="permissive")

    return {
        "events": joined(r"log_standard_.*\.csv"),
        "items": joined(r"video_features_basic.*\.csv"),
        "users": joined(r"user_features.*\.csv"),
    }


def _csv(source: _Source, name: str) -> pa.Table:
    # Lists of tags are text, also where all have but one.
    types = pc.ConvertOptions(column_types={"tag": pa.string()}, strings_can_be_null=True)
    try:
        return pc.read_csv(io.BytesIO(source.read(name)), convert_options=types)
    except pa.ArrowInvalid as error:
        raise SidError(name, str(error).splitlines()[0], "Pass the file as it is given.") from error


def _items(rows: list[dict[str, Any]]) -> pa.Table:
    table = pa.Table.from_pylist(rows)
    held = pa.array([_cold(str(row["raw_id"])) for row in rows], pa.int8())
    table = table.append_column("cold_holdout", held)
    return table.add_column(0, "item_id", pa.array(range(len(rows)), pa.int32()))


def _cold(raw: str) -> int:
    """5% of the items are held out before valid (1), 10% before test (2): by the name alone, for ever."""
    place = int(hashlib.md5(raw.encode(), usedforsecurity=False).hexdigest()[:8], 16) % 100
    return 1 if place < 5 else 2 if place < 15 else 0


def _events(user: Any, item: Any, ts: Any, label: Any, **columns: Any) -> pa.Table:
    """By user and time; the time that 80% and 90% of all events lie before starts valid and test."""
    first, second = np.quantile(ts, [0.8, 0.9])
    split = np.where(ts < first, "train", np.where(ts < second, "valid", "test"))
    order = np.lexsort((ts, user))
    made = {"user": user.astype(np.int32), "item": item.astype(np.int32), "ts": ts}
    made |= {**columns, "label": label, "split": split}
    return pa.table({name: values[order] for name, values in made.items()})


if __name__ == "__main__":
    main()
