"""Bytes over the wire against counting them one by one."""

import itertools
from dataclasses import replace

import pytest

from torchrec_sid.parallel.plan_summary import PlanSummary, StepTime, TablePlan
from torchrec_sid.parallel.wire import WireBytes, wire_bytes

BATCH, DIM, ROWS = 6, 8, 1000


def one_table(sharding_type, world, pooled=True, factors=(3.0, 5.0), columns=1):
    table = TablePlan(
        "t",
        ROWS,
        DIM,
        sharding_type,
        "fused",
        tuple(range(world)),
        pooled,
        columns,
        factors,
        0,
        0,
        StepTime(),
    )
    return PlanSummary("cuda", world, 1, 1, 0, (), (table,))


def count(sharding_type, world, local, pooled, factors, columns):
    """Send every id and every vector between ranks, one at a time."""
    ids = embeddings = 0.0
    for sender, owner in itertools.product(range(world), repeat=2):
        if sender == owner:
            continue
        # Ids spread evenly over the owners (of one table on one rank: over the ranks it may be on).
        ids += BATCH * sum(factors) / world * 8 * columns
        # Every bag's length goes to whoever holds rows of its table.
        lengths = BATCH * len(factors) * 8
        ids += lengths if sharding_type == "row_wise" else lengths * columns / world
        if not pooled:
            embeddings += BATCH * sum(factors) / world * DIM * 4
        elif sharding_type == "row_wise":
            embeddings += BATCH * len(factors) * DIM * 4
        elif sharding_type == "table_wise":
            embeddings += BATCH * len(factors) * DIM * 4 / world
    return ids, embeddings


@pytest.mark.parametrize("world", [2, 4, 16])
@pytest.mark.parametrize(
    ("sharding_type", "pooled", "columns"),
    [
        ("row_wise", True, 1),
        ("table_wise", True, 1),
        ("row_wise", False, 1),
        ("table_wise", False, 1),
        ("column_wise", False, 2),
    ],
)
def test_counts(sharding_type, pooled, columns, world):
    found = wire_bytes(one_table(sharding_type, world, pooled, columns=columns), BATCH, 8)
    ids, embeddings = count(sharding_type, world, 8, pooled, (3.0, 5.0), columns)
    assert found.ids == pytest.approx(ids, abs=1)
    assert found.embeddings == found.gradients == pytest.approx(embeddings, abs=1)
    assert found.total == found.ids + 2 * found.embeddings


def test_reducing_within_the_node_first_saves_traffic_between_nodes():
    rows = wire_bytes(one_table("row_wise", 16), BATCH, 8)
    nodes = wire_bytes(one_table("table_row_wise", 16), BATCH, 8)
    # 7 partial sums stay in the node; one copy goes to the other node with probability a half.
    assert nodes.embeddings / rows.embeddings == pytest.approx((7 + 0.5) / 15)
    assert wire_bytes(one_table("table_row_wise", 16), BATCH, 4) != nodes


def test_replicas_reduce_their_gradients():
    found = wire_bytes(one_table("data_parallel", 4), BATCH, 4)
    assert found == WireBytes(0, 0, 2 * ROWS * DIM * 4 * 3)


def test_one_rank_sends_nothing_and_smaller_elements_less():
    assert wire_bytes(one_table("row_wise", 1), BATCH, 1) == WireBytes(0, 0, 0)
    whole = wire_bytes(one_table("row_wise", 4), BATCH, 4)
    half = wire_bytes(one_table("row_wise", 4), BATCH, 4, element_bytes=2)
    assert half.embeddings * 2 == whole.embeddings
    assert half.ids == whole.ids


def test_no_tables():
    assert wire_bytes(PlanSummary("cuda", 4, 1, 1, 0, (), ()), BATCH, 4) == WireBytes(0, 0, 0)


@pytest.mark.parametrize("world", [2, 128])
def test_an_event_of_three_prefixes_costs_little_more_than_a_raw_id(world):
    """At 32 dimensions, forward and backward, ids and lengths counted."""
    events = 256.0

    raw = replace(one_table("table_wise", world, False, (events,)).tables[0], dim=32)
    bags = replace(raw, pooled=True, pooling_factors=(3.0,), num_poolings=(events,))
    rows = replace(raw, pooling_factors=(3 * events,))
    total = {
        name: wire_bytes(PlanSummary("cuda", world, 1, 1, 0, (), (table,)), BATCH, 8).total
        for name, table in (("raw", raw), ("bags", bags), ("rows", rows))
    }
    assert 1.0 < total["bags"] / total["raw"] <= 1.1
    assert total["rows"] / total["raw"] > 2.9
