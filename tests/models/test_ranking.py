"""Every arm builds in every backbone, trains, and says what it costs."""

from dataclasses import replace

import pytest
import torch
from torchrec import KeyedJaggedTensor

from torchrec_sid.data.batch import RankingBatch
from torchrec_sid.data.statistics import action_values
from torchrec_sid.errors import SidError
from torchrec_sid.models.build import LogSizes, Ranking, RankingConfig, build_ranking
from torchrec_sid.models.channels import ARMS, CHANNELS, arm_named
from torchrec_sid.models.dlrm import Standardise
from torchrec_sid.models.stores import ContentStore, ItemStore, KnownIdStore, SideStore, SidStore
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import PieceTrainerConfig, train_pieces

ITEMS, SPEC, SIDE = 20, SidSpec((4, 4, 4)), SidSpec((3,) * 10)
CODES = torch.randint(0, 4, (ITEMS, 3), generator=torch.Generator().manual_seed(1))
DIGITS = torch.randint(0, 3, (ITEMS, 10), generator=torch.Generator().manual_seed(2))
KNOWN = torch.arange(ITEMS).where(torch.arange(ITEMS) % 5 > 0, torch.tensor(ITEMS))
SIZES = LogSizes(ITEMS, 2, ("a", "b", "c"), torch.tensor([-1.0, 1.0]))
CONFIG = RankingConfig(dim=8, heads=2, history_length=8, table_rows=12, encoder_feedforward=16)
ALL = ("none", *CHANNELS, "full_id+side", "hashed_prefix+dense+side")


@pytest.fixture(scope="module")
def stores() -> tuple[ItemStore, ...]:
    generator = torch.Generator().manual_seed(3)
    pieces = train_pieces(SPEC, CODES, PieceTrainerConfig(vocab_size=16, model="bpe"))
    basis = FrozenBasis.from_digits(SIDE, torch.randn(10, 6, generator=generator))
    return (
        KnownIdStore(values={"known": KNOWN}, dropped={"known": ITEMS}),
        SidStore(SPEC, pieces, values={"sid": SPEC.pack(CODES)}),
        SideStore(basis, values={"bytes": SIDE.pack_bytes(DIGITS)}),
        ContentStore(torch.randn(ITEMS, 6, generator=generator)),
    )


def _batch(rows: int = 6) -> RankingBatch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 0, 2, 1, 4, 2])
    events = int(lengths.sum())
    history = torch.randint(0, ITEMS, (events,), generator=generator)
    item = torch.randint(0, ITEMS, (rows,), generator=generator)
    sids, packed = SPEC.pack(CODES), SIDE.pack_bytes(DIGITS)
    action = torch.randint(0, 2, (events,), generator=generator)
    values = {
        "item": item,
        "history": history,
        "history_action": action,
        "history_age": action,
        "item_sid": sids[item],
        "history_sid": sids[history],
        "item_known": KNOWN[item],
        "history_known": KNOWN[history],
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
        rows={"item_bytes": packed[item], "history_bytes": packed[history]},
    )


def _ranking(stores: tuple, **changes) -> Ranking:
    torch.manual_seed(0)
    return build_ranking(replace(CONFIG, **changes), SIZES, stores)


def _learns_by_heart(ranking: Ranking) -> None:
    model, batch = ranking.module, _batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    first, _ = model(batch)
    for _ in range(60):
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * first
    assert all(p.grad is not None for p in model.parameters()), "a parameter is not used"


@pytest.mark.parametrize("arm", ALL)
@pytest.mark.parametrize("layers", [0, 2])
def test_every_arm_learns_a_batch_by_heart(arm: str, layers: int, stores: tuple) -> None:
    _learns_by_heart(_ranking(stores, arm=arm, encoder_layers=layers))


@pytest.mark.parametrize("arm", ["none", "side", "dense+full_id"])
def test_long_histories_learn_a_batch_by_heart(arm: str, stores: tuple) -> None:
    _learns_by_heart(_ranking(stores, arm=arm, recent=2))


def test_recent_summaries_of_side_are_those_of_a_history_cut_short(stores: tuple) -> None:
    batch, cut = _batch(), 2
    channel = _ranking(stores, arm="side", recent=cut).module.model.channels["side"]
    whole = channel(batch.features, batch.rows)
    lengths = batch.history_lengths
    kept = torch.cat([torch.arange(int(n)) >= n - cut for n in lengths])
    names = ["history_action", "history_age"]
    short = KeyedJaggedTensor(
        keys=names,
        values=torch.cat([batch.features[name].values()[kept] for name in names]),
        lengths=lengths.clamp_max(cut).repeat(2),
    )
    found = channel(short, {**batch.rows, "history_bytes": batch.rows["history_bytes"][kept]})
    # Both windows see all of the short history, the first of the long one its last events.
    half = found.numbers.shape[1] // 2
    torch.testing.assert_close(found.numbers[:, :half], whole.numbers[:, :half])
    torch.testing.assert_close(found.fields[:, :-1], whole.fields[:, :-1])
    assert not torch.equal(found.fields[:, -1], whole.fields[:, -1])
    assert not torch.equal(found.numbers[:, half:], whole.numbers[:, half:])


@pytest.mark.parametrize("arm", ["full_id", "sentencepiece+side"])
def test_cross_layers_learn_a_batch_by_heart(arm: str, stores: tuple) -> None:
    _learns_by_heart(_ranking(stores, arm=arm, interaction="dcn", cross_layers=2, cross_rank=4))


