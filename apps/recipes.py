"""Recipes: what each row of the papers' tables is, as complete configurations.

Sizes and shapes were chosen on the validation split of ml1m (docs/results.md records the search) and hold
for every log; table sizes follow the number of items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torchrec_sid.learn import SidRecipe
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.quantizers import (
    DiscretePcaConfig,
    ResidualKMeansConfig,
    RqVaeConfig,
    VqFusionConfig,
)
from torchrec_sid.tables import PieceTrainerConfig

from .rows import Comparison, Row

TRITS = {5: 25, 10: 50, 16: 80}
"""Bytes of a SIDE SID -> its digits."""
_PREFIX = SidRecipe(ResidualKMeansConfig((16, 16, 16)))
LONG_HISTORIES = (64, 256, 1024, 4096)
"""Events kept, where the length of the history is what varies."""


def _fused_trits(digits: int) -> SidRecipe:
    return SidRecipe(VqFusionConfig(codebooks=(), stages=((digits, 3),)))


def generalization(items: int) -> Comparison:
    """Table 1: "Better Generalization with Semantic IDs" (arXiv 2306.08121).

    Ways to fill the same number of rows, at three table sizes, with the user's history and without.
    """
    sizes = (items // 16, items // 4, items)
    vocabularies = {
        f"pieces{size}": replace(_PREFIX, pieces=PieceTrainerConfig(size - 1)) for size in sizes
    }
    rows = []
    for length, when in ((64, "with history"), (0, "without history")):
        model = RankingConfig(arm="random_hash", history_length=length)
        middle = f"random_hash {sizes[1]} {when}"
        for arm in ("dense", "per_level"):
            tables = "prefix" if arm == "per_level" else None
            rows.append(Row(f"{arm} {when}", replace(model, arm=arm), tables, against=middle))
        for size in sizes:
            sized = replace(model, table_rows=size)
            reference = f"random_hash {size} {when}"
            rows.append(Row(reference, sized, against=reference))
            for arm, tables in (
                ("bigram", "prefix"),
                ("hashed_prefix", "prefix"),
                ("sentencepiece", f"pieces{size}"),
            ):
                rows.append(Row(f"{arm} {size} {when}", replace(sized, arm=arm), tables, against=reference))
        control = replace(model, arm="hashed_prefix", table_rows=sizes[1])
        name = f"hashed_prefix {sizes[1]} shuffled {when}"
        rows.append(Row(name, control, "prefix", against=middle, shuffled=True))
    return Comparison(
        "Better Generalization with Semantic IDs: equal rows, filled in different ways",
        tuple(rows),
        {"prefix": _PREFIX, **vocabularies},
        cost="table_rows",
    )


def production(items: int) -> Comparison:
    """Table 2: "SIDE" (arXiv 2506.16698): what content adds to a ranker as companies have it.

    The base has every feature of the log's specification, ids and a trained row for unknown ones. Each way
    to add content has similarity features over what it holds: decoded digits, raw cosines, shared prefixes.
    Every training is validated and ends with its best state.
    """
    base = RankingConfig(arm="known_id", table_rows=max(256, items // 4))
    sids = {
        "prefix 2 bytes": _PREFIX,
        "side 5 bytes": SidRecipe(DiscretePcaConfig.trits(TRITS[5])),
        "side 16 bytes": SidRecipe(DiscretePcaConfig.trits(TRITS[16])),
        "side fused 1 byte": _fused_trits(5),
        "side fused 5 bytes": _fused_trits(25),
    }

    def added(channels: str) -> RankingConfig:
        return replace(base, arm=f"known_id+{channels}")

    rows = [
        Row("no item", replace(base, arm="none"), bare=True),
        Row("base without ids", replace(base, arm="none")),
        Row("base", base),
        Row("+ identity", added("identity")),
        Row("+ prefix 2 bytes", added("hashed_prefix"), "prefix 2 bytes"),
        Row("+ prefix 2 bytes + overlap", added("hashed_prefix+overlap"), "prefix 2 bytes"),
        # The SIDs of SIDE through tables: what the SIDs are worth, and what SIDE is.
        Row(
            "+ prefixes of side fused 1 byte + overlap", added("hashed_prefix+overlap"), "side fused 1 byte"
        ),
    ]
    rows += [Row(f"+ {name}", added("side"), side=name) for name in sids if name.startswith("side")]
    rows += [
        Row("+ cosine", added("cosine")),
        Row("+ dense", added("dense")),
        Row("+ dense + cosine", added("dense+cosine")),
        Row("+ dense + cosine of every source", added("dense+cosine"), every_source=True),
        Row(
            "+ prefix 2 bytes + overlap + side fused 1 byte",
            added("hashed_prefix+overlap+side"),
            "prefix 2 bytes",
            "side fused 1 byte",
        ),
    ]
    return Comparison(
        "SIDE: what content adds to a ranker with ids, metadata and counters",
        tuple(rows),
        sids,
        reference="base",
        none="no item",
        features="base without ids",
        training={"evaluate_every": 160, "patience": 3},
    )


def side(items: int) -> Comparison:
    """Table 2-bare: the same over ids alone, one pass, similarity features in the arms of SIDE only."""
    base = RankingConfig(arm="full_id", table_rows=max(256, items // 4))
    shape = (64, 64, 64, 64)
    sids = {
        "prefix 2 bytes": _PREFIX,
        "prefix 3 bytes": SidRecipe(ResidualKMeansConfig(shape)),
        "rq_vae 3 bytes": SidRecipe(RqVaeConfig(cardinalities=shape)),
        "fused 5 bytes": SidRecipe(VqFusionConfig()),
        **{f"side {size} bytes": SidRecipe(DiscretePcaConfig.trits(n)) for size, n in TRITS.items()},
        "side fused 1 byte": _fused_trits(5),
        "side fused 2 bytes": _fused_trits(10),
        "side fused 5 bytes": _fused_trits(25),
        "side fused 10 bytes": _fused_trits(50),
    }
    rows = [Row("full_id", base)]
    prefixes = replace(base, arm="full_id+hashed_prefix")
    for name in ("prefix 2 bytes", "prefix 3 bytes", "rq_vae 3 bytes", "fused 5 bytes"):
        rows.append(Row(f"+ {name}", prefixes, tables=name))
    # The same SIDs as a row of SIDE, through tables: what the SIDs are worth, and what SIDE is.
    rows.append(Row("+ prefixes of side fused 1 byte", prefixes, tables="side fused 1 byte"))
    for name in sids:
        if name.startswith("side"):
            rows.append(Row(f"+ {name}", replace(base, arm="full_id+side"), side=name))
    dense = replace(base, arm="full_id+dense")
    rows.append(Row("+ dense", dense))
    rows.append(Row("+ dense of every source", dense, every_source=True))
    both = replace(base, arm="full_id+hashed_prefix+side")
    for tables, codes in (
        ("prefix 2 bytes", "side 5 bytes"),
        ("prefix 2 bytes", "side 16 bytes"),
        ("prefix 2 bytes", "side fused 1 byte"),
        ("prefix 2 bytes", "side fused 5 bytes"),
        ("fused 5 bytes", "side fused 5 bytes"),
    ):
        rows.append(Row(f"+ {tables} + {codes}", both, tables, codes))
    return Comparison("SIDE: what content adds to a ranker over full ids", tuple(rows), sids)


def long_histories(items: int) -> Comparison:
    """Table 3, first part: NE and training time against the length of the history.

    The arm without items tells what actions and times alone are worth.
    """
    rows = []
    for arm in ("none", "full_id", "dense", "side"):
        for length in LONG_HISTORIES:
            model = RankingConfig(arm=arm, history_length=length)
            codes = "side fused 5 bytes" if arm == "side" else None
            rows.append(Row(f"{arm} {length}", model, side=codes, against=f"{arm} {LONG_HISTORIES[0]}"))
    sids = {"side fused 5 bytes": _fused_trits(25)}
    return Comparison("NE against the length of the history", tuple(rows), sids, cost="train_seconds")


def one_dial(items: int) -> Comparison:
    """Table 3, second part: NE against bytes per event; single schemes, and combinations of two."""
    sids = {
        f"side {digits} trits": SidRecipe(DiscretePcaConfig.trits(digits)) for digits in (10, 25, 50, 80)
    }
    sids |= {f"side fused {digits} trits": _fused_trits(digits) for digits in (10, 25, 50)}
    rows = [Row(name, RankingConfig(arm="side"), side=name) for name in sids]
    sids["prefix"] = _PREFIX
    model = RankingConfig(arm="hashed_prefix", table_rows=items // 4)
    fused = "side fused 25 trits"
    rows.append(Row("hashed_prefix", model, "prefix"))
    rows.append(Row(f"hashed_prefix + {fused}", replace(model, arm="hashed_prefix+side"), "prefix", fused))
    rows.append(Row("random_hash", replace(model, arm="random_hash")))
    rows.append(Row(f"random_hash + {fused}", replace(model, arm="random_hash+side"), side=fused))
    rows.append(Row("full_id", replace(model, arm="full_id")))
    rows.append(Row(f"full_id + {fused}", replace(model, arm="full_id+side"), side=fused))
    rows.append(Row("dense", replace(model, arm="dense")))
    rows.append(Row("dense of every source", replace(model, arm="dense"), every_source=True))
    return Comparison("NE against bytes per event", tuple(rows), sids)


def new_items(items: int) -> Comparison:
    """Table 3, third part: items appended to the catalog after training, against the same without content.

    The models are the same, and so are the results on items of the training period.
    """
    sids = {"prefix": _PREFIX, "side": _fused_trits(25)}
    rows = [Row("full_id", RankingConfig(arm="full_id"))]
    for arm, tables, codes in (
        ("hashed_prefix", "prefix", None),
        ("side", None, "side"),
        ("full_id+side", None, "side"),
    ):
        model = RankingConfig(arm=arm, table_rows=items // 4)
        hidden = f"{arm}, new items without SID"
        rows.append(Row(hidden, model, tables, codes, against=hidden, hide_new=True))
        rows.append(Row(f"{arm}, new items appended", model, tables, codes, against=hidden))
    return Comparison("New items appended to the catalog after training", tuple(rows), sids)


def transformer(items: int) -> Comparison:
    """The same arms in a transformer ranker with a DCN-v2 interaction."""
    base = RankingConfig(
        arm="full_id", table_rows=items // 4, encoder_layers=2, interaction="dcn", history_length=64
    )
    sids = {"prefix": _PREFIX, "side": _fused_trits(25)}
    rows = [
        Row(
            arm,
            replace(base, arm=arm),
            "prefix" if "prefix" in arm else None,
            "side" if "side" in arm else None,
        )
        for arm in ("full_id", "random_hash", "hashed_prefix", "side", "full_id+side", "dense")
    ]
    return Comparison("A transformer ranker with cross layers", tuple(rows), sids)


TABLES: dict[str, Callable[[int], Comparison]] = {
    "1": generalization,
    "2": production,
    "2-bare": side,
    "3-history": long_histories,
    "3-bytes": one_dial,
    "3-new": new_items,
    "4": transformer,
}
"""Name of a table -> its recipe, given the number of items."""
