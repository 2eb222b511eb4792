"""SidCatalog: look-ups, appends that move nothing, and refusal of whatever does not fit."""

import json
import multiprocessing
import shutil
import uuid
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from tests.earlier import ARTEFACTS
from torchrec_sid.artifact import RemotePath, folder_lock, record_file, sealed, write_json
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.catalog import sid_catalog as store
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.spec import SidSpec

SPEC = SidSpec((8, 4, 4))
LONG = SidSpec((3,) * 50)
MARK = "ab" * 32


def random_codes(spec: SidSpec, rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(k, (rows,), generator=generator) for k in spec.cardinalities], dim=1)


def make(path: Path, ids: Tensor, spec: SidSpec = SPEC, seed: int = 0) -> tuple[SidCatalog, Tensor]:
    codes = random_codes(spec, len(ids), seed)
    return SidCatalog.create(path, spec, ids, codes, MARK), codes


@given(st.sets(st.integers(-(2**62), 2**62), min_size=1, max_size=40), st.integers(1, 50))
def test_lookup_equals_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, ids: set[int], part_items: int
) -> None:
    path = tmp_path_factory.mktemp("catalog")
    order = torch.tensor(list(ids))
    codes = random_codes(SPEC, len(order))
    catalog = SidCatalog.create(path, SPEC, order, codes, MARK, part_items=part_items)
    assert len(catalog) == len(ids) and len(catalog.parts) == -(-len(ids) // part_items)
    assert torch.equal(catalog.lookup(order), SPEC.pack(codes))
    assert torch.equal(catalog.codes(order.flip(0)), codes.flip(0))
    assert torch.equal(catalog.packed_bytes(order), SPEC.pack_bytes(codes))
    assert catalog.item_ids().tolist() == sorted(ids)
    strangers = torch.tensor([i for i in (5, -3, 2**62 + 1) if i not in ids], dtype=torch.int64)
    assert catalog.lookup(strangers, unknown=-7).tolist() == [-7] * len(strangers)


@pytest.mark.parametrize("ids", [torch.arange(100), torch.arange(5, 900, 9)])
def test_dense_and_sparse_ids_read_the_same_from_numpy_and_torch(tmp_path: Path, ids: Tensor) -> None:
    catalog, codes = make(tmp_path / "c", ids)
    rows = torch.tensor([7, 7, 0, 99])
    assert torch.equal(catalog.lookup(ids[rows]), SPEC.pack(codes[rows]))
    assert torch.equal(catalog.lookup(ids[rows].numpy().astype(np.int32)), SPEC.pack(codes[rows]))
    assert catalog.contains(torch.tensor([int(ids[3]), int(ids[-1]) + 1])).tolist() == [True, False]
    assert catalog.lookup(torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_long_sids_are_bytes(tmp_path: Path) -> None:
    ids = torch.tensor([30, 10, 20])
    catalog, codes = make(tmp_path / "c", ids, LONG)
    assert torch.equal(catalog.codes(ids), codes)
    assert torch.equal(catalog.packed_bytes(ids), LONG.pack_bytes(codes))
    with pytest.raises(SidError, match="packed_bytes"):
        catalog.lookup(ids)


def test_an_append_moves_nothing_and_is_the_next_generation(tmp_path: Path) -> None:
    ids = torch.arange(0, 100, 2)
    first, codes = make(tmp_path / "c", ids)
    new = torch.arange(1, 100, 2)
    second = first.append(new, random_codes(SPEC, 50, 1), MARK)
    assert (first.generation, second.generation) == (1, 2)
    assert torch.equal(second.lookup(ids), SPEC.pack(codes)), "published SIDs stay"
    assert torch.equal(second.codes(new), random_codes(SPEC, 50, 1))
    assert len(first) == 50 and torch.equal(first.lookup(ids), SPEC.pack(codes)), (
        "an old reader is not disturbed"
    )
    assert second.extends(first.fingerprint) and not first.extends(second.fingerprint)
    assert second.fingerprint != first.fingerprint
    again = SidCatalog.open(tmp_path / "c", generation=1)
    assert again.fingerprint == first.fingerprint and not bool(again.contains(new).any())
    with pytest.raises(ArtifactError, match="generation 3"):
        SidCatalog.open(tmp_path / "c", generation=3)
    with pytest.raises(ArtifactError, match="not its newest"):
        first.append(torch.tensor([1000]), random_codes(SPEC, 1), MARK)


def test_append_refuses_another_quantizer_published_ids_and_nothing(tmp_path: Path) -> None:
    catalog, _ = make(tmp_path / "c", torch.arange(10))
    one = random_codes(SPEC, 1)
    with pytest.raises(ArtifactError, match="made by quantizer abab"):
        catalog.append(torch.tensor([10]), one, "cd" * 32)
    with pytest.raises(SidError, match="item id 9 is in the catalog already"):
        catalog.append(torch.tensor([9]), one, MARK)
    with pytest.raises(SidError, match="no items"):
        catalog.append(torch.empty(0, dtype=torch.int64), one[:0], MARK)
    assert SidCatalog.open(tmp_path / "c").generation == 1
    assert len(list((tmp_path / "c").glob("part-*"))) == 1, "a refused append leaves no file"


def test_create_streams_pairs_and_refuses_duplicates_across_parts(tmp_path: Path) -> None:
    codes = random_codes(SPEC, 1000)

    def pairs(ids: Tensor):
        for begin in range(0, 1000, 70):
            yield ids[begin : begin + 70], codes[begin : begin + 70]

    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    catalog = SidCatalog.create(
        tmp_path / "c", SPEC, pairs(ids), quantizer_fingerprint=MARK, part_items=256
    )
    assert [p.info.items for p in catalog.parts] == [256 // 70 * 70] * 4 + [160]
    assert torch.equal(catalog.codes(ids), codes)
    rows = list(catalog.batches(100))
    assert sorted(torch.cat([r.item_ids for r in rows]).tolist()) == list(range(1000))
    assert all(torch.equal(catalog.codes(r.item_ids), r.codes) for r in rows)
    ids[999] = ids[0]
    with pytest.raises(SidError, match=f"item id {int(ids[0])} is in the catalog already"):
        SidCatalog.create(tmp_path / "d", SPEC, pairs(ids), quantizer_fingerprint=MARK, part_items=256)
    assert not list((tmp_path / "d").glob("*")), "a failed create leaves nothing"


@pytest.mark.parametrize(
    ("ids", "codes", "words"),
    [
        (torch.tensor([1, 2, 1]), random_codes(SPEC, 3), "item id 1 occurs twice"),
        (torch.tensor([1.0, 2.0]), random_codes(SPEC, 2), "integers"),
        (torch.tensor([[1, 2]]), random_codes(SPEC, 2), "integers"),
        (torch.tensor([1, 2]), random_codes(SPEC, 3), "3 rows for 2 item ids"),
        (torch.tensor([1, 2]), torch.tensor([[0, 0, 0], [0, 4, 0]]), "row 1, level 2"),
        (torch.tensor([1]), None, "Pass codes"),
        (torch.empty(0, dtype=torch.int64), random_codes(SPEC, 0), "no items"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, ids: Tensor, codes: Tensor | None, words: str) -> None:
    with pytest.raises(SidError, match=words):
        SidCatalog.create(tmp_path / "c", SPEC, ids, codes, MARK)
    with pytest.raises(ArtifactError, match="no manifest"):
        SidCatalog.open(tmp_path / "c")


def test_unknown_ids_are_named(tmp_path: Path) -> None:
    catalog, _ = make(tmp_path / "c", torch.arange(10))
    with pytest.raises(SidError, match=r"no item id 44 \(2 of 3 ids are unknown\)"):
        catalog.lookup(torch.tensor([3, 44, 55]))
    with pytest.raises(SidError, match="no item id 44"):
        catalog.codes(torch.tensor([44]))
    assert catalog.lookup(torch.tensor([3, 44]), unknown=-1).tolist()[1] == -1


def test_overwrite_must_be_asked_for_and_needs_a_fingerprint(tmp_path: Path) -> None:
    first, _ = make(tmp_path / "c", torch.arange(10))
    with pytest.raises(ArtifactError, match="overwrite=True"):
        make(tmp_path / "c", torch.arange(5))
    second = SidCatalog.create(
        tmp_path / "c", SPEC, torch.arange(5), random_codes(SPEC, 5), MARK, overwrite=True
    )
    assert len(second) == 5 and second.fingerprint != first.fingerprint
    assert len(list((tmp_path / "c").glob("part-*"))) == 1
    with pytest.raises(SidError, match="quantizer.fingerprint"):
        SidCatalog.create(tmp_path / "d", SPEC, torch.arange(5), random_codes(SPEC, 5))


def test_a_failed_overwrite_leaves_the_old_catalog(tmp_path: Path) -> None:
    first, codes = make(tmp_path / "c", torch.arange(10))
    with pytest.raises(SidError, match="occurs twice"):
        SidCatalog.create(
            tmp_path / "c", SPEC, torch.zeros(2, dtype=torch.int64), codes[:2], MARK, overwrite=True
        )
    assert SidCatalog.open(tmp_path / "c").fingerprint == first.fingerprint


def test_the_fingerprint_names_the_content(tmp_path: Path) -> None:
    ids = torch.arange(10)
    a, _ = make(tmp_path / "a", ids)
    b, _ = make(tmp_path / "b", ids)
    other_codes, _ = make(tmp_path / "c", ids, seed=1)
    codes = random_codes(SPEC, 10)
    other_quantizer = SidCatalog.create(tmp_path / "d", SPEC, ids, codes, "cd" * 32)
    wider = SidCatalog.create(
        tmp_path / "e", SidSpec((8, 4, 3 + 1, 2)), ids, torch.cat([codes, codes[:, :1] % 2], 1), MARK
    )
    assert a.fingerprint == b.fingerprint
    assert len({c.fingerprint for c in (a, other_codes, other_quantizer, wider)}) == 4
    shuffled = ids[torch.randperm(10, generator=torch.Generator().manual_seed(1))]
    e = SidCatalog.create(tmp_path / "f", SPEC, shuffled, codes[shuffled], MARK)
    assert e.fingerprint == a.fingerprint, "the order of the rows does not matter"


def damage(path: Path, how: str) -> None:
    part = next(path.glob("part-*"))
    data = bytearray(part.read_bytes())
    if how == "cut":
        part.write_bytes(data[:-1])
    elif how == "flipped":
        data[-5] ^= 1
        part.write_bytes(data)
    elif how == "gone":
        part.unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [("cut", "the manifest says"), ("flipped", "do not match the manifest"), ("gone", "no such file")],
)
def test_damaged_parts_are_refused(tmp_path: Path, how: str, words: str) -> None:
    make(tmp_path / "c", torch.arange(10))
    copy = shutil.copytree(tmp_path / "c", tmp_path / "copy")
    damage(copy, how)
    with pytest.raises(ArtifactError, match=words):
        SidCatalog.open(copy)
    if how == "cut":
        with pytest.raises(ArtifactError, match=words):
            SidCatalog.open(copy, verify=False)


def edited(body: dict, **fields: object) -> dict:
    return {**body, **fields}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda body: edited(body, kind="residual_kmeans"), "holds a 'residual_kmeans'"),
        (lambda body: edited(body, version=99), "layout version 99"),
        (lambda body: edited(body, config={**body["config"], "items": 9}), "was altered"),
        (lambda body: edited(body, more=1), "unknown 'more'"),
        (lambda body: {name: body[name] for name in body if name != "files"}, "lacks 'files'"),
        (lambda body: [], "not a manifest"),
        (lambda body: {}, "lacks 'kind'"),
    ],
)
def test_damaged_manifests_are_refused(tmp_path: Path, edit, words: str) -> None:
    make(tmp_path / "c", torch.arange(10))
    file = tmp_path / "c" / "manifest.json"
    write_json(file, edit(json.loads(file.read_text())))
    with pytest.raises(ArtifactError, match=words):
        SidCatalog.open(tmp_path / "c")


def test_a_truncated_manifest_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "c", torch.arange(10))
    file = tmp_path / "c" / "manifest.json"
    file.write_text(file.read_text()[:50])
    with pytest.raises(ArtifactError, match="not a manifest"):
        SidCatalog.open(tmp_path / "c")


