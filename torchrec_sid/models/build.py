"""`build_ranking`: a ranking model from one configuration, the sizes of its log and what its items are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torchrec_sid.ages import HISTORY_AGES
from torchrec_sid.errors import SidError
from torchrec_sid.models.attend import EmbeddedChannel, EventsOnly, ItemChannel
from torchrec_sid.models.channels import Arm, ChannelInputs, arm_named
from torchrec_sid.models.dlrm import HistoryDLRM, HistoryDLRMTrain
from torchrec_sid.models.embedder import SumOfEmbedders
from torchrec_sid.models.encoder import EncoderConfig, HistoryEncoder
from torchrec_sid.models.feature_fields import EventFeatures, FeatureFields, FeatureInputs
from torchrec_sid.models.stores import IdStore, ItemStore
from torchrec_sid.models.target_attention import HistoryConfig, TargetAttention


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
    """What a model needs to know of its log, measured in ``data``."""

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
    ages: int = HISTORY_AGES
    """Values of ``history_age``."""
    features: FeatureInputs = FeatureInputs()
    """What else the log has, beside item ids and dense features."""
    labels: tuple[str, ...] = ()
    """Names of the log's labels after the first."""
    label_weights: tuple[float, ...] = ()
    """Of the losses of all labels, the first one's too; none: 1 each."""


@dataclass(frozen=True)
class Ranking:
    """A model and what it reads."""

    module: HistoryDLRMTrain
    """Batch -> (loss, RankingOutput), unsharded."""
    arm: Arm
    """How items reach it."""
    stores: tuple[ItemStore, ...]
    """What an event holds for it."""
    fields: tuple[str, ...]
    """Batch fields that it reads."""
    tasks: tuple[int, ...] = ()
    """Actions of its further labels."""
    labels: tuple[str, ...] = ()
    """Names of the log's labels after the first, which come before those of actions."""

    @property
    def task_names(self) -> tuple[str, ...]:
        """What its further heads predict."""
        return (*self.labels, *(f"action >= {action}" for action in self.tasks))

    @property
    def bytes_per_event(self) -> int:
        """Bytes of one history event at rest; what two channels share counts once."""
        return sum({store.event or store.kind: store.bytes_per_event for store in self.stores}.values())

    @property
    def bytes_per_item(self) -> int:
        """Bytes kept once for each item of the catalog, tables of parameters left out."""
        return sum(store.bytes_per_item for store in self.stores)

    @property
    def item_values(self) -> dict[str, Tensor]:
        """Name -> ``[N, ...]`` what a batch carries of items beside their index."""
        return {name: value for store in self.stores for name, value in store.values.items()}


def build_ranking(
    config: RankingConfig,
    sizes: LogSizes,
    stores: Iterable[ItemStore] = (),
    *,
    positive_weight: float = 1.0,
    autocast: torch.dtype | None = None,
    groups: tuple[str, ...] = (),
    device: torch.device | None = None,
) -> Ranking:
    """Build the model; random numbers come from torch's global generator.

    Args:
        config: sizes and arm.
        sizes: of the log.
        stores: what its items are, for the channels of the arm; others are left out.
        positive_weight: weight of label 1 in the loss.
        autocast: dtype of the dense part's products; None: float32.
        groups: keys of features whose value metrics are sliced by.
        device: where it is built.

    Raises:
        SidError: an unknown channel, or one whose store is missing; a task that is no action of the log.
    """
    arm = arm_named(config.arm)
    for action in config.tasks:
        if not 0 < action < sizes.actions:
            found = f"{action}, but actions are 0..{sizes.actions - 1}"
            raise SidError("RankingConfig.tasks", found, "Choose actions that are in the log.")
    given: dict[str, ItemStore] = {IdStore.kind: IdStore(), **{store.kind: store for store in stores}}
    inputs = ChannelInputs(
        items=sizes.items,
        dim=config.dim,
        table_rows=config.table_rows,
        history=_history(config, sizes),
        action_values=torch.ones(sizes.actions) if sizes.action_values is None else sizes.action_values,
        stores=given,
        init_scale=config.init_scale,
        device=device,
    )
    model = HistoryDLRM(
        {**_channels(config, arm, inputs), **_features(sizes.features, inputs)},
        len(sizes.dense_names),
        config.dim,
        dense_layers=config.dense_layers,
        over_layers=config.over_layers,
        interaction=config.interaction,
        cross_layers=config.cross_layers,
        cross_rank=config.cross_rank,
        tasks=1 + len(sizes.labels) + len(config.tasks),
        dense_statistics=sizes.dense_statistics,
        device=device,
    )
    fields = [*arm.item_fields, "history_action", "history_age", *sizes.features.keys]
    if not config.history_length:
        # A batch carries some feature, even where the model reads none.
        fields = [name for name in fields if not name.startswith("history")] or ["item"]
    read = tuple(inputs.store(store) for store in arm.stores)
    weights = (*sizes.label_weights, *(1.0 for _ in config.tasks)) if sizes.label_weights else ()
    module = HistoryDLRMTrain(model, positive_weight, weights, groups, autocast)
    return Ranking(module, arm, read, tuple(fields), tuple(config.tasks), sizes.labels)


def _features(features: FeatureInputs, inputs: ChannelInputs) -> dict[str, ItemChannel]:
    """Channels of features, which every arm has."""
    common = (inputs.dim, inputs.init_scale, inputs.device)
    channels: dict[str, ItemChannel] = {}
    if features.tables or features.vectors:
        channels["features"] = FeatureFields(features.tables, features.vectors, *common)
    if inputs.history is not None and (features.event_tables or features.event_vectors):
        events = EventFeatures(features.event_tables, features.event_vectors, *common)
        channels["event_features"] = EmbeddedChannel(events, inputs.attention())
    return channels


def _channels(config: RankingConfig, arm: Arm, inputs: ChannelInputs) -> dict[str, ItemChannel]:
    history = inputs.history
    if not arm.channels:
        if history is None:
            return {}
        return {"events": EventsOnly(TargetAttention(replace(history, pools=0), device=inputs.device))}
    if not config.encoder_layers:
        return arm.build(inputs)
    beside = {c.name: c.build(inputs) for c in arm.channels if c.embed is None}
    embedders = arm.embedders(inputs)
    if not embedders:
        return beside
    attention = inputs.attention()
    stream = EmbeddedChannel(SumOfEmbedders(embedders), attention, _encoder(config, inputs))
    return {"stream": stream, **beside}


def _history(config: RankingConfig, sizes: LogSizes) -> HistoryConfig | None:
    if not config.history_length:
        return None
    return HistoryConfig(
        dim=config.dim,
        heads=config.heads,
        actions=sizes.actions,
        ages=sizes.ages,
        pools=config.pools,
        max_length=config.history_length,
        recent=config.recent,
    )


def _encoder(config: RankingConfig, inputs: ChannelInputs) -> HistoryEncoder | None:
    if inputs.history is None:
        return None
    encoder = EncoderConfig(
        dim=config.dim,
        layers=config.encoder_layers,
        heads=config.heads,
        feedforward=config.encoder_feedforward,
        actions=inputs.history.actions,
        ages=inputs.history.ages,
        max_length=config.history_length,
    )
    return HistoryEncoder(encoder, device=inputs.device)
