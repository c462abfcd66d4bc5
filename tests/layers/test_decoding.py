"""Few tokens without gradients take what is folded of the parameters: the outputs are those of the ordinary path."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ultramem import Memory, MemoryConfig
from ultramem.layers import MemoryLayer, decoding
from ultramem.ops import use_backend

D_MODEL = 12
CASES: dict[str, dict[str, Any]] = {
    "pkm": {"kind": "pkm", "heads": 2},
    "pkm of many rows": {"kind": "pkm", "num_keys": 3, "top_k": 9},
    "memory_plus": {"kind": "memory_plus", "heads": 2, "value_dim": 7},
    "ultramem": {"kind": "ultramem", "heads": 2, "top_k": 5},
    "ultramem, one projector": {"kind": "ultramem", "value_projectors": "single", "pre_value_dim": 3, "tucker_rank": 3},
    "ultramem_v2": {"kind": "ultramem_v2", "pre_value_dim": 5, "share_ratio": 0.5},
    "ultramem_v2, odd": {
        "kind": "ultramem_v2", "key_dim": 7, "pre_value_dim": 3, "pre_activation": "gelu", "axis_top_k": 3, "cores": 3,
        "heads": 3, "key_expansion": 3, "tucker_rank": 1, "share_ratio": 0.7,
    },
    "ultramem_v2, one query": {"kind": "ultramem_v2", "query_per_rank": False, "cores": 1},
}  # fmt: skip
BACKENDS = [pytest.param("fused", marks=pytest.mark.kernels), "naive"]
SOME = ["memory_plus", "ultramem", "ultramem_v2"]  # where kernels take long in the interpreter
cases = pytest.mark.parametrize("case", CASES)


def build(case: str, dtype: torch.dtype = torch.float32, **options: Any) -> Memory:
    sizes: dict[str, Any] = {"num_keys": 8, "key_dim": 8, "value_dim": D_MODEL, "top_k": 6}
    config = MemoryConfig(**sizes | CASES[case] | options)
    memory = Memory(config, D_MODEL, 3, dtype=torch.float32).eval()
    with torch.no_grad():  # gains and what ranks the keys are to matter
        for name, parameter in memory.named_parameters():
            if "norm" in name or "cores" in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    memory.refresh()
    return memory.to(dtype)


def tokens(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(count, D_MODEL, generator=torch.Generator().manual_seed(seed)).to(dtype)


@contextmanager
def ordinary() -> Iterator[None]:
    """No layer decodes by what it has folded."""
    with patch.object(decoding, "decodes", lambda *_: False):
        yield


@contextmanager
def counted() -> Iterator[list[MemoryLayer]]:
    """The layers that fold their parameters."""
    made: list[MemoryLayer] = []
    make = decoding.Fold._make

    def count(fold: decoding.Fold, layer: MemoryLayer, dtype: torch.dtype) -> None:
        made.append(layer)
        make(fold, layer, dtype)

    with patch.object(decoding.Fold, "_make", count):
        yield made


@pytest.mark.parametrize("backend", BACKENDS)
@cases
@torch.no_grad()
def test_as_the_ordinary_path(case: str, backend: Any, device: torch.device) -> None:
    memory, x = build(case).to(device), tokens(3).to(device)
    layer = memory.layers[2]  # its window wraps around
    with use_backend("naive"), ordinary():
        expected = layer(x)
    with use_backend(backend), counted() as made:
        found = layer(x)
        torch.testing.assert_close(layer(x[1]), found[1])
    assert made == [layer]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@cases
@torch.no_grad()
def test_float64(case: str) -> None:
    memory, x = build(case, torch.float64), tokens(5, torch.float64)
    for layer in memory.layers:
        with ordinary():
            expected = layer(x)
        torch.testing.assert_close(layer(x), expected)
        with torch.autocast("cpu", torch.bfloat16), ordinary():
            expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(x), expected)


def assert_mostly_equal(found: Tensor, expected: Tensor) -> None:
    """Rounding may choose other rows for some tokens."""
    assert found.dtype == expected.dtype
    errors = (found.float() - expected.float()).norm(dim=1) / expected.float().norm(dim=1)
    assert errors.median() < 0.02


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SOME)
@torch.no_grad()
def test_bfloat16(case: str, backend: Any, autocast: bool, device: torch.device) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    memory, x = build(case, dtype).to(device), tokens(5, dtype).to(device)
    layer = memory.layers[1]
    with use_backend(backend), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        with ordinary():
            expected = layer(x)
        assert_mostly_equal(layer(x), expected)


def change_in_place(memory: Memory) -> None:
    with torch.no_grad():
        memory.layers[0].keys.mul_(torch.rand_like(memory.layers[0].keys))


def step(memory: Memory) -> None:
    for parameter in memory.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(memory.parameters(), lr=0.1, fused=True).step()


def load(memory: Memory) -> None:
    memory.load_state_dict({name: part.clone() for name, part in build("ultramem_v2").state_dict().items()})


def assign(memory: Memory) -> None:
    memory.load_state_dict(build("ultramem_v2").state_dict(), assign=True)


def convert(memory: Memory) -> None:
    memory.to(torch.bfloat16).to(torch.float32)


def change_unseen(memory: Memory) -> None:
    memory.layers[0].keys.data.mul_(2).add_(1)
    memory.refresh()


@pytest.mark.parametrize("change", [change_in_place, step, load, assign, convert, change_unseen])
@torch.no_grad()
def test_changes_are_followed(change: Callable[[Memory], None]) -> None:
    memory, x = build("ultramem_v2"), tokens(4)
    layer = memory.layers[0]
    before = layer(x)
    with counted() as made:
        assert torch.equal(layer(x), before)
    assert not made, "nothing has changed"
    change(memory)
    with ordinary():
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(expected, before), "the change makes no difference"


@torch.no_grad()
def test_folded_in_place() -> None:
    """A captured graph reads from where the first call has folded."""
    layer = build("ultramem_v2").layers[0]
    layer(tokens(2))
    folded = layer.folded.of(layer, torch.float32)
    places = [part.data_ptr() for part in (folded.projection, folded.grid.keys, folded.grid.u)]
    layer.keys.mul_(2)
    layer(tokens(2))
    folded = layer.folded.of(layer, torch.float32)
    assert [part.data_ptr() for part in (folded.projection, folded.grid.keys, folded.grid.u)] == places


@torch.no_grad()
def test_copies_fold_their_own() -> None:
    memory, x = build("ultramem_v2"), tokens(3)
    y = memory.layers[0](x)
    twin = copy.deepcopy(memory)
    twin.layers[0].keys.add_(torch.randn_like(twin.layers[0].keys))
    with ordinary():
        expected = twin.layers[0](x)
    torch.testing.assert_close(twin.layers[0](x), expected)
    assert torch.equal(memory.layers[0](x), y)


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer, x = build("ultramem_v2").layers[0], tokens(3)
        with ordinary():
            expected = layer(x)
        torch.testing.assert_close(layer(x), expected)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_when_the_ordinary_path_is_taken() -> None:
    memory = build("ultramem_v2")
    layer, x = memory.layers[0], tokens(2)
    with counted() as made:
        layer(x)
        with torch.no_grad():
            layer.train()(x)
            layer.eval()(x[:0])
            layer(tokens(decoding.MOST_TOKENS + 1))
            handle = layer.pre_proj.register_forward_hook(lambda *_: None)
            layer(x)
            handle.remove()
            build("ultramem_v2", query_conv=2).layers[0](x.unsqueeze(0))
            plain, layer.query_proj = layer.query_proj, Doubled(D_MODEL, layer.query_proj.out_features, bias=False)
            layer(x)
            layer.query_proj = nn.Sequential(plain)  # has no weight itself
            layer(x)
            layer.query_proj = plain
            torch.func.functional_call(layer, {"keys": layer.keys.detach() * 2}, x)
            assert not made
            layer(x)
    assert made == [layer]


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_an_adapted_output_projection(backend: Any, device: torch.device) -> None:
    layer, x = build("memory_plus").to(device).layers[0], tokens(2).to(device)
    with use_backend(backend):
        before = layer(x)
        weight = layer.output_proj.weight
        layer.output_proj = Doubled(*weight.T.shape, bias=False)
        layer.output_proj.weight = weight
        torch.testing.assert_close(layer(x), 2 * before)


@torch.no_grad()
def test_observers_see_the_reads() -> None:
    layer, x, seen = build("ultramem").layers[0], tokens(3), []

    class Observer:
        def observe(self, layer: MemoryLayer, reads: Any, output: Tensor) -> None:
            seen.append((reads, output))

    layer.observers.append(Observer())
    layer(x)
    with ordinary():
        layer(x)
    (found, output), (expected, expected_output) = seen
    torch.testing.assert_close(output, expected_output)
    order, expected_order = (reads.rows.argsort(1) for reads in (found, expected))
    assert torch.equal(found.rows.gather(1, order), expected.rows.gather(1, expected_order))
    copies = found.virtual_copies.gather(1, order)
    assert torch.equal(copies, expected.virtual_copies.gather(1, expected_order))


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SOME)
@torch.no_grad()
def test_compiled_whole(case: str, backend: Any, device: torch.device) -> None:
    """One program for all layers, which follows changes."""
    memory, x = build(case).to(device), tokens(1).to(device)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def block(layer: MemoryLayer, x: Tensor) -> Tensor:
        return x + layer(x)

    for _ in range(2):
        with use_backend(backend):
            with counted() as made:
                found = block(memory.layers[2], block(memory.layers[0], x))
            assert len(made) == 2
            y = x + memory.layers[0](x)
            torch.testing.assert_close(found, y + memory.layers[2](y))
        for parameter in memory.parameters():
            parameter.mul_(1.1)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 5, 64])
@cases
@torch.no_grad()
def test_captured_in_a_cuda_graph(case: str, count: int, dtype: torch.dtype, device: torch.device) -> None:
    """Replayed with other inputs, and after a refresh with other parameters."""
    memory = build(case, dtype, num_keys=40, top_k=32).to(device)
    x = tokens(count, dtype).to(device)

    def run() -> list[Tensor]:
        return [layer(x) for layer in memory.layers]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(1, 4):
        x.copy_(tokens(count, dtype, seed))
        for parameter in memory.parameters():
            parameter.mul_(1.1)
        memory.refresh()
        graph.replay()
        found = [part.clone() for part in captured]
        for part, expected in zip(found, run(), strict=True):
            torch.testing.assert_close(part, expected)


@pytest.mark.gpu
@cases
@torch.no_grad()
def test_compiled_into_cuda_graphs(case: str, device: torch.device) -> None:
    memory = build(case, torch.bfloat16, num_keys=40, top_k=32).to(device)

    @torch.compile(fullgraph=True, mode="reduce-overhead")
    def run(x: Tensor) -> Tensor:
        for layer in memory.layers:
            x = x + layer(x)
        return x

    for seed in range(4):
        x = tokens(2, torch.bfloat16, seed).to(device)
        found = run(x).clone()
        expected = x
        for layer in memory.layers:
            expected = expected + layer(expected)
        assert found.isfinite().all()
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.2, atol=0.2)
