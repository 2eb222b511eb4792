"""`replace_embeddings` on models as people have them: names, hooks, types, towers, calls, checkpoints."""

import copy
import functools
from typing import NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingConfig
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.modules.embedding_tower import EmbeddingTower, EmbeddingTowerCollection
from torchrec.modules.feature_processor_ import PositionWeightedModule
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.tables.test_catalog_map import TableCatalog
from tests.test_collections import make_kjt
from tests.test_replace import BATCH, CATALOG, DIM, PREFIX, SPEC, bag, batch, make_ebc
from torchrec_sid.collections import SidEmbeddingBagCollection, SidEmbeddingCollection
from torchrec_sid.errors import SidError
from torchrec_sid.replace import former_state_dict, replace_embeddings
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import HashedPrefix, PerLevel, SidEmbeddingConfig

OTHER = TableCatalog(SidSpec((10, 10)), {i: i for i in range(100)}, "e" * 64)
WIDE = SidSpec((5, 5, 4))
UNIQUE = TableCatalog(
    WIDE, {i: int(WIDE.pack(torch.tensor([[i // 20, i // 4 % 5, i % 4]]))) for i in range(100)}, "d" * 64
)


class Pair(NamedTuple):
    first: nn.Module
    second: int


class Names(nn.Module):
    """One collection under two names, in containers, and as a bound method."""

    def __init__(self):
        super().__init__()
        collection = make_ebc()
        self.query_ebc = self.item_ebc = collection
        self.both = nn.ModuleList([collection, collection])
        self.by_name = {"item": [collection], "pair": Pair(collection, 1)}
        self.embed = collection.forward

    def forward(self, features):
        return self.query_ebc(features).values() - self.item_ebc(features).values()


def test_every_name_of_a_collection_is_replaced_once():
    model = Names()
    report = replace_embeddings(model, {"item": PREFIX}, catalog=CATALOG)
    (change,) = report.collections
    assert change.names == ("query_ebc", "item_ebc", "both.0", "both.1")
    new = model.query_ebc
    assert isinstance(new, SidEmbeddingBagCollection)
    found = (model.item_ebc, *model.both, model.by_name["item"][0], model.by_name["pair"].first)
    assert all(module is new for module in found)
    assert model.embed.__self__ is new
    assert not bool(model(batch()).any())


def test_what_the_collection_is_now_counts_not_what_it_was_made_as():
    ebc = make_ebc(device=torch.device("meta")).to_empty(device="cpu").half().eval()
    ebc.embedding_bags["t_item"].weight.requires_grad_(False)
    calls = []
    handle = ebc.register_forward_hook(lambda *_: calls.append(1))
    ebc.own_attribute = "kept"
    report = replace_embeddings(ebc, {"item": PREFIX}, catalog=CATALOG)
    new = report.model
    weight = new.embedding_bags["t_item_sid"].weight
    assert (weight.device.type, weight.dtype, weight.requires_grad) == ("cpu", torch.float16, False)
    assert new.device.type == "cpu"
    assert not new.training
    assert new.own_attribute == "kept"
    assert new.embedding_bags["t_user"] is ebc.embedding_bags["t_user"]
    assert {c.data_type for c in new.ebc.embedding_bag_configs()} == {DataType.FP16}
    assert "frozen" in report.notes[0]
    new(batch())
    handle.remove()
    new(batch())
    assert calls == [1]


def test_gather_select_and_indices_are_passed_on():
    tables = [
        EmbeddingConfig(name=n, embedding_dim=DIM, num_embeddings=100, feature_names=f)
        for n, f in (("a", ["item"]), ("b", ["item"]), ("c", ["user"]))
    ]
    ec = EmbeddingCollection(tables, need_indices=True, use_gather_select=True)
    new = replace_embeddings(ec, {"user": HashedPrefix(1)}, spec=SidSpec((16,))).model
    assert new.use_gather_select()
    out = new(make_kjt(SPEC, BATCH))
    assert list(out) == ["item@a", "item@b", "user"]
    assert out["item@b"].weights().tolist() == [1, 99]
    assert out["user"].weights().tolist() == [3, 9, 0, 4]


def test_an_optimizer_in_the_backward_pass_is_carried_over():
    model = nn.Sequential(make_ebc())
    apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.5})
    report = replace_embeddings(model, {"item": PREFIX}, catalog=CATALOG)
    assert any("SGD" in note for note in report.notes)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(batch()).values().sum().backward()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


MATRIX = torch.randn(50, DIM)


@pytest.mark.parametrize(
    ("init", "kept"),
    [
        (lambda w: w.data.copy_(MATRIX), False),
        (lambda w: w.data.copy_(MATRIX[: len(w)]), False),
        (lambda w: w.data.copy_(torch.arange(w.numel()).view_as(w)), False),
        (nn.init.ones_, True),
        (nn.init.normal_, True),
        (functools.partial(nn.init.uniform_, a=3.0, b=4.0), True),
    ],
)
def test_an_init_fn_that_knows_its_rows_is_dropped(init, kept):
    ebc = EmbeddingBagCollection([bag("t", 50, ["item"], init_fn=init)])
    report = replace_embeddings(ebc, {"item": PREFIX}, spec=SPEC)
    assert (report.model.ebc.embedding_bag_configs()[0].init_fn is init) == kept
    assert bool(report.notes) != kept


def test_a_tied_weight_is_noted():
    model = nn.Module()
    model.ebc, model.out = make_ebc(), nn.Linear(DIM, 100, bias=False)
    model.out.weight = model.ebc.embedding_bags["t_item"].weight
    assert not replace_embeddings(model, {"item": PREFIX}, catalog=CATALOG, dry_run=True).notes
    (note,) = replace_embeddings(model, {"item": PREFIX, "history": PREFIX}, catalog=CATALOG).notes
    assert "t_item: its weight is out.weight too" in note


def test_a_dry_run_changes_nothing():
    model = Names()
    before = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    state = torch.random.get_rng_state()
    dry = replace_embeddings(model, {"item": PREFIX}, catalog=CATALOG, dry_run=True)
    assert {name: id(m) for name, m in model.named_modules(remove_duplicate=False)} == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert str(dry) == str(replace_embeddings(model, {"item": PREFIX}, catalog=CATALOG))


def test_catalogs_by_feature_and_call_after_call():
    ebc = make_ebc()
    user = ebc.embedding_bags["t_user"]
    first = replace_embeddings(ebc, {"item": PREFIX}, catalog={"item": CATALOG}).model
    kept = first.embedding_bags["t_item_sid"]
    second = replace_embeddings(first, {"history": HashedPrefix(2)}, catalog={"history": OTHER}).model
    assert second.transform.catalog_fingerprints == {"item": "f" * 64, "history": "e" * 64}
    assert second.embedding_bags["t_item_sid"] is kept
    assert second.embedding_bags["t_user"] is user
    assert second(batch()).keys() == ["user", "item", "history"]
    assert torch.equal(second(batch())["item"], first(batch())["item"])
    assert second.pooling_factors({"history": 3}) == {"t_user": [1], "t_item": [6], "t_item_sid": [3]}
    assert [c.name for c in second.embedding_bag_configs()] == ["t_user", "t_item", "t_item_sid"]
    model = nn.Sequential(second)
    replace_embeddings(model, {"user": PerLevel()}, spec=SPEC)
    assert len({id(m) for m in model.modules() if hasattr(m, "unknown_count")}) == 2
    with pytest.raises(SidError, match=r"catalog of feature 'x'.*\['user'\]"):
        replace_embeddings(make_ebc(), {"user": PerLevel()}, catalog={"x": CATALOG})


@pytest.mark.parametrize("name", ["a:t_item", "a@b", "t_item", "history:t_item_level1", "a b"])
def test_any_feature_name_will_do(name):
    """Separate tables make keys of their own, which must not meet a feature's."""
    ebc = EmbeddingBagCollection([bag("t_item", 100, ["history"]), bag("u", 10, [name])])
    new = replace_embeddings(ebc, {"history": PerLevel(separate=True)}, catalog=CATALOG).model
    features = {name: BATCH["user"], "history": BATCH["history"]}
    kjt = make_kjt(SPEC, features)
    assert torch.equal(new(kjt)[name], ebc(kjt)[name])
    assert new.pooling_factors({name: 7.0})["u"] == [7.0]


class Sum(nn.Module):
    def forward(self, embedded):
        return embedded.values().sum(1, keepdim=True)


@pytest.mark.parametrize("shared", [False, True])
def test_towers_are_no_obstacle(shared):
    first = EmbeddingTower(make_ebc(), Sum())
    second = EmbeddingTower(EmbeddingBagCollection([bag("z", 100, ["item"])]), Sum())
    towers = EmbeddingTowerCollection([first, first if shared else second])
    replace_embeddings(towers, {"item": PREFIX}, catalog=CATALOG)
    assert towers(batch()).shape == (3, 2)
    assert all(isinstance(tower.embedding, SidEmbeddingBagCollection) for tower in towers.towers)


def test_what_reaches_into_its_collection_stays_and_is_refused_for_the_true_reason():
    processed = FeatureProcessedEmbeddingBagCollection(
        EmbeddingBagCollection([bag("p", 100, ["history"])], is_weighted=True),
        {"history": PositionWeightedModule(4)},
    )
    model = nn.ModuleList([processed, EmbeddingBagCollection([bag("t", 100, ["item"])])])
    replace_embeddings(model, {"item": PREFIX}, catalog=CATALOG)
    assert isinstance(model[1], SidEmbeddingBagCollection)
    with pytest.raises(SidError, match=r"'history'.*its sharder shards"):
        replace_embeddings(model, {"history": PREFIX}, catalog=CATALOG)
    fused = FusedEmbeddingBagCollection(
        [bag("t", 100, ["item"])], optimizer_type=torch.optim.SGD, optimizer_kwargs={"lr": 0.1}
    )
    with pytest.raises(SidError, match="FusedEmbeddingBagCollection, whose tables"):
        replace_embeddings(nn.Sequential(fused), {"item": PREFIX}, catalog=CATALOG)


class ShardedLooking(nn.Module):
    """A user's module below a package whose name says nothing about it."""


ShardedLooking.__module__ = "my.torchrec.distributed.models"


def test_a_name_is_no_reason_to_refuse():
    model = ShardedLooking()
    model.ebc = make_ebc()
    replace_embeddings(model, {"item": PREFIX}, catalog=CATALOG)
    assert isinstance(model.ebc, SidEmbeddingBagCollection)


def test_checkpoints_of_the_model_before_load_after_the_swap(tmp_path):
    """The tables that stay bore other names then; those of SIDs are new."""
    model = nn.ModuleDict({"bags": make_ebc(), "out": nn.Linear(2, 2)})
    model["events"] = EmbeddingCollection(
        [
            EmbeddingConfig(name=n, embedding_dim=DIM, num_embeddings=100, feature_names=[f])
            for n, f in (("e_item", "item"), ("e_user", "user"))
        ]
    )
    old = copy.deepcopy(model.state_dict())
    dcp.save({"model": old}, checkpoint_id=tmp_path / "old", no_dist=True)
    new = copy.deepcopy(model)
    replace_embeddings(new, {"item": PREFIX, "history": PREFIX}, catalog=CATALOG)

    def spoil():
        for parameter in new.parameters():
            nn.init.zeros_(parameter)

    def loaded():
        kept = [new["bags"].embedding_bags["t_user"].weight, new["events"].embeddings["e_user"].weight]
        names = ("bags.embedding_bags.t_user.weight", "events.embeddings.e_user.weight")
        return [torch.equal(p, old[name]) for p, name in zip(kept, names, strict=True)]

    spoil()
    result = new.load_state_dict(old, strict=False)
    assert loaded() == [True, True]
    assert sorted(result.unexpected_keys) == [
        "bags.embedding_bags.t_item.weight",
        "events.embeddings.e_item.weight",
    ]
    assert sorted(result.missing_keys) == [
        "bags.ebc.embedding_bags.t_item.weight",
        "events.event_bags.0.embedding_bags.e_item.weight",
    ]
    spoil()
    dcp.load({"model": former_state_dict(new)}, checkpoint_id=tmp_path / "old", no_dist=True)
    assert loaded() == [True, True]
    assert torch.equal(new["out"].weight, old["out.weight"])


def test_events_that_were_rows_load_into_bags():
    """Checkpoints from before events were pooled."""
    table = {"name": "t", "embedding_dim": DIM, "feature_names": ["item"], "scheme": PREFIX, "spec": SPEC}
    rows = SidEmbeddingCollection([SidEmbeddingConfig(**table, events="rows")])
    bags = SidEmbeddingCollection([SidEmbeddingConfig(**table)])
    assert list(rows.state_dict()) == ["ec.embeddings.t.weight"]
    bags.load_state_dict(rows.state_dict())
    kjt = make_kjt(SPEC, {"item": [[(1, 2, 3)], [None, (0, 0, 1)], []]})
    assert torch.allclose(rows(kjt)["item"].values(), bags(kjt)["item"].values(), atol=1e-6)


@pytest.mark.parametrize("pooled", [True, False])
def test_rows_that_start_from_ids_say_what_the_ids_said(pooled):
    """With SIDs that tell all items apart nothing is lost; hashed into few rows, something is."""
    old = make_ebc() if pooled else None
    if old is None:
        old = EmbeddingCollection(
            [EmbeddingConfig(name="t_item", embedding_dim=DIM, num_embeddings=100, feature_names=["item"])]
        )
    want = old(batch())["item"]
    exact = replace_embeddings(copy.deepcopy(old), {"item": PREFIX}, catalog=UNIQUE, start="ids")
    got = exact.model(batch())["item"]
    if not pooled:
        want, got = want.values(), got.values()
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    assert "keeps 100.0%" in exact.notes[-1]
    few = replace_embeddings(copy.deepcopy(old), {"item": HashedPrefix(3, 40)}, catalog=UNIQUE, start="ids")
    assert 5 < float(few.notes[-1].split("keeps ")[1].split("%")[0]) < 95


def test_rows_start_from_the_mean_by_traffic():
    old = EmbeddingBagCollection([bag("t", 100, ["item"])])
    traffic = torch.zeros(100)
    traffic[3] = 5.0
    new = replace_embeddings(
        old, {"item": HashedPrefix(1)}, catalog=UNIQUE, start="ids", traffic={"t": traffic}
    ).model
    rows = new.embedding_bags["t"].weight
    torch.testing.assert_close(rows[0], old.embedding_bags["t"].weight[3], atol=1e-4, rtol=0)
    torch.testing.assert_close(rows[1], old.embedding_bags["t"].weight[20:40].mean(0))
    assert not bool(rows[-1].any()), "no item is unknown"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"start": "warm"}, "Choose 'fresh' or 'ids'"),
        ({"start": "ids", "spec": SPEC}, "'item' has no catalog"),
        ({"start": "ids", "catalog": UNIQUE, "traffic": {"x": torch.ones(3)}}, r"'x'.*\['t_item'\]"),
        ({"start": "ids", "catalog": UNIQUE, "traffic": {"t_item": torch.ones(3)}}, "Give 100 numbers"),
    ],
)
def test_a_start_that_cannot_be_is_refused(options, says):
    with pytest.raises(SidError, match=says):
        replace_embeddings(make_ebc(), {"item": PREFIX}, **options)


def test_a_start_from_ids_on_meta_is_refused():
    meta = make_ebc(device=torch.device("meta"))
    with pytest.raises(SidError, match="on meta"):
        replace_embeddings(meta, {"item": PREFIX}, catalog=UNIQUE, start="ids")
