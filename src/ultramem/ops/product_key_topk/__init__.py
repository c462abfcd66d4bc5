"""The best k sums of a row score and a column score."""

from ultramem.ops.backend import Operation
from ultramem.ops.product_key_topk import naive

product_key_topk = Operation(naive.product_key_topk)
