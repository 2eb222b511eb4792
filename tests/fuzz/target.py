"""What every fuzzer is: a good artefact, changed copies of it, and what reading one of them must give."""

import random
from pathlib import Path


class Target:
    """A reader under test.

    Args:
        home: folder for the good artefact; ``case`` below it is where the changed copy lies.
    """

    def __init__(self, home: Path) -> None:
        self.home, self.case = home, home / "case"
        self.make()

    def make(self) -> None:
        """Make the good artefact."""
        raise NotImplementedError

    def change(self, chance: random.Random) -> bool:
        """Write a changed copy. Whether what changed was sealed and not sealed anew: it must be refused."""
        raise NotImplementedError

    def read(self) -> str | None:
        """Open the changed copy; what is wrong with what it gives, None if all is well."""
        raise NotImplementedError
