"""The systems of `apps.bench.quantizers`: ours and the rivals, each at its recommended settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log2
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrec_sid.quantizers import (
    DiscretePca,
    DiscretePcaConfig,
    Quantizer,
    ResidualKMeans,
    ResidualKMeansConfig,
    RqVae,
    RqVaeConfig,
    VqFusion,
    VqFusionConfig,
)
from torchrec_sid.quantizers.fusion.sources import EmbeddingSource

OURS = "torchrec_sid"


@dataclass(frozen=True)
class Fitted:
    """A quantizer after its fit."""

    encode: Callable[[Tensor], Tensor]
    """``[N, d]`` float32 -> codes ``[N, L]``, any integer type."""
    decode: Callable[[Tensor], Tensor]
    """Codes -> ``[N, d]`` float32."""
    bits: float
    """log2 of the number of SIDs."""
    decoder_floats: int
    """Numbers that a decoder must hold."""


@dataclass(frozen=True)
class System:
    """One row of the table, before it is measured."""

    name: str
    fit: Callable[[Tensor, int, int], Fitted]
    """Training embeddings ``[N, d]``, bits and seed -> fitted."""
    largest: int | None = None
    """Rows beyond which it is left out, because it would take hours."""


def systems() -> list[System]:
    """All of them, ours first."""
    return [
        System("ResidualKMeans", _residual_kmeans),
        System("ResidualKMeans.beam", lambda x, bits, seed: _residual_kmeans(x, bits, seed, beam=5)),
        System("RqVae", _rq_vae),
        System("DiscretePca", _discrete_pca),
        System("VqFusion", _vq_fusion),
        System("faiss.RQ.beam1", lambda x, bits, seed: _faiss_rq(x, bits, seed, 1, 1)),
        System("faiss.RQ.beam1.encode5", lambda x, bits, seed: _faiss_rq(x, bits, seed, 1, 5)),
        System("faiss.RQ.beam5", lambda x, bits, seed: _faiss_rq(x, bits, seed, 5, 5)),
        System("faiss.Kmeans.residual", _faiss_kmeans),
        System("faiss.PQ", lambda x, bits, seed: _faiss_pq(x, bits, seed, rotate=False)),
        System("faiss.OPQ", lambda x, bits, seed: _faiss_pq(x, bits, seed, rotate=True)),
        System("vector_quantize_pytorch.ResidualVQ", _residual_vq),
        System("vector_quantize_pytorch.ResidualFSQ", _residual_fsq),
        # Ten restarts of a hundred iterations per level: about a quarter of an hour from here on.
        System("semantic_id.RQKMeans", _semantic_id, largest=20_000),
    ]


def full_name(system: System) -> str:
    """The name in the JSON rows."""
    rivals = ("faiss.", "vector_quantize_pytorch.", "semantic_id.")
    return system.name if system.name.startswith(rivals) else f"{OURS}.{system.name}"


def _bytewise(bits: int) -> tuple[int, ...]:
    """Levels of 256 codes."""
    if bits % 8:
        raise ValueError(f"{bits} bits: take a multiple of 8")
    return (256,) * (bits // 8)


def _own(quantizer: Quantizer, floats: int, beam: int = 1) -> Fitted:
    quantizer.eval()
    bits = sum(log2(k) for k in quantizer.spec.cardinalities)
    return Fitted(lambda x: quantizer.encode(x, beam=beam), quantizer.decode, bits, floats)


def _parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _residual_kmeans(x: Tensor, bits: int, seed: int, beam: int = 1) -> Fitted:
    config = ResidualKMeansConfig(cardinalities=_bytewise(bits), seed=seed)
    quantizer = ResidualKMeans(x.shape[1], config)
    quantizer.fit(x)
    return _own(quantizer, x.shape[1] * (1 + sum(config.cardinalities)), beam)


def _rq_vae(x: Tensor, bits: int, seed: int) -> Fitted:
    quantizer = RqVae(x.shape[1], RqVaeConfig(cardinalities=_bytewise(bits), seed=seed))
    quantizer.fit(x)
    return _own(quantizer, quantizer.decoder_floats)


def _discrete_pca(x: Tensor, bits: int, seed: int) -> Fitted:
    trits = int(bits / log2(3))
    quantizer = DiscretePca(x.shape[1], DiscretePcaConfig.trits(trits, seed=seed))
    quantizer.fit(x)
    return _own(quantizer, x.shape[1] * (1 + trits))


def _vq_fusion(x: Tensor, bits: int, seed: int) -> Fitted:
    """Codebooks, and one byte of five trits at the end, as its default."""
    config = VqFusionConfig(codebooks=_bytewise(bits - 8), stages=((5, 3),), seed=seed)
    quantizer = VqFusion({"x": EmbeddingSource(x.shape[1])}, config)
    quantizer.fit({"x": x})
    quantizer.eval()
    return Fitted(
        lambda y: quantizer.encode({"x": y}),
        lambda codes: quantizer.decode_sources(codes)["x"],
        sum(log2(k) for k in quantizer.spec.cardinalities),
        quantizer.decoder_floats,
    )


def _padded(x: Tensor, parts: int) -> np.ndarray[Any, Any]:
    """Zero columns at the end, so that the width divides into ``parts``."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % parts)).contiguous().numpy()


