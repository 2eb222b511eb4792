import threading
import time

import pytest
import torch

from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.parallel.checkpoint_files import FileRecord, list_checkpoints, require_visible

STATE = {"model": {"w": torch.arange(6.0)}}


def state(value=0.0):
    return {"model": {"w": torch.full((6,), value)}, "count": torch.tensor(int(value))}


def test_one_process_needs_no_process_group(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        assert manager.latest() is None
        manager.save(3, state(3), {"epoch": 1, "scores": {1: float("inf")}}, local={"x": torch.ones(2)})
        info = manager.latest()
        found = state()
        assert manager.load(info, found) == {"epoch": 1, "scores": {"1": float("inf")}}
        assert torch.equal(found["model"]["w"], torch.full((6,), 3.0))
        assert found["count"] == 3
        [local] = manager.load_local(info)
        assert torch.equal(local["x"], torch.ones(2))
    assert (info.step, info.world_size) == (3, 1)
    assert info.total_bytes == sum((info.path / name).stat().st_size for name in info.files)


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_are_kept(tmp_path, keep, left):
    with CheckpointManager(tmp_path, keep=keep) as manager:
        for step in range(1, 6):
            manager.save(step, state(step), {})
    assert [int(path.name.split("-")[-1]) for path in list_checkpoints(tmp_path)] == left


def test_the_newest_is_the_last_written_also_after_a_step_back(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(10, state(10), {})
        manager.save(4, state(4), {})
        manager.save(4, state(5), {"again": True})
        assert (manager.latest().step, manager.latest().metadata) == (4, {"again": True})


def test_leftovers_are_removed_and_strangers_left_alone(tmp_path):
    for name in (".writing-000009-step-9", ".deleted-000001-step-1", "notes", "000007-step-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    with CheckpointManager(tmp_path) as manager:
        assert manager.latest() is None
        manager.save(1, state(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000001-step-1", "000007-step-x", "notes"]


def test_part_of_a_checkpoint(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(
            1, {"model": {"w": torch.ones(2), "b": torch.ones(1)}, "optimizer": {"m": torch.ones(1)}}, {}
        )
        info = manager.latest()
        manager.load(info, {"model": {"w": torch.zeros(2), "b": torch.zeros(1)}})
        with pytest.raises(SidError, match="holds 1 entries that this state lacks, the first is model.b"):
            manager.load(info, {"model": {"w": torch.zeros(2)}})
        part = {"model": {"w": torch.zeros(2)}}
        manager.load(info, part, partial_state=True)
        assert torch.equal(part["model"]["w"], torch.ones(2))
        with pytest.raises(SidError, match="lacks 1 entries of this model, the first is model.c"):
            manager.load(info, {"model": {"c": torch.zeros(2)}}, partial_state=True)
        with pytest.raises(SidError, match="ize mismatch"):
            manager.load(info, {"model": {"w": torch.zeros(3), "b": torch.zeros(1)}})


def test_an_asynchronous_save_returns_before_it_is_complete_and_copies(tmp_path):
    live = {"model": {"w": torch.ones(200_000)}}
    with CheckpointManager(tmp_path, asynchronous=True) as manager:
        manager.save(1, live, {}, local={"x": live["model"]["w"]})
        live["model"]["w"].zero_()
        manager.save(2, live, {})  # waits for the first
        assert len(list_checkpoints(tmp_path)) >= 1
    first, second = list_checkpoints(tmp_path)
    with CheckpointManager(tmp_path) as manager:
        found = {"model": {"w": torch.full((200_000,), 7.0)}}
        manager.load(manager.latest(), found)
        assert not found["model"]["w"].any()
        assert second.name == "000002-step-2"
        # Only the newest is what latest() gives; the older is still whole.
        shard = next(first.glob("local-0.safetensors"))
        assert shard.stat().st_size > 800_000


def test_verification_can_be_left_out(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state(1), {}, local={"x": torch.ones(1)})
        info = manager.latest()
        # Of the same size, so that only the hash can tell.
        (info.path / "local-0.safetensors").write_bytes(b"x" * info.files["local-0.safetensors"].bytes)
        with pytest.raises(ArtifactError, match="do not match the manifest"):
            manager.load(manager.latest(), state())
        manager.load(manager.latest(), state(), verify=False)


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    with CheckpointManager(tmp_path, keep=1) as manager:
        manager.save(1, state(1), {})
        monkeypatch.setattr("torchrec_sid.parallel.checkpoint.prune", _busy)
        manager.save(2, state(2), {})
        assert manager.latest().step == 2
    assert "an old checkpoint could not be deleted (busy)" in caplog.text


def _busy(directory, keep):
    raise OSError("busy")


def test_files_of_other_ranks_must_become_visible(tmp_path):
    (tmp_path / "here").write_text("abc")
    records = {"here": FileRecord(3, ""), "late": FileRecord(2, "")}
    with pytest.raises(ArtifactError, match="late: was written by another rank and is not visible"):
        require_visible(tmp_path, records, timeout_seconds=0.2)

    def appear():
        time.sleep(0.2)
        (tmp_path / "late").write_text("xy")

    thread = threading.Thread(target=appear)
    thread.start()
    require_visible(tmp_path, records, timeout_seconds=120)
    thread.join()
