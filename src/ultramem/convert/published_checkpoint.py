"""Reading checkpoints of the published UltraMem code, a fork of OLMo-1."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ultramem.config import MemoryConfig
from ultramem.configuration.decoding import decode
from ultramem.configuration.field_types import check_types
from ultramem.configuration.yaml_text import read_yaml
from ultramem.errors import ConfigError, UltraMemError, system_reason
from ultramem.hosts.olmo_core import ModelConfig

CONFIG_NAME = "config.yaml"
PICKLE_NAME, SAFETENSORS_NAME = "model.pt", "model.safetensors"

KINDS = {"memory_plus": "memory_plus", "ultramem_v1": "ultramem", "ultramem_v2": "ultramem_v2"}

# Our fields and the corresponding published keys.
MODEL_KEYS = {
    "d_model": "d_model",
    "num_blocks": "n_layers",
    "num_heads": "n_heads",
    "feed_forward_size": "mlp_hidden_size",
    "vocab_size": "embedding_size",
    "tie_embeddings": "weight_tying",
    "rope_theta": "rope_theta",
    "norm_eps": "layer_norm_eps",
}
MEMORY_KEYS = {
    "kind": "mem_type",
    "num_keys": "mem_knum",
    "key_dim": "mem_kdim",
    "value_dim": "mem_vdim",
    "pre_value_dim": "mem_pre_vdim",
    "top_k": "mem_knn",
    "heads": "mem_head",
    "query_per_rank": "mem_q_for_each_tucker_rank",
    "key_expansion": "mem_key_expand_time",
    "value_projectors": "mem_value_expand_time",
    "share_ratio": "mem_share_ratio",
    "insertion": "mem_insert_way",
    "pre_activation": "mem_use_glu_act",
    "output_dropout": "mem_output_dropout_rate",
    "balance_coef": "mem_key_balance_reg_coef",
    "norm_eps": "layer_norm_eps",
}
# Fields that only UltraMemV2 has.
_V2_FIELDS = {"pre_value_dim", "query_per_rank", "key_expansion", "value_projectors", "share_ratio"} | {
    "pre_activation", "output_dropout", "balance_coef"
}  # fmt: skip

# Keys that change what a model computes: the published default, and the values that we implement.
FIXED_KEYS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "activation_type": ("swiglu", ("swiglu",)),
    "alibi": (False, (False,)),
    "attention_layer_norm": (False, (True,)),
    "attention_layer_norm_with_affine": (True, (True,)),
    "bias_for_layer_norm": (None, (False, None)),
    "block_group_size": (1, (1,)),
    "block_type": ("sequential", ("sequential",)),
    "clip_qkv": (None, (None,)),
    "embedding_layer_norm": (False, (False,)),
    "include_bias": (True, (False,)),
    "layer_norm_type": ("default", ("rms",)),
    "layer_norm_with_affine": (True, (True,)),
    "mem_final_top_expand_time": (1, (1,)),
    "moe_interleave": (False, (False, None)),
    "multi_query_attention": (None, (None, False)),
    "norm_after": (False, (False,)),
    "rope": (False, (True,)),
    "scale_logits": (False, (False,)),
}
# Memory keys that do not change what a model computes. The published code never applies the rank penalty.
IDLE_MEMORY_KEYS = ("mem_log_interval", "mem_parallel_size", "mem_tucker_rank_penalty")

# Our names and the published ones, under `transformer.`, with the part of the rows and the number of equal parts.
_SOURCES = {
    "embeddings.weight": ("wte.weight", 0, 1),
    "lm_head.norm.weight": ("ln_f.weight", 0, 1),
    "lm_head.w_out.weight": ("ff_out.weight", 0, 1),
    "blocks.{}.attention_norm.weight": ("blocks.{}.attn_norm.weight", 0, 1),
    "blocks.{}.attention.w_q.weight": ("blocks.{}.att_proj.weight", 0, 3),
    "blocks.{}.attention.w_k.weight": ("blocks.{}.att_proj.weight", 1, 3),
    "blocks.{}.attention.w_v.weight": ("blocks.{}.att_proj.weight", 2, 3),
    "blocks.{}.attention.q_norm.weight": ("blocks.{}.q_norm.weight", 0, 1),
    "blocks.{}.attention.k_norm.weight": ("blocks.{}.k_norm.weight", 0, 1),
    "blocks.{}.attention.w_out.weight": ("blocks.{}.attn_out.weight", 0, 1),
    "blocks.{}.feed_forward_norm.weight": ("blocks.{}.ff_norm.weight", 0, 1),
    "blocks.{}.feed_forward.w3.weight": ("blocks.{}.ff_proj.weight", 0, 2),
    "blocks.{}.feed_forward.w1.weight": ("blocks.{}.ff_proj.weight", 1, 2),
    "blocks.{}.feed_forward.w2.weight": ("blocks.{}.ff_out.weight", 0, 1),
    "memory.layers.{}.query_proj.weight": ("mem_blocks.{}.query_proj.weight", 0, 1),
    "memory.layers.{}.query_norm.weight": ("mem_blocks.{}.query_norm.weight", 0, 1),
    "memory.layers.{}.key_norm.weight": ("mem_blocks.{}.keys_norm.weight", 0, 1),
    "memory.layers.{}.keys": ("mem_blocks.{}.keys", 0, 1),
    "memory.layers.{}.cores": ("mem_blocks.{}.tucker_core", 0, 1),
    "memory.layers.{}.u": ("mem_blocks.{}.tucker_core_u", 0, 1),
    "memory.layers.{}.t": ("mem_blocks.{}.tucker_core_v", 0, 1),
    "memory.layers.{}.shuffle": ("mem_blocks.{}.shuffle_index", 0, 1),
    "memory.layers.{}.pre_proj.weight": ("mem_blocks.{}.pre_values_proj.weight", 0, 1),
    "memory.layers.{}.output_proj.weight": ("mem_blocks.{}.values_proj.weight", 0, 1),
    "memory.layers.{}.gate_proj.weight": ("mem_blocks.{}.swilu_projection.weight", 0, 1),
    "memory.layers.{}.table.values": ("mem_blocks.{}.values_for_look_up", 0, 1),
    "memory.table.values": ("full_memory_layer.values_for_look_up", 0, 1),
    "memory.table.pre_values": ("full_memory_layer.pre_values_for_look_up", 0, 1),
}


@dataclass(frozen=True)
class PublishedModel:
    """Keys of the published model configuration that we translate, with the published defaults.

    Attributes have the published names. `mlp_hidden_size` is the width of value and gate together; its default is
    `mlp_ratio * d_model`. A `mem_type` of None means no memory.
    """

    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    n_kv_heads: int | None = None
    mlp_ratio: int = 4
    mlp_hidden_size: int | None = None
    vocab_size: int = 50257
    embedding_size: int | None = 50304
    weight_tying: bool = True
    rope_theta: int = 10000
    layer_norm_eps: float = 1e-5
    mem_type: Literal["ultramem_v1", "ultramem_v2", "memory_plus", "none"] | None = None
    mem_insert_way: str = "full"
    mem_knum: int = 128
    mem_kdim: int = 512
    mem_vdim: int = 512
    mem_pre_vdim: int = 512
    mem_knn: int = 16
    mem_head: int = 1
    mem_share_ratio: float = 1.0
    mem_key_expand_time: int = 1
    mem_value_expand_time: int = 1
    mem_q_for_each_tucker_rank: bool = False
    mem_use_glu_act: bool = False
    mem_key_balance_reg_coef: float = 0.0
    mem_output_dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        if self.mlp_hidden_size is not None and self.mlp_hidden_size % 2:
            raise ConfigError(f"mlp_hidden_size={self.mlp_hidden_size}: must be even, as SwiGLU splits it in halves")
        copies = self.mem_key_expand_time**2
        if self.mem_type == "ultramem_v2" and self.mem_value_expand_time not in (1, copies):
            raise ConfigError(
                f"mem_value_expand_time={self.mem_value_expand_time}: must be 1, or the square of "
                f"mem_key_expand_time={self.mem_key_expand_time}"
            )

    def model_fields(self) -> dict[str, Any]:
        """Arguments of our `ModelConfig`, except `memory`."""
        hidden_size = self.mlp_ratio * self.d_model if self.mlp_hidden_size is None else self.mlp_hidden_size
        return {name: getattr(self, key) for name, key in MODEL_KEYS.items()} | {
            "feed_forward_size": hidden_size // 2,
            "vocab_size": self.embedding_size or self.vocab_size,
        }

    def memory_fields(self) -> dict[str, Any] | None:
        """Arguments of our `MemoryConfig` that the published layer of this kind uses; None without memory."""
        if self.mem_type in (None, "none"):
            return None
        values = {name: getattr(self, key) for name, key in MEMORY_KEYS.items()} | {
            "kind": KINDS[str(self.mem_type)],
            "insertion": {"full": "all", "no_mem": "none"}.get(self.mem_insert_way, self.mem_insert_way),
            "value_projectors": "single" if self.mem_value_expand_time == 1 else "per_block",
            "pre_activation": "gelu",
        }
        unused = set() if self.mem_type == "ultramem_v2" else _V2_FIELDS
        if not (self.mem_use_glu_act and self.mem_pre_vdim):
            unused = unused | {"pre_activation"}
        return {name: value for name, value in values.items() if name not in unused}


class _Source(NamedTuple):
    """A published tensor: name, shape, and the part of its rows and number of equal parts."""

    name: str
    shape: tuple[int, ...]
    part: int = 0
    parts: int = 1


def read_published_checkpoint(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read an unsharded checkpoint of the published code.

    Tensors whose dtype need not change are memory-mapped, not copied, so the file must not change meanwhile. Tied
    embeddings share their memory.

    Args:
        path: directory with `config.yaml`, and with `model.pt` or `model.safetensors`. No code in them is run.

    Returns:
        the configuration, and a state with exactly the names, shapes and dtypes of `ModelConfig.build`.

    Raises:
        UltraMemError: a file is missing or damaged, or the checkpoint is sharded; we do not implement the model, or the
            published code loses the output of one of its memory layers; or the tensors do not fit the configuration.
    """
    file = path / CONFIG_NAME
    options = _read_options(file)
    try:
        published, config = _model_config(options)
    except ConfigError as error:
        raise UltraMemError(f"{file}: model.{str(error).removeprefix('model.')}") from error
    tensors_file, tensors = _read_tensors(path)
    try:
        return config, _state(published, config, tensors)
    except UltraMemError as error:
        raise UltraMemError(f"{tensors_file}: {error}") from error


