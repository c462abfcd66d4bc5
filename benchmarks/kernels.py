"""Time one UltraMemV2 memory layer against its floor, the plain PyTorch definition, feed-forwards and an MoE layer.

Run `python -m benchmarks.kernels` on one GPU; `--tiny` tries the script on a CPU. Everything is in bfloat16, except
for the memory's table: its parameters are float32 and are read under autocast, as in training. Inputs are random and
rotate.

A time for "all layers" is that of a pass through all memory layers of the model, divided by their number. The gradient
of their shared table is computed once per pass, so this is the cost of a layer in training. "One layer alone" includes
the whole gradient.

Peak memory is that of a forward and backward pass, beyond the inputs, the parameters, their gradients and the table's
bfloat16 copy. The gradients exist already and are added to. The JSON file also has the peak memory of a pass that
begins without gradients, and adds to none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from benchmarks.measurement import (
    DEFAULT_OUTPUT,
    OUT_OF_MEMORY,
    allocated_gb,
    benchmark_device,
    check_outputs,
    console,
    environment,
    free_memory,
    graphed_ms,
    median_ms,
    number,
    peak_gb,
    ratio,
    reset_peak,
    write_json,
    write_plot,
)
from ultramem import Memory, MemoryConfig
from ultramem.cli.border import run_command
from ultramem.device import autocast
from ultramem.errors import UltraMemError
from ultramem.hosts.olmo_core import MoEConfig, preset
from ultramem.layers import MemoryLayer
from ultramem.ops import use_backend

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

TOKENS = {"227m": 12288, "1b": 8192, "small": 512}
ROTATING_INPUTS = 4  # together larger than the L2 cache
# Names of rows that others are compared to.
MEMORY = "memory layer"
CHANGED_TABLE = "memory layer, table changed"
ALONE = "memory layer alone"
NAIVE = "plain PyTorch, alone"
LOOKUP = "  of it, lookup"
BOTH = "memory layer + feed-forward"
BESIDE = "feed-forward beside it"
DENSE = "dense feed-forward"
MOE = "MoE block"  # docs/performance/kernels.json has this name


def main() -> None:
    """Measure, print a table, write kernels.json and kernels.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["227m", "1b"], default=["227m", "1b"])
    parser.add_argument("--layers", type=int, help="memory layers per pass; default: all layers of the model")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--tiny", action="store_true", help="use a small shape, to try the script without a GPU")
    arguments = parser.parse_args()
    if arguments.layers is not None and arguments.layers < 1:
        raise UltraMemError(f"--layers={arguments.layers}: must be at least 1")
    check_outputs(arguments.output, "kernels.json", "kernels.png")
    device = benchmark_device(arguments.tiny)
    rates = Rates.measure(device, 256 if arguments.tiny else 8192)
    results = []
    for name in ["small"] if arguments.tiny else arguments.shapes:
        results.append(measure_shape(Shape.named(name), device, rates, arguments.layers))
        free_memory()
        content = {"environment": environment(device), "rates": asdict(rates), "shapes": [asdict(r) for r in results]}
        write_json(arguments.output / "kernels.json", content)  # each time: the next shape may fail
    show(results, rates)
    write_plot(arguments.output / "kernels.png", draw(results))
    print(f"written to {arguments.output}")


@dataclass(frozen=True)
class Shape:
    """The feed-forward part of a block of a published model, and of its rivals with equal active parameters.

    Attributes:
        name: name of the shape.
        tokens: tokens per input.
        d_model: width of the residual stream.
        num_blocks: number of blocks of the model, each with a memory layer.
        memory: the memory's configuration.
        beside: width of the feed-forward beside the memory.
        dense: width of the dense model's feed-forward.
        moe: the mixture of experts.
    """

    name: str
    tokens: int
    d_model: int
    num_blocks: int
    memory: MemoryConfig
    beside: int
    dense: int
    moe: MoEConfig

    @classmethod
    def named(cls, name: str) -> Shape:
        """The shape of the presets whose names end in `name`."""
        model, dense, moe = (preset(f"{system}_{name}") for system in ("ultramem_v2", "dense", "olmoe"))
        assert model.memory is not None
        assert moe.moe is not None
        return cls(
            name,
            TOKENS[name],
            model.d_model,
            model.num_blocks,
            model.memory,
            model.feed_forward_size,
            dense.feed_forward_size,
            moe.moe,
        )


