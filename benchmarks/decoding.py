"""Time the feed-forward part of a block in decoding: few tokens, no gradients, weights in bfloat16.

Run `python -m benchmarks.decoding` on one GPU; `--tiny` tries the script on a CPU. Each time is that of one layer in a
replayed CUDA graph. A graph runs layer after layer, each with its own weights and inputs, so that weights come from the
GPU's memory, as they do in a model: the memory layers of the whole model, or as many copies of its rivals as have
`COLD_BYTES` together.

Beside each time stands its floor: the bytes that must be read, at `BANDWIDTH`. For a mixture of experts these are the
experts that so many tokens touch, if each chooses at random. `kernels.json` has the times of layers for many tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from benchmarks.kernels import BESIDE, DENSE, MOE, Shape, SwiGLU, build_moe
from benchmarks.measurement import (
    DEFAULT_OUTPUT,
    benchmark_device,
    check_outputs,
    console,
    environment,
    free_memory,
    graphed_ms,
    kernel_times,
    median_ms,
    number,
    write_json,
    write_plot,
)
from ultramem import Memory
from ultramem.cli.border import run_command
from ultramem.hosts.olmo_core import MoEConfig
from ultramem.layers import MemoryLayer, decoding
from ultramem.ops import use_backend
from ultramem.ops.choose_reads import choose_reads
from ultramem.ops.linear import linear

BANDWIDTH = 3.0e12  # bytes per second
COLD_BYTES = 300e6  # several times the L2 cache
BATCHES = (1, 8, 64, 256, 512)
DTYPE = torch.bfloat16
# Names of rows.
MEMORY = "memory layer"
ORDINARY = "memory layer, as in training"
PROJECTION = "  of it, projection"
CHOICE = "  of it, choice of rows"
LOOKUP = "  of it, lookup"
OUTPUT = "  of it, output projection"


def main() -> None:
    """Measure, print a table, write decoding.json and decoding.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["227m", "1b"], default=["227m", "1b"])
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="tokens at once")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--tiny", action="store_true", help="use a small shape, to try the script without a GPU")
    arguments = parser.parse_args()
    check_outputs(arguments.output, "decoding.json", "decoding.png")
    device = benchmark_device(arguments.tiny)
    results: list[Result] = []
    for name in ["small"] if arguments.tiny else arguments.shapes:
        results += measure_shape(Shape.named(name), [1, 3] if arguments.tiny else arguments.batches, device)
        content = {"environment": environment(device), "results": [asdict(result) for result in results]}
        write_json(arguments.output / "decoding.json", content)  # each time: the next shape may fail
    show(results)
    write_plot(arguments.output / "decoding.png", draw(results))
    print(f"written to {arguments.output}")


@dataclass
class Row:
    """Measurements of a layer or part of it, in microseconds; None for no measurement.

    Attributes:
        us: time in a replayed CUDA graph, or launched one by one where there are none.
        launched_us: time with kernels launched one by one from Python.
        floor_us: time to read the bytes that must be read.
        kernels: names of the kernels of one layer, and their own times in the graph.
    """

    us: float
    launched_us: float
    floor_us: float | None = None
    kernels: list[tuple[str, float]] = field(default_factory=list)


@dataclass
class Result:
    """All rows, by name, of a shape with a number of tokens."""

    shape: str
    tokens: int
    rows: dict[str, Row] = field(default_factory=dict)


def measure_shape(shape: Shape, batches: Sequence[int], device: torch.device) -> list[Result]:
    """Measure everything of a shape, for each number of tokens."""
    results = [Result(shape.name, tokens) for tokens in batches]
    memory = Memory(shape.memory, shape.d_model, shape.num_blocks, device=device, dtype=DTYPE).eval()
    for result in results:
        measure_memory(result, memory)
    del memory
    free_memory()
    for name, build, bytes_of in (
        (BESIDE, partial(SwiGLU, shape.d_model, shape.beside), None),
        (DENSE, partial(SwiGLU, shape.d_model, shape.dense), None),
        (MOE, partial(build_moe, shape.d_model, shape.moe), partial(touched_bytes, shape.d_model, shape.moe)),
    ):
        modules = [_module(build, device)]
        while device.type == "cuda" and sum(map(_bytes, modules)) < COLD_BYTES:
            modules.append(_module(build, device))
        for result in results:
            least = bytes_of(result.tokens) if bytes_of else _bytes(modules[0])
            inputs = _inputs(result.tokens, shape.d_model, len(modules), device)
            result.rows[name] = measure(f"{shape.name}, {result.tokens}: {name}", modules, inputs, least)
        del modules
        free_memory()
    return results


def measure_memory(result: Result, memory: Memory) -> None:
    """Measure the memory layers, whole and in parts, and as they would compute without what is folded."""
    layers, tokens = list(memory.layers), result.tokens
    inputs = _inputs(tokens, memory.d_model, len(layers), layers[0].query_proj.weight.device)
    read = memory.config.heads * memory.config.top_k * (memory.config.value_dim + memory.config.pre_value_dim)
    weights = sum(_bytes(layer) for layer in layers) / len(layers)
    label = f"{result.shape}, {tokens}"
    record = partial(measure, inputs=inputs)
    with use_backend("fused" if inputs[0].is_cuda else "auto"):
        result.rows[MEMORY] = record(f"{label}: {MEMORY}", layers, least=weights + read * tokens * DTYPE.itemsize)
    with patch.multiple(decoding, decodes=lambda *_: False, apply=lambda module, x: module(x)):
        result.rows[ORDINARY] = record(f"{label}: {ORDINARY}", layers)
    with use_backend("fused" if inputs[0].is_cuda else "auto"):
        for name, parts in parts_of(layers, inputs).items():
            result.rows[name] = record(f"{label}: {name}", parts)


