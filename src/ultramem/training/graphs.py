"""Training passes as CUDA graphs, which a slow host launches as fast as any other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ultramem.ops.weighted_lookup.reads import Products
from ultramem.tables.trainable import TrainableTable

_EAGER_PASSES = 3  # before a capture: compilers and libraries choose their kernels in the first ones


class GraphedPasses:
    """The forward and backward passes of micro-batches, captured as CUDA graphs after a few steps and replayed.

    A pass launches some thousand kernels, which takes many hosts longer than the GPU takes to run them. A graph is
    launched at once. There are two: one for the first micro-batch of a step, which makes the gradients, and one for
    the others, which add to them. They compute in the same memory, one after the other, and leave gradients, and what
    tables defer to the optimizer, where the captured passes left them.

    Where passes cannot be captured, as with operations that wait for the GPU, they go on being launched one by one.

    Args:
        model: the model. All its passes must have the same shape to be replayed.
        forward: runs a forward pass; returns outputs of which the second is the loss.
        tables: the model's tables.
        notify: told why passes cannot be captured.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., tuple[Tensor | None, ...]],
        tables: list[TrainableTable],
        notify: Callable[[str], None],
    ) -> None:
        self._forward, self._tables, self._notify = forward, tables, notify
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._eager = Counter[bool]()
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}  # by whether they add to gradients
        self._enabled = True
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[bool, tuple[Tensor | None, ...]] = {}
        self._gradients: list[Tensor | None] = []
        self._products: list[list[Products]] = []

    def __call__(self, inputs: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor | None, ...]:
        """Run a pass: the outputs of `forward`. If it was replayed, a backward pass through the loss does nothing.

        Args:
            inputs: tensors that differ from pass to pass, by name; on any device.
            options: further arguments of `forward`, the same at each call.
        """
        adds = any(parameter.grad is not None for parameter in self._parameters)
        if adds not in self._graphs and not self._can_capture(adds):
            self._eager[adds] += 1
            return self._forward(**inputs, **options)
        self._fill(inputs)
        if adds not in self._graphs and not self._capture(adds, options):
            return self._forward(**inputs, **options)
        self._graphs[adds].replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        for table, products in zip(self._tables, self._products, strict=True):
            table.defer(products)
        logits, loss, *others = self._outputs[adds]
        assert loss is not None
        return logits, loss.detach().requires_grad_(), *others

    def _can_capture(self, adds: bool) -> bool:
        """Passes that add do so to the gradients of a captured one, so theirs follows in the same step."""
        return self._enabled and (False in self._graphs if adds else self._eager[False] >= _EAGER_PASSES)

    def _fill(self, inputs: dict[str, Tensor]) -> None:
        for name, given in inputs.items():
            if name not in self._inputs:
                self._inputs[name] = torch.empty_like(given, device=self._parameters[0].device)
            self._inputs[name].copy_(given, non_blocking=True)

    def _capture(self, adds: bool, options: dict[str, Any]) -> bool:
        """Capture a pass, which does not run it; whether it could be."""
        graph = torch.cuda.CUDAGraph()
        pool = self._graphs[False].pool() if adds else None
        # With a second reference to its gradient a table would have it copied.
        self._gradients = []
        try:
            # Other threads, such as those that load data, may do as they like.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                outputs = self._forward(**self._inputs, **options)
                assert outputs[1] is not None
                outputs[1].backward()
        except RuntimeError as error:
            if adds:
                raise  # what the first pass of this step left is gone
            self._give_up(error)
            return False
        self._graphs[adds], self._gradients = graph, [parameter.grad for parameter in self._parameters]
        self._outputs[adds] = tuple(output if output is None else output.detach() for output in outputs)
        self._products = [table.take_deferred() for table in self._tables]
        return True

    def _give_up(self, error: RuntimeError) -> None:
        self._enabled = False
        self._inputs = {}
        for parameter in self._parameters:
            parameter.grad = None
        for table in self._tables:
            table.take_deferred()
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        self._notify(f"passes cannot be captured as CUDA graphs ({reason}); they are launched one by one")
