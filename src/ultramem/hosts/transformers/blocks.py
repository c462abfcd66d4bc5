"""Finding the blocks of a model of transformers, and checking that memory layers fit."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ultramem.errors import UltraMemError
from ultramem.hosts.transformers.modes import evaluation_mode


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
