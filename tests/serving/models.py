"""A ranker over SIDs, looked-up ids and raw ids, with every kind of table, and requests for it."""

import torch
from torch import nn
from torchrec import EmbeddingBagConfig, EmbeddingConfig

from tests.distributed.tables_model import CATALOG, ITEMS, SPEC
from torchrec_sid.collections import SidEmbeddingBagCollection, SidEmbeddingCollection
from torchrec_sid.models.target_attention import HistoryConfig, TargetAttention
from torchrec_sid.serving.request import Bags, Request
from torchrec_sid.side import SideFeatures, SideFeaturesConfig
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import (
    HashedId,
    HashedPrefix,
    PieceTrainerConfig,
    SentencePiece,
    Side,
    SidEmbeddingBagConfig,
    SidEmbeddingConfig,
    train_pieces,
)

TRITS = SidSpec((3,) * 7)
DIM, USERS, LONGEST = 8, 20, 6


def random_codes(spec, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, k, (count,), generator=generator) for k in spec.cardinalities], 1)


def vocabulary(model="unigram"):
    return train_pieces(SPEC, random_codes(SPEC, 300, 3) // 2, PieceTrainerConfig(60, model))


class Ranker(nn.Module):
    """Bags, events and digits, one logit."""

    def __init__(self, model="unigram"):
        super().__init__()
        pieces = vocabulary(model)
        one_hot = SideFeaturesConfig("one_hot")
        self.bags = SidEmbeddingBagCollection(
            tables=[
                SidEmbeddingBagConfig(
                    name="b_item",
                    embedding_dim=DIM,
                    feature_names=["item"],
                    scheme=(HashedPrefix(3, num_embeddings=64), HashedId(32), Side(one_hot, project=True)),
                    spec=SPEC,
                ),
                EmbeddingBagConfig(
                    name="b_user", embedding_dim=DIM, num_embeddings=USERS, feature_names=["user"]
                ),
                SidEmbeddingBagConfig(
                    name="b_other", embedding_dim=DIM, feature_names=["other"], scheme=SentencePiece(pieces)
                ),
            ],
            catalog={"other": CATALOG},
        )
        self.events = SidEmbeddingCollection(
            tables=[
                SidEmbeddingConfig(
                    name="e_history",
                    embedding_dim=DIM,
                    feature_names=["history"],
                    scheme=(HashedPrefix(2), SentencePiece(pieces)),
                    spec=SPEC,
                ),
                EmbeddingConfig(
                    name="e_user", embedding_dim=DIM, num_embeddings=USERS, feature_names=["user"]
                ),
            ]
        )
        self.attention = TargetAttention(HistoryConfig(dim=DIM, heads=2, actions=4, max_length=LONGEST))
        self.digits = SideFeatures(TRITS, SideFeaturesConfig("digits"))
        self.out = nn.Linear(3 * DIM + 4 * DIM + TRITS.levels + 3, 1)

    def forward(self, dense, features, item_bytes):
        bags = self.bags(features)
        events = self.events(features)
        summaries = self.attention(bags["item"], events["history"], features).flatten(1)
        parts = [bags.values(), summaries, self.digits(item_bytes), dense]
        return self.out(torch.cat(parts, dim=1)).squeeze(1)


def make_request(rows=7, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def lengths(low, high):
        return torch.randint(low, high + 1, (rows,), generator=generator)

    def sids(count):
        packed = SPEC.pack(random_codes(SPEC, count, seed + 1))
        packed[::5] = -1
        return packed

    history, item, user, other = lengths(1, LONGEST), lengths(0, 2), lengths(1, 2), lengths(0, 3)
    item[0] = other[0] = 2
    events = int(history.sum())
    unknown_too = torch.randint(0, ITEMS * 3 // 2, (int(other.sum()),), generator=generator) * 7
    features = {
        "user": Bags(torch.randint(0, USERS, (int(user.sum()),), generator=generator), user),
        "history": Bags(sids(events), history),
        "history_action": Bags(torch.randint(0, 4, (events,), generator=generator), history),
        "history_age": Bags(torch.randint(0, 40, (events,), generator=generator), history),
        "item": Bags(sids(int(item.sum())), item),
        "other": Bags(unknown_too, other),
    }
    extras = {"item_bytes": TRITS.pack_bytes(random_codes(TRITS, rows, seed))}
    return Request(torch.rand(rows, 3, generator=generator), features, extras, {})


HISTORY = dict.fromkeys(("history", "history_action", "history_age"), LONGEST)
