"""Time training of whole models: dense, mixture of experts and UltraMemV2, of equal active parameters.

Run `python -m benchmarks.training` on one GPU; `--tiny` tries the script on a CPU. Tokens are random. Overrides such
as `--trainer.cuda_graphs=false` change the runs' configuration, as for `ultramem train`.

- `dense`, `olmoe`, `ultramem_v2`: the presets of a size, measured twice: steps alone, that is, passes, clipping and
  optimizer; and `ultramem train` as users run it, with data, metrics and callbacks, by the tokens per second that it
  reports itself.
- `transformers_olmoe`: transformers' OLMoE with grouped matrix products, PyTorch's scaled dot product attention and
  fused AdamW, steps alone; eager, and with each block and the loss compiled. Parameters are float32 and products in
  bfloat16 under autocast, as above. Autocast does not reach the experts' grouped products, so their weights are cast to
  bfloat16 as it would.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGALRM, alarm, signal
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import profile

from benchmarks.measurement import (
    DEFAULT_OUTPUT,
    Stopwatch,
    benchmark_device,
    check_outputs,
    console,
    environment,
    free_memory,
    number,
    peak_reserved_gb,
    ratio,
    reset_peak,
    write_json,
    write_plot,
)
from ultramem.cli.border import run_command
from ultramem.configuration.yaml_text import dump_yaml
from ultramem.device import autocast, has_fast_bfloat16
from ultramem.errors import UltraMemError
from ultramem.files.whole_files import write_text
from ultramem.hosts.olmo_core import ModelConfig, model_statistics, preset
from ultramem.runs.config import RunConfig
from ultramem.runs.layout import METRICS_NAME, THROUGHPUT
from ultramem.runs.tokens import open_token_data
from ultramem.training import load_config, train
from ultramem.training.processes import join_processes
from ultramem.training.trainer import build_trainer

RIVAL = "transformers_olmoe"
SYSTEMS = ("dense", "olmoe", "ultramem_v2", RIVAL)
BATCHES = {"small": (2, 64), "medium": (128, 512), "227m": (3, 4096), "1b": (1, 4096)}  # sequences, their tokens
WARMUP_STEPS = 6  # compiling and capturing included
COMPILATION_SECONDS = 90  # for the rival, whose eager form is there in any case
DATA_STEPS = 4  # of random tokens, read again and again


def main() -> None:
    """Measure, print a table, write training.json, training.png and perhaps a profile."""
    arguments, overrides = parse_arguments()
    check_outputs(arguments.output, "training.json", "training.png")
    device = benchmark_device(arguments.tiny)
    batch = (arguments.batch_size, arguments.sequence_length)
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        content = {"environment": environment(device), "batch": batch, "overrides": overrides}
        content["systems"] = [row.raw() for row in rows]
        write_json(arguments.output / "training.json", content)  # each time: the next system may fail

    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.systems:
            if name == RIVAL:
                for compiled in (False, True) if device.type == "cuda" else (False,):
                    keep(measure_rival(preset(f"olmoe_{arguments.size}"), compiled, device, batch, arguments.steps))
            else:
                config = run_config(f"{name}_{arguments.size}", batch, arguments.steps, Path(scratch), overrides)
                profile_to = arguments.output / f"profile_{name}.txt" if name == arguments.profile else None
                keep(measure(name, config, device, profile_to))
    show(rows, batch)
    write_plot(arguments.output / "training.png", draw(rows))
    print(f"written to {arguments.output}")


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line's arguments, checked, and overrides of the runs' configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--size", choices=("medium", "227m", "1b"), default="227m", help="of the presets")
    parser.add_argument("--batch-size", type=int, help="sequences per step; by default 128, 3 or 1, by size")
    parser.add_argument("--sequence-length", type=int, help="tokens per sequence; by default 512 or 4096, by size")
    parser.add_argument("--steps", type=int, default=20, help="number of steps to time")
    parser.add_argument(
        "--profile",
        choices=SYSTEMS[:-1],
        help="write a profile of this system: the 40 kernels that take most time in a step",
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--tiny", action="store_true", help="use a small shape, to try the script without a GPU")
    arguments, overrides = parser.parse_known_args()
    if arguments.tiny:
        arguments.size = "small"
    for name, default in zip(("batch_size", "sequence_length"), BATCHES[arguments.size], strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    for name in ("batch_size", "sequence_length", "steps"):
        if getattr(arguments, name) < 1:
            raise UltraMemError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1")
    if arguments.profile not in (None, *arguments.systems):
        raise UltraMemError(f"--profile {arguments.profile}: is not among the systems; add it to --systems")
    return arguments, overrides


@dataclass
class Row:
    """Measurements of one system.

    Attributes:
        system: name of the system.
        variant: `train`, `eager` or `compiled`.
        active: number of parameters that a token uses, with embeddings.
        total: number of all parameters.
        tokens: tokens per step.
        passes_ms: median time of the forward and backward passes of a step, in milliseconds.
        step_ms: median time of a whole step, in milliseconds.
        command: median tokens per second that `ultramem train` reports.
        peak_gb: peak memory that was reserved on the GPU, in 10⁹ bytes.
        note: why there are no measurements.
    """

    system: str
    variant: str
    active: int
    total: int
    tokens: int
    passes_ms: float | None = None
    step_ms: float | None = None
    command: float | None = None
    peak_gb: float | None = None
    note: str = ""

    @property
    def steps_alone(self) -> float | None:
        """Tokens per second of steps alone."""
        return ratio(1e3 * self.tokens, self.step_ms)

    @property
    def speed(self) -> float | None:
        """Tokens per second of the command, or without one of steps alone."""
        return self.steps_alone if self.command is None else self.command

    def raw(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return asdict(self) | {"steps_alone": self.steps_alone}


def run_config(name: str, batch: tuple[int, int], steps: int, scratch: Path, overrides: list[str]) -> RunConfig:
    """Configuration of a run of a preset on random tokens, written to `scratch`."""
    sequences, length = batch
    vocabulary, file = preset(name).vocab_size, scratch / f"{name}.npy"
    generator = np.random.default_rng(0)
    generator.integers(0, vocabulary, DATA_STEPS * sequences * length, dtype=np.uint16).tofile(file)
    files = {"train_files": [str(file)], "vocab_size": vocabulary, "eos_token_id": 0, "dtype": "uint16"}
    trainer = {
        "directory": str(scratch / name),
        "batch_size": sequences * length,
        "steps": WARMUP_STEPS + steps,
        "checkpoint_interval": WARMUP_STEPS + steps,
    }
    content = {"model": {"preset": name}, "data": files | {"sequence_length": length}, "trainer": trainer}
    write_text(scratch / f"{name}.yaml", dump_yaml(content))
    return load_config(scratch / f"{name}.yaml", overrides)


def measure(name: str, config: RunConfig, device: torch.device, profile_to: Path | None) -> Row:
    """Time a system's steps alone, then `ultramem train`.

    Args:
        name: name of the system.
        config: of the run.
        device: device to run on.
        profile_to: file for a profile of one more step, or None.
    """
    counts = model_statistics(config.model, config.data.sequence_length)
    row = Row(name, "train", counts.active, counts.total, config.trainer.batch_size)
    try:
        row.passes_ms, row.step_ms = time_steps(config, profile_to)
        free_memory()
        reset_peak(device)
        train(config, overwrite=True, console=Console(quiet=True))
        row.peak_gb = peak_reserved_gb(device)
        lines = map(json.loads, (config.trainer.directory / METRICS_NAME).read_text().splitlines())
        metrics = {line["step"]: line["metrics"] for line in lines}
        row.command = median(
            found[THROUGHPUT] for step, found in metrics.items() if step > WARMUP_STEPS and THROUGHPUT in found
        )
    except (torch.OutOfMemoryError, UltraMemError) as error:
        if not isinstance(error.__cause__ or error, torch.OutOfMemoryError):
            raise
        row.note = "out of memory"
    free_memory()
    return row


def time_steps(config: RunConfig, profile_to: Path | None) -> tuple[float, float]:
    """Median milliseconds of the passes, and of the whole step, of the run's model, without its callbacks and data."""
    with join_processes(config) as processes:
        torch.compiler.reset()
        trainer = build_trainer(config, open_token_data(config.data), None, processes, Console(quiet=True))
        module = trainer.train_module
        steps, length = config.trainer.total_steps, config.data.sequence_length
        shape = steps, config.trainer.batch_size // length, length
        batches = torch.randint(config.model.vocab_size, shape, device=processes.device)
        stopwatch = Stopwatch(processes.device)

        def step(tokens: Tensor) -> None:
            module.train_batch({"input_ids": tokens})
            stopwatch.mark()
            module.optim_step()
            module.zero_grads()
            stopwatch.mark()

        stopwatch.mark()
        for trainer.global_step, tokens in enumerate(batches, 1):
            step(tokens)
        medians = median_times(stopwatch.intervals()[2 * WARMUP_STEPS :])
        if profile_to is not None:
            write_profile(lambda: step(batches[0]), processes.device, profile_to)
    return medians


