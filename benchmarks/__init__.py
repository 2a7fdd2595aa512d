"""Benchmarks: embedding (mteb), generation (lm-eval), retrieval, speed, and the report made from their results."""
