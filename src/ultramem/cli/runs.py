"""Commands that train a model and evaluate it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ultramem.cli.options import refuse
from ultramem.errors import ConfigError


def train(
    context: typer.Context,
    config: Annotated[
        Path, typer.Argument(help="YAML file with the run's configuration.", metavar="CONFIG [--KEY=VALUE]...")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run in the directory.")] = False,
    from_checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Resume from this checkpoint instead of the latest one. Later ones, and the metrics so far, are kept "
            "under names that end in .unused.",
            metavar="stepN",
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show OLMo-core's log.")] = False,
) -> None:
    """Train a model, or resume an interrupted run.

    Options such as --trainer.steps=1000 or --model.memory.top_k=16 replace values of the configuration. Ctrl-C and
    SIGTERM save a checkpoint and exit; the same command then resumes from it. To train with several processes, write
    `torchrun --nproc-per-node=N -m ultramem.cli` instead of `ultramem`.
    """
    from ultramem.training import load_config
    from ultramem.training import train as run

    settings = load_config(config, context.args)
    result = run(settings, overwrite=overwrite, from_checkpoint=from_checkpoint, verbose=verbose)
    if int(os.environ.get("RANK", 0)) == 0:
        hints = {
            "interrupted": "; run the same command again to resume",
            "already finished": "; evaluate it with `ultramem evaluate`, or train again with --overwrite",
        }
        typer.echo(f"{result.status} at step {result.step}: {result.directory}{hints.get(result.status, '')}")


def evaluate(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            help="Run directory (latest checkpoint) or RUN/stepN; several are compared side by side.",
            metavar="CHECKPOINT",
        ),
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Evaluate tasks instead of the loss: table3, memory or single tasks; repeatable or comma-separated."
        ),
    ] = None,
    max_questions: Annotated[
        int | None,
        typer.Option(help="Maximum number of questions per task, or per part of a memory task; default: all."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Directory of token files; or a token file, repeatable. Default: the run's own data."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split to evaluate on: train or heldout; default: heldout.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the --data files: uint16 or uint32; default: as in training.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Maximum number of tokens, as whole sequences spread evenly over the split; default: all."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences per batch; default: about 4096 tokens, for tasks 8192.")
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens per sequence, or for tasks the maximum context length; default: as in training."),
    ] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu or cuda.")] = "auto",
    unigram: Annotated[
        bool | None,
        typer.Option(
            "--unigram/--no-unigram",
            help="Compare with the unigram model of the train split, which is read for it; default: if there is one.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSON file to write, for a single checkpoint. Default: RUN/tasks.json, or RUN/evaluation.json for the "
            "run's own held-out data."
        ),
    ] = None,
) -> None:
    """Evaluate checkpoints: loss, perplexity and bits per byte, or accuracy on tasks.

    The token files are cut into sequences that do not overlap. Each token of a sequence except the first is predicted
    once, from the tokens before it. The loss is the mean cross-entropy in nats per token.
    """
    from ultramem.evaluation.side_by_side import show_losses, show_tasks
    from ultramem.runs.layout import is_runs_own

    if output is not None and len(checkpoints) > 1:
        raise ConfigError(f"--output={output}: needs a single checkpoint; leave it out to write a file to each run")
    if output is not None and is_runs_own(output):
        raise ConfigError(f"--output={output}: must not be a run's own file; choose another, or leave it out")
    shared: dict[str, Any] = {
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "device": device,
        "output": output,
    }
    if tasks:
        of_loss: dict[str, Any] = {"data": data or None, "split": split, "dtype": dtype, "max-tokens": max_tokens}
        refuse({**of_loss, "unigram" if unigram else "no-unigram": unigram}, "leave it out with --tasks")
        show_tasks(checkpoints, tasks, max_questions=max_questions, **shared)
    else:
        refuse({"max-questions": max_questions}, "use it with --tasks")
        of_loss = {"split": split, "dtype": dtype, "max_tokens": max_tokens, "unigram": unigram}
        show_losses(checkpoints, data or (), **of_loss, **shared)


def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Run directory (latest checkpoint) or RUN/stepN.", metavar="CHECKPOINT")
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Text to continue; default: the model starts a new document.", metavar="PROMPT"),
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Text file to use as a further prompt.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens to generate; fewer if the document ends.")
    ] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most probable tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the smallest set of tokens with this total probability.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed for the first sample of each prompt; further samples use the seeds after it.")
    ] = 0,
    num_samples: Annotated[int, typer.Option(help="Number of samples per prompt.", min=1, max=2**20)] = 1,
    device: Annotated[str, typer.Option(help="Device: auto, cpu or cuda.")] = "auto",
    save: Annotated[
        bool, typer.Option("--save", help="Append the samples to RUN/samples.json, for the report.")
    ] = False,
) -> None:
    """Generate text with a checkpoint."""
    from ultramem.evaluation import SamplingConfig, read_prompt, show_samples

    config = SamplingConfig(temperature, top_k, top_p, seed, max_new_tokens)
    texts = [*(prompts or ()), *([read_prompt(prompt_file)] if prompt_file else ())]
    show_samples(checkpoint, texts, config, num_samples=num_samples, device=device, save=save)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directory; several are compared.", metavar="RUN")],
    output: Annotated[
        Path | None, typer.Option(help="HTML file to write; default for a single run: RUN/report.html.")
    ] = None,
) -> None:
    """Write an HTML report of a training run, or a comparison of several."""
    from ultramem.report import write_report

    typer.echo(f"report written to {write_report(runs, output)}")
