"""All memory layers of one model: the shared table, its gradient, the state dict, metrics, auxiliary losses."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ultramem import ConfigError, Memory, MemoryConfig
from ultramem.layers.tucker import TuckerMemory
from ultramem.ops import use_backend

D_MODEL, BLOCKS = 8, 4
KINDS = ["pkm", "memory_plus", "ultramem", "ultramem_v2"]


def build(kind: Any = "ultramem_v2", **options: Any) -> Memory:
    sizes: dict[str, Any] = {"num_keys": 5, "key_dim": 4, "value_dim": D_MODEL, "top_k": 4}
    return Memory(MemoryConfig(kind=kind, **sizes | options), D_MODEL, BLOCKS, dtype=torch.float64)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["memory_plus", "ultramem_v2"])
def test_layers_together_give_the_sum_of_their_gradients(kind: str) -> None:
    memory = build(kind)
    assert memory.table is not None
    x = randn(6, D_MODEL)
    apart = torch.zeros_like(memory.table.values)
    for layer in memory.layers:
        apart += torch.autograd.grad(layer(x).square().sum(), memory.table.values)[0]
    torch.stack([layer(x).square().sum() for layer in memory.layers]).sum().backward()
    torch.testing.assert_close(memory.table.values.grad, apart)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("backend", "other"),
    [
        ("naive", "forward"),
        ("naive", "forward without gradients"),
        ("naive", "forward and backward"),
        pytest.param("fused", "forward and backward", marks=pytest.mark.kernels),
    ],
)
def test_another_thread_while_one_is_between_forward_and_backward(
    kind: str, backend: Any, other: str, device: torch.device
) -> None:
    """Threads that train, score and evaluate the same memory get the gradients that each would get alone."""
    options: dict[str, Any] = {"pre_value_dim": 4, "share_ratio": 0.5} if kind == "ultramem_v2" else {}
    options |= (
        {"num_keys": 2, "top_k": 2, "insertion": "0:0/2:2"} if backend == "fused" else {}
    )  # the interpreter is slow
    memory = build(kind, **options).to(device, torch.float64 if backend == "naive" else torch.float32)
    parameters = [parameter for parameter in memory.parameters() if parameter.requires_grad]
    x, of_other = (factor * randn(2, D_MODEL).to(parameters[0]) for factor in (1, 3))

    def loss(inputs: Tensor) -> Tensor:
        return torch.stack([layer(inputs).square().sum() for layer in memory.layers]).sum()

    def gradients(inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(inputs), parameters)

    def run_other() -> None:
        with use_backend(backend), torch.set_grad_enabled("without" not in other):
            found["other"] = gradients(of_other) if "backward" in other else loss(of_other)

    found: dict[str, Any] = {}
    with use_backend(backend):
        expected, expected_of_other = gradients(x), gradients(of_other)
        own_loss = loss(x)
        thread = threading.Thread(target=run_other)
        thread.start()
        thread.join()
        own = torch.autograd.grad(own_loss, parameters)
        if other == "forward":
            found["other"] = torch.autograd.grad(found["other"], parameters)
    torch.testing.assert_close(own, expected)
    if "without" not in other:
        torch.testing.assert_close(found["other"], expected_of_other)


@pytest.mark.parametrize("sharing", ["ring", "no_ring", "block"])
def test_layers_read_and_learn_their_windows_only(sharing: Any) -> None:
    memory = build(share_ratio=0.4, sharing=sharing, top_k=36)  # a window of 6 * 6 of the 100 rows, all of it read
    assert memory.table is not None
    for layer, start in zip(memory.layers, memory.layout.starts, strict=True):
        (gradient,) = torch.autograd.grad(layer(randn(3, D_MODEL)).sum(), memory.table.values)
        read = set(gradient.abs().sum(1).nonzero().flatten().tolist())
        assert read == {(start + row) % 100 for row in range(36)}


def test_insertions() -> None:
    memory = build(insertion="0:2/1:1")
    assert memory.insertions == ((0, 2), (1, 1))
    assert len(memory.layers) == 2
    with pytest.raises(ConfigError, match="insertion='2:4': block 4 does not exist"):
        build(insertion="2:4")


@pytest.mark.parametrize("kind", KINDS)
def test_no_layers(kind: str) -> None:
    memory = build(kind, insertion="none")
    assert len(memory.layers) == 0
    assert memory.table is None
    memory.track_usage()
    memory.refresh()
    assert memory.usage_metrics() == {}
    assert memory.auxiliary_loss() is None


@pytest.mark.parametrize(("d_model", "num_blocks", "name"), [(0, 2, "d_model=0"), (8, -1, "num_blocks=-1")])
def test_bad_sizes(d_model: int, num_blocks: int, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: must be at least 1"):
        Memory(MemoryConfig(), d_model, num_blocks)


def test_auxiliary_loss_is_the_layers_sum() -> None:
    memory = build(balance_coef=0.1, tucker_penalty_coef=0.1)
    assert memory.auxiliary_loss() is None
    x = randn(3, D_MODEL)
    for layer in memory.layers:
        layer(x)
    loss = memory.auxiliary_loss()
    assert loss is not None
    assert loss.item() == pytest.approx(sum(layer.auxiliary_loss.item() for layer in memory.layers))
    loss.backward()
    assert memory.layers[3].query_proj.weight.grad is not None
    memory.eval()
    for layer in memory.layers:
        layer(x)
    assert memory.auxiliary_loss() is None


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading(kind: str) -> None:
    memory, x = build(kind), randn(3, D_MODEL)
    if isinstance(memory.layers[0], TuckerMemory):
        memory.layers[0].u.neg_()  # not what a refresh would give
        memory.layers[0].t.neg_()
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    twin = build(kind)
    twin.init_weights(seed=9)
    twin.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close([layer(x) for layer in twin.layers], [layer(x) for layer in memory.layers])
    twin.refresh()
    torch.testing.assert_close([layer(x) for layer in twin.layers], [layer(x) for layer in memory.layers])


@pytest.mark.parametrize("kind", KINDS)
def test_copies_keep_sharing_among_themselves(kind: str) -> None:
    memory, x = build(kind, balance_coef=0.1), randn(3, D_MODEL)
    memory.track_usage()
    expected = [layer(x) for layer in memory.layers]
    for twin in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert (twin.table is None) == (kind in ("pkm", "ultramem"))
        if twin.table is not None:
            assert all(layer.table is twin.table for layer in twin.layers)
            assert twin.table is not memory.table
        torch.testing.assert_close([layer(x) for layer in twin.layers], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_listed_once(kind: str) -> None:
    memory = build(kind)
    names = [name for name, _ in memory.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(map(id, memory.parameters())))
    assert sum(parameter.numel() for name, parameter in memory.named_parameters() if "values" in name) == (
        memory.layout.num_tables * memory.layout.table_rows * D_MODEL
    )


def test_refresh_follows_every_layer() -> None:
    memory = build()
    with torch.no_grad():
        for layer in memory.layers:
            layer.cores.uniform_(generator=torch.Generator().manual_seed(7))
    memory.refresh()
    for layer in memory.layers:
        left, _, _ = np.linalg.svd(layer.cores.detach().sum(0).numpy())
        np.testing.assert_allclose(layer.u, abs(left[..., 0]), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_usage_metrics(kind: str) -> None:
    memory, x = build(kind, insertion="0:0/1:1"), randn(5, D_MODEL)
    layer = memory.layers[1]
    for one in memory.layers:
        one(x)
    assert memory.usage_metrics() == {}
    memory.track_usage()
    y = memory.layers[0](x), layer(x)
    with torch.no_grad():
        scores, indices = layer.retrieve(layer.queries(x))
        rows = layer.locate(indices, scores, x).rows
    metrics = memory.usage_metrics(reset=False)
    reads = np.unique_counts(rows.numpy())
    share = reads.counts / reads.counts.sum()
    expected = {
        "rows read": len(reads.values) / memory.layout.window_rows,
        "KL from uniform": (share * np.log(share * memory.layout.window_rows)).sum(),
        "output std": y[1].std(correction=0).item(),
        "top score": scores.mean(-1).amax(1).mean().item(),
        "last score": scores.mean(-1).amin(1).mean().item(),
    }
    if isinstance(layer, TuckerMemory):
        values = np.linalg.svd(layer.cores.detach().sum(0).numpy(), compute_uv=False).mean(0)
        expected |= {"singular value 1": values[0], "singular value 2": values[1]}
    second = {name.removeprefix("layer 01/"): value.item() for name, value in metrics.items() if "layer 01/" in name}
    assert second == pytest.approx(expected, rel=1e-6)
    assert len(metrics) == 2 * len(expected)
    assert memory.usage_metrics() == metrics
    assert memory.usage_metrics()["layer 01/rows read"] == 0
    memory.track_usage(False)
    assert memory.usage_metrics() == {}


REPORT_TWICE = """
import json, sys
import torch
import torch.distributed as dist
from ultramem import Memory, MemoryConfig

