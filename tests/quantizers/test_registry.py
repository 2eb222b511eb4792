"""The registry of quantizers: kinds, configurations, and a quantizer of someone else's."""

from pathlib import Path

import pytest
import torch

from torchrec_sid import plugins
from torchrec_sid.artifact import save_artifact
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.plugins import load_plugins
from torchrec_sid.quantizers import (
    QUANTIZERS,
    EmbeddingSource,
    Quantizer,
    ResidualKMeansConfig,
    load_quantizer,
    make_quantizer,
    quantizer_of,
    register_quantizer,
)
from torchrec_sid.side.basis import FrozenBasis

PLUGIN = '''
"""Signs of random directions: one bit a level."""
import time
from dataclasses import dataclass
import torch
from torchrec_sid.quantizers import FitReport, Quantizer, register_quantizer
from torchrec_sid.spec import SidSpec

@dataclass(frozen=True)
class RandomSignsConfig:
    bits: int = 6
    """Levels."""
    seed: int = 0
    """Of the directions."""

@register_quantizer
class RandomSigns(Quantizer):
    kind = "random_signs"
    config_type = RandomSignsConfig

    def __init__(self, dim, config=None, *, device=None):
        super().__init__(dim, config or RandomSignsConfig(), device=device)
        self.register_buffer("directions", torch.zeros(self.config.bits, dim, device=device))

    @property
    def spec(self):
        return SidSpec((2,) * self.config.bits)

    def fit(self, data, *, progress=False):
        rows = sum(len(batch) for batch in self.rows(data))
        generator = torch.Generator().manual_seed(self.config.seed)
        self.directions.copy_(torch.randn(self.config.bits, self.dim, generator=generator))
        self.fitted.fill_(True)
        return FitReport(rows, 0.0, (1.0,) * self.config.bits)

    def _encode(self, x, beam):
        return (x @ self.directions.T > 0).long()

    def _decode(self, codes):
        return (codes - 0.5) @ self.directions[: codes.shape[1]]
'''


def test_every_kind_is_known_by_its_name_and_its_configuration() -> None:
    assert {"residual_kmeans", "discrete_pca", "rq_vae", "vq_fusion"} <= set(QUANTIZERS)
    for kind in ("residual_kmeans", "discrete_pca", "rq_vae", "vq_fusion"):
        cls = QUANTIZERS[kind]
        shape = {"a": EmbeddingSource(8)} if cls.fuses else 8
        made = make_quantizer(shape, cls.config_type())
        assert type(made) is cls and cls.kind == kind and not bool(made.fitted)
        assert made.additive_decoder.__qualname__.split(".")[0] in (cls.__name__, "Quantizer")
    with pytest.raises(SidError, match="a dict.*one of ResidualKMeansConfig"):
        make_quantizer(8, {})
    with pytest.raises(SidError, match="no 'rqvae'. Did you mean 'rq_vae'"):
        QUANTIZERS["rqvae"]


def test_a_quantizer_from_a_plugin_is_like_one_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(plugins.VARIABLE, "")
    monkeypatch.setattr(QUANTIZERS, "_parts", dict(QUANTIZERS._parts))
    file = tmp_path / "signs.py"
    file.write_text(PLUGIN)
    load_plugins(file)
    config = QUANTIZERS["random_signs"].config_type(bits=5)
    quantizer = make_quantizer(8, config)
    x = torch.randn(50, 8)
    quantizer.fit(x)
    mark = quantizer.save(tmp_path / "q.safetensors")
    loaded = load_quantizer(tmp_path / "q.safetensors")
    assert loaded.fingerprint == mark and loaded.config == config
    codes = loaded.encode(x)
    assert torch.equal(codes, quantizer.encode(lambda: iter(x.split(7)))) and codes.shape == (50, 5)
    # The guards are the base's, and so is the additive decoder.
    with pytest.raises(SidError, match="beam 0"):
        loaded.encode(x, beam=0)
    with pytest.raises(SidError, match="code 2 at row 0, level 1"):
        loaded.decode(torch.full((1, 5), 2))
    torch.testing.assert_close(FrozenBasis.from_quantizer(loaded).decode(codes), loaded.decode(codes))
    # Another class of the same kind is refused.
    with pytest.raises(SidError, match="quantizer 'random_signs': is .*RandomSigns"):
        register_quantizer(type("Other", (type(quantizer),), {}))
    assert quantizer_of(config) is type(quantizer)


def test_files_that_hold_something_else_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_artifact(path, kind="pieces", version=1, config={}, tensors={})
    with pytest.raises(ArtifactError, match="holds a 'pieces'.*residual_kmeans.*or the plugin"):
        load_quantizer(path)
    for config in ({}, {"dim": 8, "config": {"colour": 1}}, {"dim": 8, "config": {}}):
        save_artifact(path, kind="residual_kmeans", version=1, config=config, tensors={})
        with pytest.raises(ArtifactError, match="does not fit its tensors"):
            load_quantizer(path)
    quantizer: Quantizer = make_quantizer(4, ResidualKMeansConfig((2, 2)))
    quantizer.fit(torch.randn(20, 4))
    quantizer.save(path)
    assert load_quantizer(path).spec == quantizer.spec
