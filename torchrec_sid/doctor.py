"""`python -m torchrec_sid.doctor`: which versions are installed, whether they fit, and what mends it.

torchrec does not pin its fbgemm-gpu, fbgemm-gpu and fbgemm-gpu-cpu overwrite each other's files, and a
build for another torch fails with a linker's message. Everything is read from the packages' metadata; what
imports is tried in a process of its own, so that a broken package cannot take the doctor down.

Remedies are commands for the environment that the doctor runs in: they need neither a checkout nor a file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

PACKAGES = (
    "torchrec-sid",
    "torch",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "torchx",
    "torchmetrics",
    "numpy",
    "pyarrow",
    "ibis-framework",
    "duckdb",
    "safetensors",
    "sentencepiece",
    "jsonargparse",
    "pyyaml",
    "rich",
    "matplotlib",
    "tensorboard",
    "faiss-cpu",
    "kubernetes",
)
"""Whose versions are shown."""
MATCHING = {"2.13": "1.8", "2.12": "1.7", "2.11": "1.6"}
"""torch -> the torchrec and fbgemm that were built for it (FBGEMM's table of releases)."""
_SHIM = "cpu.shim"
_SHIM_FOLDERS = (
    Path(__file__).parent / "fbgemm_shim",
    Path(__file__).parents[1] / "packaging" / "fbgemm-gpu-cpu-shim",
)
"""Where the stand-in for fbgemm-gpu lies in a wheel and in a checkout."""
_PROBE = """
import json, torch
print(json.dumps({"cuda_build": torch.version.cuda, "gpus": torch.cuda.device_count()}), flush=True)
import fbgemm_gpu
import torchrec
import torchrec.distributed
from torchrec_sid.side.kernels.compiler import load_library
built = load_library()
print(json.dumps({"kernels": built.origin or f"none: {built.reason}"}), flush=True)
print("ok")
"""


class Probe(NamedTuple):
    """What importing torch, fbgemm_gpu and torchrec in a fresh process gave."""

    cuda_build: str | None
    """CUDA version that torch was built for; None for a CPU build, or if torch does not import."""
    gpus: int
    """Visible GPUs."""
    error: str | None
    """Last line of the failure; None if all of them import."""
    kernels: str = "not tried"
    """Where the CPU kernels come from, or why there are none."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    what: str
    """What was found."""
    remedy: str
    """The command that mends it, or what to do."""


def find_versions() -> dict[str, str | None]:
    """Versions of Python, the platform and the packages of :data:`PACKAGES`; None where not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def find_requirements() -> list[str]:
    """What this package requires, as its metadata says; empty if it runs from a bare folder."""
    try:
        return importlib.metadata.requires("torchrec-sid") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def probe_imports(python: str = sys.executable, timeout_seconds: float = 120) -> Probe:
    """Import torch, fbgemm_gpu and torchrec in another process."""
    try:
        run = subprocess.run(
            [python, "-c", _PROBE], capture_output=True, text=True, timeout=timeout_seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Probe(None, 0, f"the import could not be tried: {error}")
    lines = run.stdout.strip().splitlines()
    seen: dict[str, Any] = {}
    for line in lines:
        if line.startswith("{"):
            seen |= json.loads(line)
    failure = None
    if lines[-1:] != ["ok"]:
        complaint = [line for line in run.stderr.strip().splitlines() if line.strip()]
        failure = complaint[-1].strip() if complaint else f"the process ended with code {run.returncode}"
    kernels = seen.get("kernels", "not tried")
    return Probe(seen.get("cuda_build"), seen.get("gpus", 0), failure, kernels)


def diagnose(
    versions: Mapping[str, str | None], requirements: Sequence[str], probe: Probe | None
) -> list[Finding]:
    """Everything that is wrong, worst first.

    Args:
        versions: as from :func:`find_versions`.
        requirements: requirement strings, as from :func:`find_requirements`; those of extras, and of other
            platforms and Pythons, are ignored.
        probe: as from :func:`probe_imports`; None judges by the versions alone.
    """
    problems = [_judge_requirement(versions, Requirement(text)) for text in requirements]
    problems += _judge_fbgemm(versions, probe)
    problems.append(_judge_set(versions))
    if probe is not None and probe.error is not None:
        problems.append(
            Finding(f"import of fbgemm_gpu and torchrec fails: {probe.error}", _reinstall(versions, probe))
        )
    if probe is not None and probe.gpus and versions.get("fbgemm-gpu-cpu"):
        problems.append(
            Finding(
                f"{probe.gpus} GPUs are visible, but fbgemm is the CPU build", _reinstall(versions, probe)
            )
        )
    unique = {problem.what: problem for problem in problems if problem is not None}
    return list(unique.values())


def matching_set(torch_version: str | None) -> str:
    """The set of releases that fit a torch, as one line."""
    release = _release(torch_version)
    if release not in MATCHING:
        return "; ".join(f"torch {t} with torchrec and fbgemm {r}" for t, r in MATCHING.items())
    other = MATCHING[release]
    return f"torch {release}, torchrec {other}, fbgemm-gpu {other} (on a CPU: fbgemm-gpu-cpu {other})"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; 0 if nothing is wrong, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m torchrec_sid.doctor", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no-imports", action="store_true", help="judge by the versions alone (faster)")
    options = parser.parse_args(argv)
    versions = find_versions()
    probe = None if options.no_imports else probe_imports()
    problems = diagnose(versions, find_requirements(), probe)
    write = sys.stdout.write
    if options.json:
        report = _report(versions, probe, problems)
        write(json.dumps(report, indent=2) + "\n")
    else:
        write(_text(versions, probe, problems))
    return 1 if problems else 0


def _report(
    versions: Mapping[str, str | None], probe: Probe | None, problems: list[Finding]
) -> dict[str, Any]:
    return {
        "ok": not problems,
        "versions": dict(versions),
        "matching_set": matching_set(versions["torch"]),
        "imports": probe._asdict() if probe else None,
        "problems": [asdict(problem) for problem in problems],
    }


def _text(versions: Mapping[str, str | None], probe: Probe | None, problems: list[Finding]) -> str:
    lines = [f"{name:16} {version or 'not installed'}" for name, version in versions.items()]
    if probe is not None:
        build = f"CUDA {probe.cuda_build}" if probe.cuda_build else "CPU"
        lines.append(f"{'torch build':16} {build}, {probe.gpus} GPUs visible")
        lines.append(f"{'CPU kernels':16} {probe.kernels}")
    lines.append(f"{'matching set':16} {matching_set(versions['torch'])}")
    lines.append("")
    for problem in problems:
        lines += [f"WRONG  {problem.what}", f"  mend {problem.remedy}"]
    if not problems:
        lines.append("Everything fits.")
    return "\n".join(lines) + "\n"


def _judge_requirement(versions: Mapping[str, str | None], wanted: Requirement) -> Finding | None:
    name = wanted.name.lower().replace("_", "-")
    # fbgemm goes by two names: it is judged on its own.
    if name not in versions or name.startswith("fbgemm"):
        return None
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
        return None
    found, command = versions[name], _pip("install", f"{name}{wanted.specifier}")
    if found is None:
        return Finding(f"{name} is not installed", command)
    if not wanted.specifier.contains(Version(found), prereleases=True):
        return Finding(f"{name} is {found}, this package needs {wanted.specifier}", command)
    return None


def _judge_set(versions: Mapping[str, str | None]) -> Finding | None:
    release = _release(versions.get("torch"))
    expected = MATCHING.get(release or "")
    found = versions.get("torchrec")
    if expected is None or found is None or _release(found) == expected:
        return None
    return Finding(
        f"torchrec is {found}, torch {release} goes with {expected}",
        _pip("install", f"torchrec=={expected}.*"),
    )


def _judge_fbgemm(versions: Mapping[str, str | None], probe: Probe | None) -> list[Finding]:
    cuda, cpu = versions.get("fbgemm-gpu"), versions.get("fbgemm-gpu-cpu")
    shim = cuda is not None and cuda.endswith(_SHIM)
    remedy = _reinstall(versions, probe)
    problems = []
    if cpu is None and (cuda is None or shim):
        problems.append(Finding("fbgemm is not installed, and torchrec does not import without it", remedy))
    if cpu is not None and cuda is not None and not shim:
        both = "fbgemm-gpu and fbgemm-gpu-cpu are both installed, and each overwrites the other's files"
        problems.append(Finding(both, remedy))
    if cpu is not None and cuda is None:
        missing = (
            "torchrec requires fbgemm-gpu, which fbgemm-gpu-cpu does not stand for: pip check complains"
        )
        problems.append(Finding(missing, _install_shim()))
    release = _release(versions.get("torch"))
    expected = MATCHING.get(release or "")
    found = cpu or cuda
    if expected is not None and found is not None and _release(found) != expected:
        problems.append(Finding(f"fbgemm is {found}, torch {release} goes with {expected}", remedy))
    cpu_torch = (versions.get("torch") or "").endswith("+cpu")
    if cpu is None and cuda is not None and not shim and cpu_torch:
        what = f"fbgemm-gpu {cuda} is a CUDA build, torch {versions['torch']} a CPU build"
        problems.append(Finding(what, remedy))
    return problems


def _reinstall(versions: Mapping[str, str | None], probe: Probe | None) -> str:
    """The commands that leave one fbgemm, the right one for this machine and torch."""
    release = MATCHING.get(_release(versions.get("torch")) or "", "1.8")
    clean = _pip("uninstall", "--yes", "fbgemm-gpu", "fbgemm-gpu-cpu")
    if probe is not None and (probe.gpus or probe.cuda_build):
        return f"{clean}; {_pip('install', '--no-deps', f'fbgemm-gpu=={release}.*')}"
    install = _pip("install", "--no-deps", f"fbgemm-gpu-cpu=={release}.*")
    return f"{clean}; {install} && {_install_shim()}"


def _install_shim() -> str:
    folder = next((folder for folder in _SHIM_FOLDERS if folder.is_dir()), _SHIM_FOLDERS[0])
    return _pip("install", "--no-deps", str(folder))


def _pip(*arguments: str) -> str:
    """A command of the pip of this environment, whether or not it is activated."""
    return shlex.join((sys.executable, "-m", "pip", *arguments))


def _release(version: str | None) -> str | None:
    """``2.13.0+cpu`` -> ``2.13``."""
    return ".".join(version.split("+")[0].split(".")[:2]) if version else None


if __name__ == "__main__":
    sys.exit(main())
