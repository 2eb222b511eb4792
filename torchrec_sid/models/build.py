"""`build_ranking`: a ranking model for a prepared log, from one configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchrec_sid.data.batch import BatchConfig
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.reader import BatchReader
from torchrec_sid.errors import SidError
from torchrec_sid.models.attend import EmbeddedChannel, EventsOnly, ItemChannel, SideChannel, side_features
from torchrec_sid.models.channels import Arm, ItemInputs, arm_named
from torchrec_sid.models.dlrm import HistoryDLRM, HistoryDLRMTrain
from torchrec_sid.models.embedder import Embedder, SideEmbedder, SumOfEmbedders
from torchrec_sid.models.encoder import EncoderConfig, HistoryEncoder
from torchrec_sid.models.target_attention import HistoryConfig, TargetAttention
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables.pieces import SidPieces


@dataclass(frozen=True)
class RankingConfig:
    """The backbone and how items reach it.

    Raises:
        SidError: an unknown interaction, a negative size, a task twice.
    """

    arm: str = "hashed_prefix"
    """Channels joined by +, see :data:`torchrec_sid.models.channels.CHANNELS`, or none."""
    dim: int = 32
    """D, width of every vector."""
    heads: int = 4
    """Attention heads over the history."""
    pools: int = 2
    """Action-gated sums of the history."""
    history_length: int = 64
    """Most recent events kept; 0: the model reads no history."""
    recent: int = 64
    """Where more are kept, these most recent ones have summaries of their own."""
    encoder_layers: int = 0
    """Layers of causal self-attention over the history before the candidate attends to it; 0: a DLRM, more:
    a transformer ranker, in which all channels share one stream of events."""
    encoder_feedforward: int = 128
    """Hidden width of each encoder layer's MLP."""
    table_rows: int = 1000
    """Rows of each hashed table."""
    init_scale: float = 0.05
    """Table rows start uniform in +- this."""
    dense_layers: tuple[int, ...] = (64,)
    """Hidden widths of the dense MLP."""
    over_layers: tuple[int, ...] = (128, 64)
    """Hidden widths of the MLP on top."""
    interaction: Literal["dot", "dcn"] = "dot"
    """Of the fields: pairwise products (DLRM) or cross layers (DCN-v2)."""
    cross_layers: int = 3
    """Cross layers of dcn."""
    cross_rank: int = 32
    """Rank of the cross layers of dcn."""
    tasks: tuple[int, ...] = ()
    """Further labels, each with a head of its own: for an action a, whether the user's action is at least a
    (5: five stars)."""

    def __post_init__(self) -> None:
        if self.interaction not in ("dot", "dcn"):
            raise SidError("RankingConfig.interaction", repr(self.interaction), "Choose dot or dcn.")
        if len(set(self.tasks)) < len(self.tasks):
            raise SidError("RankingConfig.tasks", f"{self.tasks}", "Name each action once.")
        if self.history_length < 0 or self.encoder_layers < 0:
            raise SidError("RankingConfig", f"{self}", "history_length and encoder_layers are 0 or more.")


class LogSizes(NamedTuple):
    """What a model needs to know of its log."""

    items: int
    """N."""
    actions: int
    """Distinct actions of a history event."""
    dense_names: tuple[str, ...]
    """Names of the dense features."""
    action_values: Tensor | None = None
    """``[actions]`` how much an action speaks for an item, within -1 .. 1; None: 1 for all."""
    dense_statistics: Tensor | None = None
    """``[2, F]`` mean and standard deviation of the dense features; None: they are not standardised."""

    @classmethod
    def of(cls, log: PreparedLog) -> LogSizes:
        """Measure a prepared log, by its first training rows."""
        rows = min(16_384, log.rows("train"))
        first = next(iter(BatchReader(log, "train", BatchConfig(rows, 64, ("history_action",)))))
        actions = first.features["history_action"].values()
        dense = torch.stack([first.dense.mean(0), first.dense.std(0, correction=0)])
        return cls(log.items, log.actions, log.dense_names, _action_values(actions, log.actions), dense)


@dataclass(frozen=True)
class Ranking:
    """A model and what it reads."""

    module: HistoryDLRMTrain
    """RankingBatch -> (loss, RankingOutput), unsharded."""
    arm: Arm
    """How items reach it."""
    inputs: ItemInputs
    """What the arm was built on."""
    fields: tuple[str, ...]
    """Batch fields that it reads."""
    tasks: tuple[int, ...] = ()
    """Actions of its further labels."""

    @property
    def task_names(self) -> tuple[str, ...]:
        """What its further heads predict."""
        return tuple(f"action >= {action}" for action in self.tasks)

    def batch_config(self, batch_size: int, history_length: int) -> BatchConfig:
        """How to read batches of ``batch_size`` rows per rank for it."""
        return BatchConfig(batch_size, max(1, history_length), self.fields, self.tasks)


