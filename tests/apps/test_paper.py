"""The papers' tables: complete recipes, and the command on a small log."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

import apps.recipes
from apps.paper import PaperConfig, paper
from apps.recipes import TABLES
from apps.report import terminal_table
from apps.rows import Comparison, Row
from apps.saved_tables import load_table
from tests.logs import small_log
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.errors import SidError
from torchrec_sid.learn import SidRecipe, learn_sids
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.models.channels import arm_named
from torchrec_sid.quantizers import (
    DiscretePcaConfig,
    ResidualKMeansConfig,
    RqVaeConfig,
    VqFusionConfig,
)
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import PieceTrainerConfig


@pytest.mark.parametrize("name", TABLES)
def test_every_row_names_the_sids_that_its_arm_reads(name: str) -> None:
    table = TABLES[name](4000)
    for row in table.rows:
        arm = arm_named(row.model.arm)
        assert (row.tables is not None) == ("catalog" in arm.requires), row
        assert (row.side is not None) == ("side_catalog" in arm.requires), row
        if row.tables is not None:
            assert (table.sids[row.tables].pieces is not None) >= ("pieces" in arm.requires), row
        if row.side is not None:
            assert row.side in table.sids


def test_the_tables_at_equal_rows_differ_in_nothing_but_the_arm() -> None:
    rows = {row.name: row.model for row in TABLES["1"](4000).rows}
    for size in (250, 1000, 4000):
        models = [rows[f"{arm} {size} with history"] for arm in ("random_hash", "hashed_prefix", "bigram")]
        assert {model.table_rows for model in models} == {size}
        assert len({RankingConfig(**{**vars(m), "arm": "none"}) for m in models}) == 1


def test_only_the_chosen_rows_and_their_references_are_trained() -> None:
    table = TABLES["2-bare"](4000)
    names = [row.name for row in table.chosen(("dense", "rq_vae")).rows]
    assert names == ["full_id", "+ rq_vae 3 bytes", "+ dense", "+ dense of every source"]
    with pytest.raises(SidError, match="'nope'.*full_id"):
        table.chosen(("nope",))
    with pytest.raises(SidError, match="Name each row once"):
        Comparison("twice", (Row("a", RankingConfig()), Row("a", RankingConfig())))


@pytest.mark.parametrize(
    "quantizer",
    [
        ResidualKMeansConfig((8, 8)),
        DiscretePcaConfig.trits(10),
        RqVaeConfig(cardinalities=(8, 8), epochs=1),
        VqFusionConfig(codebooks=(8,), stages=((5, 3),), epochs=1, hidden=(16,)),
    ],
    ids=lambda config: type(config).__name__,
)
def test_sids_are_learned_once(quantizer, tmp_path: Path) -> None:
    log = small_log(tmp_path)
    pieces = PieceTrainerConfig(20, model="bpe") if isinstance(quantizer, ResidualKMeansConfig) else None
    recipe = SidRecipe(quantizer, categories=("category",), pieces=pieces)
    learned = learn_sids(recipe, tmp_path / "log", log, tmp_path / "sids")
    catalog = SidCatalog.open(learned.catalog)
    assert len(catalog) == log.items and catalog.fingerprint == learned.fingerprint
    assert (learned.pieces is not None) == (pieces is not None)
    written = learned.quantizer.stat().st_mtime_ns
    again = learn_sids(recipe, tmp_path / "log", log, tmp_path / "sids")
    assert again == learned and learned.quantizer.stat().st_mtime_ns == written


def test_a_table_is_trained_once_and_says_what_was_found(tmp_path: Path, monkeypatch) -> None:
    small_log(tmp_path)

    def two_ways(items: int) -> Comparison:
        model = RankingConfig(arm="full_id+side", dim=16, history_length=10, table_rows=100)
        sids = {"side": SidRecipe(VqFusionConfig(codebooks=(), stages=((5, 3),), epochs=1, hidden=(16,)))}
        rows = (Row("none", RankingConfig(arm="none"), bare=True), Row("+ side", model, side="side"))
        return Comparison("two ways", rows, sids, none="none", training={"dense_lr": 1e-3})

    monkeypatch.setitem(apps.recipes.TABLES, "small", two_ways)
    config = PaperConfig(
        data=str(tmp_path / "log"),
        table="small",
        output=str(tmp_path / "out"),
        seeds=2,
        jobs=1,
        max_steps=4,
        save=str(tmp_path / "tables"),
    )
    report = paper(config, Console(quiet=True))
    none, side = report["rows"]
    assert none["gain"] == 0 and none["bytes_per_event"] == 0 and none["lookups_per_item"] == 0
    assert side["gain"] == pytest.approx(
        100
        * sum(
            1 - a["slices"]["all"]["ne"] / b["slices"]["all"]["ne"]
            for a, b in zip(*(map(_metrics, row["runs"]) for row in (side, none)), strict=True)
        )
        / 2
    )
    assert side["bytes_per_event"] == 8 + 1 and side["table_rows"] == 2000
    events = PreparedLog.open(tmp_path / "prepared").manifest["history_events"]
    assert side["added_mb"] == pytest.approx((9 * events + 2000 * 16 * 4) / 1e6)
    assert side["gain_per_mb"] == pytest.approx(side["gain"] / side["added_mb"])
    assert none["added_mb"] == 0 and none["gain_per_mb"] is None
    assert side["prediction_difference"] > 0
    # The intervals are about the numbers that TorchRec's metrics give.
    for piece, key in (("all", "gain"), ("cold", "gain_cold")):
        interval = side["intervals"]["gain"][piece]
        assert interval["estimate"] == pytest.approx(side[key], abs=1e-4)
        assert interval["low"] < interval["estimate"] < interval["high"]
        assert side[f"{key}_interval"] == [interval["low"], interval["high"]]
    assert side["intervals"]["ne"]["all"]["estimate"] == pytest.approx(side["ne"], abs=1e-6)
    assert side["cold_over_none"] == pytest.approx(side["gain_cold"], abs=1e-4)
    assert none["gain_interval"] == [0, 0] and none["gain_p"] == 1
    assert side["cold_over_features"] is None and none["cold_over_none"] == 0
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == report
    assert "+ side" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "plot.png").stat().st_size > 1000
    assert len(terminal_table(report).rows) == 2
    saved = load_table(tmp_path / "tables", "log-small")["rows"]
    assert [row["name"] for row in saved] == ["none", "+ side"] and saved[0]["seeds"] == 2
    assert saved[1]["gain_interval"] == side["gain_interval"]
    assert len({row["fingerprint"] for row in saved}) == 2
    run = Path(side["runs"][0])
    options = yaml.safe_load((run / "run.yaml").read_text())
    assert options["model"]["arm"] == "full_id+side" and options["dense_lr"] == 1e-3

    written = (run / "metrics.json").stat().st_mtime_ns
    assert paper(config, Console(quiet=True)) == report
    assert (run / "metrics.json").stat().st_mtime_ns == written, "a finished run was repeated"


def test_shuffled_sids_are_the_same_sids_of_other_items(tmp_path: Path) -> None:
    from torchrec_sid.training.run import open_stores
    from torchrec_sid.training.train_config import TrainConfig

    log = small_log(tmp_path)
    tables = learn_sids(SidRecipe(ResidualKMeansConfig((8, 8))), tmp_path / "log", log, tmp_path / "a")
    side = learn_sids(SidRecipe(DiscretePcaConfig.trits(10)), tmp_path / "log", log, tmp_path / "b")
    config = {
        "data": str(tmp_path / "log"),
        "output": "unused",
        "catalog": str(tables.catalog),
        "side_catalog": str(side.catalog),
        "side_quantizer": str(side.quantizer),
        "model": RankingConfig(arm="hashed_prefix+side"),
    }

    def values(**control: bool) -> dict[str, torch.Tensor]:
        stores = open_stores(TrainConfig(**config, **control), log)
        return {name: value for store in stores for name, value in store.values.items()}

    true, dealt, hidden = values(), values(shuffle_sids=True), values(hide_new=True)
    assert not torch.equal(true["sid"], dealt["sid"])
    assert torch.equal(true["sid"].sort().values, dealt["sid"].sort().values)
    assert not torch.equal(true["bytes"], dealt["bytes"])
    new = torch.from_numpy(log.item_train_events == 0)
    assert new.any() and (hidden["sid"][new] == -1).all()
    assert (SidSpec((3,) * 10).unpack_bytes(hidden["bytes"][new]) == 1).all()
    for name in ("sid", "bytes"):
        assert torch.equal(hidden[name][~new], true[name][~new])
    config["side_quantizer"] = str(tables.quantizer)
    with pytest.raises(SidError, match="did not make"):
        open_stores(TrainConfig(**config), log)
    config["side_quantizer"] = None
    with pytest.raises(SidError, match="--side_quantizer"):
        open_stores(TrainConfig(**config), log)


def _metrics(run: str) -> dict:
    return json.loads((Path(run) / "metrics.json").read_text())


def test_table_2_gives_every_way_the_same_tools() -> None:
    table = TABLES["2"](4000)
    rows = {row.name: row for row in table.rows}
    for name, row in rows.items():
        channels = set(row.model.arm.split("+"))
        compares = channels & {"cosine", "overlap", "side", "identity"}
        alone = name in ("+ dense", "+ prefix 2 bytes", "base", "no item", "base without ids")
        assert bool(compares) != alone, name
        assert row.bare == (name == "no item")
    chosen = [row.name for row in table.chosen(("+ side fused 1 byte",)).rows]
    assert {"no item", "base without ids", "base"} < set(chosen), "cold columns are read beside these"
    assert table.training["patience"] > 0 and len({str(row.training) for row in table.rows}) == 1
