"""The best k cells of a grid of Tucker-decomposed scores."""

from ultramem.ops.backend import HAS_KERNELS, Operation
from ultramem.ops.tucker_topk import naive

tucker_topk = Operation(naive.tucker_topk)

if HAS_KERNELS:
    from ultramem.ops.tucker_topk import fused

    tucker_topk.register_fused(fused.tucker_topk, fused.supports)
