"""`SimilarityFeatures`: how a candidate resembles what the user liked, by frozen geometry alone.

The cosine of the candidate with every event of the history, in the decoded space of the SIDs, pooled in a
few fixed ways. No parameter, no table to learn: a cold item has features as good as an old one's. The
cosine goes through the Gram matrix of the decoder, so that digits whose directions repeat or overlap count
for what they are (counting equal digits does not do that).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from torchrec_sid.devices import buffer_device
from torchrec_sid.errors import SidError
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.side.event_layout import event_columns
from torchrec_sid.side.kernels.arguments import check_lengths
from torchrec_sid.side.kernels.similarity_operator import similarity_features
from torchrec_sid.side.kernels.similarity_problem import HOTTEST


@dataclass(frozen=True)
class SimilarityConfig:
    """Which features; their names and order are :attr:`names`."""

    temperatures: tuple[float, ...] = (3.0, 10.0, 30.0)
    """Inverse temperatures t of the pools by ``exp(t cos)``; above 0, at most 43."""
    labels: bool = True
    """Use the labels of past events: label pools, signed mean, and maximum over liked and over disliked."""
    agreement_bins: int = 0
    """Bins of the histogram of events by the share of levels at which they agree with the candidate."""
    agreement: Literal["count", "prefix"] = "count"
    """Count equal levels, or the levels before the first difference (for hierarchical codes)."""
    centred: bool = True
    """Leave out the mean of the basis: cosine of deviations from the average item."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(float(t) for t in self.temperatures))
        if not all(0 < t <= HOTTEST for t in self.temperatures):
            raise SidError(
                "SimilarityConfig.temperatures",
                str(self.temperatures),
                f"Choose above 0, at most {HOTTEST:g}.",
            )
        if not 0 <= self.agreement_bins <= 64:
            raise SidError("SimilarityConfig.agreement_bins", str(self.agreement_bins), "Choose 0 to 64.")
        if self.agreement not in ("count", "prefix"):
            raise SidError("SimilarityConfig.agreement", repr(self.agreement), "Choose count or prefix.")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the features, in order.

        ``max``, ``mean``: of the cosine. ``soft_max@t``: ``1 + log(mean exp(t (cos - 1))) / t``, between
        the two. ``label@t``: mean label under weights ``softmax(t cos)``. ``signed_mean``: mean of cosine
        times label. ``max_liked``, ``max_disliked``: largest cosine over positive, negative labels.
        ``agreement_i``: share of events in bin i. Where nothing is pooled, maxima (soft ones too) are -1
        and the rest 0.
        """
        hot = [f"{t:g}" for t in self.temperatures]
        names = ["max", "mean", *(f"soft_max@{t}" for t in hot)]
        if self.labels:
            names += [*(f"label@{t}" for t in hot), "signed_mean", "max_liked", "max_disliked"]
        return (*names, *(f"agreement_{i}" for i in range(self.agreement_bins)))


class SimilarityFeatures(nn.Module):
    """Candidates against histories of packed SIDs -> ``[B, len(names)]`` float32, no gradient.

    Args:
        basis: the frozen decoder of the SIDs.
        config: which features.
        device: of the buffers; the meta device is not honoured.

    Example:
        >>> from torchrec_sid import SidSpec
        >>> spec = SidSpec((3,) * 25)
        >>> side = SimilarityFeatures(FrozenBasis.from_digits(spec, torch.randn(25, 64)))
        >>> candidates = spec.pack_bytes(torch.randint(3, (2, 25)))
        >>> history = spec.pack_bytes(torch.randint(3, (7, 25)))  # 3 events of one user, 4 of another
        >>> labels = torch.tensor([1.0, -1, 1, 1, 1, -1, 0])
        >>> side(candidates, history, torch.tensor([3, 4]), labels).shape == (2, len(side.names))
        True
    """

    table: Tensor
    match: Tensor

    def __init__(
        self,
        basis: FrozenBasis,
        config: SimilarityConfig | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.config = basis.spec, config or SimilarityConfig()
        self.backend: Literal["auto", "torch", "cpu"] = "auto"
        device = buffer_device(device)
        groups = self.spec.byte_groups or tuple((i, i + 1) for i in range(self.spec.levels))
        self.levels = [stop - start for start, stop in groups]
        self.values = [prod(self.spec.cardinalities[start:stop]) for start, stop in groups]
        self.register_buffer("table", _coordinates(basis, groups, self.config.centred).to(device))
        radices = [self.spec.cardinalities[a:b] for a, b in groups]
        self.register_buffer(
            "match", _match_table(radices, self.config.agreement).to(device), persistent=False
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the features, in order."""
        return self.config.names

    @torch.no_grad()
    def forward(
        self,
        candidate_bytes: Tensor,
        history_bytes: Tensor,
        lengths: Tensor,
        labels: Tensor | None = None,
        counts: Tensor | None = None,
        limits: Tensor | None = None,
    ) -> Tensor:
        """Compute the features.

        Args:
            candidate_bytes: ``[B, nbytes]`` uint8, or ``[B, m, nbytes]`` for m candidates per user, or with
                ``counts`` ``[C, nbytes]``, user after user.
            history_bytes: ``[E, nbytes]`` uint8, user after user.
            lengths: ``[B]`` integers that sum to E.
            labels: ``[E]`` numbers, where ``config.labels`` is set: positive liked, negative disliked, zero
                neither, at best within -1 .. 1 (a click log of 0 and 1 passes ``2 * label - 1``).
            counts: ``[B]`` integers, candidates of each user; they sum to C.
            limits: with ``counts``, ``[C]`` integers: a candidate sees that many events of its user, from
                the oldest.

        Returns:
            ``[B, n]``, ``[B, m, n]`` or ``[C, n]`` float32.

        Raises:
            SidError: shapes, codes outside the alphabet (on a GPU they give NaN), lengths that do not sum,
                labels missing.
        """
        self._check(candidate_bytes, history_bytes, lengths, labels, counts, limits)
        single = candidate_bytes.dim() == 2 and counts is None
        events = event_columns(self.spec, history_bytes)
        flat = event_columns(self.spec, candidate_bytes.flatten(0, -2))
        if counts is None:
            flat = flat.unflatten(0, (candidate_bytes.shape[0], 1 if single else candidate_bytes.shape[1]))
        features = similarity_features(
            flat,
            events,
            lengths,
            labels.float() if labels is not None else None,
            self.table,
            self.match,
            self.levels,
            self.values,
            list(self.config.temperatures),
            self.config.agreement_bins,
            self.config.agreement == "prefix",
            self.backend,
            counts,
            limits,
        )
        return features.squeeze(1) if single else features

    def _check(
        self,
        candidates: Tensor,
        history: Tensor,
        lengths: Tensor,
        labels: Tensor | None,
        counts: Tensor | None,
        limits: Tensor | None,
    ) -> None:
        if limits is not None and counts is None:
            raise SidError("limits", "given without counts", "Pass the number of candidates of each user.")
        axes = (2, 3) if counts is None else (2,)
        for name, data, dims in (("candidate_bytes", candidates, axes), ("history_bytes", history, (2,))):
            if data.dtype != torch.uint8 or data.dim() not in dims or data.shape[-1] != self.spec.nbytes:
                raise SidError(
                    name,
                    f"{data.dtype} of shape {tuple(data.shape)}",
                    f"Pass [..., {self.spec.nbytes}] uint8, as this SidSpec packs (spec.pack_bytes).",
                )
        users = candidates.shape[0] if counts is None else counts.shape[0]
        if lengths.dim() != 1 or lengths.shape[0] != users:
            raise SidError(
                "lengths",
                f"shape {tuple(lengths.shape)} for {users} users",
                "Pass one per user.",
            )
        if self.config.labels != (labels is not None):
            raise SidError(
                "labels",
                "missing" if labels is None else "given, but SimilarityConfig.labels is off",
                "Pass [events] numbers exactly where the configuration asks for them.",
            )
        if labels is not None and tuple(labels.shape) != (history.shape[0],):
            raise SidError("labels", f"shape {tuple(labels.shape)}", f"Pass [{history.shape[0]}].")
        if not (torch.compiler.is_compiling() or lengths.is_cuda or lengths.is_meta):
            check_lengths(lengths.tolist(), history.shape[0])