def _faiss_rq(x: Tensor, bits: int, seed: int, fit_beam: int, encode_beam: int) -> Fitted:
    import faiss

    levels, dim = len(_bytewise(bits)), x.shape[1]
    rq: Any = faiss.ResidualQuantizer(dim, levels, 8)
    _settle(rq, seed)
    rq.max_beam_size = fit_beam
    rq.train(x.numpy())
    rq.max_beam_size = encode_beam
    return Fitted(
        lambda y: torch.from_numpy(rq.compute_codes(y.numpy())),
        lambda codes: torch.from_numpy(rq.decode(codes.numpy())),
        bits,
        levels * 256 * dim,
    )


def _faiss_kmeans(x: Tensor, bits: int, seed: int) -> Fitted:
    """k-means of faiss at its defaults (25 iterations) on the residuals, level by level."""
    import faiss

    residual, books = x.numpy(), []
    for level, k in enumerate(_bytewise(bits)):
        kmeans = faiss.Kmeans(x.shape[1], k, seed=seed * 100 + level + 1, min_points_per_centroid=1)
        kmeans.train(residual)
        centroids = np.asarray(kmeans.centroids)
        books.append((kmeans, centroids))
        residual = residual - centroids[kmeans.assign(residual)[1]]

    def encode(y: Tensor) -> Tensor:
        left, columns = y.numpy(), []
        for kmeans, centroids in books:
            columns.append(kmeans.assign(left)[1])
            left = left - centroids[columns[-1]]
        return torch.from_numpy(np.stack(columns, axis=1))

    def decode(codes: Tensor) -> Tensor:
        parts = [centroids[codes[:, level].numpy()] for level, (_, centroids) in enumerate(books)]
        return torch.from_numpy(np.sum(parts, axis=0))

    return Fitted(encode, decode, bits, sum(_bytewise(bits)) * x.shape[1])


def _faiss_pq(x: Tensor, bits: int, seed: int, rotate: bool) -> Fitted:
    import faiss

    parts, dim = len(_bytewise(bits)), x.shape[1]
    data = _padded(x, parts)
    wide = data.shape[1]
    rotation: Any = faiss.OPQMatrix(wide, parts) if rotate else None
    if rotation is not None:
        rotation.pq = faiss.ProductQuantizer(wide, parts, 8)
        _settle(rotation.pq, seed)
        rotation.train(data)
        data = rotation.apply(data)
    pq: Any = faiss.ProductQuantizer(wide, parts, 8)
    _settle(pq, seed)
    pq.train(data)

    def encode(y: Tensor) -> Tensor:
        rows = _padded(y, parts)
        return torch.from_numpy(pq.compute_codes(rows if rotation is None else rotation.apply(rows)))

    def decode(codes: Tensor) -> Tensor:
        rows = pq.decode(codes.numpy())
        return torch.from_numpy(rows if rotation is None else rotation.reverse_transform(rows))[:, :dim]

    return Fitted(encode, decode, bits, 256 * wide + (wide * wide if rotate else 0))


