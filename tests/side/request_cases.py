"""Operator arguments of users with several candidates each, and the answers in float64."""

from dataclasses import dataclass
from typing import Any

import torch

from torchrec_sid.side.event_layout import FeatureLayout
from torchrec_sid.side.kernels.attention_operator import code_attention, code_attention_backward

LAYOUTS = {
    "trits": "3x3x3x3x3,3x3x3x3x3,3x3",
    "terms": "3x3x3x3x3,3x3x3x3x3,#2,#8",
    "one byte": "3x3x3x3x3,#2,#8",
    "books": "#64,#200,#7",
    "mixed": "5x7,#100,3x3x3,#1",
    "many": ",".join(["3x3x3x3x3"] * 9) + ",#3",
}


@dataclass
class RequestCase:
    """``values``: how many different values a column takes at most (few: many equal events)."""

    layout: str
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    heads: int = 2
    spread: float = 0.3
    values: int = 256
    limits: bool = False
    multiplicity: bool = False
    activation: str = "softmax"
    bias: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        layout = FeatureLayout.parse(self.layout)
        events, rows = sum(self.lengths), sum(self.counts) * self.heads
        columns = [
            torch.randint(min(c.values, self.values), (events,), generator=generator)
            for c in layout.columns
        ]
        self.events = torch.stack(columns, 1).to(torch.uint8)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        # What the operators see is float32: the truth must be of the same numbers.
        self.query = (normal(rows, layout.num_features) * self.spread).float().double()
        self.offset = normal(rows).float().double()
        self.bias_values = normal(events, self.bias).float().double() if self.bias else None
        self.upstream = normal(rows, layout.num_features).float().double()
        self.upstream_total = normal(rows).float().double() * (self.activation == "sigmoid")
        self.times = self.limit_values = None
        if self.multiplicity:
            self.times = torch.randint(1, 5, (events,), generator=generator).double()
        if self.limits:
            parts = [
                torch.randint(0, length + 1, (count,), generator=generator)
                for length, count in zip(self.lengths, self.counts, strict=True)
            ]
            self.limit_values = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def truth(self) -> dict[str, torch.Tensor]:
        """Every row on its own, over the features of each event that it sees, as often as it occurred."""
        query, offset = self.query.clone().requires_grad_(), self.offset.clone().requires_grad_()
        bias = None if self.bias_values is None else self.bias_values.clone().requires_grad_()
        layout = FeatureLayout.parse(self.layout)
        phi = layout.expand(self.events, torch.float64)
        z, total, row, begin = [], [], 0, 0
        for length, count in zip(self.lengths, self.counts, strict=True):
            for _ in range(count):
                seen = length if self.limit_values is None else int(self.limit_values[row // self.heads])
                part = slice(begin, begin + seen)
                times = torch.ones(seen, dtype=torch.float64) if self.times is None else self.times[part]
                for head in range(self.heads):
                    scores = phi[part] @ query[row] + offset[row]
                    if bias is not None:
                        scores = scores + bias[part, head % self.bias]
                    if self.activation == "softmax":
                        weights = torch.softmax(scores + times.log(), 0)
                    else:
                        weights = scores.sigmoid() * times
                    z.append(weights @ phi[part])
                    total.append(weights.sum())
                    row += 1
            begin += length
        out = torch.stack(z) if z else query.new_zeros(0, layout.num_features)
        sums = torch.stack(total) if total else query.new_zeros(0)
        loss = (out * self.upstream).sum() + (sums * self.upstream_total).sum()
        leaves = [query, offset] + ([] if bias is None else [bias])
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if z else [None] * 3
        named = zip(("grad_query", "grad_offset", "grad_bias"), grads, strict=False)
        return {"z": out.detach(), **{k: v for k, v in named if v is not None}}

    def run(self, backend: str) -> dict[str, torch.Tensor]:
        """The operator's forward and backward pass, float32 (``torch64``: plain PyTorch in float64)."""
        kind = torch.float64 if backend == "torch64" else torch.float32
        name = "torch" if backend == "torch64" else backend

        def cast(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(kind)

        request: tuple[Any, ...] = (torch.tensor(self.counts), self.limit_values, cast(self.times))
        inputs = (cast(self.query), self.events, torch.tensor(self.lengths, dtype=torch.int64))
        inputs = (*inputs, cast(self.offset), cast(self.bias_values), self.layout, self.heads)
        out = code_attention(*inputs, self.activation, name, False, *request)
        grads = code_attention_backward(
            cast(self.upstream), cast(self.upstream_total), *out, *inputs, self.activation, name, *request
        )
        names = ("grad_query", "grad_offset", "grad_bias")
        return {"z": out[0], **dict(zip(names, grads, strict=True))}

    def check(self, backend: str, tolerance: float = 1e-5) -> None:
        """Every result within ``tolerance`` of the largest value of the truth's."""
        truth, found = self.truth(), self.run(backend)
        scale = max((float(t.abs().max()) for t in truth.values() if t.numel()), default=0.0)
        for name, expected in truth.items():
            if not expected.numel():
                continue
            limit = tolerance * max(float(expected.abs().max()), 0.05 * scale)
            error = float((found[name].double() - expected).abs().max())
            assert error <= limit, f"{backend} {name}: error {error:.2g}, allowed {limit:.2g}: {self}"
