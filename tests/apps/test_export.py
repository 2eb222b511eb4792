"""A trained run becomes programs that run elsewhere, by the command of docs/serving.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apps.cli import parse_config
from apps.export import ExportConfig, export
from tests.logs import SPEC, random_sids, small_log
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.serving.served_model import ServedModel
from torchrec_sid.training.train_config import TrainConfig

_ROOT = Path(__file__).resolve().parents[2]
_MODEL = RankingConfig(dim=8, heads=2, history_length=10, table_rows=50, tasks=(1,))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training in a process of its own, as a user starts it."""
    folder = tmp_path_factory.mktemp("export")
    log = small_log(folder)
    ids = torch.from_numpy(log.item_ids.copy())
    codes = SPEC.unpack(random_sids(len(ids)))
    SidCatalog.create(folder / "catalog", SPEC, ids, codes, "0" * 64)
    command = [sys.executable, "-m", "apps.train", f"--data={folder / 'log'}", f"--output={folder / 'run'}"]
    command += [f"--prepared={folder / 'prepared'}", f"--catalog={folder / 'catalog'}"]
    command += ["--max_steps=20", "--batch_size=64", "--model.dim=8", "--model.heads=2"]
    command += ["--model.history_length=10", "--model.table_rows=50", "--model.tasks=[1]"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "run"


def test_a_run_is_exported_checked_and_timed(run, tmp_path):
    config = ExportConfig(
        str(run), str(tmp_path / "served"), precisions=("int8",), rows=100_000, batches=(1, 8), rounds=2
    )
    eager, int8 = export(config)
    assert (eager["system"], int8["system"]) == ("eager float", "program int8")
    assert int8["difference_to_eager"] <= 1e-5
    assert 0 < int8["difference_to_float"] < 0.05
    assert int8["ne"] == pytest.approx(eager["ne"], abs=0.01)
    assert eager["ne"] == pytest.approx(_trained_ne(run), abs=1e-4), (
        "the run's weights, the run's test rows"
    )
    assert set(int8["ms"]) == {"1", "8"}
    report = json.loads((tmp_path / "served" / "report.json").read_text())
    assert report["rows"] == [eager, int8]
    assert report["identity"]["step"] == 20
    served = ServedModel.load(tmp_path / "served" / "int8")
    assert served.inputs.max_lengths == dict.fromkeys(
        ("history_sid", "history_action", "history_age"), _MODEL.history_length
    )
    assert served.manifest.identity["catalog"] == SidCatalog.open(run.parent / "catalog").fingerprint


def _trained_ne(run):
    slices = json.loads((run / "metrics.json").read_text())["slices"]
    # Of this log, action 1 is label 1: the second head learns the same from another start.
    assert slices["action >= 1"]["rows"] == slices["all"]["rows"]
    assert 0 < abs(slices["action >= 1"]["ne"] - slices["all"]["ne"]) < 0.1
    return slices["all"]["ne"]


def test_what_cannot_be_exported_is_refused(run, tmp_path):
    with pytest.raises(ArtifactError, match="run.json"):
        export(ExportConfig(str(tmp_path)))
    for name in ("run.json", "metrics.json"):
        (tmp_path / name).write_text((run / name).read_text())
    with pytest.raises(ArtifactError, match="no checkpoint"):
        export(ExportConfig(str(tmp_path)))
    with pytest.raises(SidError, match="ExportConfig"):
        ExportConfig(str(run), precisions=())
    assert parse_config(TrainConfig, None, ["--config", str(run / "config.json")]).model == _MODEL
