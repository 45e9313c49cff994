"""What calibration costs and saves: `python -m benchmarks.accuracy EXPERIMENT`, one file per kind of experiment."""
