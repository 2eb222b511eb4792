"""Adapters: batches that carry codes instead of packed SIDs, and ids to be looked up beforehand.

Each is a module without parameters from KJT to KJT, so that a pipeline can run it ahead. A collection
takes one as ``adapter=``; anywhere else, call it before the collection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.catalog_map import Catalog, CatalogMap
from torchrec_sid.tables.checks import check_kjt


class PackFeatures(nn.Module):
    """L features, one per level, to one feature of packed SIDs; the other features stay as they are.

    Args:
        features: name of the packed feature -> names of its levels, coarsest first.
        spec: shape of the SIDs.

    Raises:
        SidError: a wrong number of levels; at forward, levels whose lengths differ, or a code out of range.

    Example:
        >>> pack = PackFeatures({"item": ["item_1", "item_2"]}, SidSpec((4, 4)))
        >>> kjt = KeyedJaggedTensor.from_lengths_sync(
        ...     keys=["item_1", "item_2"], values=torch.tensor([1, 2]), lengths=torch.tensor([1, 1]))
        >>> pack(kjt).keys(), pack(kjt).values().tolist()
        (['item'], [6])
    """

    def __init__(self, features: Mapping[str, Sequence[str]], spec: SidSpec) -> None:
        super().__init__()
        self._features = {name: list(levels) for name, levels in features.items()}
        self._spec = spec
        for name, levels in self._features.items():
            _check_levels(name, len(levels), spec)

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """KJT with the level features -> KJT with the packed ones, in the place of their first level."""
        needed = [level for levels in self._features.values() for level in levels]
        check_kjt(features, needed, weighted=False)
        first = {levels[0]: name for name, levels in self._features.items()}
        present = features.keys()
        keep = [key for key in present if key in first or key not in needed]
        values: list[Tensor] = []
        for key in keep:
            values.append(self._pack(features, first[key]) if key in first else features[key].values())
        kept = features.permute([present.index(key) for key in keep])
        keys = [first.get(key, key) for key in keep]
        inverse = features.inverse_indices_or_none()
        if inverse is not None:  # permute drops them
            rows = torch.tensor([inverse[0].index(key) for key in keep], device=inverse[1].device)
            inverse = (keys, inverse[1].index_select(0, rows))
        return _with_values(kept, keys, torch.cat(values), kept.lengths(), inverse)

    def _pack(self, features: KeyedJaggedTensor, name: str) -> Tensor:
        levels = self._features[name]
        lengths = features[levels[0]].lengths()
        columns = []
        for level, key in enumerate(levels):
            _check_same_lengths(key, features[key].lengths(), levels[0], lengths)
            codes = features[key].values()
            _check_codes(key, codes, self._spec, level)
            columns.append(codes)
        return self._spec.pack(torch.stack(columns, dim=1), validate=False)


class PackValues(nn.Module):
    """Features of L values per item, item by item, to one packed SID per item; others stay as they are.

    Args:
        features: features that carry codes.
        spec: shape of the SIDs.

    Raises:
        SidError: at forward, a bag that is not a whole number of items, or a code out of range. Weights are
            refused: there is no telling which of an item's L weights is meant.
    """

    def __init__(self, features: Sequence[str], spec: SidSpec) -> None:
        super().__init__()
        self._features = list(features)
        self._spec = spec

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """KJT whose bags are L times as long -> KJT of packed SIDs."""
        check_kjt(features, self._features, weighted=False)
        if features.weights_or_none() is not None:
            raise SidError(
                f"features {self._features}",
                "a weighted KeyedJaggedTensor",
                "Pack the codes before weighting.",
            )
        values: list[Tensor] = []
        lengths: list[Tensor] = []
        keys = features.keys()
        for key in keys:
            jagged = features[key]
            if key not in self._features:
                values.append(jagged.values())
                lengths.append(jagged.lengths())
                continue
            levels = self._spec.levels
            odd = (jagged.lengths() % levels).nonzero()
            if len(odd):
                row = int(odd[0])
                raise SidError(
                    f"feature {key!r}",
                    f"example {row} has {int(jagged.lengths()[row])} codes, not a multiple of {levels}",
                    f"Every item of this SidSpec has {levels} codes.",
                )
            codes = jagged.values().view(-1, levels)
            for level in range(levels):
                _check_codes(key, codes[:, level], self._spec, level)
            values.append(self._spec.pack(codes, validate=False))
            lengths.append(jagged.lengths() // levels)
        inverse = features.inverse_indices_or_none()
        return _with_values(features, keys, torch.cat(values), torch.cat(lengths), inverse)


class CatalogLookup(nn.Module):
    """Features of raw ids to packed SIDs, for models that use the SIDs more than once.

    A collection with ``catalog=`` does the same inside, and keeps the raw ids for its memory tables.

    Args:
        features: features that carry raw ids.
        catalog: an open SidCatalog.
        device: where its map lives.
    """

    def __init__(
        self, features: Sequence[str], catalog: Catalog, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self._features = list(features)
        self.map = CatalogMap(catalog, device)

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Ids that the catalog does not hold become -1 and are counted in ``map.unknown_count``."""
        check_kjt(features, self._features, weighted=False)
        offsets = features.offset_per_key()
        values = []
        for i, key in enumerate(features.keys()):
            piece = features.values()[offsets[i] : offsets[i + 1]]
            values.append(self.map(piece) if key in self._features else piece)
        inverse = features.inverse_indices_or_none()
        return _with_values(features, features.keys(), torch.cat(values), features.lengths(), inverse)


def _check_levels(name: str, found: int, spec: SidSpec) -> None:
    if found != spec.levels:
        raise SidError(
            f"feature {name!r}",
            f"{found} level features",
            f"This SidSpec has {spec.levels} levels: name them all.",
        )


def _check_codes(name: str, codes: Tensor, spec: SidSpec, level: int) -> None:
    bad = (codes < 0) | (codes >= spec.cardinalities[level])
    if codes.device.type != "cpu":
        torch._assert_async(~bad.any(), f"feature {name!r}: a code of level {level + 1} is out of range")
    elif bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise SidError(
            f"feature {name!r}",
            f"code {int(codes[row])} of item {row} at level {level + 1}, "
            f"outside 0..{spec.cardinalities[level] - 1}",
            "Encode with the quantizer this spec belongs to.",
        )


def _check_same_lengths(name: str, lengths: Tensor, first_name: str, first: Tensor) -> None:
    message = f"its lengths differ from those of {first_name!r}"
    if lengths.shape == first.shape and lengths.device.type != "cpu":
        torch._assert_async((lengths == first).all(), f"feature {name!r}: {message}")
    elif not torch.equal(lengths, first):
        raise SidError(f"feature {name!r}", message, "The levels of a SID have one value per item each.")


def _with_values(
    like: KeyedJaggedTensor,
    keys: list[str],
    values: Tensor,
    lengths: Tensor,
    inverse: tuple[list[str], Tensor] | None,
) -> KeyedJaggedTensor:
    """The same batch with other keys, values and lengths."""
    variable = like.variable_stride_per_key()
    return KeyedJaggedTensor(
        keys=keys,
        values=values.contiguous(),
        weights=like.weights_or_none(),
        lengths=lengths,
        stride=None if variable else like.stride(),
        stride_per_key_per_rank=like.stride_per_key_per_rank() if variable else None,
        inverse_indices=inverse,
    )
