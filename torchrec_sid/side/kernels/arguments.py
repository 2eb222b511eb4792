"""The one check of operator arguments: nothing is read by address that has not passed here.

A registered operator can be called by anyone with anything. Each of its tensors goes through
:func:`check_tensor` (type, shape, device, layout in memory) before a backend sees it, and values that a
backend uses as an index go through the functions below it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from math import inf

import torch
from torch import Tensor

from torchrec_sid.errors import SidError
from torchrec_sid.side.kernels.compiler import load_library

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tensor(
    where: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | str],
    device: torch.device,
) -> Tensor:
    """The tensor, contiguous, if it is what an operator can read.

    Args:
        where: what to call it.
        tensor: the argument.
        dtypes: types that are allowed.
        shape: its axes; a string is the name of an axis of any size.
        device: where it must be.

    Raises:
        SidError: another type, shape or device, or a sparse tensor.
    """
    found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
    wanted = f"[{', '.join(map(str, shape))}] {' or '.join(str(t).removeprefix('torch.') for t in dtypes)}"
    fits = len(shape) == tensor.dim() and all(
        isinstance(axis, str) or axis == size for axis, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes:
        raise SidError(where, found, f"Pass {wanted}.")
    if tensor.layout != torch.strided:
        raise SidError(where, f"a tensor of layout {tensor.layout}", "Pass a dense tensor.")
    if tensor.device != device:
        raise SidError(where, f"on {tensor.device}", f"Move it to {device}, where the others are.")
    return tensor.contiguous()


def check_number(where: str, value: float, low: float, high: float = inf) -> None:
    """Refuse a number outside ``low .. high``; NaN too.

    Raises:
        SidError: naming it.
    """
    if not low <= value <= high:
        bounds = f"{low:g} or more" if high == inf else f"{low:g} to {high:g}"
        raise SidError(where, f"{value:g}", f"Choose {bounds}.")


def check_lengths(lengths: Sequence[int], events: int) -> None:
    """Refuse lengths that do not describe the events.

    Raises:
        SidError: a negative length, or a sum that is not the number of events.
    """
    if any(length < 0 for length in lengths):
        raise SidError("lengths", f"length {min(lengths)}", "A history has 0 events or more.")
    if sum(lengths) != events:
        raise SidError(
            "lengths", f"sum {sum(lengths)} for {events} events", "Pass the number of events of each user."
        )


def check_counts(counts: Sequence[int], candidates: int) -> None:
    """Refuse numbers of candidates per user that do not describe the candidates.

    Raises:
        SidError: a negative count, or a sum that is not the number of candidates.
    """
    if any(count < 0 for count in counts):
        raise SidError("counts", f"count {min(counts)}", "A user has 0 candidates or more.")
    if sum(counts) != candidates:
        raise SidError(
            "counts",
            f"sum {sum(counts)} for {candidates} candidates",
            "Pass the number of candidates of each user.",
        )


def check_limits(limits: Tensor, lengths: Tensor, counts: Tensor) -> None:
    """Refuse a limit below 0 or beyond the history of the candidate's user; waits for a GPU.

    Raises:
        SidError: naming the candidate.
    """
    longest = torch.repeat_interleave(lengths, counts)
    bad = (limits < 0) | (limits > longest)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise SidError(
            "limits",
            f"{int(limits[row])} of candidate {row}, whose user has {int(longest[row])} events",
            "A limit counts the events that a candidate sees, from the oldest: 0 to the length.",
        )


def check_multiplicity(multiplicity: Tensor) -> None:
    """Refuse what is not a positive finite number; waits for a GPU.

    Raises:
        SidError: naming the event.
    """
    bad = ~((multiplicity > 0) & torch.isfinite(multiplicity))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise SidError(
            "multiplicity",
            f"{float(multiplicity[row]):g} of event {row}",
            "Pass how many equal events each stands for, 1 or more; leave out events that do not occur.",
        )


def check_columns(where: str, data: Tensor, values: tuple[int, ...], remedy: str) -> None:
    """Refuse values outside their columns' alphabets; one pass over the bytes, waits for a GPU.

    Args:
        where: what to call the rows.
        data: ``[N, S]`` uint8 or int32, contiguous.
        values: of each column, which holds ``0 .. values - 1``.
        remedy: what to do.

    Raises:
        SidError: naming the first row and column.
    """
    library = load_library().library if data.dtype == torch.uint8 and not data.is_cuda else None
    if library is not None:
        limits = _largest(values)
        library.sid_outside.restype = ctypes.c_int64
        at = library.sid_outside(
            ctypes.c_void_p(data.data_ptr()),
            ctypes.c_int64(data.shape[0]),
            ctypes.c_int64(data.shape[1]),
            ctypes.c_void_p(limits.data_ptr()),
        )
    else:
        bad = (data < 0) | (data.to(torch.int32) >= torch.tensor(values, device=data.device))
        at = int(bad.flatten().nonzero()[0]) if bool(bad.any()) else -1
    if at >= 0:
        row, column = divmod(at, len(values))
        raise SidError(
            where,
            f"value {int(data[row, column])} in column {column} of row {row}, "
            f"outside 0..{values[column] - 1}",
            remedy,
        )


@lru_cache(maxsize=64)
def _largest(values: tuple[int, ...]) -> Tensor:
    return torch.tensor([min(count, 256) - 1 for count in values], dtype=torch.uint8)
