"""The best k cells of a grid of Tucker-decomposed scores."""

from ultramem.ops.backend import Operation
from ultramem.ops.tucker_topk import naive

tucker_topk = Operation(naive.tucker_topk)
