"""The specifications that come with the package, on files in the layouts that they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.logs import all_examples
from torchrec_sid.data import PrepareConfig, PreparedLog, prepare
from torchrec_sid.data.guess import guess_specification
from torchrec_sid.data.inspection import profile_folder
from torchrec_sid.data.schema import find_specification, ready_specifications
from torchrec_sid.errors import SidError

ROWS, USERS, ITEMS = 400, 20, 30


def write(folder: Path, **tables: dict[str, Any]) -> Path:
    folder.mkdir()
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


def kuairand(folder: Path) -> Path:
    """As the data set's page describes its files."""
    random = np.random.default_rng(0)

    def signal() -> Any:
        return random.integers(0, 2, ROWS)

    ranges = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
    events = {
        "user_id": random.integers(0, USERS, ROWS),
        "video_id": random.integers(0, ITEMS, ROWS),
        "date": random.integers(20_220_408, 20_220_421, ROWS),
        "hourmin": random.integers(0, 24, ROWS) * 100,
        "time_ms": 1_649_400_000_301 + np.sort(random.integers(0, 13 * 86_400_000, ROWS)),
        **{f"is_{name}": signal() for name in ("click", "like", "follow", "comment", "forward", "hate")},
        "long_view": signal(),
        "play_time_ms": random.integers(0, 10**5, ROWS),
        "duration_ms": random.integers(1, 10**5, ROWS),
        "profile_stay_time": signal(),
        "comment_stay_time": signal(),
        "is_profile_enter": signal(),
        "is_rand": [0] * ROWS,
        "tab": random.integers(0, 15, ROWS),
    }
    users = {
        "user_id": np.arange(USERS),
        "user_active_degree": ["full_active", "UNKNOWN"] * (USERS // 2),
        **{name: random.integers(0, 2, USERS) for name in ("is_lowactive_period", "is_live_streamer")},
        "is_video_author": random.integers(0, 2, USERS),
        **{name: random.integers(0, 900, USERS) for name in ranges},
        **{f"{name}_range": ["(0,10]"] * USERS for name in ranges},
        **{f"onehot_feat{n}": random.integers(0, 4, USERS) for n in range(18)},
    }
    videos = {
        "video_id": np.arange(ITEMS),
        "author_id": random.integers(0, 3, ITEMS),
        "video_type": ["NORMAL", "AD", "UNKNOWN"] * (ITEMS // 3),
        "upload_dt": ["2022-03-01"] * ITEMS,
        "upload_type": ["ShortImport"] * ITEMS,
        "visible_status": ["public"] * ITEMS,
        "video_duration": pa.array([None, *random.integers(1, 10**5, ITEMS - 1)]),
        "server_width": [720] * ITEMS,
        "server_height": [1280] * ITEMS,
        "music_id": random.integers(0, 10**9, ITEMS),
        "music_type": random.integers(0, 9, ITEMS),
        "tag": pa.array([None, *["12,65", "7"] * 14, "12"]),
    }
    return write(folder, events=events, users=users, items=videos)


def taobao(folder: Path) -> Path:
    random = np.random.default_rng(1)
    events = {
        "user": random.integers(0, USERS, ROWS),
        "time_stamp": 1_494_000_000 + np.sort(random.integers(0, 8 * 86_400, ROWS)),
        "adgroup_id": random.integers(0, ITEMS, ROWS),
        "pid": ["430548_1007", "430539_1007"] * (ROWS // 2),
        "nonclk": random.integers(0, 2, ROWS),
    }
    events["clk"] = 1 - events["nonclk"]
    ads = {"adgroup_id": np.arange(ITEMS), "price": random.random(ITEMS) * 100}
    for name in ("cate_id", "campaign_id", "customer", "brand"):
        ads[name] = random.integers(0, 9, ITEMS)
    users = {"userid": np.arange(USERS)}
    codes = ("cms_segid", "cms_group_id", "final_gender_code", "age_level", "pvalue_level")
    for name in (*codes, "shopping_level", "occupation", "new_user_class_level"):
        users[name] = random.integers(0, 5, USERS)
    return write(folder, events=events, users=users, items=ads)


@pytest.mark.parametrize("name, make", [("kuairand_pure", kuairand), ("taobao", taobao)])
def test_a_ready_specification_prepares_its_layout(tmp_path: Path, name: str, make: Any) -> None:
    folder = make(tmp_path / "log")
    specification = find_specification(folder, name)
    assert specification is not None and name in ready_specifications()
    log = prepare(folder, tmp_path / "out", PrepareConfig(), specification=specification)
    assert len(all_examples(log)) == ROWS
    guessed = guess_specification(profile_folder(folder)).specification
    for part in ("user", "item", "time", "time_unit", "item_id", "user_id"):
        assert getattr(guessed.columns, part) == getattr(specification.columns, part), part


def test_times_of_milliseconds_are_cut_to_seconds(tmp_path: Path) -> None:
    folder = kuairand(tmp_path / "log")
    log = prepare(folder, tmp_path / "out", specification=find_specification(folder, "kuairand_pure"))
    times = pq.read_table(folder / "events.parquet").column("time_ms").to_numpy()
    for row in all_examples(log):
        assert row["ts"] == times[row["event"]] // 1000
    assert set(log.vocabulary("author").to_pylist()) <= {"0", "1", "2"}
    assert log.item_feature("tag").lengths[:2].tolist() == [0, 2]  # type: ignore[union-attr]


def test_no_outcome_of_the_log_is_guessed_a_feature(tmp_path: Path) -> None:
    found = guess_specification(profile_folder(kuairand(tmp_path / "log")))
    context = {f.name for f in found.specification.of("context")}
    assert context == {"hourmin", "tab", "user_id"}
    assert {"date", "play_time_ms", "is_hate"} <= {name.split(".")[1] for name in found.left_out}


def test_a_name_that_is_no_file_and_not_ready(tmp_path: Path) -> None:
    with pytest.raises(SidError, match="cannot be read"):
        find_specification(tmp_path, "kuairand")
    assert find_specification(tmp_path, None) is None


def test_ml1m_has_everything_it_has(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "ml1m"
    log: PreparedLog = prepare(folder, tmp_path, specification=find_specification(folder, "ml1m"))
    assert sorted(log.vocabulary("gender").to_pylist()) == ["F", "M"]
    assert len(log.vocabulary("occupation")) == 21 and len(log.vocabulary("genres")) == 18
    assert "userxgenres_label_rate_7d" in log.dense_names
    assert log.manifest["dropped"]["users_without_row"] == 0
