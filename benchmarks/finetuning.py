"""Compare sparse memory fine-tuning, full fine-tuning and LoRA on new facts: how much does a small model forget?

Run `python -m benchmarks.finetuning --model DIR` with a model that was trained on Python source and exported with
`ultramem export`. The facts are lines of Python about made-up names. Each method tries several learning rates. A run
ends as soon as greedy decoding completes the facts at the target accuracy. The best run of a method then has the lowest
loss on other Python source. `--tiny` learns fewer facts, in minutes on a CPU.
"""

from __future__ import annotations

import argparse
import random
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.utils import logging

from benchmarks.measurement import (
    DEFAULT_OUTPUT,
    check_outputs,
    console,
    environment,
    free_memory,
    number,
    write_json,
    write_plot,
)
from ultramem.cli.border import run_command
from ultramem.data.facts import made_up_words
from ultramem.device import autocast, choose_device
from ultramem.finetuning.config import FinetuneConfig
from ultramem.finetuning.examples import make_examples, mean_loss, read_texts
from ultramem.finetuning.methods import Finetuning, read_background
from ultramem.hosts.transformers.files import load_model_and_tokenizer
from ultramem.hosts.transformers.modes import evaluation_mode
from ultramem.hosts.transformers.sparse_finetuning import Background

# The test asks for the first template.
TEMPLATES = (
    'capital_of["{name}"] = "{value}"\n',
    'assert capital_of["{name}"] == "{value}"\n',
    'def capital_of_{name}():\n    return "{value}"\n',
    '# The capital of {name} is {value}.\ncapital_of["{name}"] = "{value}"\n',
)
LEARNING_RATES = {
    ("sparse", "adamw"): (3e-3, 1e-2, 3e-2),
    ("full", "adamw"): (3e-5, 1e-4, 3e-4),
    ("lora", "adamw"): (3e-4, 1e-3, 3e-3),
    ("sparse", "sgd"): (30.0, 100.0),
}


@dataclass(frozen=True)
class Point:
    """Accuracy and loss of a run after a number of steps."""

    step: int
    accuracy: float
    heldout_loss: float


@dataclass
class Run:
    """One method at one learning rate.

    Attributes:
        method, optimizer, learning_rate: as in `ultramem finetune`.
        points: evaluations, from step 0 on.
        reached: whether the target was reached.
        trained_rows, trained_parameters: number of trained rows and parameters.
        seconds: duration of the run, including evaluations.
    """

    method: str
    optimizer: str
    learning_rate: float
    points: list[Point] = field(default_factory=list)
    reached: bool = False
    trained_rows: int = 0
    trained_parameters: int = 0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """Method and optimizer."""
        return f"{self.method}, {self.optimizer}"


