"""What a rank sees: run as a module by the component under test."""

import json
import os
import sys
from pathlib import Path

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "EXTRA")


def main() -> None:
    folder, behaviour = Path(sys.argv[1]), sys.argv[2]
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    if behaviour == "fail-once" and attempt == "0" and rank == "1":
        sys.exit(3)
    if behaviour == "fail" and rank == "1":
        sys.exit(3)
    seen = {name: os.environ.get(name) for name in NAMES}
    seen |= {"arguments": sys.argv[3:], "attempt": attempt, "executable": sys.executable}
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