@dataclass(frozen=True)
class Rates:
    """The device's best rates.

    Attributes:
        copy: bytes per second, read and written, of a copy within the device's memory.
        matmul: floating-point operations per second of a large matrix product in bfloat16.
    """

    copy: float
    matmul: float

    @classmethod
    def measure(cls, device: torch.device, size: int) -> Rates:
        """Measure a copy of `16 size²` bytes and a product of two `size` × `size` matrices."""
        source = torch.randn(4 * size, size, device=device)
        target = torch.empty_like(source)
        copy_ms = median_ms(lambda _: target.copy_(source), device, repeats=10)
        a, b = (torch.randn(size, size, device=device, dtype=_dtype(device)) for _ in range(2))
        matmul_ms = median_ms(lambda _: torch.mm(a, b), device, repeats=20, warmup=5)
        return cls(copy=2e3 * source.nbytes / copy_ms, matmul=2e3 * size**3 / matmul_ms)


@dataclass(frozen=True)
class Work:
    """The least work of a memory layer in a forward pass.

    Attributes:
        operations: floating-point operations of all matrix products: query, pre-value and output projection, and axis
            scores.
        score_operations: floating-point operations of the axis scores, queries times keys.
        query_operations: floating-point operations of the query projection.
        retrieval_bytes: bytes of queries and keys read, and of scores and indices of the chosen rows written.
        lookup_bytes: bytes of table rows read, in bfloat16.
        gradient_bytes: bytes of the whole table's gradient, in float32.
    """

    operations: int
    score_operations: int
    query_operations: int
    retrieval_bytes: int
    lookup_bytes: int
    gradient_bytes: int

    @classmethod
    def of(cls, layer: MemoryLayer, tokens: int) -> Work:
        """The work of a layer on an input."""
        config, d_model = layer.config, layer.d_model
        reads, width = config.heads * config.top_k, config.value_dim + config.pre_value_dim
        keys = 2 * config.tucker_rank * config.key_dim * layer.axis_keys * config.heads
        queries = layer.num_queries * config.key_dim
        linear = queries + config.pre_value_dim + config.output_width
        return cls(
            operations=2 * tokens * (linear * d_model + keys),
            score_operations=2 * tokens * keys,
            query_operations=2 * tokens * queries * d_model,
            retrieval_bytes=2 * (tokens * queries + keys) + tokens * reads * (2 * config.cores + 4),
            lookup_bytes=2 * tokens * reads * width,
            gradient_bytes=4 * layer.table.rows * width,
        )

    def forward_floor(self, rates: Rates, gather: float) -> float:
        """Milliseconds of a layer's forward pass at the device's best rates: matrix products, then the row reads.

        Args:
            rates: rates of the device.
            gather: bytes per second at which rows are read.
        """
        return 1e3 * (self.lookup_bytes / gather + self.operations / rates.matmul)

    def training_floor(self, rates: Rates, gather: float, layers: int) -> float:
        """Milliseconds of a layer's forward and backward pass at the device's best rates.

        This is three times the matrix products, twice the row reads, the same again to add to the chosen rows'
        gradients, and the table's gradient written twice, as zeros and as its final values, once per pass.
        """
        rows = 3 * self.lookup_bytes / gather
        gradient = 2 * self.gradient_bytes / layers / rates.copy
        return 1e3 * (rows + 3 * self.operations / rates.matmul + gradient)


