"""Memory and bandwidth of common 8-GPU nodes, per GPU, from the vendors' data sheets.

``hbm_gib`` is what the driver reports, which is a little less than the name says. Bandwidths are peaks in
one direction, 1 GB/s = 1e9 bytes/s; host memory and its bandwidth are the node's, divided by its GPUs.
Plans rank alternatives with these numbers; they are not a promise of step time.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchrec_sid.errors import SidError


@dataclass(frozen=True)
class NodePreset:
    """One rank's share of a node."""

    gpus: int
    """GPUs per node."""
    hbm_gib: float
    """Device memory."""
    ddr_gib: float
    """Host memory."""
    hbm_gbps: float
    """Device memory bandwidth, GB/s."""
    ddr_gbps: float
    """Host memory bandwidth, GB/s."""
    host_to_device_gbps: float
    """PCIe, GB/s."""
    intra_node_gbps: float
    """NVLink, GB/s."""
    inter_node_gbps: float
    """Network, GB/s."""


PRESETS: dict[str, NodePreset] = {
    # DGX-2-class SXM: HBM2 900 GB/s, NVLink 2, 100 Gb/s per GPU.
    "v100_32gb": NodePreset(8, 31.7, 96, 900, 32, 16, 150, 12.5),
    # DGX A100: HBM2 1,555 GB/s, NVLink 3 (600 GB/s both ways), 8 x HDR 200 Gb/s, 2 x 8 x DDR4-3200.
    "a100_40gb": NodePreset(8, 39.5, 128, 1_555, 51, 32, 300, 25),
    "a100_80gb": NodePreset(8, 80.0, 256, 2_039, 51, 32, 300, 25),
    # DGX H100: HBM3 3,350 GB/s, NVLink 4 (900 GB/s both ways), 8 x NDR 400 Gb/s, 2 x 8 x DDR5-4800.
    "h100_80gb": NodePreset(8, 79.6, 256, 3_350, 76, 64, 450, 50),
    # DGX H200: the same node with HBM3e, 4,800 GB/s.
    "h200_141gb": NodePreset(8, 140.4, 256, 4_800, 76, 64, 450, 50),
    # DGX B200: HBM3e 8,000 GB/s, NVLink 5 (1,800 GB/s both ways), 8 x 400 Gb/s, 2 x 8 x DDR5-5600.
    "b200_180gb": NodePreset(8, 179.0, 256, 8_000, 89, 64, 900, 50),
}


def node_preset(name: str) -> NodePreset:
    """The preset of that name.

    Raises:
        SidError: there is none; lists the names.
    """
    if name not in PRESETS:
        raise SidError("topology.node", f"unknown preset {name!r}", f"Presets are {', '.join(PRESETS)}.")
    return PRESETS[name]
