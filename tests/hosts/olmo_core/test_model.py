"""The whole model: against a definition in float64, its initialisation, skip-layer insertion, gradients."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from olmo_core.nn.transformer import TransformerActivationCheckpointingMode
from torch import Tensor

from ultramem import MemoryConfig, UltraMemError
from ultramem.hosts.olmo_core import ModelConfig, MoEConfig
from ultramem.hosts.olmo_core import model as host
from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.tables.gradient_accumulator import GradientAccumulator

VOCABULARY, D_MODEL = 32, 16
V2 = MemoryConfig(num_keys=6, key_dim=4, value_dim=6, pre_value_dim=4, top_k=5, axis_top_k=4, heads=2, share_ratio=0.4)
KINDS = {
    "pkm": MemoryConfig(kind="pkm", num_keys=6, key_dim=4, value_dim=D_MODEL, top_k=5, heads=2),
    "memory_plus": MemoryConfig(kind="memory_plus", num_keys=6, key_dim=4, value_dim=8, top_k=5, heads=2),
    "ultramem": MemoryConfig(kind="ultramem", num_keys=6, key_dim=4, value_dim=8, top_k=5, heads=2),
    "ultramem_v2": V2,
}
OVERLAPPING = "0:2/1:3/1:1"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What is so small is computed fastest, and the same to the bit, by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_config(memory: MemoryConfig | None = V2, **options: Any) -> ModelConfig:
    sizes = {"d_model": D_MODEL, "num_blocks": 4, "num_heads": 2, "feed_forward_size": 24, "vocab_size": VOCABULARY}
    return ModelConfig(**sizes | options, memory=memory)


def build(config: ModelConfig) -> MemoryTransformer:
    model = config.build()
    model.init_weights(max_seq_len=128)
    return model


def tokens(*shape: int, vocabulary: int = VOCABULARY, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: MemoryTransformer) -> dict[str, Tensor]:
    wrapper = "_checkpoint_wrapped_module."
    found = {name.replace(wrapper, ""): parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return found  # type: ignore[return-value]


# The definition, in float64, one token and one head at a time where the memory is read.


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def rotate(x: Tensor, theta: float) -> Tensor:
    """x (length, width): the pair of entries i and i + width / 2 turns by position / theta^(2 i / width)."""
    length, width = x.shape
    # OLMo-core keeps the angles in float32.
    frequencies = 1 / theta ** (torch.arange(0, width, 2).float() / width)
    angles = torch.arange(length).float()[:, None] * frequencies
    cosine, sine = angles.cos().double(), angles.sin().double()
    first, second = x[:, : width // 2], x[:, width // 2 :]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def attention(w: dict[str, Tensor], x: Tensor, config: ModelConfig) -> Tensor:
    """Causal attention of x (length, d_model)."""
    width, length = config.d_model // config.num_heads, len(x)
    outputs = []
    for head in range(config.num_heads):
        part = slice(head * width, (head + 1) * width)
        q, k, v = (x @ w[f"w_{name}.weight"][part].T for name in "qkv")
        q = rotate(rms_norm(q, w["q_norm.weight"], config.norm_eps), config.rope_theta)
        k = rotate(rms_norm(k, w["k_norm.weight"], config.norm_eps), config.rope_theta)
        scores = q @ k.T / math.sqrt(width)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, dim=-1) @ w["w_out.weight"].T


def read_memory(w: dict[str, Tensor], x: Tensor, number: int, table: dict[str, Tensor], m: MemoryConfig) -> Tensor:
    """What layer `number` of an UltraMemV2 memory gives for x (tokens, d_model)."""
    rows = len(table["values"])
    window_keys = math.isqrt(int(rows * m.share_ratio))
    keys = rms_norm(w["keys"].movedim(3, 4), w["key_norm.weight"], m.norm_eps)  # heads, axes, keys, rank, key_dim
    outputs = []
    for token in x:
        queries = (w["query_proj.weight"] @ token).view(2, m.tucker_rank, m.key_dim)
        queries = rms_norm(queries, w["query_norm.weight"], m.norm_eps)
        output = torch.zeros(m.value_dim, dtype=torch.float64)
        for head in range(m.heads):
            row_scores, column_scores = ((keys[head, axis] * queries[axis]).sum(-1) for axis in (0, 1))
            cores = w["cores"][:, head]
            left, _, right = np.linalg.svd(cores.detach().sum(0).numpy())
            u, t = torch.from_numpy(abs(left[:, 0])), torch.from_numpy(abs(right[0]))  # of a positive matrix
            best_rows = (row_scores @ u).argsort(descending=True)[: m.axis_top_k]
            best_columns = (column_scores @ t).argsort(descending=True)[: m.axis_top_k]
            grid = {
                (int(i), int(j)): torch.stack([row_scores[i] @ core @ column_scores[j] for core in cores])
                for i in best_rows
                for j in best_columns
            }
            for i, j in sorted(grid, key=lambda cell: -grid[cell].sum().item())[: m.top_k]:
                row = (int(w["shuffle"][i * window_keys + j]) + number * m.num_keys**2) % rows
                weights = grid[i, j] * (w["pre_proj.weight"] @ token @ table["pre_values"][row])
                output = output + weights.repeat_interleave(m.value_dim // m.cores) * table["values"][row]
        outputs.append(w["output_proj.weight"] @ output)
    return torch.stack(outputs)


def definition(model: MemoryTransformer, config: ModelConfig, input_ids: Tensor) -> Tensor:
    """Logits (length, vocabulary) of one sequence; memory layer n reads and adds as `OVERLAPPING`, sorted, says."""
    w = dict(model.named_parameters()) | dict(model.named_buffers())

    def within(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}

    reads, adds = {0: [0], 1: [1, 2], 2: [], 3: []}, {0: [], 1: [1], 2: [0], 3: [2]}
    assert config.memory is not None
    x, outputs = w["embeddings.weight"][input_ids], {}
    for block in range(config.num_blocks):
        own = within(f"blocks.{block}.")
        attention_weights = within(f"blocks.{block}.attention.")
        x = x + attention(attention_weights, rms_norm(x, own["attention_norm.weight"], config.norm_eps), config)
        normed = rms_norm(x, own["feed_forward_norm.weight"], config.norm_eps)
        for number in reads[block]:
            layer, table = within(f"memory.layers.{number}."), within("memory.table.")
            outputs[number] = read_memory(layer, normed, number, table, config.memory)
        gate, up = (normed @ own[f"feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        x = x + (gate * gate.sigmoid() * up) @ own["feed_forward.w2.weight"].T
        for number in adds[block]:
            x = x + outputs[number]
    head = w["embeddings.weight"] if config.tie_embeddings else w["lm_head.w_out.weight"]
    return rms_norm(x, w["lm_head.norm.weight"], config.norm_eps) @ head.T


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_equal_the_definition(tied: bool) -> None:
    memory = replace(V2, insertion=OVERLAPPING)
    config = make_config(memory, tie_embeddings=tied, rope_theta=50, norm_eps=1e-2, init_std=0.3)
    model = build(config).double()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if hasattr(module, "full_precision"):
            module.full_precision = False  # OLMo-core's word for float32
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
    model.post_optim_step()  # u and t in float64
    input_ids, direction = tokens(2, 6), torch.randn(2, 6, VOCABULARY, dtype=torch.float64, generator=generator)

    logits = model(input_ids)
    expected = torch.stack([definition(model, config, sequence) for sequence in input_ids])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11)

    parameters = dict(model.named_parameters())
    expected_gradients = torch.autograd.grad((expected * direction).sum(), list(parameters.values()))
    (logits * direction).sum().backward()
    for (name, gradient), wanted in zip(gradients(model).items(), expected_gradients, strict=True):
        assert wanted.abs().max() > 1e-8, name
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


# Initialisation.


def memory_to_feed_forward(config: ModelConfig, length: int = 128) -> list[float]:
    """For each memory layer: its output's standard deviation by that of the feed-forward where it is added."""
    model = build(config).eval()
    stds = defaultdict(list)

    def record(name: Any) -> Callable[..., None]:
        return lambda module, inputs, output: stds[name].append(float(output.std()))

    for number, layer in enumerate(model.memory.layers):
        layer.register_forward_hook(record(("memory", number)))
    for block in model.blocks.values():
        block.feed_forward.register_forward_hook(record(("feed-forward", block.block_idx)))
    with torch.no_grad():
        model(tokens(2, length, vocabulary=config.vocab_size))
    pairs = enumerate(model.memory.insertions)
    return [stds["memory", number][0] / stds["feed-forward", add][0] for number, (_, add) in pairs]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d_model", "blocks"), [(64, 2), (128, 6), (256, 12)])
