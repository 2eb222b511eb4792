"""Finished tables in docs/tables, and the pages that quote them.

    torchrec-sid saved_tables --pages docs README.md
    torchrec-sid saved_tables --pages docs README.md --write true

The first says which numbers of the pages are not those of the saved tables (exit status 1), the second
writes them. A page quotes whole rows between comments,

    <!-- table ml1m-2: ne gain gain_interval bytes_per_event -->
    <!-- end -->

or a number in a sentence: SIDE gains +1.50 <!-- ml1m-2 | + side fused 1 byte | gain --> percent.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torchrec_sid.artifact import write_atomically, write_json
from torchrec_sid.errors import SidError

from .cli import parse_config, plain_errors
from .harness import Trained
from .report import COLUMNS, cells
from .rows import Row
from .rundir import library_fingerprint

_BLOCK = re.compile(r"(<!-- table ([\w.-]+): ([\w ]+?)(?: rows: (.+?))? -->\n).*?(<!-- end -->)", re.DOTALL)
_NUMBER = re.compile(r"(\S+)( <!-- ([\w.-]+) \| (.+?) \| (\w+) -->)")


@dataclass(frozen=True)
class SavedTablesConfig:
    """Pages and the tables that they quote."""

    pages: tuple[str, ...]
    """Markdown files, or folders of some."""
    tables: str = "docs/tables"
    """Folder of the saved tables."""
    write: bool = False
    """Write what the tables say into the pages."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with plain_errors():
        config = parse_config(SavedTablesConfig, __doc__, argv)
        wrong = quote(config)
    for line in wrong:
        print(line)
    if wrong and not config.write:
        raise SystemExit(1)


def quote(config: SavedTablesConfig) -> list[str]:
    """Compare pages with the tables they quote, and mend them where asked.

    Returns:
        One line for each quotation that differs.

    Raises:
        SidError: a table, row or column that does not exist.
    """
    wrong = []
    for place in map(Path, config.pages):
        for page in sorted(place.glob("**/*.md")) if place.is_dir() else [place]:
            text = page.read_text()
            mended = _quoted(text, Path(config.tables), str(page))
            changed = zip(text.splitlines(), mended.splitlines(), strict=False)
            if text != mended:
                first = next((f"{a!r}, saved is {b!r}" for a, b in changed if a != b), "a row is missing")
                wrong.append(f"{page}: {first}")
                if config.write:
                    write_atomically(page, partial(_write, mended))
    return wrong


def save_table(folder: Path, name: str, report: Mapping[str, Any], trained: Trained) -> Path:
    """Add the rows of a report to ``FOLDER/NAME.json``, in the place of those of the same name.

    Each row keeps what it was made of: ``fingerprint`` (library, recipe, log, split, seeds), command,
    commit, machine and day. Rows of earlier calls stay.
    """
    path = folder / f"{name}.json"
    kept = load_table(folder, name)["rows"] if path.is_file() else []
    made = {
        "command": report["command"],
        "git": report["git"],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "day": time.strftime("%Y-%m-%d"),
    }
    rows = {row["name"]: row for row in kept}
    by_name = {row.name: row for row in trained.comparison.rows}
    keys = ["arm", "against", *(column.key for column in COLUMNS)]
    for row in report["rows"]:
        mark = _fingerprint(by_name[row["name"]], trained, report)
        rows[row["name"]] = {
            **{key: row[key] for key in keys},
            "ne_interval": _low_high(row, "ne", "all"),
            "ne_cold_interval": _low_high(row, "ne", "cold"),
            "gain_cold_p": row["gain_cold_p"],
            "seeds": len(report["seeds"]),
            "fingerprint": mark,
            **made,
        }
    folder.mkdir(parents=True, exist_ok=True)
    about = {key: report[key] for key in ("title", "dataset", "evaluated_on")}
    write_json(path, {**about, "rows": list(rows.values())})
    return path


def load_table(folder: Path, name: str) -> dict[str, Any]:
    """A saved table.

    Raises:
        SidError: there is none, or it is no table.
    """
    path = folder / f"{name}.json"
    try:
        table: dict[str, Any] = json.loads(path.read_text())
        if not all({"name", "fingerprint"} <= set(row) for row in table["rows"]):
            raise ValueError("a row without name or fingerprint")
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "Make it with torchrec-sid paper --save FOLDER."
        raise SidError(str(path), f"is no saved table ({error})", remedy) from error
    return table


def _fingerprint(row: Row, trained: Trained, report: Mapping[str, Any]) -> str:
    sids = [str(trained.comparison.sids[name]) for name in (row.tables, row.side) if name is not None]
    parts = {
        "library": library_fingerprint(),
        "row": asdict(row),
        "training": dict(trained.comparison.training),
        "sids": sids,
        "log": trained.log.fingerprint,
        "evaluated_on": report["evaluated_on"],
        "seeds": report["seeds"],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _low_high(row: Mapping[str, Any], name: str, piece: str) -> list[float] | None:
    interval = row["intervals"].get(name, {}).get(piece)
    return None if interval is None else [interval["low"], interval["high"]]


def _quoted(text: str, folder: Path, where: str) -> str:
    """A page with its quotations as the tables have them."""

    def block(match: re.Match[str]) -> str:
        head, name, keys, wanted, end = match.groups()
        rows = load_table(folder, name)["rows"]
        if wanted is not None:
            rows = [_row(rows, each.strip(), f"{where}: {name}") for each in wanted.split(";")]
        return head + _lines(rows, keys.split(), f"{where}: {name}") + end

    def number(match: re.Match[str]) -> str:
        _, rest, name, row, key = match.groups()
        found = _row(load_table(folder, name)["rows"], row, f"{where}: {name}")
        (column,) = _columns([key], f"{where}: {name}")
        return cells(found, [column])[0].replace(", ", ",") + rest

    return _NUMBER.sub(number, _BLOCK.sub(block, text))


def _lines(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], where: str) -> str:
    columns = _columns(["name", *keys], where)
    lines = [[column.heading for column in columns], ["---"] + ["---:"] * len(keys)]
    lines += [cells(row, columns) for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _columns(keys: Sequence[str], where: str) -> list[Any]:
    known = {column.key: column for column in COLUMNS}
    for key in keys:
        if key not in known:
            raise SidError(where, f"no column {key!r}", f"Choose from {', '.join(known)}.")
    return [known[key] for key in keys]


def _row(rows: Sequence[Mapping[str, Any]], name: str, where: str) -> Mapping[str, Any]:
    for row in rows:
        if row["name"] == name:
            return row
    raise SidError(where, f"no row {name!r}", f"Choose from {'; '.join(row['name'] for row in rows)}.")


def _write(text: str, path: Path) -> None:
    path.write_text(text)


if __name__ == "__main__":
    main()
