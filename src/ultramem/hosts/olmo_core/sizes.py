"""Sizes of a model by arithmetic: they tell whether it fits before anything is built."""

from __future__ import annotations

from ultramem.config import MemoryConfig
from ultramem.hosts.olmo_core.config import ModelConfig


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Numbers of parameters by what to lower for fewer: a field and its value, such as `model.vocab_size=50304`.

    Their sum is the number of all parameters.
    """
    d_model, blocks = config.d_model, config.num_blocks
    matrices = 1 if config.tie_embeddings else 2
    attention = 4 * d_model**2 + 2 * (d_model // config.num_heads)  # and the gains of query and key norms
    counts = {
        f"model.vocab_size={config.vocab_size}": matrices * config.vocab_size * d_model,
        f"model.d_model={d_model}": blocks * (attention + 2 * d_model) + d_model,  # and the gains of the other norms
    }
    if config.moe is None:
        counts[f"model.feed_forward_size={config.feed_forward_size}"] = blocks * 3 * d_model * config.feed_forward_size
    else:
        counts[f"model.moe.num_experts={config.moe.num_experts}"] = blocks * config.moe.num_params(d_model)
    if config.memory is not None:
        counts |= _count_of_memory(config.memory, d_model, blocks)
    return counts


def _count_of_memory(memory: MemoryConfig, d_model: int, blocks: int) -> dict[str, int]:
    layers = len(memory.insertions(blocks))
    layout = memory.layout(layers)
    return {
        _name_of_table(memory): layout.num_tables * layout.table_rows * (memory.value_dim + memory.pre_value_dim),
        f"model.memory.key_dim={memory.key_dim}": (
            layers * memory.layer_type.count_parameters(memory, d_model, layout.axis_keys)
        ),
    }


def _name_of_table(memory: MemoryConfig) -> str:
    widest = max(("num_keys", memory.num_keys**2), ("value_dim", memory.value_dim), key=lambda named: named[1])[0]
    return f"model.memory.{widest}={getattr(memory, widest)}"


def bytes_to_load(config: ModelConfig) -> dict[str, int]:
    """Least bytes that a loaded model takes, in the dtypes that it is trained in; names as in `count_parameters`."""
    return bytes_of_state(config, 4)


def bytes_to_train(config: ModelConfig, share: float = 1.0) -> dict[str, int]:
    """Least bytes that training takes after a step: parameters, gradients and two moments, all in float32.

    Of a table with the row-wise optimizer they are those of its parameters.

    Args:
        config: configuration of the model.
        share: of the parameters that are on the device; FSDP shards them.
    """
    return {name: int(share * size) for name, size in bytes_of_state(config, 16).items()}


def bytes_of_state(config: ModelConfig, with_adamw: int) -> dict[str, int]:
    """Bytes of the parameters and what belongs to them; names as in `count_parameters`.

    Args:
        config: configuration of the model.
        with_adamw: bytes of a parameter that AdamW trains. The row-wise optimizer may keep a table's parameters alone.
    """
    counts, memory = count_parameters(config), config.memory
    sizes = {name: with_adamw * count for name, count in counts.items()}
    if memory is not None and memory.optimizer == "rowwise":
        table = _name_of_table(memory)
        sizes[table] = (2 if memory.table_dtype == "bfloat16" else 4) * counts[table]
    return sizes
