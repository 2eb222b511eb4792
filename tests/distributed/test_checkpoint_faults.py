"""Each thing that can be wrong with a checkpoint ends in one message, the same on every rank."""

import json
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.launch import run_ranks
from tests.distributed.test_checkpoint_resharding import make
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.parallel.checkpoint import CheckpointManager
from torchrec_sid.parallel.checkpoint_files import list_checkpoints
from torchrec_sid.parallel.state import prepare_to_load, training_state

CATALOG = {"catalog": "a" * 64}
FREE = re.compile(r"[\d,]+ MiB")


def save_two(folder):
    state = training_state(*make("table_wise", "row_wise", "rowwise_adagrad", momentum=0.0))
    with CheckpointManager(folder, identity=CATALOG) as manager:
        for step in (1, 2):
            manager.save(step, state, {"step": step}, local={"x": torch.ones(3)})


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    run_ranks(save_two, 2, folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "checkpoints"))


def try_to_load(
    folder, identity, bags="table_wise", optimizer="rowwise_adagrad", momentum=0.0, prepare=True
):
    """The error that resuming gives on this rank, or the metadata."""
    model, combined = make(bags, "row_wise", optimizer, momentum=momentum)
    if prepare:
        prepare_to_load(combined)
    try:
        with CheckpointManager(folder, identity=identity) as manager:
            return manager.load(manager.latest(), training_state(model, combined))
    except SidError as error:
        return type(error).__name__, str(error)


def load_several(cases):
    return [try_to_load(*case) for case in cases]


def test_damaged_directories(good, tmp_path):
    def damaged(name, damage):
        copy = Path(shutil.copytree(good, tmp_path / name))
        damage(list_checkpoints(copy)[-1])
        return copy

    def flip(checkpoint):
        shard = checkpoint / "__1_0.distcp"
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)

    def cut(checkpoint):
        shard = checkpoint / "__0_0.distcp"
        shard.write_bytes(shard.read_bytes()[:-7])

    def edit(checkpoint):
        manifest = checkpoint / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))

    def newer(checkpoint):
        manifest = checkpoint / "manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 3}))

    faults = {
        "flipped bit": (flip, "__1_0.distcp: its contents do not match the manifest"),
        "truncated shard": (cut, "__0_0.distcp: has "),
        "missing rank": (lambda c: (c / "__1_0.distcp").unlink(), "__1_0.distcp: no such file"),
        "missing local state": (
            lambda c: (c / "local-1.safetensors").unlink(),
            "local-1.safetensors: no such",
        ),
        "edited manifest": (edit, "manifest.json: was altered"),
        "newer release": (newer, "Upgrade torchrec-sid."),
        "empty manifest": (
            lambda c: (c / "manifest.json").write_text(""),
            "manifest.json: is not a manifest",
        ),
        "no manifest": (lambda c: (c / "manifest.json").unlink(), "no manifest.json"),
    }
    cases = [(damaged(name, damage), CATALOG) for name, (damage, _) in faults.items()]
    first, second = run_ranks(load_several, 2, cases)
    assert first == second
    for (name, (_, message)), (kind, text) in zip(faults.items(), first, strict=True):
        assert kind == "ArtifactError", name
        assert message in text, name
        if "release" not in name and name != "no manifest":
            assert "or delete 000002-step-2 to resume from 000001-step-1." in text, name


def test_falling_back_as_the_message_says(folder):
    shutil.rmtree(folder / "000002-step-2")
    assert run_ranks(try_to_load, 2, folder, CATALOG) == [{"step": 1}] * 2


def test_another_run(good):
    cases = [
        (good, {"catalog": "b" * 64}),
        (good, {**CATALOG, "log": "c" * 64}),
        (good, CATALOG, "table_wise", "adagrad"),
        (good, CATALOG, "table_wise", "rowwise_adagrad", 0.9),
        (good, CATALOG, "table_wise", "sgd"),
    ]
    first, second = run_ranks(load_several, 2, cases)
    assert first == second
    messages = [text for _, text in first]
    assert "was trained with catalog aaaaaaaaaaaa, this run has catalog bbbbbbbbbbbb" in messages[0]
    assert "was trained with no log, this run has log cccccccccccc" in messages[1]
    assert "ize mismatch" in messages[2]
    assert "lacks" in messages[3]
    assert "momentum_buffer" in messages[3]
    assert "entries that this state lacks, the first is optimizer.state.ebc" in messages[4]


def load_with_longer_catalogs(folder):
    """What loading gives where the catalog continues the saved one, and where it does not."""
    found = []
    for lineage in (["a" * 64, "b" * 64], ["c" * 64, "b" * 64]):
        model, combined = make("table_wise", "row_wise", "rowwise_adagrad", momentum=0.0)
        prepare_to_load(combined)
        with CheckpointManager(
            folder, identity={"catalog": lineage[-1]}, accepts={"catalog": lineage.__contains__}
        ) as manager:
            try:
                found.append(manager.load(manager.latest(), training_state(model, combined)))
            except SidError as error:
                found.append(str(error))
    return found


