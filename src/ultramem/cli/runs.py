"""Commands that train a model and look at what it has learnt."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ultramem.errors import ConfigError


def train(
    context: typer.Context,
    config: Annotated[
        Path, typer.Argument(help="YAML file that describes the run.", metavar="CONFIG [--KEY=VALUE]...")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the directory.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show OLMo-core's log.")] = False,
) -> None:
    """Train a model, or go on with a run that was interrupted.

    Values of the configuration are replaced by their dotted keys, such as --trainer.steps=1000 or
    --model.memory.top_k=16. The same command goes on from the latest checkpoint; Ctrl-C and SIGTERM save one and leave.
    For several processes put `torchrun --nproc-per-node=N -m ultramem.cli` in place of `ultramem`.
    """
    from ultramem.training import load_config
    from ultramem.training import train as run

    result = run(load_config(config, context.args), overwrite=overwrite, verbose=verbose)
    if int(os.environ.get("RANK", 0)) == 0:
        hints = {
            "interrupted": "; the same command goes on from here",
            "already finished": "; evaluate it with `ultramem evaluate`, or train it anew with --overwrite",
        }
        typer.echo(f"{result.status} at step {result.step}: {result.directory}{hints.get(result.status, '')}")


def evaluate(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            help="Run directories, for their latest checkpoints, or RUN/stepN; several side by side.",
            metavar="CHECKPOINT",
        ),
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks in place of the loss: table3, memory, or single ones; repeatable or with commas between."
        ),
    ] = None,
    max_questions: Annotated[
        int | None,
        typer.Option(
            help="Most questions of each task, spread evenly, or of each part of a memory task; by default all."
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Directory of token files, or token files (repeat the option); by default the run's own."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the directory: train or heldout.")] = "heldout",
    dtype: Annotated[
        str | None, typer.Option(help="Of token files: uint16 or uint32; by default as in training.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens, in whole windows spread evenly over the split; by default all.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows at a time; by default about 4096 tokens, for tasks 8192.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a window, or most of a task's text; by default the training's.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    unigram: Annotated[
        bool, typer.Option(help="Compare with a unigram model, for which the train split is read.")
    ] = True,
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSON file to write, for one checkpoint; by default RUN/tasks.json, or RUN/evaluation.json for the "
            "heldout split."
        ),
    ] = None,
) -> None:
    """Measure a checkpoint's loss, perplexity and bits per byte, or how well it does tasks.

    The token files are cut into windows that do not overlap; every token of a window but the first is predicted, once,
    from those before it. The loss is their mean cross-entropy in nats.
    """
    from ultramem.evaluation.side_by_side import show_losses, show_tasks

    if output is not None and len(checkpoints) > 1:
        raise ConfigError(f"--output={output}: is for one checkpoint; leave it out, each run gets a file of its own")
    shared: dict[str, Any] = {
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "device": device,
        "output": output,
    }
    if tasks:
        of_data = {"data": data or None, "split": None if split == "heldout" else split, "dtype": dtype}
        _refuse(of_data, "leave it out with --tasks")
        _refuse({"max-tokens": max_tokens, "no-unigram": None if unigram else True}, "leave it out with --tasks")
        show_tasks(checkpoints, tasks, max_questions=max_questions, **shared)
    else:
        _refuse({"max-questions": max_questions}, "it is for --tasks")
        of_loss: dict[str, Any] = {"split": split, "dtype": dtype, "max_tokens": max_tokens, "unigram": unigram}
        show_losses(checkpoints, data or (), **of_loss, **shared)


def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Run directory, for its latest checkpoint, or RUN/stepN.", metavar="CHECKPOINT")
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Beginnings of texts; without any, of a document.", metavar="PROMPT")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A further prompt: all of this text file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add; less if the document ends.")] = 128,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Choose among so many most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the most probable tokens of this share.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first sample of each prompt; the others have the next ones.")] = 0,
    num_samples: Annotated[int, typer.Option(help="Samples of each prompt.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    save: Annotated[bool, typer.Option("--save", help="Append to RUN/samples.json, which the report shows.")] = False,
) -> None:
    """Continue prompts with a checkpoint."""
    from ultramem.evaluation import SamplingConfig, read_prompt, show_samples

    config = SamplingConfig(temperature, top_k, top_p, seed, max_new_tokens)
    texts = [*(prompts or ()), *([read_prompt(prompt_file)] if prompt_file else ())]
    show_samples(checkpoint, texts, config, num_samples=num_samples, device=device, save=save)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several make a comparison.", metavar="RUN")],
    output: Annotated[
        Path | None, typer.Option(help="File to write; for a single run the default is RUN/report.html.")
    ] = None,
) -> None:
    """Write an HTML page about a training run, or one that compares several."""
    from ultramem.report import write_report

    typer.echo(f"report written to {write_report(runs, output)}")


def _refuse(options: Mapping[str, object], remedy: str) -> None:
    """An error about the first option that is given."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name}: has no meaning here; {remedy}")
