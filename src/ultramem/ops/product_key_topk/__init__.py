"""The best k sums of a row score and a column score."""

from ultramem.ops.backend import HAS_KERNELS, Operation
from ultramem.ops.product_key_topk import naive

product_key_topk = Operation(naive.product_key_topk)

if HAS_KERNELS:
    from ultramem.ops.product_key_topk import fused

    product_key_topk.register_fused(fused.product_key_topk, fused.supports)
