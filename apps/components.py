"""TorchX components: `torchx run NAME [options] -- [options of the command]`.

From a checkout `torchx run apps/components.py:NAME ...` does the same. `train` runs that command under
torch.distributed.run, by torchrun.py, on any number of nodes; `quantize`, `evaluate`, `compare` and
`export` run theirs as one process, and `command` any other. They use the interpreter that TorchX itself
runs under, so the virtual environment need not be activated.
"""

# No `from __future__ import annotations` here: TorchX reads the annotations and cannot read strings. And no
# import of this package: TorchX executes the file of a checkout on its own, within a module of TorchX.
import inspect
import re
import shlex
import sys
from collections.abc import Callable
from typing import Dict, List, Optional  # noqa: UP035  TorchX knows these spellings only

from torchx import specs

_APPS = __name__.rpartition(".")[0] if __name__.endswith("apps.components") else "apps"
"""Package of the commands, for the processes that are started."""
_DEFAULT_IMAGE = "."
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


def train(
    *script_args: str,
    nnodes: int = 1,
    nproc_per_node: int = 2,
    min_nnodes: int = 0,
    max_restarts: int = 0,
    max_retries: int = 0,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,  # noqa: N803
    h: Optional[str] = None,  # noqa: UP045
    image: str = _DEFAULT_IMAGE,
    python: str = sys.executable,
    name: str = "train",
    module: str = f"{_APPS}.train",
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    rdzv_port: int = 29500,
    log_dir: Optional[str] = None,  # noqa: UP045
) -> specs.AppDef:
    """Train one ranking model on several processes.

    Args:
        script_args: options of train, after a double dash
        nnodes: machines; with more than one, the processes meet at the first one's rdzv_port
        nproc_per_node: processes per machine, one per GPU if there are GPUs
        min_nnodes: elastic: start with this many machines and go on when one leaves; 0 needs all nnodes
        max_restarts: restarts of all processes by torch.distributed.run when one fails; training resumes
            from its newest checkpoint
        max_retries: restarts of the whole job by the scheduler
        cpu: CPU cores per machine
        gpu: GPUs per machine
        memMB: memory per machine, in MiB
        h: a named resource of TorchX instead of cpu, gpu and memMB
        image: container image, or on Slurm and local_cwd nothing (the job runs in the working directory)
        python: interpreter; in a container image usually python
        name: name of the job: letters, digits, dots, dashes
        module: module to run instead of train
        env: more environment variables, as NAME=VALUE,NAME=VALUE
        mounts: TorchX mounts, as type=bind,src=/data,dst=/data,readonly
        rdzv_port: port of the first machine at which processes meet, with more than one machine
        log_dir: folder for the output of every rank, beside the console
    """
    if not 0 <= min_nnodes <= nnodes:
        raise ValueError(f"min_nnodes is {min_nnodes}: it must be 0 to nnodes ({nnodes})")
    if not _NAME.fullmatch(name):
        raise ValueError(f"name is {name!r}: choose letters, digits, dots, dashes and underscores")
    launch = ["-m", f"{_APPS}.torchrun", "--nproc_per_node", str(nproc_per_node)]
    launch += ["--max_restarts", str(max_restarts)]
    if log_dir is not None:
        launch += ["--log_dir", log_dir, "--tee", "3"]
    if nnodes == 1:
        entrypoint, args = python, _literal([*launch, "--standalone", "-m", module, *script_args])
    else:
        entrypoint, args = (
            "bash",
            ["-c", _join_nodes(python, launch, nnodes, min_nnodes, rdzv_port, module, script_args)],
        )
    role = specs.Role(
        name="train",
        image=image,
        entrypoint=entrypoint,
        args=args,
        env=_environment(env, gpu, local=nnodes == 1),
        num_replicas=nnodes,
        min_replicas=min_nnodes or None,
        max_retries=max_retries,
        resource=specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h),
        port_map={} if nnodes == 1 else {"c10d": rdzv_port},
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )
    return specs.AppDef(name=name, roles=[role])


