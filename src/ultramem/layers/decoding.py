"""Few tokens without gradients, as in decoding: what depends on parameters alone is computed once, not for each token.

A layer decodes by itself in evaluation mode, without gradients, up to `MOST_TOKENS` tokens at once; on GPUs for now
only with the backend `fused`. Its `Fold` keeps what it needs for that. To compilers `choose` is one operator: they see
neither what is folded nor when.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ultramem.ops.backend import autocast_dtype, kernels_are_demanded
from ultramem.ops.choose_reads import choose_reads, is_fast
from ultramem.ops.choose_reads.grid import Grid
from ultramem.ops.kernels.operators import find, seen_by_compilers
from ultramem.ops.linear import linear
from ultramem.ops.weighted_lookup.reads import Reads
from ultramem.tables.torch_internals import after_each_step, describe_contents

if TYPE_CHECKING:
    from ultramem.layers.memory_layer import MemoryLayer

# Beyond, the kernels of training, which read a key for many tokens at once, are as fast.
MOST_TOKENS = 512

_COMPUTED = ("keys", "cores", "u", "t")  # of a grid, from parameters


@dataclass(frozen=True)
class Folded:
    """What a layer computes from its parameters alone to choose rows.

    Attributes:
        projection: (width, d_model), of the queries and, after them, of the input of the pre-values.
        grid: keys, and how their cells are scored.
    """

    projection: Tensor
    grid: Grid

    def updated(self, new: Folded) -> Folded:
        """`new`, its tensors in the place of these if they are as large: a CUDA graph may read from there."""
        computed = {name: _placed(getattr(self.grid, name), getattr(new.grid, name)) for name in _COMPUTED}
        return Folded(_placed(self.projection, new.projection), replace(new.grid, **computed))


class Fold:
    """The last `Folded` of a layer; made anew after each change of the parameters.

    Changes in place are seen by themselves, and so are steps of PyTorch's optimizers; after others call `refresh`.
    """

    def __init__(self) -> None:
        self._folded: Folded | None = None
        self._dtype: torch.dtype | None = None
        self._contents: list[tuple[int, int]] = []  # of parameters and buffers when they were folded
        self._captured = False  # in a CUDA graph, which sees no changes by itself

    def of(self, layer: MemoryLayer, dtype: torch.dtype) -> Folded:
        """What is folded of the layer, in `dtype`."""
        contents = [describe_contents(source) for source in _sources(layer)]
        device = layer.query_proj.weight.device
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._captured |= capturing
        if self._folded is None or self._dtype != dtype or self._contents != contents:
            if device.type == "cuda" and not capturing:
                _run_apart(partial(self._make, layer, dtype), device)
            else:
                self._make(layer, dtype)
            self._contents = [] if capturing else contents  # what is captured is not computed yet
        assert self._folded is not None
        return self._folded

    def forget(self, _: object = None) -> None:
        """Make it anew at the next call."""
        self._contents = []

    def refresh(self, layer: MemoryLayer) -> None:
        """Follow parameters that changed unseen: at the next call, but at once if a CUDA graph holds it."""
        self.forget()
        if self._captured and self._dtype is not None:
            self.of(layer, self._dtype)

    def _make(self, layer: MemoryLayer, dtype: torch.dtype) -> None:
        if self._folded is None:
            after_each_step(self, Fold.forget)  # fused optimizers change parameters without a trace in their version
        with torch.inference_mode(False), torch.no_grad():
            folded = layer.fold(dtype)
            self._folded = folded if self._folded is None else self._folded.updated(folded)
        self._dtype = dtype


def _run_apart(make: Callable[[], None], device: torch.device) -> None:
    """Run it in a thread of its own, and wait for it.

    Where a compiler makes CUDA graphs, memory that this thread gets is theirs, and must not live on.
    """
    torch.cuda.current_stream(device).synchronize()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(make).result()
        thread.submit(torch.cuda.synchronize, device).result()


def decodes(layer: MemoryLayer, x: Tensor) -> bool:
    """Whether a layer chooses rows for x (tokens, d_model) by what it has folded.

    It does not where other modules or tensors stand in for its own, as adapters and shards do; nor in a program that is
    to take any number of tokens.
    """
    return (
        _computes_at_once(x)
        and 0 < x.shape[0] <= MOST_TOKENS
        and not layer.training
        and layer.query_conv is None
        and layer.grid_sizes is not None
        and all(_is_plain(linear) for linear in layer.joined_projections())
        and (x.dtype == layer.query_proj.weight.dtype or torch.is_autocast_enabled(x.device.type))
        and all(type(part) is nn.Parameter and part.device == x.device for part in layer.folded_parameters())
        and is_fast(x, _computing_dtype(x), layer.grid_sizes)
    )


def choose(layer: MemoryLayer, x: Tensor) -> Reads:
    """The layer's reads for x (tokens, d_model)."""
    config, width = layer.config, layer.num_queries * layer.config.key_dim
    separate = config.value_projectors == "per_block"
    sizes = width + config.pre_value_dim, config.heads * config.top_k, layer.score_cores, separate
    call = _operator if seen_by_compilers(x) else _choose
    projected, rows, scores, copies = call(x, _sources(layer), layer.number, _computing_dtype(x), *sizes)
    pre_input = projected[:, width:] if config.pre_value_dim else None
    return Reads(rows, scores, pre_input, config.pre_activation, copies if separate else None, config.virtual_copies)