def _read_options(file: Path) -> Mapping[str, Any]:
    if not file.parent.is_dir():
        raise UltraMemError(f"{file.parent} is not a directory; give one with {CONFIG_NAME} and {PICKLE_NAME}")
    content = read_yaml(file)
    options = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(options, Mapping):
        raise UltraMemError(f"{file} has no section `model`; copy the checkpoint's own there")
    return options


def _model_config(options: Mapping[str, Any]) -> tuple[PublishedModel, ModelConfig]:
    published = decode(PublishedModel, options, path="model")
    if published.n_kv_heads not in (None, published.n_heads):
        raise ConfigError(f"n_kv_heads={published.n_kv_heads}: must be n_heads={published.n_heads}, or null")
    for key, (default, accepted) in FIXED_KEYS.items():
        if options.get(key, default) not in accepted:
            value = f"={options[key]!r}" if key in options else f" is missing, which means {default!r}"
            raise ConfigError(f"{key}{value}: must be {accepted[0]!r}; other models are not supported")
    try:
        return published, ModelConfig(**published.model_fields(), memory=_memory_config(published, options))
    except ConfigError as error:
        section, name = re.match(r"(memory\.)?(\w*)", str(error)).groups()  # type: ignore[union-attr]
        source = (MEMORY_KEYS if section else MODEL_KEYS).get(name)
        raise ConfigError(f"{source}: {error}" if source else str(error)) from error


