"""What DMP does silently to buffers and weights, and that SID modules come out whole.

It draws the weights of sharded tables anew, never synchronises buffers, and turns meta buffers into zeros.
"""

import torch
import torch.distributed as dist

from tests.distributed.launch import run_ranks
from tests.distributed.tables_model import CATALOG, SPEC, Model, make_batch, part, shard
from tests.tables.test_adapters import TableCatalog
from torchrec_sid.errors import SidError
from torchrec_sid.parallel.buffers import checksum, dense_buffer_names, synchronise_buffers
from torchrec_sid.parallel.ranks import Ranks
from torchrec_sid.replace import replace_embeddings
from torchrec_sid.tables import HashedId


def other_catalog():
    """Another SID for every item: what a rank would hold that opened an older generation."""
    return TableCatalog(SPEC, {i: (sid + 1) % 5 for i, sid in CATALOG._sids.items()})


def on_each_rank():
    rank = dist.get_rank()
    batch = part(make_batch(0), rank, 2)
    torch.manual_seed(1)
    reference = Model()
    expected, _ = reference(batch)
    found = {}

    torch.manual_seed(1)
    sharded, _ = shard(Model(), ("row_wise", "row_wise"), 2)
    found["copied"] = float((sharded(batch)[0] - expected).abs())

    torch.manual_seed(1)
    model = Model(catalog=CATALOG if rank == 0 else other_catalog())
    names = dense_buffer_names(model)
    sharded, _ = shard(model, ("row_wise", "row_wise"), 2)
    ranks = Ranks.open()

    def sums():
        buffers = dict(sharded.module.named_buffers())
        return ranks.all(lambda: checksum(buffers[name] for name in names), where="test")

    found["differ_before"] = len(set(sums()))
    synchronise_buffers(sharded.module, names, ranks)
    found["differ_after"] = len(set(sums()))
    found["synchronised"] = float((sharded(batch)[0] - expected).abs())

    # Tables on meta, as for a model too large for one process; weights from the reference.
    torch.manual_seed(1)
    model = Model(device=torch.device("meta"))
    lookup = model.bags.transform.lookups[2]
    found["real"] = {b.device.type for b in lookup.buffers()} == {"cpu"}
    sharded, _ = shard(model, ("row_wise", "row_wise"), 2, like=reference)
    found["from_meta"] = float((sharded(batch)[0] - expected).abs())
    return found


def bad_batches_on_each_rank():
    """Under DMP a bad batch is refused before TorchRec reads wrong rows."""
    sharded, _ = shard(Model(), ("row_wise", "row_wise"), 2)
    said = []
    for spoil in (
        lambda kjt: kjt._values.__setitem__(0, SPEC.pack(torch.tensor([[7, 7, 4]]))[0] + 1),
        lambda kjt: setattr(kjt, "_values", torch.stack([kjt.values()] * 2, dim=1)[:, 0]),
        lambda kjt: setattr(kjt, "_values", kjt.values().float()),
    ):
        batch = part(make_batch(0), dist.get_rank(), 2)
        spoil(batch.features)
        try:
            sharded(batch)
            said.append("nothing")
        except SidError as error:
            said.append(str(error))
    try:
        replace_embeddings(sharded, {"user": HashedId(5)}, spec=SPEC)
        said.append("nothing")
    except SidError as error:
        said.append(str(error))
    return said


def test_weights_and_buffers_survive_dmp():
    for found in run_ranks(on_each_rank, 2):
        assert found["copied"] < 1e-6
        assert (found["differ_before"], found["differ_after"]) == (2, 1)
        assert found["synchronised"] < 1e-6
        assert found["real"]
        assert found["from_meta"] < 1e-6


def test_bad_batches_are_refused_under_dmp():
    for code, layout, dtype, replaced in run_ranks(bad_batches_on_each_rank, 2):
        assert "feature 'item'" in code
        assert "code 5 at level 3" in code
        assert "not contiguous" in layout
        assert "float32" in dtype
        assert "the model is sharded" in replaced
