import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from torchx.runner import get_runner
from torchx.specs.finder import ModuleComponentsFinder

from apps.components import train

ROOT = Path(__file__).resolve().parents[2]


def torchx(*arguments, check=True, path="/usr/bin:/bin"):
    """The command line, from a shell in which the environment is not activated."""
    command = [sys.executable, "-m", "torchx.cli.main", "run", *arguments]
    environment = {**os.environ, "PATH": path}
    environment.pop("VIRTUAL_ENV", None)
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def scheduler_request(text):
    return text.split("=== SCHEDULER REQUEST ===", 1)[1]


def test_train_runs_its_ranks_and_restarts_a_failed_one(tmp_path):
    result = torchx(
        *(
            "-cfg",
            f"log_dir={tmp_path / 'logs'}",
            "apps/components.py:train",
            "--module",
            "tests.apps.probe",
        ),
        *("--max_restarts", "3", "--env", "EXTRA=yes,OMP_NUM_THREADS=3"),
        *("--", str(tmp_path), "die-once", "--note", "a b", "$HOME"),
    )
    seen = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert "SUCCEEDED" in result.stdout + result.stderr
    for rank, values in enumerate(seen):
        assert values["RANK"] == str(rank)
        assert values["WORLD_SIZE"] == values["LOCAL_WORLD_SIZE"] == "2"
        assert values["arguments"] == ["--note", "a b", "$HOME"]
        # A free port may be taken before it is bound, which costs one more attempt.
        assert 1 <= int(values["attempt"]) <= 3
        assert values["total"] == 2
        assert values["executable"] == sys.executable
        assert values["EXTRA"] == "yes"
        assert values["OMP_NUM_THREADS"] == "3"
        assert values["GLOO_SOCKET_IFNAME"] == ("lo" if sys.platform == "linux" else None)


def test_a_failing_rank_fails_the_command_and_its_output_is_kept(tmp_path):
    result = torchx(
        *(
            "-cfg",
            f"log_dir={tmp_path / 'logs'}",
            "apps/components.py:train",
            "--module",
            "tests.apps.probe",
        ),
        *("--log_dir", str(tmp_path / "ranks"), "--", str(tmp_path), "fail"),
        check=False,
    )
    assert result.returncode == 1
    assert "FAILED" in result.stdout + result.stderr
    assert len(list((tmp_path / "ranks").rglob("stderr.log"))) == 2


def test_the_config_file_picks_the_scheduler_and_defaults_suit_a_laptop():
    text = torchx("--dryrun", "apps/components.py:train", "--", "--steps", "2").stdout
    request = scheduler_request(text)
    for part in (
        "'-m',",
        "'apps.torchrun'",
        "'--standalone'",
        "'apps.train'",
        "'--steps'",
        "out/torchx",
    ):
        assert part in request
    assert "'OMP_NUM_THREADS': '1'" in request


def test_slurm_dry_run_of_two_nodes():
    text = torchx(
        *("--dryrun", "-s", "slurm", "-cfg", "partition=gpu,time=24:00:00", "apps/components.py:train"),
        *("--nnodes", "2", "--nproc_per_node", "8", "--gpu", "8", "--cpu", "96", "--memMB", "1000000"),
        *("--max_restarts", "3", "--max_retries", "2", "--", "--output", "/scratch/my run"),
    ).stdout
    script = scheduler_request(text)
    assert script.count("--gpus-per-task=8") == script.count("--partition=gpu --time=24:00:00") == 2
    assert "--cpus-per-task=96 --mem=1000000" in script
    assert "export TORCHX_MAX_RETRIES=2" in script
    assert "--max_restarts 3 --nnodes 2 --rdzv_backend c10d" in script
    assert "${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:29500 -m apps.train" in script
    assert "/scratch/my run" in script
    # On GPUs and across machines the laptop's defaults would be wrong.
    assert "OMP_NUM_THREADS" not in script
    assert "GLOO_SOCKET_IFNAME" not in script


def test_kubernetes_dry_run_of_two_nodes():
    pytest.importorskip("kubernetes")
    text = torchx(
        *("--dryrun", "--workspace", "", "-s", "kubernetes", "-cfg", "queue=research,namespace=ml"),
        *("apps/components.py:train", "--nnodes", "2", "--min_nnodes", "1", "--nproc_per_node", "8"),
        *("--gpu", "8", "--cpu", "96", "--memMB", "1000000", "--max_retries", "2"),
        *("--image", "registry.example/sid:1", "--python", "python", "--env", "NCCL_DEBUG=WARN"),
        *("--mounts", "type=volume,src=logs,dst=/data,readonly", "--", "--output", "/data/run"),
    ).stdout
    job = yaml.safe_load(scheduler_request(text))["spec"]
    assert (job["queue"], job["maxRetry"], len(job["tasks"])) == ("research", 2, 2)
    assert [task["minAvailable"] for task in job["tasks"]] == [1, 0]
    pod = job["tasks"][1]["template"]["spec"]
    container = pod["containers"][0]
    assert container["image"] == "registry.example/sid:1"
    assert container["command"][:2] == ["bash", "-c"]
    assert container["command"][2].startswith("python -m apps.torchrun --nproc_per_node 8")
    assert "--nnodes 1:2" in container["command"][2]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert {"name": "NCCL_DEBUG", "value": "WARN"} in container["env"]
    assert {"mountPath": "/data", "name": "mount-0", "readOnly": True} in container["volumeMounts"]
    assert pod["volumes"][1]["persistentVolumeClaim"]["claimName"] == "logs"


