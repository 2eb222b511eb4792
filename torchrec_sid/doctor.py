"""`python -m torchrec_sid.doctor`: which versions are installed, whether they fit, and what mends it.

torchrec does not pin its fbgemm-gpu, fbgemm-gpu and fbgemm-gpu-cpu overwrite each other's files, and a
build for another torch fails with a linker's message. Everything is read from the packages' metadata; what
imports is tried in a process of its own, so that a broken package cannot take the doctor down.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

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
_PROBE = """
import json, torch
print(json.dumps({"cuda_build": torch.version.cuda, "gpus": torch.cuda.device_count()}), flush=True)
import fbgemm_gpu
import torchrec
import torchrec.distributed
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
    seen = json.loads(lines[0]) if lines and lines[0].startswith("{") else {}
    failure = None
    if lines[-1:] != ["ok"]:
        complaint = [line for line in run.stderr.strip().splitlines() if line.strip()]
        failure = complaint[-1].strip() if complaint else f"the process ended with code {run.returncode}"
    return Probe(seen.get("cuda_build"), seen.get("gpus", 0), failure)


def diagnose(
    versions: Mapping[str, str | None], requirements: Sequence[str], probe: Probe | None
) -> list[Finding]:
    """Everything that is wrong, worst first.

    Args:
        versions: as from :func:`find_versions`.
        requirements: requirement strings, as from :func:`find_requirements`; extras are ignored.
        probe: as from :func:`probe_imports`; None judges by the versions alone.
    """
    problems = [_judge_requirement(versions, text) for text in requirements if "extra ==" not in text]
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
    lines.append(f"{'matching set':16} {matching_set(versions['torch'])}")
    lines.append("")
    for problem in problems:
        lines += [f"WRONG  {problem.what}", f"  mend {problem.remedy}"]
    if not problems:
        lines.append("Everything fits.")
    return "\n".join(lines) + "\n"


def _judge_requirement(versions: Mapping[str, str | None], text: str) -> Finding | None:
    match = re.match(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*\(?([^;)]*)", text)
    if match is None:
        return None
    name, bounds = match.group(1).lower().replace("_", "-"), match.group(2).replace(" ", "")
    if name not in versions:
        return None
    found, command = versions[name], f"pip install '{name}{bounds}'"
    if found is None:
        return Finding(f"{name} is not installed", command)
    for bound in filter(None, bounds.split(",")):
        operator, wanted = re.match(r"([<>=!~]+)(.*)", bound).groups()  # type: ignore[union-attr]
        have, want = _numbers(found), _numbers(wanted)
        if (operator == ">=" and have < want) or (operator == "<" and have >= want):
            return Finding(f"{name} is {found}, this package needs {bounds}", command)
    return None


def _judge_set(versions: Mapping[str, str | None]) -> Finding | None:
    release = _release(versions.get("torch"))
    expected = MATCHING.get(release or "")
    found = versions.get("torchrec")
    if expected is None or found is None or _release(found) == expected:
        return None
    return Finding(
        f"torchrec is {found}, torch {release} goes with {expected}",
        f"pip install 'torchrec=={expected}.*'",
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
        problems.append(Finding(both, f"pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && {remedy}"))
    if cpu is not None and cuda is None:
        missing = (
            "torchrec requires fbgemm-gpu, which fbgemm-gpu-cpu does not stand for: pip check complains"
        )
        problems.append(Finding(missing, "pip install ./packaging/fbgemm-gpu-cpu-shim"))
    release = _release(versions.get("torch"))
    expected = MATCHING.get(release or "")
    found = cpu or cuda
    if expected is not None and found is not None and _release(found) != expected:
        problems.append(Finding(f"fbgemm is {found}, torch {release} goes with {expected}", remedy))
    cpu_torch = (versions.get("torch") or "").endswith("+cpu")
    if cpu is None and cuda is not None and not shim and cpu_torch:
        what = f"fbgemm-gpu {cuda} is a CUDA build, torch {versions['torch']} a CPU build"
        problems.append(Finding(what, f"pip uninstall -y fbgemm-gpu && {remedy}"))
    return problems


def _reinstall(versions: Mapping[str, str | None], probe: Probe | None) -> str:
    """The command that installs the right fbgemm for this machine."""
    if probe is not None and (probe.gpus or probe.cuda_build):
        release = MATCHING.get(_release(versions.get("torch")) or "", "1.8")
        wanted = f"'fbgemm-gpu=={release}.*'"
        return f"pip uninstall -y fbgemm-gpu-cpu; pip install --force-reinstall --no-deps {wanted}"
    repair = "pip install --force-reinstall --no-deps fbgemm-gpu-cpu==1.8.0"
    return f"{repair} && pip install -r requirements-cpu.txt"


def _release(version: str | None) -> str | None:
    """``2.13.0+cpu`` -> ``2.13``."""
    return ".".join(version.split("+")[0].split(".")[:2]) if version else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


if __name__ == "__main__":
    sys.exit(main())
