"""What a fit is made of, number by number: sums in float64, weights of sources, seeds, missing sources."""

import dataclasses

import pytest
import torch

from tests.quantizers.test_rq_vae import SMALL as RQ_VAE
from tests.quantizers.test_rq_vae import bent_clusters
from tests.quantizers.test_vq_fusion import SMALL, SOURCES, fitted, items
from torchrec_sid.quantizers import (
    DiscretePca,
    DiscretePcaConfig,
    EmbeddingSource,
    ResidualKMeans,
    ResidualKMeansConfig,
    RqVae,
    VqFusion,
)
from torchrec_sid.quantizers.bottleneck import Bottleneck, BottleneckConfig, start_bottleneck
from torchrec_sid.quantizers.collectives import Collectives
from torchrec_sid.quantizers.digits import gram_similarity
from torchrec_sid.quantizers.dpca_fit import SampledResiduals, fit_stage, residual_covariance
from torchrec_sid.quantizers.fusion.fusion_fit import FusionFit
from torchrec_sid.quantizers.fusion.heads import source_errors
from torchrec_sid.quantizers.fusion.source_rows import FusionData
from torchrec_sid.quantizers.kmeans import ClusterSums
from torchrec_sid.quantizers.sample import stream_moments
from torchrec_sid.streams import open_stream

# ---- numerics


@pytest.mark.parametrize("refine", [0, 3])
def test_the_covariance_that_a_stage_leaves_is_that_of_its_residuals(refine: int) -> None:
    """The eigenvectors diagonalise the first covariance, so that only skew data tell the terms apart."""
    x = torch.randn(4000, 10, generator=torch.Generator().manual_seed(0)) @ torch.randn(10, 10).triu()
    x[:, 0] += x[:, 1].square()
    source = SampledResiduals(x - x.mean(0))
    covariance = residual_covariance(source)
    for digits, alphabet in ((3, 3), (4, 5)):
        fit = fit_stage(source, covariance, digits, alphabet, refine)
        source.advance(fit.stage)
        left = residual_covariance(source)
        torch.testing.assert_close(fit.covariance, left, rtol=1e-4, atol=1e-5 * float(covariance.trace()))
        covariance = fit.covariance


def test_sums_over_batches_lose_nothing() -> None:
    sums = ClusterSums.empty(1, 1, torch.device("cpu"))
    zero = torch.zeros(1, dtype=torch.int64)
    sums.add(torch.full((1, 1), 2.0**26), zero)
    for _ in range(3):
        sums.add(torch.ones(1, 1), zero)
    assert (float(sums.total), float(sums.count), sums.energy) == (2.0**26 + 3, 4.0, 2.0**52 + 3)
    # A first batch at 0 is the shift: what follows is summed as it is.
    batches = [torch.zeros(1, 1), torch.full((1, 1), 2.0**26), *(torch.ones(1, 1) for _ in range(6))]
    moments = stream_moments(
        open_stream(lambda: iter(batches)), sample_rows=8, seed=0, device=torch.device("cpu")
    )
    assert float(moments.mean) == (2.0**26 + 6) / 8
    assert float(moments.covariance) == pytest.approx(
        (2.0**52 + 6) / 8 - ((2.0**26 + 6) / 8) ** 2, rel=1e-15
    )


def test_small_directions_count_in_the_similarity() -> None:
    basis = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.05, 0.0], [0.0, 0.03, 0.02]])
    digits = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, -1.0, 1.0], [1.0, 0.0, -1.0]])
    decoded = digits @ basis
    products = gram_similarity(digits, digits, basis, cosine=False)
    torch.testing.assert_close(products, decoded @ decoded.T, rtol=1e-5, atol=1e-9)
    unit = torch.nn.functional.normalize(decoded)
    torch.testing.assert_close(
        gram_similarity(digits, digits, basis, cosine=True), unit @ unit.T, rtol=1e-5, atol=1e-6
    )


# ---- fields


def _fusion(weights: dict[str, float], **changes: object) -> tuple[VqFusion, FusionFit, torch.Tensor]:
    sources = {"text": EmbeddingSource(12, weight=weights["text"])}
    sources["image"] = EmbeddingSource(8, weight=weights["image"])
    config = dataclasses.replace(SMALL, epochs=0.0, **changes)  # type: ignore[arg-type]
    fusion = VqFusion(sources, config)
    data = {name: values for name, values in items(300).items() if name in sources}
    fusion.fit(data)
    opened = FusionData(data, sources)
    fit = FusionFit(fusion.model, config, opened, None, Collectives(None))
    return fusion, fit, fusion.model.pack(next(iter(opened)))


