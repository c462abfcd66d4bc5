"""Time training steps of whole models: dense, mixture of experts and UltraMemV2, of 227 million active parameters.

Run `python -m benchmarks.training` on one GPU; `--tiny` tries the script on a CPU. Tokens are random. Parameters are
float32 and matrix products are in bfloat16 under autocast, as in `ultramem train` on GPUs. Optimizer: fused AdamW.

- `dense`, `ultramem_v2`: on the OLMo-core host, each block compiled, as with `trainer.compile`.
- `olmoe`: transformers' OLMoE with grouped matrix products and PyTorch's scaled dot product attention; eager, and with
  each block and the loss compiled. Autocast does not reach the experts' grouped products, so their weights are cast to
  bfloat16 as it would.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGALRM, alarm, signal
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from olmo_core.optim import AdamWConfig
from olmo_core.train.train_module import TransformerTrainModule
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import profile

from benchmarks.measurement import (
    DEFAULT_OUTPUT,
    OUT_OF_MEMORY,
    Stopwatch,
    benchmark_device,
    check_outputs,
    console,
    environment,
    free_memory,
    number,
    peak_gb,
    ratio,
    reset_peak,
    write_json,
    write_plot,
)
from ultramem.cli.border import run_command
from ultramem.device import autocast, has_fast_bfloat16
from ultramem.errors import UltraMemError
from ultramem.files.whole_files import write_text
from ultramem.hosts.olmo_core import ModelConfig, model_statistics, preset

SYSTEMS = ("dense", "olmoe", "ultramem_v2")
WARMUP_STEPS = 4
COMPILATION_SECONDS = 90  # for the OLMoE baseline, whose eager form is there in any case
IGNORED_LABEL = -100


def main() -> None:
    """Measure, print a table, write training.json, training.png and perhaps a profile."""
    arguments = parse_arguments()
    check_outputs(arguments.output, "training.json", "training.png")
    device = benchmark_device(arguments.tiny)
    batch = (2, 64) if arguments.tiny else (arguments.batch_size, arguments.sequence_length)
    compiles = device.type == "cuda" and not arguments.no_compile
    rows = []
    for name in arguments.systems:
        config = preset(f"{name}_small" if arguments.tiny else f"{name}_227m")
        variants = (False, True) if name == "olmoe" and compiles else (compiles,)
        for compiled in variants:
            profile_to = None
            if name == arguments.profile:
                profile_to = arguments.output / f"profile_{name}_{'compiled' if compiled else 'eager'}.txt"
            rows.append(measure(name, config, compiled, device, batch, arguments.steps, profile_to))
            content = {"environment": environment(device), "batch": batch, "systems": [row.raw() for row in rows]}
            write_json(arguments.output / "training.json", content)  # each time: the next system may fail
    show(rows, batch)
    write_plot(arguments.output / "training.png", draw(rows))
    print(f"written to {arguments.output}")


def parse_arguments() -> argparse.Namespace:
    """The command line's arguments, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--batch-size", type=int, default=3, help="sequences per step")
    parser.add_argument("--sequence-length", type=int, default=4096, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=10, help="number of steps to time")
    parser.add_argument("--no-compile", action="store_true", help="run all systems eagerly")
    parser.add_argument(
        "--profile",
        choices=SYSTEMS,
        help="write a profile of this system: the 40 kernels that take most time in a step",
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--tiny", action="store_true", help="use a small shape, to try the script without a GPU")
    arguments = parser.parse_args()
    for name in ("batch_size", "sequence_length", "steps"):
        if getattr(arguments, name) < 1:
            raise UltraMemError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1")
    if arguments.profile not in (None, *arguments.systems):
        raise UltraMemError(f"--profile {arguments.profile}: is not among the systems; add it to --systems")
    return arguments


@dataclass
class System:
    """A model with its loss and optimizer.

    Attributes:
        model: the model.
        optimizer: optimizer of all parameters.
        loss: mean loss of token ids (sequences, tokens) and labels of the same shape.
        after_step: called after each optimizer step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]
    after_step: Callable[[], None] = lambda: None

    def forward_backward(self, tokens: Tensor) -> None:
        """Compute new gradients. The labels are the tokens, which are random anyway."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(tokens, tokens).backward()

    def update(self) -> None:
        """Run the optimizer step and what must follow it."""
        self.optimizer.step()
        self.after_step()


@dataclass
class Row:
    """Measurements of one system.

    Attributes:
        system: name of the system.
        compiled: whether it was compiled.
        active: number of parameters that a token uses, with embeddings.
        total: number of all parameters.
        tokens: tokens per step.
        forward_backward_ms: median time without the optimizer, in milliseconds.
        step_ms: median time of a whole step, in milliseconds.
        peak_gb: peak memory of parameters, gradients, optimizer and activations, in 10⁹ bytes.
        note: why there are no measurements.
    """

    system: str
    compiled: bool
    active: int
    total: int
    tokens: int
    forward_backward_ms: float | None = None
    step_ms: float | None = None
    peak_gb: float | None = None
    note: str = ""

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of forward and backward pass."""
        return ratio(1e3 * self.tokens, self.forward_backward_ms)

    @property
    def tokens_per_second_of_step(self) -> float | None:
        """Tokens per second of the whole step."""
        return ratio(1e3 * self.tokens, self.step_ms)

    @property
    def variant(self) -> str:
        """Whether the system was compiled or eager, for labels."""
        return "compiled" if self.compiled else "eager"

    def raw(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        speeds = ("tokens_per_second", "tokens_per_second_of_step")
        return asdict(self) | {name: getattr(self, name) for name in speeds}


def measure(
    name: str,
    config: ModelConfig,
    compiled: bool,
    device: torch.device,
    batch: tuple[int, int],
    steps: int,
    profile_to: Path | None,
) -> Row:
    """Build a system, time its steps, and free it.

    Args:
        name: name of the system.
        config: configuration of the model; for OLMoE, its sizes.
        compiled: whether to compile it.
        device: device to run on.
        batch: sequences per step, tokens per sequence.
        steps: number of steps to time.
        profile_to: file for a profile of one more step, or None.
    """
    counts = model_statistics(config, batch[1])
    row = Row(name, compiled, counts.active, counts.total, batch[0] * batch[1])
    try:
        system = build_olmoe(config, compiled, device) if config.moe else build_host(config, compiled, device, batch)
        batches = torch.randint(config.vocab_size, (WARMUP_STEPS + steps, *batch), device=device)
        with time_limit(COMPILATION_SECONDS if config.moe and compiled else 0):
            time_steps(system, batches[:WARMUP_STEPS])
        reset_peak(device)
        row.forward_backward_ms, row.step_ms = time_steps(system, batches[WARMUP_STEPS:])
        row.peak_gb = peak_gb(device) or None
        if profile_to is not None:
            write_profile(system, batches[0], profile_to)
    except torch.OutOfMemoryError:
        row.forward_backward_ms = row.step_ms = row.peak_gb = OUT_OF_MEMORY
    except Exception as error:
        if not (config.moe and compiled):
            raise
        row.note = f"not compiled: {(str(error).splitlines() or [type(error).__name__])[0][:100]}"
    system = batches = None  # type: ignore[assignment]
    torch.compiler.reset()
    free_memory()
    return row


def time_steps(system: System, batches: Tensor) -> tuple[float, float]:
    """Median milliseconds of forward and backward pass, and of the whole step.

    Args:
        system: system to train.
        batches: (steps, sequences, tokens).
    """
    stopwatch = Stopwatch(batches.device)
    stopwatch.mark()
    for tokens in batches:
        system.forward_backward(tokens)
        stopwatch.mark()
        system.update()
        stopwatch.mark()
    intervals = stopwatch.intervals()
    forward_backward, update = intervals[::2], intervals[1::2]
    return median(forward_backward), median(map(sum, zip(forward_backward, update, strict=True)))


def build_host(config: ModelConfig, compiled: bool, device: torch.device, batch: tuple[int, int]) -> System:
    """A model on the OLMo-core host, built, compiled and run as `ultramem train` does."""
    module = TransformerTrainModule(
        model=config.build("meta"),
        optim=AdamWConfig(lr=1e-4, fused=True),
        rank_microbatch_size=batch[0] * batch[1],
        max_sequence_length=batch[1],
        compile_model=compiled,
        autocast_precision=torch.bfloat16 if has_fast_bfloat16(device) else None,
        device=device,
    )
    assert module.optim is not None
    count = torch.tensor(batch[0] * batch[1], device=device)

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        output = module.model_forward(
            tokens,
            labels=labels,
            ignore_index=IGNORED_LABEL,
            loss_reduction="sum",
            loss_div_factor=count,
            return_logits=False,
        )
        return output.loss

    return System(module.model, module.optim, loss, module.model.post_optim_step)


def build_olmoe(config: ModelConfig, compiled: bool, device: torch.device) -> System:
    """transformers' OLMoE of the same sizes."""
    try:
        from transformers import OlmoeConfig, OlmoeForCausalLM
    except ImportError as error:
        raise UltraMemError(
            "olmoe needs the package transformers; install it with: pip install 'ultramem[hf]'"
        ) from error
    assert config.moe is not None
    with device:
        model = OlmoeForCausalLM(
            OlmoeConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.d_model,
                intermediate_size=config.moe.hidden_size,
                num_hidden_layers=config.num_blocks,
                num_attention_heads=config.num_heads,
                num_experts=config.moe.num_experts,
                num_experts_per_tok=config.moe.top_k,
                tie_word_embeddings=config.tie_embeddings,
                rms_norm_eps=config.norm_eps,
                bos_token_id=None,
                eos_token_id=None,
                output_router_logits=False,
                use_cache=False,
                attn_implementation="sdpa",
                experts_implementation="grouped_mm",
            )
        ).train()
    # One class for all blocks, as otherwise each would be compiled anew.
    experts = in_bfloat16(type(model.model.layers[0].mlp.experts))
    for layer in model.model.layers:
        if has_fast_bfloat16(device):
            layer.mlp.experts.__class__ = experts
        if compiled:
            layer.compile()
    if compiled:
        model.loss_function = torch.compile(model.loss_function)

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        with autocast(device):
            return model(input_ids=tokens, labels=labels).loss

    return System(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), loss)