def _settle(quantizer: Any, seed: int) -> None:
    """Seed a faiss quantizer, and silence the warning that small sets draw on stderr."""
    quantizer.cp.seed = seed + 1
    quantizer.cp.min_points_per_centroid = 1


def _residual_vq(x: Tensor, bits: int, seed: int) -> Fitted:
    """k-means start, as its README advises against dead codes; EMA over 500 batches of 2,048."""
    from vector_quantize_pytorch import ResidualVQ

    torch.manual_seed(seed)
    levels, dim = len(_bytewise(bits)), x.shape[1]
    vq = ResidualVQ(
        dim=dim, num_quantizers=levels, codebook_size=256, kmeans_init=True, kmeans_iters=10, decay=0.99
    )
    mean = x.mean(0)
    vq.train()
    with torch.no_grad():
        for batch in _random_batches(x - mean, 500, seed):
            vq(batch.unsqueeze(0))
    vq.eval()

    @torch.no_grad()
    def encode(y: Tensor) -> Tensor:
        return torch.cat([vq((part - mean).unsqueeze(0))[1][0] for part in y.split(4096)])

    return Fitted(
        encode,
        torch.no_grad()(lambda codes: vq.get_output_from_indices(codes.unsqueeze(0))[0] + mean),
        bits,
        levels * 256 * dim + dim,
    )


def _residual_fsq(x: Tensor, bits: int, seed: int) -> Fitted:
    """Levels (8, 6, 5), the published choice for 2**8 codes; its projections trained for 1,000 batches."""
    from vector_quantize_pytorch import ResidualFSQ

    torch.manual_seed(seed)
    dim, scale, mean = x.shape[1], x.std(), x.mean(0)
    fsq = ResidualFSQ(dim=dim, levels=[8, 6, 5], num_quantizers=len(_bytewise(bits)))
    optimizer = torch.optim.Adam(fsq.parameters(), lr=1e-3)
    fsq.train()
    for batch in _random_batches((x - mean) / scale, 1000, seed):
        loss = (fsq(batch.unsqueeze(0))[0][0] - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fsq.eval()

    @torch.no_grad()
    def encode(y: Tensor) -> Tensor:
        return torch.cat([fsq(((part - mean) / scale).unsqueeze(0))[1][0] for part in y.split(4096)])

    return Fitted(
        encode,
        torch.no_grad()(lambda codes: fsq.get_output_from_indices(codes.unsqueeze(0))[0] * scale + mean),
        len(_bytewise(bits)) * log2(8 * 6 * 5),
        _parameters(fsq.project_out) + dim + 1,
    )


def _semantic_id(x: Tensor, bits: int, seed: int) -> Fitted:
    from semantic_id import RQKMeans

    levels = _bytewise(bits)
    model = RQKMeans(n_levels=len(levels), n_clusters=256, random_state=seed)
    model.fit(x.numpy())
    return Fitted(
        lambda y: torch.from_numpy(np.asarray(model.encode(y.numpy()))),
        lambda codes: torch.from_numpy(np.asarray(model.decode(codes.numpy()), dtype=np.float32)),
        bits,
        sum(levels) * x.shape[1],
    )


def _random_batches(x: Tensor, steps: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed + 77)
    for _ in range(steps):
        yield x[torch.randint(len(x), (min(2048, len(x)),), generator=generator)]
