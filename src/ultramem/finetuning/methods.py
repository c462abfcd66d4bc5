"""The fine-tuning methods (sparse, full, LoRA), with transformers' Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from ultramem.device import autocast, has_fast_bfloat16
from ultramem.errors import UltraMemError
from ultramem.finetuning.config import FinetuneConfig
from ultramem.finetuning.examples import Examples, background_batches, collate
from ultramem.hosts.transformers.sparse_finetuning import Background, SparseFinetuning, count_background, find_tables


def read_background(
    model: PreTrainedModel, config: FinetuneConfig, examples: Examples, background: Examples
) -> Background:
    """Count what the model reads for the background, in batches of as many tokens as training batches on average.

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
    """A run of a method, shared by the command and the benchmark.

    Args:
        model: model on its device, with parameters in float32; it is changed.
        config: configuration, whose files are not read.
        examples: examples to train on.
        background: result of `read_background`, for method `sparse`.
    """

    def __init__(
        self, model: PreTrainedModel, config: FinetuneConfig, examples: Examples, background: Background | None = None
    ) -> None:
        self.model, self.config, self.examples = model, config, examples
        self.steps = 0
        self._parameters = sum(parameter.numel() for parameter in model.parameters())
        self._adapted = add_lora(model, config.rank) if config.method == "lora" else None
        self._sparse: SparseFinetuning | None = None
        if background is not None:
            rate, kind = config.chosen_learning_rate, config.optimizer
            self._sparse = SparseFinetuning(model, background, rows=config.rows, learning_rate=rate, optimizer=kind)
        self._trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def train(self, directory: Path, callbacks: Sequence[TrainerCallback] = ()) -> None:
        """Run transformers' Trainer, which may write to `directory`."""
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
        # The Trainer would copy the model to all GPUs.
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
        """The model, with LoRA's matrices merged into its weights."""
        return self._adapted.merge_and_unload() if self._adapted else self.model

    def counts(self) -> tuple[int, int, int, int]:
        """Trained table rows, all table rows, trained parameters, all parameters."""
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


def add_lora(model: PreTrainedModel, rank: int) -> Any:
    """Add LoRA (arXiv:2106.09685) to the attention and feed-forward projections of a model, which is changed.

    Raises:
        UltraMemError: peft is not installed, or the model has no such projections.
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
        raise UltraMemError(f"{type(model).__name__} has no linear projections for method=lora; choose another method")
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM"))
