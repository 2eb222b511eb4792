"""A new generation of SIDs: a quantizer that was fitted again, under the names of the one before."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchrec_sid.catalog import SidCatalog
from torchrec_sid.errors import SidError
from torchrec_sid.item_content import ItemContent
from torchrec_sid.quantizers import Quantizer, ResidualKMeans, align_codes, load_quantizer


def earlier_catalog(home: str | Path) -> SidCatalog:
    """The catalog of an earlier run's folder.

    Raises:
        ArtifactError: there is none.
    """
    return SidCatalog.open(Path(home) / "catalog", verify=False)


def earlier_quantizer(home: str | Path, like: ResidualKMeans) -> ResidualKMeans | None:
    """The residual k-means of an earlier run where it has the shape of ``like``; else None."""
    found = load_quantizer(Path(home) / "quantizer.safetensors")
    alike = isinstance(found, ResidualKMeans) and (found.dim, found.spec) == (like.dim, like.spec)
    return found if isinstance(found, ResidualKMeans) and alike else None


def align_to_catalog(
    quantizer: Quantizer, content: ItemContent, traffic: Tensor | None, home: str | Path, *, beam: int
) -> dict[str, Any]:
    """Rename the codes of a quantizer, in place, after the SIDs that items have in an earlier catalog.

    Args:
        quantizer: fitted.
        content: of the items, those with a SID in the earlier catalog among them.
        traffic: ``[N]`` weights of the items of ``content``; None: all alike.
        home: folder of the earlier run.
        beam: hypotheses per level while encoding.

    Returns:
        What quality.json says of it: the earlier catalog, how many items it was matched by, and the shares
        of items and traffic that changed, aligned and not.

    Raises:
        SidError: SIDs of another shape, no item in common, or codes that cannot be renamed.
    """
    catalog, spec = earlier_catalog(home), quantizer.spec
    if catalog.spec.cardinalities[: spec.levels] != spec.cardinalities:
        raise SidError(
            f"align_to {home}",
            f"SIDs of {catalog.spec.cardinalities}, where the new ones are of {spec.cardinalities}",
            "Fit the same shape, or leave align_to out: SIDs of another shape need a new model.",
        )
    ids = torch.from_numpy(content.item_ids.copy())
    common = catalog.contains(ids) & torch.from_numpy(content.present)
    if not bool(common.any()):
        raise SidError(f"align_to {home}", "no item that has content here", "Check both folders.")
    # A last digit tells items apart and has no meaning to keep.
    old = catalog.codes(ids[common])[:, : spec.levels]
    new = quantizer.encode(content.data(common.numpy()), beam=beam).cpu()
    done = align_codes(quantizer, old, new, None if traffic is None else traffic[common])
    return {
        "catalog": catalog.fingerprint,
        "items": int(common.sum()),
        "unaligned": asdict(done.unaligned),
        "aligned": asdict(done.aligned),
        "text": done.describe(),
    }
