"""What the gradient quantizers ask of the other processes of a fit: sums, rows, one decision for all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrec_sid.quantizers.sample import StreamMoments


class Collectives:
    """The processes that fit together; without a group, one process and no communication.

    Every method is collective: all ranks call it in the same order with the same shapes (except
    :meth:`gather_rows`, whose row counts may differ). Results are bit-equal on all ranks.

    Args:
        group: process group of the fit, e.g. ``torch.distributed.group.WORLD``; None fits alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over ranks, in one message per dtype."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for same in by_dtype.values():
            flat = torch.cat([t.reshape(-1) for t in same])
            dist.all_reduce(flat, group=self._group)
            for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def mean_gradients_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over ranks; one that is missing everywhere counts as 0."""
        if self.size == 1:
            return
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.sum_(gradients)
        for gradient in gradients:
            gradient.div_(self.size)

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite each tensor by that of rank 0."""
        if self.size == 1:
            return
        assert self._group is not None
        source = dist.get_global_rank(self._group, 0)
        for tensor in tensors:
            # gloo has no bool; the copy also serves tensors that are not contiguous.
            sent = tensor.detach().to(torch.uint8 if tensor.dtype == torch.bool else tensor.dtype)
            sent = sent.clone().contiguous()
            dist.broadcast(sent, source, group=self._group)
            with torch.no_grad():
                tensor.copy_(sent)

    def agree(self, decision: bool) -> bool:
        """What rank 0 decided."""
        on_gpu = self._group is not None and dist.get_backend(self._group) == "nccl"
        flag = torch.tensor([int(decision)], device="cuda" if on_gpu else "cpu")
        self.broadcast_([flag])
        return bool(flag)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows ``[n_r, ...]`` of all ranks in rank order, ``[sum n_r, ...]``; counts may differ."""
        if self.size == 1:
            return rows
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.zeros_like(count) for _ in range(self.size)]
        dist.all_gather(counts, count, group=self._group)
        most = max(int(c) for c in counts)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded, group=self._group)
        return torch.cat([g[: int(c)] for g, c in zip(gathered, counts, strict=True)])

    def own_rows(self, batches: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
        """This rank's share of batches of aligned tensors: rows ``rank, rank + size, ...``."""
        begin = 0
        for batch in batches:
            first = (self.rank - begin) % self.size
            begin += len(batch[0])
            own = tuple(t[first :: self.size] for t in batch)
            if len(own[0]):
                yield own

    def merge_moments(self, moments: StreamMoments) -> StreamMoments:
        """The moments of the rows of all ranks; the sample is that of all ranks, in rank order."""
        if self.size == 1:
            return moments
        rows = torch.tensor(float(moments.rows), dtype=torch.float64, device=moments.mean.device)
        mean, square = moments.mean * rows, moments.covariance * rows
        square += torch.outer(moments.mean, moments.mean) * rows
        self.sum_([rows, mean, square])
        mean, square = mean / rows, square / rows
        sample = self.gather_rows(moments.sample)
        return StreamMoments(int(rows), mean, square - torch.outer(mean, mean), sample)
