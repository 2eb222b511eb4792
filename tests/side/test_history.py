from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_sid import ArtifactError, SidError, SidSpec
from torchrec_sid.side import HistoryStore

SPEC = SidSpec((3,) * 12)


def events(n: int, seed: int = 0) -> torch.Tensor:
    return SPEC.pack_bytes(torch.randint(3, (n, 12), generator=torch.Generator().manual_seed(seed)))


@given(
    rounds=st.lists(st.dictionaries(st.integers(0, 6), st.integers(0, 5), max_size=5), max_size=3),
    wanted=st.lists(st.integers(0, 8), max_size=6),
    limit=st.one_of(st.none(), st.integers(0, 7)),
    horizon=st.one_of(st.none(), st.integers(0, 60)),
    compact=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_reads_what_a_dictionary_holds(
    tmp_path_factory, rounds, wanted, limit, horizon, compact, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    path = tmp_path_factory.mktemp("store") / "histories"
    store = HistoryStore.create(path, SPEC, actions=True, times=True)
    truth: dict[int, list[tuple]] = {}
    clock = 0
    for users in rounds:
        lengths = list(users.values())
        n = sum(lengths)
        sids, actions = events(n, seed + clock), torch.randint(9, (n,), generator=generator)
        times = torch.cat([torch.zeros(0, dtype=torch.int64)] + [clock + torch.arange(k) for k in lengths])
        clock += 10
        ids = torch.tensor(list(users), dtype=torch.int64)
        store = store.append(ids, torch.tensor(lengths, dtype=torch.int64), sids, actions, times)
        at = 0
        for user, k in users.items():
            rows = zip(
                sids[at : at + k].tolist(),
                actions[at : at + k].tolist(),
                times[at : at + k].tolist(),
                strict=True,
            )
            truth.setdefault(user, []).extend(rows)
            at += k
    assert store.generation == len(rounds)
    if compact and rounds:
        store = store.compact()
        assert len(list(path.glob("segment-*"))) == 1
    batch = store.read(
        wanted, limit=limit, before=None if horizon is None else torch.full((len(wanted),), horizon)
    )
    expected = []
    for user in wanted:
        rows = [row for row in truth.get(user, []) if horizon is None or row[2] < horizon]
        expected.append(rows if limit is None else rows[len(rows) - min(limit, len(rows)) :])
    assert batch.lengths.tolist() == [len(rows) for rows in expected]
    flat = [row for rows in expected for row in rows]
    assert batch.actions is not None
    assert batch.times is not None
    found = list(zip(batch.sids.tolist(), batch.actions.tolist(), batch.times.tolist(), strict=True))
    assert found == flat
    assert store.user_ids().tolist() == sorted(user for user, rows in truth.items() if rows)
    assert store.num_events == sum(map(len, truth.values()))


def test_bytes_on_disk_and_in_memory_are_the_bytes_of_the_events(tmp_path: Path) -> None:
    """Opening maps the file; a read makes one copy of the events asked for and keeps nothing else."""
    spec, users, length = SidSpec((3,) * 25), 400, 10_000
    sids = torch.randint(243, (users * length, 5), dtype=torch.uint8)
    store = HistoryStore.create(tmp_path / "s", spec).append(
        torch.arange(users), torch.full((users,), length), sids
    )
    size = sum(file.stat().st_size for file in (tmp_path / "s").iterdir())
    assert size <= users * length * 5 + users * 16 + 4096

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    store = HistoryStore.open(tmp_path / "s")
    before = anonymous()
    batch = store.read(torch.arange(0, 128, 2))
    assert batch.sids.shape == (64 * length, 5)
    assert anonymous() - before <= 64 * length * 5 + 2_000_000
    np.testing.assert_array_equal(batch.sids[:length], sids[:length])


def test_generations_and_catalog(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = HistoryStore.create(path, SPEC, catalog_fingerprint="a" * 64)
    store = store.append(torch.tensor([1]), torch.tensor([2]), events(2))
    later = store.append(torch.tensor([1, 2]), torch.tensor([1, 1]), events(2, 1))
    assert HistoryStore.open(path, generation=1, verify=True).read([1, 2]).lengths.tolist() == [2, 0]
    assert HistoryStore.open(path).read([1, 2]).lengths.tolist() == [3, 1]
    assert HistoryStore.open(path, catalog_fingerprint="a" * 64).generation == 2
    with pytest.raises(ArtifactError, match="catalog aaaaaaaaaaaa, not bbbbbbbbbbbb"):
        HistoryStore.open(path, catalog_fingerprint="b" * 64)
    with pytest.raises(ArtifactError, match="opened at 1"):
        store.append(torch.tensor([1]), torch.tensor([0]), events(0))
    assert later.compact().generation == 3
    with pytest.raises(ArtifactError, match=r"generation 1 of 3\.\.3"):
        HistoryStore.open(path, generation=1)
    with pytest.raises(SidError, match="a history store already"):
        HistoryStore.create(path, SPEC)


def test_bad_appends_and_reads_are_refused(tmp_path: Path) -> None:
    store = HistoryStore.create(tmp_path / "s", SPEC, actions=True, times=True)
    one, two = torch.tensor([1]), torch.tensor([2])
    actions, times = torch.tensor([0, 1]), torch.tensor([5, 6])
    store = store.append(one, two, events(2), actions, times)
    bad_bytes = events(2)
    bad_bytes[1, 0] = 250
    for args, message in [
        ((one, two, events(2), actions), "columns"),
        ((one, two, events(2).long(), actions, times), "sids: torch.int64"),
        ((one, two, bad_bytes, actions, times), "value 250 in column 0 of event 1"),
        ((one, torch.tensor([3]), events(2), actions, times), "sum 3 for 2 events"),
        ((torch.tensor([1, 1]), torch.tensor([1, 1]), events(2), actions, times), "a user twice"),
        ((one, two, events(2), actions + 255, times), "values 255..256"),
        ((one, two, events(2), actions, times[:1]), "times: shape"),
        ((one, two, events(2), actions, times.flip(0) + 9), "earlier than"),
        ((one, two, events(2), actions, times - 1), "earlier than"),
    ]:
        with pytest.raises(SidError, match=message):
            store.append(*args)
    assert HistoryStore.open(tmp_path / "s").generation == 1
    with pytest.raises(SidError, match="limit: -1"):
        store.read([1], limit=-1)
    plain = HistoryStore.create(tmp_path / "t", SPEC)
    with pytest.raises(SidError, match="keeps no times"):
        plain.read([1], before=torch.tensor([1]))


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(ArtifactError, match="not a history store"):
        HistoryStore.open(path)
    HistoryStore.create(path, SPEC).append(torch.tensor([1]), torch.tensor([2]), events(2))
    segment = next(path.glob("segment-*"))
    data = segment.read_bytes()
    segment.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="altered"):
        HistoryStore.open(path, verify=True)
    segment.write_bytes(data[:-3])
    with pytest.raises(ArtifactError, match="not a complete"):
        HistoryStore.open(path)
    segment.unlink()
    with pytest.raises(ArtifactError, match="no such file"):
        HistoryStore.open(path)
    manifest = path / "store.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(ArtifactError, match="version 9"):
        HistoryStore.open(path)
