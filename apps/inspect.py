"""What is in a log, and a draft of its specification: `torchrec-sid inspect --data FOLDER`.

Columns, types, numbers of different values and of missing ones, and a YAML file to begin with. `compare`
uses the same draft where a log has no specification; `--output FILE` writes it, to be changed and passed as
`--specification FILE`, or kept as FOLDER/specification.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from torchrec_sid.artifact import write_atomically
from torchrec_sid.data.guess import guess_specification
from torchrec_sid.data.inspection import ColumnProfile, TableProfile, profile_folder
from torchrec_sid.errors import SidError

from .cli import parse_config, plain_errors, wide_console


@dataclass(frozen=True)
class InspectConfig:
    """One look."""

    data: str
    """Folder of the log, local or a URI."""
    output: str | None = None
    """File for the draft of a specification."""
    overwrite: bool = False
    """Replace a file that is there."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    console = wide_console(120)
    with plain_errors():
        config = parse_config(InspectConfig, __doc__, argv)
        with console.status("reading"):
            tables = profile_folder(config.data)
        guess = guess_specification(tables) if "events" in tables else None
        for table in tables.values():
            uses = {} if guess is None else {**guess.left_out, **guess.uses}
            console.print(_shown(table, uses))
        if guess is None:
            print("no events: nothing to specify")
            return
        draft = guess.specification.to_yaml()
        print(f"\n{draft}")
        if config.output is not None:
            _write(Path(config.output), draft, config.overwrite)
            print(f"written to {config.output}")


def _write(file: Path, draft: str, overwrite: bool) -> None:
    if file.exists() and not overwrite:
        raise SidError(str(file), "exists", "Pass --overwrite, or choose another file.")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda path: path.write_text(draft))


def _shown(table: TableProfile, uses: Mapping[str, str]) -> Table:
    files = f" in {table.files} files" if table.files > 1 else ""
    shown = Table(title=f"{table.name}: {table.rows:,} rows{files}", title_justify="left")
    for head in ("column", "type", "values", "missing", "range", "use"):
        shown.add_column(head, justify="right" if head in ("values", "missing") else "left")
    for column in table.columns:
        missing = f"{column.missing / max(table.rows, 1):.1%}" if column.missing else ""
        use = uses.get(f"{table.name}.{column.name}", "-")
        shown.add_row(column.name, str(column.type), f"{column.values:,}", missing, _range(column), use)
    return shown


def _range(column: ColumnProfile) -> str:
    if column.low is None or column.high is None:
        return ""
    return f"{column.low:g} .. {column.high:g}"


if __name__ == "__main__":
    main()
