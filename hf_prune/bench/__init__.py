"""Benchmarks: a grid of recipes and peers run in turn, resumable, scored by one evaluator."""
