"""What TorchRec gets wrong without a word, one test for each habit of ours that avoids it."""

from importlib import metadata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from torchrec import EmbeddingBagCollection, EmbeddingCollection

from tests.distributed.tables_model import SPEC, Model, make_batch, part
from tests.tables.strategies import schemes
from torchrec_sid.collections import SidEmbeddingBagCollection
from torchrec_sid.parallel.constraints import model_pooling_factors
from torchrec_sid.parallel.planner_config import PlannerConfig, TableConstraint, TopologyConfig
from torchrec_sid.parallel.planning import make_plan
from torchrec_sid.tables import SidEmbeddingBagConfig


@given(st.data())
def test_1_and_2_rows_are_contiguous_flat_int64(data):
    """Row-wise sharding and unpooled look-ups read strided or 2-D values as if they were contiguous."""
    scheme = data.draw(schemes(3))
    ebc = SidEmbeddingBagCollection(
        tables=[SidEmbeddingBagConfig(name="item", embedding_dim=4, scheme=scheme, spec=SPEC)]
    )
    rows = ebc.transform(part(make_batch(data.draw(st.integers(0, 9))), 0, 1).features)
    for values in (rows.values(), rows.lengths()):
        assert values.is_contiguous()
        assert values.dim() == 1
    assert rows.values().dtype == torch.int64
    assert rows.values().numel() == rows.lengths().sum()


def test_3_every_collection_has_its_own_transform():
    """A pipeline caches a module's result by name: a second call of one instance gets the first result."""
    model = Model()
    assert model.bags.transform is not model.events.transform
    assert not set(model.bags.transform.indexers) & set(model.events.transform.indexers)


@pytest.mark.parametrize(("kind", "count"), [(EmbeddingBagCollection, 3), (EmbeddingCollection, 1)])
def test_stock_collections_are_found_by_exact_type(kind, count):
    """One of bags, one of rows, and one of event bags for each set of features."""
    assert sum(type(module) is kind for module in Model().modules()) == count


def test_transforms_have_no_parameters():
    """One parameter, and the pipeline runs the module in step instead of ahead."""
    model = Model()
    for module in (model.bags.transform, model.events.transform):
        assert not list(module.parameters())


def test_4_no_plan_puts_sequences_under_data_parallelism_on_a_cpu():
    plan = make_plan(Model(), PlannerConfig(topology=TopologyConfig(world_size=2, device="cpu"))).plan
    kinds = {p.sharding_type for p in plan.plan["events.ec"].values()}
    assert kinds
    assert "data_parallel" not in kinds


def test_7_no_buffer_is_ever_on_meta():
    assert not [n for n, b in Model(device=torch.device("meta")).named_buffers() if b.is_meta]


def test_9_constraints_know_the_names_of_the_physical_tables():
    model = Model()
    tables = {c.name for c in model.bags.ebc.embedding_bag_configs()}
    tables |= set(model.events.embeddings)
    assert set(model_pooling_factors(model)) == tables
    assert len(tables) == 5 + 9
    config = PlannerConfig(
        topology=TopologyConfig(world_size=2, device="cpu"),
        tables={"b_itm_prefix": TableConstraint(sharding_types=("row_wise",))},
    )
    with pytest.raises(ValueError, match="b_itm_prefix"):
        make_plan(model, config)


def test_10_fbgemm_is_the_one_torchrec_was_built_for():
    """torchrec does not pin fbgemm: pip would pair 1.8 with 1.9."""
    names = {d.metadata["Name"].lower() for d in metadata.distributions()}
    fbgemm = "fbgemm-gpu-cpu" if "fbgemm-gpu-cpu" in names else "fbgemm-gpu"
    torchrec, found = Version(metadata.version("torchrec")), Version(metadata.version(fbgemm))
    assert (torchrec.major, torchrec.minor) == (found.major, found.minor)
