"""Compiling the CPU kernels, doing without them, and their threads."""

import logging
import os
import platform
import shutil
from pathlib import Path

import pytest
import torch

from tests.side.attention_cases import make_case
from torchrec_sid import SidError
from torchrec_sid.side.kernels import attention_cpu
from torchrec_sid.side.kernels import compiler as build
from torchrec_sid.side.kernels.attention_problem import checked_problem

# What a process that has not called it yet would do.
load = build.load_library.__wrapped__


@pytest.fixture(autouse=True, scope="module")
def loaded() -> None:
    """The kernels of this process come from where they always do, not from the folders of these tests."""
    assert build.load_library().reason == ""


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and no library of a wheel."""
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "no-wheel")
    return tmp_path / "cache"


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A command that compiles an empty library in the place of the kernels: what is tested is around it."""
    (gxx,) = build.find_compiler()
    script = tmp_path / "quick"
    script.write_text(f'#!/bin/sh\nfor last; do :; done\nexec {gxx} -shared -x c++ /dev/null -o "$last"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return str(script)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What has been compiled; the compiler runs as ever."""
    done, compile_kernels = [], build.compile_kernels

    def record(target: Path, march: str, compiler: list[str]) -> None:
        done.append(target)
        compile_kernels(target, march, compiler)

    monkeypatch.setattr(build, "compile_kernels", record)
    return done


def test_the_library_is_compiled_once_with_one_line(
    cache: Path, quick_compiler: str, caplog: pytest.LogCaptureFixture
) -> None:
    built = load()
    assert built.library is not None
    assert built.reason == ""
    assert [record.getMessage() for record in caplog.records] == [
        f"Compiling the CPU kernels into {cache}, once: some seconds."
    ]
    before = {path: path.stat() for path in cache.iterdir()}
    assert len(before) == 2
    # Anybody may read what root compiles into an image.
    assert all(found.st_mode & 0o777 == 0o644 for found in before.values())
    assert cache.stat().st_mode & 0o777 == 0o755
    assert load().library is not None
    assert {path: path.stat() for path in cache.iterdir()} == before
    assert len(caplog.records) == 1


def test_a_library_that_is_not_the_compiled_one_is_compiled_again(
    cache: Path, quick_compiler: str, compilations: list[Path]
) -> None:
    """Cut (it would end the process with SIGBUS), edited, without its seal, writable by others, a link."""
    assert load().library is not None
    (path,) = cache.glob("*.so")
    seal = build._seal_of(path)
    whole = path.read_bytes()

    def spoil(content: bytes) -> None:
        # A new file: the old one is mapped by this process.
        path.unlink()
        path.write_bytes(content)

    def link() -> None:
        path.rename(path.with_suffix(".elsewhere"))
        path.symlink_to(path.with_suffix(".elsewhere"))

    damages = [
        lambda: spoil(whole[:5000]),
        lambda: spoil(b""),
        lambda: spoil(whole[:-1] + b"\0\0"),
        seal.unlink,
        lambda: seal.write_bytes(b"\xff"),
        lambda: path.chmod(0o666),
        link,
    ]
    for number, damage in enumerate(damages, 2):
        damage()
        assert load().library is not None
        assert len(compilations) == number
        assert path.read_bytes() == whole or build._is_intact(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_nothing_of_another_user_is_loaded_or_kept_beside(
    cache: Path, quick_compiler: str, compilations: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert load().library is not None
    (path,) = cache.glob("*.so")
    os.chown(path, 12345, 12345)
    assert load().library is not None
    assert path.stat().st_uid == 0
    os.chown(cache, 12345, 12345)
    assert load().library is not None
    assert compilations[0] == compilations[1] != compilations[2]
    assert "belongs to another user" in caplog.text
    assert not compilations[2].exists()


def test_without_a_place_to_keep_it_each_process_compiles(
    cache: Path, quick_compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No home (HOME unset, a user id without an entry), and a path that cannot be a folder."""
    cache.write_text("a file")
    assert load().library is not None
    assert "File exists" in caplog.text or "Not a directory" in caplog.text
    monkeypatch.delenv(build.CACHE_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert build.cache_directory() is None
    assert load().library is not None
    assert "this user has no home directory" in caplog.text


def test_what_a_killed_compiler_left_is_swept(cache: Path, quick_compiler: str) -> None:
    old, young = cache / ".kernels-old", cache / ".kernels-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "kernels.so").write_text("half")
    os.utime(old, (0, 0))
    assert load().library is not None
    assert not old.exists() and young.exists()


def test_the_compiler_may_be_a_command_with_arguments(
    cache: Path, quick_compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (f"env {quick_compiler}", f"env 'UNUSED=a b' {quick_compiler}"):
        monkeypatch.setenv("CXX", command)
        assert load().library is not None, command
    assert len(list(cache.glob("*.so"))) == 2
    monkeypatch.setenv("CXX", "  ")
    assert build.find_compiler() in ([found] for found in map(shutil.which, ("g++", "clang++", "c++")))


def test_a_wheel_has_a_library_for_this_processor(
    cache: Path, quick_compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The best that the processor's flags allow and that is whole; none means compiling."""
    prebuilt = tmp_path / "prebuilt"
    prebuilt.mkdir()
    monkeypatch.setattr(build, "PREBUILT", prebuilt)
    for level in build.LEVELS:
        build.compile_kernels(prebuilt / f"{level}.so", level, build.find_compiler())
    for level, flags in build.LEVELS.items():
        monkeypatch.setattr(build, "_processor_flags", lambda flags=flags: flags | {"other"})
        assert load().origin == f"prebuilt for {level}"
    monkeypatch.setattr(build, "_processor_flags", lambda: build.LEVELS["x86-64-v4"] - {"fma"})
    assert load().origin == "prebuilt for x86-64"
    assert not cache.exists()
    (prebuilt / "x86-64.so").unlink()  # this process has mapped it
    (prebuilt / "x86-64.so").write_bytes(b"cut")
    assert load().origin == f"compiled into {cache}"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the libraries of wheels are for x86-64")
def test_the_library_for_any_processor_computes_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = make_case(lengths=(30, 0, 5), backend="cpu")
    expected, _ = case.measured()
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    build.compile_kernels(tmp_path / "x86-64.so", "x86-64", build.find_compiler())
    built = load()
    assert built.origin == "prebuilt for x86-64"
    monkeypatch.setattr(attention_cpu, "load_library", lambda: built)
    found, _ = case.measured()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not caplog.records


def test_without_a_compiler_plain_pytorch_computes_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = make_case(lengths=(30, 0, 5), backend="auto")
    expected, _ = case.measured()
    for variable, value, message in [
        (build.DISABLE_VARIABLE, "1", "is set"),
        ("CXX", "/nowhere/g++", "No such file"),
        ("CXX", "false", "false failed"),
        ("PATH", "", "no C\\+\\+ compiler"),
    ]:
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setenv(variable, value)
            caplog.clear()
            built = load()
            assert built.library is None
            # Said once; not where it was asked for.
            said = [record for record in caplog.records if "runs in plain PyTorch" in record.getMessage()]
            assert len(said) == (variable != build.DISABLE_VARIABLE)
            patch.setattr(attention_cpu, "load_library", lambda built=built: built)
            found, _ = case.measured()
            with pytest.raises(SidError, match=f"'cpu' cannot be used: .*{message}"):
                make_case(backend="cpu").measured()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_threads_change_no_bit() -> None:
    """4,201 events of 3 bytes, three blocks of rows: enough work for several threads."""
    case = make_case(lengths=(2_000, 0, 100, 2_100, 1), bias=2)
    generator = torch.Generator().manual_seed(0)
    query, grad_z = torch.randn(2, 5, 40, case.attention.layout.num_features, generator=generator)
    grad_z = grad_z.flatten(0, 1)
    events, bias = case.basis.spec.pack_bytes(case.codes), case.extra["bias"]
    problem = checked_problem(
        query, events, case.lengths, None, bias, case.attention.layout.text, 2, "softmax", None, None, None
    )
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = attention_cpu.forward(problem)
            nothing = torch.zeros(200)
            grads = attention_cpu.backward(grad_z, nothing, nothing, problem, out)
            results.append((*out, *grads))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
