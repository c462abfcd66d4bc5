"""What all layers share: shapes, dtypes, the query convolution, dropout, and how PyTorch runs and copies modules."""

from __future__ import annotations

import copy
import io
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ultramem import Memory, MemoryConfig
from ultramem.layers import MemoryLayer

D_MODEL = 8
KINDS = ["pkm", "memory_plus", "ultramem", "ultramem_v2"]


def build(kind: Any = "ultramem_v2", dtype: torch.dtype = torch.float64, **options: Any) -> Memory:
    sizes: dict[str, Any] = {"num_keys": 5, "key_dim": 4, "value_dim": D_MODEL, "top_k": 4}
    if kind.startswith("ultramem"):
        sizes["pre_value_dim"] = 3
    return Memory(MemoryConfig(kind=kind, **sizes | options), D_MODEL, 3, dtype=dtype)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("query_conv", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_by_itself(kind: str, query_conv: int) -> None:
    layer = build(kind, query_conv=query_conv).layers[1]
    x = randn(2, 6, D_MODEL)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(layer(x[1]), y[1])
    torch.testing.assert_close(layer(x.unsqueeze(1)), y.unsqueeze(1))
    if not query_conv:
        torch.testing.assert_close(layer(x[1, 2]), y[1, 2])


@pytest.mark.parametrize("shape", [(0, D_MODEL), (1, D_MODEL), (2, 0, D_MODEL), (0, 3, D_MODEL), (1, 1, D_MODEL)])
@pytest.mark.parametrize("query_conv", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens(kind: str, query_conv: int, shape: tuple[int, ...]) -> None:
    memory = build(kind, query_conv=query_conv, balance_coef=0.1)
    memory.track_usage()
    x = randn(*shape).requires_grad_()
    y = memory.layers[0](x)
    assert y.shape == shape
    loss = memory.auxiliary_loss()
    assert loss is not None
    assert loss.isfinite()
    (y.sum() + loss).backward()
    assert x.grad is not None
    assert all(parameter.grad.isfinite().all() for parameter in memory.layers[0].parameters())
    assert all(metric.isfinite() for metric in memory.usage_metrics().values())


@pytest.mark.parametrize("kind", KINDS)
def test_non_contiguous_input(kind: str) -> None:
    layer = build(kind, query_conv=2).layers[0]
    x = randn(D_MODEL, 4, 3).permute(2, 1, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    strided = randn(3, 4, 2 * D_MODEL)[..., ::2]
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    layer = build(kind, top_k=2, heads=2).layers[1]
    x = randn(2, D_MODEL).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_query_convolution_starts_as_the_identity(kind: str) -> None:
    with_convolution, without = build(kind, query_conv=3).layers[2], build(kind).layers[2]
    without.load_state_dict(with_convolution.state_dict(), strict=False)
    without.table.load_state_dict(with_convolution.table.state_dict())
    x = randn(2, 5, D_MODEL)
    torch.testing.assert_close(with_convolution(x), without(x))


def test_query_convolution_against_an_explicit_sum() -> None:
    layer = build(query_conv=3).layers[0]
    assert layer.query_conv is not None
    weight = torch.nn.init.normal_(layer.query_conv.weight).detach()
    x = randn(2, 5, D_MODEL)
    plain = x @ layer.query_proj.weight.T
    expected = torch.zeros_like(plain)
    for token in range(5):
        for tap in range(3):  # the last tap weighs the token itself
            earlier = token - 2 + tap
            if earlier >= 0:
                expected[:, token] += weight[:, 0, tap] * plain[:, earlier]
    torch.testing.assert_close(layer.queries(x), expected.view(10, layer.num_queries, 4))


def test_query_convolution_is_causal() -> None:
    layer = build(query_conv=3).layers[0]
    assert layer.query_conv is not None
    torch.nn.init.normal_(layer.query_conv.weight)
    x = randn(2, 6, D_MODEL)
    changed = x.clone()
    changed[0, 3] += 1
    before, after = layer.queries(x).view(2, 6, -1), layer.queries(changed).view(2, 6, -1)
    same = (before == after).all(-1)
    assert same.tolist() == [[True, True, True, False, False, False], [True] * 6]


def test_dropout_only_in_training() -> None:
    layer = build(output_dropout=0.5).layers[0]
    x = randn(500, D_MODEL)
    expected = layer.eval()(x)
    assert torch.equal(layer(x), expected)
    torch.manual_seed(0)
    y = layer.train()(x)
    dropped = y == 0
    assert 0.45 < dropped.double().mean() < 0.55
    torch.testing.assert_close(y[~dropped], 2 * expected[~dropped])


def assert_roughly_equal(narrow: Tensor, expected: Tensor) -> None:
    """Half of the tokens agree to 2%, and most to 10%: where scores nearly tie, rounding may choose another row."""
    errors = (narrow - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.quantile(0.5) < 0.02
    assert errors.quantile(0.75) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    memory = build(kind, torch.float32, balance_coef=0.1, num_keys=16)
    layer, x = memory.layers[0], randn(200, D_MODEL, dtype=torch.float32)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert_roughly_equal(y.float(), expected)
    y.float().square().sum().backward()
    for parameter in (*layer.parameters(), *layer.table.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_parameters(kind: str) -> None:
    memory = build(kind, num_keys=16)
    x = randn(200, D_MODEL)
    expected = memory.layers[1](x)
    memory.to(torch.bfloat16)
    y = memory.layers[1](x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_roughly_equal(y.double(), expected)
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in memory.layers[1].parameters())
    memory.refresh()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing(kind: str) -> None:
    memory = build(kind, balance_coef=0.1)
    x = randn(6, D_MODEL)

    def gradients(checkpointed: bool) -> list[Tensor]:
        memory.zero_grad()
        y = x
        for layer in memory.layers:
            y = y + (checkpoint(layer, y, use_reentrant=False) if checkpointed else layer(y))
        loss = memory.auxiliary_loss()
        assert loss is not None
        (y.square().sum() + loss).backward()
        return [parameter.grad.clone() for parameter in memory.parameters() if parameter.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(list(memory.parameters()))
    torch.testing.assert_close(recomputed, plain)


def copied(layer: MemoryLayer) -> MemoryLayer:
    return copy.deepcopy(layer)


def saved_whole(layer: MemoryLayer) -> MemoryLayer:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # written just above


@pytest.mark.parametrize("duplicate", [copied, saved_whole])
@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind: str, duplicate: Any) -> None:
    layer = build(kind, balance_coef=0.1).layers[0]
    x = randn(3, D_MODEL)
    y = layer(x)  # whose graph and auxiliary loss are not copied
    twin = duplicate(layer)
    assert twin.auxiliary_loss is None
    torch.testing.assert_close(twin(x), y)
    twin(x).sum().backward()
    assert twin.table.values.grad is not None
    assert layer.table.values.grad is None


@pytest.mark.parametrize("kind", ["memory_plus", "ultramem_v2"])
def test_compiled_for_inference(kind: str) -> None:
    layer = build(kind).layers[0].eval()
    x = randn(3, D_MODEL)
    compiled = torch.compile(layer, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(compiled(x), layer(x))
    torch.compiler.reset()


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.parametrize("kind", ["memory_plus", "ultramem"])
@torch.no_grad()
def test_compiled_by_inductor_for_one_token(kind: str) -> None:
    """With as many keys as fill no whole number of vectors: there inductor once wrote beyond a tensor's end."""
    memory = Memory(MemoryConfig(kind=kind, num_keys=57, key_dim=32, value_dim=64, top_k=16), 64, 1)
    layer, x = memory.layers[0].eval(), randn(1, 1, 64, dtype=torch.float32)
    assert layer.axis_keys % 16
    expected, compiled = layer(x), torch.compile(layer, fullgraph=True)
    for _ in range(30):
        torch.testing.assert_close(compiled(x), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("change", ["replaced", "frozen", "copied"])
@torch.no_grad()
def test_compiled_before_any_pass(change: str) -> None:
    """A program compiled whole cannot make anew what the table's lookups share: the table does so itself."""
    memory = build(dtype=torch.float32)
    if change == "replaced":
        memory.load_state_dict(build(dtype=torch.float32).state_dict(), assign=True)
    elif change == "frozen":
        memory.requires_grad_(False)
    else:
        memory = copy.deepcopy(memory)
    layer, x = memory.layers[0].eval(), randn(3, D_MODEL, dtype=torch.float32)
    found = torch.compile(layer, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(found, layer(x))
    torch.compiler.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_print_names_the_sizes(kind: str) -> None:
    text = str(build(kind))
    assert "top_k=4, axis_keys=" in text
    assert "value_dim=8" in text