def _coordinates(basis: FrozenBasis, groups: tuple[tuple[int, int], ...], centred: bool) -> Tensor:
    """``[rows, r]``: what each column value adds to the decoded vector, in r orthonormal coordinates.

    Inner products are those of the decoded space, with r its rank (at most the number of digits) and not d.
    Byte columns have 256 rows, NaN outside their alphabet.
    """
    wide = max(basis.spec.cardinalities) > 256
    tables = []
    for start, stop in groups:
        radices = basis.spec.cardinalities[start:stop]
        size = prod(radices)
        rest, total = torch.arange(size), torch.zeros(size, basis.dim, dtype=torch.float64)
        for level, k in zip(range(start, stop), radices, strict=True):
            total += basis.values(level).double()[rest % k]
            rest = rest // k
        tables.append(total)
    if not centred and basis.mean is not None:
        tables[0] = tables[0] + basis.mean.cpu().double()
    rows = basis.rows().double()
    if not centred and basis.mean is not None:
        rows = torch.cat([rows, basis.mean.cpu().double()[None]])
    # An orthonormal basis of the span; numerically zero directions are dropped.
    _, values, axes = torch.linalg.svd(rows, full_matrices=False)
    kept = axes[values > values[0] * 1e-6]
    # Whole vectors of 16 for the compiled kernel; the zeros added change no inner product.
    kept = nn.functional.pad(kept, (0, 0, 0, max(16 * -(-len(kept) // 16), 16) - len(kept)))
    projected = [(table @ kept.T).float() for table in tables]
    if wide:
        return torch.cat(projected)
    padded = torch.full((len(tables), 256, len(kept)), torch.nan)
    for column, table in enumerate(projected):
        padded[column, : len(table)] = table
    return padded.flatten(0, 1)


def _match_table(radices: list[tuple[int, ...]], agreement: str) -> Tensor:
    """``[D, 256, 256]`` uint8: levels at which two bytes of a column agree; D is 1 if columns are alike.

    Empty where a column needs more than a byte: such columns hold one level, compared directly.
    """
    if any(prod(group) > 256 for group in radices):
        return torch.zeros(0, 256, 256, dtype=torch.uint8)
    kinds = radices[:1] if len(set(radices)) == 1 else radices
    tables = []
    for group in kinds:
        rest, running = torch.arange(256), torch.ones(256, 256, dtype=torch.bool)
        total = torch.zeros(256, 256, dtype=torch.uint8)
        for k in group:
            digit = rest % k
            same = digit[:, None] == digit
            running &= same
            total += (running if agreement == "prefix" else same).to(torch.uint8)
            rest = rest // k
        tables.append(total)
    return torch.stack(tables)
