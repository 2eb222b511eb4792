"""Folders of artefacts: nothing is followed, overwritten or believed that this package did not make."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from torchrec_sid.artifact import (
    disk_errors,
    folder_lock,
    open_folder,
    record_file,
    record_tree,
    save_array,
    seal_folder,
    whole_folder,
    work_folder,
    write_atomically,
)
from torchrec_sid.artifact.place import check_member, open_member
from torchrec_sid.artifact.sealed import KEY_VARIABLE
from torchrec_sid.errors import ArtifactError, SidError

_FORK = multiprocessing.get_context("fork")


def make(path: Path, kind: str = "thing") -> Path:
    path.mkdir(parents=True)
    (path / "a.bin").write_bytes(b"abc")
    (path / "below").mkdir()
    (path / "below" / "b.bin").write_bytes(b"def")
    seal_folder(path, kind=kind, version=1, config={"x": 1}, files=record_tree(path))
    return path


def open_it(path: Path, **options: bool) -> None:
    open_folder(path, kind="thing", version=1, **options)


def test_a_lock_that_is_a_link_or_somebodys_file_is_refused_and_kept(tmp_path: Path) -> None:
    mine = tmp_path / "thesis.tex"
    mine.write_text("mine")
    lock = tmp_path / ".folder.lock"
    for put in (
        lambda: lock.symlink_to(mine),
        lambda: os.link(mine, lock),
        lambda: lock.write_text("mine"),
    ):
        put()
        with (
            pytest.raises(ArtifactError, match="is not a lock of this package"),
            folder_lock(tmp_path / "folder"),
        ):
            pass
        assert mine.read_text() == "mine"
        lock.unlink()
    # A link that leads nowhere would make a file there; a second name of a lock may be anything's.
    lock.symlink_to(tmp_path / "new")
    with pytest.raises(ArtifactError, match="not a lock"), folder_lock(tmp_path / "folder"):
        pass
    assert not (tmp_path / "new").exists()
    lock.unlink()
    (tmp_path / "empty").touch()
    os.link(tmp_path / "empty", lock)
    with pytest.raises(ArtifactError, match="not a lock"), folder_lock(tmp_path / "folder"):
        pass
    assert (tmp_path / "empty").read_bytes() == b""


def _hold(folder: Path, ready, child) -> None:
    with folder_lock(folder):
        if child is not None:
            forked = os.fork()
            if not forked:
                ready.set()
                time.sleep(60)
                os._exit(0)
            child.value = forked
        else:
            ready.set()
        signal.pause()


def test_the_holder_of_a_lock_is_named_and_takes_it_with_it(tmp_path: Path) -> None:
    ready = _FORK.Event()
    holder = _FORK.Process(target=_hold, args=(tmp_path / "folder", ready, None))
    holder.start()
    assert ready.wait(30)
    with (
        pytest.raises(SidError, match=f"is in use by process {holder.pid} of "),
        folder_lock(tmp_path / "folder", wait=False),
    ):
        pass
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join()
    with folder_lock(tmp_path / "folder", wait=False):
        pass


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_parent(tmp_path: Path) -> None:
    ready, child = _FORK.Event(), _FORK.Value("i", 0)
    holder = _FORK.Process(target=_hold, args=(tmp_path / "folder", ready, child))
    holder.start()
    assert ready.wait(30)
    while not child.value:
        time.sleep(0.01)
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join()
    try:
        with folder_lock(tmp_path / "folder", wait=False):
            pass
    finally:
        os.kill(child.value, signal.SIGKILL)


@pytest.mark.parametrize(
    "name",
    ["..", "../x", "a/../../x", "a/..", "/etc/passwd", "", "a//b", ".", "a\\b", "a\0", "a\nb", "x" * 300],
)
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError):
        check_member(name, "manifest")
    with pytest.raises(ArtifactError):
        open_member(tmp_path, name)


def test_links_and_odd_files_inside_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "folder")
    (tmp_path / "aside").write_bytes(b"abc")
    (folder / "a.bin").unlink()
    (folder / "a.bin").symlink_to(tmp_path / "aside")
    with pytest.raises(ArtifactError, match="symbolic link"):
        open_it(folder)
    (folder / "a.bin").unlink()
    os.mkfifo(folder / "a.bin")
    with pytest.raises(ArtifactError, match="not a regular file"):
        open_it(folder)
    (folder / "a.bin").unlink()
    (folder / "a.bin").write_bytes(b"abc")
    open_it(folder, verify=True)
    (folder / "below").rename(tmp_path / "below")
    (folder / "below").symlink_to(tmp_path / "below")
    with pytest.raises(ArtifactError, match="symbolic link"):
        open_it(folder)


def test_sizes_always_count_and_contents_on_request(tmp_path: Path) -> None:
    folder = make(tmp_path / "folder")
    for data in (b"ab", b"abcd"):
        (folder / "a.bin").write_bytes(data)
        with pytest.raises(ArtifactError, match=f"a.bin: has {len(data)} bytes, the manifest says 3"):
            open_it(folder)
    (folder / "a.bin").write_bytes(b"abd")
    open_it(folder)
    with pytest.raises(ArtifactError, match="a.bin: its contents do not match"):
        open_it(folder, verify=True)


def test_any_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    folder = make(tmp_path / "folder")
    file = folder / "manifest.json"
    good = file.read_bytes()
    for at in range(len(good)):
        file.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        with pytest.raises(ArtifactError):
            open_it(folder)
    body = json.loads(good)
    body["config"]["x"] = 2
    file.write_text(json.dumps(body, indent=2) + "\n")
    with pytest.raises(ArtifactError, match="was altered"):
        open_it(folder)


def test_a_key_refuses_the_unsigned_and_those_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make(tmp_path / "plain")
    monkeypatch.setenv(KEY_VARIABLE, "mine" * 8)
    with pytest.raises(ArtifactError, match="is not signed"):
        open_it(plain)
    signed = make(tmp_path / "signed")
    open_it(signed)
    (signed / "a.bin").write_bytes(b"abd")
    with pytest.raises(ArtifactError, match="do not match"):
        open_it(signed)
    (signed / "a.bin").write_bytes(b"abc")
    monkeypatch.setenv(KEY_VARIABLE, "theirs" * 8)
    with pytest.raises(ArtifactError, match="signed with another key"):
        open_it(signed)
    monkeypatch.delenv(KEY_VARIABLE)
    open_it(signed)
    monkeypatch.setenv(KEY_VARIABLE, "short")
    with pytest.raises(SidError, match="5 bytes"):
        open_it(signed)


def test_a_folder_is_replaced_whole_and_a_strangers_file_is_kept(tmp_path: Path) -> None:
    folder = make(tmp_path / "folder")
    with pytest.raises(KeyboardInterrupt), whole_folder(folder, "thing") as work:
        (work / "a.bin").write_bytes(b"half")
        raise KeyboardInterrupt
    open_it(folder, verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    (folder / "below" / "notes.txt").write_text("mine")
    with pytest.raises(SidError, match="holds 'notes.txt'"), whole_folder(folder, "thing"):
        pass
    with pytest.raises(SidError, match="is not a other"), whole_folder(folder, "other"):
        pass
    assert (folder / "below" / "notes.txt").read_text() == "mine"


def test_what_kept_no_list_of_its_files_is_moved_aside(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"version": 1}')
    (folder / "notes.txt").write_text("mine")
    for number in (1, 2):
        with whole_folder(folder, "thing") as work:
            (work / "a.bin").write_bytes(b"abc")
            (work / "manifest.json").write_text('{"version": 2}')
        assert (tmp_path / f"folder.old-{number}").is_dir()
    assert (tmp_path / "folder.old-1" / "notes.txt").read_text() == "mine"


def _leave(target: Path) -> None:
    with work_folder(target):
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_writer_removes_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    writer = _FORK.Process(target=_leave, args=(tmp_path / "folder",))
    writer.start()
    writer.join()
    assert len(list(tmp_path.glob(".folder.work-*"))) == 1
    (tmp_path / ".other.work-12345678").mkdir()
    (tmp_path / ".folder.notes").write_text("mine")
    with work_folder(tmp_path / "folder") as mine, work_folder(tmp_path / "folder") as second:
        assert sorted(path.name for path in tmp_path.glob(".folder.work-*")) == sorted(
            (mine.name, second.name)
        )
    assert {path.name for path in tmp_path.iterdir()} == {".other.work-12345678", ".folder.notes"}


def test_a_file_is_flushed_before_it_takes_its_place_and_readers_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, flushed = tmp_path / "file", []
    target.write_text("old")
    flush = os.fsync

    def watch(handle: int) -> None:
        flushed.append((str(Path(f"/proc/self/fd/{handle}").readlink()), target.read_text()))
        flush(handle)

    monkeypatch.setattr(os, "fsync", watch)
    with target.open() as reader:
        write_atomically(target, lambda path: path.write_text("new"))
        assert reader.read() == "old" and target.read_text() == "new"
    names = [(Path(name).name, text) for name, text in flushed]
    assert names == [("file", "old"), (tmp_path.name, "new")]


@pytest.mark.parametrize(
    "number",
    [
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,
        errno.EIO,
    ],
)
def test_what_a_disk_says_is_said_once_by_name(number: int) -> None:
    for error in (OSError(number, os.strerror(number), "/x"), RuntimeError(f"os error {number}")):
        with pytest.raises(SidError, match=r"folder: cannot be written \(") as said, disk_errors("folder"):
            raise error
        assert os.strerror(number) in str(said.value)
    with pytest.raises(RuntimeError, match="a bug"), disk_errors("folder"):
        raise RuntimeError("a bug")


def _write_under_quota(path: Path, failed) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        save_array(path, np.arange(400))
    except OSError as error:
        failed.value = error.errno or 0


def test_an_array_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    values = np.arange(400).reshape(20, 20).T
    save_array(tmp_path / "a.npy", values)
    assert (np.load(tmp_path / "a.npy") == values).all()
    # Shorter than a buffer of C's library, whose last write numpy.save does not look at.
    failed = _FORK.Value("i", 0)
    writer = _FORK.Process(target=_write_under_quota, args=(tmp_path / "b.npy", failed))
    writer.start()
    writer.join()
    assert failed.value == errno.EFBIG


def test_records_are_of_what_lies_there(tmp_path: Path) -> None:
    folder = make(tmp_path / "folder")
    assert set(record_tree(folder)) == {"a.bin", "below/b.bin"}
    assert record_file(folder, "below/b.bin").bytes == 3
    with pytest.raises(ArtifactError, match="no such file"):
        record_file(folder, "below/c.bin")
