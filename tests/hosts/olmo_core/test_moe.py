"""The mixture of experts against a float64 definition that loops over tokens and their experts."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from olmo_core.nn.attention import AttentionConfig
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ultramem.errors import ConfigError
from ultramem.hosts.olmo_core.moe import (
    DroplessMoE,
    MoEBlock,
    MoEConfig,
    grouped_matmul,
    load_balancing_loss,
    router_z_loss,
)

D_MODEL = 16
CONFIG = MoEConfig(hidden_size=24, num_experts=6, top_k=3)


def build(config=CONFIG, std=0.3, seed=0):
    moe = DroplessMoE(D_MODEL, config)
    moe.init_weights(std=std, generator=torch.Generator().manual_seed(seed))
    return moe


def tokens(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def definition(moe, x):
    """Output, load-balancing loss and z-loss of float64 tokens (tokens, d_model), one token at a time."""
    config = moe.config
    weights = {name: weight.double() for name, weight in moe.named_parameters()}
    count, experts = [0] * config.num_experts, range(config.num_experts)
    mean_probability = torch.zeros(config.num_experts, dtype=torch.float64)
    outputs, z = [], torch.zeros((), dtype=torch.float64)
    for token in x:
        scores = (weights["router.weight"] * token).sum(1).exp()
        probability = scores / scores.sum()
        chosen = sorted(experts, key=lambda e: -probability[e].item())[: config.top_k]
        scale = sum(probability[e] for e in chosen) if config.normalize_top_k else 1.0
        output = torch.zeros(D_MODEL, dtype=torch.float64)
        for e in chosen:
            count[e] += 1
            gate, up = token @ weights["gate_proj"][e], token @ weights["up_proj"][e]
            output = output + probability[e] / scale * ((gate * gate.sigmoid() * up) @ weights["down_proj"][e])
        outputs.append(output)
        mean_probability = mean_probability + probability / len(x)
        z = z + scores.sum().log() ** 2 / len(x)
    share = [c / sum(count) for c in count]
    balance = config.num_experts * sum(share[e] * mean_probability[e] for e in experts)
    return torch.stack(outputs), balance, z


@pytest.mark.parametrize("normalize_top_k", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_output_and_gradients_equal_the_definition(normalize_top_k, top_k):
    config = MoEConfig(hidden_size=24, num_experts=6, top_k=top_k, normalize_top_k=normalize_top_k)
    moe, x, direction = build(config).double(), tokens(2, 5), tokens(2, 5, seed=2)
    moe_x, definition_x = x.clone().requires_grad_(), x.clone().requires_grad_()

    output = moe(moe_x)
    parameters = list(moe.parameters())
    gradients = torch.autograd.grad((output * direction).sum(), [moe_x, *parameters])
    expected, balance, z = definition(moe, definition_x.flatten(0, 1))
    objective = (expected * direction.flatten(0, 1)).sum() + 0.01 * balance + 0.001 * z
    expected_gradients = torch.autograd.grad(objective, [definition_x, *parameters])

    torch.testing.assert_close(output.flatten(0, 1), expected, rtol=1e-10, atol=1e-12)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


def test_losses_equal_formulas_written_by_hand():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    assignments = torch.tensor([1, 2, 1])
    expected = 3 * (0.25 * 0.3 + 0.5 * 0.45 + 0.25 * 0.25)
    assert load_balancing_loss(probabilities, assignments).item() == pytest.approx(expected)
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    expected = (math.log(2) ** 2 + math.log(math.e + math.e**2) ** 2) / 2
    assert router_z_loss(logits).item() == pytest.approx(expected)


def test_balanced_router_has_load_balancing_loss_one():
    probabilities = torch.full((10, 5), 0.2)
    assert load_balancing_loss(probabilities, torch.full((5,), 4)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [[3, 0, 5], [0, 0, 1], [0, 0, 0], [7, 1, 0]])
def test_grouped_matmul_equals_a_product_per_group(dtype, sizes):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(sizes), 16, generator=generator).to(dtype).requires_grad_()
    weights = torch.randn(3, 16, 8, generator=generator).to(dtype).requires_grad_()
    direction = torch.randn(sum(sizes), 8, generator=generator).to(dtype)
    result = grouped_matmul(rows, weights, torch.tensor(sizes).cumsum(0).int())
    gradients = torch.autograd.grad(result, [rows, weights], direction)

    group = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    expected = torch.einsum("ri,rio->ro", rows.double(), weights.double()[group])
    expected_gradients = torch.autograd.grad(expected, [rows, weights], direction.double())
    tolerance = {"rtol": 1e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(result.double(), expected, **tolerance)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, expected_gradient, **tolerance)


def test_tied_experts_are_each_chosen_at_most_once():
    moe = build().double()
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.gate_proj.zero_()[:, 0, 0] = 1.0
        moe.up_proj.zero_()[:, 1, 0] = 1.0
        moe.down_proj.zero_()
        for expert in range(CONFIG.num_experts):
            moe.down_proj[expert, 0, expert] = 1.0  # expert e writes to channel e alone
    x = torch.ones(4, D_MODEL, dtype=torch.float64)
    written = moe(x)[:, : CONFIG.num_experts]
    assert ((written > 0).sum(dim=1) == CONFIG.top_k).all()
    once = 1 / (1 + math.exp(-1)) / CONFIG.num_experts
    torch.testing.assert_close(written[written > 0], torch.full((4 * CONFIG.top_k,), once, dtype=torch.float64))


def test_expert_without_tokens_gets_no_gradient_and_changes_nothing():
    moe, x = build().double(), tokens(7)
    x[:, 0] = x[:, 0].abs() + 0.1
    with torch.no_grad():
        moe.router.weight[4] = 0.0
        moe.router.weight[4, 0] = -100.0
    output = moe(x)
    output.sum().backward()
    torch.testing.assert_close(output, definition(moe, x)[0])
    for weight in (moe.gate_proj, moe.up_proj, moe.down_proj):
        assert weight.grad[4].count_nonzero() == 0
        assert weight.grad.count_nonzero() > 0


@pytest.mark.parametrize("autocast", [False, True])
def test_no_tokens(autocast):
    moe, x = build(), torch.zeros(2, 0, D_MODEL, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = moe(x)
    output.sum().backward()
    assert output.shape == x.shape
    assert all(weight.grad.count_nonzero() == 0 for weight in moe.parameters())
    assert all(value.isfinite() for value, _ in moe.compute_metrics().values())


def test_one_token_of_any_leading_shape():
    moe, x = build().double(), tokens()
    torch.testing.assert_close(moe(x), definition(moe, x.unsqueeze(0))[0][0])
    torch.testing.assert_close(moe(x.view(1, 1, 1, -1)).flatten(), moe(x))


def test_bfloat16_autocast_agrees_with_the_definition():
    moe, x = build(), tokens(3, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = moe(x)
    assert output.dtype == torch.bfloat16
    gradients = torch.autograd.grad((output.float() * x).sum(), list(moe.parameters()))
    wide = copy.deepcopy(moe).double()
    expected, balance, z = definition(wide, x.double().flatten(0, 1))
    objective = (expected * x.double().flatten(0, 1)).sum() + 0.01 * balance + 0.001 * z
    expected_gradients = torch.autograd.grad(objective, list(wide.parameters()))
    pairs = [
        (output.flatten(0, 1), expected),
        *zip(gradients, expected_gradients, strict=True),
    ]
    for value, reference in pairs:
        assert (value.double() - reference).norm() <= 0.01 * reference.norm()


def test_bfloat16_model_routes_in_float32():
    """The router's probabilities must not be rounded to bfloat16, in which near ties would be decided."""
    moe = build().bfloat16()
    x = tokens(4, dtype=torch.bfloat16)
    output = moe(x)
    assert output.dtype == torch.bfloat16
    expected = definition(moe, x.double())[0]
    assert (output.double() - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_layer_equals_eager(autocast):
    eager = build()
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager")

    def run(moe, x, factor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = moe(x)
        (gradient,) = torch.autograd.grad(output.sum() * factor, next(moe.parameters()))
        return output, gradient

    tolerance = {"rtol": 0.02, "atol": 0.05} if autocast else {}
    for count in (5, 9, 6):
        x = tokens(count, seed=count, dtype=torch.float32)
        torch.testing.assert_close(run(compiled, x, 1), run(eager, x, 1), **tolerance)
        # Multiplied by 0, the output leaves the auxiliary losses' gradient alone.
        torch.testing.assert_close(run(compiled, x, 0)[1], run(eager, x, 0)[1])
    assert compiled._orig_mod.compute_metrics() == eager.compute_metrics()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_deterministic_never_waits_and_agrees_with_the_loop():
    moe = build(MoEConfig(hidden_size=64, num_experts=16, top_k=4)).cuda()
    x = tokens(3, 37, dtype=torch.float32).cuda()

    def gradients(autocast):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            output = moe(x)
        return torch.autograd.grad((output.float() * x).sum(), list(moe.parameters()))

    loop, warm_up = gradients(autocast=False), gradients(autocast=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped = gradients(autocast=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for value, again, expected in zip(grouped, warm_up, loop, strict=True):
        assert torch.equal(value, again)
        assert (value - expected).norm() <= 0.02 * expected.norm()


def test_no_auxiliary_loss_and_no_metrics_outside_training():
    moe, x = build().double().eval(), tokens(6)
    gradient = torch.autograd.grad(moe(x).sum() * 0, moe.router.weight)[0]
    assert gradient.count_nonzero() == 0
    assert moe.compute_metrics()["load imbalance"][0] == 0


def test_metrics_are_token_weighted_means_since_the_last_report():
    moe, batches = build().double(), [tokens(7), tokens(3, seed=5)]
    _, balances, zs = zip(*(definition(moe, x) for x in batches), strict=True)
    chosen = torch.cat([(x @ moe.router.weight.T).topk(CONFIG.top_k).indices.flatten() for x in batches])
    busiest = max((chosen == expert).sum().item() for expert in range(CONFIG.num_experts))
    for x in batches:
        moe(x)
    metrics = moe.compute_metrics(reset=False)
    assert metrics["load imbalance"][0].item() == pytest.approx(busiest / 30 * CONFIG.num_experts)
    expected = (0.7 * balances[0] + 0.3 * balances[1]).item()
    assert metrics["load balancing loss"][0].item() == pytest.approx(expected)
    assert metrics["router Z loss"][0].item() == pytest.approx((0.7 * zs[0] + 0.3 * zs[1]).item())

    assert moe.compute_metrics() == metrics
    assert moe.compute_metrics()["load balancing loss"][0] == 0
    assert set(moe.state_dict()) == {"router.weight", "gate_proj", "up_proj", "down_proj"}


def build_block(n_layers=4, init_device="cpu", moe=CONFIG):
    norm = LayerNormConfig(name=LayerNormType.rms, bias=False)
    return MoEBlock(
        d_model=D_MODEL,
        block_idx=0,
        n_layers=n_layers,
        sequence_mixer=AttentionConfig(n_heads=2, bias=False),
        layer_norm=norm,
        feed_forward=moe,
        init_device=init_device,
    )


def test_micro_batches_add_up_to_the_weighted_mean_of_their_losses():
    torch.manual_seed(0)
    block = build_block(n_layers=4)
    block.feed_forward.init_weights(std=0.3)
    router = block.feed_forward.router.weight
    micro_batches = [tokens(2, 6, dtype=torch.float32), tokens(1, 6, seed=3, dtype=torch.float32)]
    for x in micro_batches:
        # The cross-entropy's share of the gradient is left out: the output is multiplied by 0.
        (block(x, loss_div_factor=torch.tensor(18)) * 0).sum().backward()

    objective = 0.0
    for x, weight in zip(micro_batches, (12 / 18, 6 / 18), strict=True):
        with torch.no_grad():
            h = x + block.attention(block.attention_norm(x))
            normalised = block.feed_forward_norm(h)
        _, balance, z = definition(block.feed_forward, normalised.double().flatten(0, 1))
        objective = objective + weight * (0.01 * balance + 0.001 * z) / 4
    torch.testing.assert_close(router.grad, torch.autograd.grad(objective, router)[0], rtol=1e-3, atol=1e-8)


def test_block_output_is_the_residual_sum():
    torch.manual_seed(0)
    block, x = build_block(), tokens(2, 6, dtype=torch.float32)
    block.feed_forward.init_weights(std=0.3)
    h = x + block.attention(block.attention_norm(x))
    expected = h + definition(block.feed_forward, block.feed_forward_norm(h).double().flatten(0, 1))[0].view_as(h)
    torch.testing.assert_close(block(x), expected.float(), rtol=1e-4, atol=1e-5)


def test_parameter_and_operation_counts():
    block = build_block(init_device="meta")
    attention, norms, router, expert = 4 * 16 * 16, 2 * 16, 6 * 16, 3 * 16 * 24
    assert all(parameter.is_meta for parameter in block.parameters())
    assert sum(parameter.numel() for parameter in block.parameters()) == attention + norms + router + 6 * expert
    attention_operations = block.attention.num_flops_per_token(10)
    assert block.num_flops_per_token(10) - attention_operations == 6 * (router + 3 * expert)


def test_published_sizes():
    """OLMoE-227M/1.2B: 20 blocks of width 768 (UltraMemV2, table of configurations)."""
    config = MoEConfig(hidden_size=384)
    assert 20 * config.num_params(768) == 20 * (64 * 3 * 768 * 384 + 64 * 768)
    assert 20 * config.num_active_params(768) == 20 * (8 * 3 * 768 * 384 + 64 * 768)


def test_weights_from_the_meta_device_have_the_requested_std():
    moe = DroplessMoE(64, MoEConfig(hidden_size=64), init_device="meta").to_empty(device="cpu")
    moe.init_weights(std=0.05, output_std=0.01, generator=torch.Generator().manual_seed(0))
    truncated = 0.9866  # standard deviation of a standard normal truncated at 3
    for weight in (moe.router.weight, moe.gate_proj, moe.up_proj):
        assert weight.std().item() == pytest.approx(0.05 * truncated, rel=0.02)
        assert weight.abs().max().item() <= 0.15
    assert moe.down_proj.std().item() == pytest.approx(0.01 * truncated, rel=0.02)
    moe(torch.randn(5, 64)).sum().backward()


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_layer_equals_the_whole(one_process):
    whole, sharded = build(seed=3), DroplessMoE(D_MODEL, CONFIG, init_device="meta")
    fully_shard(sharded, mesh=one_process)
    sharded.to_empty(device="cpu")
    sharded.init_weights(std=0.3, generator=torch.Generator().manual_seed(3))
    x = tokens(2, 5, dtype=torch.float32)
    for moe in (whole, sharded):
        moe(x).square().sum().backward()
    for parameter, expected in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert isinstance(parameter, DTensor)
        torch.testing.assert_close(parameter.full_tensor(), expected)
        torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad)


def test_ddp_leaves_each_process_its_metrics(one_process):
    moe = nn.parallel.DistributedDataParallel(build())
    assert not list(moe.module.buffers())
    moe(tokens(4, dtype=torch.float32)).sum().backward()
    assert all(parameter.grad is not None for parameter in moe.parameters())


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("hidden_size", 20, "multiple of 8"),
        ("hidden_size", 0, "positive"),
        ("hidden_size", 24.0, "must be a whole number"),
        ("num_experts", 0, "at least 1"),
        ("num_experts", True, "must be a whole number"),
        ("top_k", 7, "num_experts=6"),
        ("top_k", 0, "at least 1"),
        ("load_balancing_coef", -0.1, "at least 0"),
        ("z_loss_coef", math.nan, "a finite number"),
        ("z_loss_coef", "0.1", "must be a number"),
        ("normalize_top_k", 1, "must be true or false"),
    ],
)
def test_bad_value_is_named_with_its_remedy(field, value, remedy):
    values = {"hidden_size": 24, "num_experts": 6, "top_k": 3} | {field: value}
    with pytest.raises(ConfigError, match=remedy) as error:
        MoEConfig(**values)
    assert str(error.value).startswith(f"{field}={value!r}: ")


def test_bad_width_is_named():
    with pytest.raises(ConfigError, match="d_model=20: must be a positive multiple of 8"):
        CONFIG.build(20)
