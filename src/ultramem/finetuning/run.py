"""Fine-tuning a model of transformers: the table rows that are special to the new data, everything, or LoRA."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from ultramem.device import autocast, choose_device, has_fast_bfloat16
from ultramem.errors import ConfigError, UltraMemError, first_line
from ultramem.files.whole_directories import partial_directory
from ultramem.files.whole_files import write_text
from ultramem.finetuning.examples import background_batches, collate, make_examples, mean_loss, read_texts
from ultramem.hosts.transformers import detach_memory, load_memory, save_memory
from ultramem.hosts.transformers.files import (
    MODEL_CONFIG_NAME,
    MODEL_CONTENTS,
    load_model_file,
    save_model_file,
)
from ultramem.hosts.transformers.sparse_finetuning import (
    Background,
    OptimizerKind,
    SparseFinetuning,
    count_background,
    find_tables,
)

Method = Literal["sparse", "full", "lora"]
RESULT_NAME = "finetuning.json"
MEMORY_NAME = "memory"
LEARNING_RATES = {
    "sparse": {"sgd": 100.0, "adamw": 3e-3},
    "full": {"sgd": 1e-2, "adamw": 1e-4},
    "lora": {"sgd": 1e-1, "adamw": 1e-3},
}


@dataclass(frozen=True)
class FinetuneConfig:
    """What to fine-tune, on what, and how.

    Attributes:
        model: transformers directory with a tokenizer.
        data: files or directories of new documents.
        output: directory to write.
        memory: directory of `save_memory`, for a model whose memory was attached to it.
        background: documents that the model must not forget, by which method `sparse` chooses rows.
        heldout: documents whose loss shows what was forgotten; not the background's.
        text_field: field of JSON lines that holds the text.
        include: shell patterns of the files to take from directories, such as `*.py`.
        method: `sparse` (arXiv:2510.15103), `full` or `lora` (arXiv:2106.09685).
        rows: most rows of each table that one step of `sparse` trains.
        rank: of the LoRA matrices.
        steps: optimiser steps.
        epochs: passes over the data instead; without both, one.
        batch_size: documents, or pieces of them, in a step.
        sequence_length: tokens at which documents are cut.
        learning_rate: constant; by default one for method and optimiser.
        optimizer: `sgd` or `adamw`. For `sparse` the paper prefers SGD, whose learning rate depends on the model more.
        background_batches: most batches of the background to look at.
        seed: of the order of the data and of LoRA's initial values.
        device: auto, cpu or cuda.

    Raises:
        ConfigError: a value cannot work.
    """

    model: Path
    data: tuple[Path, ...]
    output: Path
    memory: Path | None = None
    background: tuple[Path, ...] = ()
    heldout: tuple[Path, ...] = ()
    text_field: str = "text"
    include: tuple[str, ...] = ()
    method: Method = "sparse"
    rows: int = 4096
    rank: int = 8
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 32
    sequence_length: int = 256
    learning_rate: float | None = None
    optimizer: OptimizerKind = "adamw"
    background_batches: int = 1000
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in (("method", get_args(Method)), ("optimizer", get_args(OptimizerKind))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)}: must be one of {', '.join(choices)}")
        for name in ("rows", "rank", "steps", "epochs", "batch_size", "sequence_length", "background_batches"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate={self.learning_rate}: must be above 0 and finite")
        if self.sequence_length < 2:
            raise ConfigError(f"sequence_length={self.sequence_length}: must be at least 2")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed}: must be from 0 to 2**32 - 1")
        if self.steps and self.epochs:
            raise ConfigError(f"steps={self.steps} and epochs={self.epochs}: give one of them")
        if self.method == "sparse" and not self.background:
            raise ConfigError("method=sparse: chooses rows by a background; give documents of what the model knows")

    @property
    def chosen_learning_rate(self) -> float:
        """The learning rate, or that of method and optimiser."""
        return self.learning_rate or LEARNING_RATES[self.method][self.optimizer]


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropies in nats per token.

    Attributes:
        new: on the data.
        heldout: on the held-out documents, or None.
    """

    new: float
    heldout: float | None


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning changed.

    Attributes:
        before, after: losses.
        steps: optimiser steps.
        trained_rows: table rows that were trained.
        table_rows: all rows of all tables.
        trained_parameters: parameters that were trained.
        parameters: all parameters of the model.
    """

    before: Losses
    after: Losses
    steps: int
    trained_rows: int
    table_rows: int
    trained_parameters: int
    parameters: int

    def print_table(self) -> None:
        """Print it to the terminal."""
        table = Table()
        for column in ("loss (nats per token)", "before", "after"):
            table.add_column(column, justify="left" if column.startswith("loss") else "right")
        table.add_row("new data", f"{self.before.new:.4f}", f"{self.after.new:.4f}")
        if self.before.heldout is not None:
            table.add_row("held-out data", f"{self.before.heldout:.4f}", f"{self.after.heldout:.4f}")
        table.caption = (
            f"{self.steps:,} steps; trained {self.trained_rows:,} of {self.table_rows:,} table rows, "
            f"{self.trained_parameters:,} of {self.parameters:,} parameters"
        )
        Console().print(table)


def finetune(config: FinetuneConfig, *, overwrite: bool = False) -> FinetuneResult:
    """Fine-tune a model and write it as a transformers directory, with `finetuning.json`.

    LoRA's matrices are merged into the weights. A memory that was attached is written to the directory's `memory/`.

    Args:
        config: what to do.
        overwrite: replace a model that is in the output directory.

    Raises:
        ConfigError: the device is not there.
        UltraMemError: model, data or output is missing or does not fit; nothing is written then.
    """
    device = choose_device(config.device)
    with partial_directory(config.output.absolute(), overwrite, MODEL_CONFIG_NAME, MODEL_CONTENTS) as partial:
        new, background, heldout = (
            read_texts(paths, config.text_field, config.include) if paths else []
            for paths in (config.data, config.background, config.heldout)
        )
        _quieten()
        set_seed(config.seed)
        model, tokenizer = load_model(config.model, config.memory)
        if config.method == "sparse":
            find_tables(model)
        model.to(device)
        new_examples, background_examples, heldout_examples = (
            make_examples(texts, tokenizer, config.sequence_length) for texts in (new, background, heldout)
        )

        def losses() -> Losses:
            return Losses(
                mean_loss(model, new_examples, config.batch_size),
                mean_loss(model, heldout_examples, config.batch_size) if heldout else None,
            )

        before = losses()
        background_reads = None
        if config.method == "sparse":
            background_reads = read_background(model, config, new_examples, background_examples)
        run = Finetuning(model, config, new_examples, background_reads)
        run.train(partial)
        model = run.merged()
        result = FinetuneResult(before, losses(), run.steps, *run.counts())
        if not math.isfinite(result.after.new):
            raise UltraMemError("the loss is no longer finite: training diverged; lower --learning-rate")
        if config.method == "sparse" and not result.trained_rows:
            raise UltraMemError("no row is special to the data: every background batch reads them all; give fewer")
        _save(model, tokenizer, partial, attached=config.memory is not None)
        write_text(partial / RESULT_NAME, json.dumps(_content(config, result), indent=2) + "\n")
    return result


def read_background(
    model: PreTrainedModel,
    config: FinetuneConfig,
    examples: Sequence[dict[str, list[int]]],
    background: Sequence[dict[str, list[int]]],
) -> Background:
    """What the model reads of the background, in batches of as many tokens as the examples' have on average.

    Raises:
        UltraMemError: the model has no memory, or the background is shorter than one batch.
    """
    tokens = sum(len(example["input_ids"]) for example in examples)
    batches = background_batches(
        background,
        batch_tokens=tokens * min(config.batch_size, len(examples)) // len(examples),
        sequence_length=config.sequence_length,
        batches=config.background_batches,
        seed=config.seed,
        device=model.device,
    )
    with autocast(model.device):
        return count_background(model, batches)


class Finetuning:
    """One run of a method, in the way that the command and the benchmark share.

    Args:
        model: on its device, with parameters in float32; it is changed.
        config: says how; of its files nothing is read.
        examples: to train on.
        background: of `read_background`, for method `sparse`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: FinetuneConfig,
        examples: Sequence[dict[str, list[int]]],
        background: Background | None = None,
    ) -> None:
        self.model, self.config, self.examples = model, config, examples
        self.steps = 0
        self._sparse: SparseFinetuning | None = None
        self._adapted: Any = None
        self._parameters = sum(parameter.numel() for parameter in model.parameters())
        if background is not None:
            self._sparse = SparseFinetuning(
                model,
                background,
                rows=config.rows,
                learning_rate=config.chosen_learning_rate,
                optimizer=config.optimizer,
            )
        elif config.method == "lora":
            self._adapted = add_lora(model, config.rank)
        self._trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def train(self, directory: Path, callbacks: Sequence[TrainerCallback] = ()) -> None:
        """Run transformers' Trainer; `directory` is one that it may write to."""
        config, device = self.config, self.model.device
        arguments = TrainingArguments(
            output_dir=str(directory),
            max_steps=config.steps or -1,
            num_train_epochs=config.epochs or 1,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.chosen_learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch" if config.optimizer == "adamw" else "sgd",
            max_grad_norm=0.0 if self._sparse else 1.0,
            bf16=has_fast_bfloat16(device),
            use_cpu=device.type == "cpu",
            seed=config.seed,
            remove_unused_columns=False,
            dataloader_pin_memory=device.type == "cuda",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        # With several GPUs the Trainer would copy the model to all of them.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = Trainer(
            self._adapted or self.model,
            arguments,
            data_collator=collate,
            train_dataset=self.examples,
            callbacks=[*callbacks, *([self._sparse] if self._sparse else [])],
            optimizers=(self._sparse.optimizer if self._sparse else None, None),
        )
        trainer.remove_callback(PrinterCallback)
        if Console().is_terminal:
            trainer.add_callback(_ProgressBar)
        trainer.train()
        self.steps = trainer.state.global_step

    def merged(self) -> PreTrainedModel:
        """The model; LoRA's matrices are merged into its weights."""
        return self._adapted.merge_and_unload() if self._adapted else self.model

    def counts(self) -> tuple[int, int, int, int]:
        """Table rows that were trained, all of them, parameters that were trained, and all of them."""
        tables = find_tables(self.model) if hasattr(self.model, "memory") else []
        rows = sum(len(table.values) for table in tables)
        if self._sparse:
            trained = self._sparse.optimizer.trained_rows
            width = sum(parameter.shape[1] for parameter in tables[0].parameters())
            return trained, rows, trained * width, self._parameters
        return 0 if self.config.method == "lora" else rows, rows, self._trainable, self._parameters


