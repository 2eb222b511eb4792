"""VqFusion: what one SID keeps of several sources, missing ones, its options, and bad input."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_sid.artifact import tensor_file
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.quality import measure_quality
from torchrec_sid.quantizers import (
    CategoryReport,
    CategorySource,
    DiscretePca,
    DiscretePcaConfig,
    EmbeddingReport,
    EmbeddingSource,
    VqFusion,
    VqFusionConfig,
    load_quantizer,
)
from torchrec_sid.quantizers.fusion.fusion_model import FusionModel
from torchrec_sid.quantizers.fusion.heads import info_nce, source_errors
from torchrec_sid.quantizers.fusion.source_rows import FusionData, SparseShares
from torchrec_sid.quantizers.fusion.sources import FusionInputs, SourcePart

SOURCES = {"text": EmbeddingSource(12), "image": EmbeddingSource(8), "kind": CategorySource(6)}
SMALL = VqFusionConfig(codebooks=(16, 16), stages=((5, 3),), hidden=(24,), batch_size=64, epochs=4)
Items = dict[str, torch.Tensor]


def items(rows: int, seed: int = 0) -> Items:
    """Topics with a class each; text and image show the topic and partly the same details."""
    fixed = torch.Generator().manual_seed(5)
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(24, 10, generator=fixed) * 2
    topic = torch.randint(24, (rows,), generator=generator)
    detail = torch.randn(rows, 10, generator=generator)
    shown = topics[topic] + detail
    to_text = torch.randn(10, 12, generator=fixed)
    to_image = torch.randn(10, 8, generator=fixed)
    noise = torch.randn(rows, 20, generator=generator)
    return {
        "text": shown @ to_text + noise[:, :12] + 7,
        "image": (shown @ to_image + noise[:, 12:]) * 100,
        "kind": topic % 6,
    }


def fitted(data: Items, config: VqFusionConfig = SMALL, **options: Any) -> VqFusion:
    fusion = VqFusion({name: SOURCES[name] for name in data}, config)
    fusion.fit(data, **options)
    return fusion


def embedding(reports: dict[str, Any], name: str) -> EmbeddingReport:
    report = reports[name]
    assert isinstance(report, EmbeddingReport)
    return report


# ---- what it keeps


def test_one_sid_keeps_each_source_better_than_two_of_half_the_bits() -> None:
    data, held_out = items(2000), items(800, seed=1)
    half = dataclasses.replace(SMALL, codebooks=(16,), stages=((2, 3),))
    together = fitted({"text": data["text"], "image": data["image"]})
    reports = together.report({"text": held_out["text"], "image": held_out["image"]})
    for name in ("text", "image"):
        alone = fitted({name: data[name]}, half)
        assert together.spec.bits >= 2 * alone.spec.bits - 2
        assert embedding(reports, name).fvu < embedding(alone.report({name: held_out[name]}), name).fvu


def test_categories_are_kept_and_reported_against_the_ceiling() -> None:
    data, held_out = items(2000), items(800, seed=1)
    fusion = fitted(data)
    reports = fusion.report(held_out)
    kind = reports["kind"]
    assert isinstance(kind, CategoryReport)
    assert kind.top1 > 0.95
    assert 0.1 < kind.top1_majority < 0.3
    assert kind.top1_ceiling >= kind.top1 - 0.02
    assert kind.kl < 0.3 * kind.entropy
    text = embedding(reports, "text")
    decoded = fusion.decode_sources(fusion.encode(held_out))
    by_hand = (held_out["text"] - decoded["text"]).square().sum()
    by_hand /= (held_out["text"] - held_out["text"].mean(0)).square().sum()
    assert text.fvu == pytest.approx(float(by_hand), rel=1e-3)
    assert text.fvu_ceiling < text.fvu
    assert kind.top1 == pytest.approx(float((decoded["kind"].argmax(1) == held_out["kind"]).float().mean()))
    torch.testing.assert_close(decoded["kind"].sum(1), torch.ones(800))
    beamed = embedding(fusion.report(held_out, beam=4), "text")
    assert beamed.fvu != text.fvu


@pytest.mark.parametrize(
    ("codebooks", "stages"),
    [((16, 16), ()), ((), ((6, 3), (6, 3))), ((), ((8, 5),)), ((16,), ((5, 3), (3, 5)))],
    ids=["residual codebooks", "Discrete PCA", "FSQ", "mixed"],
)
def test_any_quantizer_learns_inside(codebooks: Any, stages: Any) -> None:
    data = {"text": items(1500)["text"]}
    config = dataclasses.replace(SMALL, codebooks=codebooks, stages=stages, epochs=0)
    start = fitted(data, config)
    trained = VqFusion(
        {"text": SOURCES["text"]}, dataclasses.replace(config, epochs=12, learning_rate=3e-3)
    )
    report = trained.fit(data)
    before, after = (embedding(f.report(data), "text").fvu for f in (start, trained))
    assert after < 0.999 * before
    assert report.fvu[-1] == pytest.approx(after, rel=1e-2)
    assert len(report.fvu) == trained.spec.levels == len(codebooks) + sum(m for m, _ in stages)
    if stages:
        closed = DiscretePca(12, DiscretePcaConfig(stages=stages, codebooks=codebooks))
        expected = closed.fit(data["text"]).fvu[-1]
        assert before == pytest.approx(expected, rel=0.1)
    codes = trained.encode(data)
    for depth in range(1, trained.spec.levels + 1):
        assert trained.decode_sources(codes[:, :depth])["text"].shape == (1500, 12)


def test_weights_shift_what_is_kept() -> None:
    data = items(1500)
    plain = fitted(data).report(data)
    sources = {**SOURCES, "image": EmbeddingSource(8, weight=10.0)}
    heavy = VqFusion(sources, SMALL)
    heavy.fit(data)
    assert embedding(heavy.report(data), "image").fvu < embedding(plain, "image").fvu
    assert embedding(heavy.report(data), "text").fvu > embedding(plain, "text").fvu


# ---- missing sources


def test_an_item_without_a_source_gets_a_near_by_sid() -> None:
    data, held_out = items(3000), items(800, seed=1)
    fusion = fitted(data)
    whole = fusion.encode(held_out)

    def agreement(quantizer: VqFusion, name: str) -> float:
        rest = {n: v for n, v in held_out.items() if n != name}
        return float((quantizer.encode(rest)[:, 0] == whole[:, 0]).float().mean())

    for name in ("image", "kind"):
        assert agreement(fusion, name) > 0.6
    blind = fitted(data)
    blind.inputs.imputation.zero_()
    assert agreement(fusion, "image") > agreement(blind, "image")
    decoded = fusion.decode_sources(fusion.encode({"text": held_out["text"]}))
    assert float((decoded["kind"].argmax(1) == held_out["kind"]).float().mean()) > 0.6


def test_rows_marked_missing_are_as_if_left_out() -> None:
    data = items(600)
    present = torch.ones(600, dtype=torch.bool)
    present[100:200] = False
    with_junk = {**data, "image": data["image"].clone()}
    with_junk["image"][100:200] = 1e6
    fusion = fitted(with_junk, present={"image": present})
    kinds = data["kind"].clone()
    kinds[300:] = -1
    assert fusion.inputs.mean.abs().max() < 1e4, "values of missing rows entered the mean"
    rows = {"text": data["text"], "image": data["image"], "kind": kinds}
    masked = fusion.encode(rows, present={"image": present})
    part = {name: v[100:200] for name, v in data.items() if name != "image"}
    assert torch.equal(masked[100:200], fusion.encode(part))
    reports = fusion.report(rows, present={"image": present})
    assert (reports["text"].rows, reports["image"].rows, reports["kind"].rows) == (600, 500, 300)


def test_training_with_hidden_sources_brings_their_latents_nearer() -> None:
    data = items(600)
    distance = {}
    for rate in (0.0, 0.4):
        config = dataclasses.replace(
            SMALL, source_dropout=rate, epochs=12, encoder_rate=1.0, learning_rate=3e-3
        )
        fusion = fitted(data, config)
        raw = next(iter(FusionData({"text": data["text"], "kind": data["kind"]}, fusion.sources)))
        whole = next(iter(FusionData(data, fusion.sources)))
        with torch.no_grad():
            apart = fusion.model.latents(fusion.model.pack(raw)) - fusion.model.latents(
                fusion.model.pack(whole)
            )
        distance[rate] = float(apart.square().sum() / fusion.bottleneck.variance)
    assert distance[0.4] < 0.99 * distance[0.0]


@given(st.integers(0, 1000), st.floats(0.0, 0.99))
def test_dropping_sources_leaves_one(seed: int, rate: float) -> None:
    inputs = FusionInputs(SOURCES)
    generator = torch.Generator().manual_seed(seed)
    flags = (torch.rand(20, 3, generator=generator) < 0.5).float()
    flags[torch.arange(20), torch.randint(3, (20,), generator=generator)] = 1
    values = torch.ones(20, inputs.dim) * inputs._per_column(flags)
    kept = inputs.drop(torch.cat([values, flags], dim=1), rate, generator)
    left = kept[:, inputs.dim :]
    assert bool((left.sum(1) >= 1).all())
    assert bool((left <= flags).all())
    assert torch.equal(kept[:, : inputs.dim], inputs._per_column(left))


# ---- losses


def test_errors_are_fractions_of_knowing_nothing() -> None:
    data = items(2000)
    inputs = FusionInputs(SOURCES)
    raw = torch.cat(list(FusionData(data, SOURCES)))
    from torchrec_sid.quantizers.collectives import Collectives

    inputs.fit([raw], Collectives())
    packed = inputs.pack(raw)
    parts = inputs.split(packed)
    share = data["kind"].bincount(minlength=6).float() / 2000
    nothing = [torch.zeros(2000, 12), torch.zeros(2000, 8), share.log().expand(2000, 6)]
    torch.testing.assert_close(source_errors(inputs, nothing, parts), torch.ones(3), rtol=1e-3, atol=1e-3)
    everything = [parts[0].values, parts[1].values, (parts[2].values + 1e-9).log()]
    torch.testing.assert_close(source_errors(inputs, everything, parts), torch.zeros(3), rtol=0, atol=1e-4)
    gone = [SourcePart(p.values, torch.zeros(2000, dtype=torch.bool)) for p in parts]
    assert source_errors(inputs, nothing, gone).tolist() == [0.0, 0.0, 0.0]


def test_info_nce_is_one_by_chance_and_zero_when_partners_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(512, 64, generator=generator)
    right = torch.randn(512, 64, generator=generator)
    assert float(info_nce(left, right, 1.0)) == pytest.approx(1.0, abs=0.02)
    assert float(info_nce(left, left, 0.05)) < 0.01


def test_pairs_pull_co_engaged_items_together() -> None:
    data = {"text": items(800)["text"]}
    generator = torch.Generator().manual_seed(0)
    # Users engage with items whose content is unrelated: only the pairs can say so.
    pairs = torch.randperm(800, generator=generator).view(-1, 2)
    config = dataclasses.replace(
        SMALL,
        epochs=12,
        learning_rate=3e-3,
        encoder_rate=1.0,
        contrastive_batch=128,
        collapse_below=0.0,
    )

    def together(fusion: VqFusion) -> float:
        with torch.no_grad():
            z = fusion.model.latents(next(iter(fusion.rows(data))))
        return float(torch.cosine_similarity(z[pairs[:, 0]], z[pairs[:, 1]]).mean())

    alone = fitted(data, config)
    paired = fitted(data, dataclasses.replace(config, contrastive_weight=1.0), pairs=pairs)
    assert together(paired) > together(alone) + 0.05


# ---- streams


@given(st.integers(1, 60), st.integers(1, 17), st.integers(1, 17))
def test_streams_of_any_batching_stay_in_step(rows: int, first: int, second: int) -> None:
    text = torch.arange(rows * 12.0).view(rows, 12)
    image = torch.arange(rows * 8.0).view(rows, 8)
    data = FusionData(
        {"text": lambda: iter(text.split(first)), "image": lambda: iter(image.split(second))}, SOURCES
    )
    raw = torch.cat(list(data))
    assert torch.equal(raw[:, :12], text)
    assert torch.equal(raw[:, 12:20], image)
    assert torch.equal(raw[:, -3:], torch.tensor([1.0, 1.0, 0.0]).expand(rows, 3))


def test_files_arrays_and_streams_give_the_same_fit(tmp_path: Path) -> None:
    data = items(300)
    np.save(tmp_path / "text.npy", data["text"].numpy())
    np.save(tmp_path / "kind.npy", data["kind"].numpy())
    one_hot = torch.nn.functional.one_hot(data["kind"], 6).float()
    whole = fitted(data)
    for other in (
        {"text": tmp_path / "text.npy", "image": data["image"].numpy(), "kind": tmp_path / "kind.npy"},
        {"text": lambda: iter(data["text"].split(300)), "image": data["image"], "kind": one_hot},
    ):
        fusion = VqFusion(SOURCES, SMALL)
        fusion.fit(other)
        assert fusion.fingerprint == whole.fingerprint


class InterruptedFitError(Exception):
    pass


def test_the_same_seed_gives_the_same_bits_and_a_fit_continues(tmp_path: Path) -> None:
    data = items(400)
    pairs = torch.arange(400).view(-1, 2)
    whole = fitted(data, pairs=pairs)
    torch.manual_seed(99)
    assert fitted(data, pairs=pairs).fingerprint == whole.fingerprint
    path = tmp_path / "fit.safetensors"
    options: dict[str, Any] = {"checkpoint": path, "checkpoint_every": 3, "pairs": pairs}
    steps = 0
    original = FusionModel.latents

    def interrupted(self: FusionModel, packed: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 30:
            raise InterruptedFitError
        return original(self, packed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusionModel, "latents", interrupted)
        with pytest.raises(InterruptedFitError):
            fitted(data, **options)
    assert path.is_file()
    assert fitted(data, **options).fingerprint == whole.fingerprint
    with pytest.raises(ArtifactError, match="Continue with the same"):
        fitted(data, **{**options, "pairs": None})


def test_every_field_changes_the_fit() -> None:
    data = items(200)
    pairs = torch.arange(200).view(-1, 2)
    # A dozen steps are too few to settle codebooks that move fast: the fit would keep its start.
    slow = dataclasses.replace(SMALL, codebook_rate=0.05)
    base = fitted(data, slow, pairs=pairs).state_dict()
    for change in (
        {"codebooks": (16, 8)},
        {"stages": ((4, 3),)},
        {"latent_dim": 10},
        {"hidden": ()},
        {"gradient": "rotation"},
        {"source_dropout": 0.5},
        {"contrastive_weight": 1.0},
        {"contrastive_temperature": 0.5},
        {"contrastive_batch": 16},
        {"seed": 1},
        {"codebook_update": "ema"},
        {"codebook_rate": 0.1},
        {"ema_decay": 0.9},
        {"commitment": 1.0},
        {"reset_below": 0.9},
        {"epochs": 2.0},
        {"batch_size": 100},
        {"learning_rate": 3e-3},
        {"encoder_rate": 1.0},
        {"buffer_rows": 128},
    ):
        other = fitted(data, dataclasses.replace(slow, **change), pairs=pairs).state_dict()
        same = all(
            other[name].shape == tensor.shape and torch.equal(other[name], tensor)
            for name, tensor in base.items()
            if name in other
        )
        assert not same, change


# ---- artefacts and reports


def test_round_trip_and_interrupted_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = items(300)
    sources = {"z": EmbeddingSource(12), "a.b": CategorySource(6, weight=2.0)}
    fusion = VqFusion(sources, SMALL)
    fusion.fit({"z": data["text"], "a.b": data["kind"]})
    path = tmp_path / "fusion.safetensors"
    mark = fusion.save(path)
    loaded = load_quantizer(path)
    assert isinstance(loaded, VqFusion)
    assert (loaded.fingerprint, loaded.config, list(loaded.sources.items())) == (
        mark,
        fusion.config,
        list(sources.items()),
    )
    rows = {"z": data["text"], "a.b": data["kind"]}
    assert torch.equal(loaded.encode(rows), fusion.encode(rows))
    monkeypatch.setattr(
        tensor_file, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        fusion.save(path)
    assert VqFusion.load(path).fingerprint == mark
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_quality_reads_all_sources_as_one_vector() -> None:
    data, held_out = items(800), items(300, seed=1)
    fusion = fitted(data)
    report = measure_quality(fusion, held_out)
    assert report.cardinalities == (16, 16, 3, 3, 3, 3, 3)
    assert report.held_out == 300
    by_source = fusion.report(held_out)
    assert 0 < report.fvu < max(embedding(by_source, n).fvu for n in ("text", "image"))


# ---- bad input


def refused(match: str, data: Any, **options: Any) -> None:
    with pytest.raises(SidError, match=match):
        fitted_on(data, **options)


def fitted_on(data: Any, **options: Any) -> None:
    VqFusion(SOURCES, SMALL).fit(data, **options)


def test_bad_data_is_refused_by_name() -> None:
    data = items(100)
    broken = data["text"].clone()
    broken[9, 1] = torch.nan
    refused("source 'text': row 9 holds a NaN", {**data, "text": broken})
    refused("'sound'.*Pass some of", {**data, "sound": data["text"]})
    refused("12 dimensions.*declared with 8", {**data, "image": data["text"]})
    refused("rows .*'text': 100, 'image': 90", {**data, "image": data["image"][:90]})
    short = {**data, "image": lambda: iter([data["image"][:90]])}
    refused("'image' has fewer rows", short)
    labels = data["kind"].clone()
    labels[17] = 6
    refused("category 6 at row 17, outside 0..5", {**data, "kind": labels})
    refused("labels of dtype torch.float32", {**data, "kind": labels.float()})
    refused(r"shape \(100, 5\)", {**data, "kind": torch.ones(100, 5) / 5})
    refused("row 0 is no distribution", {**data, "kind": torch.ones(100, 6)})
    nobody = torch.zeros(100, dtype=torch.bool)
    refused("row 0 has no source at all", data, present=dict.fromkeys(SOURCES, nobody))
    refused("missing in every row", {"text": data["text"], "kind": data["kind"]})
    refused("Pass \\[N\\] booleans", data, present={"text": torch.ones(100)})
    refused("a list.*tensor, an array", {**data, "kind": [1, 2]})
    for pairs, match in (
        (torch.zeros(3, 3, dtype=torch.int64), "Pass \\[P, 2\\]"),
        (torch.tensor([[0, 100]]), "rows 0..100"),
    ):
        refused(match, data, pairs=pairs)
    streams: Any = {**data, "text": lambda: iter(data["text"].split(10))}
    refused("a stream.*Pairs need", streams, pairs=torch.tensor([[0, 1]]))


def test_encoding_refuses_what_it_does_not_know() -> None:
    data = items(200)
    fusion = fitted(data)
    with pytest.raises(SidError, match="category 9 at row 0.*-1 for an unknown"):
        fusion.encode({"kind": torch.tensor([9])})
    unknown = fusion.encode({"text": data["text"][:1], "kind": torch.tensor([-1])})
    assert torch.equal(unknown, fusion.encode({"text": data["text"][:1]}))
    with pytest.raises(SidError, match="row 0 has no source at all"):
        fusion.encode({"kind": torch.tensor([-1])})
    with pytest.raises(SidError, match="sources none"):
        fusion.encode({})
    with pytest.raises(SidError, match="5 dimensions"):
        fusion.encode({"text": data["text"][:, :5]})
    with pytest.raises(SidError, match="beam 0"):
        fusion.encode(data, beam=0)
    with pytest.raises(SidError, match="1 to 7 levels"):
        fusion.decode(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(SidError, match="not fitted"):
        VqFusion(SOURCES, SMALL).encode(data)


def test_degenerate_data_is_defined() -> None:
    same = {"text": torch.full((50, 12), 3.0), "kind": torch.full((50,), 2)}
    fusion = fitted(same)
    assert len(fusion.encode(same).unique(dim=0)) == 1
    decoded = fusion.decode_sources(fusion.encode(same))
    torch.testing.assert_close(decoded["text"], same["text"])
    few = items(5)
    assert embedding(fitted(few).report(few), "text").fvu < 0.2
    constant = items(300)
    constant["image"][:, 2] = 5.0
    decoded = fitted(constant).decode_sources(fitted(constant).encode(constant))
    assert float((decoded["image"][:, 2] - 5.0).abs().max()) < 100 * 0.3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("codebooks", (1,)),
        ("stages", ((3, 4),)),
        ("stages", ((30, 3),)),
        ("hidden", (0,)),
        ("latent_dim", 99),
        ("gradient", "none"),
        ("source_dropout", 1.0),
        ("contrastive_weight", -1.0),
        ("contrastive_temperature", 0.0),
        ("contrastive_batch", 1),
        ("learning_rate", -1.0),
        ("ema_decay", 1.5),
    ],
)
def test_bad_configurations_are_refused(field: str, value: object) -> None:
    with pytest.raises(SidError):
        VqFusion(SOURCES, VqFusionConfig(**{field: value}))  # type: ignore[arg-type]


def test_bad_sources_are_refused() -> None:
    bad: list[dict[str, Any]] = [
        {},
        {"a": EmbeddingSource(0)},
        {"a": CategorySource(1)},
        {"a": EmbeddingSource(4, weight=0)},
    ]
    for sources in bad:
        with pytest.raises(SidError):
            VqFusion(sources, SMALL)


def test_a_pass_that_fails_midway_leaves_the_quantizer_unfitted() -> None:
    data = items(100)

    def broken() -> Iterator[torch.Tensor]:
        yield data["text"][:60]
        yield data["text"][60:] * torch.nan

    fusion = VqFusion(SOURCES, SMALL)
    with pytest.raises(SidError, match="row 60 holds a NaN"):
        fusion.fit({**data, "text": broken})
    with pytest.raises(SidError, match="not fitted"):
        fusion.save("unused")


# ---- as a quantizer of vectors


def test_it_encodes_and_decodes_rows_as_every_quantizer_does() -> None:
    data = items(400)
    present = {"image": torch.arange(400) % 4 > 0}
    fusion = fitted(data, present=present)
    rows = torch.cat(list(fusion.rows(FusionData(data, fusion.sources, present))))
    assert rows.shape == (400, fusion.dim) and fusion.dim == 12 + 8 + 6 + 3
    codes = fusion.encode(data, present=present)
    assert torch.equal(fusion.encode(rows), codes)
    assert torch.equal(fusion.encode(FusionData(data, fusion.sources, present)), codes)
    decoded = fusion.decode(codes)
    assert decoded.shape == rows.shape and bool((decoded[:, -3:] == 1).all())
    # One by one they are the same values, in the units of each source.
    single = fusion.decode_sources(codes)
    torch.testing.assert_close(fusion.inputs.restore(0, decoded[:, :12]), single["text"])
    torch.testing.assert_close(fusion.inputs.restore(2, decoded[:, 20:26]), single["kind"])
    with pytest.raises(SidError, match="28 dimensions.*made for 29"):
        fusion.encode(rows[:, 1:])
    with pytest.raises(SidError, match="row 7 holds a NaN"):
        fusion.encode(rows.index_fill(0, torch.tensor(7), torch.nan))


def test_an_artefact_of_the_first_layout_opens_and_keeps_its_fingerprint(tmp_path: Path) -> None:
    data = items(200)
    fusion = fitted(data, dataclasses.replace(SMALL, epochs=0))
    new = fusion.manifest()
    assert new["dim"] == 29 and [name for name, _ in new["sources"]] == ["text", "image", "kind"]
    # As df61d2b wrote it: the sources in the place of the dimension.
    old = {"dim": new["sources"], "config": new["config"]}
    path = tmp_path / "old.safetensors"
    mark = tensor_file.save_artifact(
        path, kind="vq_fusion", version=1, config=old, tensors=fusion.state_dict()
    )
    loaded = load_quantizer(path)
    assert isinstance(loaded, VqFusion) and loaded.sources == fusion.sources
    assert loaded.fingerprint == mark, "catalogs that it made recorded this one"
    assert torch.equal(loaded.encode(data), fusion.encode(data))
    assert loaded.save(tmp_path / "again.safetensors") == mark
    assert (
        fusion.save(tmp_path / "new.safetensors") == VqFusion.load(tmp_path / "new.safetensors").fingerprint
    )


def test_sparse_categories_are_the_dense_ones_without_their_zeros() -> None:
    generator = torch.Generator().manual_seed(3)
    dense = torch.rand(50, 7, generator=generator) * (torch.rand(50, 7, generator=generator) < 0.4)
    present = dense.any(1)
    dense[present] /= dense[present].sum(1, keepdim=True)
    row, member = dense.nonzero(as_tuple=True)
    offsets = torch.nn.functional.pad(torch.bincount(row, minlength=50).cumsum(0), (1, 0))
    sparse = SparseShares(offsets, member, dense[row, member], 7)
    assert (~present).any() and torch.equal(sparse.present, present) and sparse.shape == (50, 7)
    sources = {"text": EmbeddingSource(3), "kind": CategorySource(7)}
    text, flags = torch.randn(50, 3, generator=generator), {"kind": present}
    rows = [FusionData({"text": text, "kind": kind}, sources, flags) for kind in (dense, sparse)]
    assert torch.equal(torch.cat(list(rows[0])), torch.cat(list(rows[1])))
    index = torch.tensor([9, 0, 49, 9])
    assert torch.equal(rows[0].gather(index), rows[1].gather(index))