def median_times(intervals: list[float]) -> tuple[float, float]:
    """Median of the passes and of whole steps, from the times of passes and updates in turn."""
    passes, updates = intervals[::2], intervals[1::2]
    return median(passes), median(map(sum, zip(passes, updates, strict=True)))


@dataclass
class Rival:
    """transformers' model with its loss and optimizer.

    Attributes:
        model: the model.
        optimizer: optimizer of all parameters.
        loss: mean loss of token ids (sequences, tokens) and labels of the same shape.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]

    def time(self, batches: Tensor) -> tuple[float, float]:
        """Median milliseconds of the passes, and of the whole step; batches (steps, sequences, tokens)."""
        stopwatch = Stopwatch(batches.device)
        stopwatch.mark()
        for tokens in batches:
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(tokens, tokens).backward()
            stopwatch.mark()
            self.optimizer.step()
            stopwatch.mark()
        return median_times(stopwatch.intervals())


def measure_rival(config: ModelConfig, compiled: bool, device: torch.device, batch: tuple[int, int], steps: int) -> Row:
    """Time steps of transformers' OLMoE, with the sizes of `config`."""
    counts = model_statistics(config, batch[1])
    row = Row(RIVAL, "compiled" if compiled else "eager", counts.active, counts.total, batch[0] * batch[1])
    try:
        rival = build_rival(config, compiled, device)
        batches = torch.randint(config.vocab_size, (WARMUP_STEPS + steps, *batch), device=device)
        with time_limit(COMPILATION_SECONDS if compiled else 0):
            rival.time(batches[:WARMUP_STEPS])
        reset_peak(device)
        row.passes_ms, row.step_ms = rival.time(batches[WARMUP_STEPS:])
        row.peak_gb = peak_reserved_gb(device)
    except torch.OutOfMemoryError:
        row.note = "out of memory"
    except Exception as error:
        if not compiled:
            raise
        row.note = f"not compiled: {(str(error).splitlines() or [type(error).__name__])[0][:100]}"
    rival = batches = None  # type: ignore[assignment]
    torch.compiler.reset()
    free_memory()
    return row


