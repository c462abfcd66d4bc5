"""Layers as programs for any number of tokens: exported and traced."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export

from ultramem import Memory, MemoryConfig
from ultramem.layers import MemoryLayer

D_MODEL = 8
KINDS = ["pkm", "memory_plus", "ultramem", "ultramem_v2"]


def build(kind: Any, **options: Any) -> Memory:
    sizes: dict[str, Any] = {"num_keys": 5, "key_dim": 4, "value_dim": D_MODEL, "top_k": 4}
    if kind.startswith("ultramem"):
        sizes["pre_value_dim"] = 3
    return Memory(MemoryConfig(kind=kind, **sizes | options), D_MODEL, 3, dtype=torch.float64).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def check(program: Any, layer: MemoryLayer, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        torch.testing.assert_close(program(tokens(*shape)), layer(tokens(*shape)))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_exported(kind: str) -> None:
    layer: MemoryLayer = build(kind).layers[2]  # its window reaches beyond a shared table's end
    program = export(layer, (tokens(6),), dynamic_shapes=({0: Dim("tokens")},))
    check(program.module(), layer, (1,), (9,))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_exported_with_sequences(kind: str) -> None:
    layer = build(kind, query_conv=3, heads=2).layers[0]
    program = export(layer, (tokens(2, 6),), dynamic_shapes=({0: Dim("batch"), 1: Dim("sequence")},))
    check(program.module(), layer, (1, 1), (3, 4))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_exported_program_is_saved(kind: str) -> None:
    layer, file = build(kind).layers[0], io.BytesIO()
    torch.export.save(export(layer, (tokens(6),), dynamic_shapes=({0: Dim("tokens")},)), file)
    file.seek(0)
    check(torch.export.load(file).module(), layer, (1,), (9,))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_traced(kind: str) -> None:
    """A table that layers share is no parameter of theirs: a trace keeps it as a constant, if it is frozen."""
    layer = build(kind).requires_grad_(False).layers[2]
    check(torch.jit.trace(layer, (tokens(6),)), layer, (1,), (9,))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_traced_with_sequences(kind: str) -> None:
    layer = build(kind, query_conv=3, heads=2).requires_grad_(False).layers[0]
    check(torch.jit.trace(layer, (tokens(2, 6),)), layer, (1, 1), (3, 4))