def build_ranking(
    config: RankingConfig,
    log: PreparedLog | LogSizes,
    *,
    spec: SidSpec | None = None,
    pieces: SidPieces | None = None,
    basis: FrozenBasis | None = None,
    side_bytes: Tensor | None = None,
    content: Tensor | None = None,
    device: torch.device | None = None,
) -> Ranking:
    """Build the model; random numbers come from torch's global generator.

    Args:
        config: sizes and arm.
        log: gives the number of items, actions and dense features.
        spec: of the catalog, for channels with tables over SIDs.
        pieces: vocabulary over those SIDs, for ``sentencepiece``.
        basis: decoder of the SIDs of ``side``.
        side_bytes: ``[N, nbytes]`` packed SIDs of ``side``, by which its features are centred and scaled.
        content: ``[N, d]`` embeddings in the order of the log's items, for ``dense``.
        device: where it is built.

    Raises:
        SidError: an unknown channel, or one whose spec, pieces, basis or content is missing; a task that is
            no action of the log.
    """
    arm = arm_named(config.arm)
    sizes = log if isinstance(log, LogSizes) else LogSizes.of(log)
    for action in config.tasks:
        if not 0 < action < sizes.actions:
            found = f"{action}, but actions are 0..{sizes.actions - 1}"
            raise SidError("RankingConfig.tasks", found, "Choose actions that are in the log.")
    inputs = ItemInputs(
        items=sizes.items,
        dim=config.dim,
        table_rows=config.table_rows,
        spec=spec,
        pieces=pieces,
        basis=basis,
        content=content,
        history=config.history_length > 0,
        init_scale=config.init_scale,
        device=device,
    )
    model = HistoryDLRM(
        _Channels(config, arm, inputs, sizes, side_bytes).build(),
        len(sizes.dense_names),
        config.dim,
        dense_layers=config.dense_layers,
        over_layers=config.over_layers,
        interaction=config.interaction,
        cross_layers=config.cross_layers,
        cross_rank=config.cross_rank,
        tasks=1 + len(config.tasks),
        dense_statistics=sizes.dense_statistics,
        device=device,
    )
    fields = [*arm.item_fields, "history_action", "history_age"]
    if not config.history_length:
        # A batch carries some feature, even where the model reads none.
        fields = [name for name in fields if not name.startswith("history")] or ["item"]
    return Ranking(HistoryDLRMTrain(model), arm, inputs, tuple(fields), tuple(config.tasks))


class _Channels(NamedTuple):
    """Builds the channels of an arm."""

    config: RankingConfig
    arm: Arm
    inputs: ItemInputs
    sizes: LogSizes
    side_bytes: Tensor | None

    def build(self) -> dict[str, ItemChannel]:
        if not self.arm.channels:
            events = self.attention(pools=0)
            return {} if events is None else {"events": EventsOnly(events)}
        channels: dict[str, ItemChannel] = {}
        embedders = {c.name: c.embed(self.inputs) for c in self.arm.channels if c.embed is not None}
        if self.arm.needs_side:
            channels["side"] = self.side()
        if not self.config.encoder_layers:
            for name, embedder in embedders.items():
                channels[name] = EmbeddedChannel(embedder, self.attention())
            return channels
        parts: list[Embedder] = list(embedders.values())
        if self.arm.needs_side:
            parts.append(self.side_embedder())
        channels["stream"] = EmbeddedChannel(SumOfEmbedders(parts), self.attention(), self.encoder())
        return channels

    def history(self, pools: int | None = None) -> HistoryConfig | None:
        config = self.config
        if not config.history_length:
            return None
        return HistoryConfig(
            dim=config.dim,
            heads=config.heads,
            actions=self.sizes.actions,
            pools=config.pools if pools is None else pools,
            max_length=config.history_length,
            recent=config.recent,
        )

    def attention(self, pools: int | None = None) -> TargetAttention | None:
        history = self.history(pools)
        return None if history is None else TargetAttention(history, device=self.inputs.device)

    def encoder(self) -> HistoryEncoder | None:
        config = self.config
        if not config.history_length:
            return None
        encoder = EncoderConfig(
            dim=config.dim,
            layers=config.encoder_layers,
            heads=config.heads,
            feedforward=config.encoder_feedforward,
            actions=self.sizes.actions,
            max_length=config.history_length,
        )
        return HistoryEncoder(encoder, device=self.inputs.device)

    def side(self) -> SideChannel:
        values = self.sizes.action_values
        return SideChannel(
            self.inputs.require_basis(),
            self.config.dim,
            self.history(),
            torch.ones(self.sizes.actions) if values is None else values,
            calibration=self.side_bytes,
            device=self.inputs.device,
        )

    def side_embedder(self) -> SideEmbedder:
        features = side_features(self.inputs.require_basis(), self.side_bytes, self.inputs.device)
        return SideEmbedder(features, nn.Linear(features.dim, self.config.dim, device=self.inputs.device))


def _action_values(actions: Tensor, count: int) -> Tensor:
    """Deviation of each action from the mean action that occurs, scaled to -1 .. 1.

    Actions are numbers on a scale (a rating, 0 and 1 for a view and a click). Where all events have the
    same one, each speaks for its item.
    """
    scale = torch.arange(count, dtype=torch.float32)
    if not len(actions) or bool((actions == actions[0]).all()):
        return torch.ones(count)
    deviation = scale - actions.float().mean()
    seen = torch.bincount(actions, minlength=count) > 0
    return (deviation / deviation[seen].abs().max()).clamp(-1, 1)