def test_a_crash_before_the_manifest_leaves_the_old_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, codes = make(tmp_path / "c", torch.arange(10))

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(store, "publish", killed)
        with pytest.raises(Killed):
            catalog.append(torch.tensor([10]), random_codes(SPEC, 1), MARK)
    assert len(list((tmp_path / "c").glob("part-*"))) == 2, "the part of the killed append is still there"
    reopened = SidCatalog.open(tmp_path / "c")
    assert reopened.generation == 1 and torch.equal(reopened.codes(torch.arange(10)), codes)
    after = reopened.append(torch.tensor([10, 11]), random_codes(SPEC, 2), MARK)
    assert len(after) == 12 and len(list((tmp_path / "c").glob("part-*"))) == 2, (
        "and is dropped by the next one"
    )


def test_parts_are_memory_mapped(tmp_path: Path) -> None:
    rows = 2_000_000
    catalog = SidCatalog.create(
        tmp_path / "c", SPEC, torch.arange(rows), torch.zeros(rows, 3, dtype=torch.int64), MARK
    )

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    opened = [SidCatalog.open(tmp_path / "c", verify=False) for _ in range(8)]
    assert resident() - before < 8 * rows, "8 catalogs of 32 MB take less than 16 MB together"
    assert int(opened[0].lookup(torch.tensor([rows - 1]))) == 0
    assert len(catalog) == rows


