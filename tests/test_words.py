"""What messages and pages name exists: every option, command, module, file and make target."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from apps import components
from apps.__main__ import commands
from apps.cli import _given, _nested, _value
from torchrec_sid.errors import SidError
from torchrec_sid.options import Option, check_values, options_of

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("torchrec_sid/**/*.py"), *ROOT.glob("apps/**/*.py")])
PAGES = sorted(
    [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("apps/**/*.md"), *ROOT.glob("*.md")]
)
_FOREIGN = {"help", "config", "json", "no-imports", "version", "rdzv_endpoint", "json_lines"}
"""Of argparse, of the doctor, of torch.distributed.run."""
_BENCH = re.compile(r"^apps\.bench\.\w+$")


@cache
def _options(module: str) -> dict[str, Option] | None:
    """The options of a module that reads them with parse_config; None for another."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"no module {module}"
    found = re.search(r"parse_config\(\s*(\w+),", Path(spec.origin).read_text())
    if found is None:
        return None
    return {option.name: option for option in options_of(_kind(module))}


def _module(name: str) -> str:
    """Where the options of a command are: `torchrec-sid NAME`, or a module that is run."""
    if _BENCH.match(name):
        return name
    return dict(commands())[name.rpartition(".")[2]]


@cache
def _all_options() -> set[str]:
    """Of every command and component."""
    names = set(_FOREIGN)
    for _, module in commands():
        names |= set(_options(module) or ())
    for name in ("train", "quantize"):
        names |= set(inspect.signature(getattr(components, name)).parameters)
    return names


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """Strings of the raise statements of a file, and of what ends a program."""
    for node in ast.walk(ast.parse(path.read_text())):
        ends = isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "SidError",
            "ArtifactError",
            "exit",
            "_refuse",
        )
        if isinstance(node, ast.Raise) or ends:
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


def _named_wrongly(text: str) -> list[str]:
    """What a text names that does not exist."""
    wrong = []
    for option in re.findall(r"(?<![\w-])--([A-Za-z][\w.-]*\w)", text):
        known = {option, option.replace("-", "_")} & _all_options()
        if not known and not any(name.endswith(f".{option}") for name in _all_options()):
            wrong.append(f"--{option}")
    for command in re.findall(r"torchrec-sid ([a-z]\w*)", text):
        if command not in dict(commands()):
            wrong.append(f"torchrec-sid {command}")
    for command, given in re.findall(
        r"torchrec-sid ([a-z]\w*)((?:\s+--[\w.-]*\w(?:\s+[^-\s]\S*)?)+)", text
    ):
        options = _options(dict(commands()).get(command, "apps.cli"))
        if "--plugin" in given:
            continue  # what a plugin adds has options of its own
        for option in re.findall(r"--([\w.-]*\w)", given):
            if options is not None and option.replace("-", "_") not in {*options, "config", "help"}:
                wrong.append(f"torchrec-sid {command} --{option}")
    for module in re.findall(r"(?<!tests\.)\bapps\.([a-z_]\w*)", text):
        if not (ROOT / "apps" / module).exists() and not (ROOT / "apps" / f"{module}.py").exists():
            wrong.append(f"apps.{module}")
    for file in re.findall(r"\b(?:docs|apps|tests|torchrec_sid)/[\w/]+\.(?:md|py|png|cpp|h)\b", text):
        if not (ROOT / file).exists():
            wrong.append(file)
    for target in re.findall(r"(?:`|^ {4}|^)make ([a-z-]+)", text, flags=re.MULTILINE):
        if f"\n{target}:" not in (ROOT / "Makefile").read_text():
            wrong.append(f"make {target}")
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_an_error_tells_to_do_can_be_done(path: Path) -> None:
    wrong = [(line, name) for line, text in _texts(path) for name in _named_wrongly(text)]
    assert not wrong


