"""One accumulation of the table's gradient, however many lookups there were."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from comparison import assert_near
from ultramem.errors import UltraMemError
from ultramem.ops import use_backend
from ultramem.ops.kernels.operators import find
from ultramem.ops.weighted_lookup import naive
from ultramem.ops.weighted_lookup.reads import Reads
from ultramem.tables.gradient_accumulator import GradientAccumulator
from ultramem.tables.trainable import TrainableTable

ROWS, WIDTH, PRE_WIDTH, LAYERS = 7, 4, 2, 3

# Each backend in the widest dtype that it has.
backends = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param("naive", torch.float64, id="naive"),
        pytest.param("auto", torch.float64, id="auto"),  # on a CPU, lookups that copy no rows
        pytest.param("fused", torch.float32, id="fused", marks=pytest.mark.kernels),
    ],
)


@pytest.fixture
def dense_gradients(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.dtype]]:
    """Address and dtype of each buffer as large as the table that a backward pass made."""
    made: list[tuple[int, torch.dtype]] = []
    zeros_like = torch.zeros_like

    def counting(*args: object, **kwargs: object) -> Tensor:
        buffer = zeros_like(*args, **kwargs)
        made.append((buffer.data_ptr(), buffer.dtype))
        return buffer

    monkeypatch.setattr(torch, "zeros_like", counting)
    return made


@pytest.fixture
def backend() -> str:
    return "naive"


@pytest.fixture
def dtype() -> torch.dtype:
    return torch.float64


@pytest.fixture
def table(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[TrainableTable]:
    table = TrainableTable(ROWS, WIDTH, PRE_WIDTH, dtype=dtype, device=device)
    for parameter in table.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.shape[1])))
    with use_backend(backend):  # type: ignore[arg-type]
        yield table


def lookups(
    table: TrainableTable, seed: int = 0, leaves: Sequence[Tensor] | None = None, scale: Tensor | float = 1.0
) -> Tensor:
    """The sum of what several layers look up; through plain autograd if `leaves`, values and pre-values, are given."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=table.values.dtype, device=table.values.device)
    for _ in range(LAYERS):
        rows = torch.randint(ROWS, (3, 4), generator=generator).to(total.device)
        scores, pre_input = (torch.randn(shape, generator=generator).to(total) for shape in ((3, 4, 2), (3, PRE_WIDTH)))
        if leaves is None:
            looked_up = table.lookup(Reads(rows, scores * scale, pre_input))
        else:
            values, pre_values = leaves
            weights = scores * (pre_values[rows] * pre_input.unsqueeze(1)).sum(-1, keepdim=True)
            looked_up = (weights.repeat_interleave(WIDTH // 2, -1) * values[rows]).sum(1)
        total = total + looked_up.square().sum()
    return total


def expected_gradients(table: TrainableTable, *seeds: int) -> list[Tensor]:
    leaves = [parameter.detach().clone().requires_grad_() for parameter in table.parameters()]
    return list(torch.autograd.grad(sum(lookups(table, seed, leaves) for seed in seeds or [0]), leaves))


def gradients(table: TrainableTable) -> list[Tensor | None]:
    return [parameter.grad for parameter in table.parameters()]


def check(table: TrainableTable, *seeds: int) -> None:
    """The table's gradients are those of the passes of these seeds, added up."""
    assert_gradients_near(table, expected_gradients(table, *seeds))


def assert_gradients_near(table: TrainableTable, expected: Sequence[Tensor | None]) -> None:
    for found, wanted in zip(gradients(table), expected, strict=True):
        assert_near(found, wanted, 1e-10 if table.values.dtype == torch.float64 else 1e-5)


@backends
def test_one_backward_gives_the_sum_in_one_buffer(
    table: TrainableTable, dense_gradients: list[tuple[int, torch.dtype]]
) -> None:
    lookups(table).backward()
    made = [address for address, _ in dense_gradients]
    assert sorted(made) == sorted(gradient.data_ptr() for gradient in gradients(table)), "a gradient was copied"
    check(table)


@backends
def test_micro_batches_add_up(
    table: TrainableTable, backend: str, dense_gradients: list[tuple[int, torch.dtype]]
) -> None:
    for seed in range(3):
        lookups(table, seed).backward()
    assert len(dense_gradients) == 2 * (1 if backend == "fused" else 3)
    check(table, 0, 1, 2)


@backends
def test_two_passes_open_at_once(table: TrainableTable) -> None:
    first, second = lookups(table, 1), lookups(table, 2)
    first.backward()
    check(table, 1)
    second.backward()
    check(table, 1, 2)


@backends
def test_backward_twice_through_a_retained_graph(table: TrainableTable) -> None:
    loss = lookups(table)
    loss.backward(retain_graph=True)
    loss.backward()
    check(table, 0, 0)


@backends
def test_table_changed_after_a_forward_without_backward(table: TrainableTable) -> None:
    abandoned = lookups(table, 1)
    with torch.no_grad():
        table.values.mul_(2)
    loss = lookups(table, 2)
    loss.backward()
    check(table, 2)
    del abandoned


@backends
def test_optimizer_steps_between_passes(table: TrainableTable) -> None:
    optimizer = torch.optim.SGD(table.parameters(), lr=0.01)
    for seed in range(3):
        optimizer.zero_grad()
        loss = lookups(table, seed)
        loss.backward()
        check(table, seed)
        torch.testing.assert_close(loss, lookups(table, seed, list(table.parameters())))
        optimizer.step()


@backends
def test_without_gradients_and_then_with(table: TrainableTable) -> None:
    with torch.no_grad():
        silent = lookups(table)
    with torch.inference_mode():
        lookups(table)
    loss = lookups(table)
    assert not silent.requires_grad
    with torch.no_grad():  # an evaluation in the midst of a pass
        lookups(table)
    (loss + lookups(table, 1)).backward()
    check(table, 0, 1)


@backends
def test_first_used_in_inference(table: TrainableTable) -> None:
    """What is made for the table there serves training as well."""
    with torch.inference_mode():
        table._make_helpers()
        lookups(table)
    lookups(table).backward()
    check(table)


def one_lookup(table: TrainableTable, scores: Tensor, row: int = 1) -> Tensor:
    rows = torch.full(scores.shape[:2], row, device=table.values.device)
    pre_input = None if table.pre_values is None else torch.ones(len(rows), PRE_WIDTH).to(table.values)
    return table.lookup(Reads(rows, scores, pre_input))


@backends
def test_lookups_with_and_without_pre_values(table: TrainableTable) -> None:
    scores, rows = torch.ones(1, 2, 2).to(table.values), torch.ones(1, 2, dtype=torch.int64, device=table.values.device)
    values, pre_values = expected_gradients(table)
    values[1] += 2
    (lookups(table) + table.lookup(Reads(rows, scores)).sum()).backward()
    assert_gradients_near(table, [values, pre_values])
    table.zero_grad()
    table.lookup(Reads(rows, scores)).sum().backward()
    assert table.values.grad is not None
    assert table.values.grad.tolist() == [[2.0 * (row == 1)] * WIDTH for row in range(ROWS)]
    assert table.pre_values is not None
    assert table.pre_values.grad is None or not table.pre_values.grad.any()


@backends
def test_frozen_table(table: TrainableTable) -> None:
    table.requires_grad_(False)
    scores = torch.ones(1, 2, 2).to(table.values).requires_grad_()
    one_lookup(table, scores).sum().backward()
    assert scores.grad is not None
    assert gradients(table) == [None, None]
    table.requires_grad_()
    lookups(table).backward()
    check(table)


@backends
@pytest.mark.parametrize("frozen", ["values", "pre_values"])
def test_half_frozen_table(table: TrainableTable, frozen: str) -> None:
    getattr(table, frozen).requires_grad_(False)
    lookups(table).backward()
    expected = expected_gradients(table)
    for (name, parameter), gradient in zip(table.named_parameters(), expected, strict=True):
        if name == frozen:
            assert parameter.grad is None
        else:
            assert_near(parameter.grad, gradient, 1e-5)


@backends
def test_autograd_grad_for_the_values_or_only_for_something_else(table: TrainableTable) -> None:
    (gradient,) = torch.autograd.grad(lookups(table), table.values)
    assert_near(gradient, expected_gradients(table)[0], 1e-5)
    scores = torch.ones(1, 2, 2).to(table.values).requires_grad_()
    torch.autograd.grad(one_lookup(table, scores).sum(), scores)
    lookups(table).backward()
    check(table)


@backends
def test_second_derivatives(table: TrainableTable) -> None:
    """Of the table's gradient there are none, which is said; of other gradients, by the definition, they are right."""
    scale = torch.ones(()).to(table.values).requires_grad_()

    def differentiate_twice() -> None:
        (gradient,) = torch.autograd.grad(lookups(table), table.values, create_graph=True)
        gradient.square().sum().backward()

    with pytest.raises((UltraMemError, RuntimeError), match=r"cannot be differentiated again|once_differentiable"):
        differentiate_twice()
    table.zero_grad()
    if table.values.dtype == torch.float64:  # the loss is a square in `scale`: its second derivative is twice itself
        loss = lookups(table, scale=scale)
        (first,) = torch.autograd.grad(loss, scale, create_graph=True)
        (second,) = torch.autograd.grad(first, scale)
        torch.testing.assert_close(second, 2 * loss.detach())
    table.zero_grad()
    lookups(table).backward()
    check(table)


@backends
def test_autograd_grad_leaves_the_gradient_alone(table: TrainableTable) -> None:
    lookups(table, 1).backward()
    before = gradients(table)
    found = torch.autograd.grad(lookups(table, 2), tuple(table.parameters()))
    torch.testing.assert_close(list(found), expected_gradients(table, 2))
    assert all(now is gradient for now, gradient in zip(gradients(table), before, strict=True))
    check(table, 1)


@backends
def test_backward_for_other_inputs_leaves_the_gradient_alone(table: TrainableTable) -> None:
    lookups(table, 1).backward()
    scores = torch.ones(1, 2, 2).to(table.values).requires_grad_()
    (lookups(table, 2) + one_lookup(table, scores).sum()).backward(inputs=[scores])
    assert scores.grad is not None
    check(table, 1)


@backends
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(table: TrainableTable, use_reentrant: bool) -> None:
    scale = torch.ones(()).to(table.values).requires_grad_()

    def forward(scale: Tensor, seed: int) -> Tensor:
        return lookups(table, seed, scale=scale)

    for _ in range(2):
        table.zero_grad()
        loss = sum(checkpoint(forward, scale, seed, use_reentrant=use_reentrant) for seed in range(2))
        loss.backward()
        check(table, 0, 1)


@backends
def test_a_backward_that_failed_leaves_nothing_behind(table: TrainableTable) -> None:
    def fail(_: Tensor) -> None:
        raise RuntimeError("out of memory, say")

    scores = torch.ones(1, 2, 2).to(table.values)
    scores_of_first = scores.clone().requires_grad_()
    scores_of_first.register_hook(fail)
    first = one_lookup(table, scores_of_first)
    second = one_lookup(table, scores + first.sum() * 0)
    with pytest.raises(RuntimeError, match="out of memory"):
        second.sum().backward()
    table.zero_grad()
    lookups(table).backward()
    check(table)
    assert dict(table._accumulator._passes) == {}


@backends
def test_a_backward_that_failed_holds_nothing(table: TrainableTable) -> None:
    """What it left goes with the pass, while the graph and the table stay."""

    def fail(_: Tensor) -> None:
        raise RuntimeError("out of memory, say")

    scores = torch.ones(1, 2, 2).to(table.values).requires_grad_()
    scores.register_hook(fail)
    loss = one_lookup(table, scores).sum()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            loss.backward(retain_graph=True)
        assert dict(table._accumulator._passes) == {}


@backends
def test_another_thread_between_forward_and_backward(table: TrainableTable) -> None:
    """Each thread's pass brings the gradient that it would bring alone, whenever the other's begins."""
    expected = {seed: expected_gradients(table, seed) for seed in (1, 2)}
    reached, go_on = threading.Event(), threading.Event()

    def wait(_: Tensor) -> None:
        reached.set()
        assert go_on.wait(60)

    def first() -> None:
        early = one_lookup(table, torch.zeros(1, 2, 2).to(table.values))
        early.register_hook(wait)  # the later lookups' backward passes come before its own, and the table's after
        found[1] = torch.autograd.grad(early.sum() + lookups(table, 1), list(table.parameters()))

    def second() -> None:
        assert reached.wait(60)
        with use_backend(backend_in_use):
            loss = lookups(table, 2)
            if table.device.type == "cuda":  # whose backward passes share a thread, which waits
                go_on.set()
            found[2] = torch.autograd.grad(loss, list(table.parameters()))
        go_on.set()

    found: dict[int, Sequence[Tensor]] = {}
    backend_in_use = "naive" if table.values.dtype == torch.float64 else "fused"
    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        for gradient, wanted in zip(found[seed], expected[seed], strict=True):
            assert_near(gradient, wanted, 1e-10 if wanted.dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["naive", pytest.param("fused", marks=pytest.mark.kernels)])
def test_accumulates_in_float32(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """256 + 1 is 256 in bfloat16: adding up 512 ones needs more."""
    table = TrainableTable(2, 2, dtype=dtype, device=device)
    nn.init.ones_(table.values)
    with use_backend(backend):  # type: ignore[arg-type]
        one_lookup(table, torch.ones(64, 8, 1, dtype=dtype, device=device), row=0).sum().backward()
    assert table.values.grad is not None
    assert table.values.grad.dtype == dtype
    assert table.values.grad.tolist() == [[512, 512], [0, 0]]


@pytest.mark.parametrize("backend", ["naive", pytest.param("fused", marks=pytest.mark.kernels)])
def test_narrow_table_in_wide_sums(backend: str, device: torch.device) -> None:
    """As a table in float32 with the same numbers; the gradient is summed in float32 and rounded once."""
    narrow = TrainableTable(ROWS, WIDTH, PRE_WIDTH, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        narrow.init_weights(1.0, torch.Generator(device).manual_seed(0))
    wide = TrainableTable(ROWS, WIDTH, PRE_WIDTH, device=device)
    wide.load_state_dict(narrow.state_dict())
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(ROWS, (9, 4), generator=generator).to(device)
    scores, pre_input, weights = (
        torch.randn(shape, generator=generator).to(device) for shape in ((9, 4, 2), (9, PRE_WIDTH), (9, WIDTH))
    )
    found = []
    with use_backend(backend):  # type: ignore[arg-type]
        for table in (narrow, wide):
            sums = table.lookup(Reads(rows, scores, pre_input), torch.float32)
            assert sums.dtype == torch.float32
            (sums * weights).sum().backward()
            found.append([sums, *gradients(table)])
    assert torch.equal(found[0][0], found[1][0])
    for of_narrow, of_wide in zip(found[0][1:], found[1][1:], strict=True):
        assert of_narrow.dtype == torch.bfloat16
        # Triton's interpreter cuts numbers off where a GPU rounds them.
        unit = 2.0**-7 if backend == "fused" and device.type == "cpu" else 2.0**-8
        torch.testing.assert_close(of_narrow.float(), of_wide, rtol=unit, atol=0)
    assert narrow.copy_in_use._copy is None


@backends
def test_a_table_that_is_the_result_of_operations(table: TrainableTable) -> None:
    parameters = list(table.parameters())
    for name, factor in (("values", 3), ("pre_values", 2)):
        parameter = table._parameters.pop(name)
        assert parameter is not None
        setattr(table, name, parameter * factor)
    lookups(table).backward()
    leaves = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    lookups(table, 0, [leaves[0] * 3, leaves[1] * 2]).backward()
    for parameter, leaf in zip(parameters, leaves, strict=True):
        assert_near(parameter.grad, leaf.grad, 1e-10 if leaf.dtype == torch.float64 else 1e-5)


@backends
def test_copies_share_nothing(table: TrainableTable) -> None:
    lookups(table)  # open while it is copied
    for twin in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        lookups(twin).backward()
        check(twin)
        assert gradients(table) == [None, None]


def test_saving_and_loading(table: TrainableTable) -> None:
    lookups(table)
    file = io.BytesIO()
    torch.save(table.state_dict(), file)
    file.seek(0)
    twin = TrainableTable(ROWS, WIDTH, PRE_WIDTH, dtype=torch.float64)
    twin.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(twin.state_dict(), table.cpu().state_dict())


@backends
def test_changing_the_dtype(table: TrainableTable, dtype: torch.dtype) -> None:
    lookups(table)
    table.to(torch.bfloat16)
    table.to(dtype)
    lookups(table).backward()
    check(table)
    table.zero_grad()
    lookups(table)  # left open
    table.to(torch.bfloat16)
    one_lookup(table, torch.ones(1, 1, 1, dtype=torch.bfloat16, device=table.values.device)).sum().backward()
    assert table.values.grad is not None
    assert table.values.grad.dtype == torch.bfloat16


@backends
@pytest.mark.parametrize("backward", [False, True])
def test_nothing_outlives_the_pass(table: TrainableTable, backward: bool) -> None:
    gc.disable()  # reference counting alone must do
    try:
        loss = lookups(table)
        accumulator, numbers = weakref.ref(table._accumulator), table._numbers
        if backward:
            loss.backward()
            assert dict(accumulator()._passes) == {}
        values = weakref.ref(table.values)
        table.zero_grad()
        del loss, table.values, table._accumulator, table._link
        assert accumulator() is None
        assert values() is None
        assert find(numbers, 1) is None
    finally:
        gc.enable()


@backends
@pytest.mark.parametrize("frozen", [False, True])
def test_a_graph_keeps_what_its_backward_pass_needs(table: TrainableTable, frozen: bool) -> None:
    """The table's module may go, or be copied over, before the backward pass comes."""
    table.requires_grad_(not frozen)
    scale = torch.ones(()).to(table.values).requires_grad_()
    loss = lookups(table, scale=scale)
    table._make_helpers()
    gc.collect()
    loss.backward()
    torch.testing.assert_close(scale.grad, 2 * loss.detach())  # the loss is a square
    if not frozen:
        check(table)


@pytest.fixture
def process_group(tmp_path: object) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Model(nn.Module):
    """Everything of a forward pass, as wrappers for several processes want it."""

    def __init__(self, table: TrainableTable) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor, seed: int) -> Tensor:
        return lookups(self.table, seed, scale=x)


@pytest.mark.usefixtures("process_group")
@backends
def test_distributed_data_parallel(table: TrainableTable) -> None:
    model = nn.parallel.DistributedDataParallel(Model(table))
    for seed in range(3):
        model.zero_grad()
        model(torch.ones(()).to(table.values), seed).backward()
        check(table, seed)


@pytest.mark.usefixtures("process_group")
@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo shards tensors on the CPU")
@backends
def test_fully_sharded(table: TrainableTable) -> None:
    """The gradient is there when the wrapper collects it, which is once the input's gradient is known."""
    whole = copy.deepcopy(table)
    model = fully_shard(Model(table))
    for seed in range(3):
        model.zero_grad()
        x = torch.ones(()).to(whole.values).requires_grad_()
        model(x, seed).backward()
        found = [None if gradient is None else gradient.full_tensor() for gradient in gradients(table)]
        torch.testing.assert_close(found, expected_gradients(whole, seed))


class CompiledModel(nn.Module):
    """Lookups in compiled pieces, as a host compiles its blocks one by one."""

    def __init__(self, table: TrainableTable) -> None:
        super().__init__()
        self.table = table
        self.lookup = torch.compile(self._lookup, backend="aot_eager", fullgraph=True)

    def forward(self, x: Tensor, reads: Sequence[Reads]) -> Tensor:
        self.table.begin_pass()
        return torch.stack([self.lookup(part._replace(scores=part.scores * x)) for part in reads]).sum()

    def _lookup(self, reads: Reads) -> Tensor:
        return self.table.lookup(reads).square().sum()


@pytest.mark.usefixtures("process_group", "fused")
@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo shards tensors on the CPU")
@pytest.mark.kernels
def test_fully_sharded_and_compiled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's gradient is right, and made once for all pieces."""
    generator = torch.Generator().manual_seed(0)
    table = TrainableTable(ROWS, WIDTH, PRE_WIDTH)
    for parameter in table.parameters():
        nn.init.normal_(parameter, generator=generator)
    whole = [parameter.detach().clone().requires_grad_() for parameter in table.parameters()]
    reads = [
        Reads(
            torch.randint(ROWS, (3, 4), generator=generator),
            torch.randn(3, 4, 2, generator=generator),
            torch.randn(3, PRE_WIDTH, generator=generator),
        )
        for _ in range(LAYERS)
    ]
    taken: list[object] = []
    take = GradientAccumulator.take
    monkeypatch.setattr(GradientAccumulator, "take", lambda *parts: taken.append(1) or take(*parts))
    model = fully_shard(CompiledModel(table))
    expected = torch.autograd.grad(sum(naive.weighted_lookup(part, *whole).square().sum() for part in reads), whole)
    for passes in (1, 2, 3):
        model.zero_grad()
        model(torch.ones(()).requires_grad_(passes == 3), reads).backward()
        for gradient, wanted in zip(gradients(table), expected, strict=True):
            assert gradient is not None
            assert_near(gradient.full_tensor(), wanted, 1e-5)
        assert len(taken) == passes
    torch.compiler.reset()


@pytest.mark.kernels
def test_kernels_and_the_definition_in_one_pass(generator: torch.Generator) -> None:
    """Lookups of either backend and of other k and cores, several times into the same gradient."""
    device = generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator, device=device)

    def reads(k: int, cores: int, copies: int) -> Reads:
        rows, copy = (torch.randint(high, (3, k), generator=generator, device=device) for high in (11, copies))
        return Reads(rows, normal(3, k, cores), normal(3, 3), None, copy if copies > 1 else None, copies)

    table = TrainableTable(11, 6, 3, device=device)
    wide = [normal(*parameter.shape).requires_grad_() for parameter in table.parameters()]
    for parameter, whole in zip(table.parameters(), wide, strict=True):
        parameter.data.copy_(whole.detach())
        whole.data.copy_(parameter.detach())
    storage = []
    for _ in range(3):
        loss, expected = torch.zeros((), device=device), torch.zeros((), dtype=torch.float64, device=device)
        for sizes, backend in (((4, 1, 1), "fused"), ((7, 1, 1), "naive"), ((4, 2, 4), "fused")):
            asked = reads(*sizes)
            assert asked.pre_input is not None
            narrow = asked._replace(scores=asked.scores.float(), pre_input=asked.pre_input.float())
            with use_backend(backend):  # type: ignore[arg-type]
                loss = loss + table.lookup(narrow).square().sum()
            expected = expected + naive.weighted_lookup(asked, *wide).square().sum()
        loss.backward()
        expected.backward()
        storage.append([gradient.data_ptr() for gradient in gradients(table) if gradient is not None])
    for parameter, whole in zip(table.parameters(), wide, strict=True):
        assert_near(parameter.grad, whole.grad, 1e-5)
    assert storage[0] == storage[1] == storage[2], "the gradients were made anew"
