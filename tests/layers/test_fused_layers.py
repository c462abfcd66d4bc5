"""Layers with kernels, as models run them: compiled, checkpointed, under autocast, captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from ultramem import Memory, MemoryConfig
from ultramem.layers import MemoryLayer
from ultramem.ops import use_backend

pytestmark = pytest.mark.kernels

D_MODEL = 8
KINDS = ["pkm", "memory_plus", "ultramem", "ultramem_v2"]
Results = list[Tensor | None]


@pytest.fixture(autouse=True)
def fused() -> Iterator[None]:
    with use_backend("fused"):
        yield


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(kind: Any, device: torch.device, **options: Any) -> Memory:
    sizes: dict[str, Any] = {"num_keys": 4, "key_dim": 4, "value_dim": D_MODEL, "top_k": 2, "heads": 1}
    if kind.startswith("ultramem"):
        sizes["pre_value_dim"] = 3
    with use_backend("auto"):  # initial values are found with many tokens
        return Memory(MemoryConfig(kind=kind, **sizes | options), D_MODEL, 2).to(device)


def tokens(device: torch.device, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, D_MODEL, generator=torch.Generator().manual_seed(seed)).to(device)


def all_layers(memory: Memory, x: Tensor) -> Tensor:
    for layer in memory.layers:
        x = x + layer(x)
    return x


def results(memory: Memory, forward: Callable[[Memory, Tensor], Tensor], x: Tensor) -> Results:
    """Output and the gradients of the input and of all parameters."""
    memory.zero_grad()
    x = x.clone().requires_grad_()
    y = forward(memory, x)
    y.float().square().sum().backward()
    return [y.detach().clone(), x.grad, *(parameter.grad for parameter in memory.parameters())]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(kind: str, device: torch.device) -> None:
    memory, x = build(kind, device, query_conv=2 if kind == "pkm" else 0), tokens(device)
    found = results(memory, all_layers, x)
    with use_backend("naive"):
        expected = results(memory, all_layers, x)
    assert all(part is not None for part in found)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str, device: torch.device) -> None:
    """At once, with no eager call before; then with other tokens, and after the parameters have changed."""
    memory = build(kind, device)
    compiled = torch.compile(all_layers, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        found = results(memory, compiled, tokens(device, seed=seed))
        with use_backend("naive"):
            expected = results(memory, all_layers, tokens(device, seed=seed))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.optim.SGD(memory.parameters(), lr=0.1).step()
        memory.refresh()


def test_one_program_for_all_layers(device: torch.device) -> None:
    """Layers that read other windows of a table are compiled once."""
    memory, x = build("ultramem_v2", device, share_ratio=0.5), tokens(device).requires_grad_()
    first, second = memory.layers
    assert int(first.window_start) != int(second.window_start)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def block(layer: MemoryLayer, x: Tensor) -> Tensor:
        return x + layer(x)

    found = block(second, block(first, x))
    assert counter.frame_count == 1
    torch.testing.assert_close(found, all_layers(memory, x))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing(kind: str, device: torch.device) -> None:
    memory, x = build(kind, device), tokens(device)

    def checkpointed(memory: Memory, x: Tensor) -> Tensor:
        for layer in memory.layers:
            x = x + checkpoint(layer, x, use_reentrant=False)
        return x

    plain, recomputed = results(memory, all_layers, x), results(memory, checkpointed, x)
    for part, again in zip(plain, recomputed, strict=True):
        assert part is not None
        assert torch.equal(part, again)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, device: torch.device) -> None:
    """Values are rounded on the way, and rounding may choose another row: only most of the tokens agree."""
    memory, x = build(kind, device), tokens(device, 6)
    layer = memory.layers[0]
    expected = layer(x)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    errors = (y.float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.median() < 0.05
    y.float().square().sum().backward()
    for parameter in (*layer.parameters(), *layer.table.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


LARGE = {"num_keys": 24, "key_dim": 32, "value_dim": D_MODEL, "top_k": 8}


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_by_inductor(kind: str, autocast: bool, device: torch.device) -> None:
    memory = build(kind, device, **LARGE)
    compiled = torch.compile(all_layers, fullgraph=True)

    def run(forward: Callable[[Memory, Tensor], Tensor], x: Tensor) -> Results:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return results(memory, forward, x)

    for seed in range(2):
        x = tokens(device, 64, seed)
        found, expected = run(compiled, x), run(all_layers, x)
        if autocast:  # compiled, fewer intermediate results are rounded: some tokens choose other rows
            assert all(part is not None and part.isfinite().all() for part in found)
            y, wanted = found[0].float(), expected[0].float()
            assert ((y - wanted).norm(dim=1) / wanted.norm(dim=1)).median() < 0.05
        else:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_captured_in_a_cuda_graph(kind: str, device: torch.device) -> None:
    """Replayed with other inputs and parameters, forward and backward do what they would do anew."""
    memory = build(kind, device, **LARGE)
    x = tokens(device, 64).requires_grad_()

    def step() -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            y = all_layers(memory, x)
        y.float().square().sum().backward()
        return [y, *(part.grad for part in (x, *memory.parameters()))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
            memory.zero_grad()
            x.grad = None
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(1, 3):
        with torch.no_grad():
            x.copy_(tokens(device, 64, seed))
            for parameter in memory.parameters():
                parameter.mul_(1.1)
        memory.refresh()
        graph.replay()
        found = [part.clone() for part in captured]
        x.grad = None
        memory.zero_grad()
        for part, expected in zip(found, step(), strict=True):
            torch.testing.assert_close(part, expected)