@pytest.mark.parametrize("arm", ALL)
def test_padding_rows_do_not_change_the_loss(arm: str, stores: tuple) -> None:
    model, batch = _ranking(stores, arm=arm).module, _batch()
    loss, _ = model(batch)
    batch.labels[-1] = 1 - batch.labels[-1]
    assert model(batch)[0] == loss


@pytest.mark.parametrize("arm", ["full_id", "dense+side", "hashed_prefix"])
@pytest.mark.parametrize("layers", [0, 1])
def test_without_history_only_the_candidate_counts(arm: str, layers: int, stores: tuple) -> None:
    ranking = _ranking(stores, arm=arm, history_length=0, encoder_layers=layers)
    assert not any(name.startswith("history") for name in ranking.fields)
    batch = _batch()
    features = batch.features
    keys = [name for name in ranking.fields if name in set(features.keys())]
    kept = replace(
        batch,
        features=KeyedJaggedTensor(
            keys=keys,
            values=torch.cat([features[k].values() for k in keys]),
            lengths=torch.ones(6 * len(keys), dtype=torch.int64),
        ),
        rows={"item_bytes": batch.rows["item_bytes"]},
    )
    loss, _ = ranking.module(kept)
    loss.backward()
    assert all(p.grad is not None for p in ranking.module.parameters()), "a parameter is not used"


def test_an_event_sees_only_those_before_it(stores: tuple) -> None:
    model = _ranking(stores, arm="full_id", encoder_layers=2).module.model
    features, encoder = _batch().features, model.channels["stream"].encoder
    events = torch.randn(12, 8)
    before = encoder(events, features)
    changed = events.clone()
    changed[2] += 1  # the newest of the first user's three
    after = encoder(changed, features)
    assert torch.equal(before[:2], after[:2]) and torch.equal(before[3:], after[3:])
    assert not torch.equal(before[2], after[2])


def test_every_task_has_its_own_logit_and_the_loss_is_their_mean(stores: tuple) -> None:
    ranking = _ranking(stores, arm="full_id", tasks=(1,))
    assert ranking.task_names == ("action >= 1",)
    assert ranking.tasks == (1,)
    batch = _batch()
    batch.labels = torch.stack([batch.labels, 1 - batch.labels], dim=1)
    loss, output = ranking.module(batch)
    assert output.logits.shape == (6, 2)
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        output.logits, batch.labels, reduction="none"
    )
    torch.testing.assert_close(loss.detach(), each[:5].mean())


def test_costs_are_those_of_the_arm(stores: tuple) -> None:
    def cost(arm: str) -> int:
        return _ranking(stores, arm=arm).bytes_per_event

    assert {arm: cost(arm) for arm in ARMS} == {
        "none": 0,
        "random_hash": 8,
        "full_id": 8,
        "dense": 8,
        "hashed_prefix": SPEC.nbytes,
        "full_id+side": 8 + SIDE.nbytes,
    }
    assert cost("hashed_prefix+sentencepiece") == cost("hashed_prefix+overlap") == SPEC.nbytes
    # An index is carried once, and what it looks up is kept once per item.
    assert cost("full_id+known_id+dense+cosine+identity") == 8
    assert _ranking(stores, arm="known_id+dense+side").bytes_per_item == 12
    assert _ranking(stores, arm="full_id+side").bytes_per_item == 0
    assert SIDE.nbytes == 2


def test_equal_rows_for_every_arm_that_hashes(stores: tuple) -> None:
    def rows(arm: str) -> list[int]:
        channel = _ranking(stores, arm=arm).module.model.channels[arm]
        return [p.shape[0] for p in channel.embedder.parameters()]

    assert rows("random_hash") == rows("hashed_prefix") == [CONFIG.table_rows] * 2


def test_unknown_arm_and_missing_inputs_are_named(stores: tuple) -> None:
    with pytest.raises(SidError, match="unknown name 'nope'.*full_id"):
        arm_named("side+nope")
    with pytest.raises(SidError, match="repeats"):
        arm_named("side+side")
    for arm, missing in (
        ("hashed_prefix", "SidCatalog"),
        ("dense", "content"),
        ("side", "basis"),
        ("sentencepiece", "pieces"),
    ):
        given = (SidStore(SPEC),) if arm == "sentencepiece" else ()
        with pytest.raises(SidError, match=missing):
            build_ranking(replace(CONFIG, arm=arm), SIZES, given)
    with pytest.raises(SidError, match=r"tasks: 99, but actions are 0\.\."):
        build_ranking(replace(CONFIG, arm="none", tasks=(99,)), SIZES)
    with pytest.raises(SidError, match="dot or dcn"):
        RankingConfig(interaction="sum")


def test_the_value_of_an_action_is_its_deviation_from_the_mean() -> None:
    ratings = torch.tensor([1, 3, 5, 5, 4, 5, 5])
    values = action_values(ratings, 6)
    assert values[1] == -1 and 0 < values[5] < 1 and values[5] > values[4]
    assert action_values(torch.ones(4, dtype=torch.int64), 2).tolist() == [1, 1]


def test_standardised_dense_features_have_mean_zero_and_unit_deviation() -> None:
    dense = torch.randn(500, 3) * torch.tensor([1.0, 10.0, 0.0]) + 5
    module = Standardise(torch.stack([dense.mean(0), dense.std(0)]), limit=10.0)
    found = module(dense)
    torch.testing.assert_close(found.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std(0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-5, rtol=0)


def test_values_that_training_never_saw_are_cut() -> None:
    module = Standardise(torch.tensor([[0.0], [2.0]]), limit=3.0)
    assert module(torch.tensor([[100.0], [-100.0], [4.0]])).flatten().tolist() == [3.0, -3.0, 2.0]