@pytest.mark.parametrize("skipping", [False, True])
def test_matched(kind: str, d_model: int, blocks: int, skipping: bool) -> None:
    memory = replace(
        KINDS[kind],
        num_keys=24,
        key_dim=d_model // 2,
        value_dim=d_model if kind == "pkm" else d_model // 4,
        pre_value_dim=d_model // 4 if kind == "ultramem_v2" else 0,
        top_k=16,
        axis_top_k=None,
        insertion="/".join(f"{read}:{min(read + 2, blocks - 1)}" for read in range(blocks)) if skipping else "all",
    )
    config = make_config(
        memory, d_model=d_model, num_blocks=blocks, num_heads=4, feed_forward_size=3 * d_model, vocab_size=512
    )
    ratios = memory_to_feed_forward(config)
    assert len(ratios) == blocks
    assert all(0.8 < ratio < 1.25 for ratio in ratios), ratios


@pytest.mark.parametrize("options", [{"tie_embeddings": False}, {"init_std": 0.02}, {"feed_forward_size": 100}])
def test_matched_follows_the_hosts_scheme(options: dict[str, Any]) -> None:
    memory = replace(V2, num_keys=24, key_dim=32, value_dim=16, pre_value_dim=16, top_k=16, axis_top_k=None)
    sizes = {"d_model": 64, "num_blocks": 4, "num_heads": 4, "feed_forward_size": 192, "vocab_size": 512}
    ratios = memory_to_feed_forward(make_config(memory, **sizes | options))
    assert all(0.8 < ratio < 1.25 for ratio in ratios), ratios


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_output_leaves_the_function_unchanged(kind: str, tied: bool) -> None:
    memory = replace(KINDS[kind], init="zero_output", insertion=OVERLAPPING)
    model, plain = (build(make_config(m, tie_embeddings=tied)) for m in (memory, None))
    assert torch.equal(model(tokens(2, 6)), plain(tokens(2, 6)))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_have_the_papers_deviations(tied: bool) -> None:
    """Truncated at three standard deviations; smaller by sqrt(2 L) where the residual stream is written."""
    config = make_config(None, d_model=128, num_heads=4, feed_forward_size=256, vocab_size=256, tie_embeddings=tied)
    model, std, truncated = build(config), math.sqrt(2 / (5 * 128)), 0.9866
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        wanted = std / math.sqrt(2 * 4) if name.endswith(("attention.w_out.weight", "w2.weight")) else std
        assert parameter.std().item() == pytest.approx(wanted * truncated, rel=0.03), name
        assert parameter.abs().max().item() <= 3 * wanted, name
    assert (model.lm_head.w_out.weight is model.embeddings.weight) == tied


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_values(kind: str) -> None:
    """Whatever device the model was built on, and whatever the program drew before."""
    config = make_config(KINDS[kind])
    torch.manual_seed(1)
    model = build(config)
    torch.manual_seed(2)
    from_meta = config.build("meta")
    assert all(tensor.is_meta for tensor in from_meta.state_dict().values())
    from_meta.init_weights(device=torch.device("cpu"))
    expected, found = model.state_dict(), from_meta.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    other = build(replace(config, seed=1)).state_dict()
    drawn = [name for name, tensor in expected.items() if "norm" not in name and name[-2:] not in (".u", ".t")]
    assert all(not torch.equal(expected[name], other[name]) for name in drawn)


