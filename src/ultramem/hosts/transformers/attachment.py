"""Attaching memory layers to a causal language model of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from transformers import PreTrainedModel

from ultramem.config import MemoryConfig
from ultramem.errors import ConfigError, UltraMemError
from ultramem.hosts.transformers.modes import evaluation_mode
from ultramem.layers import HostScheme, MemoryLayer
from ultramem.memory import Memory
from ultramem.tables.torch_internals import after_each_step

IGNORED_LABEL = -100


def attach_memory(
    model: PreTrainedModel, config: MemoryConfig, *, blocks: Iterable[int] | None = None, seed: int = 0
) -> Memory:
    """Attach memory layers to a model, beside its feed-forwards.

    Each layer has the same input as its block's feed-forward, and its output is added to the feed-forward's. The
    model's modules and their names do not change; the memory becomes its submodule `memory`. With `init="zero_output"`
    the model's outputs do not change until the memory is trained. PyTorch optimizers refresh the memory after each
    step; after a step of another optimizer call `model.memory.refresh()`.

    Args:
        model: causal language model whose blocks have a feed-forward `mlp` with a norm before it.
        config: configuration of the memory. PKM needs `value_dim` equal to the model's width.
        blocks: numbers of the blocks that get a layer; by default as in `config.insertion`.
        seed: seed for the memory's initial values.

    Returns:
        the memory, in the model's dtype, on the device of the model's first feed-forward.

    Raises:
        ConfigError: the configuration does not fit the model.
        UltraMemError: the model does not fit, for a reason that the error gives, or has a memory already.
    """
    if hasattr(model, "memory"):
        attached = hasattr(model, "_memory_connection")
        remedy = "remove it with detach_memory" if attached else "it was built with it; attach to a model without"
        raise UltraMemError(f"{type(model).__name__} has a memory already; {remedy}")
    if blocks is not None:
        config = replace(config, insertion=_insertion(config, blocks))
    modules = find_blocks(model)
    width = model.config.get_text_config().hidden_size
    insertions = config.insertions(len(modules))
    check_host_config(config)
    check_blocks(model, modules, {number for pair in insertions for number in pair})
    std = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    with evaluation_mode(model):
        schemes = [HostScheme.measured(block.get_submodule("mlp"), width, std, std) for block in modules]
    device = next(modules[0].get_submodule("mlp").parameters()).device
    with torch.random.fork_rng():  # modules draw values on construction
        memory = Memory(config, width, len(modules), scheme=schemes, seed=seed, device=device, dtype=model.dtype)
    memory.train(model.training)
    model.memory = memory
    connection = Connection(memory, modules)
    connection.handles.append(model.register_forward_hook(add_auxiliary_loss, with_kwargs=True))
    model._memory_connection = connection  # type: ignore[assignment]
    return memory


def detach_memory(model: PreTrainedModel) -> Memory:
    """Remove the memory from a model, which is then as before `attach_memory`, and return it.

    Raises:
        UltraMemError: the model has no memory, or was built with it.
    """
    connection = getattr(model, "_memory_connection", None)
    if connection is None:
        built = ": it was built with its own, which cannot be removed" if hasattr(model, "memory") else ""
        raise UltraMemError(f"{type(model).__name__} has no memory that was attached to it{built}")
    for handle in connection.handles:
        handle.remove()
    memory: Memory = model.memory
    del model.memory, model._memory_connection
    return memory


def check_host_config(config: MemoryConfig) -> None:
    """Check that decoding token by token can compute the memory.

    Raises:
        ConfigError: there is a query convolution, which needs the queries of earlier tokens.
    """
    if config.query_conv:
        raise ConfigError(
            f"query_conv={config.query_conv}: must be 0, as models of transformers do not keep the earlier queries "
            "that it needs; leave it out"
        )


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Find the list of a decoder's blocks.

    Raises:
        UltraMemError: there is no such list, or its blocks have no module `mlp`.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    fitting = [
        module for module in lists if all(isinstance(getattr(block, "mlp", None), nn.Module) for block in module)
    ]
    if len(fitting) != 1:
        found = "no list" if not lists else "no" if not fitting else f"{len(fitting)} lists"
        raise UltraMemError(
            f"{name} does not fit: memory layers stand beside a block's module `mlp`, and {found} of {count} blocks "
            "has one"
        )
    return fitting[0]


def check_blocks(model: PreTrainedModel, blocks: nn.ModuleList, numbers: set[int]) -> None:
    """Run two tokens through the model to check that its blocks can have a memory layer; one block of each class.

    The feed-forward's input must be the output of a norm, and its output must be added to the residual stream
    unchanged. On the `meta` device, which computes nothing, only the first is checked.

    Raises:
        UltraMemError: a block does not fit.
    """
    for number in {type(blocks[number]): number for number in sorted(numbers, reverse=True)}.values():
        fault = _fault(model, blocks[number])
        if fault:
            raise UltraMemError(f"{type(model).__name__} does not fit: in block {number} {fault}")


def _fault(model: PreTrainedModel, block: nn.Module) -> str | None:
    plain = _observe(model, block, 0.0)
    if not plain.reads_norm:
        return "the input of `mlp` is not the output of a norm, which a memory layer needs"
    if not isinstance(plain.output, Tensor):
        return (
            f"`mlp` returns {type(plain.output).__name__}, not a tensor to which a memory layer's output could be added"
        )
    if plain.output.is_meta:
        return None
    shift = plain.output.abs().max().item() + 1.0
    change = _observe(model, block, shift).result.double() - plain.result.double()
    if not torch.allclose(change, torch.full_like(change, shift), rtol=0.02, atol=0.02 * shift):
        return "the output of `mlp` is changed, as by a norm or a factor, before it joins the residual stream"
    return None


@torch.no_grad()
def _observe(model: PreTrainedModel, block: nn.Module, shift: float) -> SimpleNamespace:
    """Observations of a block in a pass: whether `mlp` reads a norm's output, the output of `mlp`, and the block's."""
    seen = SimpleNamespace(reads_norm=False, output=None, result=None)
    normed: list[Any] = []

    def after_norm(_: nn.Module, inputs: Any, output: Any) -> None:
        normed.append(output)

    def after_feed_forward(_: nn.Module, inputs: Any, output: Any) -> Any:
        seen.reads_norm = any(inputs and inputs[0] is output for output in normed)
        seen.output = output
        return output + shift if shift else output

    def after_block(_: nn.Module, inputs: Any, output: Any) -> None:
        seen.result = output[0] if isinstance(output, tuple) else output

    norms = [module for module in block.children() if "norm" in type(module).__name__.lower()]
    hooks = [(norm, after_norm) for norm in norms]
    hooks += [(block.get_submodule("mlp"), after_feed_forward), (block, after_block)]
    with ExitStack() as handles, evaluation_mode(model):
        for module, hook in hooks:
            handles.enter_context(module.register_forward_hook(hook))
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    return seen


class Connection:
    """Hooks on the feed-forwards of a model's blocks that read the memory and add its outputs."""

    def __init__(self, memory: Memory, blocks: nn.ModuleList) -> None:
        self.memory = memory
        # Outputs for later blocks. They stay until the next pass, as recomputation reads them again.
        self.outputs: dict[int, Tensor] = {}
        reads: dict[int, list[int]] = {}
        adds: dict[int, list[int]] = {}
        for number, (read, add) in enumerate(memory.insertions):
            reads.setdefault(read, []).append(number)
            adds.setdefault(add, []).append(number)
        self.handles = [
            blocks[number]
            .get_submodule("mlp")
            .register_forward_hook(partial(self._after_feed_forward, reads.get(number, ()), adds.get(number, ())))
            for number in sorted({*reads, *adds})
        ]
        after_each_step(self, _follow_step)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "outputs": {}}  # they have a graph, which cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        after_each_step(self, _follow_step)  # a copy of a model trains too

    def _after_feed_forward(
        self, reads: Sequence[int], adds: Sequence[int], _: nn.Module, inputs: Any, output: Tensor
    ) -> Tensor:
        own: dict[int, Tensor] = {}
        for number in reads:
            outputs = own if number in adds else self.outputs
            outputs[number] = _read(self.memory.layers[number], inputs[0])
        for number in adds:
            added = own[number] if number in own else self.outputs[number]
            output = output + added.to(output.device, output.dtype)
        return output


