"""The table of values, and of pre-values, that memory layers read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ultramem.ops import SharedTable, weighted_lookup


class ValueTable(nn.Module):
    """Rows that memory layers look up; one table may serve many layers.

    Attributes:
        values: parameter (rows, value_dim).
        pre_values: parameter (rows, pre_value_dim), or None.
    """

    pre_values: nn.Parameter | None

    def __init__(
        self,
        rows: int,
        value_dim: int,
        pre_value_dim: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.empty(rows, value_dim, device=device, dtype=dtype))
        if pre_value_dim:
            self.pre_values = nn.Parameter(torch.empty(rows, pre_value_dim, device=device, dtype=dtype))
        else:
            self.register_parameter("pre_values", None)
        self._shared: dict[str, SharedTable] = {}

    def lookup(
        self,
        scores: Tensor,
        rows: Tensor,
        pre_input: Tensor | None = None,
        *,
        pre_activation: str | None = None,
        blocks: Tensor | None = None,
        num_blocks: int = 1,
    ) -> Tensor:
        """Weighted sums of rows; arguments and result as in `ultramem.ops.weighted_lookup`.

        However many lookups a pass makes, the gradient of the table is accumulated once.
        """
        return weighted_lookup(
            scores,
            rows,
            self._open("values"),
            pre_input,
            None if self.pre_values is None else self._open("pre_values"),
            pre_activation=pre_activation,
            blocks=blocks,
            num_blocks=num_blocks,
        )

    def _open(self, name: str) -> Tensor | SharedTable:
        parameter: nn.Parameter = getattr(self, name)
        if not (parameter.requires_grad and torch.is_grad_enabled()):
            return parameter
        shared = self._shared.get(name)
        if shared is None or not shared.is_open_for(parameter):
            shared = self._shared[name] = SharedTable(parameter)
        return shared

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_shared": {}}  # what belongs to one pass is neither copied nor saved

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        pre_value_dim = 0 if self.pre_values is None else self.pre_values.shape[1]
        return f"rows={self.values.shape[0]}, value_dim={self.values.shape[1]}, pre_value_dim={pre_value_dim}"