def test_no_insertion_is_a_plain_model() -> None:
    model, plain = build(make_config(replace(V2, insertion="none"))), build(make_config(None))
    assert model.memory is None
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.num_params == plain.num_params
    assert torch.equal(model(tokens(2, 6)), plain(tokens(2, 6)))


# Skip-layer insertion, recomputation, the gradient of the shared table.


@pytest.mark.parametrize(("number", "add"), [(0, 2), (1, 1), (2, 3)])
def test_output_is_added_after_its_block(number: int, add: int) -> None:
    """Without one layer's output nothing changes up to the block after which it is added, and there by the output."""
    model = build(make_config(replace(V2, insertion=OVERLAPPING))).eval()
    after: dict[int, Tensor] = {}
    for block in model.blocks.values():
        block.register_forward_hook(lambda module, inputs, output: after.update({module.block_idx: output}))
    read: dict[str, Tensor] = {}
    layer = model.memory.layers[number]
    handle = layer.register_forward_hook(lambda module, inputs, output: read.update(output=output))
    with torch.no_grad():
        model(tokens(2, 6))
        handle.remove()
        with_output = dict(after)
        layer.output_proj.weight.zero_()
        model(tokens(2, 6))
    for block in range(add):
        assert torch.equal(after[block], with_output[block])
    torch.testing.assert_close(with_output[add] - after[add], read["output"], rtol=1e-4, atol=1e-6)