def in_bfloat16(experts: type[nn.Module]) -> type[nn.Module]:
    """A class of experts whose methods see their float32 parameters in bfloat16."""

    def cast(name: str) -> property:
        return property(lambda module: module._parameters[name].to(torch.bfloat16))

    return type(experts.__name__, (experts,), {name: cast(name) for name in ("gate_up_proj", "down_proj")})


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` after this many seconds; 0 for no limit."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal(SIGALRM, stop)
    alarm(seconds)
    try:
        yield
    finally:
        alarm(0)
        signal(SIGALRM, before)


def write_profile(system: System, tokens: Tensor, path: Path) -> None:
    """Write the 40 kernels, or on a CPU operations, with the most self time in a step."""
    with profile() as profiler:
        system.forward_backward(tokens)
        system.update()
        if tokens.is_cuda:
            torch.cuda.synchronize()
    kind, field = ("CUDA", "self_device_time_total") if tokens.is_cuda else ("CPU", "self_cpu_time_total")
    # Annotations span kernels that are listed themselves.
    events = [e for e in profiler.key_averages() if e.device_type.name == kind and not e.is_user_annotation]
    events.sort(key=lambda event: getattr(event, field), reverse=True)
    total = sum(getattr(event, field) for event in events)
    lines = [f"{'ms':>10} {'share':>6} {'calls':>6}  name", f"{total / 1e3:10.3f} {'100%':>6} {'':>6}  all"]
    for event in events[:40]:
        time = getattr(event, field)
        lines.append(f"{time / 1e3:10.3f} {time / total:6.1%} {event.count:6d}  {event.key[:150]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")


def show(rows: list[Row], batch: tuple[int, int]) -> None:
    """Print a table."""
    table = Table(title=f"{batch[0]} sequences of {batch[1]:,} tokens a step")
    table.add_column("system")
    for column in (
        "active",
        "total",
        "forward+\nbackward ms",
        "step ms",
        "tokens/s\nforward+backward",
        "tokens/s\nwith optimizer",
        "peak GB",
        "/ olmoe\neager",
        "/ olmoe\ncompiled",
        "/ dense",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row.system}, {row.variant}",
            f"{row.active / 1e6:,.0f} M",
            f"{row.total / 1e6:,.0f} M",
            row.note or number(row.forward_backward_ms, 1),
            number(row.step_ms, 1),
            number(row.tokens_per_second, 0),
            number(row.tokens_per_second_of_step, 0),
            number(row.peak_gb, 1),
            *(_against(row, rows, system, compiled) for system, compiled in (("olmoe", False), ("olmoe", True))),
            _against(row, rows, "dense", None),
        )
    table.caption = "Parameters with embeddings. Ratios are of tokens/s, forward+backward / with optimizer"
    console().print(table)


def _against(row: Row, rivals: list[Row], system: str, compiled: bool | None) -> str:
    for rival in rivals:
        if rival.system == system and compiled in (None, rival.compiled):
            speeds = ratio(row.tokens_per_second, rival.tokens_per_second)
            steps = ratio(row.tokens_per_second_of_step, rival.tokens_per_second_of_step)
            return f"{number(speeds)} / {number(steps)}" if speeds else ""
    return ""


def draw(rows: list[Row]) -> Figure:
    """Draw bars of tokens per second of each system's variants."""
    figure = Figure(figsize=(1.5 + 1.3 * len(rows), 3.6), layout="constrained")
    axes = figure.subplots()
    for offset, label, speeds in (
        (-0.2, "forward+backward", [row.tokens_per_second for row in rows]),
        (0.2, "with optimizer", [row.tokens_per_second_of_step for row in rows]),
    ):
        bars = axes.bar([i + offset for i in range(len(rows))], [speed or 0 for speed in speeds], 0.4, label=label)
        axes.bar_label(bars, [number(speed, 0) for speed in speeds], fontsize=7)
    axes.set_xticks(range(len(rows)), [f"{row.system}\n{row.variant}" for row in rows], fontsize=8)
    axes.set(ylabel="tokens/s", title="training")
    axes.legend()
    return figure


if __name__ == "__main__":
    run_command(main)
