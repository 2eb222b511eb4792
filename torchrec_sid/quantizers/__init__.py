"""Quantizers: content embeddings to Semantic IDs."""
