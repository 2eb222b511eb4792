"""The examples of docs/data.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from tests.data.test_ready_specifications import kuairand
from torchrec_sid.data import prepare
from torchrec_sid.data.schema import find_specification

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    (tmp_path / "KuaiRand-Pure" / "data").mkdir(parents=True)
    logs = kuairand(tmp_path / "kuairand")
    for name, file in (
        ("events", "log_standard_4_08_to_4_21_pure"),
        ("items", "video_features_basic_pure"),
        ("users", "user_features_pure"),
    ):
        table = logs / f"{name}.parquet"
        csv.write_csv(pq.read_table(table), tmp_path / "KuaiRand-Pure" / "data" / f"{file}.csv")
        table.unlink()
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert (tmp_path / "shop-prepared" / "manifest.json").is_file()
    assert (tmp_path / "synthetic" / "events.parquet").is_file()
    found = prepare(
        "kuairand", "kuairand-out", specification=find_specification("kuairand", "kuairand_pure")
    )
    assert sum(found.rows(split) for split in ("train", "valid", "test")) == 400


def test_the_numbers_of_the_page_are_the_defaults() -> None:
    from torchrec_sid.data import NegativeSampling, PrepareConfig, SyntheticConfig

    text = PAGE.read_text()
    assert f"`window` ({NegativeSampling().window:,})" in text
    assert f"`per_positive` ({NegativeSampling().per_positive})" in text
    assert f"`block_rows` ({PrepareConfig().block_rows})" in text
    assert f"`shuffle_window` ({PrepareConfig().shuffle_window:,})" in text
    assert SyntheticConfig().new_items == 0.4 and SyntheticConfig().category_noise == 0.1
