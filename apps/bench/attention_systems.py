"""The ways to attend over a history that apps.bench.attention compares, all computing one function.

Items have codes; an item's dense embedding is what its codes decode to, so that every system must give the
same output and their errors can be compared. Each starts from what it keeps per event (an item id or packed
bytes) and ends at the output projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrec_sid import SidSpec
from torchrec_sid.side import CodeSpaceAttention, CodeSpaceAttentionConfig, FrozenBasis

# Larger than any cache (77 MB at 384 dims), small enough for the dense gradient of a table not to count.
ITEMS = 50_000


@dataclass(frozen=True)
class Shape:
    """One measurement."""

    users: int = 16
    length: int = 4096
    dims: int = 384
    heads: int = 4
    candidates: int = 1
    digits: int = 25


class System(NamedTuple):
    """One way to compute it."""

    name: str
    forward: Callable[[Tensor], Tensor]
    """Candidates ``[B, m, d]`` -> ``[B, m, d]``."""
    parameters: list[Tensor]
    """What a backward pass must give gradients to, besides the candidates."""
    bytes_per_event: int
    """Read per event, from the batch and from tables."""


class Workload:
    """Items, histories and weights of one shape.

    Args:
        shape: what to build.
        device: where.
        seed: of everything random.
        lengths: ``[users]``; None: ``shape.length`` each.
    """

    def __init__(
        self, shape: Shape, device: torch.device, seed: int = 0, lengths: Tensor | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape, self.device = shape, device
        self.spec = SidSpec((3,) * shape.digits)
        directions = torch.randn(shape.digits, shape.dims, generator=generator) / shape.digits**0.5
        self.basis = FrozenBasis.from_digits(self.spec, directions)
        codes = torch.randint(3, (ITEMS, shape.digits), generator=generator)
        self.lengths = torch.full((shape.users,), shape.length) if lengths is None else lengths
        ids = torch.randint(ITEMS, (int(self.lengths.sum()),), generator=generator)
        self.codes = codes[ids]
        self.ids = ids.to(device)
        self.history = self.spec.pack_bytes(self.codes).to(device)
        self.lengths = self.lengths.to(device)
        self.vectors = self.basis.decode(codes).to(device)
        self.candidates = torch.randn(shape.users, shape.candidates, shape.dims, generator=generator).to(
            device
        )
        self.attention = self.module("auto")
        for parameter in self.attention.parameters():
            # Scores spread over a few units, as in a trained model.
            nn.init.normal_(parameter, std=1.5 * shape.dims**-0.5, generator=generator)
        self.attention.to(device)

    def module(self, backend: str) -> CodeSpaceAttention:
        """A code-space attention; the first one made holds the weights that all systems share."""
        config = CodeSpaceAttentionConfig(self.shape.dims, self.shape.heads, backend=backend)  # type: ignore[arg-type]
        module = CodeSpaceAttention(self.basis, config)
        if hasattr(self, "attention"):
            module.load_state_dict(self.attention.state_dict())
        return module.to(self.device)

    def projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
        """Query, key, value and output projection, copied from the shared weights."""
        module = self.module("auto")
        return module.query, module.key, module.value, module.output

    def dense(self, values: Tensor) -> Tensor:
        """Equal-length jagged ``[E, d]`` -> ``[B, L, d]``, a view."""
        return values.view(self.shape.users, self.shape.length, -1)


def lookup_mha(w: Workload) -> System:
    """EmbeddingCollection look-up, then ``nn.MultiheadAttention`` (without TorchRec: ``nn.Embedding``)."""
    shape, (q, k, v, o) = w.shape, w.projections()
    mha = nn.MultiheadAttention(shape.dims, shape.heads, batch_first=True, device=w.device)
    with torch.no_grad():
        mha.in_proj_weight.copy_(torch.cat([q.weight, k.weight, v.weight]))
        mha.in_proj_bias.copy_(torch.cat([q.bias, torch.zeros_like(q.bias), v.bias]))
        mha.out_proj.weight.copy_(o.weight)
        mha.out_proj.bias.copy_(o.bias)
    lookup, table = _lookup(w)

    def forward(candidates: Tensor) -> Tensor:
        x = w.dense(lookup())
        return mha(candidates, x, x, need_weights=False)[0]

    return System("lookup_mha", forward, [table, *mha.parameters()], 8 + 4 * shape.dims)


def _lookup(w: Workload) -> tuple[Callable[[], Tensor], Tensor]:
    try:
        from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
    except ImportError:
        table = nn.Embedding.from_pretrained(w.vectors.clone(), freeze=False)
        return lambda: table(w.ids), table.weight
    config = EmbeddingConfig(
        name="item", embedding_dim=w.shape.dims, num_embeddings=ITEMS, feature_names=["item"]
    )
    collection = EmbeddingCollection(tables=[config], device=w.device)
    weight = collection.embeddings["item"].weight
    with torch.no_grad():
        weight.copy_(w.vectors)
    batch = KeyedJaggedTensor.from_lengths_sync(["item"], w.ids, w.lengths)
    return lambda: collection(batch)["item"].values(), weight


def dense_bf16_sdpa(w: Workload) -> System:
    """Frozen dense embeddings gathered in bfloat16, projected to keys and values, SDPA."""
    shape, (q, k, v, o) = w.shape, w.projections()
    table = w.vectors.bfloat16()

    def forward(candidates: Tensor) -> Tensor:
        x = w.dense(F.embedding(w.ids, table))
        return project_and_attend(candidates.bfloat16(), x, (q, k, v, o), shape.heads).float()

    return System("dense_bf16_sdpa", forward, _parameters(q, k, v, o), 8 + 2 * shape.dims)


def dense_absorbed(w: Workload, dtype: torch.dtype) -> System:
    """Frozen dense embeddings gathered in ``dtype``; the key projection absorbed into the query, the value
    projection applied after the sum, so that events meet no d x d matrix: the best a dense method can do.
    """
    shape, (q, k, v, o) = w.shape, w.projections()
    heads, table = shape.heads, w.vectors.to(dtype)

    def forward(candidates: Tensor) -> Tensor:
        x = w.dense(F.embedding(w.ids, table))
        query = q(candidates).unflatten(-1, (heads, -1)) * (shape.dims // heads) ** -0.5
        absorbed = torch.einsum("bmhk,hkd->bmhd", query, k.weight.unflatten(0, (heads, -1)))
        scores = absorbed.flatten(1, 2).to(dtype) @ x.transpose(1, 2)
        z = (scores.float().softmax(-1).to(dtype) @ x).float().unflatten(1, (-1, heads))
        out = torch.einsum("bmhd,hkd->bmhk", z, v.weight.unflatten(0, (heads, -1)))
        return o(out.flatten(-2) + v.bias)

    return System("dense_absorbed", forward, _parameters(q, k, v, o), 8 + table.element_size() * shape.dims)


def decode_sdpa(w: Workload) -> System:
    """Packed bytes unpacked and decoded with the frozen basis, projected to keys and values, SDPA."""
    shape, (q, k, v, o) = w.shape, w.projections()
    layout, rows = w.basis.layout, w.basis.rows().to(w.device)

    def forward(candidates: Tensor) -> Tensor:
        x = w.dense(layout.expand_digits(w.history) @ rows)
        return project_and_attend(candidates, x, (q, k, v, o), shape.heads)

    return System("decode_sdpa", forward, _parameters(q, k, v, o), w.spec.nbytes)


def code_space(w: Workload, backend: str) -> System:
    """This project's attention with one of its backends."""
    module = w.module(backend)

    def forward(candidates: Tensor) -> Tensor:
        return module(candidates, w.history, w.lengths)

    return System(f"code_space_{backend}", forward, list(module.parameters()), w.spec.nbytes)