def apply(module: nn.Linear, x: Tensor) -> Tensor:
    """The linear map of x (tokens, d), by the kernel for few tokens where there is one and no gradient is wanted."""
    takes = (
        _computes_at_once(x)
        and _is_plain(module)
        and type(module.weight) is nn.Parameter
        and (module.weight.dtype, module.weight.device) == (x.dtype, x.device)
        and module.bias is None
    )
    result: Tensor = linear(x, module.weight) if takes else module(x)
    return result


def _computes_at_once(x: Tensor) -> bool:
    """Whether what is computed with x is neither recorded for gradients nor for other numbers of tokens."""
    if torch.is_grad_enabled() or torch.compiler.is_exporting() or x.is_meta:
        return False
    if x.is_cuda and not kernels_are_demanded():  # until all of their tests have passed on a GPU
        return False
    return torch.compiler.is_compiling() or not (torch.jit.is_tracing() or seen_by_compilers(x))  # type: ignore[attr-defined]


def _choose(
    x: Tensor, sources: Sequence[Tensor], number: Tensor, dtype: torch.dtype, width: int, reads: int, cores: int,
    separate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries and input of the pre-values (tokens, width); rows, scores and virtual copies of `choose_reads`.

    `sources` are what is folded, named for compilers. The layer is found by its number.
    """
    layer: MemoryLayer = find(number, 0)
    with torch.autocast(x.device.type, enabled=False):
        folded = layer.folded.of(layer, dtype)
        projected = linear(x.to(dtype), folded.projection)
        queries = projected[:, : layer.num_queries * layer.config.key_dim].unflatten(1, (layer.num_queries, -1))
        rows, scores, copies = choose_reads(queries, folded.grid)
    copies = rows.new_empty(0) if copies is None else copies
    return projected, rows, scores.contiguous(), copies  # as compilers are told


def _fake(
    x: Tensor, sources: Sequence[Tensor], number: Tensor, dtype: torch.dtype, width: int, reads: int, cores: int,
    separate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, wide = x.shape[0], torch.promote_types(dtype, torch.float32)
    rows = x.new_empty((tokens, reads), dtype=torch.int64)
    scores = x.new_empty((tokens, reads, cores), dtype=wide)
    return x.new_empty((tokens, width), dtype=dtype), rows, scores, torch.empty_like(rows if separate else rows[:0, 0])


_operator = torch.library.custom_op("ultramem::choose_reads", _choose, mutates_args=())
_operator.register_fake(_fake)


def _computing_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x)  # which leaves float64 as it is


def _sources(layer: MemoryLayer) -> list[Tensor]:
    return [*layer.folded_parameters(), *layer.buffers(recurse=False)]


def _is_plain(linear: nn.Linear) -> bool:
    return type(linear) is nn.Linear and not linear._forward_hooks and not linear._forward_pre_hooks


def _placed(old: Any, new: Any) -> Any:
    fits = old is not None and new is not None and _form(old) == _form(new)
    return old.copy_(new) if fits else new


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device
