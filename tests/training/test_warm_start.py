"""A run on a longer log takes the rows of an earlier one by item, value and piece, on any processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from apps.train import train
from tests.distributed.launch import run_ranks
from tests.logs import SMALL
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.specification import Specification
from torchrec_sid.data.synthetic import write_synthetic
from torchrec_sid.errors import SidError
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.parallel.embedding_tables import local_shards
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import PieceTrainerConfig, train_pieces
from torchrec_sid.training.run import open_run, start_warm
from torchrec_sid.training.train_config import TrainConfig

CPU = torch.device("cpu")
ITEMS, OLD = SMALL.items, 700
SPEC = SidSpec((8, 8, 8))
SPECIFICATION = """
labels: {click: {column: label}}
features:
  item: {category: {}, subtopic: {kind: numeric, log: true}}
counters: {keys: [item]}
"""


def write_logs(folder: Path) -> None:
    """``longer``, and ``shorter``: its first events and items, in another order of the items."""
    write_synthetic(folder / "longer", SMALL)
    (folder / "features.yaml").write_text(SPECIFICATION)
    short = folder / "shorter"
    short.mkdir()
    order = np.random.default_rng(1).permutation(OLD)
    items = pq.read_table(folder / "longer" / "items.parquet")
    # Another order of popularity gives the categories another order.
    pq.write_table(items.take(order), short / "items.parquet")
    np.save(short / "item_emb.npy", np.load(folder / "longer" / "item_emb.npy")[order])
    events = pq.read_table(folder / "longer" / "events.parquet")
    old = events.column("item").to_numpy() < items.column("item_id").to_numpy()[OLD]
    kept = events.take(np.flatnonzero(old)[: int(old.sum()) // 2])
    pq.write_table(kept, short / "events.parquet")
    ids = torch.from_numpy(items.column("item_id").to_numpy())
    codes = torch.randint(0, 8, (ITEMS, 3), generator=torch.Generator().manual_seed(7))
    SidCatalog.create(folder / "catalog", SPEC, ids, codes, "q")
    for name, chosen in (("old", codes[:OLD]), ("new", codes)):
        pieces = train_pieces(SPEC, chosen, PieceTrainerConfig(vocab_size=60 if name == "old" else 70))
        pieces.save(folder / f"pieces-{name}.safetensors")


def config(folder: Path, log: str, arm: str, **changes) -> TrainConfig:
    base = TrainConfig(
        str(folder / log),
        str(folder / f"{log}-{arm}"),
        specification=str(folder / "features.yaml"),
        catalog=str(folder / "catalog"),
        pieces=str(folder / f"pieces-{'old' if log == 'shorter' else 'new'}.safetensors"),
        model=RankingConfig(arm, dim=8, heads=2, history_length=8, table_rows=64),
        batch_size=256,
        max_steps=8,
        dense_lr=1e-2,
    )
    return replace(base, **changes)


def whole(run) -> dict[str, np.ndarray]:
    """Every entry of the state that is a table or a state of its optimizer, gathered over the ranks."""
    state = {f"model.{k}": v for k, v in run.sharded.model.state_dict().items()}
    for name, entries in run.loop.optimizer.state_dict()["state"].items():
        state |= {f"{name}.{k}": v for k, v in entries.items() if torch.is_tensor(v) or hasattr(v, "size")}
    tables = {name: value for name, value in state.items() if ".t_" in name and len(value.size()) == 2}
    # A rank without a shard of a table has no entry of it.
    sizes: list = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, {name: tuple(value.size()) for name, value in tables.items()})
    out = {}
    for name, size in sorted({name: size for part in sizes for name, size in part.items()}.items()):
        full, count = torch.zeros(size), torch.zeros(size)
        for shard in local_shards(tables[name]) if name in tables else ():
            rows, columns = shard.tensor.shape
            at = (slice(shard.row, shard.row + rows), slice(shard.column, shard.column + columns))
            full[at], count[at] = shard.tensor, 1
        dist.all_reduce(full)
        dist.all_reduce(count)
        # As numpy: tensors would travel as files that end with their process.
        out[name.removeprefix("model.")] = (full / count).numpy()
    return out


def trained(folder: Path, arm: str) -> dict[str, np.ndarray]:
    run = open_run(config(folder, "shorter", arm), CPU)
    run.loop.resume()
    return whole(run)


def started(folder: Path, arm: str, changes: dict) -> tuple[dict[str, np.ndarray], ...]:
    earlier = str(folder / f"shorter-{arm}")
    run = open_run(config(folder, "longer", arm, init_from=earlier, **changes), CPU)
    cold = whole(run)
    taken = start_warm(run)
    return whole(run), cold, taken


def train_short(folder: Path, arm: str) -> None:
    train(config(folder, "shorter", arm), CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm")
    write_logs(folder)
    return folder


def rows_of(folder: Path, key: str) -> list:
    """What each row of a table stands for, in the shorter and in the longer log."""
    logs = [
        PreparedLog.open(folder / f"{name}-{ARM_OF[key]}" / "prepared") for name in ("shorter", "longer")
    ]
    if key == "items":
        return [log.item_ids.tolist() for log in logs]
    if key == "known":
        return [[*log.item_ids.tolist(), "nobody"] for log in logs]
    return [["missing", "unknown", *log.vocabulary("category").to_pylist()] for log in logs]


ARM_OF = {"items": "full_id", "known": "known_id+sentencepiece", "categories": "full_id"}


@pytest.mark.parametrize("worlds", [(1, 2), (2, 1)])
def test_rows_are_taken_by_what_they_stand_for(folder: Path, worlds: tuple[int, int]) -> None:
    run_ranks(train_short, worlds[0], folder, "full_id")
    before = run_ranks(trained, worlds[0], folder, "full_id")[0]
    after, cold, taken = run_ranks(started, worlds[1], folder, "full_id", {})[0]
    tables = [name for name in after if "t_item_id" in name or "t_history_id" in name]
    states = [name for name in tables if "momentum" in name or name.endswith(".sum")]
    assert len(states) == 2 and len(tables) == 4
    for key, names in (("items", tables), ("categories", [n for n in after if "t_feature_category" in n])):
        was, now = rows_of(folder, key)
        assert was != now[: len(was)] or key == "categories"
        place = {value: row for row, value in enumerate(was)}
        assert names
        for name in names:
            for row, value in enumerate(now):
                wanted = before[name][place[value]] if value in place else cold[name][row]
                assert np.array_equal(after[name][row], wanted), (name, value)
            assert np.abs(before[name]).sum() > 0
    grown = {key.rsplit(".", 2)[-2]: moves for key, moves in taken.grown.items()}
    assert grown["t_item_id"].taken == OLD and grown["t_item_id"].after == ITEMS
    assert not taken.drawn and not taken.fresh and not taken.left and taken.taken


def test_the_unknown_item_and_pieces_move(folder: Path) -> None:
    arm = "known_id+sentencepiece"
    run_ranks(train_short, 2, folder, arm)
    before = run_ranks(trained, 2, folder, arm)[0]
    after, _, taken = run_ranks(started, 2, folder, arm, {})[0]
    was, now = rows_of(folder, "known")
    for name in (n for n in after if "_known" in n):
        assert np.array_equal(after[name][len(now) - 1], before[name][len(was) - 1]), "the row of nobody"
        assert np.array_equal(after[name][now.index(was[3])], before[name][3])
    pieces = {key: moves for key, moves in taken.grown.items() if "t_item_piece" in key}
    assert len(pieces) == 1
    ((key, moves),) = pieces.items()
    assert moves.before == 61 and moves.after == 71 and moves.taken > 10
    for source, target, rows in moves.runs:
        assert np.array_equal(after[key][target : target + rows], before[key][source : source + rows])
    assert np.array_equal(after[key][70], before[key][60]), "the row of items without a SID"


def test_training_says_what_it_took_and_then_resumes_its_own(folder: Path, tmp_path: Path) -> None:
    run_ranks(train_short, 1, folder, "none")
    changes = {"output": str(tmp_path / "out"), "init_from": str(folder / "shorter-none")}
    warm = config(folder, "longer", "none", **changes)
    first = run_ranks(train, 1, warm, CPU)[0]
    said = json.loads((tmp_path / "out" / "init.json").read_text())
    assert said["taken"] and not said["left"] and not said["drawn"]
    # The categories of the longer log come after those of the shorter one, none of which is new here.
    assert all(moves["drawn"] == 0 for moves in said["grown"].values())
    cold = run_ranks(train, 1, replace(warm, output=str(tmp_path / "cold"), init_from=None), CPU)[0]
    assert cold["slices"]["all"]["ne"] != first["slices"]["all"]["ne"]
    # Started again it resumes from its own checkpoint, not from the other run.
    again = run_ranks(train, 1, replace(warm, max_steps=10), CPU)[0]
    assert again["steps"] == 10
    assert json.loads((tmp_path / "out" / "init.json").read_text()) == said


def test_weights_of_another_shape_and_what_is_missing_are_named(folder: Path, tmp_path: Path) -> None:
    if not (folder / "shorter-full_id" / "checkpoints").is_dir():
        run_ranks(train_short, 1, folder, "full_id")
    wider = replace(config(folder, "longer", "full_id").model, over_layers=(32, 64))
    _, _, taken = run_ranks(started, 1, folder, "full_id", {"model": wider})[0]
    assert any("tasks.0" in name for name in taken.drawn) and not taken.left
    with pytest.raises(AssertionError, match="Pass a run directory"):
        run_ranks(train, 1, config(folder, "longer", "full_id", init_from=str(tmp_path)), CPU)
    same = str(folder / "shorter-full_id" / "prepared")
    with pytest.raises(AssertionError, match="is the log that this one extends"):
        run_ranks(started, 1, folder, "full_id", {"prepared": same})


def test_scales_stay_and_values_come_after_the_earlier_ones(folder: Path, tmp_path: Path) -> None:
    from torchrec_sid.data.prepare import prepare

    spec = Specification.read(folder / "features.yaml")
    short = prepare(folder / "shorter", tmp_path / "short", specification=spec)
    long = prepare(folder / "longer", tmp_path / "long", specification=spec, extends=short)
    alone = prepare(folder / "longer", tmp_path / "alone", specification=spec)
    was, now = (log.vocabulary("category").to_pylist() for log in (short, long))
    assert now[: len(was)] == was and set(now) == set(alone.vocabulary("category").to_pylist())
    assert long.scales == short.scales != alone.scales
    assert long.fingerprint != alone.fingerprint
    with pytest.raises(SidError, match="extends"):
        from torchrec_sid.training.table_rows import check_scales

        check_scales(alone, short)


def test_a_damaged_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    run_ranks(train_short, 1, folder, "none")
    with CheckpointManager(folder / "shorter-none" / "checkpoints") as manager:
        info = manager.latest()
    file = next(path for path in info.path.iterdir() if path.name.startswith("__0"))
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        with pytest.raises(AssertionError, match="Restore it from a copy"):
            run_ranks(started, 1, folder, "none", {})
    finally:
        file.write_bytes(good)
