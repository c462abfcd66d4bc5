"""Parameter groups and learning rates against their formulas."""

import math
from types import SimpleNamespace

import pytest
import torch

from ultramem import MemoryConfig
from ultramem.hosts.olmo_core import ModelConfig
from ultramem.training import OptimizerConfig, ScheduleConfig
from ultramem.training.optimizer import GROUP_FLAG, build_scheduler, optimizer_config

STEPS, PEAK = 200, 3e-3


def model(**memory):
    config = MemoryConfig(num_keys=6, key_dim=4, value_dim=8, top_k=2, **memory)
    return ModelConfig(8, 3, 2, 16, vocab_size=16, memory=config).build()


@pytest.mark.parametrize(
    ("memory", "tables"),
    [
        ({"pre_value_dim": 4}, ["memory.table.pre_values", "memory.table.values"]),
        ({"kind": "memory_plus"}, ["memory.table.values"]),
        ({"kind": "ultramem"}, [f"memory.layers.{layer}.table.values" for layer in range(3)]),
    ],
)
def test_values_have_their_own_group(memory, tables):
    built = model(**memory)
    config = OptimizerConfig(learning_rate=PEAK, betas=(0.7, 0.8), eps=1e-6, weight_decay=0.3, value_weight_decay=0.1)
    optimizer = optimizer_config(config, built).build(built)
    assert isinstance(optimizer, torch.optim.AdamW)
    names = {parameter: name for name, parameter in built.named_parameters()}
    (values,) = [group for group in optimizer.param_groups if group.get(GROUP_FLAG)]
    (others,) = [group for group in optimizer.param_groups if not group.get(GROUP_FLAG)]
    assert sorted(names[parameter] for parameter in values["params"]) == tables
    assert len(others["params"]) + len(tables) == len(names)
    assert (values["weight_decay"], others["weight_decay"]) == (0.1, 0.3)
    assert all(group["betas"] == (0.7, 0.8) and group["eps"] == 1e-6 for group in optimizer.param_groups)


def test_values_decay_as_the_model_does_unless_told():
    built = model()
    groups = optimizer_config(OptimizerConfig(weight_decay=0.2), built).build(built).param_groups
    assert [group["weight_decay"] for group in groups] == [0.2, 0.2]


def test_model_without_memory_has_one_group():
    built = ModelConfig(8, 1, 2, 16, vocab_size=16).build()
    assert len(optimizer_config(OptimizerConfig(), built).build(built).param_groups) == 1


def rates(schedule, memory, values):
    """Learning rates of a group at steps 1, 2, ..., and the metric under which they are reported."""
    scheduler = build_scheduler(schedule, PEAK, STEPS, memory)
    group = {"params": [], "lr": PEAK, "initial_lr": PEAK} | ({GROUP_FLAG: True} if values else {})
    found, names = [], set()
    for step in range(1, STEPS + 1):
        metrics = {}
        trainer = SimpleNamespace(max_steps=STEPS, global_step=step, record_metric=metrics.__setitem__)
        rate = scheduler.set_lr(group, trainer)
        assert rate == group["lr"] == next(iter(metrics.values()))
        found.append(rate)
        names |= metrics.keys()
    return found, names


def cosine(step, warmup=20, final=0.1):
    if step < warmup:
        return PEAK * step / warmup
    progress = (step - warmup) / (STEPS - warmup)
    return PEAK * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)


@pytest.mark.parametrize(("multiplier", "decay"), [(4.0, 1.0), (10.0, 0.5), (1.0, 1.0), (0.0, 0.25)])
def test_values_rate(multiplier, decay):
    memory = MemoryConfig(optimizer="adamw", value_lr_multiplier=multiplier, value_lr_decay=decay)
    schedule = ScheduleConfig(warmup_steps=20)
    of_model, names = rates(schedule, memory, values=False)
    assert of_model == pytest.approx([cosine(step) for step in range(1, STEPS + 1)])
    assert names == {"optim/learning rate (model)"}
    of_values, names = rates(schedule, memory, values=True)
    expected = [
        cosine(step) * (1 + (multiplier - 1) * max(0, 1 - step / (STEPS * decay))) for step in range(1, STEPS + 1)
    ]
    assert of_values == pytest.approx(expected)
    assert names == {"optim/learning rate (values)"}


def test_values_rate_may_be_constant():
    assert rates(ScheduleConfig(), MemoryConfig(kind="memory_plus"), values=True)[0] == [5e-3] * STEPS
    assert rates(ScheduleConfig(), MemoryConfig(value_lr=0.5), values=True)[0] == [0.5] * STEPS


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (ScheduleConfig("linear", warmup_share=0.1, final_share=0.2), {10: 0.5, 20: 1, 110: 0.6, 200: 0.2}),
        (
            ScheduleConfig("wsd", warmup_share=0.05, decay_share=0.2, final_share=0.1),
            {5: 0.5, 100: 1, 160: 1, 180: 0.55, 200: 0.1},
        ),
        (ScheduleConfig("constant", warmup_steps=4), {1: 0.25, 4: 1, 200: 1}),
        (ScheduleConfig("constant", warmup_steps=0), {1: 1, 200: 1}),
        (ScheduleConfig("cosine", warmup_steps=0, final_share=0), {100: 0.5, 200: 0}),
        (ScheduleConfig("cosine", warmup_steps=200), {100: 0.5, 199: 0.995, 200: 0.1}),
        (ScheduleConfig("wsd", warmup_steps=0, decay_share=0, final_share=0.3), {1: 1, 199: 1, 200: 0.3}),
    ],
)
def test_schedules(schedule, points):
    found, _ = rates(schedule, None, values=False)
    assert {step: found[step - 1] / PEAK for step in points} == pytest.approx(points, abs=1e-9)
