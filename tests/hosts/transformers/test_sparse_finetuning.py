from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from ultramem.config import MemoryConfig
from ultramem.errors import ConfigError, UltraMemError
from ultramem.hosts.transformers import UltraMemConfig, UltraMemForCausalLM
from ultramem.hosts.transformers.sparse_finetuning import (
    Background,
    RowCounter,
    SparseFinetuning,
    SparseRows,
    choose_rows,
    count_background,
    find_tables,
    score_rows,
)
from ultramem.ops.weighted_lookup.reads import Reads
from ultramem.tables.trainable import TrainableTable

V2 = {"kind": "ultramem_v2", "num_keys": 8, "key_dim": 8, "value_dim": 8, "pre_value_dim": 4, "top_k": 4,
      "share_ratio": 0.5}  # fmt: skip
PKM = {"kind": "pkm", "num_keys": 8, "key_dim": 8, "value_dim": 16, "heads": 2, "top_k": 4}
Ids = list[list[int]]


def make_model(memory: dict[str, Any] = V2, seed: int = 0) -> UltraMemForCausalLM:
    torch.manual_seed(seed)
    config = UltraMemConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32, memory=memory,
    )  # fmt: skip
    return UltraMemForCausalLM(config).eval()


def make_data(count: int, length: int = 6, seed: int = 0) -> list[dict[str, Tensor]]:
    ids = torch.randint(50, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(directory: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(directory), "max_steps": 1, "per_device_train_batch_size": 4, "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "use_cpu": True, "save_strategy": "no", "logging_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**{**defaults, **options})


def reads(model: UltraMemForCausalLM, ids: Tensor) -> list[Counter[int]]:
    """Reads of each table's rows, from what the layers look up."""
    tables = find_tables(model)
    counters = [Counter[int]() for _ in tables]
    lookup = TrainableTable.lookup

    def spying(self: TrainableTable, reads: Reads, dtype: torch.dtype | None = None) -> Tensor:
        counters[tables.index(self)].update(reads.rows.flatten().tolist())
        return lookup(self, reads, dtype)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(TrainableTable, "lookup", spying)
        model(input_ids=ids)
    return counters


@pytest.mark.parametrize("memory", [V2, PKM])
def test_counter_counts_what_the_layers_look_up(memory: dict[str, Any]) -> None:
    model, ids = make_model(memory), torch.randint(50, (3, 7))
    counter = RowCounter(model, training=False)
    counter.attach()
    model(input_ids=ids)
    model(input_ids=ids)
    counted = counter.take()
    assert len(counted) == (1 if memory is V2 else 2)
    for counts, expected in zip(counted, reads(model, ids), strict=True):
        assert {row: int(counts[row]) for row in counts.nonzero().flatten().tolist()} == {
            row: 2 * number for row, number in expected.items()
        }
    counter.take()
    model.train()
    model(input_ids=ids)
    counter.detach()
    model.eval()
    model(input_ids=ids)
    assert not any(counts.any() for counts in counter.take())


def test_padding_does_not_count() -> None:
    model, ids = make_model(), torch.randint(50, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    counter = RowCounter(model, training=False)
    counter.attach()
    model(input_ids=ids, attention_mask=mask)
    (counts,) = counter.take()
    counter.detach()
    parts = [reads(model, ids[:1])[0], reads(model, ids[1:, :3])[0]]
    assert {int(row): int(counts[row]) for row in counts.nonzero()} == dict(parts[0] + parts[1])


def test_background_is_the_number_of_batches_that_read_a_row() -> None:
    model = make_model().train()
    batches = [torch.randint(50, (2, 4)) for _ in range(5)]
    background = count_background(model, ({"input_ids": ids} for ids in batches))
    assert model.training
    assert background.batches == 5
    model.eval()
    expected = Counter[int]()
    for ids in batches:
        expected.update(reads(model, ids)[0].keys())
    assert background.frequencies[0].tolist() == [expected[row] for row in range(128)]
    with pytest.raises(UltraMemError, match="no batch"):
        count_background(model, [])


def test_scores_are_tf_idf() -> None:
    counts, frequencies, batches = [3, 0, 1, 6, 2], [0, 2, 9, 10, 3], 10
    expected = [c / 12 * math.log(11 / (f + 1)) for c, f in zip(counts, frequencies, strict=True)]
    scores = score_rows(torch.tensor(counts), torch.tensor(frequencies), batches)
    torch.testing.assert_close(scores, torch.tensor(expected))
    assert choose_rows(torch.tensor(counts), torch.tensor(frequencies), batches, 2).tolist() == [0, 4]
    # Row 1 is not read, and every background batch reads row 3.
    assert choose_rows(torch.tensor(counts), torch.tensor(frequencies), batches, 9).tolist() == [0, 4, 2]


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_optimizer_is_that_of_torch_on_the_chosen_rows(kind: str) -> None:
    """Each row by a torch optimizer of its own, stepped only when the row is chosen."""
    torch.manual_seed(0)
    table = TrainableTable(600, 5, 3)
    nn.init.normal_(table.values)
    nn.init.normal_(table.pre_values)
    optimizer = SparseRows([table], learning_rate=0.1, kind=kind, weight_decay=0.2)
    copies = [nn.Parameter(torch.cat([v, p])) for v, p in zip(table.values, table.pre_values, strict=True)]
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.2}
    references = [
        (torch.optim.AdamW if kind == "adamw" else torch.optim.SGD)(
            [row], **options if kind == "adamw" else {"lr": 0.1}
        )
        for row in copies
    ]
    chosen = set[int]()
    start = table.values.detach().clone()
    for size in (1, 300, 5, 200):
        rows = torch.randperm(500)[:size]
        chosen |= {*rows.tolist()}
        gradient = torch.randn(600, 8)
        table.values.grad, table.pre_values.grad = gradient[:, :5].clone(), gradient[:, 5:].clone()
        optimizer.rows = [rows]
        optimizer.step()
        assert optimizer.rows == []
        for row in rows.tolist():
            if kind == "sgd":
                copies[row].data *= 1 - 0.1 * 0.2
            copies[row].grad = gradient[row]
            references[row].step()
        torch.testing.assert_close(torch.cat([table.values, table.pre_values], 1), torch.stack([*copies]))
    untouched = [row for row in range(600) if row not in chosen]
    assert torch.equal(table.values[untouched], start[untouched])
    assert optimizer.trained_rows == len(chosen)
    before = table.values.detach().clone()
    with pytest.raises(UltraMemError, match="no rows were chosen for this step"):
        optimizer.step()
    assert torch.equal(table.values, before)
    twin = copy.deepcopy(optimizer)
    assert (twin.kind, twin.trained_rows) == (kind, len(chosen))


def test_state_grows_with_the_rows_trained_and_survives_saving(tmp_path: Path) -> None:
    tables = [TrainableTable(1000, 4, 2), TrainableTable(1000, 4, 2)]
    for parameter in (parameter for table in tables for parameter in table.parameters()):
        nn.init.normal_(parameter)
    other = copy.deepcopy(tables)
    optimizer = SparseRows(tables, learning_rate=0.1, kind="adamw")

    def step(target: list[TrainableTable], stepped: SparseRows, seed: int, sizes: tuple[int, int]) -> None:
        torch.manual_seed(seed)
        for parameter in (parameter for table in target for parameter in table.parameters()):
            parameter.grad = torch.randn_like(parameter)
        stepped.rows = [torch.randperm(100)[:size] for size in sizes]
        stepped.step()

    for seed in range(3):
        step(tables, optimizer, seed, (20, 0))
    state = optimizer.state_dict()
    number = len(state["trained"][0]["rows"])
    assert 20 < number <= 60
    assert [tuple(averages.shape) for averages in state["trained"][0]["averages"]] == [(number, 2, 4), (number, 2, 2)]
    assert state["trained"][1] == {}
    torch.save(state, tmp_path / "optimizer.pt")
    for table, source in zip(other, tables, strict=True):
        table.load_state_dict(source.state_dict())
    resumed = SparseRows(other, learning_rate=9.0, kind="adamw")
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert resumed.trained_rows == number
    for seed in range(3, 6):
        step(tables, optimizer, seed, (20, 5))
        step(other, resumed, seed, (20, 5))
    for table, source in zip(other, tables, strict=True):
        for parameter, expected in zip(table.parameters(), source.parameters(), strict=True):
            assert torch.equal(parameter, expected)


@pytest.mark.parametrize("memory", [V2, PKM])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_trainer_changes_the_best_rows_alone(memory: dict[str, Any], kind: str, tmp_path: Path) -> None:
    model, data = make_model(memory), make_data(4)
    background = count_background(model, [{"input_ids": torch.randint(50, (2, 3))} for _ in range(4)])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = []
    ids = torch.stack([example["input_ids"] for example in data])
    for counted, frequencies in zip(reads(model, ids), background.frequencies, strict=True):
        scores = {
            row: number / counted.total() * math.log(5 / (int(frequencies[row]) + 1)) for row, number in counted.items()
        }
        expected.append(scores)
    sparse = SparseFinetuning(model, background, rows=5, learning_rate=0.5, optimizer=kind)
    trainer = Trainer(
        model, arguments(tmp_path, eval_strategy="steps", eval_steps=1), train_dataset=data, eval_dataset=make_data(8),
        callbacks=[sparse], optimizers=(sparse.optimizer, None),
    )  # fmt: skip
    trainer.train()
    changed_tables = 0
    for name, tensor in model.state_dict().items():
        if not name.endswith((".values", ".pre_values")):
            assert torch.equal(tensor, before[name]), name
            continue
        changed = (tensor != before[name]).any(1).nonzero().flatten().tolist()
        scores = expected[0 if memory is V2 else changed_tables]
        changed_tables += 1
        worst = min(scores[row] for row in changed)
        assert len(changed) == 5
        assert all(score <= worst + 1e-9 for row, score in scores.items() if row not in changed)
    assert changed_tables == 2
    assert sparse.optimizer.trained_rows == (5 if memory is V2 else 10)
    assert all(layer.observers == [] for layer in model.memory.layers)


def test_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    background_batches = [{"input_ids": torch.randint(50, (2, 3))} for _ in range(4)]
    trained = []
    for micro, accumulate in ((4, 1), (1, 4)):
        model = make_model()
        sparse = SparseFinetuning(model, count_background(model, background_batches), rows=6, learning_rate=0.5)
        options = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate, "max_steps": 3}
        data = make_data(12)
        Trainer(
            model, arguments(tmp_path, **options), train_dataset=data, callbacks=[sparse],
            optimizers=(sparse.optimizer, None),
        ).train()  # fmt: skip
        trained.append((sparse.optimizer.state_dict()["trained"][0]["rows"], model.memory.table.values))
    assert torch.equal(trained[0][0], trained[1][0])
    torch.testing.assert_close(trained[0][1], trained[1][1])


