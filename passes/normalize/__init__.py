"""Graph passes that bring a model into the form the decompositions understand, exactly."""

from onnx_lowrank.passes.normalize.flush_denormals import FlushDenormals
from onnx_lowrank.passes.normalize.fold_batch_norm import FoldBatchNorm
from onnx_lowrank.passes.normalize.fold_batch_norm_before import FoldBatchNormBefore
from onnx_lowrank.passes.normalize.fold_constants import FoldConstants
from onnx_lowrank.passes.normalize.fold_mul_add import FoldMulAdd
from onnx_lowrank.passes.normalize.fuse_hard_swish import FuseHardSwish
from onnx_lowrank.passes.normalize.inline_functions import InlineFunctions
from onnx_lowrank.passes.normalize.remove_identity import RemoveIdentity
from onnx_lowrank.transform import Pass

DEFAULT_NORMALIZE: tuple[Pass, ...] = (
    InlineFunctions(),
    RemoveIdentity(),
    FoldConstants(),
    FoldMulAdd(),
    FoldBatchNorm(),
    FoldMulAdd(),
    FoldBatchNormBefore(),
    FlushDenormals(),
)
"""Always right and never slower: what `optimize` does before it prices anything. FoldMulAdd comes twice, for the
constants on either side of a BatchNormalization."""

MEASURED_NORMALIZE: tuple[Pass, ...] = (FuseHardSwish(),)
"""Always right, faster on some machines only: kept where the whole model was measured faster with it. They run before
the others, which take patterns apart by folding the division by 6 into the next Conv."""
