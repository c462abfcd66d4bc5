"""Commands that export, fine-tune and import models."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ultramem.cli.options import refuse
from ultramem.errors import UltraMemError

Directory = Annotated[Path, typer.Argument(help="Directory to write.", metavar="DIR")]
Dtype = Annotated[str, typer.Option(help="Dtype of the parameters: float32, bfloat16 or float16.")]
ShardSize = Annotated[str, typer.Option(help="Maximum size of a safetensors file.", metavar="SIZE")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing model in the directory.")]


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="Run directory (latest checkpoint) or RUN/stepN.", metavar="CHECKPOINT")
    ],
    directory: Directory,
    dtype: Dtype = "float32",
    max_shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Export a checkpoint to a directory that transformers loads."""
    with _needing("train,hf"):
        from ultramem.convert.export import export as run

    result = run(checkpoint, directory, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    typer.echo(f"step {result.step} written to {result.directory}")
    if not result.has_tokenizer:
        typer.echo("exported without a tokenizer, as the run has none")


def finetune(
    model: Annotated[Path, typer.Argument(help="Transformers directory with model and tokenizer.", metavar="MODEL")],
    data: Annotated[
        list[Path],
        typer.Argument(help="Documents to learn: txt, jsonl (also .gz, .zst), parquet, source trees.", metavar="DATA"),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write. It appears only when complete.")],
    background: Annotated[
        list[Path] | None,
        typer.Option(help="Documents that the model must not forget, for method sparse to compare with; repeatable."),
    ] = None,
    heldout: Annotated[
        list[Path] | None,
        typer.Option(help="Other documents of that kind, to measure the loss before and after; repeatable."),
    ] = None,
    memory: Annotated[
        Path | None,
        typer.Option(help="Directory written by save_memory; its memory is attached to a model without one."),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    include: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of files to read from directories, such as '*.py'; repeatable.", metavar="PATTERN"),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="What to train: a few table rows (sparse), all parameters (full), or LoRA.",
            metavar="sparse|full|lora",
        ),
    ] = "sparse",
    rows: Annotated[
        int | None,
        typer.Option(help="Maximum number of rows of each table to train per step, for method sparse; default: 4096."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA matrices, for method lora; default: 8.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of optimizer steps.")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Number of passes over the data, instead of --steps; default: 1.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 32,
    sequence_length: Annotated[
        int, typer.Option(help="Maximum number of tokens per sequence; longer documents are cut.")
    ] = 256,
    learning_rate: Annotated[
        float | None, typer.Option(help="Constant learning rate; default: depends on method and optimizer.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="Optimizer.", metavar="sgd|adamw")] = "adamw",
    background_batches: Annotated[
        int | None, typer.Option(help="Maximum number of batches of the background to read; default: 1000.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for the order of the data and LoRA's initial values.")] = 0,
    device: Annotated[str, typer.Option(help="Device: auto, cpu or cuda.")] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a model on new documents, by default with sparse memory fine-tuning.

    Sparse memory fine-tuning (arXiv:2510.15103) trains in each step only the table rows that the batch reads unusually
    often, compared with the background. All other parameters stay as they are, so the model forgets little.
    """
    with _needing("finetune"):
        from ultramem.finetuning import FinetuneConfig
        from ultramem.finetuning import finetune as run

    of_sparse = {"rows": rows, "background-batches": background_batches}
    for name, options in {"sparse": of_sparse, "lora": {"rank": rank}}.items():
        if method != name:
            refuse(options, f"it is for --method {name}")
    given = {"rows": rows, "rank": rank, "background_batches": background_batches}
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
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        optimizer=optimizer,  # type: ignore[arg-type]
        seed=seed,
        device=device,
        **{name: value for name, value in given.items() if value is not None},
    )
    run(config, overwrite=overwrite).print_table()
    typer.echo(f"written to {output}")


def import_olmo(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Directory of an unsharded checkpoint: config.yaml with model.pt or model.safetensors.",
            metavar="CHECKPOINT",
        ),
    ],
    directory: Directory,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A tokenizer.json, a directory with one, or a tokenizer's name.", metavar="NAME_OR_FILE"),
    ] = None,
    dtype: Dtype = "float32",
    max_shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint of the published UltraMem code to a directory that transformers loads."""
    with _needing("train,hf"):
        from ultramem.convert.export import import_published

    import_published(
        checkpoint, directory, tokenizer=tokenizer, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite
    )
    typer.echo(f"written to {directory}")


def import_flags(
    flags: Annotated[
        list[str], typer.Argument(help="Command line of the published code, or its flags.", metavar="FLAGS")
    ],
) -> None:
    """Translate training flags of the published UltraMem code to a run configuration, and print it."""
    from ultramem.convert.published_flags import translate_flags

    typer.echo(translate_flags(flags[0] if len(flags) == 1 else shlex.join(flags)), nl=False)


@contextmanager
def _needing(extra: str) -> Iterator[None]:
    """Wrap imports of packages that an extra installs.

    Raises:
        UltraMemError: a package is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise UltraMemError(
            f"this command needs the package {error.name}; install it with: pip install 'ultramem[{extra}]'"
        ) from error