def _memory_config(published: PublishedModel, options: Mapping[str, Any]) -> MemoryConfig | None:
    fields = published.memory_fields()
    if fields is None or published.mem_insert_way == "no_mem":
        return None
    known = {field.name for field in dataclasses.fields(published)} | FIXED_KEYS.keys() | {*IDLE_MEMORY_KEYS}
    for key in options:
        if str(key).startswith("mem_") and key not in known and options[key]:
            raise ConfigError(
                f"{key}={options[key]!r}: must be 0, false, null or missing; other values are not supported"
            )
    if published.mem_type != "memory_plus" and published.mem_head > 2:
        raise ConfigError(
            f"mem_head={published.mem_head}: must be 1 or 2; in the published code other heads have their own queries"
        )
    # The published code scores all ranks with the first rank's queries, even if each has its own.
    try:
        config = MemoryConfig(**fields | {"query_per_rank": False})
        pairs = config.insertions(published.n_layers)
    except ConfigError as error:
        raise ConfigError(f"memory.{error}") from error
    way = published.mem_insert_way
    for (_, add), (read, _) in itertools.pairwise(pairs):
        if read <= add:
            raise ConfigError(
                f"mem_insert_way={way!r}: a layer reads at block {read}, before the previous layer's output is added "
                f"after block {add}; the published code loses that output, so each output must be added before the "
                "next layer reads"
            )
    if way != "full" and way != "/".join(f"{read}:{add}" for read, add in pairs):
        raise ConfigError(f"mem_insert_way={way!r}: must have its pairs in ascending order, as it numbers the layers")
    return config


