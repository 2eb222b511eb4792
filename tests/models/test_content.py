"""Content towers: what a frozen embedding becomes."""

import pytest
import torch
from torchrec import KeyedJaggedTensor

from torchrec_sid.errors import SidError
from torchrec_sid.models.content import (
    ContentEmbeddingBagCollection,
    ContentEmbeddingCollection,
    ContentTower,
)


def test_the_tower_runs_once_per_item_and_equals_running_it_per_event() -> None:
    torch.manual_seed(0)
    tower = ContentTower(torch.randn(7, 5), dim=3)
    items = torch.tensor([6, 0, 6, 6, 2])
    direct = tower.tower(tower.content[items].float())
    torch.testing.assert_close(tower(items), direct)
    rows = []
    tower.tower.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    tower(items)
    assert rows == [3]


def test_content_is_centred_scaled_frozen_and_left_out_of_checkpoints() -> None:
    tower = ContentTower(torch.randn(50, 5) * 3 + 10, dim=3)
    assert tower.content.float().mean(0).abs().max() < 1e-2
    assert tower.content.float().square().mean() == pytest.approx(1, rel=1e-2)
    assert not tower.content.requires_grad
    assert "content" not in tower.state_dict()


def test_collections_speak_torchrec() -> None:
    features = KeyedJaggedTensor.from_lengths_sync(
        keys=["item", "history"],
        values=torch.tensor([1, 2, 0, 1, 2]),
        lengths=torch.tensor([1, 1, 3, 0]),
    )
    tower = ContentTower(torch.randn(3, 5), dim=4)
    bags = ContentEmbeddingBagCollection("item", tower)(features)
    assert bags.keys() == ["item"] and bags.values().shape == (2, 4)
    sequence = ContentEmbeddingCollection("history", tower)(features)["history"]
    assert sequence.values().shape == (3, 4) and sequence.lengths().tolist() == [3, 0]
    torch.testing.assert_close(sequence.values()[1], bags["item"][0])


@pytest.mark.parametrize(
    "content",
    [torch.zeros(0, 4), torch.ones(3, 4), torch.full((3, 4), float("nan")), torch.ones(3, 4).long()],
)
def test_unusable_content_is_refused(content: torch.Tensor) -> None:
    with pytest.raises(SidError, match="content"):
        ContentTower(content, dim=2)
