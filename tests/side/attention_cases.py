"""One case of code-space attention, run against decode-then-attend in float64."""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from tests.side.decode_then_attend import decode_then_attend
from torchrec_sid import SidSpec
from torchrec_sid.side import CodeSpaceAttention, CodeSpaceAttentionConfig, EventTermsConfig, FrozenBasis

SPECS = {
    "trits": (3,) * 12,
    "odd": (5, 3, 7, 3, 9),
    "mixed": (64, 3, 3, 3, 3, 3, 3),
    "rq": (32, 32, 32),
    "wide": (300, 20, 5),
}


def make_basis(name: str, dim: int, generator: torch.Generator) -> FrozenBasis:
    spec = SidSpec(SPECS[name])
    tables = [torch.randn(1 if k < 16 else k, dim, generator=generator) for k in spec.cardinalities]
    return FrozenBasis(spec, tuple(tables), torch.randn(dim, generator=generator))


@dataclass
class Case:
    attention: CodeSpaceAttention
    basis: FrozenBasis
    candidates: torch.Tensor
    codes: torch.Tensor
    lengths: torch.Tensor
    extra: dict[str, Any]

    def run(self, candidates: torch.Tensor, **changes: Any) -> torch.Tensor:
        data = self.basis.spec.pack_bytes(self.codes)
        return self.attention(candidates, data, self.lengths, **{**self.extra, **changes})

    def reference(self, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Output and gradients of decode-then-attend."""
        exact = copy.deepcopy(self.attention).to(dtype)
        candidates = self.candidates.detach().to(dtype).requires_grad_()
        extra = dict(self.extra)
        leaves = {"candidates": candidates, **dict(exact.named_parameters())}
        if "bias" in extra:
            leaves["bias"] = extra["bias"] = extra["bias"].detach().to(dtype).requires_grad_()
        out = decode_then_attend(exact, self.basis, candidates, self.codes, self.lengths, **extra)
        return out.detach(), _gradients(out, leaves)

    def measured(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        candidates = self.candidates.detach().requires_grad_()
        leaves = {"candidates": candidates, **dict(self.attention.named_parameters())}
        changes = {}
        if "bias" in self.extra:
            leaves["bias"] = changes["bias"] = self.extra["bias"].detach().requires_grad_()
        out = self.run(candidates, **changes)
        return out.detach(), _gradients(out, leaves)


def _gradients(out: torch.Tensor, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    grads = torch.autograd.grad((out * upstream).sum(), list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def make_case(
    spec: str = "trits",
    lengths: tuple[int, ...] = (3, 0, 5),
    candidates: int = 2,
    heads: int = 2,
    seed: int = 0,
    bias: int = 0,
    mask: bool = False,
    terms: EventTermsConfig | None = None,
    spread: float = 0.3,
    **config: Any,
) -> Case:
    """``bias``: 0 none, 1 per event, 2 per event and head; ``spread``: scale of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    terms = terms or EventTermsConfig()
    basis = make_basis(spec, 8 * heads, generator)
    attention = CodeSpaceAttention(
        basis, CodeSpaceAttentionConfig(query_dim=10, num_heads=heads, terms=terms, **config)
    )
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=spread, generator=generator)
    events = sum(lengths)
    codes = torch.stack(
        [torch.randint(k, (events,), generator=generator) for k in basis.spec.cardinalities], 1
    )
    extra: dict[str, Any] = {}
    if terms.num_actions:
        extra["actions"] = torch.randint(terms.num_actions, (events,), generator=generator)
    if terms.age_boundaries:
        extra["ages"] = torch.rand(events, generator=generator) * 2 * terms.age_boundaries[-1]
    if terms.age_buckets:
        extra["ages"] = torch.randint(terms.age_buckets, (events,), generator=generator)
    if bias:
        shape = (events,) if bias == 1 else (events, heads)
        extra["bias"] = torch.randn(shape, generator=generator)
    if mask:
        extra["mask"] = torch.rand(events, generator=generator) > 0.3
    vectors = torch.randn(len(lengths), candidates, 10, generator=generator)
    return Case(attention, basis, vectors, codes, torch.tensor(lengths, dtype=torch.int64), extra)


def assert_equal(case: Case, tolerance: float = 1e-5, extreme: bool = False) -> None:
    """Output and every gradient within ``tolerance`` of the largest value of the float64 reference's.

    A gradient that is zero by cancellation (the key's, where every history has one event) has no scale of
    its own; its scale is then 5% of the largest gradient's. With ``extreme`` scores, whose rounding alone
    exceeds the tolerance, an error up to 4 x that of decode-then-attend in float32 is let pass.
    """
    out, grads = case.measured()
    expected, expected_grads = case.reference()
    floor, floor_grads = case.reference(torch.float32) if extreme else (expected, expected_grads)
    assert out.shape == expected.shape
    if not out.numel():
        return
    error = (out - expected).abs().max()
    limit = max(tolerance * expected.abs().max(), 4 * (floor - expected).abs().max())
    assert error <= limit, f"output: error {error:.2g}, allowed {limit:.2g}"
    largest = max(float(g.abs().max()) for g in expected_grads.values() if g.numel())
    for name, grad in grads.items():
        if not grad.numel():
            continue
        truth = expected_grads[name]
        scale = max(float(truth.abs().max()), 0.05 * largest)
        limit = max(tolerance * scale, 4 * float((floor_grads[name] - truth).abs().max()))
        error = (grad - truth).abs().max()
        assert error <= limit, f"gradient of {name}: error {error:.2g}, allowed {limit:.2g}"