class _ProgressBar(ProgressCallback):
    def on_log(self, *_: Any, **__: Any) -> None:
        """The losses are printed at the end."""


def load_model(directory: Path, memory: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, with parameters in float32, and its tokenizer.

    Args:
        directory: of transformers.
        memory: of `save_memory`, to attach.

    Raises:
        UltraMemError: one of them is missing or damaged, or the tokenizer has no end-of-text token.
    """
    model = load_model_file(directory, torch.float32)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # of transformers and tokenizers, of any kind
        reason = first_line(error)
        raise UltraMemError(f"the tokenizer in {directory} cannot be loaded ({reason}); put it there") from error
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UltraMemError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, but the model {rows}; put its own there"
        )
    if tokenizer.eos_token_id is None:
        raise UltraMemError(f"the tokenizer in {directory} has no end-of-text token; give its eos_token there")
    if memory is not None:
        load_memory(model, memory).float()
    return model, tokenizer


def add_lora(model: PreTrainedModel, rank: int) -> Any:
    """LoRA (arXiv:2106.09685) on the attention and feed-forward projections of a model, which is changed.

    Raises:
        UltraMemError: peft is not installed, or there is no such projection.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UltraMemError("method=lora needs peft; install it with: pip install peft") from error
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not model.get_output_embeddings()
        and "memory" not in name.split(".")
    ]
    if not targets:
        raise UltraMemError(f"{type(model).__name__} has no linear projections for method=lora; choose another one")
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM"))


def _quieten() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, attached: bool) -> None:
    if attached:
        save_memory(model, directory / MEMORY_NAME)
        detach_memory(model)
    save_model_file(model, directory)
    tokenizer.save_pretrained(directory)


def _content(config: FinetuneConfig, result: FinetuneResult) -> dict[str, Any]:
    settings = {
        name: [str(path) for path in value]
        if isinstance(value, tuple)
        else str(value)
        if isinstance(value, Path)
        else value
        for name, value in asdict(config).items()
    }
    settings["learning_rate"] = config.chosen_learning_rate
    return {"settings": settings, **asdict(result)}
