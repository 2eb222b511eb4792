"""What a rank sees: run as a module by the component under test."""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "EXTRA")


def main() -> None:
    folder, behaviour = Path(sys.argv[1]), sys.argv[2]
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    # The ranks must find each other in every attempt, also after some of them have died connected.
    dist.init_process_group("gloo", timeout=timedelta(seconds=180))
    total = torch.tensor(1)
    dist.all_reduce(total)
    if behaviour == "die-once" and attempt == "0" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "fail" and rank == "1":
        sys.exit(3)
    if attempt == "0":
        dist.barrier()
    seen = {name: os.environ.get(name) for name in NAMES} | {"total": int(total)}
    seen |= {"arguments": sys.argv[3:], "attempt": attempt, "executable": sys.executable}
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    # Leave in order: gloo aborts a rank whose threads are still at work when Python exits.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