def _command_lines(page: str) -> Iterator[str]:
    """Command lines in code, continued ones joined, comments and the prose around them cut."""
    text = page.replace("\\\n", " ")
    code = [
        *re.findall(r"```\w*\n(.*?)```", text, re.DOTALL),
        *re.findall(r"^ {4,}\S.*$", text, re.MULTILINE),
    ]
    lines = [line for block in code for line in block.splitlines()]
    lines += [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    for line in lines:
        yield re.sub(r"\s#.*$", "", line).strip()


_CALL = re.compile(r"(?:torchrec-sid |-m (?:torchrec_sid\.)?apps\.)((?:bench\.)?[a-z_]+)\s*(.*)$")


def _check_call(line: str) -> str | None:
    """Why a command line would be refused; None where it is one of ours and parses, or is not ours."""
    found = _CALL.search(line)
    if found is None or "..." in line or "[--" in line or "--plugin" in line:
        return None
    name = f"apps.{found[1]}" if found[1].startswith("bench.") else found[1]
    try:
        module = _module(name)
    except KeyError:
        return f"no command {name}"
    options = _options(module)
    if options is None:
        return None
    words = shlex.split(re.split(r"\s(?:[|>&]|--$)", found[2])[0])
    if not words or not words[0].startswith("--"):
        return None  # prose
    if "--" in words:  # options of the launcher before, of the command after
        words = words[words.index("--") + 1 :]
    try:
        given = _given(words, options)
        given.pop("config", None)
        typed = {option: _value(options[option], value) for option, value in given.items()}
        kind = _nested(typed)
        check_values(_kind(module), kind, str, text=True)
    except SidError as error:
        # An option that is only mentioned has no value.
        return None if error.found == "has no value" else str(error)
    return None


@cache
def _kind(module: str) -> type:
    source = inspect.getsource(importlib.import_module(module))
    found = re.search(r"parse_config\(\s*(\w+),", source)
    assert found is not None
    kind: type = getattr(importlib.import_module(module), found[1])
    # Where plugins add options, a function makes the class.
    return kind if dataclasses.is_dataclass(kind) else kind()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_a_page_parses(path: Path) -> None:
    text = path.read_text()
    wrong = [(line, why) for line in _command_lines(text) if (why := _check_call(line)) is not None]
    assert not wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_exists(path: Path) -> None:
    text = path.read_text()
    code = ";\n".join(re.findall(r"(?<!`)`([^`]+)`(?!`)", text))
    # Options are checked in their command lines, where it is known whose they are.
    assert not [name for name in _named_wrongly(code) if not name.startswith("--")]


@pytest.mark.parametrize("table", ["1", "2", "2-bare", "3-bytes"])
def test_rows_that_pages_choose_exist(table: str) -> None:
    from apps.recipes import TABLES

    for path in PAGES:
        for line in _command_lines(path.read_text()):
            if f"TABLE={table} " in line and "--rows " in line:
                arguments = line.partition('ARGS="')[2].partition('"')[0]
                words = shlex.split(arguments)
                rows = words[words.index("--rows") + 1 :]
                chosen = [
                    w for i, w in enumerate(rows) if not any(x.startswith("--") for x in rows[: i + 1])
                ]
                if "ROWS=" not in line:
                    assert TABLES[table](4000).chosen(tuple(chosen)).rows


def test_the_walk_finds_what_is_wrong() -> None:
    assert _named_wrongly("Pass --output or --world-size.") == []
    text = (
        "Pass --no_such_thing, see docs/none.md, run `make nothing`, torchrec-sid nothing or apps.nothing."
    )
    assert len(_named_wrongly(text)) == 5
    assert "Did you mean --output?" in str(_check_call("torchrec-sid compare --outputt x"))
    assert "It must be an int" in str(_check_call("torchrec-sid compare --seeds x"))
    assert _check_call("torchrec-sid compare --seeds 3 --arms full_id side  ") is None
    assert "no command" in str(_check_call("torchrec-sid nothing --x"))
    assert "'zzz'" in str(_check_call("python -m apps.bench.tables --rounds zzz")) or "rounds" not in (
        _options("apps.bench.tables") or {}
    )
