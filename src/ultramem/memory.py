"""The memory of a model: its memory layers and their tables. Hosts hold one `Memory`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ultramem.config import MemoryConfig
from ultramem.configuration.field_types import check_least
from ultramem.errors import ConfigError
from ultramem.layers.initial_values import HostScheme, initialize
from ultramem.layers.memory_layer import MemoryLayer
from ultramem.layers.read_counter import ReadCounter
from ultramem.tables.table import Table
from ultramem.tables.trainable import TrainableTable

# A host with the same seed must not draw the same numbers: its weights and the memory's would be correlated.
_FIRST_SEED = int.from_bytes(b"memory")


class Memory(nn.Module):
    """All memory layers of a model.

    ```python
    config = MemoryConfig(num_keys=128, key_dim=192, value_dim=192, pre_value_dim=192)
    memory = Memory(config, d_model=768, num_blocks=4)
    y = memory.layers[3](x)  # (..., 768) -> (..., 768)
    ```

    Call `refresh()` after each optimizer step. In training, add `auxiliary_loss()` to the loss if the configuration
    has auxiliary losses.

    Args:
        config: kind, sizes and options.
        d_model: width of the residual stream.
        num_blocks: number of transformer blocks.
        scheme: the host's initialisation, one for all blocks or one per block; by default the UltraMemV2 paper's.
        seed: seed for the initial values.
        device: of the parameters. On `meta` nothing is initialised: call `to_empty` and `init_weights`.
        dtype: of all parameters. By default tables have `config.table_dtype`, and the others PyTorch's default.

    Attributes:
        layers: the memory layers, in the order of `insertions`.
        table: the table that all layers share; None if each layer has its own.
        insertions: for each layer, the block that it reads and the block after which its output is added.

    Raises:
        ConfigError: the configuration does not fit `d_model` or `num_blocks`.
    """

    layers: Sequence[MemoryLayer]
    table: Table | None

    def __init__(
        self,
        config: MemoryConfig,
        d_model: int,
        num_blocks: int,
        *,
        scheme: HostScheme | Sequence[HostScheme] | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_least(1, d_model=d_model, num_blocks=num_blocks)
        config.check_width(d_model)
        self.config, self.d_model, self.num_blocks = config, d_model, num_blocks
        self.insertions = config.insertions(num_blocks)
        self.layout = layout = config.layout(len(self.insertions))
        self._schemes = scheme or HostScheme.paper(d_model, num_blocks)

        def new_table() -> TrainableTable:
            rows, value_dim, pre_value_dim = layout.table_rows, config.value_dim, config.pre_value_dim
            narrow = dtype is None and config.table_dtype == "bfloat16"
            return TrainableTable(
                rows, value_dim, pre_value_dim, device=device, dtype=torch.bfloat16 if narrow else dtype
            )

        self.table = new_table() if layout.shared and self.insertions else None
        self.layers = nn.ModuleList(
            config.layer_type(
                config, d_model, self.table or new_table(), layout=layout, number=number, device=device, dtype=dtype
            )
            for number in range(len(self.insertions))
        )  # type: ignore[assignment]
        self._counters: list[ReadCounter] = []
        if not any(parameter.is_meta for parameter in self.parameters()):
            self.init_weights(seed=seed)

    def init_weights(self, scheme: HostScheme | Sequence[HostScheme] | None = None, *, seed: int = 0) -> None:
        """Initialise all parameters and buffers as `config.init` says.

        Args:
            scheme: the host's initialisation, one for all blocks or one per block; by default that of the constructor.
            seed: seed for the initial values, which do not depend on how parameters are sharded.

        Raises:
            ConfigError: the number of schemes is not the number of blocks.
        """
        self._schemes = schemes = scheme or self._schemes
        if isinstance(schemes, HostScheme):
            schemes = [schemes] * self.num_blocks
        if len(schemes) != self.num_blocks:
            raise ConfigError(f"scheme: {len(schemes)} given for {self.num_blocks} blocks; give one, or one per block")
        if not self.layers:
            return
        generator = torch.Generator(self.layers[0].query_proj.weight.device).manual_seed(_FIRST_SEED + seed)
        initialize(self.layers, [schemes[add] for _, add in self.insertions], generator)

    def begin_pass(self) -> None:
        """Get ready for a forward pass; only hosts that compile or capture passes need to call it."""
        for layer in self.layers:
            layer.auxiliary_loss = None  # the last pass's, whose graph would outlive it
        for table in self.tables:
            table.begin_pass()

    def refresh(self) -> None:
        """Recompute `u` and `t`, which rank the keys, and tables' copies in autocast's dtype; call after each step.

        What layers have folded for decoding is folded anew: at the next use, or at once if a CUDA graph holds it.
        """
        if self.layers:
            self.config.layer_type.refresh_all(self.layers)
        for layer in self.layers:
            layer.folded.refresh(layer)
        for table in self.tables:
            table.refresh()

    def check_loaded(self, state: Mapping[str, Tensor] | None = None, prefix: str = "") -> None:
        """Check what decides which rows are read in a state from a file, as `load_state_dict` does itself.

        Args:
            state: a state with all parameters and buffers; by default the memory's own.
            prefix: with which their names begin.

        Raises:
            UltraMemError: indices are out of range or repeated, or a direction is not finite.
        """
        state = self.state_dict() if state is None else state
        for number, layer in enumerate(self.layers):
            layer.check_loaded(state, f"{prefix}layers.{number}.")

    @property
    def tables(self) -> list[Table]:
        """All tables, in the order of the layers that read them."""
        return list(dict.fromkeys(layer.table for layer in self.layers))

    def value_parameters(self) -> dict[str, nn.Parameter]:
        """The tables' parameters by name; they have their own learning rate."""
        tables = {id(parameter) for table in self.tables for parameter in table.parameters()}
        return {name: parameter for name, parameter in self.named_parameters() if id(parameter) in tables}

    def parameter_groups(
        self, learning_rate: float, model: nn.Module | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Two parameter groups for a PyTorch optimizer: all parameters but the tables', and the tables'.

        They are for the optimizer that the configuration names:

        ```python
        optimizer = RowwiseAdamW(memory.parameter_groups(1e-3, model), tables=memory.tables)  # rowwise
        optimizer = torch.optim.AdamW(memory.parameter_groups(1e-3, model))  # adamw
        ```

        The tables' learning rate is `config.value_lr` if set. Otherwise it is the model's, and a scheduler must
        multiply it by `config.value_lr_factor` at each step:

        ```python
        factors = [lambda step: 1.0, lambda step: memory.config.value_lr_factor(step, steps)]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        ```

        Args:
            learning_rate: learning rate of the model.
            model: model that holds the memory; its other parameters join the first group. By default the memory alone.
            options: further entries of both groups, such as `weight_decay`.
        """
        values = self.value_parameters().values()
        ids = {id(parameter) for parameter in values}
        others = [parameter for parameter in (model or self).parameters() if id(parameter) not in ids]
        rate = learning_rate if self.config.value_lr is None else self.config.value_lr
        table: dict[str, Any] = {"params": list(values), "lr": rate}
        if self.config.optimizer == "rowwise":
            table |= {"rowwise": True, "row_beta": self.config.row_beta}
        return [{"params": others, "lr": learning_rate, **options}, table | options]

    def auxiliary_loss(self) -> Tensor | None:
        """Sum of the layers' auxiliary losses in the last training forward pass; None if there are none."""
        losses = [layer.auxiliary_loss for layer in self.layers if layer.auxiliary_loss is not None]
        return torch.stack(losses).sum() if losses else None

    def track_usage(self, enabled: bool = True, *, every: int = 1) -> None:
        """Start or stop counting what the layers read in training mode, for `usage_metrics`.

        Counting all tokens of a pass takes up to 3% of a training step on a GPU. With `every` n, one in n counts.
        """
        for layer, counter in zip(self.layers, self._counters, strict=bool(self._counters)):
            layer.observers.remove(counter)
        self._counters = []
        if enabled:
            for layer in self.layers:
                self._counters.append(ReadCounter(layer.window_rows, layer.query_proj.weight.device, every))
                layer.observers.append(self._counters[-1])

    def usage_metrics(self, *, reset: bool = True) -> dict[str, Tensor]:
        """Scalars about what the layers read since the last reset, with names such as `layer 03/rows read`.

        Each layer has `rows read` (share of the window's rows), `KL from uniform` (of the reads, in nats), `output
        std`, `top score` and `last score` (means over tokens), and metrics of its kind, such as `singular value 1` of
        the Tucker cores. With `torch.distributed` this is a collective call, which includes the reads of all processes.
        `reset` sets the counts to zero.
        """
        metrics: dict[str, Tensor] = {}
        for number, (layer, counter) in enumerate(zip(self.layers, self._counters, strict=bool(self._counters))):
            values = counter.metrics() | layer.metrics()
            metrics |= {f"layer {number:02d}/{name}": value for name, value in values.items()}
            if reset:
                counter.reset()
        return metrics
