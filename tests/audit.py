"""What a piece of code does to the system, seen by Python's audit hook."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SPAWNS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "ctypes.dlopen")
_seen: list[tuple[str, str]] | None = None


def _hook(event: str, args: tuple[object, ...]) -> None:
    if _seen is None:
        return
    if event.startswith(_SPAWNS) or event in (
        "pickle.find_class",
        "socket.connect",
        "os.remove",
        "os.rename",
    ):
        _seen.append((event, repr(args)[:300]))
    elif event == "open" and isinstance(args[0], str | bytes):
        _seen.append((event, str(args[0])))
    elif event == "exec":
        _seen.append((event, getattr(args[0], "co_filename", "")))


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """Yields the list that fills with (event, argument) while the block runs."""
    global _seen
    if not getattr(watched, "hooked", False):
        sys.addaudithook(_hook)
        watched.hooked = True  # type: ignore[attr-defined]
    _seen = found = []
    try:
        yield found
    finally:
        _seen = None


def strange(events: list[tuple[str, str]], folder: Path) -> list[tuple[str, str]]:
    """Those events that no reader of ``folder`` has a reason for.

    Opening files of the folder or of Python's libraries, and running code of the libraries or of FX's own
    making, are no such events.
    """
    libraries = tuple({sys.prefix, sys.base_prefix, str(Path(__file__).parents[1])})
    ours = (str(folder.resolve()), str(folder), "/proc/self/", "/dev/null", "/sys/", *libraries)
    # Opened below the handle of the folder, which the event does not say.
    names = {path.name for path in folder.rglob("*")}
    return [
        (event, what)
        for event, what in events
        if not (event in ("open", "exec") and what.startswith((*ours, "<eval_with_key>", "<frozen")))
        and not (event == "open" and what in names)
    ]
