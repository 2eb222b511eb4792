"""The public surface against that of the installed TorchRec; differences are in docs/compatibility.md."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)
from torchrec.fx import symbolic_trace
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface, EmbeddingCollectionInterface

from torchrec_sid.collections import SidEmbeddingBagCollection, SidEmbeddingCollection
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import HashedId, PerLevel, SidEmbeddingBagConfig, SidEmbeddingConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "compatibility.md").read_text()
LISTED = re.findall(r"^\| (\w+) \| `(\w+)` \| (.+) \|$", PAGE, re.MULTILINE)
SID = {"name": "t", "embedding_dim": 4, "feature_names": ["f"], "scheme": PerLevel(), "spec": SidSpec((4,))}
STOCK = {"name": "t", "embedding_dim": 4, "feature_names": ["f"], "num_embeddings": 5}
COLLECTIONS = [
    (
        EmbeddingBagCollection([EmbeddingBagConfig(**STOCK)]),
        SidEmbeddingBagCollection([SidEmbeddingBagConfig(**SID)]),
    ),
    (EmbeddingCollection([EmbeddingConfig(**STOCK)]), SidEmbeddingCollection([SidEmbeddingConfig(**SID)])),
]


def listed(of):
    return {name for kind, name, _ in LISTED if kind == of}


def public(thing):
    return {name for name in dir(thing) if not name.startswith("_")}


def test_every_difference_has_a_reason():
    assert LISTED
    assert all(len(reason) > 5 for _, _, reason in LISTED)


@pytest.mark.parametrize(("stock", "ours"), COLLECTIONS)
def test_collections_have_every_attribute_and_parameter(stock, ours):
    missing = public(stock) - public(nn.Module()) - public(ours)
    assert missing == listed("collection")
    takes = {k: list(inspect.signature(type(k).__init__).parameters) for k in (stock, ours)}
    assert takes[ours][: len(takes[stock])] == takes[stock], "the same order, so that positions work"
    for name in public(type(stock)) - public(nn.Module):
        member = inspect.getattr_static(type(stock), name)
        if inspect.isfunction(member):
            theirs = inspect.signature(getattr(stock, name)).parameters
            assert list(inspect.signature(getattr(ours, name)).parameters) == list(theirs), name
        assert isinstance(member, property) == isinstance(
            inspect.getattr_static(type(ours), name), property
        ), name


def test_collections_are_of_torchrecs_interfaces():
    assert issubclass(SidEmbeddingBagCollection, EmbeddingBagCollectionInterface)
    assert issubclass(SidEmbeddingCollection, EmbeddingCollectionInterface)


@pytest.mark.parametrize(
    ("stock", "ours"),
    [
        (EmbeddingBagConfig(**STOCK), SidEmbeddingBagConfig(**SID)),
        (EmbeddingConfig(**STOCK), SidEmbeddingConfig(**SID)),
    ],
)
def test_configurations_have_every_field_and_method(stock, ours):
    assert public(stock) - public(ours) == listed("config")
    assert {f.name for f in dataclasses.fields(stock)} - {f.name for f in dataclasses.fields(ours)} == (
        listed("config") & {f.name for f in dataclasses.fields(stock)}
    )
    assert ours.num_features() == stock.num_features() == 1


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize(
    ("kind", "config"),
    [(SidEmbeddingBagCollection, EmbeddingBagConfig), (SidEmbeddingCollection, EmbeddingConfig)],
)
def test_collections_of_torchrecs_tables_alone_script_as_stock(kind, config, trace):
    collection = kind([config(**STOCK)])
    scripted = torch.jit.script(symbolic_trace(collection) if trace else collection)
    kjt = KeyedJaggedTensor.from_lengths_sync(["f"], torch.tensor([1, 3, 4]), torch.tensor([1, 2]))
    got, wanted = scripted(kjt), collection(kjt)
    if kind is SidEmbeddingCollection:
        got, wanted = got["f"], wanted["f"]
    assert torch.equal(got.values(), wanted.values())


@pytest.mark.parametrize("tracer", [torch.fx.symbolic_trace, symbolic_trace])
def test_collections_of_sids_trace_without_a_list_of_leaves(tracer):
    spec = SidSpec((4, 4))
    sid = SID | {"spec": spec, "scheme": (PerLevel(), HashedId(9))}
    kjt = KeyedJaggedTensor.from_lengths_sync(["f"], torch.tensor([1, 3, -1]), torch.tensor([1, 2]))
    bags = SidEmbeddingBagCollection([SidEmbeddingBagConfig(**sid)])
    assert torch.equal(tracer(bags)(kjt).values(), bags(kjt).values())
    events = SidEmbeddingCollection([SidEmbeddingConfig(**sid)])
    assert torch.equal(tracer(events)(kjt)["f"].values(), events(kjt)["f"].values())