@pytest.mark.parametrize("spec", [SPEC, LONG])
def test_parquet_export(tmp_path: Path, spec: SidSpec) -> None:
    ids = torch.tensor([5, 3, 9])
    catalog, codes = make(tmp_path / "c", ids, spec)
    catalog.to_parquet(tmp_path / "sids.parquet")
    table = pq.read_table(tmp_path / "sids.parquet")
    assert table.column("item_id").to_pylist() == [3, 5, 9]
    assert table.column("codes").to_pylist() == codes[[1, 0, 2]].tolist()
    if spec.fits_int64:
        assert table.column("sid").to_pylist() == spec.pack(codes[[1, 0, 2]]).tolist()
    else:
        assert [list(b) for b in table.column("sid").to_pylist()] == spec.pack_bytes(
            codes[[1, 0, 2]]
        ).tolist()
    assert table.schema.metadata[b"catalog_fingerprint"].decode() == catalog.fingerprint


def resealed(path: Path, edit) -> None:
    """Change the configuration of a manifest as an attacker would, who computes the seal anew."""
    file = path / "manifest.json"
    body = json.loads(file.read_text())
    edit(body)
    there = {entry.name for entry in path.iterdir()}
    files = {name: record_file(path, name)._asdict() for name in body["files"] if name in there}
    body = sealed.seal(body["kind"], body["version"], body["config"], {"files": files or body["files"]})
    file.write_text(sealed.to_text(body))


