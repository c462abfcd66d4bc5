"""An optimizer that keeps one number for each row of a memory table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor, zeros
from torch.optim import AdamW

from ultramem.ops.backend import HAS_KERNELS, KERNEL_DTYPES, can_run_kernels, takes_kernels
from ultramem.ops.weighted_lookup import naive
from ultramem.ops.weighted_lookup.reads import RowStep
from ultramem.ops.weighted_lookup.rounding import part_seed
from ultramem.tables.torch_internals import first_row
from ultramem.tables.trainable import TrainableTable

if HAS_KERNELS:
    from ultramem.ops.weighted_lookup.row_step import step_rows
    from ultramem.ops.weighted_lookup.table_gradient import step_by_products, table_gradients

_SQUARES = "row_squares"
_STEPS = "step"  # AdamW wants each parameter to have one


class RowwiseAdamW(AdamW):
    """AdamW (arXiv:1711.05101), and the row-wise optimizer (`step_rows` in
    `ultramem.ops.weighted_lookup.naive`) for the values of memory tables.

    Groups with the entry `rowwise` set to True hold tables; `memory.parameter_groups` makes them. Of a table they
    need 8 bytes per row, where AdamW needs 8 bytes per element. A table has no weight decay, and its step does not
    depend on the scale of its gradient, so clipping is not for it.

    A table in bfloat16 is rounded stochastically (`ultramem.ops.weighted_lookup.rounding`). Its random bits depend on
    the seed, the row and the number of the row's steps alone: they are the same after resuming, in all processes, and
    however the table is sharded.

    Args:
        params: parameters, or groups of them.
        tables: tables whose gradient only this optimizer is to see. Where they have kernels and a step has a single
            backward pass, the kernels that sum a row's gradient step the row too: the gradient is never made, and
            `grad` stays None. Then begin a step with this optimizer's `zero_grad`, not the module's.
        row_beta: decay rate of a row's mean square.
        row_eps: added to a row's root mean square.
        seed: seed of the rounding.
        options: as of `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        tables: Sequence[TrainableTable] = (),
        row_beta: float = 0.95,
        row_eps: float = 1e-12,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(params, **options)
        self._seed = seed
        for group in self.param_groups:
            if group.get("rowwise"):  # other groups have AdamW's entries alone, so that its checkpoints can be loaded
                group |= {"row_beta": row_beta, "row_eps": row_eps} | group
        self.tables: Sequence[TrainableTable] = ()
        self._squared_norms: list[Tensor] = []
        self.take_over(tables)

    def take_over(self, tables: Sequence[TrainableTable], *, defer: bool = True) -> None:
        """See the gradients of these tables alone, as described of the argument `tables`.

        Without `defer` they are made in any case, as several backward passes in a step need.
        """
        self.tables = tables
        for table in tables:
            table.defers_gradient = defer

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of all groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._squared_norms = []
        of_tables: set[int] = set()
        for table in self.tables:
            self._step_table(table)
            of_tables |= {id(parameter) for parameter in table.parameters()}
        for group in self.param_groups:
            for parameter in group["params"] if group.get("rowwise") else ():
                if id(parameter) not in of_tables and parameter.grad is not None:
                    self._step_rows(self._row_step(parameter, group), _local(parameter.grad))
        super().step()  # last: where plain AdamW is used too, this tells copies that they are out of date
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in PyTorch, also of gradients that were never made."""
        super().zero_grad(set_to_none)
        for table in self.tables:
            table.take_deferred()

    def table_norm(self) -> Tensor:
        """Norm of the gradient of this process's rows in the last step, before any clipping."""
        return torch.stack(self._squared_norms).sum().sqrt() if self._squared_norms else torch.zeros(())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch, which would convert a row's mean square to a table's own dtype."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for parameter, number in zip(parameters, numbers, strict=True):
            if _SQUARES in (saved := state_dict["state"].get(number, {})):
                self.state[parameter][_SQUARES] = saved[_SQUARES].to(parameter.device)

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        return False if group.get("rowwise") else super()._init_group(group, *lists)

    def _row_step(self, parameter: Tensor, group: dict[str, Any], copy: Tensor | None = None) -> RowStep:
        state = self.state[parameter]
        for name in (_SQUARES, _STEPS):
            if name not in state:
                state[name] = _per_row(parameter)
        local, squares, steps = (_local(tensor) for tensor in (parameter, state[_SQUARES], state[_STEPS]))
        means = torch.zeros_like(squares)
        options = group["lr"], group["row_beta"], group["row_eps"]
        return RowStep(local, squares, steps, means, copy, *options, self._seed_of(parameter))

    def _seed_of(self, parameter: Tensor) -> int | None:
        """Seed of the rounding of a parameter in bfloat16; others are rounded to the nearest."""
        if parameter.dtype != torch.bfloat16:
            return None
        rowwise = [other for group in self.param_groups if group.get("rowwise") for other in group["params"]]
        number = next(number for number, other in enumerate(rowwise) if other is parameter)
        return part_seed(self._seed, number, first_row(parameter))

    def _step_table(self, table: TrainableTable) -> None:
        """Step a table by the products that its lookups have left, or by its gradient."""
        groups = {id(p): group for group in self.param_groups if group.get("rowwise") for p in group["params"]}
        parts = table.values, table.pre_values
        copies = table.copy_in_use.parts(*parts)
        steps = [
            None if part is None or id(part) not in groups else self._row_step(part, groups[id(part)], copy)
            for part, copy in zip(parts, copies, strict=True)
        ]
        gradients = [
            None if part is None or step is None else part.grad for part, step in zip(parts, steps, strict=True)
        ]
        products = table.take_deferred()
        if products:
            if gradients == [None, None] and step_by_products(products, steps):
                for step in steps:
                    if step is not None:
                        self._stepped(step)
            else:
                gradients = table_gradients(products, [step and step.parameter for step in steps], buffers=gradients)
        for step, gradient in zip(steps, gradients, strict=True):
            if step is not None and gradient is not None:
                self._step_rows(step, gradient)
        if copies[0] is not None:
            table.copy_in_use.written(*parts)

    def _step_rows(self, step: RowStep, gradient: Tensor) -> None:
        supported = HAS_KERNELS and can_run_kernels(step.parameter) and step.parameter.dtype in KERNEL_DTYPES
        if takes_kernels("step_rows", supported):
            step_rows(step, gradient.contiguous())
        else:
            naive.step_rows(step, gradient)
        self._stepped(step)

    def _stepped(self, step: RowStep) -> None:
        increment_version(step.parameter)
        self._squared_norms.append(step.means.sum() * step.parameter.shape[1])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _per_row(parameter: Tensor) -> Tensor:
    """Zeros (rows,) in float32 or wider, sharded as the parameter's rows are."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        return zeros(len(parameter), dtype=dtype, device_mesh=mesh, placements=placements)
    return torch.zeros(len(parameter), dtype=dtype, device=parameter.device)
