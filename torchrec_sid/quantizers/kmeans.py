"""k-means in plain torch: exact Lloyd iterations by matrix products, in chunks, in growing dimension.

Three things make one start enough:

* The points are rotated onto their principal axes and clustered in the leading axes first, the
  dimension doubling with warm centroids until it is full (the idea of faiss's ProgressiveDimClustering).
  In few dimensions k-means finds good partitions; in hundreds, seeding picks outliers.
* After each dimension, clusters that cost little to dissolve are moved to where a split gains more
  (:func:`relocate`). Empty clusters cost nothing, so this repairs them too.
* Centroids of few points are pulled to the origin as far as their own noise warrants
  (:meth:`ClusterSums.centroids`), which lowers the error of points that were not in the fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import pi, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 2048  # rows at a time: the [rows, K] scores stay within the cache
_FIRST_DIM = 16
_ENERGY = 0.99
_SEED_ROWS_PER_CODE = 32
_RELOCATIONS = 8  # rounds at most while codes are free; one otherwise


class Assignment(NamedTuple):
    """The nearest centroid of each point."""

    codes: Tensor
    """``[n]`` int64."""
    score: Tensor
    """``[n]`` float32: ``s = c . x - |c|^2 / 2`` of it; the squared distance is ``|x|^2 - 2 s``."""


def assign(x: Tensor, centroids: Tensor, used: Tensor | None = None) -> Assignment:
    """Nearest centroid of each row, the lowest index on a tie.

    Args:
        x: ``[n, d]`` float32.
        centroids: ``[K, d]`` float32.
        used: ``[K]`` bool; centroids that are False are never chosen. All are, by default.
    """
    bias = -0.5 * centroids.square().sum(1)
    if used is not None:
        bias = bias.masked_fill(~used, -torch.inf)
    codes = torch.empty(len(x), dtype=torch.int64, device=x.device)
    score = torch.empty(len(x), dtype=x.dtype, device=x.device)
    transposed = centroids.T
    for begin in range(0, len(x), _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        torch.max(torch.addmm(bias, x[rows], transposed), dim=1, out=(score[rows], codes[rows]))
    return Assignment(codes, score)


def sum_by_code(values: Tensor, codes: Tensor, k: int) -> Tensor:
    """Sums of the rows of ``values`` ``[n, d]`` that share a code: ``[K, d]``, deterministic."""
    if values.device.type == "cpu":
        return values.new_zeros(k, values.shape[1]).index_add_(0, codes, values)
    # index_add_ adds in any order on an accelerator; a matrix product does not.
    total = values.new_zeros(k, values.shape[1])
    for v, c in zip(values.split(_CHUNK), codes.split(_CHUNK), strict=True):
        total += torch.nn.functional.one_hot(c, k).to(values.dtype).T @ v
    return total


@dataclass
class ClusterSums:
    """What a Lloyd step needs to know of the points of each cluster; adds up over batches."""

    count: Tensor
    """``[K]`` float64."""
    total: Tensor
    """``[K, d]`` float64, the sum of each cluster's points."""
    energy: float
    """Sum of ``|x|^2`` over all points."""

    @classmethod
    def empty(cls, k: int, dim: int, device: torch.device) -> ClusterSums:
        """No points yet."""
        zeros = torch.zeros(k, dim, dtype=torch.float64, device=device)
        return cls(zeros[:, 0].clone(), zeros, 0.0)

    def add(self, x: Tensor, codes: Tensor) -> None:
        """Count points ``[n, d]`` with their codes ``[n]``."""
        self.count += torch.bincount(codes, minlength=len(self.count))
        self.total += sum_by_code(x, codes, len(self.count))
        self.energy += float(x.square().sum(dtype=torch.float64))

    def means(self) -> Tensor:
        """``[K, d]`` float64; empty clusters are at the origin."""
        return self.total / self.count.clamp(min=1).unsqueeze(1)

    def centroids(self, shrinkage: float = 0.0) -> Tensor:
        """Means times ``n_k / (n_k + shrinkage * s^2 / t^2)``, so pulled to the origin: ``[K, d]`` float32.

        With ``shrinkage`` 1 this is the empirical-Bayes estimate of a centroid under a Gaussian prior
        around the origin: ``s^2`` is the variance within clusters (SSE over N - K), ``t^2`` the variance
        of the centroids beyond what noise of size ``s^2 / n_k`` explains. Ours.
        """
        factor = self.count / (self.count + self.prior_count(shrinkage)).clamp(min=1e-30)
        return (self.means() * factor.unsqueeze(1)).float()

    def prior_count(self, shrinkage: float = 1.0) -> float:
        """Points at the origin that pull as much as the prior of :meth:`centroids` does."""
        if shrinkage == 0:
            return 0.0
        rows, between = float(self.count.sum()), float((self.means().square().sum(1) * self.count).sum())
        clusters = int((self.count > 0).sum())
        within = max(self.energy - between, 0.0) / max(rows - clusters, 1)
        # At least a tenth of the apparent signal is believed, so that a level is never all zeros.
        signal = max(between - clusters * within, 0.1 * between) / max(rows, 1)
        return 0.0 if signal == 0 else shrinkage * within / signal


