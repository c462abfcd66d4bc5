"""The row-wise optimizer: its formula, its tables' gradients seen or unseen, its state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.multiprocessing import start_processes

from ultramem import ConfigError, Memory, MemoryConfig
from ultramem.ops import use_backend
from ultramem.ops.weighted_lookup.reads import Reads
from ultramem.tables.rowwise import RowwiseAdamW
from ultramem.tables.trainable import TrainableTable

ROWS, WIDTH, PRE_WIDTH = 7, 4, 2
RATE, BETA, EPS = 0.05, 0.9, 1e-6


def optimizer_of(parameters: list[nn.Parameter], *, lr: float = RATE, **options: Any) -> RowwiseAdamW:
    groups = [{"params": parameters, "lr": lr, "rowwise": True}]
    return RowwiseAdamW(groups, row_beta=BETA, row_eps=EPS, **options)


def make_table(device: torch.device, dtype: torch.dtype = torch.float32) -> TrainableTable:
    table = TrainableTable(ROWS, WIDTH, PRE_WIDTH, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        table.init_weights(1.0, generator)
    return table


def loss(table: TrainableTable, seed: int, dtype: torch.dtype | None = None) -> Tensor:
    """Of three tokens that read two rows each."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(ROWS, (3, 2), generator=generator).to(table.device)
    scores, inputs, weights = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(table.device, dtype or table.values.dtype)
        for shape in ((3, 2, 1), (3, PRE_WIDTH), (3, WIDTH))
    )
    return (table.lookup(Reads(rows, scores, inputs), dtype) * weights).sum()


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
        MemoryConfig(optimizer="adamw", row_beta=0.7)


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


def assert_written(table: TrainableTable) -> None:
    """The optimizer has written the copy; Triton's interpreter cuts numbers off where a GPU rounds them."""
    copies = table.copy_in_use.parts(table.values, table.pre_values)
    for found, part in zip(copies, (table.values, table.pre_values), strict=True):
        assert found is not None
        torch.testing.assert_close(found, part.bfloat16(), rtol=0 if found.is_cuda else 2.0**-7, atol=0)


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
            assert_written(table)
        loss(table, 9)
        table.values.data.mul_(2)  # not the optimizer's doing
        table.refresh()
        other.load_state_dict(table.state_dict())
        assert torch.equal(loss(table, 9), loss(other, 9))


@pytest.mark.kernels
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_that_are_seen_are_written_to_the_copy_too(micro_batches: int, device: torch.device) -> None:
    deferred, seen = make_table(device), make_table(device)
    optimizers = [optimizer_of(list(table.parameters())) for table in (deferred, seen)]
    for optimizer, table in zip(optimizers, (deferred, seen), strict=True):
        optimizer.take_over([table], defer=table is deferred)
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # steps of its class are followed from now on
    with use_backend("fused"), torch.autocast(device.type, torch.bfloat16):
        for step in range(3):
            for optimizer, table in zip(optimizers, (deferred, seen), strict=True):
                for micro_batch in range(micro_batches):
                    loss(table, 2 * step + micro_batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                assert_written(table)
            torch.testing.assert_close(seen.values, deferred.values, rtol=0, atol=1e-2)


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


def narrow(rows: int, width: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).bfloat16())


def random_gradient(parameter: nn.Parameter, step: int) -> Tensor:
    gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
    gradient[step % len(gradient)] = 0  # rows have taken unlike numbers of steps
    return gradient.bfloat16()


def train(optimizer: RowwiseAdamW, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for parameter in parameters:
            parameter.grad = random_gradient(parameter, step)
        optimizer.step()


def test_narrow_steps_add_up() -> None:
    """Steps of a fiftieth of a unit: rounded to the nearest, nothing would ever change."""
    parameter = nn.Parameter(torch.full((64, 64), 1.5, dtype=torch.bfloat16))
    optimizer = optimizer_of([parameter], lr=2.0**-7 / 50)
    for _ in range(200):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    moved = (1.5 - parameter.double()) / 2.0**-7
    # Of 200 steps, each a unit down with the probability 1/50; the smallest deviation that is right on average.
    assert moved.mean().item() == pytest.approx(4, abs=5 * (4 / 64**2) ** 0.5)
    assert moved.var().item() == pytest.approx(4 * 49 / 50, rel=0.2)


def test_narrow_goes_on_from_a_file_to_the_bit() -> None:
    def fresh() -> tuple[list[nn.Parameter], RowwiseAdamW]:
        parameters = [narrow(ROWS, WIDTH), narrow(ROWS, PRE_WIDTH)]
        return parameters, optimizer_of(parameters, seed=3)

    whole, optimizer = fresh()
    train(optimizer, whole, range(10))
    broken, optimizer = fresh()
    train(optimizer, broken, range(6))
    resumed, loaded = fresh()
    for parameter, left in zip(resumed, broken, strict=True):
        parameter.data.copy_(left)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.manual_seed(1)
    train(loaded, resumed, range(6, 10))
    assert all(map(torch.equal, resumed, whole))
    other = [narrow(ROWS, WIDTH), narrow(ROWS, PRE_WIDTH)]
    train(optimizer_of(other, seed=4), other, range(10))
    assert not any(map(torch.equal, other, whole))


def test_narrow_parts_are_rounded_apart() -> None:
    one, other = narrow(ROWS, 64), narrow(ROWS, 64)
    train(optimizer_of([one, other]), [one, other], range(1))
    assert 0.1 < (one == other).double().mean() < 0.9


@pytest.mark.kernels
def test_narrow_with_kernels_is_the_same_to_the_bit(device: torch.device) -> None:
    """From run to run; and it stays about where a table in float32 is."""
    tables = [make_table(device, torch.bfloat16) for _ in range(2)] + [make_table(device)]
    tables[2].load_state_dict(tables[0].state_dict())
    for table in tables:
        optimizer = optimizer_of(list(table.parameters()), tables=[table])
        with use_backend("fused"), torch.autocast(device.type, torch.bfloat16):
            for step in range(3):
                loss(table, step, torch.float32).backward()
                assert table.values.grad is None
                optimizer.step()
                optimizer.zero_grad()
        assert (table.copy_in_use._copy is None) == (table is not tables[2])
    for found, again, wide in zip(*(list(table.parameters()) for table in tables), strict=True):
        assert torch.equal(found, again)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), wide, rtol=0, atol=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo shards tensors on the CPU")
def test_narrow_shards_are_rounded_as_the_whole(tmp_path: Path) -> None:
    whole = narrow(ROWS, 64)
    train(optimizer_of([whole]), [whole], range(5))
    start_processes(_train_a_shard, (tmp_path, whole.detach()), nprocs=2, start_method="fork")


def _train_a_shard(rank: int, directory: Path, expected: Tensor) -> None:
    dist.init_process_group("gloo", f"file://{directory / 'store'}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        parameter = nn.Parameter(distribute_tensor(narrow(ROWS, 64).detach(), mesh, [Shard(0)]))
        optimizer = optimizer_of([parameter])
        for step in range(5):
            parameter.grad = distribute_tensor(random_gradient(narrow(ROWS, 64), step), mesh, [Shard(0)])
            optimizer.step()
        assert torch.equal(parameter.full_tensor(), expected)
    finally:
        dist.destroy_process_group()
