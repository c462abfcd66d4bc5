"""Fine-tuning the model in a transformers directory."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Column, Table
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from ultramem.configuration.decoding import encode
from ultramem.data.documents import check_include
from ultramem.device import choose_device
from ultramem.errors import UltraMemError
from ultramem.files.directories import partial_directory
from ultramem.files.whole_files import write_json
from ultramem.finetuning.config import FinetuneConfig
from ultramem.finetuning.examples import make_examples, mean_loss, read_texts
from ultramem.finetuning.methods import Finetuning, read_background
from ultramem.hosts.transformers import detach_memory, save_memory
from ultramem.hosts.transformers.files import MODEL_DIRECTORY, load_model_and_tokenizer, save_checksums
from ultramem.hosts.transformers.sparse_finetuning import find_tables

MEMORY_NAME = "memory"
RESULT_NAME = "finetuning.json"


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropies in nats per token, on the new data and on the held-out documents if there are any."""

    new: float
    heldout: float | None


@dataclass(frozen=True)
class FinetuneResult:
    """The result of fine-tuning.

    Attributes:
        before, after: losses before and after.
        steps: number of optimizer steps.
        trained_rows: number of trained table rows.
        table_rows: number of rows of all tables.
        trained_parameters: number of trained parameters.
        parameters: number of parameters of the model.
    """

    before: Losses
    after: Losses
    steps: int
    trained_rows: int
    table_rows: int
    trained_parameters: int
    parameters: int

    def print_table(self) -> None:
        """Print the result as a table."""
        columns = (Column(name, justify="right") for name in ("before", "after"))
        table = Table("loss (nats per token)", *columns)
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

    With `overwrite` an existing model in the output directory is replaced.

    Raises:
        ConfigError: the device is not available, or a value does not apply.
        UltraMemError: model or data is missing or does not fit, training diverged, or the output cannot be written.
            Nothing is written then.
    """
    device, sparse = choose_device(config.device), config.method == "sparse"
    check_include((*config.data, *config.background, *config.heldout), config.include)
    read = (config.model, *config.data, *config.background, *config.heldout, *filter(None, [config.memory]))
    with partial_directory(config.output.absolute(), overwrite, MODEL_DIRECTORY, read) as partial:
        new, background, heldout = (
            read_texts(paths, config.text_field, config.include) if paths else []
            for paths in (config.data, config.background, config.heldout)
        )
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        logging.getLogger("accelerate").setLevel(logging.ERROR)
        set_seed(config.seed)
        model, tokenizer = load_model_and_tokenizer(config.model, config.memory)
        if sparse:
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
        reads = read_background(model, config, new_examples, background_examples) if sparse else None
        run = Finetuning(model, config, new_examples, reads)
        run.train(partial)
        model = run.merged()
        result = FinetuneResult(before, losses(), run.steps, *run.counts())
        if not math.isfinite(result.after.new):
            raise UltraMemError("the loss is not finite, as training diverged; lower --learning-rate")
        if sparse and not result.trained_rows:
            raise UltraMemError(
                "no row was trained: every background batch reads all rows that the data reads; lower --batch-size"
            )
        if config.memory is not None:
            save_memory(model, partial / MEMORY_NAME)
            detach_memory(model)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        settings = {**encode(config), "learning_rate": config.chosen_learning_rate}
        write_json(partial / RESULT_NAME, {"settings": settings, **asdict(result)})
        save_checksums(partial)
    return result
