"""Commands that make training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ultramem.errors import InterruptedWorkError


def tokenize(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Files and directories: txt, jsonl (also .gz, .zst), parquet, source trees."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write. It appears only when complete.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A tokenizer.json, a directory with one, or a tokenizer's name.", metavar="NAME_OR_FILE"),
    ] = None,
    train_bpe: Annotated[
        int | None, typer.Option(help="Train a byte-level BPE with this many tokens instead.", metavar="SIZE")
    ] = None,
    eos_token: Annotated[str | None, typer.Option(help="Token that ends a document.")] = None,
    eos_id: Annotated[int | None, typer.Option(help="Id of the token that ends a document.")] = None,
    pad_token: Annotated[str | None, typer.Option(help="Padding token.")] = None,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    separator: Annotated[str | None, typer.Option(help="Separator between documents in .txt files.")] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of files to read from directories, such as '*.py'; repeatable.", metavar="PATTERN"),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of files to leave out; repeatable.", metavar="PATTERN")
    ] = None,
    heldout: Annotated[float, typer.Option(help="Share of the documents held out for evaluation.")] = 0.02,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed for the choice of held-out documents and the BPE's sample. Documents keep their order."
        ),
    ] = 0,
    processes: Annotated[int, typer.Option(help="Number of processes; does not change the result.")] = 1,
    shard_tokens: Annotated[int, typer.Option(help="Maximum number of tokens per token file.")] = 2**28,
    max_size: Annotated[
        str | None, typer.Option(help="Maximum amount of text to read, such as 2MB or 500MiB.", metavar="SIZE")
    ] = None,
    near_duplicates: Annotated[
        float | None,
        typer.Option(help="Leave out documents at least this similar to an earlier one, such as 0.7.", metavar="SHARE"),
    ] = None,
    on_error: Annotated[
        str, typer.Option(help="What to do with a broken record: stop, or skip and count it.", metavar="stop|skip")
    ] = "stop",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished output.")] = False,
) -> None:
    """Tokenize text into token files for training and evaluation."""
    from ultramem.data.documents import parse_size
    from ultramem.data.tokenize import TokenizeConfig, print_summary
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
        on_error=on_error,  # type: ignore[arg-type]
        overwrite=overwrite,
    )
    try:
        print_summary(run(config))
    except KeyboardInterrupt:
        raise InterruptedWorkError(f"interrupted: {output} was not written; run the same command again") from None


def write_facts(
    file: Annotated[Path, typer.Argument(help="JSON lines file to write, such as facts.jsonl.", metavar="FILE")],
    text_field: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write made-up facts to train on; `evaluate --tasks facts` tests whether a checkpoint knows them.

    2,048 facts are stated 1, 2, 4 ... or 128 times each, as Python code in several forms; 256 more are never stated.
    The file has about 1.1 million tokens and is always the same. Tokenize it together with your training text.
    """
    from ultramem.data.facts import write_facts as run

    typer.echo(f"{run(file, text_field, overwrite):,} documents written to {file}")