def _read_tensors(path: Path) -> tuple[Path, dict[str, Tensor]]:
    for name in (PICKLE_NAME, SAFETENSORS_NAME):
        file = path / name
        if not file.exists():
            continue
        try:
            if name == PICKLE_NAME:
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            else:
                tensors = _read_safetensors(file)
        except UltraMemError:
            raise
        except OSError as error:
            raise UltraMemError(f"{file} cannot be read ({system_reason(error)}); check the file") from error
        except Exception as error:
            raise UltraMemError(
                f"{file} is damaged, or holds code, which is not run; copy it again, or save the model's state alone"
            ) from error
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise UltraMemError(f"{file}: must be a state dict of names and tensors; save the model's state alone")
        return file, tensors
    shards = [path / name for name in ("model", "model_and_optim", "rank_0")]
    if any(shard.exists() for shard in shards) or any(path.glob("rank*.pt")):
        raise UltraMemError(f"{path} is a sharded checkpoint; unshard it with scripts/unshard.py of the published code")
    raise UltraMemError(f"{path} has neither {PICKLE_NAME} nor {SAFETENSORS_NAME}; give a checkpoint's directory")


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UltraMemError(f"{file} needs another package; install it with: pip install 'ultramem[hf]'") from error
    return {_plain_name(name): tensor for name, tensor in load_file(file).items()}


def _plain_name(name: str) -> str:
    """Read a name from a pickled tuple in base64, as OLMo's safetensors files have them, without unpickling."""
    if name.startswith("transformer."):
        return name
    try:
        operations = list(pickletools.genops(base64.urlsafe_b64decode(name)))
    except ValueError:
        return name
    texts = [argument for _, argument, _ in operations if isinstance(argument, str)]
    return texts[0] if len(texts) == 1 else name


def _state(published: PublishedModel, config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the published state to ours."""
    state = {}
    unused = {name for name in tensors if not _is_idle(name, config)}
    model = config.build("meta")
    for name, parameter in model.state_dict().items():
        pieces = []
        for source in _sources(name, tuple(parameter.shape), published):
            tensor = tensors.get(source.name)
            if tensor is None:
                raise UltraMemError(f"lacks {source.name}; {_REMEDY}")
            if tensor.shape != source.shape:
                raise UltraMemError(
                    f"{source.name} has the shape {tuple(tensor.shape)} and must have {source.shape}; {_REMEDY}"
                )
            if tensor.is_floating_point() != parameter.is_floating_point():
                right = "floating-point numbers" if parameter.is_floating_point() else "integers"
                raise UltraMemError(f"{source.name} has the dtype {tensor.dtype} and must have {right}; {_REMEDY}")
            unused.discard(source.name)
            pieces.append(tensor.chunk(source.parts)[source.part])
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        state[name] = whole.reshape(parameter.shape).to(parameter.dtype)
    if unused:
        raise UltraMemError(f"{min(unused)} has no place in the model; {_REMEDY}")
    if model.memory is not None:
        model.memory.check_loaded(state, "memory.")
    return state


_REMEDY = f"is {CONFIG_NAME} this checkpoint's?"


def _sources(name: str, shape: tuple[int, ...], published: PublishedModel) -> list[_Source]:
    """The published tensors that make up one of ours, row by row."""
    number = re.search(r"\.(\d+)\.", name)
    theirs, part, parts = _SOURCES[re.sub(r"\.\d+\.", ".{}.", name)]
    theirs = f"transformer.{theirs.format(number[1])}" if number else f"transformer.{theirs}"
    if name == "lm_head.w_out.weight" and published.weight_tying:
        theirs = "transformer.wte.weight"
    if name.endswith(".query_proj.weight") and published.mem_type == "ultramem_v2":
        parts = MemoryConfig.tucker_rank if published.mem_q_for_each_tucker_rank else 1
    if name.endswith(".cores"):
        return [_Source(f"{theirs}.{core}", shape[1:]) for core in range(shape[0])]
    if name.endswith((".u", ".t")):
        heads, rank = shape
        return [_Source(theirs, (1, heads, 1, rank))]
    return [_Source(theirs, (parts * shape[0], *shape[1:]), part, parts)]


def _is_idle(name: str, config: ModelConfig) -> bool:
    """Whether the published model has a tensor of that name without using it."""
    if config.memory is None:
        return name.startswith("transformer.full_memory_layer.")
    return config.memory.kind == "memory_plus" and name.endswith(".keys_norm.weight")
