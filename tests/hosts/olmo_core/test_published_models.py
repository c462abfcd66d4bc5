"""Whole models against the logits of the published code, from its own checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from ultramem import MemoryConfig
from ultramem.hosts.olmo_core import ModelConfig

CHECKPOINTS = Path(__file__).parents[2] / "golden" / "olmo_checkpoints"
KINDS = {"memory_plus": "memory_plus", "ultramem_v1": "ultramem", "ultramem_v2": "ultramem_v2"}
BLOCK_NAMES = {
    "attn_norm": "attention_norm",
    "ff_norm": "feed_forward_norm",
    "q_norm": "attention.q_norm",
    "k_norm": "attention.k_norm",
    "attn_out": "attention.w_out",
    "ff_out": "feed_forward.w2",
}
MEMORY_NAMES = {
    "query_proj.weight": "query_proj.weight",
    "query_norm.weight": "query_norm.weight",
    "keys_norm.weight": "key_norm.weight",
    "keys": "keys",
    "shuffle_index": "shuffle",
    "pre_values_proj.weight": "pre_proj.weight",
    "values_proj.weight": "output_proj.weight",
    "swilu_projection.weight": "gate_proj.weight",
    "values_for_look_up": "table.values",
}


def model_config(published: dict[str, Any]) -> ModelConfig:
    insertion = published["mem_insert_way"]
    kind = KINDS[published["mem_type"]]
    memory = MemoryConfig(
        kind=kind,  # type: ignore[arg-type]
        num_keys=published["mem_knum"],
        key_dim=published["mem_kdim"],
        value_dim=published["mem_vdim"],
        pre_value_dim=published["mem_pre_vdim"] if kind == "ultramem_v2" else 0,
        top_k=published["mem_knn"],
        query_per_rank=False,  # see `drop_unused`
        heads=published["mem_head"],
        share_ratio=published["mem_share_ratio"],
        insertion="all" if insertion == "full" else insertion,
        norm_eps=published["layer_norm_eps"],
    )
    return ModelConfig(
        d_model=published["d_model"],
        num_blocks=published["n_layers"],
        num_heads=published["n_heads"],
        feed_forward_size=published["mlp_hidden_size"] // 2,
        vocab_size=published["embedding_size"],
        rope_theta=published["rope_theta"],
        norm_eps=published["layer_norm_eps"],
        memory=memory,
    )


def translate(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published state under our names; `ff_proj` holds the value half before the gate half."""
    state: dict[str, Tensor] = {}
    cores: dict[str, list[Tensor]] = {}
    for full_name, tensor in published.items():
        name = full_name.removeprefix("transformer.")
        part, _, rest = name.partition(".")
        if part == "wte":
            state["embeddings.weight"] = state["lm_head.w_out.weight"] = tensor
        elif part == "ln_f":
            state["lm_head.norm.weight"] = tensor
        elif part == "full_memory_layer":
            state[f"memory.table.{rest.removesuffix('_for_look_up')}"] = tensor
        elif part == "blocks":
            number, layer, _ = rest.split(".")
            prefix = f"blocks.{number}"
            if layer == "att_proj":
                for ours, third in zip(("w_q", "w_k", "w_v"), tensor.chunk(3), strict=True):
                    state[f"{prefix}.attention.{ours}.weight"] = third
            elif layer == "ff_proj":
                for ours, half in zip(("w3", "w1"), tensor.chunk(2), strict=True):
                    state[f"{prefix}.feed_forward.{ours}.weight"] = half
            else:
                state[f"{prefix}.{BLOCK_NAMES[layer]}.weight"] = tensor
        else:
            number, _, item = rest.partition(".")
            prefix = f"memory.layers.{number}"
            if item.startswith("tucker_core."):
                cores.setdefault(f"{prefix}.cores", []).append(tensor)
            elif item.startswith("tucker_core_"):
                state[f"{prefix}.{'u' if item.endswith('u') else 't'}"] = tensor[0, :, 0]
            else:
                state[f"{prefix}.{MEMORY_NAMES[item]}"] = tensor
    return state | {name: torch.stack(tensors) for name, tensors in cores.items()}


def drop_unused(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what the published code computes and does not use.

    That is the normalised keys of Memory+, and in UltraMemV2 with a query per rank the queries of the second rank.
    """
    if name == "memory_plus":
        return {key: tensor for key, tensor in state.items() if not key.endswith("key_norm.weight")}
    if name == "ultramem_v2":
        return {key: tensor.chunk(2)[0] if "query_proj" in key else tensor for key, tensor in state.items()}
    return state


@pytest.mark.parametrize("name", KINDS)
def test_logits(name: str) -> None:
    published = yaml.safe_load((CHECKPOINTS / name / "config.yaml").read_text())["model"]
    state = drop_unused(name, translate(torch.load(CHECKPOINTS / name / "model.pt", weights_only=True)))
    model = model_config(published).build()
    assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state)
    arrays = np.load(CHECKPOINTS / name / "logits.npz")
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(arrays["input_ids"]))
    expected = torch.from_numpy(arrays["logits"])
    assert (logits - expected).norm() < 1e-5 * expected.norm()