def swap_ends(body: dict) -> None:
    first, second = body["config"]["parts"]
    for end in ("first_id", "last_id"):
        first[end], second[end] = second[end], first[end]


def test_parts_with_each_others_ends_are_refused(tmp_path: Path) -> None:
    ids, codes = torch.arange(1000), random_codes(SPEC, 1000)
    SidCatalog.create(tmp_path / "c", SPEC, ids, codes, MARK, part_items=500)
    body = json.loads((tmp_path / "c" / "manifest.json").read_text())
    swap_ends(body)
    write_json(tmp_path / "c" / "manifest.json", body)
    with pytest.raises(ArtifactError, match="was altered"):
        SidCatalog.open(tmp_path / "c", verify=False)
    resealed(tmp_path / "c", lambda body: body["config"].update(items=1000))
    with pytest.raises(ArtifactError, match="goes from id 0 to 499, not 500 to 999"):
        SidCatalog.open(tmp_path / "c", verify=False)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.update(cardinalities=[8, 4]), "fingerprint does not fit"),
        (lambda c: c.update(quantizer_fingerprint="cd" * 32), "fingerprint does not fit"),
        (lambda c: c.update(items=11), "11 items"),
        (lambda c: c.update(generation=2), "generation 2"),
        (lambda c: c.update(parts=[]), "are not 1, 2, 3"),
        (lambda c: c["parts"][0].update(generation=2), "are not 1, 2, 3"),
        (lambda c: c["parts"][0].update(items=True), "parts[0].items"),
        (lambda c: c["parts"][0].update(last_id=8), "has 10 items from id 0 to 8"),
        (lambda c: c["parts"][0].update(file="../other.safetensors"), "its parts are not its files"),
        (lambda c: c.update(cardinalities=[1, 4, 4]), "cardinality 1"),
        (lambda c: c.update(cardinalities="844"), "cardinalities"),
        (lambda c: c.pop("items"), "no 'items'"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path, edit, words: str) -> None:
    make(tmp_path / "c", torch.arange(10))
    resealed(tmp_path / "c", lambda body: edit(body["config"]))
    with pytest.raises(ArtifactError) as error:
        SidCatalog.open(tmp_path / "c", verify=False)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"item_ids": torch.arange(10).flip(0)}, "goes from id 9 to 0"),
        ({"item_ids": torch.tensor([0, *range(8, 0, -1), 9])}, "do not ascend"),
        ({"item_ids": torch.arange(10, dtype=torch.int32)}, "item_ids is torch.int32"),
        ({"sids": torch.full((10,), 1 << 7)}, "more than 7 bits"),
        ({"sids": torch.full((10,), -1)}, "more than 7 bits"),
        ({"sids": torch.zeros(10, 1, dtype=torch.uint8)}, "sids is torch.uint8"),
        ({"sids": torch.zeros(9, dtype=torch.int64)}, "(9,)"),
        ({"more": torch.zeros(1)}, "['item_ids', 'more', 'sids']"),
    ],
)
def test_a_part_with_other_rows_is_refused_whatever_its_seal(tmp_path: Path, tensors, words: str) -> None:
    ids = torch.arange(10)
    make(tmp_path / "c", ids)
    part = next((tmp_path / "c").glob("part-*"))
    save_file({"item_ids": ids, "sids": torch.zeros(10, dtype=torch.int64), **tensors}, part)
    record = record_file(tmp_path / "c", part.name)

    def edit(body: dict) -> None:
        head = json.dumps(["sid_catalog", list(SPEC.cardinalities), MARK])
        body["config"]["fingerprint"] = sha256((head + record.sha256).encode()).hexdigest()

    resealed(tmp_path / "c", edit)
    with pytest.raises(ArtifactError) as error:
        SidCatalog.open(tmp_path / "c")
    assert words in str(error.value)


