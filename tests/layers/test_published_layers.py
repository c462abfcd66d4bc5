"""The layers against float64 inputs, outputs and gradients of the published code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ultramem import Memory, MemoryConfig
from ultramem.ops import use_backend

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["memory_plus", "ultramem_v1", "ultramem_v2", "ultramem_v2_gelu", "ultramem_v2_virtual4_heads2"]
NAMES = {
    "query_weight": "query_proj.weight",
    "query_norm_weight": "query_norm.weight",
    "key_norm_weight": "key_norm.weight",
    "keys": "keys",
    "core": "cores",
    "pre_weight": "pre_proj.weight",
    "output_weight": "output_proj.weight",
    "gate_weight": "gate_proj.weight",
    "values": "table.values",
    "pre_values": "table.pre_values",
}


def load(case: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with np.load(GOLDEN / f"{case}.npz") as arrays:
        meta = json.loads(str(arrays["meta"]))
        return meta, {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "meta"}


def build(meta: dict[str, Any], dtype: torch.dtype = torch.float64) -> Memory:
    kind = {"ultramem_v1": "ultramem"}.get(meta["kind"], meta["kind"])
    config = MemoryConfig(
        kind=kind,
        num_keys=math.isqrt(meta.get("rows_per_layer", meta["table_rows"])),
        key_dim=meta["key_dim"],
        value_dim=meta["value_dim"],
        pre_value_dim=meta.get("pre_value_dim", 0),
        top_k=meta["top_m"],
        heads=meta["heads"],
        tucker_rank=meta.get("tucker_rank", 2),
        cores=meta.get("cores", 2),
        query_per_rank=False,
        key_expansion=math.isqrt(meta.get("virtual_blocks", 1)),
        share_ratio=meta.get("share_ratio", 1.0),
        pre_activation=meta.get("pre_activation"),
        norm_eps=meta["norm_eps"],
    )
    return Memory(config, meta["d_model"], meta.get("num_layers", 1), dtype=dtype)


def check(case: str, tolerance: float, dtype: torch.dtype = torch.float64, device: Any = None) -> None:
    """Outputs and gradients of a case, within a part of their norm."""
    meta, arrays = load(case)
    narrow = {name: array.to(dtype) if array.is_floating_point() else array for name, array in arrays.items()}
    arrays = {name: array.to(device) for name, array in narrow.items()}
    with use_backend("auto"):  # initial values are found with many tokens
        memory = build(meta, dtype).to(device)
    layer = memory.layers[meta.get("layer_index", 0)]
    parameters = dict(layer.named_parameters()) | {
        f"table.{name}": parameter for name, parameter in layer.table.named_parameters()
    }
    used = {name: parameters[ours] for name, ours in NAMES.items() if name in arrays}
    with torch.no_grad():
        for name, parameter in used.items():
            parameter.copy_(arrays[name].view(parameter.shape))
        for name in ("u", "t"):
            if name in arrays:
                getattr(layer, name).copy_(arrays[name].view_as(getattr(layer, name)))
        if "shuffle" in arrays:
            layer.shuffle.copy_(arrays["shuffle"])
    if meta["kind"] == "ultramem_v2":
        assert layer.window_start == meta["row_offset"]
        assert layer.window_rows == meta["window_rows"]

    x = arrays["x"].requires_grad_()
    y = layer(x)
    (y * arrays["grad_y"]).sum().backward()

    results = {"y": y, "grad_x": x.grad}
    results |= {f"grad_{name}": used[name].grad for name in used if f"grad_{name}" in arrays}
    assert len(results) >= 7
    for name, result in results.items():
        expected = arrays[name]
        error = (result.view_as(expected) - expected).norm() / expected.norm()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: str) -> None:
    check(case, tolerance=1e-6 if case == "memory_plus" else 1e-9)


@pytest.mark.kernels
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_with_kernels(case: str, device: torch.device) -> None:
    with use_backend("fused"):
        check(case, 1e-5, torch.float32, device)


@pytest.mark.parametrize("case", [case for case in CASES if "top_scores" in load(case)[1]])
def test_retrieval(case: str) -> None:
    meta, arrays = load(case)
    layer = build(meta).layers[0]
    with torch.no_grad():
        layer.query_proj.weight.copy_(arrays["query_weight"])
        layer.query_norm.weight.copy_(arrays["query_norm_weight"])
        layer.key_norm.weight.copy_(arrays["key_norm_weight"])
        layer.keys.copy_(arrays["keys"])
        layer.cores.copy_(arrays["core"])
        layer.u.copy_(arrays["u"].view_as(layer.u))
        layer.t.copy_(arrays["t"].view_as(layer.t))
        scores, indices = layer.retrieve(layer.queries(arrays["x"]))
    found = by_index(scores, indices, layer.config.heads)
    expected = by_index(arrays["top_scores"], arrays["top_indices_before_shuffle"], layer.config.heads)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1])


def by_index(scores: Tensor, indices: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The same as (tokens, heads, k, cores) and (tokens, heads, k), each head's cells in the order of their indices."""
    indices, order = indices.unflatten(1, (heads, -1)).sort(-1)
    scores = scores.unflatten(1, (heads, -1))
    return scores.gather(2, order.unsqueeze(-1).expand_as(scores)), indices
