"""apps.plan as a user runs it, and the plan it writes under apps.train's model."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apps.plan import PlanConfig, main, measure_pieces, plan, plan_inputs, planner_for
from apps.plan_arms import PLAN_ARMS, build_arm
from apps.plan_compare import cost_of
from tests.logs import SPEC, random_sids, small_log
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.errors import SidError
from torchrec_sid.models.build import RankingConfig, build_ranking
from torchrec_sid.models.stores import SidStore
from torchrec_sid.parallel.constraints import model_num_poolings, model_pooling_factors
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.plan_file import check_plan, load_plan
from torchrec_sid.tables import PieceTrainerConfig, train_pieces
from torchrec_sid.training.run import log_sizes

ROOT = Path(__file__).resolve().parents[2]
LARGE = RankingConfig(dim=64, history_length=256, table_rows=50_000_000)
MODEL = RankingConfig(dim=16, history_length=20, table_rows=100)


def run(*arguments):
    """The command; its peak memory in GiB as the last line of the output."""
    code = (
        f"import resource, sys; from apps.plan import main; sys.argv[1:] = {list(arguments)!r}; main(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def test_128_gpus_and_a_billion_items_on_a_laptop(tmp_path):
    done = run(
        "--world-size", "128", "--items", "1000000000", "--output", str(tmp_path), "--model.arm", "full_id"
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 4
    report = json.loads((tmp_path / "report.json").read_text())
    summary = report["summary"]
    assert len(summary["ranks"]) == 128
    assert {table["rows"] for table in summary["tables"]} == {10**9}
    assert summary["step_time_ms"]["total"] > 0
    assert all(load["hbm_bytes"] < summary["hbm_capacity"] for load in summary["ranks"])
    assert f"{10**9:,}" in done.stdout
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "http" not in page.replace("http-equiv", "")
    rows = {(row["arm"], row["items"]): row for row in report["side_by_side"]}
    assert len(rows) == 16
    for items in (10**6, 10**7, 10**8, 10**9):
        assert rows["full_id", items]["table_bytes"] == 2 * items * 64 * 4
        assert rows["side", items]["table_bytes"] == rows["side", items]["wire_bytes_per_batch"] == 0
        assert rows["hashed_prefix", items]["table_rows"] == 10**8
    needed = [rows["full_id", items]["gpus"] for items in (10**6, 10**7, 10**8, 10**9)]
    assert needed == sorted(needed)
    # 2 x 238 GiB of fp32 rows do not fit four GPUs of 79.6 GiB.
    assert needed[-1] == 8
    # One sum of three rows travels for every event, with a length and two more ids.
    wire = {arm: rows[arm, 10**9]["wire_bytes_per_batch"] for arm in PLAN_ARMS}
    assert 1.0 < wire["hashed_prefix"] / wire["full_id"] < 1.1


def test_the_plan_fits_the_model_that_train_builds(tmp_path):
    log = small_log(tmp_path)
    SidCatalog.create(
        tmp_path / "catalog",
        SPEC,
        torch.tensor(log.item_ids),
        SPEC.unpack(random_sids(log.items)),
        "q",
    )
    for arm in ("full_id", "hashed_prefix"):
        model = replace(MODEL, arm=arm)
        config = PlanConfig(
            str(tmp_path / arm),
            world_size=2,
            device="cpu",
            model=model,
            prepared=str(tmp_path / "prepared"),
            catalog=str(tmp_path / "catalog"),
            compare_items=(),
        )
        report = plan(config)
        assert report["side_by_side"] == []
        module = build_ranking(model, log_sizes(log, model.dim), (SidStore(SPEC),)).module
        check_plan(load_plan(tmp_path / arm / "plan.json"), module, 2, "cpu")
        history = next(t for t in report["summary"]["tables"] if t["name"].startswith("t_history"))
        [rows], bags = history["pooling_factors"], history["num_poolings"]
        # A raw id is a row of its user's; an event of prefixes is a bag of three.
        assert (rows, 1 < bags[0] < 20) == (3.0, True) if bags else 1 < rows < 20
        assert bool(bags) == (arm == "hashed_prefix")
    text = (tmp_path / "full_id" / "plan.txt").read_text()
    assert "t_history" in text
    assert "over the wire" in text


def test_pieces_are_measured_in_a_model(tmp_path):
    packed = random_sids(500)
    catalog = SidCatalog.create(tmp_path / "catalog", SPEC, torch.arange(500), SPEC.unpack(packed), "q")
    pieces = train_pieces(SPEC, SPEC.unpack(packed), PieceTrainerConfig(vocab_size=60))
    pieces.save(tmp_path / "pieces.safetensors")
    vocabulary, per_item = measure_pieces(str(tmp_path / "pieces.safetensors"), catalog)
    assert vocabulary == len(pieces)
    assert 1 < per_item < 3
    options = {"pieces_model": str(tmp_path / "pieces.safetensors"), "catalog": str(tmp_path / "catalog")}
    inputs = plan_inputs(PlanConfig("unused", **options))
    assert (inputs.pieces, inputs.pieces_per_item) == (vocabulary, per_item)
    built = build_arm("sentencepiece", inputs, 500)
    factors = model_pooling_factors(built.module, built.feature_lengths)
    assert factors["t_history_piece"] == pytest.approx((per_item,))
    assert model_num_poolings(built.module, built.feature_lengths)["t_history_piece"] == (256,)
    assert factors["t_item_piece"] == pytest.approx((per_item,))
    with pytest.raises(SidError, match="Pass --catalog"):
        PlanConfig("unused", pieces_model="x")


def costs(arm="hashed_prefix", optimizer="rowwise_adagrad", items=10**6, **options):
    config = PlanConfig("unused", **{"world_size": 4, "model": LARGE, **options})
    return cost_of(arm, plan_inputs(config), items, planner_for(config), TableOptimizer(optimizer))


def test_every_option_changes_the_plan():
    base = costs()
    assert costs(model=replace(LARGE, dim=128)).table_bytes > base.table_bytes
    assert costs(model=replace(LARGE, table_rows=10**8)).table_bytes > base.table_bytes
    assert costs(cardinalities=(256,) * 6).wire_bytes_per_batch > base.wire_bytes_per_batch
    assert costs(mean_history=300.0).wire_bytes_per_batch > base.wire_bytes_per_batch
    assert costs(batch_size=4096).wire_bytes_per_batch > base.wire_bytes_per_batch
    assert costs(world_size=8).wire_bytes_per_batch > base.wire_bytes_per_batch
    assert costs(node="v100_32gb").step_ms > base.step_ms
    small = replace(LARGE, table_rows=10**6)
    assert costs(device="cpu", model=small).step_ms > costs(model=small).step_ms
    assert costs(optimizer="adam").planned_bytes > base.planned_bytes
    assert costs("full_id", items=10**7).table_bytes > costs("full_id").table_bytes
    pieces = costs("sentencepiece")
    # Each of the two tables has one row more, for the unknown item.
    assert costs("sentencepiece", pieces=20_000_000).table_rows == 2 * pieces.table_rows - 2
    assert costs("sentencepiece", pieces_per_item=4.0).wire_bytes_per_batch > pieces.wire_bytes_per_batch
    assert costs("side", side_digits=50).bytes_per_event == 2 * costs("side").bytes_per_event == 10


def test_tables_that_do_not_fit():
    cost = costs("full_id", items=10**9, world_size=1)
    assert (cost.planned_bytes, cost.wire_bytes_per_batch, cost.step_ms) == (None, None, None)
    assert cost.gpus == 8
    assert costs("full_id", items=10**9, model=replace(LARGE, dim=64 * 512)).gpus is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model.arm", "dense"), "Plan one of full_id, known_id, random_hash, hashed_prefix"),
        (("--items", "0"), "items: 0. It must be above 0."),
        (("--node", "h900"), "Presets are"),
        (("--planner", "/nowhere.yaml"), "/nowhere.yaml: no such file"),
    ],
)
def test_errors_end_the_command_with_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["plan", "--output", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert message in caught.value.code
    assert "\n" not in caught.value.code
    assert list(tmp_path.iterdir()) == []


def test_a_planner_file_is_followed_and_options_win(tmp_path):
    file = tmp_path / "planner.yaml"
    file.write_text(
        "topology: {world_size: 4, node: a100_80gb}\nbatch_size: 64\n"
        "tables: {t_item_prefix: {ranks: [2]}}\n"
    )
    config = PlanConfig(
        str(tmp_path / "a"),
        planner=str(file),
        model=MODEL,
        compare_items=(),
        node="h200_141gb",
        batch_size=128,
    )
    report = plan(config)
    item = next(table for table in report["summary"]["tables"] if table["name"] == "t_item_prefix")
    assert list(item["ranks"]) == [2]
    assert report["summary"]["world_size"] == 4
    assert report["planner"]["topology"]["node"] == "h200_141gb"
    assert report["planner"]["batch_size"] == 128
    assert planner_for(PlanConfig("unused")).topology.world_size == 8
