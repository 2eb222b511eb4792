"""Changes to plain values, tensors and bytes, drawn from a seeded generator."""

import copy
import random
from typing import Any

import torch
from torch import Tensor

ODD = (
    None, True, False, 0, 1, -1, 2, 7, 255, 256, 2**31, 2**63 - 1, 2**63, -(2**63), 2**80, 0.5, -0.0, 1e308,
    float("inf"), float("nan"), "", "a", "..", "../x", "/etc/passwd", "\0", "\u202e", "é" * 300, "x" * 5000,
    [], {}, [[]], [0], [-1], {"a": 1}, "0" * 64, "f" * 64,
)  # fmt: skip


def change_value(value: Any, chance: random.Random) -> Any:
    """A copy of nested plain values in which one place is replaced, left out, doubled or added to."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    holder, key = chance.choice(places) if places else (None, None)
    if holder is None:
        return chance.choice(ODD)
    kind = chance.randrange(6)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1:
        other, name = chance.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif kind == 2 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif kind == 3 and isinstance(holder, dict):
        holder[chance.choice(("more", "", "kind", "seal", "../x"))] = chance.choice(ODD)
    elif kind == 4 and type(holder[key]) is int:
        holder[key] += chance.choice((-1, 1, 1 << 20, 1 << 40))
    else:
        holder[key] = copy.deepcopy(chance.choice(ODD))
    return value


def _places(value: Any) -> Any:
    if isinstance(value, dict):
        for key in list(value):
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        for key in range(len(value)):
            yield value, key
            yield from _places(value[key])


def change_tensor(tensor: Tensor, chance: random.Random) -> Tensor:
    """Another tensor: an element, the order, the shape or the type."""
    flat = tensor.clone().flatten()
    kind = chance.randrange(6)
    if kind <= 1 and len(flat):
        odd = chance.choice((0, 1, -1, 2, 127, 255, 1 << 31, -(1 << 63), (1 << 63) - 1))
        if not tensor.is_floating_point():
            limits = (0, 1) if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype)
            low, high = limits if isinstance(limits, tuple) else (limits.min, limits.max)
            odd = min(max(odd, low), high)
        flat[chance.randrange(len(flat))] = odd
        return flat.reshape(tensor.shape)
    if kind == 2:
        return flat.flip(0).reshape(tensor.shape)
    if kind == 3:
        return tensor[: len(tensor) // 2].clone() if tensor.dim() else tensor.reshape(1)
    if kind == 4:
        return tensor.to(chance.choice((torch.int32, torch.float64, torch.uint8, torch.bool)))
    return torch.cat([tensor, tensor]) if tensor.dim() else tensor


def change_bytes(data: bytes, chance: random.Random) -> bytes:
    """Other bytes: one changed, a piece cut out, doubled or exchanged."""
    at = chance.randrange(max(len(data), 1))
    kind = chance.randrange(4)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + chance.randrange(1, 9) :]
    if kind == 2:
        return data[:at] + bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9))) + data[at:]
    return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :] if data else b"x"
