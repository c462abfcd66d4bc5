"""One accumulation of the table's gradient, however many lookups there were."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ultramem.layers import ValueTable
from ultramem.ops import SharedTable
from ultramem.ops.weighted_lookup import shared_table

ROWS, WIDTH, LAYERS = 7, 4, 3


@pytest.fixture
def dense_gradients(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.dtype]]:
    """Address and dtype of each buffer as large as the table that a backward pass made."""
    made: list[tuple[int, torch.dtype]] = []
    zeros_like = torch.zeros_like

    def counting(*args: object, **kwargs: object) -> Tensor:
        buffer = zeros_like(*args, **kwargs)
        made.append((buffer.data_ptr(), buffer.dtype))
        return buffer

    monkeypatch.setattr(shared_table.torch, "zeros_like", counting)
    return made


@pytest.fixture
def table() -> ValueTable:
    table = ValueTable(ROWS, WIDTH, dtype=torch.float64)
    nn.init.normal_(table.values, generator=torch.Generator().manual_seed(0))
    return table


def lookups(table: ValueTable, seed: int = 0, values: Tensor | None = None) -> Tensor:
    """The sum of what several layers look up; through plain autograd if `values` are given."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(LAYERS):
        rows = torch.randint(ROWS, (5, 3), generator=generator)
        scores = torch.randn(5, 3, 2, dtype=torch.float64, generator=generator)
        if values is None:
            looked_up = table.lookup(scores, rows)
        else:
            looked_up = (scores.repeat_interleave(WIDTH // 2, -1) * values[rows]).sum(1)
        total = total + looked_up.square().sum()
    return total


def expected_gradient(table: ValueTable, seed: int = 0) -> Tensor:
    values = table.values.detach().clone().requires_grad_()
    return torch.autograd.grad(lookups(table, seed, values), values)[0]


def test_one_backward_gives_the_sum_in_one_buffer(
    table: ValueTable, dense_gradients: list[tuple[int, torch.dtype]]
) -> None:
    lookups(table).backward()
    torch.testing.assert_close(table.values.grad, expected_gradient(table))
    assert len(dense_gradients) == 1
    assert table.values.grad is not None
    assert table.values.grad.data_ptr() == dense_gradients[0][0], "the gradient was copied"


def test_micro_batches_add_up(table: ValueTable, dense_gradients: list[tuple[int, torch.dtype]]) -> None:
    for seed in range(3):
        lookups(table, seed).backward()
    torch.testing.assert_close(table.values.grad, sum(expected_gradient(table, seed) for seed in range(3)))
    assert len(dense_gradients) == 3


def test_two_passes_open_at_once(table: ValueTable) -> None:
    first, second = lookups(table, 1), lookups(table, 2)
    first.backward()
    second.backward()
    torch.testing.assert_close(table.values.grad, expected_gradient(table, 1) + expected_gradient(table, 2))


def test_backward_twice_through_a_retained_graph(table: ValueTable) -> None:
    loss = lookups(table)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(table.values.grad, 2 * expected_gradient(table))


def test_table_changed_after_a_forward_without_backward(table: ValueTable) -> None:
    abandoned = lookups(table, 1)
    with torch.no_grad():
        table.values.mul_(2)
    loss = lookups(table, 2)
    loss.backward()
    torch.testing.assert_close(table.values.grad, expected_gradient(table, 2))
    del abandoned


def test_optimizer_steps_between_passes(table: ValueTable) -> None:
    optimizer = torch.optim.SGD(table.parameters(), lr=0.01)
    for seed in range(3):
        optimizer.zero_grad()
        loss = lookups(table, seed)
        loss.backward()
        torch.testing.assert_close(table.values.grad, expected_gradient(table, seed))
        torch.testing.assert_close(loss, lookups(table, seed, table.values))
        optimizer.step()


def test_without_gradients_and_then_with(table: ValueTable) -> None:
    with torch.no_grad():
        silent = lookups(table)
    with torch.inference_mode():
        lookups(table)
    loss = lookups(table)
    assert not silent.requires_grad
    with torch.no_grad():  # an evaluation in the midst of a pass
        lookups(table)
    (loss + lookups(table, 1)).backward()
    torch.testing.assert_close(table.values.grad, expected_gradient(table) + expected_gradient(table, 1))


def test_frozen_table(table: ValueTable) -> None:
    table.values.requires_grad_(False)
    rows, scores = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, 2, dtype=torch.float64, requires_grad=True)
    table.lookup(scores, rows).sum().backward()
    assert scores.grad is not None
    assert table.values.grad is None
    table.values.requires_grad_()
    lookups(table).backward()
    torch.testing.assert_close(table.values.grad, expected_gradient(table))


def test_autograd_grad_for_the_values_or_only_for_something_else(table: ValueTable) -> None:
    (gradient,) = torch.autograd.grad(lookups(table), table.values)
    torch.testing.assert_close(gradient, expected_gradient(table))
    scores = torch.ones(1, 2, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([[1, 2]])
    torch.autograd.grad(table.lookup(scores, rows).sum(), scores)
    lookups(table).backward()
    torch.testing.assert_close(table.values.grad, expected_gradient(table))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(table: ValueTable, use_reentrant: bool) -> None:
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def forward(scale: Tensor, seed: int) -> Tensor:
        return lookups(table, seed) * scale

    for _ in range(2):
        table.values.grad = None
        loss = sum(checkpoint(forward, scale, seed, use_reentrant=use_reentrant) for seed in range(2))
        loss.backward()
        torch.testing.assert_close(table.values.grad, expected_gradient(table, 0) + expected_gradient(table, 1))


def test_a_backward_that_failed_leaves_nothing_behind(table: ValueTable) -> None:
    def fail(_: Tensor) -> None:
        raise RuntimeError("out of memory, say")

    rows, scores = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, 2, dtype=torch.float64)
    scores_of_first = scores.clone().requires_grad_()
    scores_of_first.register_hook(fail)
    first = table.lookup(scores_of_first, rows)
    second = table.lookup(scores + first.sum() * 0, rows)
    with pytest.raises(RuntimeError, match="out of memory"):
        second.sum().backward()
    table.values.grad = None
    lookups(table).backward()
    torch.testing.assert_close(table.values.grad, expected_gradient(table))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulates_in_float32(dtype: torch.dtype, dense_gradients: list[tuple[int, torch.dtype]]) -> None:
    """256 + 1 is 256 in bfloat16: adding up 512 ones needs more."""
    table = ValueTable(2, 2, dtype=dtype)
    nn.init.ones_(table.values)
    table.lookup(torch.ones(64, 8, 1, dtype=dtype), torch.zeros(64, 8, dtype=torch.int64)).sum().backward()
    assert dense_gradients[0][1] == torch.float32
    assert table.values.grad is not None
    assert table.values.grad.dtype == dtype
    assert table.values.grad[0].tolist() == [512, 512]


def test_a_table_that_is_the_result_of_operations() -> None:
    leaf = torch.ones(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    (SharedTable(leaf * 3).gather(torch.tensor([1, 1, 4])) * 2).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad[:, 0].tolist() == [0, 12, 0, 0, 6, 0, 0]


def test_copies_share_nothing(table: ValueTable) -> None:
    lookups(table)  # open while it is copied
    for twin in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        lookups(twin).backward()
        torch.testing.assert_close(twin.values.grad, expected_gradient(table))
        assert table.values.grad is None


def test_saving_and_loading(table: ValueTable) -> None:
    lookups(table)
    file = io.BytesIO()
    torch.save(table.state_dict(), file)
    file.seek(0)
    twin = ValueTable(ROWS, WIDTH, dtype=torch.float64)
    twin.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(twin.values, table.values)


def test_changing_the_dtype(table: ValueTable) -> None:
    lookups(table)
    table.to(torch.float32)
    table.to(torch.float64)
    lookups(table).backward()
    torch.testing.assert_close(table.values.grad, expected_gradient(table))
    table.values.grad = None
    lookups(table)  # left open
    table.to(torch.float32)
    table.lookup(torch.ones(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64)).sum().backward()
    assert table.values.grad.dtype == torch.float32


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_outlives_the_pass(table: ValueTable, backward: bool) -> None:
    gc.disable()  # reference counting alone must do
    try:
        loss = lookups(table)
        pending = weakref.ref(table._shared["values"]._gradient)
        if backward:
            loss.backward()
            assert pending()._sum is None
        values = weakref.ref(table.values)
        table.values.grad = None
        del loss, table.values
        table._shared.clear()
        assert pending() is None
        assert values() is None
    finally:
        gc.enable()


@pytest.fixture
def process_group(tmp_path: object) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(table: ValueTable) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = table

        def forward(self, seed: int) -> Tensor:
            return lookups(self.table, seed)

    model = nn.parallel.DistributedDataParallel(Model())
    for seed in range(3):
        model.zero_grad()
        model(seed).backward()
        torch.testing.assert_close(table.values.grad, expected_gradient(table, seed))
