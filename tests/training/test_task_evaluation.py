"""Tasks evaluated during training: the values, what they leave alone, several processes, and what is missing."""

import os
import shutil
import signal
import sys
from dataclasses import replace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ultramem.data.token_files import load_manifest, save_manifest
from ultramem.errors import ConfigError, UltraMemError
from ultramem.evaluation import evaluate_tasks, find_checkpoint
from ultramem.evaluation.tasks import TaskSuite
from ultramem.training import LoggingConfig, train

TASKS = ("openbook_qa", "arc_easy")


@pytest.fixture
def make(make_config, token_directory, tmp_path):
    """Makes configurations of runs whose data has a tokenizer, with a token for each byte."""
    directory = shutil.copytree(token_directory, tmp_path / "tokens")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    save_manifest(replace(load_manifest(directory), directory=directory, vocab_size=257))

    def make(directory_name="run", system="ultramem_v2", **options):
        options = {"steps": 6, "evaluate_tasks": TASKS, "evaluate_tasks_questions": 10} | options
        config = make_config(system, directory_name, **options)
        model = replace(config.model, vocab_size=384)
        if model.memory is not None:
            model = replace(model, memory=replace(model.memory, output_dropout=0.0))
        return replace(config, model=model, data=replace(config.data, directory=directory))

    return make


def of_tasks(metrics):
    """By step, what is said of tasks."""
    found = {
        step: {name: value for name, value in values.items() if name.startswith("tasks/")}
        for step, values in metrics.items()
    }
    return {step: values for step, values in found.items() if values}


def test_values_are_those_of_the_command(make, metrics_of, capsys):
    config = make(logging=LoggingConfig(tensorboard=True))
    train(config)
    directory = config.trainer.directory
    (evaluation,) = evaluate_tasks([directory], TASKS, max_questions=10)
    expected = {f"tasks/{result.name}": result.value for result in evaluation.results}
    assert of_tasks(metrics_of(directory)) == {6: pytest.approx(expected)}
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    for name, value in expected.items():
        assert [(event.step, event.value) for event in events.Scalars(name)] == [(6, pytest.approx(value))]
    assert "step 6  tasks: openbook_qa 0." in capsys.readouterr().out


def test_each_interval_and_at_the_end(make, metrics_of):
    config = make(steps=5, evaluate_tasks_interval=2, evaluate_tasks=("openbook_qa",))
    train(config)
    assert list(of_tasks(metrics_of(config.trainer.directory))) == [2, 4, 5]


@pytest.mark.parametrize("step", [2, 4])
def test_killed_before_a_result_is_written(step, make, metrics_of, in_child, monkeypatch):
    options = {"steps": 4, "checkpoint_interval": 2, "evaluate_tasks_interval": 2, "evaluate_tasks": ("openbook_qa",)}
    whole, broken = make("whole", **options), make("broken", **options)
    train(whole)
    run, calls = TaskSuite.run, []

    def lethal(*arguments, **named):
        calls.append(arguments)
        return run(*arguments, **named) if len(calls) < step // 2 else os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(TaskSuite, "run", lethal)
        assert in_child(lambda: train(broken)) == -signal.SIGKILL
    assert train(broken).status == "finished"
    assert of_tasks(metrics_of(broken.trainer.directory)) == of_tasks(metrics_of(whole.trainer.directory))


@pytest.mark.parametrize("system", ["ultramem_v2", "moe"])
def test_changes_nothing_in_training(make, metrics_of, system):
    often = make("often", system, steps=12, evaluate_tasks_interval=2)
    never = make("never", system, steps=12, evaluate_tasks=())
    train(often)
    train(never)
    kept = "train/", "optim/", "memory/", "moe/", "eval/"
    results = [
        {step: {name: value for name, value in values.items() if name.startswith(kept)} for step, values in run.items()}
        for run in map(metrics_of, (often.trainer.directory, never.trainer.directory))
    ]
    assert results[0] == results[1]
    assert any(name.startswith(("memory/", "moe/")) for name in results[0][5])


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_two_processes_share_the_work(make, in_children, metrics_of, parallel):
    options = {"evaluate_tasks_interval": 3, "evaluate_tasks_questions": 150}  # several batches
    single = make("single", **options)
    train(single)
    config = make(parallel, parallel=parallel, **options)
    assert in_children(lambda: train(config), 2) == [0, 0]
    expected, found = (of_tasks(metrics_of(run.trainer.directory)) for run in (single, config))
    assert list(found) == [3, 6]
    assert found == {step: pytest.approx(values) for step, values in expected.items()}


def test_an_interval_without_tasks(make):
    config = make(evaluate_tasks=(), evaluate_tasks_interval=5)
    message = r"^trainer\.evaluate_tasks_interval=5: needs tasks; set trainer.evaluate_tasks,"
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not config.trainer.directory.exists()


def test_mistakes_come_before_training(make, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"^trainer.evaluate_tasks=squad: must be one of table3, memory, arc_challenge"
    ):
        train(make(evaluate_tasks=("squad",)))
    config = make()
    files = {"train_files": tuple((config.data.directory / "train").glob("*.npy")), "dtype": "uint16"}
    data = replace(config.data, directory=None, **files, vocab_size=257, eos_token_id=0)
    with pytest.raises(
        UltraMemError, match=r"^trainer.evaluate_tasks: needs a tokenizer, which data.train_files do not have"
    ):
        train(replace(config, data=data))
    monkeypatch.setitem(sys.modules, "olmo_eval", None)
    with pytest.raises(UltraMemError, match=r"pip install 'ultramem\[eval\]'"):
        train(config)
    assert not config.trainer.directory.exists()


def test_a_failure_in_the_last_evaluation_costs_no_steps(make, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("no room")

    config = make(steps=7, checkpoint_interval=5)
    monkeypatch.setattr("ultramem.evaluation.tasks.TaskSuite.run", fail)
    with pytest.raises(MemoryError):
        train(config)
    assert find_checkpoint(config.trainer.directory).step == 7


def test_parts_of_tasks_are_metrics_but_not_printed(make, metrics_of, capsys):
    config = make(steps=1, evaluate_tasks=("copying",), evaluate_tasks_questions=1)
    config = replace(config, data=replace(config.data, sequence_length=64))
    train(config)
    names = ["tasks/copying", "tasks/copying/length16", "tasks/copying/length32"]
    assert [*of_tasks(metrics_of(config.trainer.directory))[1]] == names
    printed = capsys.readouterr().out
    assert "step 1  tasks: copying 0." in printed
    assert "length16" not in printed


def test_a_sequence_too_short_for_a_task(make):
    config = make(evaluate_tasks=("recall",))
    with pytest.raises(UltraMemError, match="task recall: no question fits in the 16 tokens"):
        train(config)
    assert not config.trainer.directory.exists()
