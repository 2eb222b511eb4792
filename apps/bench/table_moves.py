"""What a ranker loses when the SIDs of its items change: tables moved, left as they are, and cold.

    python -m apps.bench.table_moves --json FILE

A small ranker is trained on a synthetic log under the SIDs of one quantizer. Then a second quantizer is
fitted without the oldest items and with those that came since, and all items get its SIDs: under their own
names, or aligned to the old ones. Printed is the NE on later events right after the change, without
training, in percent of that before it; for SIDE, whose features change with the quantizer, after some steps
of fine-tuning too.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

from torchrec_sid.artifact import write_json
from torchrec_sid.catalog import ItemValues, SidCatalog
from torchrec_sid.collections import SidEmbeddingBagCollection
from torchrec_sid.data.synthetic import FIRST_ITEM_ID, SyntheticConfig, write_synthetic
from torchrec_sid.moved_rows import move_tables
from torchrec_sid.quantizers import ResidualKMeans, ResidualKMeansConfig, align_codes
from torchrec_sid.side import FrozenBasis, SideFeaturesConfig
from torchrec_sid.tables import (
    HashedPrefix,
    PieceTrainerConfig,
    SentencePiece,
    Side,
    SidEmbeddingBagConfig,
    train_pieces,
)

ARMS = ("prefix", "pieces", "side")


@dataclass(frozen=True)
class TableMovesConfig:
    """One run."""

    items: int = 5_000
    """Items of the log."""
    events: int = 200_000
    """Its events; the last tenth is evaluated on."""
    codes: int = 16
    """Codes of each of three levels."""
    warm: bool = True
    """Begin the second fit at the codebooks of the first."""
    seeds: int = 1
    """Trainings of each arm."""
    batch: int = 512
    """Events of a step."""
    finetune: tuple[int, ...] = (50, 200)
    """Steps of fine-tuning of SIDE, on the newest events before the evaluation."""
    json: str | None = None
    """File for the rows."""


class _World(NamedTuple):
    x: Tensor
    """``[items, d]`` float32."""
    users: Tensor
    items: Tensor
    """``[events]`` numbers of items, in order of time."""
    labels: Tensor
    cut: int
    """First event that is evaluated on."""
    traffic: ItemValues


def _world(config: TableMovesConfig, folder: Path) -> _World:
    write_synthetic(folder, SyntheticConfig(items=config.items, users=500, events=config.events))
    events = pq.read_table(folder / "events.parquet")
    user, item, label = (torch.from_numpy(events[c].to_numpy().copy()) for c in ("user", "item", "label"))
    item = item - FIRST_ITEM_ID
    x = torch.from_numpy(np.load(folder / "item_emb.npy").astype(np.float32))
    cut = int(0.9 * len(item))
    counts = torch.bincount(item[:cut], minlength=config.items)
    traffic = ItemValues(torch.arange(config.items), counts)
    return _World(x, user.long(), item, label.float(), cut, traffic)


class _Generation(NamedTuple):
    quantizer: ResidualKMeans
    catalog: SidCatalog


def _generations(config: TableMovesConfig, world: _World, folder: Path) -> dict[str, _Generation]:
    """SIDs before, after, and after with aligned names."""
    shape = ResidualKMeansConfig(cardinalities=(config.codes,) * 3)
    dim, n = world.x.shape[1], config.items
    before, after = ResidualKMeans(dim, shape), ResidualKMeans(dim, shape)
    before.fit(world.x[: int(0.75 * n)])
    after.fit(world.x[int(0.2 * n) :], start=before if config.warm else None)
    aligned = copy.deepcopy(after)
    done = align_codes(
        aligned, before.encode(world.x), after.encode(world.x), world.traffic.values.double()
    )
    print(done.describe())
    found = {}
    for name, quantizer in (("before", before), ("unaligned", after), ("aligned", aligned)):
        path, codes = folder / name, quantizer.encode(world.x)
        catalog = SidCatalog.create(path, quantizer.spec, torch.arange(n), codes, quantizer.fingerprint)
        found[name] = _Generation(quantizer, catalog)
    return found


class _Ranker(nn.Module):
    """Users' rows and the vector of the item's SID, multiplied and through two layers."""

    def __init__(self, arm: str, generation: _Generation, users: int, pieces: Any) -> None:
        super().__init__()
        catalog = generation.catalog
        scheme = {
            "prefix": lambda: HashedPrefix(3),
            "pieces": lambda: SentencePiece(pieces),
            "side": lambda: Side(
                SideFeaturesConfig("basis"), FrozenBasis.from_quantizer(generation.quantizer), project=True
            ),
        }[arm]()
        dim = 16
        self.bags = SidEmbeddingBagCollection(
            [
                SidEmbeddingBagConfig(
                    name="t_item",
                    embedding_dim=dim,
                    feature_names=["item"],
                    scheme=scheme,
                    spec=catalog.spec,
                    init_fn=_small,
                ),
                EmbeddingBagConfig(
                    name="t_user",
                    embedding_dim=dim,
                    num_embeddings=users,
                    feature_names=["user"],
                    init_fn=_small,
                ),
            ],
            catalog={"item": catalog},
        )
        self.over = nn.Sequential(nn.Linear(3 * dim, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        ones = torch.ones(2 * len(users), dtype=torch.int32)
        batch = KeyedJaggedTensor(["user", "item"], torch.cat([users, items]), lengths=ones)
        found = self.bags(batch)
        user, item = found["user"], found["item"]
        logits: Tensor = self.over(torch.cat([user, item, user * item], dim=1)).squeeze(1)
        return logits


def _small(weight: Tensor) -> None:
    nn.init.normal_(weight, std=0.05)


def _train(model: _Ranker, world: _World, events: Tensor, batch: int, rate: float) -> None:
    optimizer = torch.optim.Adagrad(model.parameters(), lr=rate)
    for rows in events.split(batch):
        logits = model(world.users[rows], world.items[rows])
        loss = nn.functional.binary_cross_entropy_with_logits(logits, world.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _ne(model: _Ranker, world: _World) -> float:
    rows = torch.arange(world.cut, len(world.items))
    logits = model(world.users[rows], world.items[rows])
    loss = nn.functional.binary_cross_entropy_with_logits(logits, world.labels[rows])
    base = world.labels[: world.cut].mean()
    entropy = nn.functional.binary_cross_entropy(base.expand(len(rows)), world.labels[rows])
    return float(loss / entropy)


def measure(config: TableMovesConfig) -> list[dict[str, Any]]:
    """NE of every arm under every change, one row each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = _world(config, folder / "log")
        found = _generations(config, world, folder)
        rows = []
        for arm in ARMS:
            for seed in range(config.seeds):
                rows += [{"arm": arm, "seed": seed, **row} for row in _arm(config, world, found, arm, seed)]
    return rows