def test_the_weights_of_sources_are_those_of_loss_and_report() -> None:
    fusion, fit, packed = _fusion({"text": 3.0, "image": 0.5}, source_dropout=0.0)
    step = fit._step(packed, 1)
    model = fusion.model
    decoded = model.heads(model.bottleneck(step.z).z_hat)
    errors = source_errors(model.inputs, decoded, model.inputs.split(packed))
    wanted = 3.0 * errors[0] + 0.5 * errors[1] + model.bottleneck(step.z).loss
    torch.testing.assert_close(step.loss, wanted)
    codes = model.encode(packed)
    for depth, reported in enumerate(fit.level_errors(), 1):
        whole = model.decode(codes[:, :depth])
        text, image = source_errors(model.inputs, whole, model.inputs.split(packed)).tolist()
        assert reported == pytest.approx((3.0 * text + 0.5 * image) / 3.5, rel=1e-4)


def test_what_is_hidden_in_training_differs_from_step_to_step() -> None:
    _, fit, packed = _fusion({"text": 1.0, "image": 1.0}, source_dropout=0.5)
    losses = [float(fit._step(packed, seed).loss) for seed in (0, 0, 1, 2)]
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_every_step_of_a_fit_has_draws_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    follows: list[int] = []
    one_step, one_follow = FusionFit._step, Bottleneck.follow

    def step(self, packed, seed):  # type: ignore[no-untyped-def]
        steps.append(seed)
        return one_step(self, packed, seed)

    def follow(self, z, output, ranks, seed):  # type: ignore[no-untyped-def]
        follows.append(seed)
        return one_follow(self, z, output, ranks, seed)

    monkeypatch.setattr(FusionFit, "_step", step)
    monkeypatch.setattr(Bottleneck, "follow", follow)
    fitted(items(300), dataclasses.replace(SMALL, epochs=2.0))
    assert len(steps) == len(follows) == 10
    assert len(set(steps)) == len(set(follows)) == 10
    first = list(steps)
    fitted(items(300), dataclasses.replace(SMALL, epochs=2.0, seed=1))
    assert not set(first) & set(steps[10:])


def test_seeds_reach_the_codebooks_of_the_closed_form() -> None:
    x, books = bent_clusters(500), []
    for seed in (0, 3):
        dpca = DiscretePca(12, DiscretePcaConfig(stages=((3, 3),), codebooks=(9,), seed=seed))
        dpca.fit(x)
        alone = ResidualKMeans(12, ResidualKMeansConfig(cardinalities=(9,), seed=seed))
        alone.fit(x)
        assert dpca.first is not None and torch.equal(dpca.first.codebook(0), alone.codebook(0))
        bottleneck = Bottleneck(12, (9,), (), BottleneckConfig())
        start_bottleneck(bottleneck, x, rows_per_step=500, seed=seed)
        torch.testing.assert_close(bottleneck.encode(x), alone.encode(x))
        books.append((alone.codebook(0), bottleneck.codebook(0).detach()))
    for first, second in zip(*books, strict=True):
        assert not torch.equal(first, second)


# ---- corners


def test_codes_that_no_item_had_are_never_given() -> None:
    x = bent_clusters(300)
    quantizer = RqVae(12, dataclasses.replace(RQ_VAE, epochs=0.0))
    quantizer.fit(x)
    gone = quantizer.encode(x)[:, 0].mode().values
    quantizer.bottleneck.get_buffer("count_0")[gone] = 0
    for beam in (1, 4):
        assert not bool((quantizer.encode(x, beam=beam)[:, 0] == gone).any())


def test_a_report_is_about_the_items_that_have_the_source() -> None:
    data = items(400)
    fusion = fitted(data, dataclasses.replace(SMALL, epochs=1.0))
    has = torch.arange(400) % 4 > 0
    spoiled = {**data, "image": torch.where(has[:, None], data["image"], torch.tensor(9e3))}
    report = fusion.report(spoiled, present={"image": has})
    alone = fusion.report({name: values[has] for name, values in data.items()})
    assert report["image"].rows == int(has.sum()) and report["text"].rows == 400
    for field in dataclasses.fields(alone["image"]):
        mine, theirs = (getattr(r["image"], field.name) for r in (report, alone))
        assert mine == pytest.approx(theirs, rel=1e-4), field.name
    assert set(fusion.report({name: data[name] for name in ("text", "kind")})) == {"text", "kind"}
    assert set(SOURCES) == set(report)
