"""Features of a specification train, shard, are sliced by and leave for serving, in any arm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from apps.export import to_request
from apps.train import train
from tests.data.test_example_features import SPEC, write
from torchrec_sid.data.specification import Specification
from torchrec_sid.errors import SidError
from torchrec_sid.models.build import LogSizes, RankingConfig, build_ranking
from torchrec_sid.models.feature_fields import FeatureFields, FeatureInputs, TableInput, VectorInput
from torchrec_sid.parallel.embedding_tables import find_tables
from torchrec_sid.serving.exporter import ExportOptions, export_model
from torchrec_sid.serving.served_model import ServedModel
from torchrec_sid.training.run import build_run, open_run, open_stores
from torchrec_sid.training.train_config import TrainConfig

CPU = torch.device("cpu")


def config(folder: Path, **changes) -> TrainConfig:
    (folder / "spec.yaml").write_text(SPEC.to_yaml())
    base = TrainConfig(
        str(folder / "log"),
        str(folder / "run"),
        specification=str(folder / "spec.yaml"),
        model=RankingConfig("known_id", dim=8, heads=2, history_length=5),
        batch_size=32,
        slices=("city", "brand"),
    )
    return replace(base, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, 1)
    return tmp_path


@pytest.fixture(autouse=True, scope="module")
def group(tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_ranker_reads_everything_that_the_specification_names(folder: Path, tmp_path: Path) -> None:
    report = train(config(folder, epochs=2), CPU)
    cities = {name: part["rows"] for name, part in report["slices"].items() if name.startswith("city=")}
    assert set(cities) >= {"city=a", "city=b"} and sum(cities.values()) == report["slices"]["all"]["rows"]
    assert "brand=missing" in report["slices"] and report["slices"]["bought"]["rows"] > 0
    run = open_run(config(folder), CPU)
    assert run.ranking.task_names == ("bought",)
    tables = set(run.sharded.tables)
    assert tables >= {
        "t_feature_device",
        "t_feature_tags",
        "t_history_feature_history_brand",
        "t_item_known",
    }
    batch = next(iter(run.read("train")))
    loss, _ = run.ranking.module(batch)
    loss.backward()
    unused = [name for name, p in run.ranking.module.model.named_parameters() if p.grad is None]
    assert not [name for name in unused if "weight" in name and "embedding" not in name], unused


def test_weights_of_labels_and_examples_count_in_the_loss() -> None:
    sizes = LogSizes(20, 2, ("a",), labels=("bought",), label_weights=(1.0, 3.0))
    torch.manual_seed(0)
    ranking = build_ranking(RankingConfig("none", dim=8, heads=2, history_length=0), sizes)

    class Batch:
        dense = torch.randn(4, 1)
        labels = torch.tensor([[1.0, 0], [0, 0], [1, 1], [0, 1]])
        weights = torch.tensor([1.0, 2, 0.5, 0])
        segment = torch.zeros(4, dtype=torch.int64)
        features = None
        rows: dict = {}

    loss, output = ranking.module(Batch())
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        output.logits, Batch.labels, reduction="none"
    )
    weights = Batch.weights[:, None] * torch.tensor([1.0, 3.0])
    torch.testing.assert_close(loss.detach(), (each * weights).sum() / weights.sum())


def test_features_leave_for_serving(folder: Path, tmp_path: Path) -> None:
    run = open_run(config(folder, slices=()), CPU)
    ranking = run.ranking
    settings = config(folder, slices=())
    fresh = build_run(settings, run.log, open_stores(settings, run.log))
    request = to_request(next(iter(run.read("test"))))
    limits = {name: 5 for name in request.features if name.startswith("history")}
    report = export_model(
        fresh.module.model, request, tmp_path / "served", ExportOptions(), max_lengths=limits
    )
    assert report.difference <= 1e-5 and ranking.fields == fresh.fields
    served = ServedModel.load(tmp_path / "served")
    torch.testing.assert_close(served(request), report.outputs)


def test_shared_tables_are_one_table_and_unequal_ones_are_refused() -> None:
    two = (TableInput("a", "both", 5, 8), TableInput("b", "both", 5, 8))
    fields = FeatureFields(two, (VectorInput("v", 3),), 8, 0.05)
    assert list(find_tables(fields)) == ["t_feature_both"] and fields.fields == 3
    with pytest.raises(SidError, match="table 'both'"):
        FeatureFields((two[0], TableInput("b", "both", 6, 8)), (), 8, 0.05)
    assert FeatureInputs(two, (VectorInput("v", 3),)).keys == ("a", "b", "v")


@pytest.mark.parametrize(
    ("features", "slices", "message"),
    [
        ({"history": {"tags": {"multi": True}}}, (), "features.history.tags: several values per event"),
        ({"item": {"tags": {"multi": True}}}, ("tags",), "slices: 'tags'"),
        ({"context": {"device": {"hash_rows": 10}}}, ("device",), "slices: 'device' is hashed"),
    ],
)
def test_what_no_model_reads_is_named(folder: Path, features, slices, message: str) -> None:
    (folder / "other.yaml").write_text(yaml.safe_dump({"features": features}))
    Specification.read(folder / "other.yaml")
    settings = config(folder, slices=slices, output=str(folder / "other"))
    with pytest.raises(SidError, match=message):
        train(replace(settings, specification=str(folder / "other.yaml")), CPU)