@dataclass
class Row:
    """Measurements of a layer or part of it; None for no measurement.

    Attributes:
        name: what was measured.
        forward_ms: time of a forward pass in milliseconds, as a replayed CUDA graph if it can be captured.
        training_ms: time of a forward and backward pass in milliseconds, likewise.
        launched_forward_ms: time of a forward pass in milliseconds, with kernels launched one by one from Python.
        launched_training_ms: time of a forward and backward pass in milliseconds, likewise.
        forward_floor_ms: lower bound of the forward pass in milliseconds.
        training_floor_ms: lower bound of the forward and backward pass in milliseconds.
        peak_gb: peak memory in 10⁹ bytes, as the module describes it.
        peak_without_adding_gb: peak memory in 10⁹ bytes of a pass that begins without gradients.
    """

    name: str
    forward_ms: float | None = None
    training_ms: float | None = None
    launched_forward_ms: float | None = None
    launched_training_ms: float | None = None
    forward_floor_ms: float | None = None
    training_floor_ms: float | None = None
    peak_gb: float | None = None
    peak_without_adding_gb: float | None = None


@dataclass
class Result:
    """All rows of a shape.

    Attributes:
        shape: name of the shape.
        gather: bytes per second at which the fastest bare gather reads rows.
        gathers: bytes per second of each variant.
        rows: measurements by name.
    """

    shape: str
    gather: float
    gathers: dict[str, float]
    rows: dict[str, Row] = field(default_factory=dict)


class Subject:
    """Layers that run one after the other, each on its own input, with one backward pass for all.

    Args:
        layers: layers from (tokens, d_model) to the same.
        parameters: parameters of all layers.
        inputs: (tokens, d_model) each; they rotate among the layers.
        mixed: whether to run under autocast.
    """

    def __init__(
        self,
        layers: Sequence[Callable[[Tensor], Tensor]],
        parameters: Iterable[nn.Parameter],
        inputs: list[Tensor],
        mixed: bool = False,
    ) -> None:
        self.layers, self.inputs, self.mixed = layers, inputs, mixed
        self.leaves = [*parameters, *inputs]
        self.device = inputs[0].device
        self.gradient = torch.randn_like(inputs[0])

    def forward(self, i: int = 0) -> list[Tensor]:
        """The outputs of all layers."""
        with autocast(self.device) if self.mixed else nullcontext():
            return [layer(self.inputs[(i + n) % len(self.inputs)]) for n, layer in enumerate(self.layers)]

    def backward(self, outputs: list[Tensor]) -> None:
        """Add to the gradients of parameters and inputs."""
        torch.autograd.backward(outputs, [self.gradient] * len(outputs))

    def train(self, i: int = 0) -> None:
        """A forward and a backward pass that begins without gradients."""
        self.clear()
        self.backward(self.forward(i))

    def clear(self) -> None:
        """Drop all gradients."""
        for leaf in self.leaves:
            leaf.grad = None

    def measure(self, name: str, repeats: int) -> Row:
        """Measure the times of a layer; outputs that are not finite are an error."""
        times = []
        for run in (self.forward, self.train):
            launched = median_ms(run, self.device, repeats)
            self.clear()
            graphed = graphed_ms(run, self.device, repeats, 1 if len(self.layers) > 1 else ROTATING_INPUTS)
            self.clear()
            free_memory()
            times.append((launched / len(self.layers), None if graphed is None else graphed / len(self.layers)))
        if times[0][0] != OUT_OF_MEMORY and not self.forward()[0].isfinite().all():
            raise UltraMemError(f"{name}: the output is not finite")
        (forward, graphed_forward), (training, graphed_training) = times
        row = Row(name, graphed_forward or forward, graphed_training or training, forward, training)
        print(
            f"{name}: {number(row.forward_ms, 3)} / {number(row.training_ms, 3)} ms, launched one by one "
            f"{number(forward, 3)} / {number(training, 3)} ms",
            file=sys.stderr,
        )
        return row

    def measure_peaks(self, row: Row) -> Row:
        """Add peak memory; to be called with a single layer, on a GPU."""
        if self.device.type == "cpu":
            return row
        for name, peak in (("peak_gb", self._peak_adding), ("peak_without_adding_gb", self._peak_without_adding)):
            try:
                setattr(row, name, peak())
            except torch.OutOfMemoryError:
                setattr(row, name, OUT_OF_MEMORY)
            self.clear()
            free_memory()
        return row

    def _peak_adding(self) -> float:
        self.train()
        before = allocated_gb(self.device)
        reset_peak(self.device)
        self.backward(self.forward())
        return peak_gb(self.device) - before

    def _peak_without_adding(self) -> float:
        self.train()
        self.clear()
        before = allocated_gb(self.device)
        reset_peak(self.device)
        outputs = self.forward()
        forward_peak = peak_gb(self.device) - before
        reset_peak(self.device)
        self.backward(outputs)
        del outputs
        # What is left is gradients; in the forward pass there were none yet.
        return max(forward_peak, peak_gb(self.device) - allocated_gb(self.device))


