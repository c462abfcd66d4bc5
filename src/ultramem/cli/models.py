"""Commands that bring models into other forms, teach them more, or take over those of the published code."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ultramem.errors import UltraMemError

Directory = Annotated[Path, typer.Argument(help="Directory to write.", metavar="DIR")]
Dtype = Annotated[str, typer.Option(help="Of the parameters: float32, bfloat16 or float16.")]
ShardSize = Annotated[str, typer.Option(help="Of one safetensors file.", metavar="SIZE")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the model in the directory.")]


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="Run directory, for its latest checkpoint, or RUN/stepN.", metavar="CHECKPOINT")
    ],
    directory: Directory,
    dtype: Dtype = "float32",
    max_shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint as a directory that transformers loads."""
    with _needing("train,hf"):
        from ultramem.convert.export import export as run

    result = run(checkpoint, directory, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    typer.echo(f"step {result.step} written to {result.directory}")
    if not result.has_tokenizer:
        typer.echo("without a tokenizer: the run has none")


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
    overwrite: Overwrite = False,
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


def import_olmo(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Unsharded checkpoint: config.yaml with model.pt or model.safetensors.", metavar="CHECKPOINT"
        ),
    ],
    directory: Directory,
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.json, directory with one, or name.", metavar="NAME_OR_FILE")
    ] = None,
    dtype: Dtype = "float32",
    max_shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Turn a checkpoint of the published UltraMem code into a directory that transformers loads."""
    with _needing("train,hf"):
        from ultramem.convert.export import import_published

    import_published(
        checkpoint, directory, tokenizer=tokenizer, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite
    )
    typer.echo(f"written to {directory}")


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