MODES = {
    "full": {},
    "selected_blocks": {"block_interval": 2},
    "selected_modules": {"modules": ["blocks.*.feed_forward", "blocks.1"]},
    "selected_ops": {},
}


SHARED = ("memory_plus", "ultramem_v2")
SUPPORTED = [(kind, mode) for kind in KINDS for mode in MODES if mode != "selected_ops" or kind not in SHARED]


@pytest.mark.parametrize(("kind", "mode"), SUPPORTED)
def test_activation_checkpointing_gives_the_same_gradients(kind: str, mode: str) -> None:
    """With dropout, auxiliary losses and layers whose output is added blocks later."""
    memory = replace(KINDS[kind], insertion=OVERLAPPING, output_dropout=0.3, balance_coef=0.1)
    found = []
    for checkpointed in (False, True):
        model = build(make_config(memory))
        if checkpointed:
            model.apply_activation_checkpointing(TransformerActivationCheckpointingMode(mode), **MODES[mode])
        for seed in (0, 1):  # micro-batches
            torch.manual_seed(seed)
            model(tokens(2, 6, seed=seed)).square().mean().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize("kind", SHARED)
def test_checkpointing_of_selected_operations_is_refused(kind: str) -> None:
    with pytest.raises(UltraMemError, match="selected operations is not supported with a shared table; choose full"):
        build(make_config(KINDS[kind])).apply_activation_checkpointing(
            TransformerActivationCheckpointingMode.selected_ops
        )


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", SHARED)
def test_table_gradient_is_formed_once_for_each_backward(
    kind: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    formed: list[list[Tensor | None]] = []
    take = GradientAccumulator.take
    monkeypatch.setattr(GradientAccumulator, "take", lambda *arguments: formed.append(take(*arguments)) or formed[-1])
    model = build(make_config(replace(KINDS[kind], insertion=OVERLAPPING)))
    if checkpointed:
        model.apply_activation_checkpointing(TransformerActivationCheckpointingMode.full)
    tables = list(model.memory.table.parameters())
    for backward_passes in (1, 2):
        model(tokens(2, 6)).square().mean().backward()
        assert len(formed) == backward_passes
    for taken in formed:
        assert [gradient.shape for gradient in taken if gradient is not None] == [table.shape for table in tables]


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up(kind: str) -> None:
    model = build(make_config(KINDS[kind]))
    inputs, labels = tokens(4, 6), tokens(4, 6, seed=1)
    options: dict[str, Any] = {"loss_reduction": "sum", "loss_div_factor": 24}
    model(inputs, labels=labels, **options).loss.backward()
    whole = gradients(model)
    model.zero_grad()
    for part in (slice(0, 3), slice(3, 4)):
        model(inputs[part], labels=labels[part], **options).loss.backward()
    torch.testing.assert_close(gradients(model), whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_auxiliary_losses_are_weighted_by_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of the cross-entropy plus the token-weighted mean of the micro-batches' own losses."""
    penalty = {"tucker_penalty_coef": 0.5, "tucker_penalty_threshold": 0.0} if kind.startswith("ultramem") else {}
    memory = replace(KINDS[kind], insertion=OVERLAPPING, balance_coef=0.5, **penalty)
    model = build(make_config(memory))
    inputs, labels = tokens(4, 6), tokens(4, 6, seed=1)
    parts = slice(0, 3), slice(3, 4)
    losses = []
    for part in parts:
        output = model(inputs[part], labels=labels[part], loss_reduction="sum", loss_div_factor=torch.tensor(24.0))
        output.loss.backward()
        losses.append(output.loss.detach())
    attached = gradients(model)
    model.zero_grad()

    monkeypatch.setattr(host, "attach_auxiliary_loss", lambda y, loss: y)
    for part, loss, weight in zip(parts, losses, (18 / 24, 6 / 24), strict=True):
        logits = model(inputs[part])
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels[part].flatten(), reduction="sum") / 24
        torch.testing.assert_close(loss, cross_entropy)  # what is reported has no auxiliary loss in it
        auxiliary = torch.stack([layer.auxiliary_loss for layer in model.memory.layers]).sum()
        assert auxiliary > 0.1
        (cross_entropy + weight * auxiliary).backward()
    explicit = gradients(model)
    torch.testing.assert_close(attached, explicit, rtol=1e-3, atol=1e-6)
    model.zero_grad()
    F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten()).backward()
    assert not torch.allclose(gradients(model)["memory.layers.0.keys"], explicit["memory.layers.0.keys"], rtol=1e-2)


