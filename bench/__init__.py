"""Benchmarks against plain references: `python -m bench [NAME] [--quick] [--json]`. Ratios above 1 mean ours is faster."""
