"""Which row of a table stood for what in an earlier run: by item id, value, piece, not by number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from torchrec_sid.data.encoding import table_of
from torchrec_sid.data.example_features import log_features
from torchrec_sid.data.parquet import Array
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.schema import ItemIndex
from torchrec_sid.data.specification import FIRST_ROW, CategoricalFeature, ItemIdFeature
from torchrec_sid.errors import SidError
from torchrec_sid.models.stores import ItemStore, SidStore
from torchrec_sid.parallel.dcp import RowMoves
from torchrec_sid.parallel.embedding_tables import Table
from torchrec_sid.tables import SidPieces

_OF_ITEMS = ("t_item_id", "t_history_id")
"""Tables with a row per item."""
_OF_KNOWN_ITEMS = ("t_item_known", "t_history_known")
"""Tables whose last row is the item that nobody knows."""
_OF_PIECES = ("t_item_piece", "t_history_piece")


def moved_rows(
    tables: Mapping[str, Table],
    stores: tuple[ItemStore, ...],
    log: PreparedLog,
    earlier: PreparedLog,
    earlier_pieces: str | None,
) -> dict[str, RowMoves]:
    """Where the rows of an earlier run's tables stand in this one's.

    Args:
        tables: of this model.
        stores: of its items.
        log: what it trains on.
        earlier: what the earlier run trained on.
        earlier_pieces: path of that run's SentencePiece vocabulary, where it had one.

    Returns:
        Name of a weight -> moves, for tables whose rows changed; all others stay as they are.

    Raises:
        SidError: what numbers mean has changed: other item ids behind a table, other scales.
    """
    check_scales(log, earlier)
    items = ItemIndex(np.array(earlier.item_ids))(np.array(log.item_ids))
    features = log_features(log)
    pieces = _piece_moves(stores, earlier_pieces)
    found = {}
    for name, table in tables.items():
        feature = next((features[f] for f in table.config.feature_names if f in features), None)
        if name in _OF_ITEMS:
            found[table.weight_key] = _moves(items, earlier.items)
        elif name in _OF_KNOWN_ITEMS or isinstance(feature, ItemIdFeature):
            found[table.weight_key] = _moves(np.append(items, earlier.items), earlier.items + 1)
        elif isinstance(feature, CategoricalFeature) and feature.hash_rows is None:
            found[table.weight_key] = _value_moves(table_of(feature), log, earlier)
        elif name in _OF_PIECES and pieces is not None:
            found[table.weight_key] = pieces
    return {key: m for key, m in found.items() if m.runs != ((0, 0, m.after),) or m.before != m.after}


def check_scales(log: PreparedLog, earlier: PreparedLog) -> None:
    """Refuse a log whose numeric features are scaled or cut otherwise than an earlier one's.

    Raises:
        SidError: naming the feature.
    """
    ours, theirs = log.scales, earlier.scales
    for name in ours:
        if name in theirs and ours[name] != theirs[name]:
            raise SidError(
                f"features.{name}",
                f"is scaled by {ours[name]}, by {theirs[name]} in {earlier.path}",
                "Prepare the log as an extension of the earlier one: prepare(..., extends=...).",
            )


def _value_moves(table: str, log: PreparedLog, earlier: PreparedLog) -> RowMoves:
    now = log.vocabulary(table)
    if table not in earlier.manifest["features"]["rows"]:
        return RowMoves(0, FIRST_ROW + len(now), ())
    before = earlier.vocabulary(table)
    at = pc.index_in(now, value_set=before.cast(now.type)).cast(pa.int64())
    found = at.fill_null(-1).to_numpy(zero_copy_only=False)
    rows = np.concatenate([np.arange(FIRST_ROW), np.where(found >= 0, found + FIRST_ROW, -1)])
    return _moves(rows, FIRST_ROW + len(before))


def _piece_moves(stores: tuple[ItemStore, ...], earlier: str | None) -> RowMoves | None:
    store = next((s for s in stores if isinstance(s, SidStore) and s.pieces is not None), None)
    if store is None or earlier is None:
        return None
    now, before = store.require_pieces(), SidPieces.load(earlier)
    if now.spec != before.spec:
        raise SidError(
            "pieces",
            f"of SIDs {now.spec.cardinalities}, those of {earlier} of {before.spec.cardinalities}",
            "Train pieces on SIDs of one shape.",
        )
    known = {key: row for row, key in enumerate(_piece_keys(before))}
    # The last row is that of items without a SID.
    rows = [*(known.get(key, -1) for key in _piece_keys(now)), len(before)]
    return _moves(np.array(rows), len(before) + 1)


def _piece_keys(pieces: SidPieces) -> list[tuple[int, ...]]:
    return list(map(tuple, torch.stack([pieces.starts, pieces.stops, pieces.bits], 1).tolist()))


def _moves(at: Array, before: int) -> RowMoves:
    """Earlier row of each row, -1 for a new one -> moves."""
    kept = np.flatnonzero(at >= 0)
    source = at[kept]
    starts = np.flatnonzero((np.diff(kept, prepend=-2) != 1) | (np.diff(source, prepend=-2) != 1))
    ends = np.append(starts[1:], len(kept))
    runs = tuple(
        (int(source[a]), int(kept[a]), int(b - a)) for a, b in zip(starts, ends, strict=True) if b > a
    )
    return RowMoves(before, len(at), runs)


def describe_moves(moves: RowMoves) -> dict[str, Any]:
    """Moves in numbers: rows before and now, taken, and drawn anew."""
    return {
        "rows_before": moves.before,
        "rows": moves.after,
        "taken": moves.taken,
        "drawn": moves.after - moves.taken,
    }
