"""Operations on tensors: retrieval and lookup. Each has a definition in plain PyTorch in its `naive.py`.

Each is a package with a function of the same name: `from ultramem.ops.tucker_topk import tucker_topk`.
"""

from ultramem.ops.backend import use_backend

__all__ = ["use_backend"]
