"""`TrainConfig`: one training run, as the command line and the run directory hold it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torchrec_sid.data.prepare_config import PrepareConfig
from torchrec_sid.errors import SidError
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
    specification: str | None = None
    """Description of the log's features and labels (YAML), see docs/data.md; none for a log without.
    Default: specification.yaml in the folder of the log, where there is one."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """How the log becomes examples."""
    embeddings: str | None = None
    """Folder of the items' embeddings, where they do not lie with the log."""
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
    """First learning rate of everything else."""
    dense_optimizer: str = "Adam"
    """Optimizer of everything else: a class of torch.optim."""
    dense_options: dict[str, float] = field(default_factory=dict)
    """Its further arguments, such as weight_decay."""
    schedule: str = "linear"
    """How learning rates change over the run: linear (falls to a share: final, .05), constant, or a class
    of torch.optim.lr_scheduler, whose length is the run's."""
    schedule_options: dict[str, float] = field(default_factory=dict)
    """Its further arguments; rates among them are shares of the first one."""
    warmup_steps: int = 0
    """Steps over which learning rates first rise linearly."""
    schedule_tables: bool = False
    """The learning rate of the tables follows the schedule too; else it stays."""
    clip_norm: float | None = None
    """Largest norm of the gradient of the dense parameters; tables are updated in the backward pass, row by
    row, and not clipped."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the dense part's products: bfloat16 runs it under autocast. Tables and loss stay float32."""
    positive_weight: float = 1.0
    """Weight of examples with label 1 in the loss, against 1 for label 0."""
    batch_size: int = 512
    """Rows per step over all processes."""
    by_request: bool | None = None
    """Read the history that rows of one request share once for all of them; the numbers are the same. None:
    where the log has ids of requests, unless id_dropout draws events that are dropped row by row."""
    id_dropout: float = 0.05
    """Share of item ids that the channel known_id takes for unknown in training."""
    epochs: int = 1
    """Passes over the training events."""
    max_steps: int | None = None
    """Stop after this many steps."""
    evaluate_on: str = "test"
    """Split of the final metrics: valid or test."""
    closed_splits: tuple[str, ...] = ()
    """Splits that this run cannot open, whatever asks for them: a search closes test."""
    slices: tuple[str, ...] = ()
    """Categorical features of the specification by whose values metrics are given too."""
    evaluate_every: int | Literal["epoch"] | None = None
    """Evaluate on the validation split after so many steps, or after each epoch. The state with the best NE
    is kept in OUTPUT/best, and the run ends with it."""
    patience: int = 0
    """Stop after this many evaluations without a better NE; 0: train to the end."""
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

    def __post_init__(self) -> None:
        if not 0 <= self.id_dropout < 1:
            raise SidError("id_dropout", str(self.id_dropout), "Give a share from 0 to below 1.")
        every = self.evaluate_every
        if isinstance(every, int) and every < 1:
            raise SidError("evaluate_every", str(every), "Give a number of steps, epoch, or leave it out.")
        if self.patience and every is None:
            raise SidError("patience", f"{self.patience} without evaluations", "Set evaluate_every too.")

    @property
    def options(self) -> dict[str, str | None]:
        """Paths of artefacts by the name under which a channel requires them."""
        own = ("catalog", "pieces", "side_catalog", "side_quantizer")
        return {**{name: getattr(self, name) for name in own}, **self.artefacts}
