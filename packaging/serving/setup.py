"""The packages of the checkout, which lie beside this folder."""

from pathlib import Path

from setuptools import find_packages, setup

_ROOT = Path(__file__).resolve().parents[2]

setup(
    packages=[
        "torchrec_sid",
        *(f"torchrec_sid.{name}" for name in find_packages(str(_ROOT / "torchrec_sid"))),
        "torchrec_sid.apps",
    ]
)