@torch.no_grad()
def parts_of(layers: Sequence[MemoryLayer], inputs: Sequence[Tensor]) -> dict[str, list[Callable[[Tensor], object]]]:
    """The steps of each layer, by name; what a step gets from those before it stays the same."""
    parts: dict[str, list[Callable[[Tensor], object]]] = {PROJECTION: [], CHOICE: [], LOOKUP: [], OUTPUT: []}
    for layer, x in zip(layers, inputs, strict=True):
        folded = layer.folded.of(layer, x.dtype)
        projected = linear(x, folded.projection)
        queries = projected[:, : layer.num_queries * layer.config.key_dim].unflatten(1, (layer.num_queries, -1))
        reads = decoding.choose(layer, x)
        parts[PROJECTION].append(partial(linear, weight=folded.projection))
        parts[CHOICE].append(_on(partial(choose_reads, queries, folded.grid)))
        parts[LOOKUP].append(_on(partial(layer.table.lookup, reads)))
        parts[OUTPUT].append(partial(layer.project, layer.table.lookup(reads)))
    return parts


def measure(
    label: str, layers: Sequence[Callable[[Tensor], object]], inputs: Sequence[Tensor], least: float | None = None
) -> Row:
    """Measure a pass through layers, each with its own input, and divide by their number.

    Args:
        label: for the log.
        layers: from (tokens, d_model) to anything.
        inputs: (tokens, d_model), one for each layer.
        least: bytes that one layer must read.
    """
    device = inputs[0].device

    @torch.no_grad()
    def run(_: int) -> list[object]:
        return [layer(x) for layer, x in zip(layers, inputs, strict=True)]

    scale = 1e3 / len(layers)
    launched = scale * median_ms(run, device, repeats=10)
    graphed = graphed_ms(run, device, repeats=30, rotations=1)
    us = launched if graphed is None else scale * graphed
    floor = None if least is None else 1e6 * least / BANDWIDTH
    kernels = kernel_times(lambda: run(0), device, len(layers))
    print(f"{label}: {number(us, 1)} us, {len(kernels)} kernels, launched {number(launched, 1)} us", file=sys.stderr)
    return Row(us, launched, floor, kernels)


def touched_bytes(d_model: int, moe: MoEConfig, tokens: int) -> float:
    """Bytes of the router and of the experts that tokens touch, if each chooses at random."""
    touched = moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** tokens)
    return DTYPE.itemsize * d_model * (3 * moe.hidden_size * touched + moe.num_experts)


def show(results: Sequence[Result]) -> None:
    """Print a table of times beside their floors, a column for each number of tokens."""
    for name in dict.fromkeys(result.shape for result in results):
        chosen = [result for result in results if result.shape == name]
        table = Table(title=f"{name}: µs of one layer (floor at {BANDWIDTH / 1e12:.1f} TB/s)")
        table.add_column("tokens")
        for result in chosen:
            table.add_column(str(result.tokens), justify="right")
        for row in chosen[0].rows:
            table.add_row(row, *(_cell(result.rows[row]) for result in chosen))
        counts = [str(len(result.rows[MEMORY].kernels) or "") for result in chosen]
        table.add_row("kernels of the memory layer", *counts)
        console().print(table)


def draw(results: Sequence[Result]) -> Figure:
    """Draw the times against the number of tokens, with the floors of memory and mixture of experts."""
    names = list(dict.fromkeys(result.shape for result in results))
    figure = Figure(figsize=(5.5 * len(names), 3.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        chosen = [result for result in results if result.shape == name]
        tokens = [result.tokens for result in chosen]
        for number_of_line, row in enumerate((MEMORY, ORDINARY, BESIDE, DENSE, MOE)):
            rows, colour = [result.rows[row] for result in chosen], f"C{number_of_line}"
            axes.plot(tokens, [one.us for one in rows], "o-", color=colour, label=row)
            floors = [one.floor_us for one in rows]
            if row in (MEMORY, MOE):
                axes.plot(tokens, floors, ":", color=colour, label=f"{row}: floor")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(title=f"{name}: one layer in decoding", xlabel="tokens", ylabel="µs")
        axes.legend(fontsize=7)
    return figure


def _cell(row: Row) -> str:
    return number(row.us, 1) + ("" if row.floor_us is None else f" ({number(row.floor_us, 1)})")


def _module(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    with device:
        module = build().to(DTYPE).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module


def _bytes(module: nn.Module) -> int:
    """Of a module's parameters, without those of a table that layers share."""
    return sum(parameter.nbytes for parameter in module.parameters())


def _on(call: Callable[[], object]) -> Callable[[Tensor], object]:
    """A step whose input is fixed."""
    return lambda _: call()


def _inputs(tokens: int, width: int, count: int, device: torch.device) -> list[Tensor]:
    return [torch.randn(tokens, width, device=device, dtype=DTYPE) for _ in range(count)]


if __name__ == "__main__":
    run_command(main)
