"""Operations on tensors: retrieval and lookup. Each has a definition in plain PyTorch in its `naive.py`."""

from ultramem.ops.backend import use_backend
from ultramem.ops.product_key_topk import product_key_topk
from ultramem.ops.tucker_topk import tucker_topk
from ultramem.ops.weighted_lookup import SharedTable, weighted_lookup

__all__ = ["SharedTable", "product_key_topk", "tucker_topk", "use_backend", "weighted_lookup"]
