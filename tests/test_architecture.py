"""The plan of the house: no import circles, nothing imports upwards, one name stands for one thing."""

import ast
from collections import Counter, defaultdict
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_FILES = sorted([*(_ROOT / "torchrec_sid").rglob("*.py"), *(_ROOT / "apps").rglob("*.py")])
_LAYERS = {
    room: level
    for level, rooms in enumerate(
        (
            (
                "ages",
                "artifact",
                "devices",
                "errors",
                "hashing",
                "plugins",
                "progress",
                "seeding",
                "spec",
                "streams",
            ),
            ("quantizers",),
            ("quality",),
            ("catalog",),
            ("side",),
            ("tables",),
            ("collections", "data"),
            ("item_content", "learn", "moved_rows", "new_generation", "parallel", "replace"),
            ("metrics", "models"),
            ("monitors", "training"),
            ("serving",),
        )
    )
    for room in rooms
}
"""Room of torchrec_sid -> its floor; a room may import its own floor and those below."""


def _name(path):
    parts = path.relative_to(_ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


_MODULES = {_name(path): path for path in _FILES}


def _imports(path):
    """Modules of ours that a file imports, wherever in the file."""
    package = _name(path) if path.name == "__init__.py" else _name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in _MODULES else base


def _graph():
    graph = {}
    for name, path in _MODULES.items():
        if path.name == "__init__.py":
            continue  # what a package re-exports is its contents
        graph[name] = {found for found in _imports(path) if found in _MODULES and found != name}
    return graph


def test_there_are_no_import_circles():
    graph, done, circles = _graph(), set(), []

    def walk(name, above):
        if name in above:
            circles.append([*above[above.index(name) :], name])
        elif name not in done:
            for following in sorted(graph.get(name, ())):
                walk(following, [*above, name])
            done.add(name)

    for name in graph:
        walk(name, [])
    assert not circles


def test_nothing_imports_upwards():
    wrong = []
    for name, found in _graph().items():
        room = name.split(".")[1] if name.startswith("torchrec_sid.") else None
        for imported in found:
            if room is not None and imported.startswith("apps"):
                wrong.append((name, imported))
            if room in _LAYERS and imported.startswith("torchrec_sid."):
                other = imported.split(".")[1]
                if _LAYERS.get(other, 0) > _LAYERS[room]:
                    wrong.append((name, imported))
    assert not wrong


def test_no_two_files_have_one_name():
    stems = Counter(path.stem for path in _FILES if path.name not in ("__init__.py", "__main__.py"))
    assert not [stem for stem, count in stems.items() if count > 1]


def test_no_two_public_classes_have_one_name():
    homes = defaultdict(list)
    for path in _FILES:
        for node in ast.parse(path.read_text()).body:
            if (
                isinstance(node, ast.ClassDef)
                and not node.name.startswith("_")
                and "bench" not in path.parts
            ):
                homes[node.name].append(_name(path))
    assert not {name: places for name, places in homes.items() if len(places) > 1}


def test_no_file_is_longer_than_can_be_held_in_the_head():
    long = {_name(path): len(path.read_text().splitlines()) for path in _FILES}
    assert not {name: lines for name, lines in long.items() if lines > 500}
