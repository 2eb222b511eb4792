"""Command-line programs; run from the repository root as `python -m apps.NAME`."""
