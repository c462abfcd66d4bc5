"""Export of checkpoints to directories that transformers loads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from ultramem.convert.published_checkpoint import read_published_checkpoint
from ultramem.convert.transformers_models import to_transformers
from ultramem.data.documents import parse_size
from ultramem.data.tokenizers import ChosenTokenizer, load_tokenizer
from ultramem.errors import ConfigError, UltraMemError
from ultramem.files.directories import partial_directory
from ultramem.files.json_files import read_json_object
from ultramem.files.whole_files import write_text
from ultramem.hosts.olmo_core import model_statistics
from ultramem.hosts.transformers.files import MODEL_DIRECTORY, save_checksums
from ultramem.runs.checkpoints import Checkpoint, find_checkpoint
from ultramem.runs.layout import EVALUATION_NAME, TOKENIZER_NAME
from ultramem.runs.summary import read_summary
from ultramem.runs.tokenizer import find_tokenizer

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ExportResult:
    """The written directory, the training step of its checkpoint, and whether the run had a tokenizer."""

    directory: Path
    step: int
    has_tokenizer: bool


def export(
    checkpoint: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> ExportResult:
    """Write a checkpoint as a transformers directory: safetensors, configurations, tokenizer, model card.

    A run on token files without a tokenizer is exported without one.

    Args:
        checkpoint: run directory, for its latest complete checkpoint, or a checkpoint's own directory.
        directory: directory to write. It appears only when complete.
        dtype: dtype of the parameters. In float32 they are the checkpoint's, bit for bit.
        max_shard_size: maximum size of a safetensors file, such as `5GB`.
        overwrite: whether to replace an earlier export.

    Raises:
        ConfigError: `dtype` or `max_shard_size` is invalid.
        UltraMemError: the checkpoint or its tokenizer is missing or damaged, or the directory is not empty or cannot
            be written.
    """
    shard_bytes = _checked(dtype, max_shard_size)
    found = find_checkpoint(checkpoint)
    config = found.config
    with partial_directory(Path(directory).absolute(), overwrite, MODEL_DIRECTORY) as partial:
        tokenizer = None
        if (found.run / TOKENIZER_NAME).is_file() or config.data.directory is not None:
            tokenizer = _for_transformers(find_tokenizer(found), model_max_length=config.data.sequence_length)
        model = to_transformers(
            found.load_model("cpu").state_dict(),
            config.model,
            max_position_embeddings=config.data.sequence_length,
            **_token_ids(tokenizer),
        )
        _write(model, tokenizer, partial, dtype, shard_bytes)
        write_text(partial / "README.md", model_card(found, tokenizer is not None))
        save_checksums(partial)
    return ExportResult(Path(directory), found.step, tokenizer is not None)


def import_published(
    checkpoint: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    tokenizer: str | None = None,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Convert an unsharded checkpoint of the published UltraMem code to a transformers directory.

    Args:
        checkpoint: directory with `config.yaml` and `model.pt` or `model.safetensors`.
        directory: directory to write. It appears only when complete.
        tokenizer: name or path, as in `load_tokenizer`; None for no tokenizer.
        dtype, max_shard_size, overwrite: as in `export`.

    Raises:
        ConfigError, UltraMemError: the checkpoint or the tokenizer cannot be read or does not fit, or as in `export`.
    """
    shard_bytes = _checked(dtype, max_shard_size)
    with partial_directory(Path(directory).absolute(), overwrite, MODEL_DIRECTORY, [Path(checkpoint)]) as partial:
        config, state = read_published_checkpoint(Path(checkpoint))
        chosen = None if tokenizer is None else _for_transformers(load_tokenizer(tokenizer))
        if chosen is not None and len(chosen) > config.vocab_size:
            raise UltraMemError(
                f"tokenizer {tokenizer} has {len(chosen)} tokens, but the model {config.vocab_size}; give its own"
            )
        _write(to_transformers(state, config, **_token_ids(chosen)), chosen, partial, dtype, shard_bytes)
        save_checksums(partial)


