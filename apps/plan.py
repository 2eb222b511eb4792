"""Plan the sharding of a ranking model before paying for a GPU.

    torchrec-sid plan --world-size 128 --items 1e9 --output DIR

needs no GPU, no process group and no table in memory. It prints the plan and writes DIR/plan.json (for
`torchrec-sid train --plan`), DIR/report.json and DIR/report.html.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from torchrec_sid.artifact import write_atomically, write_json
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.statistics import mean_history
from torchrec_sid.errors import SidError
from torchrec_sid.models.build import LogSizes, RankingConfig
from torchrec_sid.options import plain
from torchrec_sid.parallel.embedding_tables import find_tables, table_parameters
from torchrec_sid.parallel.optimizer import TableOptimizer
from torchrec_sid.parallel.plan_file import save_plan
from torchrec_sid.parallel.plan_summary import format_summary
from torchrec_sid.parallel.planner_config import PlannerConfig
from torchrec_sid.parallel.planner_file import load_planner_config
from torchrec_sid.parallel.planning import make_plan, resolve_topology
from torchrec_sid.parallel.wire import wire_bytes
from torchrec_sid.spec import SidSpec
from torchrec_sid.tables import SidPieces, SidTokenizer

from .cli import command_line, parse_config, plain_errors
from .plan_arms import PlanInputs, build_arm, check_arm
from .plan_compare import compare_arms
from .plan_report import side_by_side_table, write_plan_page


@dataclass(frozen=True)
class PlanConfig:
    """What to plan for."""

    output: str
    """Folder for plan.json, report.json and report.html."""
    world_size: int | None = None
    """Processes; default: the planner file's, or 8."""
    items: int = 100_000_000
    """Items, unless a prepared log says."""
    model: RankingConfig = field(
        default_factory=lambda: RankingConfig(dim=64, history_length=256, table_rows=50_000_000)
    )
    """The model, as in torchrec-sid train, with any arm but those over content embeddings."""
    tables: TableOptimizer = field(default_factory=TableOptimizer)
    """Optimizer of the tables: its state takes memory."""
    batch_size: int | None = None
    """Rows per rank and step; default: the planner file's."""
    planner: str | None = None
    """Planner configuration, YAML or TOML."""
    node: str | None = None
    """Preset of the nodes, e.g. h100_80gb; default: the planner file's."""
    device: str | None = None
    """cuda or cpu; default: the planner file's."""
    prepared: str | None = None
    """A prepared log: its items, actions and dense features, so that the plan fits train on it."""
    catalog: str | None = None
    """A SidCatalog: the shape of its SIDs."""
    cardinalities: tuple[int, ...] = (2048, 2048, 2048)
    """Shape of the SIDs where there is no catalog."""
    mean_history: float | None = None
    """Mean events of a history; default: measured in the prepared log, else as many as the model keeps."""
    pieces: int = 10_000_000
    """Vocabulary of the channel sentencepiece."""
    pieces_per_item: float = 2.0
    """Mean pieces of one item's SID."""
    pieces_model: str | None = None
    """A SidPieces file, with --catalog: gives both numbers, over the items of the catalog."""
    side_digits: int = 25
    """Trits of the SIDs of the channel side."""
    compare_items: tuple[int, ...] = (10**6, 10**7, 10**8, 10**9)
    """Numbers of items of the side by side; empty: none."""

    def __post_init__(self) -> None:
        check_arm(self.model.arm)
        for name in ("items", "pieces", "pieces_per_item", "side_digits"):
            if getattr(self, name) <= 0:
                raise SidError(name, str(getattr(self, name)), "It must be above 0.")
        if self.pieces_model is not None and self.catalog is None:
            raise SidError("pieces_model", "without a catalog", "Pass --catalog, whose items are cut.")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    logging.getLogger("torch").setLevel(logging.ERROR)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a log file has room for the whole table
    with plain_errors():
        config = parse_config(PlanConfig, __doc__, argv)
        report = plan(config)
    console.print((Path(config.output) / "plan.txt").read_text(), soft_wrap=True, highlight=False)
    if report["side_by_side"]:
        console.print(_terminal_table(report["side_by_side"]))
    console.print(
        f"plan: {Path(config.output) / 'plan.json'}   report: {Path(config.output) / 'report.html'}"
    )


