"""UltraMem and UltraMemV2 layers against loops in NumPy, and the parts that the published vectors do not cover."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ultramem import Memory, MemoryConfig, UltraMemError
from ultramem.layers.tucker import TuckerMemory, tucker_penalty

D_MODEL = 6
SMALL: dict[str, Any] = {"num_keys": 3, "key_dim": 4, "value_dim": 6, "top_k": 5, "insertion": "0:0/1:1"}


def build(**options: Any) -> TuckerMemory:
    """A layer in the midst of the table, with random gains and a convolution that does something."""
    memory = Memory(MemoryConfig(**SMALL | options), D_MODEL, 2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    layer = memory.layers[1]
    with torch.no_grad():
        for parameter in (layer.query_norm.weight, layer.key_norm.weight):
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        for parameter in layer.table.parameters():
            parameter.normal_(generator=generator)
    return layer


def tokens(count: int = 4) -> Tensor:
    return torch.randn(count, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def normalise(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain


def by_loops(layer: TuckerMemory, x: Tensor) -> np.ndarray:
    """The layer's definition, token by token and head by head, on whole grids."""
    config = layer.config
    p = {name: parameter.detach().numpy() for name, parameter in layer.named_parameters()}
    values = layer.table.values.detach().numpy()
    rank, keys = config.tucker_rank, layer.axis_keys
    queries_per_axis = rank if config.query_per_rank else 1
    axis_k = min(config.axis_top_k or config.top_k, keys)
    activation = {
        None: lambda z: z,
        "gelu": lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
        "silu": lambda z: z / (1 + math.exp(-z)),
    }[config.pre_activation]
    outputs = []
    for one in x.numpy():
        q = normalise((p["query_proj.weight"] @ one).reshape(2, queries_per_axis, -1), p["query_norm.weight"])
        blocks = np.zeros((config.virtual_copies, config.value_dim))
        for head in range(config.heads):
            scores = np.zeros((2, rank, keys))
            for axis, r, n in np.ndindex(2, rank, keys):
                key = normalise(p["keys"][head, axis, n, :, r], p["key_norm.weight"])
                scores[axis, r, n] = q[axis, r if config.query_per_rank else 0] @ key
            cores = p["cores"][:, head]
            left, _, right = np.linalg.svd(cores.sum(0))
            u, t = np.abs(left[:, 0]), np.abs(right[0])  # of positive cores: positive
            rows = np.argsort(-(u @ scores[0]))[:axis_k]
            columns = np.argsort(-(t @ scores[1]))[:axis_k]
            cells = [(scores[0, :, i] @ cores.sum(0) @ scores[1, :, j], i, j) for i in rows for j in columns]
            for _, i, j in sorted(cells, reverse=True)[: config.top_k]:
                virtual = layer.shuffle[i * keys + j].item()
                block, in_window = divmod(virtual, layer.window_rows)
                row = (in_window + layer.window_start) % len(values)
                factor = 1.0
                if config.pre_value_dim:
                    pre_values = layer.table.pre_values.detach().numpy()
                    factor = activation(p["pre_proj.weight"] @ one @ pre_values[row])
                weights = factor * scores[0, :, i] @ cores @ scores[1, :, j]
                blocks[block] += np.repeat(weights, config.value_dim // config.cores) * values[row]
        looked_up = blocks.sum(0) if config.value_projectors == "single" else blocks.flatten()
        outputs.append(p["output_proj.weight"] @ looked_up)
    return np.stack(outputs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"query_per_rank": False},
        {"tucker_rank": 3, "cores": 3, "query_per_rank": True},
        {"tucker_rank": 3, "cores": 1, "query_per_rank": False},
        {"tucker_rank": 1},
        {"heads": 3},
        {"heads": 2, "query_per_rank": False, "key_expansion": 2},
        {"axis_top_k": 3},
        {"top_k": 1},
        {"top_k": 25, "num_keys": 4},  # all that it can reach
        {"pre_value_dim": 3},
        {"pre_value_dim": 3, "pre_activation": "gelu", "heads": 2},
        {"pre_value_dim": 3, "pre_activation": "silu", "value_projectors": "per_block", "key_expansion": 2},
        {"share_ratio": 0.6, "key_expansion": 3},
        {"share_ratio": 0.6, "key_expansion": 2, "value_projectors": "per_block"},
        {"share_ratio": 0.6, "sharing": "no_ring"},
        {"share_ratio": 0.6, "sharing": "block"},
        {"kind": "ultramem"},
        {"kind": "ultramem", "heads": 2, "value_projectors": "single", "pre_value_dim": 2},
    ],
    ids=str,
)
def test_equals_loops(options: dict[str, Any]) -> None:
    layer, x = build(**options), tokens()
    np.testing.assert_allclose(layer(x).detach(), by_loops(layer, x), rtol=1e-9, atol=1e-12)


