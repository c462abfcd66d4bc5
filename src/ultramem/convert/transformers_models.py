"""Conversion of configurations and states between the hosts OLMo-core and transformers."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ultramem.errors import UltraMemError
from ultramem.hosts.olmo_core import ModelConfig, MoEConfig
from ultramem.hosts.transformers import UltraMemConfig, UltraMemForCausalLM
from ultramem.hosts.transformers.files import load_config_file, load_model_file

# Parameters with one name on each host, which are all but those of experts. {} is the block's number.
_NAMES = {
    "embeddings.weight": "model.embed_tokens.weight",
    "lm_head.norm.weight": "model.norm.weight",
    "lm_head.w_out.weight": "lm_head.weight",
    "blocks.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.feed_forward_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.attention.w_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.attention.w_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.attention.w_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.attention.w_out.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.attention.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.{}.attention.k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "blocks.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "blocks.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.feed_forward.router.weight": "model.layers.{}.mlp.gate.weight",
}
_BACK = {theirs: ours for ours, theirs in _NAMES.items()}
_GATE, _UP, _DOWN = (f"feed_forward.{name}_proj" for name in ("gate", "up", "down"))

# Fields that have the same meaning on both hosts.
_FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_blocks": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
}
_MOE_FIELDS = {
    "hidden_size": "moe_intermediate_size",
    "num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "normalize_top_k": "norm_topk_prob",
    "load_balancing_coef": "router_aux_loss_coef",
}
Z_LOSS_COEF = "router_z_loss_coef"  # not a field of transformers, which keeps unknown ones


def to_transformers_config(model: ModelConfig, **options: Any) -> PreTrainedConfig:
    """Convert a configuration to transformers.

    A model with memory becomes an `UltraMemConfig`. Without memory it becomes a Qwen3 or, with a mixture of experts, a
    Qwen3-MoE, which transformers has itself.

    Args:
        model: configuration of the training host.
        options: further fields, such as `max_position_embeddings` and `eos_token_id`.
    """
    fields: dict[str, Any] = {theirs: getattr(model, ours) for ours, theirs in _FIELDS.items()} | {
        "num_key_value_heads": model.num_heads,
        "head_dim": model.d_model // model.num_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rope_theta)},
        "initializer_range": model.linear_std,
        "dtype": torch.float32,
        **options,
    }
    if model.moe is not None:
        of_moe = {theirs: getattr(model.moe, ours) for ours, theirs in _MOE_FIELDS.items()}
        return Qwen3MoeConfig(**of_moe, **{Z_LOSS_COEF: model.moe.z_loss_coef}, **fields)
    fields["intermediate_size"] = model.feed_forward_size
    if model.memory is None or model.memory.insertion == "none":
        return Qwen3Config(**fields)
    return UltraMemConfig(memory=dataclasses.asdict(model.memory), **fields)


def from_transformers_config(config: PreTrainedConfig) -> ModelConfig:
    """Convert a configuration to the training host.

    Raises:
        UltraMemError: the training host does not support the architecture.
    """
    if not isinstance(config, Qwen3Config | Qwen3MoeConfig):
        raise UltraMemError(
            f"model_type={config.model_type}: must be ultramem, qwen3 or qwen3_moe, which the training host supports"
        )
    required = {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "sliding_window": None,
        "rope_type": "default",
    }
    rope = config.rope_parameters or {}
    for name, value in required.items():
        found = rope.get(name, getattr(config, name, value))
        if found != value:
            raise UltraMemError(f"{name}={found}: must be {value} for the training host")
    theta = rope.get("rope_theta", 10000)
    if theta != int(theta):
        raise UltraMemError(f"rope_theta={theta}: must be a whole number for the training host")
    moe = None
    if isinstance(config, Qwen3MoeConfig):
        of_moe = {ours: getattr(config, theirs) for ours, theirs in _MOE_FIELDS.items()}
        moe = MoEConfig(**of_moe, z_loss_coef=getattr(config, Z_LOSS_COEF, MoEConfig.z_loss_coef))
    return ModelConfig(
        **{ours: getattr(config, theirs) for ours, theirs in _FIELDS.items()},
        feed_forward_size=0 if moe else config.intermediate_size,
        memory=config.memory_config() if isinstance(config, UltraMemConfig) else None,
        moe=moe,
        rope_theta=int(theta),
        init_std=config.initializer_range,
    )


def to_transformers_state(state: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Convert the state of `model.build()` to transformers; without the output layer if embeddings are tied."""
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("memory."):
            converted[f"model.{name}"] = tensor
        elif name.endswith(_GATE):
            block = name.removesuffix(_GATE).replace("blocks", "model.layers")
            both = torch.cat([tensor, state[name.replace(_GATE, _UP)]], dim=2)
            converted[f"{block}mlp.experts.gate_up_proj"] = both.transpose(1, 2).contiguous()
        elif name.endswith(_DOWN):
            block = name.removesuffix(_DOWN).replace("blocks", "model.layers")
            converted[f"{block}mlp.experts.down_proj"] = tensor.transpose(1, 2).contiguous()
        elif not name.endswith(_UP) and not (model.tie_embeddings and name == "lm_head.w_out.weight"):
            converted[_renamed(name, _NAMES)] = tensor
    return converted