def test_a_catalog_that_was_appended_to_is_accepted(good):
    (extended, another), second = run_ranks(load_with_longer_catalogs, 2, good)
    assert [extended, another] == second
    assert extended == {"step": 2}
    assert "this run has catalog bbbbbbbbbbbb" in another


def save_sharded(folder, bags, optimizer, momentum):
    model, combined = make(bags, "row_wise", optimizer, momentum=momentum)
    prepare_to_load(combined)
    with CheckpointManager(folder) as manager:
        manager.save(1, training_state(model, combined), {})


def test_what_torchrec_cannot_reshard_is_refused(tmp_path):
    run_ranks(save_sharded, 2, tmp_path / "columns", "column_wise", "rowwise_adagrad", 0.0)
    run_ranks(save_sharded, 2, tmp_path / "replicated", "data_parallel", "adagrad", 0.0)
    run_ranks(save_sharded, 2, tmp_path / "rows", "row_wise", "rowwise_adagrad", 0.0)
    cases = [
        (tmp_path / "columns", {}, "row_wise", "rowwise_adagrad"),
        (tmp_path / "replicated", {}, "row_wise", "adagrad"),
        (tmp_path / "rows", {}, "data_parallel", "rowwise_adagrad"),
        (tmp_path / "rows", {}, "column_wise", "rowwise_adagrad"),
    ]
    first, second = run_ranks(load_several, 2, cases)
    assert first == second
    for _, text in first:
        assert "Resume with" in text
        assert "sharding plan of the checkpoint: --plan takes its directory." in text
    assert "ize mismatch" in first[0][1]
    assert "lacks" in first[1][1]


def test_an_optimizer_without_state_is_not_silently_left_at_zero(tmp_path):
    run_ranks(save_sharded, 1, tmp_path, "row_wise", "sgd", 0.9)
    [(_, text)] = run_ranks(try_to_load, 1, tmp_path, {}, "row_wise", "sgd", 0.9, False)
    assert "momentum_buffer" in text
    assert "Call prepare_to_load(optimizer) first" in text


def save_where_rank_1_cannot(folder, limit):
    """Rank 1 may write no file above ``limit`` bytes, as on a full disk; then it may again."""
    state = training_state(*make("table_wise", "row_wise", "sgd", momentum=0.0))
    errors = []
    for asynchronous in (False, True):
        manager = CheckpointManager(folder, asynchronous=asynchronous)
        if dist.get_rank() == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            manager.save(3, state, {})
            manager.wait()
        except SidError as error:
            errors.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert manager.latest().step == (2 if not asynchronous else 3)
        manager.save(3, state, {})
        manager.close()
    return errors


def test_a_rank_that_cannot_write_loses_nothing(folder):
    first, second = run_ranks(save_where_rank_1_cannot, 2, folder, 64)
    assert len(first) == len(second) == 2
    # Each rank asks for the free space itself, a moment after the other.
    assert [FREE.sub("", text) for text in first] == [FREE.sub("", text) for text in second]
    for text in first:
        assert text.startswith(f"{folder}: rank 1: ")
        assert "MiB are free there" in text
        assert "checkpoints written before are untouched" in text
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["000003-step-3", "000004-step-3"]


def save_into(folder):
    try:
        CheckpointManager(folder).save(1, {"model": {"w": torch.ones(2)}}, {})
    except SidError as error:
        return str(error)


def test_a_directory_that_cannot_be_made(tmp_path):
    # A file in the way: permissions do not stop the super-user, who may run this.
    (tmp_path / "file").write_text("")
    first, second = run_ranks(save_into, 2, tmp_path / "file" / "checkpoints")
    assert first == second
    assert "Not a directory" in first
    assert "Free space, or choose another folder" in first


def save_bad_metadata(folder):
    with CheckpointManager(folder) as manager:
        try:
            manager.save(1, {"model": {"w": torch.ones(2)}}, {"x": object()})
        except SidError as error:
            return str(error), manager.latest()


def test_metadata_that_is_not_json(tmp_path):
    for text, latest in run_ranks(save_bad_metadata, 2, tmp_path):
        assert text.startswith("checkpoint metadata: Object of type object is not JSON serializable.")
        assert latest is None
    assert list(tmp_path.iterdir()) == []


def test_keep_is_checked(tmp_path):
    with pytest.raises(SidError, match="Keep at least 1"):
        CheckpointManager(tmp_path, keep=0)
    assert issubclass(ArtifactError, SidError)
