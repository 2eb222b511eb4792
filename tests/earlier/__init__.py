"""Artefacts as an earlier release (df61d2b) wrote them; :mod:`tests.earlier.write` says how.

``ARTEFACTS`` is the folder that holds them.
"""

from pathlib import Path

ARTEFACTS = Path(__file__).parent / "artefacts"
