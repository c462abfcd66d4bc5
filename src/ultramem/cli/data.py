"""Commands that make training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ultramem.errors import UltraMemError


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
    from ultramem.data.terminal import print_summary
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
        on_error=on_error,  # type: ignore[arg-type]
        overwrite=overwrite,
    )
    try:
        print_summary(run(config))
    except KeyboardInterrupt:
        raise UltraMemError(f"interrupted: {output} was not written; run the same command again") from None


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