def add_auxiliary_loss(model: Any, _: Any, options: dict[str, Any], output: Any) -> Any:
    """Hook after a model's forward pass that adds the memory's auxiliary losses to its training loss.

    If the loss is a sum over the labels of a micro-batch, divided by the number in the whole batch, the auxiliary loss
    is scaled likewise.
    """
    auxiliary, labels = model.memory.auxiliary_loss() if model.training else None, options.get("labels")
    if auxiliary is None or labels is None:
        return output
    if options.get("num_items_in_batch") is not None:
        auxiliary = auxiliary * ((labels[..., 1:] != IGNORED_LABEL).sum() / options["num_items_in_batch"])
    if isinstance(output, tuple):
        return output[0] + auxiliary.to(output[0].device), *output[1:]
    output.loss = output.loss + auxiliary.to(output.loss.device)
    return output


def _read(layer: MemoryLayer, x: Tensor) -> Tensor:
    table = layer.table
    if table.device.type == "meta" and not x.is_meta:
        raise UltraMemError(
            "device_map placed the memory on no device, but each token reads it; give the module `memory` a device in "
            "device_map, such as 'cpu'"
        )
    dtype = x.dtype if torch.is_autocast_enabled(x.device.type) else layer.query_proj.weight.dtype
    output: Tensor = layer(x.to(table.device, dtype))
    return output


def _insertion(config: MemoryConfig, blocks: Iterable[int]) -> str:
    numbers = sorted(blocks)
    if config.insertion != "all":
        raise ConfigError(
            f"insertion={config.insertion!r}: must not be given with blocks={numbers}; leave out one of them"
        )
    if not numbers or len(set(numbers)) < len(numbers) or numbers[0] < 0:
        raise ConfigError(f"blocks={numbers}: must be different numbers of blocks, from 0 on, and at least one")
    return "/".join(f"{number}:{number}" for number in numbers)


def _follow_step(connection: Connection, optimizer: Optimizer) -> None:
    """Refresh a memory whose parameters the optimizer has changed."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(parameter) in stepped for parameter in connection.memory.parameters()):
        connection.memory.refresh()
