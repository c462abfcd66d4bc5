"""Operations on tensors: retrieval and lookup. Each has a definition in plain PyTorch in its `naive.py`.

`ultramem.ops.product_key_topk` and `ultramem.ops.tucker_topk` are packages, with a function of the same name in each.
"""

from ultramem.ops.backend import use_backend
from ultramem.ops.weighted_lookup import SharedTable, weighted_lookup

__all__ = ["SharedTable", "use_backend", "weighted_lookup"]
