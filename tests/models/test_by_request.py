"""A batch by request and the same rows one by one: outputs and gradients of every arm and backbone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec import KeyedJaggedTensor

from tests.models.test_ranking import ALL, CODES, CONFIG, DIGITS, ITEMS, SIDE, SIZES, SPEC
from torchrec_sid.data.batch import RankingBatch
from torchrec_sid.errors import SidError
from torchrec_sid.models.build import LogSizes, Ranking, build_ranking
from torchrec_sid.models.feature_fields import FeatureInputs, TableInput, VectorInput
from torchrec_sid.models.request_rows import REQUEST, REQUEST_ROW, RequestRows
from torchrec_sid.models.stores import ContentStore, ItemStore, KnownIdStore, SideStore, SidStore
from torchrec_sid.models.user_attention import attend_by_user
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.tables import PieceTrainerConfig, train_pieces

FEATURES = FeatureInputs(
    (TableInput("user_country", "country", 5, 8),),
    (VectorInput("item_vector", 3),),
    (TableInput("history_place", "place", 4, 8),),
    (VectorInput("history_seconds", 1),),
)


def stores() -> tuple[ItemStore, ...]:
    generator = torch.Generator().manual_seed(3)
    pieces = train_pieces(SPEC, CODES, PieceTrainerConfig(vocab_size=16, model="bpe"))
    basis = FrozenBasis.from_digits(SIDE, torch.randn(10, 6, generator=generator))
    return (
        KnownIdStore(values={"known": torch.arange(ITEMS)}),
        SidStore(SPEC, pieces, values={"sid": SPEC.pack(CODES)}),
        SideStore(basis, values={"bytes": SIDE.pack_bytes(DIGITS)}),
        ContentStore(torch.randn(ITEMS, 6, generator=generator)),
    )


def make(arm: str, features: FeatureInputs | None = None, **changes: object) -> Ranking:
    torch.manual_seed(0)
    sizes = SIZES if features is None else LogSizes(*SIZES[:5], features=features)
    return build_ranking(replace(CONFIG, arm=arm, **changes), sizes, stores())  # type: ignore[arg-type]


def batches(
    ranking: Ranking, users: list[int], request: list[int], seed: int = 0
) -> tuple[RankingBatch, RankingBatch]:
    """The same rows by request and by row.

    Args:
        ranking: whose fields they hold.
        users: events of each request.
        request: of each row; every request has one.
    """
    draw = torch.Generator().manual_seed(seed)
    rows, ids = len(request), torch.tensor(request)
    history = [torch.randint(0, ITEMS, (n,), generator=draw) for n in users]
    action = [torch.randint(0, 2, (n,), generator=draw) for n in users]
    age = [torch.randint(0, 40, (n,), generator=draw) for n in users]
    seconds = [torch.randn(n, 1, generator=draw) for n in users]
    item, place = torch.randint(0, ITEMS, (rows,), generator=draw), torch.arange(ITEMS) % 4
    country = torch.randint(0, 5, (rows,), generator=draw)
    vector = torch.randn(rows, 3, generator=draw)
    dense = torch.randn(rows, 3, generator=draw)
    labels = torch.randint(0, 2, (rows,), generator=draw).float()
    first = [request.index(user) for user in range(len(users))]

    def batch(owners: list[int | None]) -> RankingBatch:
        """``owners``: of each row, the request whose history its bags hold."""
        held = [user for user in owners if user is not None]
        lengths = torch.tensor([0 if user is None else users[user] for user in owners])
        joined = {
            name: torch.cat([part[user] for user in held])
            for name, part in (("history", history), ("action", action), ("age", age), ("s", seconds))
        }
        past = joined["history"]
        values = {
            "item": item,
            "history": past,
            "history_action": joined["action"],
            "history_age": joined["age"],
            "item_sid": SPEC.pack(CODES)[item],
            "history_sid": SPEC.pack(CODES)[past],
            "item_known": item,
            "history_known": past,
            "user_country": country,
            "history_place": place[past],
        }
        values = {name: value for name, value in values.items() if name in ranking.fields}
        ones = torch.ones(rows, dtype=torch.int64)
        packed = SIDE.pack_bytes(DIGITS)
        extra = {
            "item_bytes": packed[item],
            "history_bytes": packed[past],
            "item_vector": vector,
            "history_seconds": joined["s"],
        }
        kjt = KeyedJaggedTensor(
            keys=list(values),
            values=torch.cat(list(values.values())),
            lengths=torch.cat([lengths if name.startswith("history") else ones for name in values]),
        )
        weights = torch.ones(rows)
        nothing = torch.zeros(rows, dtype=torch.int64)
        return RankingBatch(dense, kjt, labels, weights, nothing, torch.tensor(users)[ids], extra)

    by_request = batch([user if first[user] == row else None for row, user in enumerate(request)])
    order = torch.tensor(first).argsort()
    number = torch.empty_like(order)
    number[order] = torch.arange(len(order))
    by_request.rows |= {REQUEST: number[ids], REQUEST_ROW: torch.tensor(first)[order]}
    return by_request, batch(list(request))


def agree(ranking: Ranking, shared: RankingBatch, single: RankingBatch) -> None:
    found = []
    for each in (shared, single):
        ranking.module.zero_grad()
        loss, output = ranking.module(each)
        loss.backward()
        grads = {
            name: p.grad.clone() for name, p in ranking.module.named_parameters() if p.grad is not None
        }
        found.append((output.logits, grads))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
    assert found[0][1].keys() == found[1][1].keys()
    for name, grad in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], grad, atol=1e-5, rtol=1e-4, msg=name)
    assert float(found[1][0].std()) > 1e-4


MIXED = ([3, 0, 8, 1], [2, 0, 1, 2, 3, 0, 2, 2, 2, 2, 2])


@pytest.mark.parametrize("arm", ALL)
@pytest.mark.parametrize("changes", [{}, {"encoder_layers": 2, "recent": 3}], ids=["dlrm", "transformer"])
def test_every_arm_and_backbone(arm: str, changes: dict[str, int]) -> None:
    ranking = make(arm, **changes)
    agree(ranking, *batches(ranking, *MIXED))


@pytest.mark.parametrize("arm", ["full_id", "side", "none"])
def test_windows_cross_layers_and_features(arm: str) -> None:
    ranking = make(arm, FEATURES, recent=2, interaction="dcn", cross_layers=2, cross_rank=4)
    agree(ranking, *batches(ranking, *MIXED))


RANKINGS = {arm: make(arm, recent=3) for arm in ("hashed_prefix+side", "dense+full_id")}


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(1, 9)), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
    st.sampled_from(sorted(RANKINGS)),
)
def test_any_requests_in_any_order_of_rows(users: list, random: object, arm: str) -> None:
    request = [user for user, (_, count) in enumerate(users) for _ in range(count)]
    random.shuffle(request)  # type: ignore[attr-defined]
    ranking, sizes = RANKINGS[arm], [events for events, _ in users]
    if len(request) < 2 or not sum(sizes):
        return
    shared, single = batches(ranking, sizes, request)
    with torch.no_grad():
        found, expected = (ranking.module(each)[1].logits for each in (shared, single))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_one_request_is_looked_up_once() -> None:
    ranking = make("full_id")
    shared, single = batches(ranking, [8], [0] * 50)
    assert shared.features["history"].values().numel() == 8
    assert single.features["history"].values().numel() == 400
    agree(ranking, shared, single)


def test_consecutive_requests() -> None:
    found = RequestRows.consecutive(torch.tensor([2, 1, 3]), 6)
    assert found.request.tolist() == [0, 0, 1, 2, 2, 2]
    assert found.row.tolist() == [0, 2, 3]
    assert found.counts().tolist() == [2, 1, 3]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lengths": torch.tensor([3, 1])}, "lengths"),
        ({"counts": torch.tensor([3, -1])}, "counts"),
        ({"counts": torch.tensor([2])}, "user_attention"),
        ({"windows": [0]}, "windows"),
        ({"events": torch.randn(5, 3)}, "user_attention"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, object], named: str) -> None:
    given = {
        "query": torch.randn(2, 2, 4),
        "events": torch.randn(5, 4),
        "lengths": torch.tensor([3, 2]),
        "counts": torch.tensor([1, 1]),
        "windows": [8],
        "scale": 1.0,
    }
    for call in (attend_by_user, torch.ops.torchrec_sid.user_attention):
        with pytest.raises(SidError, match=named):
            call(**{**given, **changes})
