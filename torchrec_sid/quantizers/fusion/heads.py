"""One head per source: from the quantized latent back to the source, with its normalised loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrec_sid.quantizers.autoencoder import LinearPlusMlp
from torchrec_sid.quantizers.fusion.sources import CategorySource, FusionInputs, SourcePart

_TINY = 1e-12


class FusionHeads(nn.Module):
    """Decodes latents ``[N, latent]`` into every source of a :class:`FusionInputs`.

    Embedding heads begin as the inverse of the PCA that the encoder begins as; category heads as the
    classifier of nearest class means (equal isotropic covariances), ``W_j = m_j / t`` and
    ``b_j = log p_j - |m_j|^2 / 2t`` with the temperature t that fits best.

    Args:
        inputs: the sources and their statistics.
        latent: width of the latents.
        hidden: widths of the hidden layers of each head.
        generator: initialises them.
        device: where the parameters live.
    """

    def __init__(
        self,
        inputs: FusionInputs,
        latent: int,
        hidden: tuple[int, ...],
        *,
        generator: torch.Generator,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self._sources = list(inputs.sources.values())
        self.heads = nn.ModuleList(
            LinearPlusMlp(latent, width, hidden, generator=generator, device=device)
            for width in inputs.widths
        )
        self.biases = nn.ParameterList(torch.zeros(width, device=device) for width in inputs.widths)

    @torch.no_grad()
    def start(self, directions: Tensor, z_hats: Sequence[Tensor], parts: Sequence[SourcePart]) -> None:
        """Set the linear parts.

        Args:
            directions: rows of the encoder's PCA, ``[latent, D]``, in the packed columns.
            z_hats: ``[S, latent]`` each, latents of a sample decoded from prefixes of growing depth.
            parts: the sources of the same sample.
        """
        begin = 0
        for index, (source, part) in enumerate(zip(self._sources, parts, strict=True)):
            block = directions[:, begin : begin + source.width]
            begin += source.width
            head = self.heads[index]
            assert isinstance(head, LinearPlusMlp)
            if isinstance(source, CategorySource):
                weight, bias = _nearest_class_means(
                    [z_hat[part.present] for z_hat in z_hats], part.values[part.present]
                )
                head.linear.weight.copy_(weight)
                self.biases[index].copy_(bias)
            else:
                head.linear.weight.copy_(block.T / math.sqrt(source.weight))

    def forward(self, z_hat: Tensor) -> list[Tensor]:
        """Per source ``[N, width]``: the normalised embedding, or logits."""
        return [head(z_hat) + bias for head, bias in zip(self.heads, self.biases, strict=True)]


def source_errors(inputs: FusionInputs, decoded: Sequence[Tensor], parts: Sequence[SourcePart]) -> Tensor:
    """Mean error per source over the rows where it is present, ``[K]``; 1 is knowing nothing.

    Embeddings: squared error over variance. Categories: KL(p || softmax) over the entropy of the mean
    distribution (0 where that has none). A source missing in the whole batch gives 0.
    """
    errors = []
    for index, (source, out, part) in enumerate(zip(inputs.sources.values(), decoded, parts, strict=True)):
        if isinstance(source, CategorySource):
            divergence = F.kl_div(out.log_softmax(dim=1), part.values, reduction="none").sum(1)
            entropy = inputs.entropy[index]
            rows = torch.where(entropy > _TINY, divergence / entropy.clamp(min=_TINY), 0.0)
        else:
            rows = (part.values - out).square().sum(1)
        present = part.present.to(rows.dtype)
        errors.append((rows * present).sum() / present.sum().clamp(min=1))
    return torch.stack(errors)


def info_nce(left: Tensor, right: Tensor, temperature: float) -> Tensor:
    """Contrastive loss of pairs ``[P, d]``, ``[P, d]`` over the chance level log P (arXiv 1807.03748).

    Each row's partner has to be told from the partners of all other rows, in both directions.
    """
    similarity = F.normalize(left, dim=1) @ F.normalize(right, dim=1).T / temperature
    target = torch.arange(len(left), device=left.device)
    loss = F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)
    return loss / (2 * math.log(max(len(left), 2)))


def _nearest_class_means(z_hats: Sequence[Tensor], probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``[J, latent]`` and biases ``[J]`` of the classifier; classes without items stay at the mean.

    Means are those of the full codes of one half of the items. The temperature is the one that fits all
    depths of the other half best: with the items behind the means, or full codes alone, it would be so
    sharp that one wrong class of a prefix costs more than all right ones gain.
    """
    half = slice(0, None, 2), slice(1, None, 2)
    means, prior = _class_means(z_hats[-1][half[0]], probabilities[half[0]])
    spread = max(float(z_hats[-1].square().sum(1).mean()) / z_hats[-1].shape[1], _TINY)
    errors = {}
    for power in range(-8, 9):
        temperature = spread * 2.0**power
        logits = (_logits(z[half[1]], means, prior, temperature) for z in z_hats)
        errors[temperature] = sum(float(_divergence(out, probabilities[half[1]])) for out in logits)
    temperature = min(errors, key=lambda t: errors[t])
    means, prior = _class_means(z_hats[-1], probabilities)
    return means / temperature, prior - means.square().sum(1) / (2 * temperature)


def _class_means(z: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    count = probabilities.sum(0)
    # A class of few items has its mean pulled towards the origin, the mean of all items.
    means = (probabilities.T @ z) / (count + 0.1)[:, None]
    return means, ((count + 0.5) / (count + 0.5).sum()).log()


def _logits(z: Tensor, means: Tensor, prior: Tensor, temperature: float) -> Tensor:
    return (z @ means.T - means.square().sum(1) / 2) / temperature + prior


def _divergence(logits: Tensor, probabilities: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(1), probabilities, reduction="sum")
