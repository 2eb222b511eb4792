"""What pyproject.toml cannot say: where two folders go in the package, and the CPU kernels of a wheel."""

import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

_KERNELS = "torchrec_sid/side/kernels"


def _load_compiler() -> ModuleType:
    """The package's own compiler file, without the package: torch need not be there to build a wheel."""
    spec = importlib.util.spec_from_file_location("compiler", f"{_KERNELS}/compiler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compiler = _load_compiler()
prebuilt = (
    sys.platform == "linux"
    and platform.machine() == "x86_64"
    and bool(compiler.find_compiler())
    and not os.environ.get(compiler.DISABLE_VARIABLE)
)


class BuildWithKernels(build_py):
    """Puts a library for each kind of processor beside the sources; editable installs compile theirs."""

    def run(self) -> None:
        """Build, and say what is left to be compiled at the first use."""
        super().run()
        if self.editable_mode:
            return
        if not prebuilt:
            self.warn(
                "no CPU kernels are built: they are compiled at the first use, where there is a compiler"
            )
            return
        folder = Path(self.build_lib, _KERNELS, compiler.PREBUILT.name)
        folder.mkdir(parents=True, exist_ok=True)
        for level in compiler.LEVELS:
            try:
                compiler.compile_kernels(folder / f"{level}.so", level, compiler.find_compiler())
            except (OSError, subprocess.SubprocessError) as error:
                command = shlex.join(compiler.find_compiler())
                self.warn(
                    f"{command} builds no kernels for {level}: {getattr(error, 'stderr', '') or error}"
                )


class PlatformDistribution(Distribution):
    """Files for one platform, though no extension module is built."""

    def has_ext_modules(self) -> bool:
        """Whether the wheel depends on the platform."""
        return prebuilt


class WheelForAnyPython(bdist_wheel):
    """For this platform, but for any Python: the kernels are called through ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-PLATFORM``."""
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        *find_packages(include=["torchrec_sid", "torchrec_sid.*"]),
        "torchrec_sid.apps",
        "torchrec_sid.fbgemm_shim",
    ],
    package_dir={
        "torchrec_sid.apps": "apps",
        "torchrec_sid.fbgemm_shim": "packaging/fbgemm-gpu-cpu-shim",
    },
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelForAnyPython},
    distclass=PlatformDistribution,
)