def test_every_byte_of_a_manifest_is_sealed(tmp_path: Path) -> None:
    make(tmp_path / "c", torch.arange(10))
    file = tmp_path / "c" / "manifest.json"
    good = file.read_bytes()
    for place in range(len(good)):
        for value in (good[place] ^ 1, ord(" "), ord("9")):
            if value != good[place]:
                file.write_bytes(good[:place] + bytes([value]) + good[place + 1 :])
                with pytest.raises(ArtifactError):
                    SidCatalog.open(tmp_path / "c", verify=False)
    for more in (b" ", b"\n", b"{}"):
        file.write_bytes(good + more)
        with pytest.raises(ArtifactError):
            SidCatalog.open(tmp_path / "c", verify=False)


def test_no_name_leads_out_and_no_link_is_followed(tmp_path: Path) -> None:
    make(tmp_path / "c", torch.arange(10))
    part = next((tmp_path / "c").glob("part-*"))
    part.rename(tmp_path / "aside")
    part.symlink_to(tmp_path / "aside")
    with pytest.raises(ArtifactError, match="symbolic link"):
        SidCatalog.open(tmp_path / "c")
    part.unlink()
    for name in ("../aside", str(tmp_path / "aside"), "a/../../aside", "..", "", "a\\b", "x\0"):

        def edit(body: dict, name: str = name) -> None:
            body["config"]["parts"][0]["file"] = name
            body["files"] = {name: next(iter(body["files"].values()))}

        resealed(tmp_path / "c", edit)
        with pytest.raises(ArtifactError, match="stay inside their folder|no such file"):
            SidCatalog.open(tmp_path / "c")


def test_a_catalog_lives_on_object_storage() -> None:
    path = f"memory://shop/{uuid.uuid4()}/catalog"
    ids = torch.arange(0, 40, 2)
    codes = random_codes(SPEC, 20)
    first = SidCatalog.create(path, SPEC, ids, codes, MARK, part_items=8)
    second = first.append(ids + 1, codes, MARK)
    opened = SidCatalog.open(path)
    assert opened.fingerprint == second.fingerprint and len(opened) == 40
    assert torch.equal(opened.codes(ids + 1), codes)
    assert torch.equal(SidCatalog.open(path, generation=1).codes(ids), codes)
    with pytest.raises(ArtifactError, match="holds a catalog already"):
        SidCatalog.create(path, SPEC, ids, codes, MARK)
    part = RemotePath(path) / opened.parts[0].info.file
    part.write_bytes(b"x" * part.size())
    with pytest.raises(ArtifactError, match="do not match the manifest"):
        SidCatalog.open(path)
    SidCatalog.create(path, SPEC, ids, codes, MARK, overwrite=True)
    assert len(list(RemotePath(path).iterdir())) == 2, "the old parts are gone"


