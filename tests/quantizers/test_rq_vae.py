"""RqVae: its start, its gradients, its codebooks, collapse, resuming, and bad input."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.quantizers import (
    CollapseError,
    ResidualKMeans,
    ResidualKMeansConfig,
    RqVae,
    RqVaeConfig,
    load_quantizer,
)
from torchrec_sid.quantizers.autoencoder import rotation, straight_through
from torchrec_sid.quantizers.bottleneck import Bottleneck, BottleneckConfig, start_bottleneck
from torchrec_sid.quantizers.collectives import Collectives
from torchrec_sid.quantizers.gradient_fit import ShuffledBatches, ShufflePosition
from torchrec_sid.quantizers.usage import count_codes, usage_of

SMALL = RqVaeConfig(cardinalities=(16, 16), hidden=(24,), batch_size=64, epochs=4)


def bent_clusters(rows: int, seed: int = 0, dim: int = 12) -> torch.Tensor:
    """Clusters along curves, so that a decoder has something to learn that is not linear."""
    fixed = torch.Generator().manual_seed(7)
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(8, (rows,), generator=generator)
    t = torch.randn(rows, 2, generator=generator)
    features = torch.cat([t, t**2, t[:, :1] * t[:, 1:], t.sin()], dim=1)
    mixing = torch.randn(8, features.shape[1], dim, generator=fixed)
    centres = torch.randn(8, dim, generator=fixed) * 3
    noise = torch.randn(rows, dim, generator=generator) * 0.1
    return centres[which] + torch.einsum("nf,nfd->nd", features, mixing[which]) * 0.5 + noise


def fitted(x: torch.Tensor, config: RqVaeConfig = SMALL, **options: Any) -> RqVae:
    quantizer = RqVae(x.shape[1], config)
    quantizer.fit(x, **options)
    return quantizer


def error(quantizer: RqVae | ResidualKMeans, x: torch.Tensor) -> float:
    left = x - quantizer.decode(quantizer.encode(x))
    return float(left.square().sum() / (x - x.mean(0)).square().sum())


def used(quantizer: RqVae, x: torch.Tensor) -> tuple[float, ...]:
    return usage_of(count_codes(quantizer.encode(x), quantizer.spec.cardinalities)).used


# ---- quality


def test_it_is_at_least_as_good_as_residual_kmeans() -> None:
    x, held_out = bent_clusters(2000), bent_clusters(800, seed=1)
    kmeans = ResidualKMeans(12, ResidualKMeansConfig(cardinalities=(16, 16)))
    kmeans.fit(x)
    # Without training it is residual k-means (of the same data, rotated onto its principal axes).
    start = fitted(x, dataclasses.replace(SMALL, epochs=0))
    assert error(start, held_out) == pytest.approx(error(kmeans, held_out), rel=0.1)
    trained = fitted(x, dataclasses.replace(SMALL, epochs=20, learning_rate=1e-2))
    assert error(trained, x) < 0.97 * error(start, x)
    assert error(trained, held_out) < error(kmeans, held_out)


@pytest.mark.parametrize("learning_rate", [1e-4, 1e-2])
@pytest.mark.parametrize("seed", range(5))
def test_no_collapse_over_seeds_and_rates(seed: int, learning_rate: float) -> None:
    x = bent_clusters(1000, seed=seed)
    quantizer = fitted(x, dataclasses.replace(SMALL, seed=seed, learning_rate=learning_rate, epochs=3))
    assert min(used(quantizer, x)) > 0.9
    assert error(quantizer, x) <= error(fitted(x, dataclasses.replace(SMALL, seed=seed, epochs=0)), x)


def test_a_decoded_prefix_is_coarser_and_a_beam_is_finer() -> None:
    x = bent_clusters(1000)
    quantizer = RqVae(12, dataclasses.replace(SMALL, cardinalities=(16, 16, 16)))
    report = quantizer.fit(x)
    codes = quantizer.encode(x)
    by_hand = [float((x - quantizer.decode(codes[:, :depth])).square().sum()) for depth in (1, 2, 3)]
    total = float((x - x.mean(0)).square().sum())
    assert report.fvu == pytest.approx([e / total for e in by_hand], rel=1e-3)
    assert report.fvu[0] > report.fvu[1] > report.fvu[2]
    beamed = quantizer.bottleneck.decode(quantizer.encode(x, beam=8))
    z = quantizer.encoder((x - quantizer.mean) / quantizer.scale)
    greedy = quantizer.bottleneck.decode(codes)
    assert float((z - beamed).square().sum()) < float((z - greedy).square().sum())


def test_the_loss_does_not_depend_on_the_scale_of_the_data() -> None:
    x = bent_clusters(600)
    small, large = fitted(x), fitted(x * 1024 + 4096)
    assert torch.equal(small.encode(x), large.encode(x * 1024 + 4096))
    losses = [float(q(y).loss.detach()) for q, y in ((small, x), (large, x * 1024 + 4096))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert 0 < losses[0] < 1 + 2 * 0.25  # a fraction of variance, and two commitments


# ---- gradients


@given(st.integers(0, 1000), st.integers(1, 8))
def test_gradients_pass_the_quantizer(seed: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(6, dim, generator=generator, dtype=torch.float64, requires_grad=True)
    z_hat = torch.randn(6, dim, generator=generator, dtype=torch.float64)
    upstream = torch.randn(6, dim, generator=generator, dtype=torch.float64)
    for how in (straight_through, rotation):
        out = how(z, z_hat)
        torch.testing.assert_close(out, z_hat)
        (gradient,) = torch.autograd.grad(out, z, upstream)
        if how is straight_through:
            torch.testing.assert_close(gradient, upstream)
            continue
        # A rotation scaled by |z_hat| / |z| keeps angles: to z as it was to z_hat, and the length.
        ratio = z_hat.norm(dim=1) / z.detach().norm(dim=1)
        torch.testing.assert_close(gradient.norm(dim=1), ratio * upstream.norm(dim=1))
        torch.testing.assert_close((gradient * z).sum(1), (upstream * z_hat).sum(1))
    assert torch.isfinite(rotation(torch.zeros(1, 3, requires_grad=True), torch.ones(1, 3))).all()


def test_a_batch_trains_encoder_decoder_and_codebooks() -> None:
    x = bent_clusters(500)
    for update in ("ema", "gradient"):
        quantizer = fitted(x, dataclasses.replace(SMALL, codebook_update=update))
        out = quantizer(x[:50])
        assert torch.equal(out.codes, quantizer.encode(x[:50]))
        torch.testing.assert_close(out.reconstruction.detach(), quantizer.decode(out.codes))
        out.loss.backward()
        names = {
            name for name, p in quantizer.named_parameters() if p.grad is not None and bool(p.grad.any())
        }
        assert {"encoder.linear.weight", "decoder.linear.weight"} <= names
        assert ("bottleneck.codebook_0" in names) == (update == "gradient")


# ---- codebooks


def started(z: torch.Tensor, config: BottleneckConfig, size: int = 8) -> Bottleneck:
    bottleneck = Bottleneck(z.shape[1], (size,), (), config)
    start_bottleneck(bottleneck, z, rows_per_step=len(z), seed=0)
    return bottleneck


def test_ema_codewords_are_moving_means() -> None:
    z = bent_clusters(400)
    bottleneck = started(z, BottleneckConfig(codebook_update="ema", ema_decay=0.5, reset_below=0.0))
    before_count, before_total = bottleneck.count_0.clone(), bottleneck.total_0.clone()
    moved = z + 0.5
    output = bottleneck(moved)
    bottleneck.follow(moved, output, Collectives(), 0)
    codes = output.codes[:, 0]
    for code in range(8):
        members = (moved - bottleneck.center)[codes == code]
        count = 0.5 * before_count[code] + 0.5 * len(members)
        total = 0.5 * before_total[code] + 0.5 * members.sum(0)
        expected = total / (count + bottleneck.prior[0])
        torch.testing.assert_close(bottleneck.codebook(0)[code], expected, rtol=1e-4, atol=1e-4)


def test_a_dead_code_moves_to_the_batch_with_its_averages() -> None:
    z = bent_clusters(400)
    for threshold, resets in ((0.02, 1), (0.0, 0)):
        bottleneck = started(z, BottleneckConfig(codebook_update="ema", reset_below=threshold))
        bottleneck.codebook(0)[3] = 1e3
        bottleneck.count_0[3] = 1e-6
        bottleneck.total_0[3] = 1e-3
        output = bottleneck(z)
        assert bottleneck.follow(z, output, Collectives(), 0) == resets
        revived = bottleneck.codebook(0)[3]
        distance = float((z - bottleneck.center - revived).square().sum(1).min())
        assert (distance < 1e-6) == bool(resets)
        if resets:
            assert float(bottleneck.count_0[3]) == pytest.approx(len(z) / 8)
            # Its averages are its own: the next update moves it no further than the batch asks for.
            output = bottleneck(z)
            bottleneck.follow(z, output, Collectives(), 1)
            assert float((bottleneck.codebook(0)[3] - revived).norm()) < 0.5 * float(revived.norm()) + 0.5
            assert bool((output.codes == 3).any())


def test_a_dead_parameter_moves_to_the_batch() -> None:
    z = bent_clusters(400)
    bottleneck = started(z, BottleneckConfig())
    with torch.no_grad():
        bottleneck.codebook(0)[3] = 1e3
    bottleneck.count_0[3] = 1e-6
    output = bottleneck(z)
    assert bottleneck.follow(z, output, Collectives(), 0) == 1
    revived = bottleneck.codebook(0)[3].detach()
    assert float((z - bottleneck.center - revived).square().sum(1).min()) < 1e-6
    assert bool((bottleneck(z).codes == 3).any())


def test_the_loss_of_parameters_rests_at_shrunken_means() -> None:
    z = bent_clusters(400)
    bottleneck = started(z, BottleneckConfig(commitment=0.0))
    bottleneck.prior.fill_(5.0)
    for _ in range(50):
        codes = bottleneck(z).codes[:, 0]
        counts = torch.bincount(codes, minlength=8)[:, None]
        sums = torch.zeros(8, 12).index_add(0, codes, z - bottleneck.center)
        with torch.no_grad():
            bottleneck.codebook(0).copy_(sums / (counts + 5.0))
    output = bottleneck(z)
    assert torch.equal(output.codes[:, 0], codes), "the codes of this step are those of the means"
    # Behind the identity as decoder, what is decoded pulls as the residuals do.
    decoded = (z - output.z_hat).square().sum(1).mean() / bottleneck.variance
    (output.loss + decoded).backward()
    gradient = bottleneck.codebook(0).grad
    assert gradient is not None
    assert float(gradient.abs().max()) < 1e-6


def test_a_step_is_as_large_as_what_it_moves() -> None:
    z = bent_clusters(400) * torch.logspace(0, -4, 12)
    bottleneck = started(z, BottleneckConfig())
    before = bottleneck.codebook(0).detach().clone()
    words = before[bottleneck.encode(z)[:, 0]].square().mean(0).sqrt()
    with torch.no_grad():
        bottleneck.codebook(0).add_(0.2)
    bottleneck.temper([before])
    moved = bottleneck.codebook(0).detach() - before
    torch.testing.assert_close(moved, (0.2 * words).expand(8, -1), rtol=1e-3, atol=1e-8)


def test_digits_in_the_bottleneck_stay_tied() -> None:
    z = bent_clusters(800)
    bottleneck = Bottleneck(12, (8,), ((4, 3), (3, 5)), BottleneckConfig(ema_decay=0.5))
    start_bottleneck(bottleneck, z, rows_per_step=800, seed=0)
    generator = torch.Generator().manual_seed(0)
    moved = z @ torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q * 1.5
    before = float((moved - bottleneck.decode(bottleneck.encode(moved))).square().sum())
    for step in range(30):
        output = bottleneck(moved)
        bottleneck.follow(moved, output, Collectives(), step)
    torch.testing.assert_close(bottleneck(moved).codes, bottleneck.encode(moved))
    torch.testing.assert_close(bottleneck(moved).z_hat, bottleneck.decode(bottleneck.encode(moved)))
    after = float((moved - bottleneck.decode(bottleneck.encode(moved))).square().sum())
    assert after < 0.6 * before
    rows = torch.nn.functional.normalize(bottleneck.basis[:4])
    torch.testing.assert_close(rows @ rows.T, torch.eye(4), atol=1e-5, rtol=0)
    with torch.no_grad():
        beamed = bottleneck.decode(bottleneck.encode(moved, beam=4))
    assert float((moved - beamed).square().sum()) < after


# ---- collapse


def test_collapse_stops_with_a_remedy() -> None:
    x = bent_clusters(800)
    wild = dataclasses.replace(
        SMALL,
        learning_rate=3.0,
        encoder_rate=1.0,
        reset_below=0.0,
        ema_decay=0.5,
        epochs=20,
    )
    with pytest.raises(CollapseError, match="usage collapsed: perplexity .* Lower learning_rate"):
        fitted(x, wild)
    survived = fitted(x, dataclasses.replace(wild, collapse_below=0.0))
    # The state with the lowest error is kept: here that of the start.
    assert error(survived, x) <= error(fitted(x, dataclasses.replace(SMALL, epochs=0)), x) + 1e-6


def test_a_diverging_loss_stops() -> None:
    x = bent_clusters(300)
    with pytest.raises(CollapseError, match="Lower learning_rate"):
        fitted(x, dataclasses.replace(SMALL, learning_rate=1e30, encoder_rate=1.0))


def test_usage_is_shown_and_logged(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="torchrec_sid"):
        fitted(bent_clusters(400), progress=True)
    assert "perplexity" in caplog.text
    assert "used" in caplog.text
    assert "RQ-VAE" in capsys.readouterr().err
    fitted(bent_clusters(100))
    assert capsys.readouterr() == ("", "")


# ---- reproducible and resumable


def test_the_same_seed_gives_the_same_bits_whatever_the_global_generator() -> None:
    x = bent_clusters(500)
    first = fitted(x)
    torch.manual_seed(1234)
    assert fitted(x).fingerprint == first.fingerprint
    streamed = RqVae(12, SMALL)
    streamed.fit(lambda: iter(x.split(500)))
    assert streamed.fingerprint == first.fingerprint


def test_every_field_changes_the_fit() -> None:
    x = bent_clusters(500)
    base = fitted(x)
    for change in (
        {"cardinalities": (16, 8)},
        {"latent_dim": 8},
        {"hidden": (32,)},
        {"hidden": ()},
        {"gradient": "rotation"},
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
        other = fitted(x, dataclasses.replace(SMALL, **change))
        tensors = other.state_dict()
        same = all(
            tensors[name].shape == tensor.shape and torch.equal(tensors[name], tensor)
            for name, tensor in base.state_dict().items()
            if name in tensors
        )
        assert not same, change


class InterruptedFitError(Exception):
    pass


def test_an_interrupted_fit_continues_to_the_same_bits(tmp_path: Path) -> None:
    x = bent_clusters(500)
    config = dataclasses.replace(SMALL, buffer_rows=200)
    whole = RqVae(12, config)
    whole.fit(lambda: iter(x.split(128)))
    reads = 0

    def flaky() -> Iterator[torch.Tensor]:
        nonlocal reads
        reads += 1
        for index, piece in enumerate(x.split(128)):
            if reads == 6 and index == 2:
                raise InterruptedFitError
            yield piece

    path = tmp_path / "fit.safetensors"
    options = {"checkpoint": path, "checkpoint_every": 5}
    with pytest.raises(InterruptedFitError):
        RqVae(12, config).fit(flaky, **options)
    assert path.is_file()
    again = RqVae(12, config)
    again.fit(flaky, **options)
    assert again.fingerprint == whole.fingerprint
    # Once more: the fit is complete, so that nothing is trained.
    done = RqVae(12, config)
    done.fit(flaky, **options)
    assert done.fingerprint == whole.fingerprint
    with pytest.raises(ArtifactError, match="Continue with the same configuration"):
        RqVae(12, dataclasses.replace(config, seed=5)).fit(x, **options)


def test_a_fit_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    x = bent_clusters(500)
    options = {"checkpoint": tmp_path / "fit.safetensors", "checkpoint_every": 5}
    RqVae(12, SMALL).fit(x, **options)
    for other in (x.flip(0), x + 1e-3, torch.cat([x[:-1], x[:1]])):
        with pytest.raises(ArtifactError, match=r"data of the checkpoint is .* of this fit"):
            RqVae(12, SMALL).fit(other, **options)
    # The same rows in other pieces are the same data.
    RqVae(12, SMALL).fit(lambda: iter(x.split(77)), **options)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 30), st.integers(0, 12))
def test_batches_hold_every_row_once_per_pass_and_continue(
    rows: int, batch_size: int, buffer_rows: int, taken: int
) -> None:
    data = torch.arange(rows)

    def batches() -> ShuffledBatches:
        return ShuffledBatches(
            lambda: ((piece, piece * 2) for piece in data.split(7)),
            batch_size=batch_size,
            buffer_rows=buffer_rows,
            seed=3,
        )

    run = batches()
    iterator = iter(run)
    seen: list[tuple[ShufflePosition, torch.Tensor]] = []
    while run.position.pass_index < 2:
        first, second = next(iterator)
        assert torch.equal(second, first * 2)
        assert len(first) <= batch_size
        seen.append((run.position, first))
    for index in (0, 1):
        one = torch.cat([b for position, b in seen if position.pass_index == index])
        assert one.sort().values.tolist() == data.tolist()
    at = min(taken, len(seen) - 2)
    resumed = batches()
    resumed.position = seen[at][0]
    assert torch.equal(next(iter(resumed))[0], seen[at + 1][1])


# ---- bad input and artefacts


def test_degenerate_data_is_defined() -> None:
    same = torch.full((60, 6), 3.0)
    quantizer = fitted(same)
    assert len(quantizer.encode(same).unique(dim=0)) == 1
    torch.testing.assert_close(quantizer.decode(quantizer.encode(same)), same)
    few = bent_clusters(5)
    quantizer = fitted(few)
    assert error(quantizer, few) < 0.05
    constant = bent_clusters(300)
    constant[:, 4] = 2.0
    quantizer = fitted(constant)
    assert float((quantizer.decode(quantizer.encode(constant))[:, 4] - 2.0).abs().max()) < 0.3
    repeated = bent_clusters(6).repeat(50, 1)
    assert error(fitted(repeated), repeated) < 0.05


def test_bad_data_is_refused_by_name() -> None:
    x = bent_clusters(100)
    broken = x.clone()
    broken[7, 0] = torch.inf
    with pytest.raises(SidError, match="row 7 holds a NaN or an infinity"):
        fitted(broken)
    with pytest.raises(SidError, match="12 dimensions.*made for 10"):
        RqVae(10, SMALL).fit(x)
    quantizer = fitted(x)
    with pytest.raises(SidError, match="5 dimensions"):
        quantizer.encode(x[:, :5])
    with pytest.raises(SidError, match="row 7"):
        quantizer.encode(broken)
    with pytest.raises(SidError, match="not fitted"):
        RqVae(12, SMALL).encode(x)
    with pytest.raises(SidError, match="beam 0"):
        quantizer.encode(x, beam=0)
    with pytest.raises(SidError, match="1 to 2 levels"):
        quantizer.decode(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(SidError, match="code 16"):
        quantizer.decode(torch.full((1, 2), 16))
    assert quantizer.encode(x[:0]).shape == (0, 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cardinalities", ()),
        ("hidden", (0,)),
        ("latent_dim", 0),
        ("gradient", "gumbel"),
        ("codebook_update", "sgd"),
        ("ema_decay", 1.0),
        ("codebook_rate", -0.1),
        ("commitment", -1.0),
        ("reset_below", 1.0),
        ("epochs", -1.0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("encoder_rate", -0.1),
        ("buffer_rows", 0),
        ("collapse_below", -0.1),
    ],
)
def test_bad_configurations_are_refused(field: str, value: object) -> None:
    with pytest.raises(SidError):
        RqVaeConfig(**{field: value})  # type: ignore[arg-type]


def test_the_published_shape() -> None:
    config = RqVaeConfig.published(epochs=1.0)
    assert (config.cardinalities, config.hidden, config.commitment) == ((2048,) * 8, (256,), 0.25)
    with pytest.raises(SidError, match="Use at most 64"):
        RqVae(64, config)


def test_round_trip(tmp_path: Path) -> None:
    x = bent_clusters(300)
    for update in ("ema", "gradient"):
        quantizer = fitted(x, dataclasses.replace(SMALL, codebook_update=update))
        mark = quantizer.save(tmp_path / "rq_vae.safetensors")
        loaded = load_quantizer(tmp_path / "rq_vae.safetensors")
        assert isinstance(loaded, RqVae)
        assert loaded.fingerprint == mark
        assert torch.equal(loaded.encode(x), quantizer.encode(x))
        assert torch.equal(loaded.decode(loaded.encode(x)), quantizer.decode(quantizer.encode(x)))