def _arm(
    config: TableMovesConfig, world: _World, found: dict[str, _Generation], arm: str, seed: int
) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    before = found["before"]
    codes = before.catalog.codes(torch.arange(config.items))
    pieces = train_pieces(
        before.catalog.spec, codes, PieceTrainerConfig(20 * config.codes), weights=world.traffic.values
    )
    users = int(world.users.max()) + 1
    model = _Ranker(arm, before, users, pieces)
    _train(model, world, torch.arange(world.cut), config.batch, 0.1)
    start = _ne(model, world)
    rows = [{"sids": "before", "tables": "trained", "ne": start, "percent": 0.0}]

    def add(sids: str, tables: str, changed: _Ranker) -> None:
        ne = _ne(changed, world)
        rows.append({"sids": sids, "tables": tables, "ne": ne, "percent": 100 * (ne / start - 1)})

    for sids in ("aligned", "unaligned"):
        left = _Ranker(arm, found[sids], users, pieces)
        cold = copy.deepcopy(left)
        left.load_state_dict(model.state_dict())
        add(sids, "left as they are", left)
        if arm == "side":
            for steps in config.finetune:
                tuned, first = copy.deepcopy(left), world.cut - steps * config.batch
                _train(tuned, world, torch.arange(max(first, 0), world.cut), config.batch, 0.02)
                add(sids, f"fine-tuned {steps} steps", tuned)
            continue
        moved = copy.deepcopy(model)
        move_tables(moved, before.catalog, found[sids].catalog, traffic=world.traffic)
        add(sids, "moved", moved)
        items = {key: value for key, value in cold.state_dict().items() if "t_item" in key}
        cold.load_state_dict({**model.state_dict(), **items})
        add(sids, "cold", cold)
    return rows


def main() -> None:
    """Run, print, and write the rows."""
    from ..cli import parse_config

    config = parse_config(TableMovesConfig, __doc__)
    rows = measure(config)
    for row in rows:
        print(
            f"{row['arm']:8} seed {row['seed']} {row['sids']:10} {row['tables']:22} "
            f"NE {row['ne']:.4f} ({row['percent']:+.2f}%)"
        )
    if config.json:
        write_json(Path(config.json), {"rows": rows})


if __name__ == "__main__":
    main()
