"""An optimizer that keeps one number for each row of a memory table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, zeros
from torch.optim import AdamW

_SQUARES = "row_squares"
_UPDATES = "step"  # AdamW wants each parameter to have one


def update_rows(
    rows: Tensor, gradients: Tensor, squares: Tensor, updates: Tensor, *, lr: float, beta: float, eps: float
) -> None:
    """One step of the row-wise optimizer, in place.

    A row r with gradient g, of which not all elements are zero, and width D:

        s_r ← β s_r + (1 − β) |g|² / D,  n_r ← n_r + 1,  row ← row − lr · g / (sqrt(s_r / (1 − β^n_r)) + eps)

    Other rows, and their numbers, stay as they are. This is Adam (arXiv:1412.6980) without its first moment and with
    one second moment for each row, as in row-wise AdaGrad, whose bias is corrected by the row's own updates.

    Args:
        rows: (rows, D), the parameter.
        gradients: (rows, D), its gradient.
        squares: (rows,), float32, the s_r.
        updates: (rows,), float32, the n_r.
        lr: learning rate.
        beta: β, from 0 to below 1.
        eps: added to the root.
    """
    means = torch.linalg.vector_norm(gradients, dim=1, dtype=squares.dtype).square() / gradients.shape[1]
    read = means > 0
    updates += read
    squares.copy_(torch.where(read, squares.lerp(means, 1 - beta), squares))
    corrected = squares / (1 - beta ** updates.clamp(min=1))
    factors = torch.where(read, lr / (corrected.sqrt() + eps), 0).to(rows.dtype)
    rows.addcmul_(gradients, factors.unsqueeze(1), value=-1)


class RowwiseAdamW(AdamW):
    """AdamW (arXiv:1711.05101), and the row-wise optimizer (`update_rows`) for the values of memory tables.

    Groups with the entry `rowwise` set to True hold tables; `memory.parameter_groups` makes them. Of a table they
    need 8 bytes per row, where AdamW needs 8 bytes per element. A table has no weight decay, and its step does not
    depend on the scale of its gradient, so that clipping has no effect on it.

    Args:
        params: parameters, or groups of them.
        row_beta: decay rate of a row's mean square.
        row_eps: added to a row's root mean square.
        options: as of `torch.optim.AdamW`.
    """

    def __init__(
        self, params: Iterable[Any], *, row_beta: float = 0.95, row_eps: float = 1e-12, **options: Any
    ) -> None:
        super().__init__(params, **options)
        own = {"rowwise": False, "row_beta": row_beta, "row_eps": row_eps}
        self.defaults |= own
        for group in self.param_groups:
            group |= own | group

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of all groups."""
        loss = super().step(closure)
        for group in self.param_groups:
            if group["rowwise"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_rows(parameter, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch, which would convert the rows' numbers to a table's own dtype."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for parameter, number in zip(parameters, numbers, strict=True):
            saved, state = state_dict["state"].get(number, {}), self.state.get(parameter, {})
            for name in (_SQUARES, _UPDATES):
                if name in saved:
                    state[name] = saved[name].to(parameter.device)

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        return False if group["rowwise"] else super()._init_group(group, *lists)

    def _step_rows(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        for name in (_SQUARES, _UPDATES):
            if name not in state:
                state[name] = _per_row(parameter)
        tensors = parameter, parameter.grad, state[_SQUARES], state[_UPDATES]
        update_rows(
            *(tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors),
            lr=group["lr"],
            beta=group["row_beta"],
            eps=group["row_eps"],
        )


def _per_row(parameter: Tensor) -> Tensor:
    """Zeros (rows,) in float32 or wider, sharded as the parameter's rows are."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        return zeros(len(parameter), dtype=dtype, device_mesh=mesh, placements=placements)
    return torch.zeros(len(parameter), dtype=dtype, device=parameter.device)