def test_equal_projectors_make_per_block_the_same_as_single() -> None:
    single = build(key_expansion=2, value_projectors="single")
    per_block = build(key_expansion=2, value_projectors="per_block")
    with torch.no_grad():
        for name, parameter in per_block.named_parameters():
            other = single.get_parameter(name)
            parameter.copy_(other.repeat(1, 4) if name == "output_proj.weight" else other)
        per_block.table.values.copy_(single.table.values)
        for name, buffer in per_block.named_buffers():
            buffer.copy_(single.get_buffer(name))
    torch.testing.assert_close(per_block(tokens()), single(tokens()))


def test_the_same_query_for_every_rank_is_as_one_query() -> None:
    one, many = build(query_per_rank=False), build(query_per_rank=True)
    with torch.no_grad():
        for name, parameter in many.named_parameters():
            other = one.get_parameter(name)
            if name == "query_proj.weight":
                other = other.unflatten(0, (2, 1, -1)).expand(2, 2, -1, -1).flatten(0, 2)
            parameter.copy_(other)
        many.table.values.copy_(one.table.values)
        for name, buffer in many.named_buffers():
            buffer.copy_(one.get_buffer(name))
    torch.testing.assert_close(many(tokens()), one(tokens()))


def leading_vectors(layer: TuckerMemory) -> tuple[np.ndarray, np.ndarray]:
    left, _, right = np.linalg.svd(layer.cores.detach().sum(0).numpy())
    return left[..., 0], right[..., 0, :]


def test_refresh_finds_the_leading_singular_vectors() -> None:
    layer = build(tucker_rank=3, cores=2, heads=2)
    layer.cores.data.normal_(generator=torch.Generator().manual_seed(0))
    layer.refresh()
    u, t = leading_vectors(layer)
    sign = np.sign((u * layer.u.numpy()).sum(-1, keepdims=True))  # what the SVD leaves open, jointly
    np.testing.assert_allclose(layer.u, u * sign, atol=1e-12)
    np.testing.assert_allclose(layer.t, t * sign, atol=1e-12)


def test_initial_vectors_are_positive() -> None:
    layer = build(tucker_rank=3, heads=3)
    assert (layer.u > 0).all()
    assert (layer.t > 0).all()


