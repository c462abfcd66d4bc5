"""The memory of one model: its layers and the tables that they read. This is what a host holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ultramem.config import MemoryConfig
from ultramem.errors import ConfigError
from ultramem.layers.initial_values import HostScheme, initialize
from ultramem.layers.memory_layer import MemoryLayer
from ultramem.layers.read_counter import ReadCounter
from ultramem.tables.table import Table
from ultramem.tables.trainable import TrainableTable

# A host that is seeded alike must not draw the same numbers: its weights and the memory's would be correlated.
_FIRST_SEED = int.from_bytes(b"memory")


class Memory(nn.Module):
    """All memory layers of one model.

    ```python
    config = MemoryConfig(num_keys=128, key_dim=192, value_dim=192, pre_value_dim=192)
    memory = Memory(config, d_model=768, num_blocks=4)
    y = memory.layers[3](x)  # (..., 768) -> (..., 768)
    ```

    After each optimizer step call `refresh()`. In training, add `auxiliary_loss()` to the loss if the configuration
    asks for such losses.

    Args:
        config: kind, sizes and switches.
        d_model: width of the residual stream.
        num_blocks: blocks of the model.
        scheme: the host's initialisation, one for all blocks or one for each; by default the UltraMemV2 paper's.
        seed: of the initial values.
        device: of the parameters; on `meta` nothing is initialised: call `to_empty` and `init_weights`.
        dtype: of the parameters.

    Attributes:
        layers: the memory layers, in the order of `insertions`.
        table: the table that all layers share; None where each layer has its own.
        insertions: for each layer, the block that it reads and the block after which it adds.

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
        for name, size in (("d_model", d_model), ("num_blocks", num_blocks)):
            if size < 1:
                raise ConfigError(f"{name}={size}: must be at least 1")
        config.check_width(d_model)
        self.config = config
        self.d_model = d_model
        self.num_blocks = num_blocks
        self.insertions = config.insertions(num_blocks)
        self.layout = layout = config.layout(len(self.insertions))
        self._schemes = scheme or HostScheme.paper(d_model, num_blocks)

        def new_table() -> TrainableTable:
            rows, value_dim, pre_value_dim = layout.table_rows, config.value_dim, config.pre_value_dim
            return TrainableTable(rows, value_dim, pre_value_dim, device=device, dtype=dtype)

        self.table = new_table() if layout.shared and self.insertions else None
        self.layers = nn.ModuleList(
            config.layer_type(
                config,
                d_model,
                self.table or new_table(),
                axis_keys=layout.axis_keys,
                window_start=start,
                window_rows=layout.window_rows,
                owns_table=not layout.shared,
                device=device,
                dtype=dtype,
            )
            for start in layout.starts
        )  # type: ignore[assignment]
        self._counters: list[ReadCounter] = []
        if not any(parameter.is_meta for parameter in self.parameters()):
            self.init_weights(seed=seed)

    def init_weights(self, scheme: HostScheme | Sequence[HostScheme] | None = None, *, seed: int = 0) -> None:
        """Initialise everything, as `config.init` says.

        Args:
            scheme: the host's initialisation, one for all blocks or one for each; by default that given before.
            seed: the same seed gives the same values, also where parameters are sharded over processes.

        Raises:
            ConfigError: the number of schemes is not the number of blocks.
        """
        self._schemes = schemes = scheme or self._schemes
        if isinstance(schemes, HostScheme):
            schemes = [schemes] * self.num_blocks
        if len(schemes) != self.num_blocks:
            raise ConfigError(f"scheme: {len(schemes)} given for {self.num_blocks} blocks; give one, or one for each")
        if not self.layers:
            return
        generator = torch.Generator(self.layers[0].query_proj.weight.device).manual_seed(_FIRST_SEED + seed)
        initialize(self.layers, [schemes[add] for _, add in self.insertions], generator)

    def refresh(self) -> None:
        """Follow the parameters with what is derived from them; call once after each optimizer step.

        That is the vectors that rank the keys, which follow the Tucker cores, and a table's copy in autocast's dtype.
        """
        if self.layers:
            self.config.layer_type.refresh_all(self.layers)
        for table in self.tables:
            table.refresh()

    @property
    def tables(self) -> list[Table]:
        """The tables, each once, in the order of the layers that read them."""
        return list(dict.fromkeys(layer.table for layer in self.layers))

    def value_parameters(self) -> dict[str, nn.Parameter]:
        """The tables' parameters by name, which have a learning rate of their own."""
        tables = {id(parameter) for table in self.tables for parameter in table.parameters()}
        return {name: parameter for name, parameter in self.named_parameters() if id(parameter) in tables}

    def parameter_groups(
        self, learning_rate: float, model: nn.Module | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Two parameter groups for an optimizer of PyTorch: all parameters but the tables', and the tables'.

        The tables' learning rate is `config.value_lr`, or else the model's, which a scheduler is to multiply with
        `config.value_lr_factor` at each step:

        ```python
        optimizer = torch.optim.AdamW(memory.parameter_groups(1e-3, model))
        factors = [lambda step: 1.0, lambda step: memory.config.value_lr_factor(step, steps)]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        ```

        Args:
            learning_rate: of the model.
            model: that holds the memory, whose other parameters join the first group; by default the memory alone.
            options: further entries of both groups, such as `weight_decay`.
        """
        values = self.value_parameters().values()
        ids = {id(parameter) for parameter in values}
        others = [parameter for parameter in (model or self).parameters() if id(parameter) not in ids]
        rate = learning_rate if self.config.value_lr is None else self.config.value_lr
        return [
            {"params": others, "lr": learning_rate, **options},
            {"params": list(values), "lr": rate, **options},
        ]

    def auxiliary_loss(self) -> Tensor | None:
        """Sum of the layers' auxiliary losses of the last forward pass in training; None if there are none."""
        losses = [layer.auxiliary_loss for layer in self.layers if layer.auxiliary_loss is not None]
        return torch.stack(losses).sum() if losses else None

    def track_usage(self, enabled: bool = True) -> None:
        """Start or stop counting what the layers read in training mode, for `usage_metrics`."""
        for layer, counter in zip(self.layers, self._counters, strict=bool(self._counters)):
            layer.observers.remove(counter)
        self._counters = []
        if enabled:
            for layer in self.layers:
                self._counters.append(ReadCounter(layer.window_rows, layer.query_proj.weight.device))
                layer.observers.append(self._counters[-1])

    def pause_usage(self, paused: bool = True) -> None:
        """Stop counting for a while, or go on; what was counted stays."""
        for counter in self._counters:
            counter.paused = paused

    def usage_metrics(self, *, reset: bool = True) -> dict[str, Tensor]:
        """What the layers read since the last report: scalars, named such as `layer 03/rows read`.

        For each layer: `rows read` (share of the window's rows), `KL from uniform` (of the reads, in nats), `output
        std`, `top score` and `last score` (means over tokens), and what the kind adds, such as `singular value 1` of
        Tucker cores. With `torch.distributed` a collective call, over the reads of all processes.

        Args:
            reset: start counting anew.
        """
        metrics: dict[str, Tensor] = {}
        for number, (layer, counter) in enumerate(zip(self.layers, self._counters, strict=bool(self._counters))):
            values = counter.metrics() | layer.metrics()
            metrics |= {f"layer {number:02d}/{name}": value for name, value in values.items()}
            if reset:
                counter.reset()
        return metrics
