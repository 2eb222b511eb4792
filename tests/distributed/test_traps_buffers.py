"""What DMP does silently to buffers and weights, and that SID modules come out whole.

It draws the weights of sharded tables anew, never synchronises buffers, and turns meta buffers into zeros.
"""

import torch
import torch.distributed as dist

from tests.distributed.launch import run_ranks
from tests.distributed.tables_model import CATALOG, SPEC, Model, make_batch, part, shard
from tests.tables.test_catalog_map import TableCatalog
from torchrec_sid.parallel.buffers import checksum, dense_buffer_names, synchronise_buffers
from torchrec_sid.parallel.ranks import Ranks


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


def test_weights_and_buffers_survive_dmp():
    for found in run_ranks(on_each_rank, 2):
        assert found["copied"] < 1e-6
        assert (found["differ_before"], found["differ_after"]) == (2, 1)
        assert found["synchronised"] < 1e-6
        assert found["real"]
        assert found["from_meta"] < 1e-6
