"""Fuzz one reader: ``python -m tests.fuzz catalog --cases 1000 [--seed 0]``.

Every case is a change drawn from its number; a case that ends in anything but a named error or the right
answer is printed with that number, and ``--seed NUMBER --cases 1`` does it again.
"""

import argparse
import logging
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS
from torchrec_sid.errors import SidError

SECONDS, GIBIBYTES = 10, 2


def try_case(target: Target, number: int) -> str | None:
    """What went wrong in a case; None where all went as it should."""
    must_be_refused = target.change(random.Random(number))
    began = time.monotonic()
    try:
        wrong = target.read()
    except SidError:
        wrong = None
    except Exception:
        return traceback.format_exc(limit=-3)
    else:
        if wrong is None and must_be_refused:
            wrong = "bytes changed, and it was accepted"
    if time.monotonic() - began > SECONDS:
        return f"took {time.monotonic() - began:.0f} s"
    return wrong


def main() -> None:
    """Ends with 1 if a case fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    # Whatever asks for more memory than this fails, and is a case found.
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (GIBIBYTES << 30), resource.RLIM_INFINITY))
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as home:
        target = TARGETS[options.target](Path(home))
        for number in range(options.seed, options.seed + options.cases):
            wrong = try_case(target, number)
            if wrong is not None:
                last = wrong.strip().splitlines()[-1]
                found[last] += 1
                if found[last] == 1:
                    sys.stdout.write(f"case {number}: {wrong}\n")
    sys.stdout.write(f"{options.target}: {options.cases} cases, {sum(found.values())} wrong\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