@pytest.mark.parametrize("name", ["quantize", "evaluate", "compare", "export"])
def test_single_process_components_run_their_app(name):
    with get_runner() as runner:
        info = runner.dryrun_component(
            f"{ROOT}/apps/components.py:{name}",
            [
                "--cpu",
                "4",
                "--gpu",
                "1",
                "--memMB",
                "100",
                "--max_retries",
                "1",
                "--env",
                "A=b",
                "--",
                "--x",
                "1 2",
            ],
            scheduler="local_cwd",
        )
    role = info._app.roles[0]
    assert role.entrypoint == sys.executable
    assert role.args == ["-m", f"apps.{name}", "--x", "1 2"]
    assert (role.resource.cpu, role.resource.gpu, role.resource.memMB) == (4, 1, 100)
    assert (role.max_retries, role.env["A"]) == (1, "b")


@pytest.mark.parametrize("name", ["quantize", "evaluate", "compare", "export"])
def test_single_process_components_on_slurm_and_kubernetes(name):
    pytest.importorskip("kubernetes")
    component = f"{ROOT}/apps/components.py:{name}"
    options = ["--cpu", "8", "--gpu", "1", "--memMB", "64000", "--max_retries", "2", "--python", "python"]
    mounts = ["--image", "registry.example/sid:1", "--mounts", "type=volume,src=runs,dst=/runs"]
    app = ["--", "--output", "/runs/a b"]
    with get_runner() as runner:
        job = runner.dryrun_component(
            component, [*options, *app], scheduler="slurm", cfg={"partition": "gpu", "job_dir": None}
        )
        pods = runner.dryrun_component(
            component, [*options, *mounts, *app], scheduler="kubernetes", cfg={"queue": "research"}
        )
    script = str(job.request)
    assert f"apps.{name}" in script
    assert "'/runs/a b'" in script
    assert "--cpus-per-task=8 --mem=64000" in script
    assert "--gpus-per-task=1" in script
    [task] = pods.request.resource["spec"]["tasks"]
    container = task["template"].spec.containers[0]
    assert container.command == ["python", "-m", f"apps.{name}", "--output", "/runs/a b"]
    assert container.resources.limits["nvidia.com/gpu"] == "1"
    assert "/runs" in [mount.mount_path for mount in container.volume_mounts]
    assert pods.request.resource["spec"]["maxRetry"] == 2


def test_an_installed_package_has_its_components_by_name():
    """TorchX finds them by entry point; its own, which that would hide, stay."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "torchx.components"
    ]
    modules = {name: importlib.import_module(module) for name, module in points.items()}
    ours = ModuleComponentsFinder(modules["_torchrec_sid"], "").find()
    valid = {component.name: component for component in ours if not component.validation_errors}
    assert set(valid) == {"train", "quantize", "evaluate", "compare", "export", "command"}
    for component in valid.values():
        assert "after a double dash" in inspect.getdoc(component.fn)
    app = valid["train"].fn("--data", "x")
    assert app.roles[0].args[:2] == ["-m", "torchrec_sid.apps.torchrun"]
    assert "torchrec_sid.apps.train" in app.roles[0].args
    app = valid["command"].fn("doctor", "--json")
    assert app.roles[0].args == ["-m", "torchrec_sid.apps.__main__", "doctor", "--json"]
    names = {
        component.name
        for n in ("dist", "utils")
        for component in ModuleComponentsFinder(modules[n], n).find()
    }
    assert {"dist.ddp", "utils.echo"} <= names


@pytest.mark.parametrize("value", ["a$$b", "$HOME", "${app_id}", "it's $(date) `date`", "100%"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_values_arrive_as_they_were_written(value, nodes):
    options = ["--nnodes", str(nodes), "--env", f"A={value}", "--", "--data", value]
    with get_runner() as runner:
        info = runner.dryrun_component(
            f"{ROOT}/apps/components.py:train", options, scheduler="local_cwd", cfg={}
        )
    replica = info.request.role_params["train"][0]
    assert replica.env["A"] == value
    if nodes == 1:
        assert replica.args[-1] == value
    else:
        line = replica.args[-1].partition("-m apps.train ")[2]
        said = subprocess.run(
            ["bash", "-c", f"printf '%s' {line}"], capture_output=True, text=True, check=True
        )
        assert said.stdout == f"--data{value}"


@pytest.mark.parametrize("name", ["a$(touch x)", "a;b", "", "-a", "a b", "a`b`"])
def test_a_name_that_a_shell_would_read_is_refused(name):
    with pytest.raises(ValueError, match="choose letters"):
        train(name=name, nnodes=2)


def test_elastic_bounds_are_checked():
    with pytest.raises(ValueError, match="min_nnodes is 3"):
        train(nnodes=2, min_nnodes=3)
