"""The report on a set of SIDs: `quality.json`, one figure, and a self-contained `report.html`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from torchrec_sid.artifact import write_json
from torchrec_sid.item_content import Array, ItemContent
from torchrec_sid.quality import QualityReport
from torchrec_sid.quantizers import Quantizer
from torchrec_sid.seeding import derived_generator

from .pages import drawn, write_page

_EXAMPLE_ROWS = 50_000
_TOP_PREFIXES = 6
_CHILDREN = 2
_ITEMS = 5


class PrefixExample(NamedTuple):
    """A prefix and the items nearest to what it decodes to."""

    prefix: tuple[int, ...]
    items: int
    """Items with this prefix, among those looked at."""
    cosine: float
    """Mean cosine of those items with the decoded prefix."""
    names: tuple[str, ...]
    """Titles or texts of the nearest ones."""


@torch.no_grad()
def examples_by_prefix(
    quantizer: Quantizer, content: ItemContent, chosen: Array, *, beam: int = 1
) -> list[PrefixExample]:
    """Six level-1 prefixes, from the most to the least popular, each with its two largest continuations.

    Args:
        quantizer: of the SIDs.
        content: the items.
        chosen: ``[N]`` bool, the items to draw from; at most 50,000 of them are looked at.
        beam: as for ``encode``.
    """
    rows = np.flatnonzero(chosen)
    if len(rows) > _EXAMPLE_ROWS:
        generator = derived_generator(0, "quantize.examples")
        rows = np.sort(rows[torch.randperm(len(rows), generator=generator)[:_EXAMPLE_ROWS].numpy()])
    looked_at = np.zeros(len(chosen), dtype=bool)
    looked_at[rows] = True
    x = torch.cat(list(quantizer.rows(content.data(looked_at)))).cpu()
    codes = quantizer.encode(x, beam=beam).cpu()
    items = _Items(quantizer, content, rows, codes, normalize(x, dim=1))
    counts = codes[:, 0].bincount()
    popular = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    places = torch.linspace(0, len(popular) - 1, min(_TOP_PREFIXES, len(popular))).round().long()
    out = []
    for code in popular[places].tolist():
        out.append(items.example((code,)))
        if codes.shape[1] == 1:
            continue
        children = codes[codes[:, 0] == code, 1].bincount()
        largest = children.argsort(descending=True, stable=True)[:_CHILDREN].tolist()
        out += [items.example((code, child)) for child in largest if children[child]]
    return out


class _Items(NamedTuple):
    quantizer: Quantizer
    content: ItemContent
    rows: Array  # [n] int64, dense indices
    codes: Tensor  # [n, L] int64
    units: Tensor  # [n, d] float32

    def example(self, prefix: tuple[int, ...]) -> PrefixExample:
        members = (self.codes[:, : len(prefix)] == torch.tensor(prefix)).all(1).nonzero().flatten()
        centre = normalize(self.quantizer.decode(torch.tensor([prefix])).cpu(), dim=1)[0]
        cosine = self.units[members] @ centre
        nearest = members[cosine.argsort(descending=True)[:_ITEMS]]
        names = tuple(self.content.folder.texts(self.rows[nearest.numpy()]))
        return PrefixExample(prefix, len(members), float(cosine.mean()), names)


def write_report(
    quality_file: Path, settings: Mapping[str, Any], examples: Sequence[PrefixExample], *, html: bool = True
) -> Path:
    """Add settings and examples to quality.json; with ``html`` write quality.png and report.html beside it.

    Returns:
        The path of the last.
    """
    figures = {**json.loads(quality_file.read_text()), **settings}
    quality = QualityReport.from_dict(figures)
    write_json(quality_file, {**figures, "examples": [example._asdict() for example in examples]})
    if not html:
        return quality_file
    plot_quality(quality, quality_file.with_name("quality.png"))
    own = {f.name for f in fields(QualityReport)} | {"examples"}
    settings = {name: value for name, value in figures.items() if name not in own}
    page = quality_file.with_name("report.html")
    labels = list(quality.prefixes[0].purity)
    write_page(
        page,
        "quality.html",
        settings=settings,
        quality=quality,
        labels=labels,
        pictures=[
            (title, drawn(lambda axes, draw=draw: draw(axes, quality)))  # type: ignore[misc]
            for title, draw in _PANELS.items()
        ],
        sources=[(name, list(found), list(found.values())) for name, found in settings["sources"].items()],
        examples=examples,
    )
    return page


def missing_items(missing: Mapping[str, int]) -> str:
    """How many items lack content, in a line."""
    lacking = [f"{name} {count:,}" for name, count in missing.items() if name != "any" and count]
    if not lacking:
        return "every item has a SID"
    return f"items without a SID: {missing['any']:,} (without each source: {', '.join(lacking)})"


def describe(quality: QualityReport) -> str:
    """The report as a few lines for a terminal."""
    lines = [
        f"{quality.verdict.name}: {quality.verdict.text}",
        f"{len(quality.levels)} levels, {quality.bits} bits, {quality.nbytes} bytes; "
        f"{quality.unique:,} SIDs for {quality.items:,} items, "
        f"{quality.collision_rate:.1%} of items share theirs",
    ]
    lines += [
        f"  level {level.level}: {level.used} of {level.cardinality} codes, "
        f"perplexity {level.perplexity:.0f}, variance unexplained {level.fvu:.3f}"
        for level in quality.levels[:8]
    ]
    if len(quality.levels) > 8:
        lines.append(f"  ... level {len(quality.levels)}: variance unexplained {quality.fvu:.3f}")
    return "\n".join(lines)


def plot_quality(quality: QualityReport, path: Path) -> None:
    """Usage per level, error by stage, cosine by shared prefix, the sharing curve, and collisions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    for axes, (title, draw) in zip(figure.subplots(2, 3).flat, _PANELS.items(), strict=True):
        draw(axes, quality)
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _usage(axes: Any, quality: QualityReport) -> None:
    levels = quality.levels
    names = [level.level for level in levels]
    axes.bar(names, [level.used / level.cardinality for level in levels], color="tab:gray", label="used")
    perplexity = [level.perplexity / level.cardinality for level in levels]
    axes.bar(names, perplexity, width=0.5, label="perplexity")
    axes.set(xlabel="level", ylabel="share of the codes", ylim=(0, 1.2))
    axes.legend(frameon=False, ncols=2, loc="upper center")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _error(axes: Any, quality: QualityReport) -> None:
    bits = np.cumsum([np.log2(level.cardinality) for level in quality.levels])
    axes.plot([0, *bits], [1.0, *(level.fvu for level in quality.levels)], "o-")
    axes.set(xlabel="bits", ylabel="variance unexplained", ylim=(0, 1.02))


