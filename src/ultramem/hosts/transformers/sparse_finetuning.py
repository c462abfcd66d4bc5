"""Sparse memory fine-tuning (arXiv:2510.15103): training only the table rows that are specific to the new data.

```python
background = count_background(model, batches)  # batches of text that the model must not forget
sparse = SparseFinetuning(model, background, rows=512, learning_rate=1.0)
arguments = TrainingArguments(max_grad_norm=0, ...)
Trainer(model, arguments, train_dataset=data, callbacks=[sparse], optimizers=(sparse.optimizer, None)).train()
```
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from transformers import PreTrainedModel, TrainerCallback

from ultramem.configuration.field_types import check_least
from ultramem.errors import ConfigError, UltraMemError
from ultramem.hosts.transformers.modes import evaluation_mode
from ultramem.layers import MemoryLayer
from ultramem.memory import Memory
from ultramem.ops.weighted_lookup.reads import Reads
from ultramem.tables.table import Table
from ultramem.tables.trainable import TrainableTable

OptimizerKind = Literal["sgd", "adamw"]


def find_tables(model: nn.Module) -> list[TrainableTable]:
    """All tables of a model's memory, in the order of the layers that read them.

    Raises:
        UltraMemError: the model has no memory layers.
    """
    memory = getattr(model, "memory", None)
    if not isinstance(memory, Memory) or not memory.layers:
        raise UltraMemError(f"{type(model).__name__} has no memory layers with rows to train; attach a memory first")
    return [table for table in memory.tables if isinstance(table, TrainableTable)]


class RowCounter:
    """Counts how often each table row is read, by all layers that share the table, in training or in evaluation mode.

    Reads of padding, according to the `attention_mask`, do not count.
    """

    def __init__(self, model: PreTrainedModel, *, training: bool) -> None:
        self.training = training
        self.mask: Tensor | None = None
        self._model = model
        self._tables = find_tables(model)
        self._counts: dict[Table, Tensor] = {}
        self._attached = ExitStack()

    def attach(self) -> None:
        """Start counting."""
        self.detach()
        for layer in self._model.memory.layers:
            layer.observers.append(self)
            self._attached.callback(layer.observers.remove, self)
        self._attached.enter_context(self._model.register_forward_pre_hook(self._before_pass, with_kwargs=True))

    def detach(self) -> None:
        """Stop counting if it was started."""
        self._attached.close()

    def take(self) -> list[Tensor]:
        """The counts since the last call, for each table (rows,), int64; over all processes if distributed."""
        taken = []
        for table in self._tables:
            counts = self._counts.pop(table, None)
            if counts is None:
                counts = torch.zeros(table.rows, dtype=torch.int64, device=table.values.device)
            if dist.is_initialized():
                dist.all_reduce(counts)
            taken.append(counts)
        return taken

    @torch.no_grad()
    def observe(self, layer: MemoryLayer, reads: Reads, output: Tensor) -> None:
        """Count the reads of a pass, except those of padding; see `ReadObserver`."""
        if layer.training != self.training:
            return
        table, rows = layer.table, reads.rows
        if table not in self._counts:
            self._counts[table] = torch.zeros(table.rows, dtype=torch.int64, device=rows.device)
        read = torch.ones_like(rows)
        if self.mask is not None and self.mask.numel() == rows.shape[0]:
            read = read * self.mask.flatten().bool().to(rows.device).unsqueeze(1)
        self._counts[table].index_add_(0, rows.flatten(), read.flatten())

    def _before_pass(self, _: nn.Module, inputs: Any, options: Mapping[str, Any]) -> None:
        given = inspect.signature(self._model.forward).bind_partial(*inputs, **options)
        self.mask = given.arguments.get("attention_mask")


@dataclass(frozen=True)
class Background:
    """Number of batches of a background corpus; for each table (rows,), int64, how many of them read the row."""

    batches: int
    frequencies: list[Tensor]


@torch.no_grad()
def count_background(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Background:
    """Count for each row the batches of a background corpus that read it.

    Batches are arguments of the model, on its device, each with as many tokens as a training batch will have.

    Raises:
        UltraMemError: the model has no memory, or there is no batch.
    """
    counter = RowCounter(model, training=False)
    number, frequencies = 0, counter.take()
    counter.attach()
    try:
        with evaluation_mode(model):
            for batch in batches:
                model(**batch, use_cache=False)
                number += 1
                frequencies = [total + (counts > 0) for total, counts in zip(frequencies, counter.take(), strict=True)]
    finally:
        counter.detach()
    if not number:
        raise UltraMemError("the background has no batches; give text that the model must not forget")
    return Background(number, frequencies)


def score_rows(counts: Tensor, frequencies: Tensor, batches: int) -> Tensor:
    """TF-IDF of table rows (arXiv:2510.15103, section 3): high for rows read often here but in few background batches.

    Args:
        counts: (rows,), int64, number of reads in the batch.
        frequencies: (rows,), int64, number of background batches that read the row.
        batches: number of background batches.

    Returns:
        (rows,), float32, scores; 0 for rows that are not read, and for rows that all background batches read.
    """
    term_frequency = counts.float() / counts.sum().clamp(min=1)
    return term_frequency * ((batches + 1) / (frequencies + 1).float()).log()


def choose_rows(counts: Tensor, frequencies: Tensor, batches: int, rows: int) -> Tensor:
    """Row numbers (at most `rows`,), int64, of the highest scores; arguments as in `score_rows`.

    Rows with a score of 0 are never chosen.
    """
    scores, numbers = score_rows(counts, frequencies, batches).topk(min(rows, len(counts)))
    return numbers[scores > 0]


class SparseRows(Optimizer):
    """SGD or AdamW (arXiv:1711.05101) on a few rows of tables; all other rows keep their bits.

    Set `rows` before each step. Only rows that were ever trained have optimizer state, in float32; besides this there
    are four bytes per row of the table. AdamW's bias correction uses the number of steps of each row. The gradient
    buffers are as large as the table all the same; the gradients of other rows are not used.

    Args:
        tables: tables whose `values` and `pre_values` are trained; each is a parameter group.
        learning_rate: learning rate of all groups.
        kind: `sgd`, without momentum, or `adamw`.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
        weight_decay: decoupled weight decay of the rows of the step.

    Attributes:
        rows: for each table, (n,), int64, distinct rows to train in the next step, which empties the list.
        kind: `sgd` or `adamw`.

    Raises:
        ConfigError: `kind` is invalid.
    """

    def __init__(
        self,
        tables: Sequence[TrainableTable],
        *,
        learning_rate: float,
        kind: OptimizerKind = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if kind not in get_args(OptimizerKind):
            raise ConfigError(f"kind={kind}: must be one of {', '.join(get_args(OptimizerKind))}")
        defaults = {"lr": learning_rate, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([{"params": list(table.parameters())} for table in tables], defaults)
        self.kind = kind
        self.rows: list[Tensor] = []
        self._trained = [_TrainedRows(kind == "adamw") for _ in tables]

    @property
    def trained_rows(self) -> int:
        """Number of rows that were ever trained."""
        return sum(trained.number for trained in self._trained)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Train the `rows` with their gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if len(self.rows) != len(self.param_groups):
            raise UltraMemError(
                "no rows were chosen for this step; pass the SparseFinetuning to the Trainer as a callback"
            )
        for group, trained, rows in zip(self.param_groups, self._trained, self.rows, strict=True):
            if len(rows) and group["params"][0].grad is not None:
                self._train(rows, group, trained)
        self.rows = []
        return loss

    def _train(self, rows: Tensor, group: dict[str, Any], trained: _TrainedRows) -> None:
        slots = trained.find(rows, group["params"])
        for number, parameter in enumerate(group["params"]):
            update = parameter.grad[rows].float()
            if self.kind == "adamw":
                update = trained.adapt(number, slots, update, group["betas"], group["eps"])
            kept = parameter[rows].float() * (1 - group["lr"] * group["weight_decay"])
            parameter.index_copy_(0, rows, (kept - group["lr"] * update).to(parameter.dtype))

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[misc]
        return state | {"kind": self.kind, "rows": self.rows, "_trained": self._trained}

    def state_dict(self) -> dict[str, Any]:
        """The usual state, and `trained`: for each table the rows that were ever trained, and their state."""
        return {**super().state_dict(), "trained": [trained.state_dict() for trained in self._trained]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        super().load_state_dict(state_dict)
        for trained, state, group in zip(self._trained, state_dict["trained"], self.param_groups, strict=True):
            trained.load_state_dict(state, group["params"])


class _TrainedRows:
    """The `number` rows of a table that were ever trained, each with a slot of its steps and AdamW's averages."""

    def __init__(self, has_averages: bool) -> None:
        self.number = 0
        self._has_averages = has_averages
        self._slots: Tensor | None = None  # (table rows,); made late, as the model may still change its device

    def find(self, rows: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The rows' slots (n,), which are new for new rows; each counts one more step."""
        if self._slots is None:
            device, total = parameters[0].device, len(parameters[0])
            self._slots = torch.full((total,), -1, dtype=torch.int32, device=device)
            self._steps = torch.zeros(0, dtype=torch.int64, device=device)
            widths = [parameter.shape[1] for parameter in parameters] if self._has_averages else []
            self._averages = [torch.zeros(0, 2, width, device=device) for width in widths]
        new = rows[self._slots[rows] < 0]
        self._slots[new] = torch.arange(self.number, self.number + len(new), dtype=torch.int32, device=rows.device)
        self.number += len(new)
        if self.number > len(self._steps):
            added = max(self.number, 2 * len(self._steps), 256) - len(self._steps)
            self._steps, *self._averages = (
                torch.cat([tensor, tensor.new_zeros(added, *tensor.shape[1:])])
                for tensor in (self._steps, *self._averages)
            )
        slots = self._slots[rows].long()
        self._steps[slots] += 1
        return slots

    def adapt(self, number: int, slots: Tensor, gradient: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
        """AdamW's direction (n, width) for the gradient (n, width) of parameter `number`."""
        first, second = self._averages[number][slots].unbind(1)
        first = first.lerp(gradient, 1 - betas[0])
        second = second.lerp(gradient.square(), 1 - betas[1])
        self._averages[number][slots] = torch.stack([first, second], dim=1)
        steps = self._steps[slots].unsqueeze(1)
        first_correction, second_correction = (1 - torch.pow(beta, steps.double()) for beta in betas)
        return first / first_correction.float() / ((second / second_correction.float()).sqrt() + eps)

    def state_dict(self) -> dict[str, Any]:
        if self._slots is None:
            return {}
        rows = (self._slots >= 0).nonzero().flatten()
        slots = self._slots[rows].long()
        averages = [averages[slots] for averages in self._averages]
        return {"rows": rows, "steps": self._steps[slots], "averages": averages}

    def load_state_dict(self, state: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        self.number, self._slots = 0, None
        if not state:
            return
        device = parameters[0].device
        slots = self.find(state["rows"].to(device), parameters)
        self._steps[slots] = state["steps"].to(device)
        for averages, loaded in zip(self._averages, state["averages"], strict=True):
            averages[slots] = loaded.to(averages)


class SparseFinetuning(TrainerCallback):
    """Makes a `transformers.Trainer` train in each step only the rows that are specific to the step's batch.

    The constructor freezes all parameters except the tables. Pass this callback, its `optimizer`, and arguments with
    `max_grad_norm=0` to the Trainer. With gradient accumulation or several processes, rows are chosen for all
    micro-batches of a step together. Evaluation passes do not count.

    Args:
        model: model with a memory.
        background: reads of the corpus that must not be forgotten.
        rows: maximum number of rows of each table to train per step.
        learning_rate: learning rate of the optimizer.
        optimizer: `sgd` or `adamw`. The paper found that SGD forgets less.
        weight_decay: weight decay of the chosen rows.

    Attributes:
        optimizer: the `SparseRows` to pass to the Trainer.

    Raises:
        ConfigError: a value is invalid.
        UltraMemError: the model has no memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        background: Background,
        *,
        rows: int,
        learning_rate: float,
        optimizer: OptimizerKind = "sgd",
        weight_decay: float = 0.0,
    ) -> None:
        check_least(1, rows=rows)
        if not 0 < learning_rate < math.inf:
            raise ConfigError(f"learning_rate={learning_rate}: must be above 0 and finite")
        tables = find_tables(model)
        if [len(frequencies) for frequencies in background.frequencies] != [table.rows for table in tables]:
            raise UltraMemError("the background is of another model's tables; count it with this model")
        self.optimizer = SparseRows(tables, learning_rate=learning_rate, kind=optimizer, weight_decay=weight_decay)
        self._background, self._rows = background, rows
        self._counter = RowCounter(model, training=True)
        model.requires_grad_(False)
        for table in tables:
            table.requires_grad_(True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start counting.

        Raises:
            ConfigError: gradient clipping is enabled.
        """
        if args.max_grad_norm:
            # The Trainer clips before the rows are chosen, by the norm over all rows.
            raise ConfigError(
                f"max_grad_norm={args.max_grad_norm}: must be 0, as the norm would include rows that are not trained; "
                "set it to 0"
            )
        self._counter.attach()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Choose the step's rows."""
        self.optimizer.rows = [
            choose_rows(counts, frequencies.to(counts.device), self._background.batches, self._rows)
            for counts, frequencies in zip(self._counter.take(), self._background.frequencies, strict=True)
        ]

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop counting."""
        self._counter.detach()