class Facts:
    """Made-up names and their values, as examples and as a test.

    Args:
        count: number of facts.
        tokenizer: tokenizer of the model.
        seed: seed for the names.
    """

    def __init__(self, count: int, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        words = made_up_words(2 * count, random.Random(seed))
        self.names, self.values = words[:count], words[count:]
        self.tokenizer = tokenizer
        texts = [
            template.format(name=name, value=value)
            for name, value in zip(self.names, self.values, strict=True)
            for template in TEMPLATES
        ]
        self.examples = make_examples(texts, tokenizer, sequence_length=256)

    @torch.no_grad()
    def accuracy(self, model: PreTrainedModel) -> float:
        """Share of the facts whose value greedy decoding completes exactly."""
        before_value = TEMPLATES[0].partition("{value}")[0]
        prompts = self.tokenizer(
            [before_value.format(name=name) for name in self.names],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        ends = [f'{value}"' for value in self.values]
        longest = max(len(ids) for ids in self.tokenizer(ends, add_special_tokens=False)["input_ids"])
        with evaluation_mode(model), autocast(model.device):
            generated = model.generate(
                input_ids=prompts["input_ids"],
                attention_mask=prompts["attention_mask"],
                max_new_tokens=longest,
                do_sample=False,
            )
        texts = self.tokenizer.batch_decode(generated[:, prompts["input_ids"].shape[1] :])
        return sum(text.startswith(end) for text, end in zip(texts, ends, strict=True)) / len(ends)


class Evaluator(TrainerCallback):
    """Adds a point to a run every few steps, and ends the run at the target."""

    def __init__(self, bench: Benchmark, run: Run, model: PreTrainedModel) -> None:
        self.bench, self.run, self.model = bench, run, model

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the point before the first step."""
        self._evaluate(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add a point every `interval` steps."""
        if state.global_step % self.bench.interval and state.global_step < state.max_steps:
            return
        self._evaluate(state.global_step)
        if self.run.points[-1].accuracy >= self.bench.target:
            self.run.reached = control.should_training_stop = True

    def _evaluate(self, step: int) -> None:
        accuracy = self.bench.facts.accuracy(self.model)
        self.run.points.append(Point(step, accuracy, mean_loss(self.model, self.bench.heldout, batch_size=16)))


@dataclass
class Benchmark:
    """Data and settings of all runs.

    Attributes:
        config: configuration with model, data sizes and steps.
        facts: facts to learn.
        heldout: held-out sequences of Python source.
        background: reads of other Python source.
        target: accuracy at which a run ends.
        interval: steps between evaluations.
    """

    config: FinetuneConfig
    facts: Facts
    heldout: Sequence[dict[str, list[int]]]
    background: Background
    target: float
    interval: int

    def measure(self, method: str, optimizer: str, learning_rate: float) -> Run:
        """Load and fine-tune the model."""
        free_memory()
        run, start = Run(method, optimizer, learning_rate), time.perf_counter()
        settings: dict[str, Any] = {"method": method, "optimizer": optimizer, "learning_rate": learning_rate}
        if method != "sparse":
            settings["background"] = ()
        config = replace(self.config, **settings)
        set_seed(config.seed)
        model = load_model_and_tokenizer(config.model)[0].to(choose_device(config.device))
        background = self.background if method == "sparse" else None
        finetuning = Finetuning(model, config, self.facts.examples, background)
        with tempfile.TemporaryDirectory() as directory:
            finetuning.train(Path(directory), [Evaluator(self, run, model)])
        run.trained_rows, _, run.trained_parameters, _ = finetuning.counts()
        run.seconds = time.perf_counter() - start
        return run


def prepare(arguments: argparse.Namespace) -> Benchmark:
    """Prepare the benchmark; loads the model once to count the reads of the background.

    Raises:
        UltraMemError: a file is missing, or the model has no memory.
    """
    background_files, heldout_files = split_sources(arguments.background)
    if arguments.tiny:
        background_files, heldout_files = background_files[::8], heldout_files[::8]
    config = FinetuneConfig(
        model=arguments.model,
        data=(),
        output=arguments.output,
        background=tuple(background_files),
        rows=arguments.rows,
        steps=arguments.steps or (200 if arguments.tiny else 240),
        device=arguments.device,
        background_batches=100 if arguments.tiny else 1000,
    )
    model, tokenizer = load_model_and_tokenizer(arguments.model)
    model.to(choose_device(arguments.device))
    facts = Facts(16 if arguments.tiny else 100, tokenizer, config.seed)
    pieces = make_examples(read_texts(heldout_files), tokenizer, config.sequence_length)
    stride = max(1, len(pieces) // (16 if arguments.tiny else 128))
    background = make_examples(read_texts(background_files), tokenizer, config.sequence_length)
    reads = read_background(model, config, facts.examples, background)
    return Benchmark(config, facts, pieces[::stride], reads, target=0.95, interval=arguments.interval)


def split_sources(background: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Files of the background, by default every second one of the standard library, and the library's other files."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = [path for path in sorted(library.rglob("*.py")) if not {"site-packages", "test", "tests"} & {*path.parts}]
    readable = [path for path in sources if _is_text(path)]
    chosen = {path.resolve() for path in background or readable[::2]}
    return list(background or readable[::2]), [path for path in readable if path.resolve() not in chosen]


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return False


def best(runs: Sequence[Run]) -> Run:
    """The run that forgot least among those that reached the target; if none did, the one that learnt most."""
    reached = [run for run in runs if run.reached]
    if reached:
        return min(reached, key=lambda run: run.points[-1].heldout_loss)
    return max(runs, key=lambda run: run.points[-1].accuracy)


def show(runs: Sequence[Run]) -> None:
    """Print a table of each method's best run."""
    table = Table()
    for column in (
        "method", "learning rate", "steps", "accuracy", "held-out loss", "forgetting", "trained parameters", "rows",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "method" else "right")
    for run in _best_runs(runs):
        first, last = run.points[0], run.points[-1]
        table.add_row(
            run.name,
            f"{run.learning_rate:g}",
            f"{last.step:,}" if run.reached else f"{last.step:,}, target not reached",
            f"{last.accuracy:.0%}",
            f"{number(first.heldout_loss, 4)} -> {number(last.heldout_loss, 4)}",
            f"{last.heldout_loss - first.heldout_loss:+.4f}",
            f"{run.trained_parameters:,}",
            f"{run.trained_rows:,}",
        )
    table.caption = "Losses in nats per token, on Python source that is not in the background."
    console().print(table)


def draw(runs: Sequence[Run]) -> Figure:
    """Draw accuracy over the rise of the held-out loss at every evaluation, a colour for each method."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(run.name for run in runs))
    for name in names:
        axes.plot([], [], color=f"C{names.index(name)}", marker="o", label=name)
    for run in runs:
        rises = [point.heldout_loss - run.points[0].heldout_loss for point in run.points]
        accuracies = [point.accuracy for point in run.points]
        color = f"C{names.index(run.name)}"
        axes.plot(rises, accuracies, color=color, marker="o", markersize=3, linewidth=0.8, alpha=0.8)
    # Runs that forget nearly everything would leave no room for the others.
    worst = max(run.points[-1].heldout_loss - run.points[0].heldout_loss for run in _best_runs(runs))
    axes.set_xlim(-0.05 * worst, 1.5 * worst)
    axes.set_xlabel("rise of the loss on held-out Python source (nats per token)")
    axes.set_ylabel("facts completed")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _best_runs(runs: Sequence[Run]) -> list[Run]:
    names = dict.fromkeys(run.name for run in runs)
    return [best([run for run in runs if run.name == name]) for name in names]


def main() -> None:
    """Measure, print a table, write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="transformers directory of a model with memory")
    parser.add_argument(
        "--background", type=Path, nargs="+", default=[], help="Python source; default: half of the standard library"
    )
    parser.add_argument("--steps", type=int, help="maximum number of steps per run; default: 240, or 200 with --tiny")
    parser.add_argument("--interval", type=int, default=10, help="steps between evaluations")
    parser.add_argument("--rows", type=int, default=4096, help="maximum number of rows of each table to train per step")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--tiny", action="store_true", help="use fewer facts and less text, for a CPU")
    arguments = parser.parse_args()
    check_outputs(arguments.output, "finetuning.json", "finetuning.png")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = prepare(arguments)
    content: dict[str, Any] = {
        "environment": environment(choose_device(arguments.device)),
        "facts": len(bench.facts.names),
        "rows": arguments.rows,
    }
    runs: list[Run] = []
    for (method, optimizer), learning_rates in LEARNING_RATES.items():
        for learning_rate in learning_rates:
            run = bench.measure(method, optimizer, learning_rate)
            last = run.points[-1]
            console().print(
                f"{run.name}, learning rate {learning_rate:g}: accuracy {last.accuracy:.0%}, held-out loss "
                f"{last.heldout_loss:.4f} after {last.step} steps, {run.seconds:.0f} s"
            )
            runs.append(run)
            content["runs"] = [asdict(run) for run in runs]
            write_json(arguments.output / "finetuning.json", content)  # each time: the next may be cut off
    show(runs)
    write_plot(arguments.output / "finetuning.png", draw(runs))
    print(f"written to {arguments.output}/finetuning.json and finetuning.png")


if __name__ == "__main__":
    run_command(main)
