"""`TrainConfig`: one training run, as the command line and the run directory hold it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchrec_sid.models.build import RankingConfig
from torchrec_sid.parallel.optimizer import TableOptimizer

TABLE_OPTIMIZER = TableOptimizer("adagrad", lr=0.02)
"""Of a training, unless it says otherwise."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    data: str
    """Folder of the log, in the format of docs/data.md."""
    output: str
    """Run directory: configuration, plan, metrics, checkpoints, TensorBoard."""
    prepared: str | None = None
    """Folder of the prepared log, made there if it is not up to date; default: OUTPUT/prepared."""
    catalog: str | None = None
    """SidCatalog, for channels with tables over SIDs."""
    pieces: str | None = None
    """SentencePiece vocabulary over its SIDs, for the channel sentencepiece."""
    side_catalog: str | None = None
    """SidCatalog whose codes the channel side computes with."""
    side_quantizer: str | None = None
    """The quantizer that made it; its decoder must be a sum over levels."""
    artefacts: dict[str, str] = field(default_factory=dict)
    """Paths of further artefacts by name, for channels of plugins that require them."""
    shuffle_sids: bool = False
    """Deal the SIDs out among the items at random: a control that keeps everything but their meaning."""
    hide_new: bool = False
    """Items without a training event have no SID: a control for what appending them to a catalog is worth.
    Tables see the unknown item, SIDE the middle code of every level."""
    source: str | None = None
    """Embedding source of the arms over content, or several joined by +, side by side; default: the log's
    own default."""
    model: RankingConfig = field(default_factory=RankingConfig)
    """Backbone and arm."""
    tables: TableOptimizer = TABLE_OPTIMIZER
    """Optimizer of the embedding tables."""
    dense_lr: float = 2e-3
    """First learning rate of Adam on everything else; it falls linearly over the run."""
    batch_size: int = 512
    """Rows per step over all processes."""
    epochs: int = 1
    """Passes over the training events."""
    max_steps: int | None = None
    """Stop after this many steps."""
    evaluate_on: str = "test"
    """Split of the final metrics: valid or test."""
    seed: int = 0
    """Of the weights."""
    workers: int = 0
    """Processes per rank that read batches ahead."""
    pipelined: bool = True
    """Distribute the ids of the next batch while this one is computed."""
    plan: str | None = None
    """Sharding plan (JSON) to follow; default: make one."""
    planner: str | None = None
    """Planner configuration (YAML or TOML) to make one with."""
    replicas: int = 1
    """Groups of processes that each hold all tables (2D parallelism); the plan is for one group."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    asynchronous_checkpoints: bool = False
    """Write checkpoints in the background."""
    predictions: bool = False
    """Write what each rank predicts for the evaluated split to OUTPUT/predictions-rank-R.safetensors."""
    profile: int = 0
    """Steps to profile; writes traces and their parts to OUTPUT/profile."""

    @property
    def options(self) -> dict[str, str | None]:
        """Paths of artefacts by the name under which a channel requires them."""
        own = ("catalog", "pieces", "side_catalog", "side_quantizer")
        return {**{name: getattr(self, name) for name in own}, **self.artefacts}
