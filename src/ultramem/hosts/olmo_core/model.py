"""OLMo-core's transformer with memory layers beside its feed-forwards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from olmo_core.nn.attention import SequenceMixer
from olmo_core.nn.feed_forward import FeedForward
from olmo_core.nn.transformer import (
    Transformer,
    TransformerActivationCheckpointingMode,
    TransformerBlock,
    TransformerBlockConfig,
)
from olmo_core.nn.transformer.init import _apply_init, init_linear
from olmo_core.ops import attach_auxiliary_loss
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ultramem.config import MemoryConfig
from ultramem.errors import UltraMemError
from ultramem.hosts.olmo_core.moe import DroplessMoE, MoEBlock, MoEConfig
from ultramem.layers import HostScheme, MemoryLayer
from ultramem.memory import Memory
from ultramem.ops.backend import can_run_kernels


@dataclass
class MemoryBlockConfig(TransformerBlockConfig):
    """Builds the blocks of a `MemoryTransformer`, with a mixture of experts if `feed_forward` is one."""

    def build(self, **options: Any) -> TransformerBlock:
        """As in OLMo-core."""
        kind = MoEBlock if isinstance(self.feed_forward, MoEConfig) else MemoryBlock
        parts = {name: getattr(self, name) for name in ("sequence_mixer", "feed_forward", "layer_norm")}
        return kind(**parts, **options)


class PassOutputs:
    """Outputs of memory layers that are added after a later block, for one forward pass.

    A class, as FSDP copies dictionaries among a block's arguments.
    """

    def __init__(self) -> None:
        self.of_layer: dict[int, Tensor] = {}


class MemoryBlock(TransformerBlock):
    """A block whose normalised feed-forward input is also read by memory layers.

    Attributes:
        own: memory layers that read at this block and whose output is added after it.
        reads: memory layers, with their numbers, that read at this block and whose output is added after a later one.
        adds: numbers of the memory layers that read at an earlier block and whose output is added after this one.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # In lists: they are the model's submodules, not the block's.
        self.own: list[MemoryLayer] = []
        self.reads: list[tuple[int, MemoryLayer]] = []
        self.adds: list[int] = []

    def forward(
        self,
        x: Tensor,
        *,
        loss_div_factor: Tensor | float | None = None,
        memory_outputs: PassOutputs | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the block on x (batch, sequence, d_model); further arguments as in OLMo-core."""
        h = self.attention_residual_stream(x, self.attention(self.attention_norm(x), **kwargs))
        read_from = self.feed_forward_norm(h)
        # Outputs stay until the pass ends, as recomputation with activation checkpointing reads them again.
        outputs = (memory_outputs or PassOutputs()).of_layer
        for number, layer in self.reads:
            outputs[number] = read_memory(layer, read_from, loss_div_factor)
        own_outputs = [read_memory(layer, read_from, loss_div_factor) for layer in self.own]
        h = self.feed_forward_residual_stream(h, self.feed_forward(read_from))
        for output in [*own_outputs, *(outputs[number] for number in self.adds)]:
            h = h + output
        return h

    def num_flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations per token of a training step, including those of memory layers."""
        layers = [*self.own, *(layer for _, layer in self.reads)]
        return super().num_flops_per_token(seq_len) + sum(6 * layer.active_parameters for layer in layers)


def read_memory(layer: MemoryLayer, x: Tensor, loss_div_factor: Tensor | float | None) -> Tensor:
    """Output of a memory layer, with its auxiliary loss attached.

    Without kernels the layer is not compiled, as each compiled lookup would have a gradient as large as the table.

    Args:
        layer: memory layer.
        x: (batch, sequence, d_model), its input.
        loss_div_factor: as in `DroplessMoE`; a micro-batch contributes to the mean loss in proportion to its tokens.
    """
    read = _read_memory if can_run_kernels(x) else _read_memory_uncompiled
    return read(layer, x, loss_div_factor)


def _read_memory(layer: MemoryLayer, x: Tensor, loss_div_factor: Tensor | float | None) -> Tensor:
    y = layer(x)
    if layer.auxiliary_loss is not None:
        share = 1.0 if loss_div_factor is None else x.shape[:-1].numel() / loss_div_factor
        y = attach_auxiliary_loss(y, layer.auxiliary_loss * share)
    return y


_read_memory_uncompiled = torch.compiler.disable(_read_memory)


class FullMegatronInit:
    """Truncated normal weights; those that write to the residual stream are scaled by 1 / sqrt(2 blocks).

    Has the methods of OLMo-core's `InitMethod`, all of whose members leave one sublayer's output unscaled.
    """

    def init_embeddings(self, m: nn.Embedding, *, std: float, generator: torch.Generator, **_: Any) -> None:
        """Initialise the embedding."""
        _apply_init(nn.init.trunc_normal_, m.weight, mean=0.0, std=std, a=-3 * std, b=3 * std, generator=generator)

    def init_final_w_out(self, m: nn.Linear, *, std: float, generator: torch.Generator, **_: Any) -> None:
        """Initialise the output layer, if it is not tied to the embedding."""
        init_linear(m, std=std, generator=generator)

    def init_attention(
        self, m: SequenceMixer, *, num_blocks: int, std: float, generator: torch.Generator, **_: Any
    ) -> None:
        """Initialise the attention projections."""
        for linear in (m.w_q, m.w_k, m.w_v):
            init_linear(linear, std=std, generator=generator)
        init_linear(m.w_out, std=std / math.sqrt(2 * num_blocks), generator=generator)

    def init_feed_forward(
        self, m: FeedForward | DroplessMoE, *, num_blocks: int, std: float, generator: torch.Generator, **_: Any
    ) -> None:
        """Initialise the feed-forward or experts."""
        output_std = std / math.sqrt(2 * num_blocks)
        if isinstance(m, DroplessMoE):
            m.init_weights(std=std, output_std=output_std, generator=generator)
        else:
            for linear, linear_std in ((m.w1, std), (m.w3, std), (m.w2, output_std)):
                init_linear(linear, std=linear_std, generator=generator)


class MemoryTransformer(Transformer):
    """OLMo-core's transformer with a `Memory`.

    Args:
        memory: configuration of the memory; None for no memory. The attribute is the `Memory`, or None.
        memory_scheme: initialisation of the blocks, which `matched` memory layers follow.
        options: options of OLMo-core's `Transformer`.
    """

    memory: Memory | None

    def __init__(self, *, memory: MemoryConfig | None, memory_scheme: HostScheme, **options: Any) -> None:
        super().__init__(**options)
        self.init_method = FullMegatronInit()
        if memory is None or not memory.insertions(self.n_layers):
            self.memory = None
            return
        self.memory = Memory(memory, self.d_model, self.n_layers, scheme=memory_scheme, device="meta")
        self.memory.to_empty(device=options["init_device"])
        for number, (read, add) in enumerate(self.memory.insertions):
            layer = self.memory.layers[number]
            if read == add:
                self.blocks[str(read)].own.append(layer)
            else:
                self.blocks[str(read)].reads.append((number, layer))
                self.blocks[str(add)].adds.append(number)
        # OLMo-core caches its counts on construction, before the memory exists.
        for count in ("num_params", "num_non_embedding_params"):
            self.__dict__.pop(count, None)

    def init_weights(self, **options: Any) -> torch.Generator:
        """As in OLMo-core, and initialise the memory."""
        generator = super().init_weights(**options)
        if self.memory is not None:
            self.memory.init_weights(seed=self.init_seed)
        return generator

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_inputs(*args, **kwargs)
        if self.memory is not None:
            self.memory.begin_pass()
            prepared[2]["memory_outputs"] = PassOutputs()  # among the arguments that all blocks get
        return prepared

    def apply_fsdp(
        self,
        dp_mesh: DeviceMesh | None = None,
        param_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        """As in OLMo-core. Memory layers are sharded one by one, and a shared table with the embeddings.

        A shared table is gathered once for all layers that read it.
        """
        policy = MixedPrecisionPolicy(param_dtype=param_dtype or self.dtype, reduce_dtype=reduce_dtype)
        for layer in [] if self.memory is None else self.memory.layers:
            fully_shard(layer, mesh=dp_mesh, mp_policy=policy)
        super().apply_fsdp(dp_mesh=dp_mesh, param_dtype=param_dtype, reduce_dtype=reduce_dtype, **options)

    def apply_tp(self, *args: Any, **options: Any) -> None:
        """Not supported: raises `UltraMemError`."""
        raise UltraMemError("tensor parallelism is not supported; train with FSDP or DDP")

    def apply_pp(self, *args: Any, **options: Any) -> None:
        """Not supported: raises `UltraMemError`."""
        raise UltraMemError("pipeline parallelism is not supported; train with FSDP or DDP")

    def apply_cp(self, *args: Any, **options: Any) -> None:
        """Not supported: raises `UltraMemError`."""
        raise UltraMemError("context parallelism is not supported; train with FSDP or DDP")

    def apply_activation_checkpointing(self, mode: TransformerActivationCheckpointingMode, **options: Any) -> None:
        """As in OLMo-core, which does not draw the same dropout again when it recomputes.

        Raises:
            UltraMemError: the mode is `selected_ops`, and memory layers share a table.
        """
        shared = self.memory is not None and self.memory.table is not None
        if shared and mode == TransformerActivationCheckpointingMode.selected_ops:
            # It needs the same operations again, but a recomputed lookup does not open the table as the first one did.
            raise UltraMemError(
                "activation checkpointing of selected operations is not supported with a shared table; choose full, "
                "selected_blocks or selected_modules"
            )
        super().apply_activation_checkpointing(mode, **options)
        if self.memory is None or not self.memory.config.output_dropout:
            return
        for module in self.modules():
            if isinstance(module, CheckpointWrapper):
                module.checkpoint_fn = partial(module.checkpoint_fn, preserve_rng_state=True)

    def post_optim_step(self) -> None:
        """Refresh the memory after an optimizer step."""
        super().post_optim_step()
        if self.memory is not None:
            self.memory.refresh()
