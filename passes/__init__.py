"""Every rewrite, one per file: graph passes in `normalize`, mathematics in `decompose`, `factor` realises a plan."""

if __name__ != "onnx_lowrank.passes":
    raise ImportError(f"got import of {__name__!r}, expected 'onnx_lowrank.passes': import it as onnx_lowrank.passes")
