"""Operations on tensors: retrieval and lookup. Each has a definition in plain PyTorch in its `naive.py`."""

from ultramem.ops.backend import use_backend
from ultramem.ops.product_key_topk import product_key_topk
from ultramem.ops.tucker_topk import tucker_topk

__all__ = ["product_key_topk", "tucker_topk", "use_backend"]
