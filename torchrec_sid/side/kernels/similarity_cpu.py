"""The similarity features on the CPU by the compiled kernel (``similarity.cpp``)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from torchrec_sid.side.kernels.attention_cpu import starts
from torchrec_sid.side.kernels.compiler import c_fields, load_library
from torchrec_sid.side.kernels.similarity_problem import SimilarityProblem

_LANES = 16
_MAX_HOT = 16


class _Similarity(ctypes.Structure):
    _fields_ = c_fields(
        "candidates events event_starts candidate_starts limits multiplicity labels table match levels "
        "temperatures bin_of sums maxima",
        "users columns rank hot bins num_sums num_maxima prefix match_shared threads",
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
    """Features ``[C, n]``; everything in the problem has been checked."""
    library = load_library().library
    assert library is not None  # `unavailable` was asked first
    count, columns = problem.candidates.shape
    sums = torch.zeros(count, problem.num_sums)
    maxima = torch.full((count, problem.num_maxima), -1.0)
    bin_of = problem.bin_of(torch.arange(sum(problem.levels) + 1)) if problem.bins else torch.zeros(1)
    tensors = (
        problem.candidates,
        problem.events,
        starts(problem.lengths),
        starts(problem.counts),
        problem.limits,
        problem.multiplicity,
        problem.labels,
        problem.table,
        problem.match,
        torch.tensor(problem.levels),
        torch.tensor(problem.temperatures, dtype=torch.float32),
        bin_of,
        sums,
        maxima,
    )
    struct = _Similarity(
        *(None if t is None else t.data_ptr() for t in tensors),
        len(problem.lengths),
        columns,
        problem.table.shape[1],
        len(problem.temperatures),
        problem.bins,
        problem.num_sums,
        problem.num_maxima,
        int(problem.prefix),
        int(problem.match.shape[0] == 1),
        torch.get_num_threads(),
    )
    library.sid_similarity(ctypes.byref(struct))
    return problem.finish(sums, maxima)
