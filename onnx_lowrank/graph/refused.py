"""Weight-bearing operators that stay as they are, and the sentence the user reads about each."""

from __future__ import annotations

from onnx import NodeProto

from onnx_lowrank.graph.tensor import DEFAULT_DOMAINS

_RECURRENT = "recurrent layers are not factored yet"
_QUANTIZED = "its weight is quantized: factor the floating-point model first, then quantize"
_FUSED = "the file was already optimized by onnxruntime: give the model as it was exported"

_REFUSED: dict[str, str] = {
    "ConvTranspose": "transposed convolutions are not factored yet",
    "DeformConv": "deformable convolutions are not factored",
    "Einsum": "Einsum is not factored: export it as MatMul",
    "LSTM": _RECURRENT,
    "GRU": _RECURRENT,
    "RNN": _RECURRENT,
    "QLinearConv": _QUANTIZED,
    "ConvInteger": _QUANTIZED,
    "QLinearMatMul": _QUANTIZED,
    "MatMulInteger": _QUANTIZED,
    "Attention": "attention without a weight of its own",
}
_REFUSED_CONTRIBUTED: dict[str, str] = {
    **dict.fromkeys(
        (
            "FusedConv",
            "NhwcFusedConv",
            "NhwcConv",
            "FusedMatMul",
            "FusedMatMulActivation",
            "TransposeMatMul",
            "FusedGemm",
            "GemmFastGelu",
            "GemmFloat8",
            "SparseToDenseMatMul",
            "ConvTransposeWithDynamicPads",
        ),
        _FUSED,
    ),
    **dict.fromkeys(
        (
            "Attention",
            "PackedAttention",
            "DecoderAttention",
            "DecoderMaskedSelfAttention",
            "LongformerAttention",
            "MultiHeadAttention",
            "GroupQueryAttention",
            "MoE",
        ),
        _FUSED,
    ),
    **dict.fromkeys(
        (
            "QAttention",
            "QOrderedAttention",
            "QOrderedMatMul",
            "QLinearConv",
            "QGemm",
            "QMoE",
            "DynamicQuantizeMatMul",
            "DynamicQuantizeLSTM",
            "MatMulInteger16",
            "MatMulIntegerToFloat",
            "MatMulNBits",
            "MatMulBnb4",
            "MatMulFpQ4",
        ),
        _QUANTIZED,
    ),
}


def refusal(node: NodeProto) -> str | None:
    """Why an operator that carries weights is kept whatever its shape; None for operators this says nothing about."""
    if node.domain in DEFAULT_DOMAINS:
        return _REFUSED.get(node.op_type)
    if node.domain == "com.microsoft.nchwc" and node.op_type == "Conv":
        return f"{node.op_type} of {node.domain}: {_FUSED}"
    sentence = _REFUSED_CONTRIBUTED.get(node.op_type) if node.domain.startswith("com.microsoft") else None
    return f"{node.op_type} of {node.domain}: {sentence}" if sentence else None