def plan(config: PlanConfig) -> dict[str, Any]:
    """Plan and write everything into ``config.output``.

    Returns:
        What ``report.json`` holds.

    Raises:
        SidError: a file that cannot be read, a constraint that cannot be met, tables that do not fit.
    """
    planner = planner_for(config)
    inputs = plan_inputs(config)
    built = build_arm(config.model.arm, inputs, inputs.log.items)
    tables = find_tables(built.module)
    config.tables.mark(table_parameters(built.module, tables).values())
    planned = make_plan(built.module, planner, feature_lengths=built.feature_lengths)
    local = planner.topology.local_world_size or 1
    wire = wire_bytes(planned.summary, planner.batch_size, local)
    report = {
        "command": command_line(),
        "config": asdict(config),
        "planner": plain(planner),
        "summary": planned.summary.to_json(),
        "wire_bytes": {**wire._asdict(), "total": wire.total},
        "bytes_per_event": built.bytes_per_event,
        "side_by_side": compare_arms(inputs, config.compare_items, planner, config.tables),
        "assumptions": _assumptions(config, planner, inputs),
    }
    output = Path(config.output)
    text = (
        f"{format_summary(planned.summary)}\nover the wire {wire.total / 2**20:,.0f} MiB a step, all ranks"
    )
    save_plan(output / "plan.json", planned.plan)
    write_json(output / "report.json", report)
    write_atomically(output / "plan.txt", lambda path: path.write_text(f"{text}\n"))
    write_atomically(output / "torchrec.txt", lambda path: path.write_text(planned.report + "\n"))
    write_plan_page(output / "report.html", report, text)
    return report


def planner_for(config: PlanConfig) -> PlannerConfig:
    """The planner file with the options of the command line in it, and a world filled in."""
    planner = load_planner_config(config.planner) if config.planner else PlannerConfig()
    file = planner.topology
    topology = replace(
        file,
        node=config.node or file.node,
        device=config.device or file.device,
        world_size=config.world_size or file.world_size,
    )
    if topology.world_size is None:
        topology = replace(topology, world_size=8)
    return replace(
        planner,
        topology=resolve_topology(topology, None),
        batch_size=config.batch_size or planner.batch_size,
    )


def plan_inputs(config: PlanConfig) -> PlanInputs:
    """The ranker, its log's sizes and its SIDs."""
    log = LogSizes(config.items, 8, tuple(f"dense_{i}" for i in range(8)))
    history = config.mean_history or config.model.history_length
    if config.prepared is not None:
        prepared = PreparedLog.open(config.prepared)
        log = LogSizes(prepared.items, prepared.actions, prepared.dense_names)
        history = config.mean_history or mean_history(prepared, config.model.history_length)
    catalog = SidCatalog.open(config.catalog) if config.catalog else None
    pieces, per_item = config.pieces, config.pieces_per_item
    if config.pieces_model is not None and catalog is not None:
        pieces, per_item = measure_pieces(config.pieces_model, catalog)
    return PlanInputs(
        model=config.model,
        log=log,
        spec=catalog.spec if catalog else SidSpec(config.cardinalities),
        side_spec=SidSpec((3,) * config.side_digits),
        pieces=pieces,
        pieces_per_item=per_item,
        mean_history=history,
    )


def measure_pieces(path: str, catalog: SidCatalog, sample: int = 100_000) -> tuple[int, float]:
    """Pieces of a vocabulary, and how many of them an item of the catalog is on average.

    Args:
        path: a SidPieces file.
        catalog: whose items are cut, at most ``sample`` of them, evenly spread.
        sample: see above.
    """
    pieces = SidPieces.load(path)
    if pieces.spec != catalog.spec:
        raise SidError(path, "was trained on SIDs of another shape", "Pass the catalog it was trained on.")
    ids = torch.as_tensor(catalog.item_ids())
    packed = torch.as_tensor(catalog.lookup(ids[:: max(1, len(ids) // sample)]))
    return len(pieces), float(SidTokenizer(pieces)(packed).counts.double().mean())


def _assumptions(config: PlanConfig, planner: PlannerConfig, inputs: PlanInputs) -> list[str]:
    topology = planner.topology
    hbm, network = topology.value("hbm_gbps"), topology.value("inter_node_gbps")
    return [
        f"{planner.batch_size:,} samples per rank and step, {inputs.mean_history:g} events per history.",
        f"Node {topology.node}: {topology.value('hbm_gib'):g} GiB of HBM at {hbm:,g} GB/s, "
        f"{topology.value('intra_node_gbps'):g} GB/s within and {network:g} GB/s between nodes. Predicted "
        "times come from TorchRec's estimator and these peaks: they rank plans.",
        f"Table optimizer {config.tables.name}; reservation {planner.reservation.kind}.",
        "planned GiB: weights, optimizer state and buffers of ids, embeddings and gradients, all ranks.",
        "bytes/event: the item of one history event at rest. wire: ids, embeddings and gradients of tables "
        "that leave their rank, in the world asked for, without the dense all-reduce, equal for all arms.",
        f"sentencepiece: {inputs.pieces:,} pieces, {inputs.pieces_per_item:g} per item; hashed_prefix: "
        f"{inputs.spec.levels} prefixes in at most {config.model.table_rows:,} rows a table; side: "
        f"{inputs.side_spec.levels} trits, no table.",
        "GPUs needed: the smallest of 1, 2, 4, 8, 16, ... 1,024 whose memory holds the tables.",
    ]


def _terminal_table(rows: list[dict[str, Any]]) -> Table:
    lines = side_by_side_table(rows)
    table = Table(title="the same ranker, four ways to embed an item")
    for heading in lines[0]:
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for line in lines[1:]:
        table.add_row(*line)
    return table


if __name__ == "__main__":
    main()