rank, rendezvous = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
config = MemoryConfig(num_keys=5, key_dim=4, value_dim=8, top_k=4, insertion="0:0")
memory = Memory(config, 8, 4, dtype=torch.float64)
memory.track_usage()
x = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
for sign in (1, -1):
    memory.layers[0](sign * x[4 * rank : 4 * rank + 4])
    print(json.dumps({name: value.item() for name, value in memory.usage_metrics(reset=False).items()}))
dist.destroy_process_group()
"""


def test_usage_metrics_of_two_processes(tmp_path: Path) -> None:
    """Each process reads half of the tokens and reports what one would report of all; a report changes no counts."""
    memory = build(insertion="0:0")
    memory.track_usage()
    expected = []
    for sign in (1, -1):
        memory.layers[0](sign * randn(8, D_MODEL))
        metrics = {name: value.item() for name, value in memory.usage_metrics(reset=False).items()}
        expected.append(pytest.approx(metrics))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", REPORT_TWICE, str(rank), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert [json.loads(line) for line in output.splitlines()] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_groups(kind: str) -> None:
    """Every parameter of the model is in one group; the values' rate is the model's times the factor, or their own."""
    model = torch.nn.ModuleDict({"memory": build(kind, optimizer="adamw"), "linear": torch.nn.Linear(3, 3)})
    memory = model["memory"]
    others, values = memory.parameter_groups(1e-2, model, weight_decay=0.5)
    assert len(others["params"]) + len(values["params"]) == len(list(model.parameters()))
    assert {id(parameter) for parameter in values["params"]} == {
        id(parameter) for name, parameter in model.named_parameters() if name.endswith("values")
    }
    constant = kind in ("pkm", "memory_plus")
    assert (others["lr"], values["lr"]) == (1e-2, 1e-3 if constant else 1e-2)
    assert others["weight_decay"] == values["weight_decay"] == 0.5
    alone = memory.parameter_groups(1e-2)
    assert sum(len(group["params"]) for group in alone) == len(list(memory.parameters()))
    optimizer = torch.optim.AdamW(memory.parameter_groups(1e-2, model))
    factors = [lambda step: 1.0, lambda step: memory.config.value_lr_factor(step, 4)]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    expected = [1e-3] * 4 if constant else [4e-2, 3.25e-2, 2.5e-2, 1.75e-2]
    assert [model_rate for model_rate, _ in rates] == [1e-2] * 4
    assert [rate for _, rate in rates] == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_tables(kind: Any) -> None:
    """The tables alone, with the numbers of wide ones rounded; an explicit dtype is that of all parameters."""
    wide, narrow = (Memory(config, D_MODEL, BLOCKS) for config in (config_of(kind), narrow_config(kind)))
    in_tables = narrow.value_parameters()
    for name, parameter in narrow.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if name in in_tables else torch.float32)
        assert torch.equal(parameter, wide.get_parameter(name).to(parameter.dtype))
    for dtype in (torch.bfloat16, torch.float32):
        explicit = Memory(narrow_config(kind), D_MODEL, BLOCKS, dtype=dtype)
        assert {parameter.dtype for parameter in explicit.parameters()} == {dtype}


@pytest.mark.parametrize("backend", ["naive", pytest.param("fused", marks=pytest.mark.kernels)])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_tables_in_wide_layers(kind: Any, backend: Any, device: torch.device) -> None:
    """Layers compute in float32, as with the same numbers in a table in float32."""
    narrow, wide = (Memory(config, D_MODEL, BLOCKS, device=device) for config in (narrow_config(kind), config_of(kind)))
    wide.load_state_dict(narrow.state_dict())
    x = torch.randn(6, D_MODEL, generator=torch.Generator().manual_seed(0)).to(device)
    with use_backend(backend):
        for layer, expected in zip(narrow.layers, wide.layers, strict=True):
            assert torch.equal(layer(x), expected(x))


def config_of(kind: Any, **options: Any) -> MemoryConfig:
    return MemoryConfig(kind=kind, num_keys=5, key_dim=4, value_dim=D_MODEL, top_k=4, **options)


def narrow_config(kind: Any) -> MemoryConfig:
    return config_of(kind, optimizer="rowwise", table_dtype="bfloat16")
