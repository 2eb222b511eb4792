"""Where the packages lie: the folder `apps` is `torchrec_sid.apps`. All else is said in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["torchrec_sid", "torchrec_sid.*"]), "torchrec_sid.apps"],
    package_dir={"torchrec_sid.apps": "apps"},
)
