"""Fuzzers: change an artefact, compute every seal anew, open it. See :mod:`tests.fuzz.__main__`."""
