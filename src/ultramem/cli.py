"""The `ultramem` command. Each subcommand checks its arguments and calls one function elsewhere."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from ultramem.errors import ConfigError, UltraMemError

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
except ImportError:  # `pip install ultramem` alone has no command line tools
    sys.exit("ultramem: the command line needs more packages; install them with: pip install 'ultramem[train]'")

app = typer.Typer(
    help="Sparse memory layers for language models.", no_args_is_help=True, pretty_exceptions_enable=False
)


@app.callback()
def callback() -> None:
    """Sparse memory layers for language models."""
    logging.getLogger("olmo_core.nn.attention.te_attn_api").setLevel(logging.ERROR)  # it warns of a missing extra


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several make a comparison.", metavar="RUN")],
    output: Annotated[
        Path | None, typer.Option(help="File to write; for a single run the default is RUN/report.html.")
    ] = None,
) -> None:
    """Write an HTML page about a training run, or one that compares several."""
    from ultramem.report import write_report

    typer.echo(f"report written to {write_report(runs, output)}")


@app.command()
def tokenize(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Files and directories: txt, jsonl (also .gz, .zst), parquet, source trees."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write, made whole or not at all.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.json, directory with one, or name.", metavar="NAME_OR_FILE")
    ] = None,
    train_bpe: Annotated[
        int | None, typer.Option(help="Train a byte-level BPE of that many tokens instead.", metavar="SIZE")
    ] = None,
    eos_token: Annotated[str | None, typer.Option(help="Token that ends a document.")] = None,
    eos_id: Annotated[int | None, typer.Option(help="The same, by id.")] = None,
    pad_token: Annotated[str | None, typer.Option(help="Padding token.")] = None,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    separator: Annotated[str | None, typer.Option(help="What stands between the documents of a .txt file.")] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Files to take from directories, such as '*.py'; repeatable.", metavar="PATTERN"),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Files to leave out; repeatable.", metavar="PATTERN")
    ] = None,
    heldout: Annotated[float, typer.Option(help="Share of the documents kept for evaluation.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Chooses held-out documents and the BPE's sample; the order is kept.")] = 0,
    processes: Annotated[int, typer.Option(help="Processes; the result does not depend on it.")] = 1,
    shard_tokens: Annotated[int, typer.Option(help="Most tokens in one file.")] = 2**28,
    max_size: Annotated[
        str | None, typer.Option(help="Most text to take, such as 2MB or 500MiB.", metavar="SIZE")
    ] = None,
    near_duplicates: Annotated[
        float | None,
        typer.Option(help="Leave out documents that share so much with an earlier one, such as 0.7.", metavar="SHARE"),
    ] = None,
    on_error: Annotated[
        str, typer.Option(help="At a broken record: stop, or skip and count it.", metavar="stop|skip")
    ] = "stop",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished output.")] = False,
) -> None:
    """Turn text into token files for training and evaluation."""
    from ultramem.data.documents import parse_size
    from ultramem.data.summary import print_summary
    from ultramem.data.tokenize import TokenizeConfig
    from ultramem.data.tokenize import tokenize as run

    config = TokenizeConfig(
        sources=tuple(sources),
        output=output,
        tokenizer=tokenizer,
        train_bpe=train_bpe,
        eos_token=eos_token,
        eos_id=eos_id,
        pad_token=pad_token,
        text_field=text_field,
        separator=separator,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        heldout=heldout,
        seed=seed,
        processes=processes,
        shard_tokens=shard_tokens,
        max_size=None if max_size is None else parse_size(max_size),
        near_duplicates=near_duplicates,
        on_error=on_error,
        overwrite=overwrite,
    )
    try:
        print_summary(run(config))
    except KeyboardInterrupt:
        raise UltraMemError(f"interrupted: {output} was not written; run the same command again") from None


@app.command()
def write_facts(
    file: Annotated[Path, typer.Argument(help="JSON lines to write, such as facts.jsonl.", metavar="FILE")],
    text_field: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write made-up facts to train with, which `evaluate --tasks facts` asks a checkpoint for.

    Each of 2,048 facts is stated 1, 2, 4 ... or 128 times, in several forms of Python, for about 1.1 million tokens
    in all. The file is always the same. Tokenize it together with the text that the model is to learn.
    """
    from ultramem.data.facts import write_facts as run

    typer.echo(f"{run(file, text_field, overwrite):,} documents written to {file}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
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


@app.command()
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
    from ultramem.evaluation import evaluate as run
    from ultramem.evaluation import evaluate_tasks, find_checkpoint, print_losses, print_task_table

    if output is not None and len(checkpoints) > 1:
        raise ConfigError(f"--output={output}: is for one checkpoint; leave it out, each run gets a file of its own")
    written: list[Path] = []
    if tasks:
        of_data = {"data": data or None, "split": None if split == "heldout" else split, "dtype": dtype}
        _refuse(of_data, "leave it out with --tasks")
        _refuse({"max-tokens": max_tokens, "no-unigram": None if unigram else True}, "leave it out with --tasks")
        results = []
        for result in evaluate_tasks(
            checkpoints,
            tasks,
            max_questions=max_questions,
            batch_size=batch_size,
            sequence_length=sequence_length,
            device=device,
        ):
            results.append(result)
            written.append(result.save(output))
        print_task_table(results)
    else:
        _refuse({"max-questions": max_questions}, "it is for --tasks")
        for checkpoint in checkpoints:
            find_checkpoint(checkpoint)  # all mistakes come before the work
        evaluations = []
        for checkpoint in checkpoints:
            evaluation = run(
                checkpoint,
                data or (),
                split=split,
                dtype=dtype,
                max_tokens=max_tokens,
                batch_size=batch_size,
                sequence_length=sequence_length,
                device=device,
                unigram=unigram,
            )
            evaluations.append(evaluation)
            if output or evaluation.split == "heldout":
                written.append(evaluation.save(output))
        print_losses(evaluations)
    for path in written:
        typer.echo(f"written to {path}")


def _refuse(options: Mapping[str, object], remedy: str) -> None:
    """An error about the first option that is given."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name}: has no meaning here; {remedy}")


@app.command()
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
    from ultramem.evaluation import SamplingConfig, TextGenerator, print_samples, read_prompt, save_samples

    config = SamplingConfig(temperature, top_k, top_p, seed, max_new_tokens)
    texts = [*(prompts or ()), *([read_prompt(prompt_file)] if prompt_file else ())] or [""]
    generator = TextGenerator.from_checkpoint(checkpoint, device)
    samples = print_samples(generator, texts, config, num_samples)
    if save:
        typer.echo(f"added to {save_samples(generator.run, samples)}")


@app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="Run directory, for its latest checkpoint, or RUN/stepN.", metavar="CHECKPOINT")
    ],
    directory: Annotated[Path, typer.Argument(help="Directory to write.", metavar="DIR")],
    dtype: Annotated[str, typer.Option(help="Of the parameters: float32, bfloat16 or float16.")] = "float32",
    max_shard_size: Annotated[str, typer.Option(help="Of one safetensors file.", metavar="SIZE")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in the directory.")] = False,
) -> None:
    """Write a checkpoint as a directory that transformers loads."""
    with _needing("train,hf"):
        from ultramem.convert.export import export as run

    result = run(checkpoint, directory, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    typer.echo(f"step {result.step} written to {result.directory}")
    if not result.has_tokenizer:
        typer.echo("without a tokenizer: the run has none")


@app.command()
def import_olmo(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Unsharded checkpoint: config.yaml with model.pt or model.safetensors.", metavar="CHECKPOINT"
        ),
    ],
    directory: Annotated[Path, typer.Argument(help="Directory to write.", metavar="DIR")],
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.json, directory with one, or name.", metavar="NAME_OR_FILE")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the parameters: float32, bfloat16 or float16.")] = "float32",
    max_shard_size: Annotated[str, typer.Option(help="Of one safetensors file.", metavar="SIZE")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in the directory.")] = False,
) -> None:
    """Turn a checkpoint of the published UltraMem code into a directory that transformers loads."""
    with _needing("train,hf"):
        from ultramem.convert.export import import_published

    import_published(
        checkpoint, directory, tokenizer=tokenizer, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite
    )
    typer.echo(f"written to {directory}")


@app.command()
def finetune(
    model: Annotated[Path, typer.Argument(help="Transformers directory with a tokenizer.", metavar="MODEL")],
    data: Annotated[
        list[Path],
        typer.Argument(help="New documents: txt, jsonl (also .gz, .zst), parquet, source trees.", metavar="DATA"),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write, made whole or not at all.")],
    background: Annotated[
        list[Path] | None,
        typer.Option(help="Documents that the model must not forget, to choose rows by; repeatable."),
    ] = None,
    heldout: Annotated[
        list[Path] | None,
        typer.Option(help="Other such documents, whose loss before and after is shown; repeatable."),
    ] = None,
    memory: Annotated[
        Path | None, typer.Option(help="Directory of save_memory, to attach to a model without memory.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    include: Annotated[
        list[str] | None,
        typer.Option(help="Files to take from directories, such as '*.py'; repeatable.", metavar="PATTERN"),
    ] = None,
    method: Annotated[
        str, typer.Option(help="Train few table rows, everything, or LoRA.", metavar="sparse|full|lora")
    ] = "sparse",
    rows: Annotated[int, typer.Option(help="Most rows of each table to train in one step; method sparse.")] = 4096,
    rank: Annotated[int, typer.Option(help="Of the matrices of method lora.")] = 8,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data instead; without both, one.")] = None,
    batch_size: Annotated[int, typer.Option(help="Documents, or pieces of them, in a step.")] = 32,
    sequence_length: Annotated[int, typer.Option(help="Tokens at which documents are cut.")] = 256,
    learning_rate: Annotated[
        float | None, typer.Option(help="Constant; by default one for method and optimiser.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="What trains rows or parameters.", metavar="sgd|adamw")] = "adamw",
    background_batches: Annotated[int, typer.Option(help="Most batches of the background to look at.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the order of the data and of LoRA's initial values.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in the directory.")] = False,
) -> None:
    """Teach a model new documents, by default in those table rows alone that are special to them.

    Sparse memory fine-tuning (arXiv:2510.15103): each step trains the rows that its batch reads unusually often,
    compared with the background. Everything else stays as it is, so that little is forgotten.
    """
    with _needing("finetune"):
        from ultramem.finetuning import FinetuneConfig
        from ultramem.finetuning import finetune as run

    config = FinetuneConfig(
        model=model,
        data=tuple(data),
        output=output,
        memory=memory,
        background=tuple(background or ()),
        heldout=tuple(heldout or ()),
        text_field=text_field,
        include=tuple(include or ()),
        method=method,  # type: ignore[arg-type]
        rows=rows,
        rank=rank,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        optimizer=optimizer,  # type: ignore[arg-type]
        background_batches=background_batches,
        seed=seed,
        device=device,
    )
    run(config, overwrite=overwrite).print_table()
    typer.echo(f"written to {output}")


@app.command(context_settings={"ignore_unknown_options": True})
def import_flags(
    flags: Annotated[
        list[str], typer.Argument(help="The published code's command line or its flags.", metavar="FLAGS")
    ],
) -> None:
    """Print the run configuration that flags of the published UltraMem code describe."""
    from ultramem.convert.published_flags import translate_flags

    typer.echo(translate_flags(flags[0] if len(flags) == 1 else shlex.join(flags)), nl=False)


@contextmanager
def _needing(extra: str) -> Iterator[None]:
    """Around an import of what the extra brings."""
    try:
        yield
    except ImportError as error:
        raise UltraMemError(
            f"this command needs the package {error.name}; install it with: pip install 'ultramem[{extra}]'"
        ) from error


def main() -> None:
    """Run the command; a user's mistake ends in one line on standard error and status 1."""
    try:
        app()
    except UltraMemError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(1)


if __name__ == "__main__":
    main()
