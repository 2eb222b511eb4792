"""Backends of code-space attention: one operator, several ways to compute it."""
