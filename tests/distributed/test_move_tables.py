"""Tables carried from one catalog to another: by hand, sharded as unsharded, optimizer state along."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

from tests.distributed.launch import run_ranks
from tests.distributed.tables_model import CATALOG, ITEMS, SPEC, Model, vocabulary
from tests.tables.test_catalog_map import TableCatalog
from torchrec_sid import (
    HashedId,
    HashedPrefix,
    PerLevel,
    SentencePiece,
    SidEmbeddingBagCollection,
    SidEmbeddingBagConfig,
    SidSpec,
)
from torchrec_sid.catalog import ItemValues
from torchrec_sid.errors import SidError
from torchrec_sid.moved_rows import move_tables
from torchrec_sid.parallel.embedding_tables import row_blocks
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.planner_config import PlannerConfig, TableConstraint
from torchrec_sid.parallel.sharding import shard_model
from torchrec_sid.parallel.state import prepare_to_load

DRAW = torch.Generator().manual_seed(5)
MOVED = TableCatalog(
    SPEC,
    # Two items are new, one is gone.
    {
        7 * i: int(
            SPEC.pack(torch.stack([torch.randint(k, (1,), generator=DRAW) for k in SPEC.cardinalities], 1))
        )
        for i in range(1, ITEMS + 2)
    },
)
TRAFFIC = ItemValues(7 * torch.arange(ITEMS), torch.rand(ITEMS, generator=DRAW) * 10)
TINY = SidSpec((2, 2))


def packed(*codes):
    return [int(TINY.pack(torch.tensor([code]))) for code in codes]


class Bags(nn.Module):
    def __init__(self, scheme, catalog=None, spec=TINY, dim=3):
        super().__init__()
        table = SidEmbeddingBagConfig(
            name="t", embedding_dim=dim, feature_names=["item"], scheme=scheme, spec=spec
        )
        user = EmbeddingBagConfig(name="u", embedding_dim=dim, num_embeddings=4, feature_names=["user"])
        self.bags = SidEmbeddingBagCollection([table, user], catalog={"item": catalog} if catalog else None)


def test_a_prefix_row_is_the_mean_of_the_old_rows_of_its_items_by_traffic():
    before = TableCatalog(TINY, dict(zip([1, 2, 3], packed([0, 0], [0, 1], [1, 1]), strict=True)))
    after = TableCatalog(TINY, dict(zip([1, 2, 3, 4], packed([1, 0], [1, 0], [0, 1], [1, 1]), strict=True)))
    model = Bags(HashedPrefix(2), before)
    weight = model.bags.embedding_bags["t"].weight
    old, user = weight.detach().clone(), model.bags.embedding_bags["u"].weight.detach().clone()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    optimizer.state[weight]["sum"].copy_(old.abs())
    traffic = ItemValues(torch.tensor([1, 2, 3]), torch.tensor([3.0, 1.0, 5.0]))
    report = move_tables(model, before, after, traffic=traffic, optimizer=optimizer)
    # Rows: prefixes 0 and 1, then 00, 01, 10, 11, then the unknown item.
    wanted = torch.stack(
        [old[1], old[0], 0 * old[0], old[5], (3 * old[2] + old[3]) / 4, 0 * old[0], old[6]]
    )
    torch.testing.assert_close(weight.detach(), wanted)
    states = torch.stack([old[1], old[0], 0 * old[0], old[5], 0 * old[0], 0 * old[0], old[6]]).abs()
    states[4] = (3 * old[2].abs() + old[3].abs()) / 4
    torch.testing.assert_close(optimizer.state[weight]["sum"], states)
    assert torch.equal(model.bags.embedding_bags["u"].weight, user)
    assert (report.items, report.tables[0].started, report.tables[0].states) == (3, 4, ("sum",))
    assert "t: 4 of 7 rows start from old rows, with sum" in report.describe()
    # From here on ids are looked up in the new catalog.
    batch = KeyedJaggedTensor.from_lengths_sync(
        ["item", "user"], torch.tensor([1, 9]), torch.tensor([1, 1, 0, 0]).int()
    )
    torch.testing.assert_close(
        model.bags(batch)["item"].detach(), torch.stack([wanted[1] + wanted[4], 2 * wanted[6]])
    )


def test_a_fine_row_takes_up_what_the_mean_of_a_coarse_one_leaves():
    # Items 1 and 2 had two first codes and now share one; each has a second code of its own.
    before = TableCatalog(TINY, dict(zip([1, 2], packed([0, 0], [1, 0]), strict=True)))
    after = TableCatalog(TINY, dict(zip([1, 2], packed([1, 0], [1, 1]), strict=True)))
    model = Bags(HashedPrefix(2), before)
    old = model.bags.embedding_bags["t"].weight.detach().clone()
    batch = KeyedJaggedTensor.from_lengths_sync(
        ["item", "user"], torch.tensor([1, 2]), torch.tensor([1, 1, 0, 0]).int()
    )
    known = model.bags(batch)["item"].detach()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    weight = model.bags.embedding_bags["t"].weight
    optimizer.state[weight]["sum"].copy_(old.abs())
    traffic = ItemValues(torch.tensor([1, 2]), torch.tensor([3.0, 1.0]))
    move_tables(model, before, after, traffic=traffic, optimizer=optimizer)
    torch.testing.assert_close(weight[1].detach(), (3 * old[0] + old[1]) / 4)
    torch.testing.assert_close(model.bags(batch)["item"].detach(), known)
    # A state is no sum: it is the mean of what the rows had.
    state = optimizer.state[weight]["sum"]
    torch.testing.assert_close(state[4:6], old[[2, 4]].abs())
    assert bool((state >= 0).all())


def test_the_same_catalog_moves_nothing_that_an_item_reads():
    for scheme in (
        HashedPrefix(3),
        HashedPrefix(3, 40),
        PerLevel(),
        SentencePiece(vocabulary()),
        HashedId(50),
    ):
        model = Bags(scheme, spec=SPEC)
        ids = CATALOG.item_ids()
        batch = KeyedJaggedTensor.from_lengths_sync(
            ["item", "user"],
            torch.cat([CATALOG.lookup(ids), torch.zeros(len(ids), dtype=torch.int64)]),
            torch.ones(2 * len(ids), dtype=torch.int32),
        )
        old = model.bags(batch).values().detach()
        move_tables(model, CATALOG, CATALOG, traffic=TRAFFIC)
        torch.testing.assert_close(model.bags(batch).values().detach(), old)


def test_pieces_keep_what_an_item_sums_up_to():
    """One item a row: the pieces of its new SID share what the pieces of its old one summed to."""
    before = TableCatalog(SPEC, {1: int(CATALOG.lookup(torch.tensor([7])))})
    after = TableCatalog(SPEC, {1: int(SPEC.pack(torch.tensor([[7, 6, 4]])))})
    for precompute in (False, True):
        model = Bags(SentencePiece(vocabulary(), precompute=precompute), before, SPEC)
        batch = KeyedJaggedTensor.from_lengths_sync(
            ["item", "user"], torch.tensor([1, 0]), torch.tensor([1, 1]).int()
        )
        old = model.bags(batch)["item"].detach()
        rows = model.bags.transform(batch)["item"].values()
        move_tables(model, before, after)
        assert model.bags.transform(batch)["item"].values().tolist() != rows.tolist()
        torch.testing.assert_close(model.bags(batch)["item"].detach(), old)


def test_what_cannot_be_moved_is_refused():
    model = Bags(HashedPrefix(2))
    other = TableCatalog(SPEC, {1: 0})
    same = TableCatalog(TINY, {1: 0})
    with pytest.raises(SidError, match="one shape"):
        move_tables(model, same, other)
    with pytest.raises(SidError, match="no item is in both"):
        move_tables(model, same, TableCatalog(TINY, {2: 0}))
    with pytest.raises(SidError, match="'item'.*no catalog"):
        move_tables(model, {"other": same}, same)
    with pytest.raises(SidError, match="without tables of SIDs"):
        move_tables(nn.Linear(2, 2), same, same)


def test_rows_of_raw_ids_stay_and_vectors_without_rows_are_named():
    model = Model()
    rows = model.bags.embedding_bags["b_item_id"].weight.detach().clone()
    both = {"other": CATALOG, "item": CATALOG, "history": CATALOG}
    report = move_tables(model, both, {**both, "other": MOVED})
    assert any("b_other: side has no rows" in line for line in report.left)
    # Packed SIDs that did not change: the hash of the whole SID is the same row.
    known = (rows != model.bags.embedding_bags["b_item_id"].weight).any(1)
    assert torch.equal(model.bags.embedding_bags["b_item_id"].weight[known], torch.zeros_like(rows[known]))


def _fill(tensor, rows, seed):
    for block in row_blocks(tensor, rows):
        index = torch.arange(block.row, block.row + len(block.tensor)).double()
        block.tensor.copy_((index * 12.9898 + seed).sin().unsqueeze(1).expand(block.tensor.shape))


def _sharded(kind, name):
    model = Model()
    planner = PlannerConfig(
        tables={
            # A bag per event: gloo reduces equal parts only.
            "e_*": TableConstraint(sharding_types=("table_wise",)),
            "*": TableConstraint(sharding_types=(kind,)),
        }
    )
    sharded = shard_model(
        model, planner, device=torch.device("cpu"), table_optimizer=TableOptimizer(name, lr=0.1), seed=0
    )
    optimizer = sharded.make_optimizer(lambda p: torch.optim.SGD(p, lr=0.1))
    state = sharded.model.state_dict()
    for number, table in enumerate(sharded.tables.values()):
        _fill(state[table.weight_key], table.rows, number)
    if kind == "data_parallel":
        prepare_to_load(optimizer)
    kept = optimizer.state_dict()["state"]
    for number, table in enumerate(sharded.tables.values()):
        for value in kept.get(table.weight_key, {}).values():
            if isinstance(value, torch.Tensor) and value.dim() and value.size(0) % table.rows == 0:
                _fill(value, table.rows, number)
    report = move_tables(sharded.model, CATALOG, MOVED, traffic=TRAFFIC, optimizer=optimizer)
    state, kept = sharded.model.state_dict(), optimizer.state_dict()["state"]
    weights, states = {}, {}
    for table in sharded.tables.values():
        blocks = list(row_blocks(state[table.weight_key], table.rows))
        weights[table.name] = [(b.row, b.column, b.tensor.tolist()) for b in blocks]
        for value in kept.get(table.weight_key, {}).values():
            if isinstance(value, torch.Tensor) and value.dim() and value.size(0) % table.rows == 0:
                found = row_blocks(value, table.rows)
                states[table.name] = [(b.row, b.tensor[:, 0].tolist()) for b in found]
    return weights, states, sorted(t.name for t in report.tables if t.states), dist.get_rank()


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        ("table_wise", "rowwise_adagrad"),
        ("row_wise", "rowwise_adagrad"),
        ("row_wise", "adagrad"),
        ("column_wise", "adagrad"),
        ("data_parallel", "adagrad"),
    ],
)
def test_sharded_tables_and_their_optimizers_move_as_unsharded_ones_do(kind, optimizer):
    plain = Model()
    tables = {**dict(plain.bags.embedding_bags), **dict(plain.events.embeddings)}
    found = run_ranks(_sharded, 2, kind, optimizer)
    names = list(dict.fromkeys(name for weights, *_ in found for name in weights))
    with torch.no_grad():
        for name in tables:
            _fill(tables[name].weight, len(tables[name].weight), names.index(name))
    reference = torch.optim.Adagrad(plain.parameters())
    for table in tables.values():
        reference.state[table.weight]["sum"].copy_(table.weight)
    move_tables(plain, CATALOG, MOVED, traffic=TRAFFIC, optimizer=reference)
    seen = set()
    for weights, states, moved, _ in found:
        for name, blocks in weights.items():
            whole = tables[name].weight.detach()
            for row, column, block in blocks:
                part = torch.tensor(block)
                height, width = part.shape
                torch.testing.assert_close(
                    part, whole[row : row + height, column : column + width], atol=1e-6, rtol=1e-6
                )
        for name, blocks in states.items():
            for row, values in blocks:
                torch.testing.assert_close(
                    torch.tensor(values),
                    reference.state[tables[name].weight]["sum"][row : row + len(values), 0],
                    atol=1e-6,
                    rtol=1e-6,
                )
                seen.add(name)
        assert set(moved) >= set(states) - {"b_user", "e_user"}
    assert {"b_item_prefix", "b_other_piece", "e_history_piece"} <= seen
