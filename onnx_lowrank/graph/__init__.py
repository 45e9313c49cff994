"""The only reader and writer of ONNX files."""
