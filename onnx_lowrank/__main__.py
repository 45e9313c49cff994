"""`python -m onnx_lowrank` is the command line."""

from onnx_lowrank.cli import main

main()
