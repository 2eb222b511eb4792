"""The similarity features on the CPU by the compiled kernel (``similarity.cpp``)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from torchrec_sid.side.kernels.compiler import c_fields, load_library
from torchrec_sid.side.kernels.similarity_problem import SimilarityProblem

_LANES = 16
_MAX_HOT = 16


class _Similarity(ctypes.Structure):
    _fields_ = c_fields(
        "candidates events offsets labels table match levels temperatures bin_of order scratch sums maxima",
        "users per_user columns rank hot bins num_sums num_maxima prefix match_shared threads "
        "scratch_floats",
    )


def unavailable(problem: SimilarityProblem) -> str:
    """Why the compiled kernel cannot compute this problem; empty if it can."""
    if problem.events.device.type != "cpu":
        return "the tensors are not on the CPU"
    if problem.table.dtype != torch.float32:
        return f"it computes in float32, not {problem.table.dtype}"
    if not problem.match.shape[0]:
        return "a column of the history needs more than a byte"
    if problem.table.shape[1] % _LANES or len(problem.temperatures) > _MAX_HOT:
        return f"it needs whole vectors of {_LANES} and at most {_MAX_HOT} temperatures"
    return load_library().reason


def forward(problem: SimilarityProblem) -> Tensor:
    """Features ``[U, m, n]``; the lengths have been checked against the events."""
    library = load_library().library
    assert library is not None  # `unavailable` was asked first
    users, per_user, columns = problem.candidates.shape
    rank, threads = problem.table.shape[1], torch.get_num_threads()
    sums = torch.zeros(users, per_user, problem.num_sums)
    maxima = torch.full((users, per_user, problem.num_maxima), -1.0)
    lengths = problem.lengths.to(torch.int64)
    offsets = torch.zeros(users + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    bin_of = problem.bin_of(torch.arange(sum(problem.levels) + 1)) if problem.bins else torch.zeros(1)
    library.sid_similarity_scratch.restype = ctypes.c_int64
    scratch_floats = library.sid_similarity_scratch(ctypes.c_int64(rank), ctypes.c_int64(per_user))
    tensors = (
        problem.candidates.contiguous(),
        problem.events.contiguous(),
        offsets,
        None if problem.labels is None else problem.labels.to(torch.float32).contiguous(),
        problem.table.contiguous(),
        problem.match.contiguous(),
        torch.tensor(problem.levels),
        torch.tensor(problem.temperatures, dtype=torch.float32),
        bin_of,
        lengths.argsort(descending=True),
        torch.empty(threads * scratch_floats),
        sums,
        maxima,
    )
    struct = _Similarity(
        *(None if t is None else t.data_ptr() for t in tensors),
        users,
        per_user,
        columns,
        rank,
        len(problem.temperatures),
        problem.bins,
        problem.num_sums,
        problem.num_maxima,
        int(problem.prefix),
        int(problem.match.shape[0] == 1),
        threads,
        scratch_floats,
    )
    library.sid_similarity(ctypes.byref(struct))
    return problem.finish(sums, maxima)