def from_transformers_state(state: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The reverse of `to_transformers_state`."""
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = name.partition("mlp.experts.")[0].replace("model.layers", "blocks")
        if name.startswith("model.memory."):
            converted[name.removeprefix("model.")] = tensor
        elif name.endswith("experts.gate_up_proj"):
            gate, up = tensor.transpose(1, 2).chunk(2, dim=2)
            converted |= {block + _GATE: gate.contiguous(), block + _UP: up.contiguous()}
        elif name.endswith("experts.down_proj"):
            converted[block + _DOWN] = tensor.transpose(1, 2).contiguous()
        else:
            converted[_renamed(name, _BACK)] = tensor
    if model.tie_embeddings:
        converted["lm_head.w_out.weight"] = converted["embeddings.weight"]
    return converted


def to_transformers(state: dict[str, Tensor], model: ModelConfig, **options: Any) -> PreTrainedModel:
    """Convert a model to transformers; its parameters are the tensors of `state`, not copies.

    Args:
        state: state of `model.build()`.
        model: configuration of the training host.
        options: further fields of the configuration of transformers.
    """
    config = to_transformers_config(model, **options)
    types = {UltraMemConfig: UltraMemForCausalLM, Qwen3Config: Qwen3ForCausalLM, Qwen3MoeConfig: Qwen3MoeForCausalLM}
    with torch.device("meta"):
        built: PreTrainedModel = types[type(config)](config)
    converted = to_transformers_state(state, model)
    if model.tie_embeddings:
        converted["lm_head.weight"] = converted["model.embed_tokens.weight"]
    built.load_state_dict(converted, assign=True)
    built.tie_weights()
    return built


def read_config(path: Path) -> ModelConfig:
    """Read the configuration of a model, for the training host.

    Raises:
        UltraMemError: there is no model, or the training host does not support its architecture.
    """
    return from_transformers_config(load_config_file(path))


def read_model(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a model's configuration, and its state with the training host's names, in float32 on the CPU.

    Raises:
        UltraMemError: as in `read_config`; or the weights are missing, damaged or incomplete.
    """
    config = read_config(path)
    state = load_model_file(path, torch.float32).state_dict()
    if config.tie_embeddings:
        state.pop("lm_head.weight", None)
    return config, from_transformers_state(state, config)


def _renamed(name: str, names: dict[str, str]) -> str:
    number = re.search(r"\.(\d+)\.", name)
    pattern = name if number is None else name.replace(number[0], ".{}.", 1)
    if pattern not in names:
        raise UltraMemError(f"parameter {name} has no counterpart on the other host")
    return names[pattern].format(None if number is None else number[1])
