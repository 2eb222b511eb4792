"""The arms of the long-history bench compute one function where they should; its rows have their fields."""

from pathlib import Path

import torch

from apps.bench.long_history import ARMS, DecodedAttention, LongHistoryConfig, World, quality, throughput
from tests.side.attention_cases import assert_equal, make_case
from torchrec_sid.side import EventTermsConfig

SMALL = LongHistoryConfig(
    quick=True, history=128, batch_size=8, trits=10, dims=32, steps=1, train_steps=4, test_batches=3
)


def test_decoded_attention_is_the_same_function() -> None:
    case = make_case(lengths=(7, 1, 12), terms=EventTermsConfig(num_actions=3, age_buckets=5))
    assert_equal(case)
    own = case.attention
    case.attention = DecodedAttention(own, case.basis)  # type: ignore[assignment]
    out, grads = case.measured()
    case.attention = own
    expected, expected_grads = case.reference()
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    for name, grad in expected_grads.items():
        found = grads[name if name == "candidates" else f"attention.{name}"]
        torch.testing.assert_close(found.double(), grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()))


def test_rows_and_equal_entropy(tmp_path: Path) -> None:
    world = World.make(SMALL, tmp_path)
    rows = throughput(world)
    assert [row["arm"] for row in rows] == list(ARMS)
    assert [row["bytes_per_event"] for row in rows] == [2, 2, 8]
    assert all(row["examples_per_second"] > 0 for row in rows)
    assert all(row["examples_per_second_with_reader"] > 0 for row in rows)
    entropy = quality(world)
    assert abs(entropy["side"] - entropy["side_decoded"]) < 1e-5
    assert entropy["dense"] != entropy["side"]