# What surrounds a step.


def test_after_a_step_the_singular_vectors_follow_the_cores() -> None:
    model = build(make_config(replace(V2, insertion=OVERLAPPING)))
    with torch.no_grad():
        for layer in model.memory.layers:
            layer.cores.uniform_(generator=torch.Generator().manual_seed(7))
    model.post_optim_step()
    for layer in model.memory.layers:
        left, _, right = np.linalg.svd(layer.cores.detach().sum(0).numpy())
        np.testing.assert_allclose(layer.u, abs(left[..., 0]), atol=1e-6)
        np.testing.assert_allclose(layer.t, abs(right[..., 0, :]), atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_restores_the_function(kind: str, tied: bool) -> None:
    config = make_config(replace(KINDS[kind], insertion=OVERLAPPING), tie_embeddings=tied)
    model = build(config)
    state = model.state_dict()
    if kind.startswith("ultramem"):
        names = {f"memory.layers.{layer}.{name}" for layer in range(3) for name in ("u", "t", "shuffle")}
        assert names <= state.keys()
    twin = build(replace(config, seed=5))
    assert not torch.equal(twin(tokens(2, 6)), model(tokens(2, 6)))
    twin.load_state_dict(state)
    assert torch.equal(twin(tokens(2, 6)), model(tokens(2, 6)))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_is_close(kind: str) -> None:
    """Of layers that read all rows that they can reach: rounding would change which ones are chosen."""
    every_row = 36 if kind == "ultramem" else 9
    memory = replace(KINDS[kind], num_keys=3, top_k=every_row, axis_top_k=None, balance_coef=0.1)
    model = build(make_config(memory))
    wide = model(tokens(2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens(2, 6))
        loss = model(tokens(2, 6), labels=tokens(2, 6, seed=1)).loss
    loss.backward()
    assert logits.isfinite().all()
    assert 0 < (logits - wide).norm() < 0.02 * wide.norm()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("system", ["dense", "ultramem_v2", "moe"])
@pytest.mark.parametrize("way", ["tensor", "pipeline", "context"])
def test_unsupported_parallelism_is_refused(system: str, way: str) -> None:
    config = make_config(V2 if system == "ultramem_v2" else None)
    if system == "moe":
        config = replace(config, moe=MoEConfig(hidden_size=8, num_experts=4, top_k=2))
    model = config.build("meta")
    apply = {"tensor": model.apply_tp, "pipeline": model.apply_pp, "context": model.apply_cp}[way]
    with pytest.raises(UltraMemError, match=f"^{way} parallelism is not supported; train with FSDP or DDP$"):
        apply(None)