def measure_shape(shape: Shape, device: torch.device, rates: Rates, num_layers: int | None) -> Result:
    """Measure everything of a shape."""
    inputs = [_random(shape.tokens, shape.d_model, device) for _ in range(ROTATING_INPUTS)]
    gathers = measure_gathers(shape, device)
    result = Result(shape.name, max(gathers.values()), gathers)
    free_memory()
    rows = measure_memory(shape, inputs, rates, result.gather, num_layers)
    free_memory()
    rows += measure_rivals(shape, inputs)
    result.rows = {row.name: row for row in rows}
    pair = result.rows[MEMORY], result.rows[BESIDE]
    result.rows[BOTH] = Row(BOTH, _sum(row.forward_ms for row in pair), _sum(row.training_ms for row in pair))
    return result


def measure_memory(
    shape: Shape, inputs: list[Tensor], rates: Rates, gather: float, num_layers: int | None
) -> list[Row]:
    """Measure the memory layer, whole and in parts, with kernels and in plain PyTorch."""
    device = inputs[0].device
    memory = Memory(shape.memory, shape.d_model, shape.num_blocks, device=device)
    assert memory.table is not None
    table = list(memory.table.parameters())
    layers = list(memory.layers)[:num_layers]
    for layer in layers:
        layer.to(_dtype(device))  # all but the table, which belongs to no layer
    one = Subject(layers[:1], [*table, *layers[0].parameters()], inputs, mixed=True)
    every = Subject(layers, [*table, *(p for layer in layers for p in layer.parameters())], inputs, mixed=True)

    def change_and_train(i: int) -> None:
        increment_version(table)  # as an optimizer's step does: what was derived from the table is derived again
        every.train(i)

    whole = every.measure(MEMORY, repeats=5)
    changed_ms = graphed_ms(change_and_train, device, repeats=5, rotations=1)
    changed_ms = changed_ms or median_ms(change_and_train, device, repeats=5)
    changed = Row(CHANGED_TABLE, training_ms=changed_ms / len(layers))
    every.clear()
    alone = one.measure_peaks(one.measure(ALONE, repeats=10))
    with use_backend("naive"):
        naive = one.measure_peaks(one.measure(NAIVE, repeats=3))
    work = Work.of(layers[0], shape.tokens)
    for row, sharing in ((whole, len(layers)), (changed, len(layers)), (alone, 1)):
        row.forward_floor_ms = work.forward_floor(rates, gather)
        row.training_floor_ms = work.training_floor(rates, gather, sharing)
    return [whole, *measure_parts(layers[0], inputs, work, rates, gather), changed, alone, naive]