def project_and_attend(
    candidates: Tensor, x: Tensor, projections: tuple[nn.Linear, ...], heads: int
) -> Tensor:
    """Multi-head attention of candidates ``[B, m, d]`` over ``x: [B, L, d]``, in the type of ``x``."""
    q, k, v, o = ((layer.weight.to(x.dtype), layer.bias) for layer in projections)

    def split(values: Tensor) -> Tensor:
        return values.unflatten(-1, (heads, -1)).transpose(1, 2)

    def linear(values: Tensor, layer: tuple[Tensor, Tensor | None]) -> Tensor:
        return F.linear(values, layer[0], None if layer[1] is None else layer[1].to(x.dtype))

    out = F.scaled_dot_product_attention(
        split(linear(candidates, q)), split(linear(x, k)), split(linear(x, v))
    )
    return linear(out.transpose(1, 2).flatten(-2), o)


def _parameters(*layers: nn.Linear) -> list[Tensor]:
    # In a softmax the key has no bias; all others do.
    return [p for layer in layers for p in layer.parameters()]


def inference(system: System, candidates: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A forward pass without gradients."""

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (system.forward(candidates),)

    return step


def train_step(system: System, candidates: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A forward and backward pass; returns the gradients, the candidates' first."""
    candidates = candidates.detach().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        out = system.forward(candidates)
        upstream = torch.ones_like(out)
        upstream[..., ::2] = -1
        return torch.autograd.grad(out, [candidates, *system.parameters], upstream, allow_unused=True)

    return step