def _checked(dtype: str, max_shard_size: str) -> int:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: must be one of {', '.join(DTYPES)}")
    return parse_size(max_shard_size, "max_shard_size")


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None, directory: Path, dtype: str, shard_bytes: int
) -> None:
    transformers_logging.disable_progress_bar()
    model = model.to(getattr(torch, dtype))  # also what the checkpoint has in another dtype
    if tokenizer is not None:
        # Rows of the embedding beyond the tokenizer's tokens were never trained.
        unused = list(range(len(tokenizer), model.config.vocab_size))
        model.generation_config = GenerationConfig(**_token_ids(tokenizer), suppress_tokens=unused or None)
        tokenizer.save_pretrained(directory)
    model.save_pretrained(directory, max_shard_size=shard_bytes)


def _token_ids(tokenizer: PreTrainedTokenizerFast | None) -> dict[str, int]:
    if tokenizer is None:
        return {}
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def _for_transformers(chosen: ChosenTokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """Convert for transformers; the tokenizer adds no tokens of its own, as in training, and pads on the left."""
    tokenizer = chosen.tokenizer
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # adds nothing
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=tokenizer.id_to_token(chosen.eos_token_id),
        pad_token=tokenizer.id_to_token(chosen.pad_token_id),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **options,
    )


def model_card(checkpoint: Checkpoint, has_tokenizer: bool) -> str:
    """Text of the directory's README: the model, the run's figures, how to load it."""
    config, model = checkpoint.config, checkpoint.config.model
    counts = model_statistics(model, config.data.sequence_length)
    rows = [
        ("system", model.system),
        ("parameters", f"{counts.total:,}"),
        ("active parameters", f"{counts.active:,}"),
        ("blocks, width, attention heads", f"{model.num_blocks}, {model.d_model}, {model.num_heads}"),
        ("sequence length", f"{config.data.sequence_length:,}"),
        ("training step", f"{checkpoint.step:,} of {config.trainer.total_steps:,}"),
        ("training tokens", f"{checkpoint.step * config.trainer.batch_size:,}"),
        ("learning rate", f"{config.optimizer.learning_rate:g}"),
        *_figures(checkpoint),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    imports = "import ultramem.hosts.transformers  # registers the model\n" if model.memory is not None else ""
    tokenizer = (
        "tokenizer = AutoTokenizer.from_pretrained(directory)\n"
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n"
        if has_tokenizer
        else ""
    )
    install = "ultramem[hf]" if model.memory is not None else "transformers"
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- ultramem\n- {model.system}\n---\n\n"
        f"# {checkpoint.run.name}\n\nA language model trained with ultramem.\n\n| | |\n| --- | --- |\n{table}\n\n"
        f"It needs `pip install '{install}'`:\n\n"
        f"```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n{imports}"
        'directory = "."  # where this file is\n'
        f"model = AutoModelForCausalLM.from_pretrained(directory)\n{tokenizer}```\n"
    )


def _figures(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Rows with what `train` and `evaluate` recorded in the run directory."""
    rows: list[tuple[str, str]] = []
    summary = read_summary(checkpoint.run)
    if "device" in summary:
        rows.append(("trained on", f"{summary['device']}, PyTorch {summary.get('torch')}"))
    evaluation = read_json_object(checkpoint.run / EVALUATION_NAME)
    of_run = evaluation.get("split", "heldout") == "heldout" and evaluation.get("data") is None
    if of_run and evaluation.get("checkpoint") == checkpoint.name:
        rows += [
            (f"held-out {label}", f"{evaluation[name]:.4f}")
            for name, label in (("loss", "loss"), ("perplexity", "perplexity"), ("bits_per_byte", "bits per byte"))
            if isinstance(evaluation.get(name), float)
        ]
    return rows
