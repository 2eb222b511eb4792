"""Settings shared by all tests: one thread each, and Hypothesis without deadlines."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "default", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """Folder of the public logs; tests that need it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the public logs are not part of the project; see docs/data.md")
    return SHARED_DATA


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Examples are read from the package (``--doctest-modules``), not from the tests' helpers."""
    helper = collection_path.suffix == ".py" and not collection_path.name.startswith("test_")
    return True if helper else None