def cluster_sums(x: Tensor, codes: Tensor, k: int) -> ClusterSums:
    """The sums of one batch."""
    sums = ClusterSums.empty(k, x.shape[1], x.device)
    sums.add(x, codes)
    return sums


def plus_plus(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): ``[K', d]`` different rows of ``x``, ``K' <= k``."""
    square = x.square().sum(1)
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    # Distances below rounding are zero: duplicates of a seed must not be chosen again.
    floor = 1e-6 * float(square.max())
    distance = (x - x[chosen[0]]).square().sum(1)
    for _ in range(k - 1):
        distance[distance <= floor] = 0
        reach = distance.cpu().cumsum(0, dtype=torch.float64)
        if float(reach[-1]) <= 0:
            break
        point = torch.rand(1, generator=generator, dtype=torch.float64) * reach[-1]
        index = min(int(torch.searchsorted(reach, point, right=True)), len(x) - 1)
        chosen.append(index)
        new = torch.addmv(square + square[index], x, x[index], alpha=-2)
        torch.minimum(distance, new, out=distance)
    return x[torch.tensor(chosen, device=x.device)].clone()


def lloyd(x: Tensor, centroids: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Lloyd iterations until the error falls by less than the fraction ``tolerance``: ``[K, d]``."""
    energy = float(x.square().sum(dtype=torch.float64))
    last = torch.inf
    for _ in range(iterations):
        codes, score = assign(x, centroids)
        error = energy - 2 * float(score.sum(dtype=torch.float64))
        count = torch.bincount(codes, minlength=len(centroids)).unsqueeze(1)
        means = sum_by_code(x, codes, len(centroids)) / count.clamp(min=1)
        centroids = torch.where(count > 0, means, centroids)
        if error >= (1 - tolerance) * last:
            break
        last = error
    return centroids


class Relocation(NamedTuple):
    """What :func:`relocate` returns."""

    centroids: Tensor
    """``[K', d]``, none of them empty; ``K' <= k``."""
    moved: int
    """How many clusters were dissolved, or were free, and are elsewhere now."""


def relocate(x: Tensor, centroids: Tensor, k: int) -> Relocation:
    """Move clusters that cost little to dissolve to clusters that gain more by a split.

    Dissolving cluster i into its neighbour j costs ``n_i n_j / (n_i + n_j) |c_i - c_j|^2`` (Ward 1963);
    an empty one costs nothing. Splitting one along its principal direction gains about ``2 / pi`` of the
    error in that direction (exact for a Gaussian). No cluster takes part twice.

    Args:
        x: ``[n, d]`` float32 on principal axes; splits are sought in the leading 16.
        centroids: ``[K', d]`` float32, ``K' <= k``.
        k: clusters wanted; the missing ``k - K'`` are placed by splits too.
    """
    codes, _ = assign(x, centroids)
    count = torch.bincount(codes, minlength=k).to(x.dtype)
    means = sum_by_code(x, codes, k) / count.clamp(min=1).unsqueeze(1)
    error, direction = _principal_directions(x, codes, means)
    # Below this the spread of a cluster of equal points is rounding.
    error[error <= 1e-8 * float(x.square().sum()) / len(x) * count] = 0
    cost, near = _cheapest_mergers(means, count)
    cost[count == 0] = 0
    moves = _pair_moves((error * (2 / pi)).tolist(), cost.tolist(), near.tolist(), (count == 0).tolist())
    for source, split in moves:
        step = sqrt(2 / pi * float(error[split]) / float(count[split])) * direction[split]
        means[source] = means[split]
        means[source, : len(step)] += step
        means[split, : len(step)] -= step
        count[source] = 1
    return Relocation(means[count > 0], len(moves))


def _cheapest_mergers(means: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Per cluster the least cost of dissolving it ``[K]``, and into which ``[K]``, some rows at a time."""
    cost, near = torch.empty_like(count), torch.empty_like(count, dtype=torch.int64)
    for begin in range(0, len(means), _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        own = count[rows].unsqueeze(1)
        merger = torch.cdist(means[rows], means).square_().mul_(own * count / (own + count).clamp(min=1))
        merger.diagonal(begin).fill_(torch.inf)
        merger[:, count == 0] = torch.inf
        cost[rows], near[rows] = merger.min(1)
    return cost, near


def _principal_directions(x: Tensor, codes: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Per cluster the error along its principal direction ``[K]`` and that direction ``[K, <= 16]``."""
    dim = min(_FIRST_DIM, x.shape[1])
    products = means.new_zeros(len(means), dim * dim)
    for begin in range(0, len(x), _CHUNK):
        code = codes[begin : begin + _CHUNK]
        left = x[begin : begin + _CHUNK, :dim] - means[code, :dim]
        products += sum_by_code((left.unsqueeze(2) * left.unsqueeze(1)).flatten(1), code, len(means))
    values, vectors = torch.linalg.eigh(products.view(-1, dim, dim))
    return values[:, -1].clamp(min=0), vectors[:, :, -1]


def _pair_moves(
    gain: list[float], cost: list[float], near: list[int], empty: list[bool]
) -> list[tuple[int, int]]:
    """Cheapest clusters against dearest ones, while the split gains more than the merger costs."""
    splits = sorted(range(len(gain)), key=lambda i: -gain[i])
    busy: set[int] = set()
    moves = []
    at = 0
    for source in sorted(range(len(cost)), key=lambda i: cost[i]):
        if source in busy or (not empty[source] and near[source] in busy):
            continue
        while at < len(splits) and splits[at] in busy:
            at += 1
        if at == len(splits) or splits[at] == source or gain[splits[at]] <= cost[source]:
            break
        split = splits[at]
        if not empty[source] and near[source] == split:
            continue
        moves.append((source, split))
        busy.update((source, split) if empty[source] else (source, split, near[source]))
    return moves


def _growing_dims(full: int) -> Iterator[int]:
    dim = min(_FIRST_DIM, full)
    while dim < full:
        yield dim
        dim *= 2
    yield full


def fit_centroids(
    x: Tensor, k: int, *, iterations: int, tolerance: float, generator: torch.Generator
) -> Tensor:
    """Cluster points into ``k``: the module's recipe from seeding to the last Lloyd iteration.

    Args:
        x: ``[n, d]`` float32 in random order; a prefix of it serves as a sample.
        k: number of centroids.
        iterations: Lloyd iterations in the largest dimension; a quarter as many in each lower one.
        tolerance: stop a run of iterations whose error falls by less than this fraction.
        generator: source of randomness, on the CPU.

    Returns:
        ``[K', d]`` float32; ``K' < k`` where there are fewer different rows than ``k``.
    """
    k = min(k, len(x))  # there are no more different rows
    spread, axes = torch.linalg.eigh(x.T @ x)
    energy, axes = spread.clamp(min=0).flip(0).cumsum(0), axes.flip(1)
    # Axes that hold the last hundredth of the energy are noise to the search; the result has them again.
    largest = max(_FIRST_DIM, 1 + int((energy < _ENERGY * energy[-1]).sum()))
    rotated = x @ axes
    # The lower dimensions only prepare the last one, and half the points prepare it as well.
    sample = rotated[: max(len(x) // 2, min(len(x), 64 * k))]
    few, settled = max(1, iterations // 4), False
    centroids = None
    for dim in _growing_dims(min(largest, x.shape[1])):
        last = dim >= largest or dim == x.shape[1]
        points = (rotated if last else sample)[:, :dim].contiguous()
        if centroids is None:
            centroids = plus_plus(points[: _SEED_ROWS_PER_CODE * k], k, generator)
        else:
            centroids = _extend(points, centroids)
        centroids = lloyd(points, centroids, iterations if last else few, tolerance)
        # Once no cluster wants to move, only free ones are looked after.
        for _ in range(_RELOCATIONS):
            if settled and len(centroids) == k:
                break
            centroids, moved = relocate(points, centroids, k)
            settled = moved == 0
            if settled:
                break
            centroids = lloyd(points, centroids, few, tolerance)
            if len(centroids) == k:
                break
    assert centroids is not None
    return _extend(rotated, centroids) @ axes.T


def _extend(points: Tensor, centroids: Tensor) -> Tensor:
    """Centroids found in fewer dimensions, as the means of their clusters in all of ``points``'s."""
    codes, _ = assign(points[:, : centroids.shape[1]].contiguous(), centroids)
    count = torch.bincount(codes, minlength=len(centroids)).unsqueeze(1)
    return (sum_by_code(points, codes, len(centroids)) / count.clamp(min=1))[count.squeeze(1) > 0]