def build_rival(config: ModelConfig, compiled: bool, device: torch.device) -> Rival:
    """transformers' OLMoE of the same sizes."""
    try:
        from transformers import OlmoeConfig, OlmoeForCausalLM
    except ImportError as error:
        raise UltraMemError(
            f"{RIVAL} needs the package transformers; install it with: pip install 'ultramem[hf]'"
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

    return Rival(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), loss)


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


def write_profile(step: Callable[[], None], device: torch.device, path: Path) -> None:
    """Write the 40 kernels, or on a CPU operations, with the most self time in a step."""
    with profile() as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    kind, field = ("CUDA", "self_device_time_total") if device.type == "cuda" else ("CPU", "self_cpu_time_total")
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
    titles = ("active", "total", "passes ms", "step ms", "tokens/s\nsteps alone", "tokens/s\nultramem train", "peak GB")
    others = [row for row in rows if row.system != "ultramem_v2" and row.variant != "eager"]
    for column in (*titles, *(f"/ {row.system}" for row in others)):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row.system}, {row.variant}",
            f"{row.active / 1e6:,.0f} M",
            f"{row.total / 1e6:,.0f} M",
            row.note or number(row.passes_ms, 1),
            number(row.step_ms, 1),
            number(row.steps_alone, 0),
            number(row.command, 0),
            number(row.peak_gb, 1),
            *(number(ratio(row.speed, other.speed)) for other in others),
        )
    console().print(table)


def draw(rows: list[Row]) -> Figure:
    """Draw bars of each system's tokens per second."""
    figure = Figure(figsize=(1.5 + 1.3 * len(rows), 3.6), layout="constrained")
    axes = figure.subplots()
    for offset, label, speeds in (
        (-0.2, "steps alone", [row.steps_alone for row in rows]),
        (0.2, "ultramem train", [row.command for row in rows]),
    ):
        bars = axes.bar([i + offset for i in range(len(rows))], [speed or 0 for speed in speeds], 0.4, label=label)
        axes.bar_label(bars, [number(speed, 0) if speed else "" for speed in speeds], fontsize=7)
    axes.set_xticks(range(len(rows)), [f"{row.system}\n{row.variant}" for row in rows], fontsize=8)
    axes.set(ylabel="tokens/s", title="training")
    axes.legend()
    return figure


if __name__ == "__main__":
    run_command(main)
