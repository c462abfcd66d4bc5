"""The row-wise optimizer: its formula, its tables' gradients seen or unseen, its state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ultramem import ConfigError, Memory, MemoryConfig
from ultramem.ops import use_backend
from ultramem.ops.weighted_lookup.reads import Reads
from ultramem.tables.rowwise import RowwiseAdamW
from ultramem.tables.trainable import TrainableTable

ROWS, WIDTH, PRE_WIDTH = 7, 4, 2
RATE, BETA, EPS = 0.05, 0.9, 1e-6


def optimizer_of(parameters: list[nn.Parameter], **options: Any) -> RowwiseAdamW:
    groups = [{"params": parameters, "lr": RATE, "rowwise": True}]
    return RowwiseAdamW(groups, row_beta=BETA, row_eps=EPS, **options)


def make_table(device: torch.device, dtype: torch.dtype = torch.float32) -> TrainableTable:
    table = TrainableTable(ROWS, WIDTH, PRE_WIDTH, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        table.init_weights(1.0, generator)
    return table


def loss(table: TrainableTable, seed: int) -> Tensor:
    """Of three tokens that read two rows each."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(ROWS, (3, 2), generator=generator).to(table.device)
    scores, inputs, weights = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(table.values)
        for shape in ((3, 2, 1), (3, PRE_WIDTH), (3, WIDTH))
    )
    return (table.lookup(Reads(rows, scores, inputs)) * weights).sum()


def test_formula() -> None:
    """Row by row in Python's numbers; the first row has a gradient in every other step only."""
    generator = torch.Generator().manual_seed(0)
    table = nn.Parameter(torch.randn(3, WIDTH, dtype=torch.float64, generator=generator))
    expected, squares, steps = table.tolist(), [0.0] * 3, [0] * 3
    optimizer = optimizer_of([table])
    for step in range(5):
        gradient = torch.randn(3, WIDTH, dtype=torch.float64, generator=generator)
        gradient[0] *= step % 2
        table.grad = gradient.clone()
        optimizer.step()
        for row, g in enumerate(gradient.tolist()):
            if not any(g):
                continue
            steps[row] += 1
            squares[row] = BETA * squares[row] + (1 - BETA) * sum(x * x for x in g) / WIDTH
            root = (squares[row] / (1 - BETA ** steps[row])) ** 0.5
            expected[row] = [old - RATE * x / (root + EPS) for old, x in zip(expected[row], g, strict=True)]
    torch.testing.assert_close(table.data, torch.tensor(expected, dtype=torch.float64))


def test_groups_of_a_memory() -> None:
    config = MemoryConfig(num_keys=4, key_dim=4, value_dim=4, top_k=4, optimizer="rowwise", row_beta=0.7)
    memory = Memory(config, d_model=8, num_blocks=2)
    others, values = RowwiseAdamW(memory.parameter_groups(1e-3)).param_groups
    assert "rowwise" not in others
    assert (values["rowwise"], values["row_beta"], values["lr"]) == (True, 0.7, 5e-3)
    with pytest.raises(ConfigError, match=r"row_beta=0.7: only optimizer='rowwise' uses it; leave out one of them"):
        MemoryConfig(row_beta=0.7)


def test_other_groups_get_adamw() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(3)) for _ in range(2))
    table = nn.Parameter(torch.ones(ROWS, WIDTH))
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.3}
    mixed = RowwiseAdamW([{"params": [ours]}, {"params": [table], "rowwise": True}], **options)
    plain = torch.optim.AdamW([theirs], **options)
    for _ in range(3):
        ours.grad = torch.randn(3, generator=generator)
        theirs.grad = ours.grad.clone()
        mixed.step()
        plain.step()
    assert torch.equal(ours, theirs)
    assert torch.equal(table, torch.ones(ROWS, WIDTH))


@pytest.mark.kernels
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_unseen_gradients(micro_batches: int, device: torch.device) -> None:
    """Kernels that step rows themselves do what the formula does with the gradient in float64."""
    seen, unseen = make_table(device, torch.float64), make_table(device)
    unseen.load_state_dict(seen.state_dict())
    optimizers = optimizer_of(list(seen.parameters())), optimizer_of(list(unseen.parameters()), tables=[unseen])
    for step in range(3):
        for table, optimizer, backend in zip((seen, unseen), optimizers, ("naive", "fused"), strict=True):
            optimizer.zero_grad()
            with use_backend(backend):  # type: ignore[arg-type]
                for micro_batch in range(micro_batches):
                    loss(table, micro_batches * step + micro_batch).backward()
                assert (table.values.grad is None) == (table is unseen and micro_batches == 1)
                optimizer.step()
        torch.testing.assert_close(unseen.values.double(), seen.values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(unseen.pre_values.double(), seen.pre_values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(optimizers[1].table_norm().double(), optimizers[0].table_norm(), rtol=1e-4, atol=0)


@pytest.mark.kernels
def test_what_was_left_is_dropped_and_gradients_can_still_be_asked_for(device: torch.device) -> None:
    table, alone = make_table(device), make_table(device)
    optimizer = optimizer_of(list(table.parameters()), tables=[table])
    with use_backend("fused"):
        expected = torch.autograd.grad(loss(alone, 1), list(alone.parameters()))
        loss(table, 0).backward()
        optimizer.zero_grad()
        found = torch.autograd.grad(loss(table, 1), list(table.parameters()))
        before = table.values.clone()
        optimizer.step()  # of nothing
    torch.testing.assert_close(found, expected)
    assert torch.equal(table.values, before)


@pytest.mark.kernels
def test_the_copy_in_autocasts_dtype_follows(device: torch.device) -> None:
    table, other = make_table(device), make_table(device)
    optimizer = optimizer_of(list(table.parameters()), tables=[table])
    with use_backend("fused"), torch.autocast(device.type, torch.bfloat16):
        for step in range(3):
            loss(table, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            table.refresh()
            other.load_state_dict(table.state_dict())
            assert torch.equal(loss(table, 9), loss(other, 9))
        table.values.data.mul_(2)  # not the optimizer's doing
        table.refresh()
        other.load_state_dict(table.state_dict())
        assert torch.equal(loss(table, 9), loss(other, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_through_a_file_as_it_is(dtype: torch.dtype) -> None:
    table = nn.Parameter(torch.randn(ROWS, WIDTH).to(dtype))
    optimizer = optimizer_of([table])
    for _ in range(3):
        table.grad = torch.randn(ROWS, WIDTH).to(dtype)
        optimizer.step()
    again = nn.Parameter(table.detach().clone())
    loaded = optimizer_of([again])
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    table.grad = torch.randn(ROWS, WIDTH).to(dtype)
    again.grad = table.grad.clone()
    optimizer.step()
    loaded.step()
    assert torch.equal(again, table)
    for name, state in optimizer.state[table].items():
        assert torch.equal(loaded.state[again][name], state)
        assert loaded.state[again][name].dtype == state.dtype == torch.float32