def measure_parts(layer: MemoryLayer, inputs: list[Tensor], work: Work, rates: Rates, gather: float) -> list[Row]:
    """Measure forward passes of the query projection, the retrieval and the lookup."""
    device = inputs[0].device
    queries, chosen = [], []
    with autocast(device):
        for x in inputs:
            queries.append(layer.queries(x).detach().requires_grad_())
            scores, indices = layer.retrieve(queries[-1])
            reads = layer.locate(indices, scores.detach().requires_grad_(), x)
            if reads.pre_input is not None:
                reads = reads._replace(pre_input=reads.pre_input.detach().requires_grad_())
            chosen.append(reads)
        parts = (
            lambda i: layer.queries(inputs[i % len(inputs)]),
            lambda i: layer.retrieve(queries[i % len(queries)]),
            lambda i: layer.table.lookup(chosen[i % len(chosen)]),
        )
        project_ms, retrieve_ms, lookup_ms = (
            graphed_ms(part, device, repeats=10, rotations=len(inputs)) or median_ms(part, device, repeats=10)
            for part in parts
        )
    retrieval_floor = max(work.score_operations / rates.matmul, work.retrieval_bytes / rates.copy)
    return [
        Row("  of it, queries", project_ms, forward_floor_ms=1e3 * work.query_operations / rates.matmul),
        Row("  of it, retrieval", retrieve_ms, forward_floor_ms=1e3 * retrieval_floor),
        Row(LOOKUP, lookup_ms, forward_floor_ms=1e3 * work.lookup_bytes / gather),
    ]


def measure_rivals(shape: Shape, inputs: list[Tensor]) -> list[Row]:
    """Measure feed-forwards and the MoE layer."""
    rows = []
    for name, build in (
        (BESIDE, partial(SwiGLU, shape.d_model, shape.beside)),
        (DENSE, partial(SwiGLU, shape.d_model, shape.dense)),
        (MOE, partial(build_moe, shape.d_model, shape.moe)),
    ):
        with inputs[0].device:
            module: nn.Module = build().to(_dtype(inputs[0].device))
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
        subject = Subject([module], module.parameters(), inputs)
        rows.append(subject.measure_peaks(subject.measure(name, repeats=15)))
        del module, subject
        free_memory()
    return rows


class SwiGLU(nn.Module):
    """A feed-forward network: (tokens, d_model) to the same."""

    def __init__(self, d_model: int, hidden_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, hidden_size, bias=False)
        self.up = nn.Linear(d_model, hidden_size, bias=False)
        self.down = nn.Linear(hidden_size, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Project up, gate, project down."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def build_moe(d_model: int, moe: MoEConfig) -> nn.Module:
    """transformers' OLMoE layer with grouped matrix products: (tokens, d_model) to the same."""
    try:
        from transformers import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
    except ImportError as error:
        raise UltraMemError(
            "the MoE layer needs the package transformers; install it with: pip install 'ultramem[hf]'"
        ) from error

    class Block(OlmoeSparseMoeBlock):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states.unsqueeze(0)).squeeze(0)

    return Block(
        OlmoeConfig(
            hidden_size=d_model,
            intermediate_size=moe.hidden_size,
            num_experts=moe.num_experts,
            num_experts_per_tok=moe.top_k,
            experts_implementation="grouped_mm",
        )
    )


def measure_gathers(shape: Shape, device: torch.device) -> dict[str, float]:
    """Measure bytes per second at which random rows are read and summed for each token, for several variants.

    Number and width of the rows, and the size of the table, are those of a memory layer's lookup.
    """
    config = shape.memory
    window_rows = config.layout(shape.num_blocks).window_rows
    reads, width = config.heads * config.top_k, config.value_dim + config.pre_value_dim
    table = torch.randn(window_rows, width, device=device, dtype=_dtype(device))
    rows = [
        torch.randint(window_rows, (shape.tokens, reads), device=device, dtype=torch.int32)
        for _ in range(ROTATING_INPUTS)
    ]
    variants: dict[str, Callable[[Tensor], Tensor]] = {}
    if device.type == "cuda" and triton is not None:
        for group, warps in ((2, 1), (4, 1), (4, 2), (8, 2), (4, 4), (8, 4), (16, 8)):
            if reads % group == 0:
                variants[f"{group} rows at a time, {warps} warps"] = partial(gather_sums, table, group, warps)
    else:
        variants["PyTorch"] = lambda rows: F.embedding_bag(rows, table, mode="sum")
    amount = shape.tokens * reads * width * table.element_size()
    return {name: 1e3 * amount / _gather_ms(gather, rows, device) for name, gather in variants.items()}


