"""Public archives, generated in the layout of their sites, become logs that prepare."""

import gzip
import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from apps.convert import ConvertConfig, convert
from tests.data.test_ready_specifications import kuairand
from torchrec_sid.data.prepare import PrepareConfig, prepare
from torchrec_sid.data.schema import find_specification
from torchrec_sid.errors import SidError

MOVIES = ["Toy Story (1995)", "American President, The (1995)", "Associate, The (L'Associe)(1982)", "Plain"]


def _ml1m(folder: Path, users: int = 30) -> Path:
    random = np.random.default_rng(0)
    folder.mkdir()
    movies = [f"{10 + n}::{MOVIES[n % 4]}::Animation|Children's\n" for n in range(40)]
    (folder / "movies.dat").write_text("".join(movies), encoding="latin-1")
    people = [f"{n + 1}::{'MF'[n % 2]}::{(1, 56)[n % 2]}::{n % 7}::55117\n" for n in range(users)]
    (folder / "users.dat").write_text("".join(people))
    rated = [
        f"{n + 1}::{10 + item}::{random.integers(1, 6)}::{978_300_000 + int(random.integers(10**6))}\n"
        for n in range(users)
        for item in random.choice(40, size=20, replace=False)
    ]
    (folder / "ratings.dat").write_text("".join(rated))
    return folder


def _zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, f"ml-1m/{file.relative_to(folder)}")
    return path


def test_ml1m_is_the_first_users_with_labels_splits_and_held_out_items(tmp_path: Path) -> None:
    folder = _ml1m(tmp_path / "raw")
    found = convert(ConvertConfig("ml1m", str(_zipped(folder)), str(tmp_path / "log"), users=25))
    same = convert(ConvertConfig("ml1m", str(folder), str(tmp_path / "again"), users=25))
    assert {name: table.equals(same[name]) for name, table in found.items()} == dict.fromkeys(found, True)
    items, events = (
        pq.read_table(tmp_path / "log" / f"{name}.parquet").to_pylist() for name in ("items", "events")
    )
    assert [(i["title"], i["year"]) for i in items[:4]] == [
        ("Toy Story", 1995),
        ("The American President", 1995),
        ("Associate, The (L'Associe)", 1982),
        ("Plain", None),
    ]
    assert items[1]["text"] == "The American President (1995). Genres: Animation, Children's."
    assert len(events) == 25 * 20 and max(e["user"] for e in events) == 24 and len(found["users"]) == 30
    assert all(e["label"] == (e["rating"] >= 4) for e in events)
    keys = [(e["user"], e["ts"]) for e in events]
    assert keys == sorted(keys)
    shares = {s: [e["ts"] for e in events if e["split"] == s] for s in ("train", "valid", "test")}
    assert [len(times) for times in shares.values()] == [400, 50, 50]
    assert max(shares["train"]) < min(shares["valid"]) and max(shares["valid"]) < min(shares["test"])
    held = [i["cold_holdout"] for i in items]
    assert set(held) <= {0, 1, 2} and held.count(0) > 25
    # The items that are held out do not depend on which others there are.
    assert {i["raw_id"]: i["cold_holdout"] for i in items}["12"] == held[2]
    log = prepare(
        tmp_path / "log",
        tmp_path / "prepared",
        PrepareConfig(),
        specification=find_specification(tmp_path / "log", "ml1m"),
    )
    assert log.items == 40 and {"genres", "gender"} <= {f.name for f in log.specification.features}


@pytest.mark.parametrize("release", [2014, 2018, 2023])
def test_amazon_reviews_of_every_release(release: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    raw = tmp_path / "raw"
    raw.mkdir()
    user, item = ("user_id", "parent_asin") if release == 2023 else ("reviewerID", "asin")
    when = ("timestamp", 1000) if release == 2023 else ("unixReviewTime", 1)
    reviews = [
        {
            user: f"U{random.integers(9)}",
            item: f"B{n % 12:03d}",
            "overall": 5.0,
            when[0]: (10**9 + n) * when[1],
        }
        for n in range(200)
    ]
    categories = {2014: {"categories": [["Beauty", "Hair"]]}, 2018: {"category": ["Beauty", "Hair"]}}
    about = {"title": "It's a brush", **categories.get(release, {"categories": ["Beauty", "Hair"]})}
    metadata = [{item: f"B{n:03d}", **about} for n in range(11)]
    text = "".join((repr if release == 2014 else json.dumps)(row) + "\n" for row in metadata)
    with gzip.open(raw / "meta_Beauty.json.gz", "wt") as file:
        file.write(text)
    (raw / "Beauty.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    found = convert(ConvertConfig("amazon", str(raw), str(tmp_path / "log")))
    items, events = found["items"].to_pylist(), found["events"].to_pylist()
    assert [i["raw_id"] for i in items] == [f"B{n:03d}" for n in range(12)]
    assert items[0]["text"] == "It's a brush. Beauty, Hair" and items[0]["category"] == "Beauty, Hair"
    assert items[11]["text"] == "", "an item without metadata stays"
    assert len(events) == 200 and {e["label"] for e in events} == {1}
    assert {e["ts"] for e in events} == {10**9 + n for n in range(200)}
    assert prepare(tmp_path / "log", tmp_path / "prepared", PrepareConfig()).items == 12


def test_kuairand_keeps_its_columns_and_its_specification_reads_them(tmp_path: Path) -> None:
    import pyarrow.csv as pc

    tables = kuairand(tmp_path / "tables")
    raw = tmp_path / "raw" / "data"
    raw.mkdir(parents=True)
    events = pq.read_table(tables / "events.parquet")
    for name, part in (("4_08", events.slice(0, 150)), ("4_22", events.slice(150))):
        pc.write_csv(part, raw / f"log_standard_{name}.csv")
    pc.write_csv(pq.read_table(tables / "items.parquet"), raw / "video_features_basic_pure.csv")
    pc.write_csv(pq.read_table(tables / "users.parquet"), raw / "user_features_pure.csv")
    found = convert(ConvertConfig("kuairand", str(tmp_path / "raw"), str(tmp_path / "log")))
    assert len(found["events"]) == len(events) and found["events"].column_names == events.column_names
    named = find_specification(tmp_path / "log", "kuairand_pure")
    log = prepare(tmp_path / "log", tmp_path / "prepared", PrepareConfig(), specification=named)
    assert log.items == len(found["items"])


def test_what_is_no_archive_is_named(tmp_path: Path) -> None:
    folder = _ml1m(tmp_path / "raw")
    output = str(tmp_path / "log")
    for change, says in (
        (lambda: (folder / "movies.dat").write_text("1::A\n"), "movies.dat, line 1: '1::A'"),
        (lambda: (folder / "movies.dat").write_text("1::A (1990)::X\n"), "rates movie"),
        (lambda: (folder / "users.dat").unlink(), "holds no file users"),
    ):
        change()
        with pytest.raises(SidError, match=says):
            convert(ConvertConfig("ml1m", str(folder), output))
    assert not Path(output).exists(), "nothing is written before all is read"
    (tmp_path / "a.zip").write_text("no zip")
    for source, says in (("nowhere", "no such file"), ("a.zip", "is no zip archive")):
        with pytest.raises(SidError, match=says):
            convert(ConvertConfig("ml1m", str(tmp_path / source), output))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/meta.json").write_text("{")
    (tmp_path / "b/reviews.json").write_text("[1]\n")
    with pytest.raises(SidError, match="reviews.json, line 1.*one object"):
        convert(ConvertConfig("amazon", str(tmp_path / "b"), output))
