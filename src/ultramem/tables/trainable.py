"""A table of parameters, trained like any others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ultramem.ops.backend import HAS_KERNELS, takes_kernels
from ultramem.ops.kernels.operators import register
from ultramem.ops.weighted_lookup import bags
from ultramem.ops.weighted_lookup.reads import Products, Reads
from ultramem.tables.computing_copy import ComputingCopy
from ultramem.tables.filling import normal
from ultramem.tables.gradient_accumulator import GradientAccumulator, TableLink, gather
from ultramem.tables.table import Table

if HAS_KERNELS:
    from ultramem.ops.weighted_lookup import fused


class TrainableTable(Table):
    """Values (rows, value_dim) and pre-values (rows, pre_value_dim), or None, as parameters; arguments as of `Table`.

    However many lookups a pass makes, their gradient is made once. Kernels that compute in a narrower dtype, as under
    autocast, read a copy in it, made once after each change of the parameters.
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
        super().__init__(rows, value_dim, pre_value_dim)
        self.values = nn.Parameter(torch.empty(rows, value_dim, device=device, dtype=dtype))
        self.register_parameter("pre_values", None)
        if pre_value_dim:
            self.pre_values = nn.Parameter(torch.empty(rows, pre_value_dim, device=device, dtype=dtype))
        self._make_helpers()

    @property
    def device(self) -> torch.device:
        return self.values.device

    def lookup(self, reads: Reads, dtype: torch.dtype | None = None) -> Tensor:
        """As of `Table`; with kernels computed and returned in autocast's dtype where that is on."""
        tables = self.values, self.pre_values
        if takes_kernels("weighted_lookup", HAS_KERNELS and fused.supports(reads, *tables, dtype=dtype)):
            link = self._link.get(*tables)
            return fused.weighted_lookup(reads, *tables, dtype=dtype, link=link, numbers=self._numbers)
        if takes_kernels("weighted_lookup", dtype in (None, self.values.dtype) and bags.supports(reads, *tables)):
            return bags.weighted_lookup(reads, *self._sources())
        return super().lookup(reads, dtype)

    def _sources(self) -> tuple[bags.Source, bags.Source | None]:
        """Values and pre-values, whose gradients are added up in the accumulator."""
        link = self._link.get(self.values, self.pre_values)
        values = self._accumulator.source(0, self.values, link)
        return values, None if self.pre_values is None else self._accumulator.source(1, self.pre_values, link)

    def gather(
        self, rows: Tensor, *, pre_values: bool, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        link, dtype = self._link.get(self.values, self.pre_values), dtype or self.values.dtype
        values = gather(0, self.values, rows, dtype, link, self._accumulator)
        if not pre_values:
            return values, None
        assert self.pre_values is not None
        return values, gather(1, self.pre_values, rows, dtype, link, self._accumulator)

    def init_weights(self, std: float, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            normal(parameter, std, generator)

    def begin_pass(self) -> None:
        """As of `Table`: compiled lookups take the link that is there, and it is to be as young as the pass."""
        if not torch.compiler.is_compiling():
            self._link.get(self.values, self.pre_values)

    def refresh(self) -> None:
        """As of `Table`: the copy that is computed in."""
        self._copy.refresh(self.values, self.pre_values)

    @property
    def defers_gradient(self) -> bool:
        """Whether kernels leave the gradient's products to an optimizer, which takes them with `take_deferred`.

        It is to do so before the next step. `grad` then stays None after a single backward pass.
        """
        return self._accumulator.defers

    @defers_gradient.setter
    def defers_gradient(self, wanted: bool) -> None:
        self._accumulator.defers = wanted
        self._accumulator.deferred = []

    def take_deferred(self) -> list[Products]:
        """Products that are the gradient, in addition to `grad`; there are none afterwards."""
        products, self._accumulator.deferred = self._accumulator.deferred, []
        return products

    def defer(self, products: list[Products]) -> None:
        """Leave products as a backward pass does, for one that was replayed as a CUDA graph."""
        self._accumulator.deferred = products

    @property
    def copy_in_use(self) -> ComputingCopy:
        """The copy that kernels read under autocast."""
        return self._copy

    def _make_helpers(self) -> None:
        self._accumulator, self._copy = GradientAccumulator(), ComputingCopy()
        self._numbers = register(self._copy, self._accumulator)
        self._link = TableLink(self._accumulator)
        self._link.make(self.values, self.pre_values)

    # A compiled program takes the link that it finds: hence there is one from the start, and another where parameters
    # are replaced, moved or copied. (FSDP, which replaces them in mid-pass, does so without calling this.)
    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if hasattr(self, "_link"):
            self._link.make(self.values, self.pre_values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainableTable:
        super()._apply(fn, recurse)
        self._link.make(self.values, self.pre_values)
        return self

    def __getstate__(self) -> dict[str, object]:
        """What is copied and saved: neither graphs nor the copy that is computed in."""
        helpers = ("_accumulator", "_copy", "_link", "_numbers")
        return {name: value for name, value in self.__dict__.items() if name not in helpers}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._make_helpers()