def _cosine(axes: Any, quality: QualityReport) -> None:
    depths = [prefix.depth for prefix in quality.prefixes]
    cosines = [_nan(prefix.cosine) for prefix in quality.prefixes]
    axes.plot(depths, cosines, "o-", label="two items of one prefix")
    axes.axhline(quality.random_cosine, color="tab:gray", ls="--", label="two items at random")
    axes.set(xlabel="codes shared", ylabel="mean cosine")
    axes.legend(frameon=False)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _sharing(axes: Any, quality: QualityReport) -> None:
    prefixes = quality.prefixes
    per_prefix = [prefix.items_per_prefix for prefix in prefixes]
    curves = {
        f"purity: {name}": [prefix.purity[name] for prefix in prefixes] for name in prefixes[0].purity
    }
    for label, values in (curves or {"mean cosine": [_nan(prefix.cosine) for prefix in prefixes]}).items():
        axes.plot(per_prefix, values, "o-", label=label)
    axes.set(xlabel="items per prefix", xscale="log", ylabel="how alike they are")
    axes.legend(frameon=False)


def _mates(axes: Any, quality: QualityReport) -> None:
    depths = [prefix.depth for prefix in quality.prefixes]
    axes.plot(depths, [prefix.mates for prefix in quality.prefixes], "o-")
    axes.set(xlabel="codes shared", ylabel="items", yscale="symlog")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _collisions(axes: Any, quality: QualityReport) -> None:
    shares = [quality.collision_rate, quality.unique / max(quality.items, 1)]
    axes.bar(["items that share\ntheir full SID", "different SIDs\nper item"], shares, width=0.5)
    axes.set(ylim=(0, 1.05))


_PANELS: dict[str, Callable[[Any, QualityReport], None]] = {
    "usage": _usage,
    "error by stage": _error,
    "cosine by shared prefix": _cosine,
    "sharing curve": _sharing,
    "others that share an item's prefix": _mates,
    "collisions": _collisions,
}
"""Title -> what draws it."""


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value
