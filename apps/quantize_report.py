"""The report on a set of SIDs: `quality.json`, one figure, and a self-contained `report.html`."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from torchrec_sid.artifact import write_atomically, write_json
from torchrec_sid.quality import QualityReport
from torchrec_sid.seeding import derived_generator

from .quantize_content import Array, Content

matplotlib.use("Agg")
from matplotlib import pyplot as plt

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
def examples_by_prefix(content: Content, chosen: Array, *, beam: int = 1) -> list[PrefixExample]:
    """Six level-1 prefixes, from the most to the least popular, each with its two largest continuations.

    Args:
        content: items as vectors, and their quantizer.
        chosen: ``[N]`` bool, the items to draw from; at most 50,000 of them are looked at.
        beam: as for ``encode``.
    """
    rows = np.flatnonzero(chosen)
    if len(rows) > _EXAMPLE_ROWS:
        generator = derived_generator(0, "quantize.examples")
        rows = np.sort(rows[torch.randperm(len(rows), generator=generator)[:_EXAMPLE_ROWS].numpy()])
    looked_at = np.zeros(len(chosen), dtype=bool)
    looked_at[rows] = True
    x = torch.cat(list(content.stream(looked_at))).cpu()
    codes = content.view.encode(x, beam=beam).cpu()
    items = _Items(content, rows, codes, normalize(x, dim=1))
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
    content: Content
    rows: Array  # [n] int64, dense indices
    codes: Tensor  # [n, L] int64
    units: Tensor  # [n, d] float32

    def example(self, prefix: tuple[int, ...]) -> PrefixExample:
        members = (self.codes[:, : len(prefix)] == torch.tensor(prefix)).all(1).nonzero().flatten()
        centre = normalize(self.content.view.decode(torch.tensor([prefix])).cpu(), dim=1)[0]
        cosine = self.units[members] @ centre
        nearest = members[cosine.argsort(descending=True)[:_ITEMS]]
        names = tuple(self.content.folder.texts(self.rows[nearest.numpy()]))
        return PrefixExample(prefix, len(members), float(cosine.mean()), names)


def write_report(
    output: Path,
    settings: Mapping[str, Any],
    quality: QualityReport,
    examples: Sequence[PrefixExample],
    *,
    html: bool = True,
) -> Path:
    """Write quality.json, and with ``html`` quality.png and report.html; return the path of the last."""
    examples_json = [example._asdict() for example in examples]
    write_json(output / "quality.json", {**settings, **quality.to_dict(), "examples": examples_json})
    if not html:
        return output / "quality.json"
    picture = output / "quality.png"
    plot_quality(quality, picture)
    page = _page(settings, quality, examples, picture)
    write_atomically(output / "report.html", lambda path: path.write_text(page))
    return output / "report.html"


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
    levels, prefixes = quality.levels, quality.prefixes
    figure, grid = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    names = [level.level for level in levels]
    usage, error, cosine, sharing, alone, collisions = grid.flat
    usage.bar(names, [level.used / level.cardinality for level in levels], color="tab:gray", label="used")
    usage.bar(
        names, [level.perplexity / level.cardinality for level in levels], width=0.5, label="perplexity"
    )
    usage.set(title="usage", xlabel="level", ylabel="share of the codes", ylim=(0, 1.05))
    usage.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.08))
    bits = np.cumsum([np.log2(level.cardinality) for level in levels])
    error.plot([0, *bits], [1.0, *(level.fvu for level in levels)], "o-")
    error.set(title="error by stage", xlabel="bits", ylabel="variance unexplained", ylim=(0, 1.02))
    depths = [prefix.depth for prefix in prefixes]
    cosine.plot(depths, [_nan(prefix.cosine) for prefix in prefixes], "o-", label="two items of one prefix")
    cosine.axhline(quality.random_cosine, color="tab:gray", ls="--", label="two items at random")
    cosine.set(title="cosine by shared prefix", xlabel="codes shared", ylabel="mean cosine")
    cosine.legend(frameon=False)
    per_prefix = [prefix.items_per_prefix for prefix in prefixes]
    for name in prefixes[0].purity:
        sharing.plot(
            per_prefix, [prefix.purity[name] for prefix in prefixes], "o-", label=f"purity: {name}"
        )
    if not prefixes[0].purity:
        sharing.plot(per_prefix, [_nan(prefix.cosine) for prefix in prefixes], "o-", label="mean cosine")
    sharing.set(title="sharing curve", xlabel="items per prefix", xscale="log", ylabel="how alike they are")
    sharing.legend(frameon=False)
    alone.plot(depths, [prefix.mates for prefix in prefixes], "o-")
    alone.set(
        title="others that share an item's prefix", xlabel="codes shared", ylabel="items", yscale="symlog"
    )
    shares = [quality.collision_rate, quality.unique / max(quality.items, 1)]
    collisions.bar(["items that share\ntheir full SID", "different SIDs\nper item"], shares, width=0.5)
    collisions.set(title="collisions", ylim=(0, 1.05))
    for axes in (usage, cosine, alone):
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _page(
    settings: Mapping[str, Any], quality: QualityReport, examples: Sequence[PrefixExample], picture: Path
) -> str:
    image = base64.b64encode(picture.read_bytes()).decode()
    levels = _table(
        ("level", "codes", "used", "perplexity", "variance unexplained"),
        [
            (level.level, level.cardinality, level.used, f"{level.perplexity:.1f}", f"{level.fvu:.4f}")
            for level in quality.levels
        ],
    )
    labels = list(quality.prefixes[0].purity)
    prefixes = _table(
        ("codes shared", "prefixes", "items per prefix", "others with it", "mean cosine", *labels),
        [
            (
                prefix.depth,
                f"{prefix.groups:,}",
                f"{prefix.items_per_prefix:,.2f}",
                f"{prefix.mates:,.2f}",
                "-" if prefix.cosine is None else f"{prefix.cosine:.3f}",
                *(f"{prefix.purity[name]:.3f}" for name in labels),
            )
            for prefix in quality.prefixes
        ],
    )
    shown = _table(
        ("prefix", "items", "cosine", "nearest items"),
        [
            (
                "-".join(map(str, e.prefix)),
                f"{e.items:,}",
                f"{e.cosine:.2f}",
                " | ".join(n[:80] for n in e.names),
            )
            for e in examples
        ],
    )
    facts = _table(
        ("", ""), [(k.replace("_", " "), v) for k, v in settings.items() if k not in ("sources", "drift")]
    )
    drift = settings["drift"]
    kept = "".join(
        f"<h3>{escape(name)}</h3>{_table(tuple(figures), [[_short(v) for v in figures.values()]])}"
        for name, figures in settings["sources"].items()
    )
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:1em 0}"
        "td,th{padding:.25em .7em;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}"
        "img{max-width:100%}"
    )
    return (
        f"<!doctype html><meta charset='utf-8'><title>Semantic IDs</title><style>{style}</style>"
        f"<h1>Semantic IDs of {escape(str(settings['data']))}</h1>"
        f"<p><b>{escape(quality.verdict.name)}.</b> {escape(quality.verdict.text)}</p>"
        f"<p>{quality.bits} bits, {quality.nbytes} bytes an item; {quality.unique:,} SIDs for "
        f"{quality.items:,} items, {quality.collision_rate:.1%} of items share theirs. Errors on "
        f"{quality.held_out:,} embeddings. Two items at random have cosine {quality.random_cosine:.3f}.</p>"
        f"<img alt='quality' src='data:image/png;base64,{image}'>"
        f"<h2>Levels</h2>{levels}<h2>Prefixes</h2>{prefixes}"
        + (f"<h2>What the SID keeps of each source</h2>{kept}" if kept else "")
        + (f"<h2>Drift</h2>{_table(tuple(drift), [tuple(drift.values())])}" if drift else "")
        + f"<h2>Items by prefix</h2>{shown}<h2>Run</h2>{facts}"
    )


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cells(values: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(v))}</{tag}>" for v in values) + "</tr>"

    return f"<table>{cells(head, 'th')}{''.join(cells(row, 'td') for row in rows)}</table>"
