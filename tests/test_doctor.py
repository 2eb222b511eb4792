import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from torchrec_sid.doctor import (
    Probe,
    diagnose,
    find_requirements,
    find_versions,
    main,
    matching_set,
    probe_imports,
)

CPU = {
    "python": "3.11.7",
    "torch": "2.13.0+cpu",
    "torchrec": "1.8.0",
    "fbgemm-gpu": "1.8.0+cpu.shim",
    "fbgemm-gpu-cpu": "1.8.0",
    "torchx": "0.7.0",
}
CUDA = {**CPU, "torch": "2.13.0", "fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": None}
FINE = Probe(None, 0, None)
GPU = Probe("13.0", 8, None)
REQUIREMENTS = [
    "torch<2.14,>=2.11",
    "torchrec (>=1.6,<1.9)",
    "torchx<0.8,>=0.7",
    'faiss-cpu>=1.9; extra == "bench"',
    "fbgemm-gpu<1.9,>=1.6",
    'kubernetes>=99; python_version < "3"',
]


def only(problems):
    assert len(problems) == 1, problems
    return problems[0]


@pytest.mark.parametrize(("versions", "probe"), [(CPU, FINE), (CPU, None), (CUDA, GPU), (CUDA, None)])
def test_matching_sets_have_no_problem(versions, probe):
    assert diagnose(versions, REQUIREMENTS, probe) == []


def test_older_cuda_set_is_fine():
    older = {**CUDA, "torch": "2.11.0+cu126", "torchrec": "1.6.0", "fbgemm-gpu": "1.6.0+cu126"}
    assert diagnose(older, REQUIREMENTS, GPU) == []


@pytest.mark.parametrize(
    ("change", "probe", "found", "remedy"),
    [
        ({"torchrec": None}, FINE, "torchrec is not installed", "-m pip install 'torchrec<1.9,>=1.6'"),
        ({"torchx": None}, FINE, "torchx is not installed", "-m pip install 'torchx<0.8,>=0.7'"),
        (
            {"torchx": "0.8.1"},
            FINE,
            "torchx is 0.8.1, this package needs <0.8,>=0.7",
            "-m pip install 'torchx",
        ),
        ({"torchrec": "1.7.0"}, FINE, "torchrec is 1.7.0, torch 2.13 goes with 1.8", "torchrec==1.8.*"),
        ({"fbgemm-gpu": "1.9.0"}, None, "both installed", "pip uninstall --yes fbgemm-gpu fbgemm-gpu-cpu"),
        ({"fbgemm-gpu": None}, FINE, "pip check complains", "packaging/fbgemm-gpu-cpu-shim"),
        ({"fbgemm-gpu-cpu": None}, None, "fbgemm is not installed", "fbgemm-gpu-cpu==1.8.*"),
        (
            {"fbgemm-gpu-cpu": "1.7.0"},
            FINE,
            "fbgemm is 1.7.0, torch 2.13 goes with 1.8",
            "fbgemm-gpu-cpu==1.8.*",
        ),
        ({}, Probe(None, 0, "OSError: x.so"), "fails: OSError: x.so", "fbgemm-gpu-cpu==1.8.*"),
        (
            {},
            Probe("13.0", 2, None),
            "2 GPUs are visible, but fbgemm is the CPU build",
            "fbgemm-gpu==1.8.*",
        ),
    ],
)
def test_each_fault_is_named_with_its_remedy(change, probe, found, remedy):
    problem = only(diagnose({**CPU, **change}, REQUIREMENTS, probe))
    assert found in problem.what
    assert remedy in problem.remedy


def test_cuda_fbgemm_on_a_cpu_torch():
    problem = only(diagnose({**CUDA, "torch": "2.13.0+cpu"}, REQUIREMENTS, None))
    assert "CUDA build" in problem.what
    assert "-m pip uninstall --yes fbgemm-gpu" in problem.remedy


def test_a_torch_outside_the_range_lists_the_sets():
    problems = diagnose({**CPU, "torch": "2.9.1"}, REQUIREMENTS, None)
    assert only(problems).what == "torch is 2.9.1, this package needs <2.14,>=2.11"
    assert matching_set("2.9.1").count("torch ") == 3
    assert matching_set("2.13.0+cpu") == (
        "torch 2.13, torchrec 1.8, fbgemm-gpu 1.8 (on a CPU: fbgemm-gpu-cpu 1.8)"
    )


def test_nothing_installed_is_reported_and_not_a_crash():
    problems = diagnose(dict.fromkeys(CPU), REQUIREMENTS, Probe(None, 0, "No module named 'torch'"))
    assert {"torch is not installed", "torchrec is not installed"} <= {p.what for p in problems}


def test_the_probe_survives_a_broken_interpreter_and_a_broken_package(tmp_path):
    assert "could not be tried" in probe_imports(str(tmp_path / "no-python")).error
    crash = tmp_path / "python"
    crash.write_text(
        '#!/bin/sh\necho \'{"cuda_build": "13.0", "gpus": 1}\'\necho \'OSError: bad.so\' >&2\nexit 139\n'
    )
    crash.chmod(0o755)
    assert probe_imports(str(crash)) == Probe("13.0", 1, "OSError: bad.so")
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexit 139\n")
    silent.chmod(0o755)
    assert probe_imports(str(silent)) == Probe(None, 0, "the process ended with code 139")


def test_this_environment_is_fine_and_the_command_says_so(capsys):
    assert find_requirements()
    assert main(["--no-imports", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["versions"]["torchrec"] == find_versions()["torchrec"]
    run = subprocess.run(
        [sys.executable, "-m", "torchrec_sid.doctor"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Everything fits." in run.stdout
    assert re.search(r"CPU kernels +(prebuilt for|compiled into)", run.stdout)


def test_the_command_fails_when_something_is_wrong(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules["torchrec_sid.doctor"].MATCHING, "2.13", "9.9")
    assert main(["--no-imports"]) == 1
    out = capsys.readouterr().out
    assert "WRONG  torchrec is" in out
    assert "  mend " in out and "-m pip install 'torchrec==9.9.*'" in out


def test_every_remedy_can_be_followed_from_any_folder(tmp_path, monkeypatch):
    """Each is commands of this interpreter's pip that parse; each path that they name exists."""
    monkeypatch.chdir(tmp_path)
    faults = [
        {"torch": None},
        {"torch": "2.9.1"},
        {"torch": "2.12.0", "torchrec": "1.8.0"},
        {"fbgemm-gpu": None},
        {"fbgemm-gpu": "1.9.0"},
        {"fbgemm-gpu": None, "fbgemm-gpu-cpu": None},
        {"fbgemm-gpu-cpu": None, "fbgemm-gpu": "1.8.0"},
    ]
    for fault in faults:
        for probe in (None, FINE, GPU, Probe(None, 0, "OSError: x.so")):
            for problem in diagnose({**CPU, **fault}, REQUIREMENTS, probe):
                for command in re.split(r"; | && ", problem.remedy):
                    words = shlex.split(command)
                    assert words[:3] == [sys.executable, "-m", "pip"], problem
                    assert words[3] in ("install", "uninstall")
                    paths = [Path(word) for word in words[4:] if "/" in word]
                    assert all((path / "pyproject.toml").is_file() for path in paths), problem


def test_the_doctor_runs_where_torch_does_not_import(tmp_path):
    """A broken torch is what it is asked about."""
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: cannot open shared object file')")
    run = subprocess.run(
        [sys.executable, "-m", "torchrec_sid.doctor"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=180,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    assert "libtorch.so: cannot open" in run.stdout
