"""The copy of a table in autocast's dtype, which kernels read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

pytest.importorskip("triton")

from comparison import assert_near
from ultramem.ops.weighted_lookup.reads import Reads
from ultramem.tables.computing_copy import ComputingCopy
from ultramem.tables.trainable import TrainableTable

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("fused")]


@pytest.fixture
def table(device: torch.device, generator: torch.Generator) -> TrainableTable:
    table = TrainableTable(11, 6, 3, device=device)
    for parameter in table.parameters():
        nn.init.normal_(parameter, generator=generator)
    return table


def look_up(table: TrainableTable) -> Tensor:
    device = table.values.device
    scores, pre_input = torch.ones(1, 2, 1, device=device), torch.ones(1, 3, device=device)
    return table.lookup(Reads(torch.tensor([[1, 5]], device=device), scores, pre_input))


def expected_under_autocast(table: TrainableTable) -> Tensor:
    with torch.no_grad():
        values, pre_values = (parameter[[1, 5]].bfloat16().double() for parameter in table.parameters())
        return (pre_values.sum(1, keepdim=True) * values).sum(0, keepdim=True)


def test_made_once_after_each_change(table: TrainableTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all lookups and backward passes between two changes of the parameters."""
    made = []
    make = ComputingCopy._make
    monkeypatch.setattr(ComputingCopy, "_make", lambda *arguments: made.append(1) or make(*arguments))

    def check_pass() -> None:
        with torch.autocast(table.values.device.type, torch.bfloat16):
            results = [look_up(table) for _ in range(3)]
        for result in results:
            assert result.dtype == torch.bfloat16
            assert_near(result, expected_under_autocast(table), 1e-2)
        table.zero_grad()
        torch.stack(results).sum().backward()
        assert table.values.grad is not None
        assert table.values.grad.dtype == torch.float32
        with torch.no_grad():
            weight = table.pre_values[5].bfloat16().double().sum()
        assert_near(table.values.grad[5].double(), (3 * weight).expand(6), 1e-2)

    check_pass()
    check_pass()
    assert len(made) == 1
    with torch.no_grad():
        table.values.mul_(-2)
    check_pass()
    assert len(made) == 2
    torch.optim.SGD(table.parameters(), lr=1.0).step()
    check_pass()
    assert len(made) == 3
    table.values.data.mul_(3)  # unseen
    table.pre_values.data.mul_(3)
    table.refresh()
    assert len(made) == 4
    check_pass()
    assert len(made) == 4
    table.load_state_dict({name: parameter + 1 for name, parameter in table.state_dict().items()})
    check_pass()
    assert len(made) == 5


def test_serves_lookups_without_pre_values(table: TrainableTable) -> None:
    device = table.values.device
    with torch.autocast(device.type, torch.bfloat16):
        for _ in range(2):
            assert_near(look_up(table), expected_under_autocast(table), 1e-2)
            reads = Reads(torch.tensor([[5]], device=device), torch.ones(1, 1, 1, device=device))
            assert torch.equal(table.lookup(reads), table.values[5:6].bfloat16())


def test_none_without_autocast(table: TrainableTable) -> None:
    look_up(table).sum().backward()
    table.refresh()
    assert table._copy._copy is None


def test_optimizers_are_followed_as_long_as_it_lives(table: TrainableTable) -> None:
    before = len(hooks)
    with torch.autocast(table.values.device.type, torch.bfloat16):
        look_up(table)
        look_up(table)
    assert len(hooks) == before + 1
    table._make_helpers()
    assert len(hooks) == before
