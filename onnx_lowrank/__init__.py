"""onnx-lowrank: ONNX model in, faster ONNX model out, with proof."""
