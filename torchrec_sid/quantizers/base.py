"""What every quantizer offers: fit, encode, decode, spec, save, load, quality."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from torchrec_sid.artifact import fingerprint, load_artifact, save_artifact
from torchrec_sid.errors import SidError
from torchrec_sid.spec import SidSpec

if TYPE_CHECKING:
    from torchrec_sid.quality import QualityReport


class Quantized(NamedTuple):
    """The result of quantizing a batch, the same for every quantizer."""

    codes: Tensor
    """``[N, L]`` int64."""
    reconstruction: Tensor
    """``[N, d]`` float32, the decoded embedding x_hat."""
    loss: Tensor
    """Scalar float32 training loss of the quantizer; 0 for those fitted in closed form."""


@dataclass(frozen=True)
class FitReport:
    """What a fit did."""

    rows: int
    """Embeddings seen in one pass."""
    seconds: float
    """Wall-clock seconds."""
    fvu: tuple[float, ...]
    """Fraction of variance unexplained on the training data after each level (or stage)."""


class Quantizer(nn.Module, ABC):
    """Learns SIDs from content embeddings. Learned state lives in buffers and parameters.

    A subclass sets :attr:`kind` and :attr:`layout_version`, takes ``(dim, config)`` where ``config`` is
    a frozen dataclass of JSON-serialisable fields, and registers its tensors (of their final shapes) at
    construction, so that :meth:`load` can build it and fill them in.
    """

    kind: ClassVar[str]
    """Name of the quantizer in artefacts."""
    layout_version: ClassVar[int] = 1
    """Grows when the saved layout changes."""
    config_type: ClassVar[type[Any]]
    """The frozen dataclass of :attr:`config`."""

    fitted: Tensor
    """Scalar bool buffer."""

    def __init__(self, dim: int, config: Any) -> None:
        super().__init__()
        self.dim = dim
        self.config = config
        self.register_buffer("fitted", torch.tensor(False))

    @property
    @abstractmethod
    def spec(self) -> SidSpec:
        """The shape of the SIDs it makes."""

    @abstractmethod
    def fit(self, data: Any, *, progress: bool = False) -> FitReport:
        """Learn from embeddings: anything :func:`~torchrec_sid.streams.open_stream` takes."""

    @abstractmethod
    def encode(self, x: Any, *, beam: int = 1) -> Tensor:
        """Embeddings ``[N, d]`` float -> codes ``[N, L]`` int64, without gradient.

        ``beam`` hypotheses are kept per level; 1 is greedy. Codebooks are fitted greedily either way, so
        that a prefix means the same for every item.
        """

    @abstractmethod
    def decode(self, codes: Tensor) -> Any:
        """Codes ``[N, l]``, any prefix ``1 <= l <= L`` -> embeddings ``[N, d]`` float32."""

    def quality(self, held_out: Any, *, progress: bool = False) -> QualityReport:
        """The diagnostics of :mod:`torchrec_sid.quality` on embeddings kept out of the fit."""
        from torchrec_sid.quality import measure_quality  # above this module in the flow

        return measure_quality(self, held_out, progress=progress)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of kind, configuration and learned state; what a catalog records."""
        return fingerprint(self.kind, self.layout_version, self._manifest(), self.state_dict())

    def save(self, path: str | Path) -> str:
        """Write one safetensors file atomically and return the fingerprint.

        Raises:
            SidError: the quantizer has not been fitted.
        """
        self.require_fitted()
        return save_artifact(
            path,
            kind=self.kind,
            version=self.layout_version,
            config=self._manifest(),
            tensors=self.state_dict(),
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a quantizer written by :meth:`save`, on the CPU, in eval mode.

        Raises:
            ArtifactError: missing, truncated, altered, or another kind of artefact.
        """
        artifact = load_artifact(path, kind=cls.kind, version=cls.layout_version)
        quantizer = cls.from_config(artifact.config["dim"], artifact.config["config"])
        quantizer.load_state_dict(artifact.tensors)
        return quantizer.eval()

    @classmethod
    def from_config(cls, dim: Any, config: dict[str, Any]) -> Self:
        """Build an unfitted quantizer from the JSON form of its configuration."""
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        return cls(dim, cls.config_type(**fields))

    def require_fitted(self) -> None:
        """Raise SidError unless :meth:`fit` or :meth:`load` has run."""
        if not bool(self.fitted):
            raise SidError(type(self).__name__, "not fitted", "Call fit(...) or load(...) first.")

    def _manifest(self) -> dict[str, Any]:
        config: dict[str, Any] = asdict(self.config)
        return {"dim": self.dim, "config": config}