def _on_machine(program: Callable[..., specs.AppDef]) -> Callable[..., specs.AppDef]:
    """A component of one process: its arguments are the program's, and where to run it."""

    def component(
        *script_args: str,
        cpu: int = 2,
        gpu: int = 0,
        memMB: int = 8192,  # noqa: N803
        h: Optional[str] = None,  # noqa: UP045
        image: str = _DEFAULT_IMAGE,
        python: str = sys.executable,
        env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
        mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
        max_retries: int = 0,
    ) -> specs.AppDef:
        """Where to run it.

        Args:
            script_args: options of the command, after a double dash
            cpu: CPU cores
            gpu: GPUs
            memMB: memory, in MiB
            h: a named resource of TorchX instead of cpu, gpu and memMB
            image: container image
            python: interpreter; in a container image usually python
            env: more environment variables, as NAME=VALUE,NAME=VALUE
            mounts: TorchX mounts, as type=bind,src=/data,dst=/data,readonly
            max_retries: restarts by the scheduler
        """
        app = program(*script_args)
        role = app.roles[0]
        role.resource = specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h)
        role.image, role.entrypoint, role.max_retries = image, python, max_retries
        role.env = _environment(env, role.resource.gpu, local=True)
        role.mounts = specs.parse_mounts(mounts) if mounts else []
        return app

    options = inspect.cleandoc(component.__doc__ or "").partition("\n")[2]
    component.__doc__ = f"{inspect.getdoc(program)}\n{options}"
    component.__name__ = component.__qualname__ = program.__name__
    return component


@_on_machine
def quantize(*script_args: str) -> specs.AppDef:
    """Learn Semantic IDs from embeddings and write a catalog."""
    return _program("quantize", script_args)


@_on_machine
def evaluate(*script_args: str) -> specs.AppDef:
    """Evaluate a trained model on the test period."""
    return _program("evaluate", script_args)


@_on_machine
def compare(*script_args: str) -> specs.AppDef:
    """Train the arms over seeds and write the report that compares them."""
    return _program("compare", script_args)


@_on_machine
def export(*script_args: str) -> specs.AppDef:
    """Export a trained model for serving."""
    return _program("export", script_args)


@_on_machine
def command(*script_args: str) -> specs.AppDef:
    """Run any command of torchrec-sid: its name and its options follow the double dash."""
    return _program("__main__", script_args)


def _program(module: str, script_args: tuple[str, ...]) -> specs.AppDef:
    """A module of the commands as a job of one process, still without a machine."""
    name = module if module != "__main__" else "torchrec-sid"
    role = specs.Role(
        name=name, image=_DEFAULT_IMAGE, args=_literal(["-m", f"{_APPS}.{module}", *script_args])
    )
    return specs.AppDef(name=name, roles=[role])


def _literal(words: List[str]) -> List[str]:  # noqa: UP006
    """Words that TorchX's substitution of macros leaves as they are."""
    return [word.replace("$", "$$") for word in words]


def _environment(env: Optional[Dict[str, str]], gpu: int, *, local: bool) -> Dict[str, str]:  # noqa: UP006, UP045
    """Defaults that the caller's variables replace."""
    # torch.distributed.run keeps one store over restarts, in which restarted ranks find the addresses of
    # the dead ones and wait for ever; this makes it start a new store each time.
    defaults = {
        "LOGLEVEL": "WARNING",
        "PYTHONUNBUFFERED": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if gpu == 0:
        # Processes share the cores: each with its own pool of threads is several times slower.
        defaults["OMP_NUM_THREADS"] = "1"
    if local and sys.platform == "linux":
        # Gloo resolves the host name otherwise, which many laptops and containers cannot.
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    return {**defaults, **{name: value.replace("$", "$$") for name, value in (env or {}).items()}}


def _join_nodes(
    python: str,
    launch: list[str],
    nnodes: int,
    min_nnodes: int,
    port: int,
    module: str,
    script_args: tuple[str, ...],
) -> str:
    """A shell line, because only the scheduler's shell knows the first machine's name."""
    nodes = f"{min_nnodes}:{nnodes}" if min_nnodes else str(nnodes)
    words = [python, *launch, "--nnodes", nodes, "--rdzv_backend", "c10d", "--rdzv_id"]
    before = shlex.join(_literal(words))
    # $$ survives TorchX's own substitution as $.
    endpoint = f"$${{{specs.macros.rank0_env}:=localhost}}:{port}"
    after = shlex.join(_literal(["-m", module, *script_args]))
    return f"{before} {specs.macros.app_id} --rdzv_endpoint {endpoint} {after}"