def _gather_ms(gather: Callable[[Tensor], Tensor], rows: list[Tensor], device: torch.device) -> float:
    def run(i: int) -> Tensor:
        return gather(rows[i % len(rows)])

    return graphed_ms(run, device, repeats=5, rotations=len(rows)) or median_ms(run, device, repeats=8)


def gather_sums(table: Tensor, group: int, warps: int, rows: Tensor) -> Tensor:
    """Sums (tokens, width) of each token's rows, `rows` (tokens, reads), of a table (rows, width)."""
    tokens, reads = rows.shape
    width = table.shape[1]
    head = 1 << (width.bit_length() - 1)  # powers of two, as Triton's blocks are, such as 256 + 128
    tail = triton.next_power_of_2(max(width - head, 16))
    sums = table.new_empty(tokens, width)
    _gather_sums[(tokens,)](table, rows, sums, width, reads, group, head, tail, num_warps=warps)
    return sums


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _gather_sums(
        table: tl.tensor,
        rows: tl.tensor,
        sums: tl.tensor,
        WIDTH: tl.constexpr,  # noqa: N803
        READS: tl.constexpr,  # noqa: N803
        GROUP: tl.constexpr,  # noqa: N803
        HEAD: tl.constexpr,  # noqa: N803
        TAIL: tl.constexpr,  # noqa: N803
    ) -> None:
        token = tl.program_id(0).to(tl.int64)
        head = tl.arange(0, HEAD)
        tail = HEAD + tl.arange(0, TAIL)
        head_sums = tl.zeros((GROUP, HEAD), tl.float32)
        tail_sums = tl.zeros((GROUP, TAIL), tl.float32)
        for first in tl.range(0, READS, GROUP, loop_unroll_factor=2):
            chosen = tl.load(rows + token * READS + first + tl.arange(0, GROUP)).to(tl.int64)
            starts = table + chosen[:, None] * WIDTH
            head_sums += tl.load(starts + head[None, :]).to(tl.float32)
            tail_sums += tl.load(starts + tail[None, :], mask=tail[None, :] < WIDTH, other=0.0).to(tl.float32)
        tl.store(sums + token * WIDTH + head, tl.sum(head_sums, 0))
        tl.store(sums + token * WIDTH + tail, tl.sum(tail_sums, 0), mask=tail < WIDTH)


