"""A dataclass as a command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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


def _refused(argv: list[str], capsys: pytest.CaptureFixture, kind: type = Outer) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_config(kind, None, argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "usage" not in said
    return said


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--name is missing: Required."),
        (["--nme", "b"], "Did you mean --name?"),
        (["--name", "a", "--layers", "3"], "Did you mean --inner.layers?"),
        (["--name", "a", "--inner", "3"], "There are --inner.size, --inner.layers."),
        (["--name", "a", "--limit", "x"], "--limit: 'x'. It must be an int or null."),
        (["--name", "a", "--inner.layers", "1", "x"], "--inner.layers[1]: 'x'. It must be an int."),
        (["--name", "a", "b"], "--name: takes one value, not 2. Quote it"),
        (["--name"], "--name: has no value. Required."),
        (["--name", "a", "--config"], "--config: has no value"),
        (["a"], "'a': is no option"),
        (["--name", "a", "--limit", "1.5"], "'1.5'"),
        (["--name", "a", "--limit", "1e-3"], "'1e-3'"),
        (["--name", "a", "--zzz"], "--zzz: no such option"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    argv: list[str], says: str, capsys: pytest.CaptureFixture
) -> None:
    assert says in _refused(argv, capsys)


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        (["4", "5"], (4, 5)),
        (["4"], (4,)),
        (["[4, 5]"], (4, 5)),
        (["[]"], ()),
        ([], ()),
        (["1e3", "2"], (1000, 2)),
    ],
)
def test_a_list_is_its_words(words: list[str], layers: tuple[int, ...]) -> None:
    found = parse_config(Outer, None, ["--name", "a", "--inner.layers", *words, "--limit", "1e9"])
    assert found == Outer("a", Inner(3, layers), 10**9)


@dataclass(frozen=True)
class _Many:
    names: tuple[str, ...] = ()
    """Names."""
    pairs: tuple[tuple[int, int], ...] = ()
    """Pairs."""
    rate: float | None = None
    """Rate."""
    kind: Literal["dot", "dcn"] = "dot"
    """Kind."""
    share: float = 0.5
    """100% of it."""


def test_words_that_look_like_something_else_stay_words() -> None:
    argv = ["--names", "+ side", "1e9", "null", "a,b", "[x", "--pairs", "[25, 3]", "[1,2]", "--rate=-1e-3"]
    found = parse_config(_Many, None, [*argv, "--kind", "dcn", "--share", "1"])
    assert found == _Many(("+ side", "1e9", "null", "a,b", "[x"), ((25, 3), (1, 2)), -1e-3, "dcn", 1.0)
    assert parse_config(_Many, None, ["--names", '["+ side", "b"]']).names == ("+ side", "b")


def test_a_choice_names_all(capsys: pytest.CaptureFixture) -> None:
    assert "It must be one of dot, dcn." in _refused(["--kind", "dott"], capsys, _Many)


def test_help_explains_every_option(capsys: pytest.CaptureFixture) -> None:
    for kind, words in (
        (Outer, ("How large.", "Widths.", "required", "1 2", "Nested")),
        (_Many, ("100% of it",)),
    ):
        with pytest.raises(SystemExit) as stop:
            parse_config(kind, "What it is for.", ["--help"])
        said = capsys.readouterr().out
        assert stop.value.code == 0 and "What it is for." in said
        assert all(word in said for word in words), said


@pytest.mark.parametrize(
    "text", ["config: SECRET\nname: a\n", "name: a\ninner: SECRET\n", "SECRET: [\n", "SECRET"]
)
def test_a_file_that_is_no_configuration_is_not_shown(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    secret = tmp_path / "secret.yaml"
    secret.write_text("hidden: value\n")
    file = tmp_path / "run.yaml"
    file.write_text(text.replace("SECRET", str(secret)))
    said = _refused(["--config", str(file)], capsys)
    assert "hidden" not in said and str(file) in said


def test_files_are_merged_field_by_field_and_typed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.toml"
    first.write_text("name: a\nlimit: 1e9\ninner: {size: 7, layers: [3]}\n")
    second.write_text("[inner]\nlayers = [9, 8]\n")
    argv = ["--config", str(first), "--config", str(second), "--limit", "4"]
    assert parse_config(Outer, None, argv) == Outer("a", Inner(7, (9, 8)), 4)
    first.write_text("name: a\ninner: {size: '7'}\n")
    assert f"{first}: inner.size: '7' is a str. It must be an int." in _refused(argv, capsys)


def test_the_defaults_of_a_field_are_those_of_its_instance() -> None:
    @dataclass(frozen=True)
    class Owner:
        inner: Inner = field(default_factory=lambda: Inner(9, (7,)))
        """Nested."""

    assert parse_config(Owner, None, ["--inner.size", "1"]) == Owner(Inner(1, (7,)))


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
