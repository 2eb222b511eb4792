"""Prepare a log once, for many trainings: `torchrec-sid prepare_log --data FOLDER --output PREPARED`.

`--prepare.engine spark` runs the queries on Spark (extra `spark`), with the same result. `train` takes
PREPARED as `--prepared`, with the same `--specification` and `--prepare` options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from torchrec_sid.artifact import write_atomically
from torchrec_sid.data.guess import guess_specification
from torchrec_sid.data.inspection import profile_folder
from torchrec_sid.data.prepare import prepare
from torchrec_sid.data.prepare_config import PrepareConfig
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.schema import find_specification
from torchrec_sid.data.specification import Specification

from .cli import parse_config, plain_errors


@dataclass(frozen=True)
class PrepareLogConfig:
    """One preparation."""

    data: str
    """Folder of the log, local or a URI, in the format of docs/data.md."""
    output: str
    """Folder of the prepared log; what was made of the same files in the same way is left as it is."""
    specification: str | None = None
    """What the log's columns are (YAML); none for item, history and time alone. Default:
    specification.yaml in DATA, where there is one."""
    guess: bool = False
    """Guess a specification, as `torchrec-sid inspect` does, where there is none."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """How."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with plain_errors():
        config = parse_config(PrepareLogConfig, __doc__, argv)
        console = Console()
        specification = find_specification(config.data, config.specification)
        if specification is None and config.guess and config.specification is None:
            file = Path(config.output).with_name(f"{Path(config.output).name}.specification.yaml")
            specification = Specification.read(guessed(config.data, file, console))
        log = prepare_on_screen(config.data, config.output, config.prepare, specification, console)
    for split, counts in log.manifest["splits"].items():
        print(f"{split}: {counts['rows']:,} examples, {counts['positives']:,} positive")


def prepare_on_screen(
    data: str,
    out: str | Path,
    config: PrepareConfig,
    specification: Specification | None,
    console: Console,
) -> PreparedLog:
    """Prepare a log, or reuse it, and say what was left out.

    Raises:
        SidError: see :func:`~torchrec_sid.data.prepare.prepare`.
    """
    title = f"preparing {escape(data)}"
    with console.status(title) as status:
        log = prepare(
            data,
            out,
            config,
            specification=specification,
            progress=lambda text: status.update(f"{title}: {escape(text)}"),
        )
    for name, count in log.manifest["dropped"].items():
        if count:
            console.print(f"left out: {count:,} {name.replace('_', ' ')}", markup=False)
    return log


def guessed(data: str, file: Path, console: Console) -> Path:
    """Guess what the columns of a log are and write it to a file.

    Returns:
        The file.

    Raises:
        SidError: a column that every log has is not found.
    """
    with console.status(f"inspecting {escape(data)}"):
        guess = guess_specification(profile_folder(data))
    head = f"# Guessed from {data}. To change it, copy it and pass --specification FILE.\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda path: path.write_text(head + guess.specification.to_yaml()))
    found = f"{len(guess.specification.features)} features guessed, {len(guess.left_out)} columns left out"
    console.print(f"no specification: {found} ({file})", markup=False)
    return file
