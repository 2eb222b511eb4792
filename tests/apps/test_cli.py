"""A dataclass as a command line."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from apps.cli import parse_config, plain_errors
from torchrec_sid.errors import SidError


@dataclass(frozen=True)
class Inner:
    size: int = 3
    """How large."""
    layers: tuple[int, ...] = (1, 2)
    """Widths."""


@dataclass(frozen=True)
class Outer:
    name: str
    """Required."""
    inner: Inner = field(default_factory=Inner)
    """Nested."""
    limit: int | None = None
    """Optional."""


def test_options_reach_nested_fields() -> None:
    found = parse_config(Outer, None, ["--name", "a", "--inner.size", "5", "--inner.layers", "[4, 5]"])
    assert found == Outer("a", Inner(5, (4, 5)))


def test_a_file_gives_options_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: a\ninner: {size: 7}\nlimit: 2\n")
    assert parse_config(Outer, None, ["--config", str(file), "--limit", "9"]) == Outer("a", Inner(7), 9)


@pytest.mark.parametrize("argv", [[], ["--name", "a", "--nme", "b"], ["--name", "a", "--limit", "x"]])
def test_missing_unknown_and_wrong_options_end_the_program(
    argv: list, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(Outer, None, argv)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


@dataclass(frozen=True)
class _Flags:
    quick: bool = False
    name: str = "a"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], _Flags()),
        (["--quick"], _Flags(True)),
        (["--quick", "--name", "b"], _Flags(True, "b")),
        (["--name", "b", "--quick"], _Flags(True, "b")),
        (["--quick", "false"], _Flags(False)),
        (["--quick=true"], _Flags(True)),
    ],
)
def test_a_bare_boolean_option_is_a_flag(argv: list[str], expected: _Flags) -> None:
    assert parse_config(_Flags, None, argv) == expected


def test_a_sid_error_ends_the_program_with_its_message_alone() -> None:
    with pytest.raises(SystemExit) as stop, plain_errors():
        raise SidError("items.parquet", "item_id 7 occurs twice", "Keep one row per item.")
    assert stop.value.code == "SidError: items.parquet: item_id 7 occurs twice. Keep one row per item."
