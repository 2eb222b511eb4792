"""Every arm builds, trains, and says what it costs."""

import pytest
import torch
from torchrec import KeyedJaggedTensor

from torchrec_sid.data.batch import RankingBatch
from torchrec_sid.errors import SidError
from torchrec_sid.models.arms import ARMS, ItemInputs, arm_named
from torchrec_sid.models.dlrm import HistoryDLRM, HistoryDLRMTrain, Standardise
from torchrec_sid.models.history import HistoryConfig
from torchrec_sid.spec import SidSpec

SPEC = SidSpec((4, 4, 4))
INPUTS = ItemInputs(items=20, dim=8, table_rows=12, spec=SPEC, content=torch.randn(20, 6))


def _batch(rows: int = 6) -> RankingBatch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 0, 2, 1, 4, 2])
    events = int(lengths.sum())
    history = torch.randint(0, 20, (events,), generator=generator)
    item = torch.randint(0, 20, (rows,), generator=generator)
    codes = torch.randint(0, 4, (20, 3), generator=generator)
    sids = SPEC.pack(codes)
    action = torch.randint(0, 2, (events,), generator=generator)
    values = {
        "item": item,
        "history": history,
        "history_action": action,
        "history_age": action,
        "item_sid": sids[item],
        "history_sid": sids[history],
    }
    ones = torch.ones(rows, dtype=torch.int64)
    features = KeyedJaggedTensor(
        keys=list(values),
        values=torch.cat(list(values.values())),
        lengths=torch.cat([lengths if name.startswith("history") else ones for name in values]),
    )
    return RankingBatch(
        dense=torch.randn(rows, 3, generator=generator),
        features=features,
        labels=torch.randint(0, 2, (rows,), generator=generator).float(),
        weights=torch.tensor([1.0, 1, 1, 1, 1, 0]),
        segment=torch.zeros(rows, dtype=torch.int64),
        history_lengths=lengths,
    )


def _model(name: str) -> HistoryDLRMTrain:
    torch.manual_seed(0)
    arm = ARMS[name]
    modules = arm.build(INPUTS)
    feature = arm.item_fields[1] if arm.item_fields else "history"
    config = HistoryConfig(dim=8, heads=2, actions=2, max_length=8)
    return HistoryDLRMTrain(
        HistoryDLRM(modules.candidate, modules.history, 3, config, history_feature=feature)
    )


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_learns_a_batch_by_heart(name: str) -> None:
    model, batch = _model(name), _batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    first, _ = model(batch)
    for _ in range(60):
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * first
    assert all(p.grad is not None for p in model.parameters()), "a parameter is not used"


@pytest.mark.parametrize("name", ARMS)
def test_padding_rows_do_not_change_the_loss(name: str) -> None:
    model, batch = _model(name), _batch()
    loss, _ = model(batch)
    batch.labels[-1] = 1 - batch.labels[-1]
    assert model(batch)[0] == loss


def test_costs_are_those_of_the_arm() -> None:
    costs = {name: arm.bytes_per_event(INPUTS) for name, arm in ARMS.items()}
    assert costs == {"none": 0, "random_hash": 8, "full_id": 8, "dense": 12, "hashed_prefix": SPEC.nbytes}


def test_equal_rows_for_every_arm_that_hashes() -> None:
    def rows(name: str) -> list[int]:
        modules = ARMS[name].build(INPUTS)
        return [p.shape[0] for module in modules if module is not None for p in module.parameters()]

    assert rows("random_hash") == rows("hashed_prefix") == [INPUTS.table_rows] * 2


def test_unknown_arm_and_missing_inputs_are_named() -> None:
    with pytest.raises(SidError, match="unknown name 'nope'.*full_id"):
        arm_named("nope")
    bare = ItemInputs(items=5, dim=4, table_rows=3)
    with pytest.raises(SidError, match="catalog"):
        ARMS["hashed_prefix"].build(bare)
    with pytest.raises(SidError, match="content"):
        ARMS["dense"].build(bare)


def test_standardised_dense_features_have_mean_zero_and_unit_deviation() -> None:
    dense = torch.randn(500, 3) * torch.tensor([1.0, 10.0, 0.0]) + 5
    module = Standardise(torch.stack([dense.mean(0), dense.std(0)]), limit=10.0)
    found = module(dense)
    torch.testing.assert_close(found.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std(0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-5, rtol=0)


def test_values_that_training_never_saw_are_cut() -> None:
    module = Standardise(torch.tensor([[0.0], [2.0]]), limit=3.0)
    assert module(torch.tensor([[100.0], [-100.0], [4.0]])).flatten().tolist() == [3.0, -3.0, 2.0]