def show(results: list[Result], rates: Rates) -> None:
    """Print a table of all rows, and a summary of each shape."""
    table = Table(title=f"copy {rates.copy / 1e12:.2f} TB/s, matrix product {rates.matmul / 1e12:.0f} TFLOP/s")
    table.add_column("forward / forward+backward")
    for column in ("ms", "launched ms", "floor ms", "/ floor", "/ plain", "/ dense", "/ MoE", "peak GB"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_section()
        table.add_row(f"[bold]{result.shape}[/bold]: bare gather {result.gather / 1e12:.2f} TB/s")
        for row in result.rows.values():
            table.add_row(*cells(row, result.rows))
    table.caption = (
        f"'{MEMORY}': a pass through all layers, per layer; 'alone': one layer, which makes the whole table's gradient "
        "itself.\n'ms': replayed CUDA graphs; 'launched ms': kernels launched one by one from Python.\n"
        "'/': ratio to the floor, the definition in plain PyTorch, the dense feed-forward, the MoE layer.\n"
        "Peak: forward and backward of one layer, beyond inputs, parameters, gradients (there already, and added to) "
        "and the table's bfloat16 copy."
    )
    console().print(table)
    for result in results:
        print(f"{result.shape}: {summary(result)}")


def cells(row: Row, rows: dict[str, Row]) -> list[str]:
    """The row of a table, with ratios to other rows."""

    def pair(forward: float | None, training: float | None, digits: int = 2) -> str:
        texts = [number(forward, digits), number(training, digits)]
        if not texts[1] or texts == [number(OUT_OF_MEMORY)] * 2:
            return texts[0]
        return f"{texts[0] or '-'} / {texts[1]}"

    def against(forward: float | None, training: float | None) -> str:
        return pair(ratio(row.forward_ms, forward), ratio(row.training_ms, training))

    def against_row(name: str) -> str:
        return against(rows[name].forward_ms, rows[name].training_ms)

    whole = not row.name.startswith(" ")
    return [
        row.name,
        pair(row.forward_ms, row.training_ms, 3),
        pair(row.launched_forward_ms, row.launched_training_ms, 3),
        pair(row.forward_floor_ms, row.training_floor_ms, 3),
        against(row.forward_floor_ms, row.training_floor_ms),
        against_row(NAIVE) if row.name == ALONE else "",
        against_row(DENSE) if whole else "",
        against_row(MOE) if whole else "",
        number(row.peak_gb),
    ]


def summary(result: Result) -> str:
    """One line: the layer against the MoE layer, the lookup against the bare gather, peak memory."""
    memory, moe, lookup, one = (result.rows[name] for name in (MEMORY, MOE, LOOKUP, ALONE))
    share = ratio(lookup.forward_floor_ms, lookup.forward_ms)
    return (
        f"memory / MoE: forward {number(ratio(memory.forward_ms, moe.forward_ms))}, "
        f"forward+backward {number(ratio(memory.training_ms, moe.training_ms))}; "
        f"lookup {number(None if share is None else 100 * share, 0)}% of bare gather; "
        f"peak {number(one.peak_gb) or '-'} GB "
        f"({number(one.peak_without_adding_gb) or '-'} GB without adding gradients up)"
    )


def draw(results: list[Result]) -> Figure:
    """Draw bars of the layers' times, with the memory layer's floor."""
    figure = Figure(figsize=(5.5 * len(results), 3.6), layout="constrained")
    for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        names = [MEMORY, NAIVE, BESIDE, DENSE, MOE]
        rows = [result.rows[name] for name in names]
        floor = result.rows[MEMORY]
        for offset, label, times, least in (
            (-0.2, "forward", [row.forward_ms for row in rows], floor.forward_floor_ms),
            (0.2, "forward+backward", [row.training_ms for row in rows], floor.training_floor_ms),
        ):
            heights = [0.0 if time is None or time == OUT_OF_MEMORY else time for time in times]
            bars = axes.bar([i + offset for i in range(len(rows))], heights, width=0.4, label=label)
            axes.bar_label(bars, [number(time) for time in times], fontsize=7)
            axes.hlines(least, offset - 0.2, offset + 0.2, color="black", label="floor" if offset > 0 else None)
        labels = ["memory layer", "memory layer,\nplain PyTorch", "feed-forward\nbeside memory", "dense", "MoE layer"]
        axes.set_xticks(range(len(rows)), labels, fontsize=8)
        axes.set(title=f"{result.shape}: one layer", ylabel="ms")
        axes.legend()
    return figure


def _sum(times: Iterable[float | None]) -> float:
    return sum(time for time in times if time is not None)


def _random(tokens: int, width: int, device: torch.device) -> Tensor:
    return torch.randn(tokens, width, device=device, dtype=_dtype(device), requires_grad=True)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


if __name__ == "__main__":
    run_command(main)
