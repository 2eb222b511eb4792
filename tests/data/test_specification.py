"""Specifications: what they hold, how they are written, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_sid.data.specification import (
    CategoricalFeature,
    Counters,
    NumericFeature,
    Specification,
    counter_names,
    feature_key,
)
from torchrec_sid.errors import SidError

FULL = {
    "columns": {"user": "uid", "time": "timestamp", "weight": "w"},
    "labels": {"click": {"column": "clicked"}, "long_view": {"action": 3, "weight": 0.5}},
    "features": {
        "context": {"hour": {}, "tags": {"multi": True, "separator": "|", "hash_rows": 100}},
        "user": {
            "age": {"kind": "numeric", "log": True},
            "last_bought": {"kind": "item_id", "multi": True},
        },
        "item": {
            "genres": {"multi": True, "separator": ",", "table": "genre", "dim": 8},
            "year": {"kind": "numeric", "column": "title", "extract": r"\((\d{4})\)", "buckets": 10},
            "plot": {"kind": "embedding"},
        },
        "history": {"genres": {"multi": True, "table": "genre", "dim": 8}},
    },
    "counters": {"keys": ["item", "user", "user x genres"], "days": 7},
}


def test_reads_what_it_writes(tmp_path: Path) -> None:
    found = Specification.from_plain(FULL)
    file = tmp_path / "specification.yaml"
    file.write_text(found.to_yaml())
    assert Specification.read(file) == found
    assert Specification.from_plain(found.to_plain()) == found
    assert Specification.from_plain(None) == Specification()
    assert [feature_key(f) for f in found.of("history")] == ["history_genres"]
    assert [f.name for f in found.of("item", NumericFeature)] == ["year"]


def test_counters_name_their_columns() -> None:
    found = counter_names(Specification.from_plain(FULL))
    assert found[:6] == (
        "item_events",
        "item_click_rate",
        "item_long_view_rate",
        "item_events_7d",
        "item_click_rate_7d",
        "item_long_view_rate_7d",
    )
    assert found[-1] == "userxgenres_long_view_rate_7d" and len(found) == 18
    assert counter_names(Specification()) == ()


@settings(max_examples=20)
@given(
    st.lists(
        st.builds(
            CategoricalFeature,
            name=st.from_regex(r"[a-z]{3,8}_f", fullmatch=True),
            source=st.sampled_from(["context", "user", "item"]),
            column=st.text(min_size=1, max_size=6),
            vocabulary=st.none() | st.lists(st.text(), max_size=4, unique=True).map(tuple),
            min_count=st.integers(1, 9),
            dim=st.none() | st.integers(1, 64),
        ),
        unique_by=lambda f: f.name,
        max_size=5,
    )
)
def test_any_specification_survives_a_file(features: list[CategoricalFeature]) -> None:
    ordered = sorted(features, key=lambda f: f.source)
    found = Specification(features=tuple(ordered), counters=Counters(days=3))
    assert Specification.from_plain(found.to_plain()) == found


REFUSED: dict[str, tuple[Any, str]] = {
    "list": ([1], r"the file: \[1\]"),
    "section": ({"feature": {}}, "unknown key 'feature'. Did you mean 'features'"),
    "source": ({"features": {"users": {}}}, "unknown key 'users'. Did you mean 'user'"),
    "field": ({"features": {"user": {"age": {"dims": 4}}}}, r"features.user.age: unknown key 'dims'. Did"),
    "kind": ({"features": {"user": {"age": {"kind": "number"}}}}, r"user.age.kind: 'number'. Did you mean"),
    "type": ({"features": {"user": {"age": {"dim": "8"}}}}, r"user.age.dim: '8' \(a str\)"),
    "dim": ({"features": {"user": {"age": {"dim": 0}}}}, "user.age.dim: 0. Choose 1 or more"),
    "name": ({"features": {"user": {"my age": {}}}}, "the name 'my age'. Use letters"),
    "reserved": ({"features": {"context": {"item": {}}}}, "something else of this name"),
    "reserved history": ({"features": {"history": {"action": {}}}}, "something else of this name"),
    "twice": ({"features": {"user": {"a": {}}, "item": {"a": {}}}}, "'a' occurs twice"),
    "extract": ({"features": {"item": {"y": {"extract": "(("}}}}, "item.y.extract: .* Mend the expression"),
    "no group": ({"features": {"item": {"y": {"extract": "a"}}}}, "has no group. Put brackets"),
    "both": (
        {"features": {"user": {"a": {"vocabulary": ["x"], "hash_rows": 5}}}},
        "a vocabulary and hash_rows. Give one",
    ),
    "separator": ({"features": {"item": {"g": {"separator": ","}}}}, "Set multi: true"),
    "buckets": ({"features": {"user": {"a": {"kind": "numeric", "buckets": 1}}}}, "Choose 2 to 10,000"),
    "table": ({"features": {"user": {"a": {"kind": "numeric", "table": "t"}}}}, "A table needs buckets"),
    "shared": (
        {"features": {"user": {"a": {"table": "t", "dim": 4}, "b": {"table": "t", "dim": 8}}}},
        r"table 't': dim 4 of a, 8 of b. Features of one table",
    ),
    "column of examples": (
        {"features": {"context": {"user": {}}}},
        r"features.context.user: every log has something else of this name. Choose another.*column: user",
    ),
    "file of items": ({"features": {"item": {"segment": {}}}}, "something else of this name"),
    "dense": ({"features": {"user": {"past_positive_rate": {}}}}, "something else of this name"),
    "counter's name": (
        {"features": {"user": {"item_events": {}}}, "counters": {}},
        "'item_events' occurs twice",
    ),
    "no label": ({"labels": {}}, "labels: none. Name at least one"),
    "label": ({"labels": {"a": {}}}, "Give a column or an action"),
    "threshold": ({"labels": {"a": {"action": 0}}}, "labels.a.action: 0. Use 1..127"),
    "weight": ({"labels": {"a": {"column": "a", "weight": -1.0}}}, "A weight is 0 or more"),
    "counter": ({"counters": {"keys": ["items"]}}, "counters.keys: 'items'. Did you mean 'item'"),
    "counter of nothing": ({"counters": {"keys": ["user x genres"]}}, "counters.keys: 'user x genres'"),
    "days": ({"counters": {"days": 0}}, "counters.days: 0"),
    "prior": ({"counters": {"prior": 1.5}}, "prior 1.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_by_name(name: str) -> None:
    body, message = REFUSED[name]
    with pytest.raises(SidError, match=message):
        Specification.from_plain(body)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SidError, match="cannot be read"):
        Specification.read(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(SidError, match="is not YAML"):
        Specification.read(bad)
