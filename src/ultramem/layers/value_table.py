"""The table of values, and of pre-values, that memory layers read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
        self._share()

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
            self.shared,
            pre_input,
            pre_activation=pre_activation,
            blocks=blocks,
            num_blocks=num_blocks,
        )

    @property
    def shared(self) -> SharedTable:
        """The table as lookups take it."""
        if self._shared is None or not self._shared.serves(self.values, self.pre_values):
            self._share()
        assert self._shared is not None
        return self._shared

    # What a compiler traces must find the object there: hence it is made on construction, and made anew after a move,
    # a copy, and where loading replaces the parameters. Not at every assignment of one: FSDP assigns in mid-pass.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _share(self) -> None:
        self._shared: SharedTable | None = SharedTable(self.values, self.pre_values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ValueTable:
        super()._apply(fn, recurse)
        self._share()
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)
        if local_metadata.get("assign_to_params_buffers"):
            self._share()

    def refresh(self) -> None:
        """Follow the parameters, where a copy of them in another dtype is kept."""
        if self._shared is not None:
            self._shared.state.refresh()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_shared": None}  # graphs and copies are neither copied nor saved

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._share()

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        pre_value_dim = 0 if self.pre_values is None else self.pre_values.shape[1]
        return f"rows={self.values.shape[0]}, value_dim={self.values.shape[1]}, pre_value_dim={pre_value_dim}"