def test_signs_stay_continuous_over_a_random_walk() -> None:
    layer = build(tucker_rank=2, heads=4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        layer.cores.data += 0.02 * torch.randn(layer.cores.shape, dtype=torch.float64, generator=generator)
        values = np.linalg.svd(layer.cores.detach().sum(0).numpy(), compute_uv=False)
        u, t = layer.u.clone(), layer.t.clone()
        layer.refresh()
        agreement = (u * layer.u).sum(-1) + (t * layer.t).sum(-1)
        distinct = torch.from_numpy(values[:, 0] - values[:, 1] > 0.2)  # else the leading pair itself changes
        assert (agreement[distinct] > 1.5).all()


@pytest.mark.parametrize("side", ["rows", "columns", "both"])
def test_signs_stay_continuous_through_a_full_turn(side: str) -> None:
    """Cores turned slowly by 360 degrees: the vectors turn with them, pass every sign pattern and come back."""
    layer = build(tucker_rank=2, cores=1)
    start = torch.diag(torch.tensor([2.0, 0.5], dtype=torch.float64))
    layer.cores.data[0, 0] = start
    layer.u.copy_(torch.tensor([[1.0, 0.0]]))
    layer.t.copy_(torch.tensor([[1.0, 0.0]]))
    for step in range(361):
        angle = math.radians(step)
        turn = torch.tensor(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
        )
        layer.cores.data[0, 0] = (turn if side != "columns" else torch.eye(2)).double() @ start
        if side != "rows":
            layer.cores.data[0, 0] = layer.cores.data[0, 0] @ turn.T
        layer.refresh()
        turned = turn[:, 0]
        still = torch.tensor([1.0, 0.0], dtype=torch.float64)
        torch.testing.assert_close(layer.u[0], still if side == "columns" else turned)
        torch.testing.assert_close(layer.t[0], still if side == "rows" else turned)


def test_the_joint_sign_is_that_of_the_better_agreement() -> None:
    """One step turns u by 120 degrees and leaves t: turning u by 60 and t by 180 would be farther."""
    layer = build(tucker_rank=2, cores=1)
    u, t = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    turned = torch.tensor([-0.5, math.sqrt(0.75)], dtype=torch.float64)
    layer.u[0], layer.t[0] = u, t
    layer.cores.data[0, 0] = torch.outer(turned, t)
    layer.refresh()
    torch.testing.assert_close(layer.u[0], turned)
    torch.testing.assert_close(layer.t[0], t)


def test_refresh_treats_heads_apart() -> None:
    layer = build(heads=2)
    u = layer.u.clone()
    layer.u[1] *= -1
    layer.t[1] *= -1
    layer.refresh()
    torch.testing.assert_close(layer.u[0], u[0])
    torch.testing.assert_close(layer.u[1], -u[1])


def test_vectors_and_shuffle_are_saved() -> None:
    state = build().state_dict()
    assert {"u", "t", "shuffle"} <= set(state)
    assert sorted(state["shuffle"].tolist()) == list(range(len(state["shuffle"])))


def test_singular_values() -> None:
    layer = build(tucker_rank=3, heads=2)
    expected = np.linalg.svd(layer.cores.detach().sum(0).numpy(), compute_uv=False).mean(0)
    np.testing.assert_allclose(layer.singular_values(), expected, rtol=1e-6)


def test_tucker_penalty() -> None:
    cores = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    cores[0, 0] = torch.diag(torch.tensor([3.0, 0.5, 0.1]))
    cores[1, 0] = torch.diag(torch.tensor([0.0, 0.25, 0.0]))
    # Summed: 3, 0.75, 0.1; beyond the threshold of 0.15: 0.6 and nothing, over two trailing values.
    assert tucker_penalty(cores, 0.15).item() == pytest.approx(0.6**2 / 2)
    assert tucker_penalty(torch.ones(2, 1, 1, 1), 0.15) == 0


@pytest.mark.parametrize("heads", [1, 2])
def test_auxiliary_loss(heads: int) -> None:
    layer, x = build(balance_coef=0.3, tucker_penalty_coef=0.2, tucker_penalty_threshold=0.01, heads=heads), tokens()
    layer.train()
    layer(x)
    queries, keys = (part.detach().numpy() for part in (layer.normed_queries(layer.queries(x)), layer.normed_keys()))
    expected = 0.0
    for number, direction in enumerate((layer.u, layer.t)):
        for head in range(heads):
            axis = np.einsum("trd,nrd,r->tn", queries[:, number], keys[head, number], direction[head].numpy())
            exponentials = np.exp(axis)
            probabilities = (exponentials / exponentials.sum(-1, keepdims=True)).mean(0)
            chosen = np.argsort(-axis, axis=-1)[:, : min(5, layer.axis_keys)]
            share = np.bincount(chosen.flatten(), minlength=layer.axis_keys) / chosen.size
            expected += 0.3 * layer.axis_keys * (share * probabilities).sum() / heads
    values = np.linalg.svd(layer.cores.detach().sum(0).numpy(), compute_uv=False)
    expected += 0.2 * np.mean(np.maximum(values[:, 1:] - 0.01, 0) ** 2)
    assert layer.auxiliary_loss is not None
    assert layer.auxiliary_loss.item() == pytest.approx(expected, rel=1e-9)
    layer.auxiliary_loss.backward()
    assert layer.cores.grad is not None
    assert layer.query_proj.weight.grad is not None
    layer.eval()
    layer(x)
    assert layer.auxiliary_loss is None


BAD_SHUFFLES = {
    "too large": lambda shuffle: shuffle.add_(1),
    "negative": lambda shuffle: shuffle.sub_(1),
    "far out": lambda shuffle: shuffle.index_fill_(0, torch.tensor([2]), 2**62),
    "repeated": lambda shuffle: shuffle.index_fill_(0, torch.tensor([2]), int(shuffle[3])),
    "a number with a fraction": lambda shuffle: shuffle.double() + 0.25,
    "of another type": lambda shuffle: shuffle.int(),
}


@pytest.mark.parametrize("damage", BAD_SHUFFLES)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["ultramem", "ultramem_v2"])
def test_a_shuffle_from_a_file_must_be_a_permutation(kind: str, assign: bool, damage: str) -> None:
    memory = Memory(MemoryConfig(**SMALL, kind=kind), D_MODEL, 2)
    state = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    memory.load_state_dict(state, assign=assign)
    before = memory.layers[1].shuffle.clone()
    state["layers.1.shuffle"] = BAD_SHUFFLES[damage](before.clone())
    with pytest.raises(
        UltraMemError, match=r"^layers.1.shuffle is damaged: it must be a permutation of the virtual rows"
    ):
        memory.load_state_dict(state, assign=assign)
    assert torch.equal(memory.layers[1].shuffle, before)
    with pytest.raises(UltraMemError, match=r"^memory.layers.1.shuffle is damaged"):
        memory.check_loaded({f"memory.{name}": tensor for name, tensor in state.items()}, "memory.")


@pytest.mark.parametrize("name", ["u", "t"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_directions_from_a_file_must_be_finite(name: str, value: float) -> None:
    memory = Memory(MemoryConfig(**SMALL), D_MODEL, 2)
    getattr(memory.layers[0], name)[0, 1] = value
    with pytest.raises(UltraMemError, match=rf"^layers.0.{name} is damaged: it must be finite"):
        memory.check_loaded()
    with pytest.raises(UltraMemError, match=rf"^layers.0.{name} is damaged"):
        Memory(MemoryConfig(**SMALL), D_MODEL, 2).load_state_dict(memory.state_dict())


def test_what_a_state_lacks_is_not_checked() -> None:
    memory = Memory(MemoryConfig(**SMALL), D_MODEL, 2)
    with pytest.raises(RuntimeError, match="Missing key"):
        memory.load_state_dict({})
    with pytest.raises(RuntimeError, match="size mismatch"):
        memory.load_state_dict({**memory.state_dict(), "layers.0.shuffle": torch.zeros(2, dtype=torch.int64)})
    Memory(MemoryConfig(**SMALL), D_MODEL, 2, device="meta").check_loaded()