def test_a_key_signs_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "plain", torch.arange(10))
    monkeypatch.setenv("TORCHREC_SID_KEY", "k" * 16)
    with pytest.raises(ArtifactError, match="is not signed"):
        SidCatalog.open(tmp_path / "plain")
    make(tmp_path / "c", torch.arange(10))
    damage(tmp_path / "c", "flipped")
    with pytest.raises(ArtifactError, match="do not match the manifest"):
        SidCatalog.open(tmp_path / "c", verify=False)
    monkeypatch.setenv("TORCHREC_SID_KEY", "other key, as long")
    with pytest.raises(ArtifactError, match="another key"):
        SidCatalog.open(tmp_path / "c")
    monkeypatch.setenv("TORCHREC_SID_KEY", "short")
    with pytest.raises(SidError, match="Give a random key"):
        SidCatalog.open(tmp_path / "c")
    monkeypatch.delenv("TORCHREC_SID_KEY")
    with pytest.raises(ArtifactError, match="do not match the manifest"):
        SidCatalog.open(tmp_path / "c")


def test_a_catalog_of_an_earlier_release_opens_and_grows(tmp_path: Path) -> None:
    copy = shutil.copytree(ARTEFACTS / "catalog", tmp_path / "catalog")
    ids = torch.arange(100, 140)
    codes = torch.stack([(ids * 5 + level) % k for level, k in enumerate(SPEC.cardinalities)], 1)
    old = SidCatalog.open(copy)
    assert old.generation == 2 and torch.equal(old.codes(ids), codes)
    assert old.fingerprint == json.loads((copy / "manifest.json").read_text())["fingerprint"]
    new = old.append(torch.tensor([7]), codes[:1], MARK)
    assert new.extends(old.fingerprint) and torch.equal(SidCatalog.open(copy).codes(ids), codes)
    assert SidCatalog.open(copy, generation=1).fingerprint == old.lineage[0]
    body = json.loads((ARTEFACTS / "catalog" / "manifest.json").read_text())
    for odd in ({}, {**body, "parts": 3}, {**body, "items": 7}, {**body, "parts": [{}]}):
        write_json(copy / "manifest.json", odd)
        with pytest.raises(ArtifactError):
            SidCatalog.open(copy)


def test_a_catalog_takes_the_place_of_a_damaged_one_and_of_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "c", torch.arange(10))
    (tmp_path / "c" / "manifest.json").write_text("{")
    codes = random_codes(SPEC, 5)
    assert len(SidCatalog.create(tmp_path / "c", SPEC, torch.arange(5), codes, MARK, overwrite=True)) == 5
    write_json(tmp_path / "c" / "manifest.json", {"kind": "checkpoint", "version": 1})
    with pytest.raises(SidError, match="not a catalog"):
        SidCatalog.create(tmp_path / "c", SPEC, torch.arange(5), codes, MARK, overwrite=True)


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    catalog, _ = make(tmp_path / "c", torch.arange(10))
    folder = tmp_path / "c"
    for name in (
        ".part-000001-0123456789abcdef.safetensors.abcdefgh",
        ".tmpAbc123",
        "part-mine.safetensors",
    ):
        (folder / name).write_text("x")
    (folder / ".part-000002-0123456789abcdef.safetensors.work-abc").mkdir()
    catalog.append(torch.tensor([10]), random_codes(SPEC, 1), MARK)
    names = {file.name for file in folder.iterdir()}
    assert len(names) == 4 and "part-mine.safetensors" in names


def test_an_append_needs_the_lock_and_names_its_holder(tmp_path: Path) -> None:
    catalog, _ = make(tmp_path / "c", torch.arange(10))
    context = multiprocessing.get_context("fork")
    with folder_lock(tmp_path / "c"):
        process = context.Process(
            target=catalog.append, args=(torch.tensor([10]), random_codes(SPEC, 1), MARK)
        )
        process.start()
        process.join(1)
        assert process.is_alive() and SidCatalog.open(tmp_path / "c").generation == 1
    process.join(60)
    assert SidCatalog.open(tmp_path / "c").generation == 2
