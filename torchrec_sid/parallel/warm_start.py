"""Take the state of another run by name: rows of tables move to where they stand now, the rest starts anew.

An exact resume is :meth:`~torchrec_sid.parallel.checkpoint.CheckpointManager.load`, which refuses whatever
differs. Here a model may have grown since: more rows, another order of rows, another world size or plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchrec_sid.parallel.checkpoint_files import CheckpointInfo, verify_files
from torchrec_sid.parallel.dcp import RowMoves, read_metadata, read_state
from torchrec_sid.parallel.ranks import Ranks
from torchrec_sid.parallel.state import entry_names

_MODEL, _STATE = "model.", "optimizer.state."


class TakenState(NamedTuple):
    """What :func:`take_state` did, the same on every rank; weights by their names in the model."""

    taken: tuple[str, ...]
    """Weights that are those of the checkpoint."""
    grown: dict[str, RowMoves]
    """Tables of which some rows are the checkpoint's: others, or another number of them, than it has."""
    drawn: tuple[str, ...]
    """Weights that the checkpoint does not have in this shape: they start as a new run's."""
    fresh: tuple[str, ...]
    """Weights that were taken or grown while their optimizer's state starts anew: another optimizer, or a
    plan under which it is kept in another way."""
    left: tuple[str, ...]
    """Weights of the checkpoint that this model does not have."""


def take_state(
    info: CheckpointInfo, state: dict[str, Any], moves: Mapping[str, RowMoves], ranks: Ranks
) -> TakenState:
    """Verify a checkpoint and read what fits into ``state``, in place; a collective call.

    Args:
        info: the checkpoint.
        state: of :func:`~torchrec_sid.parallel.state.training_state`, drawn as for a new run, its optimizer
            states made by :func:`~torchrec_sid.parallel.state.prepare_to_load`.
        moves: name of a weight -> where its saved rows go, for tables whose rows changed. The states of its
            optimizer move with it.
        ranks: the processes.

    Raises:
        ArtifactError: a file of the checkpoint is missing, truncated or altered.
        SidError: it cannot be read.
    """
    where = str(info.path)
    mine = sorted(info.files)[ranks.rank :: ranks.size]
    ranks.all(lambda: verify_files(info, mine), where=where, remedy="Restore it from a copy.")
    saved = read_metadata(info.folder).state_dict_metadata
    flat = flatten_state_dict(state)[0]
    sizes = {name: tuple(value.size()) for name, value in flat.items() if hasattr(value, "size")}
    # A rank without a shard of a table has no entry of it.
    all_sizes = {k: v for part in ranks.all(lambda: sizes, where=where) for k, v in part.items()}
    names = set().union(*ranks.all(lambda: entry_names(state), where=where))
    weights = {name.removeprefix(_MODEL) for name in names if name.startswith(_MODEL)}
    owners = {name: _owner(name, weights) for name in names}
    moved, skipped = {}, set()
    for name in sorted(names):
        fit = _fit(saved.get(name), all_sizes.get(name), moves.get(owners[name] or ""))
        if fit is None:
            skipped.add(name)
        elif isinstance(fit, RowMoves):
            moved[name] = fit
    drawn = {name.removeprefix(_MODEL) for name in skipped if name.startswith(_MODEL)}
    # Averages that belong to other weights would be worse than none.
    skipped |= {name for name in names if owners[name] in drawn}
    read_state(state, info.folder, ranks.group, moves=moved, skip=skipped)
    for name in skipped & set(flat):
        if name.endswith(".step") and isinstance(flat[name], Tensor):
            flat[name].zero_()
    return TakenState(
        tuple(sorted(n for n in weights - drawn if _MODEL + n not in moved)),
        {n.removeprefix(_MODEL): m for n, m in moved.items() if n.startswith(_MODEL)},
        tuple(sorted(drawn)),
        tuple(sorted({o for n in skipped if (o := owners[n]) and n.startswith(_STATE)} - drawn)),
        tuple(sorted(n.removeprefix(_MODEL) for n in set(saved) - names if n.startswith(_MODEL))),
    )


def _owner(name: str, weights: set[str]) -> str | None:
    """The weight that an entry is or belongs to."""
    if name.startswith(_MODEL):
        return name.removeprefix(_MODEL)
    parts = name.removeprefix(_STATE).split(".")
    ends = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((end for end in ends if end in weights), None) if name.startswith(_STATE) else None


def _fit(saved: Any, size: tuple[int, ...] | None, moves: RowMoves | None) -> RowMoves | bool | None:
    """How a saved entry is read: as it is (True), by rows, or not at all (None)."""
    if saved is None:
        return None
    if not isinstance(saved, TensorStorageMetadata) or size is None:
        return True
    held = tuple(saved.size)
    if moves is not None and held[:1] == (moves.before,) and size[:1] == (moves.after,):
        return moves if held[1:] == size[1:] else None
    return True if held == size else None