def test_resumed_training_equals_uninterrupted_training(tmp_path: Path) -> None:
    batches = [{"input_ids": torch.randint(50, (2, 3))} for _ in range(4)]
    background = count_background(make_model(), batches)

    def train(directory: Path, resume: bool = False, **options: Any) -> Tensor:
        model = make_model()
        sparse = SparseFinetuning(model, background, rows=6, learning_rate=0.01, optimizer="adamw")
        trainer = Trainer(
            model, arguments(directory, save_strategy="steps", save_steps=2, **options), train_dataset=make_data(16),
            callbacks=[sparse], optimizers=(sparse.optimizer, None),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model.memory.table.values.detach()

    whole = train(tmp_path / "whole", max_steps=4)
    train(tmp_path / "parts", max_steps=2)
    assert torch.equal(train(tmp_path / "parts", resume=True, max_steps=4), whole)


def test_mistakes(tmp_path: Path) -> None:
    model = make_model()
    background = Background(1, [torch.zeros(128, dtype=torch.int64)])
    with pytest.raises(ConfigError, match="rows=0"):
        SparseFinetuning(model, background, rows=0, learning_rate=1.0)
    with pytest.raises(ConfigError, match="kind=adam"):
        SparseFinetuning(model, background, rows=1, learning_rate=1.0, optimizer="adam")  # type: ignore[arg-type]
    sparse = SparseFinetuning(model, background, rows=1, learning_rate=1.0)
    trainer = Trainer(
        model, arguments(tmp_path, max_grad_norm=1.0), train_dataset=make_data(4), callbacks=[sparse],
        optimizers=(sparse.optimizer, None),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"max_grad_norm=1\.0"):
        trainer.train()
    plain = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(UltraMemError, match="LlamaForCausalLM has no memory layers"):
        find_tables(plain)
    empty = make_model({**V2, "insertion": "none"})
    with pytest.raises(UltraMemError, match="no memory layers"):
        RowCounter(empty, training=True)


def test_attached_memory(tmp_path: Path) -> None:
    from ultramem.hosts.transformers import attach_memory

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )
    attach_memory(model, MemoryConfig(**V2))
    background = count_background(model, [{"input_ids": torch.randint(50, (2, 3))} for _ in range(4)])
    sparse = SparseFinetuning(model, background, rows=5, learning_rate=0.5)
    Trainer(
        model, arguments(tmp_path, max_steps=3), train_dataset=make_data(12), callbacks=[sparse],
        optimizers=(sparse.optimizer, None),
    ).train()  # fmt: skip
    assert 5 <= sparse.optimizer.trained_rows <= 15
