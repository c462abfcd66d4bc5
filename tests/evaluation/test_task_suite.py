"""Names of tasks, and several tasks at once."""

from __future__ import annotations

from math import sqrt
from statistics import fmean
from typing import Any

import pytest

from ultramem.data.tokenizers import ChosenTokenizer
from ultramem.errors import ConfigError, UltraMemError
from ultramem.evaluation import evaluate_tasks, memory_tasks, table3
from ultramem.evaluation.scoring import score
from ultramem.evaluation.task_suite import TASKS, TaskSuite, task_names, with_means
from ultramem.runs.results import TaskResult


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["piqa"], ["piqa"]),
        (["piqa, sciq", "piqa", "hellaswag"], ["piqa", "sciq", "hellaswag"]),
        (["memory", "piqa"], ["recall", "copying", "facts", "piqa"]),
        (["sciq", "table3"], ["sciq", *(name for name in table3.LABELS if name != "sciq")]),
    ],
)
def test_names(given: list[str], expected: list[str]) -> None:
    assert task_names(given) == expected


@pytest.mark.parametrize("given", [["piqa", "squad"], [""], [], ["piqa,"]])
def test_unknown_names(given: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^tasks=(squad)?: must be one of table3, memory, arc_challenge, ") as caught:
        task_names(given)
    assert all(name in str(caught.value) for name in TASKS)


def test_max_questions() -> None:
    assert not [*evaluate_tasks([], max_questions=None)]
    assert not [*evaluate_tasks([], max_questions=1)]
    with pytest.raises(ConfigError, match="max_questions=0: must be at least 1"):
        next(evaluate_tasks([], max_questions=0))


def test_several_tasks_are_what_each_is_alone(run: Any, byte_tokenizer: ChosenTokenizer) -> None:
    names = ["openbook_qa", "arc_easy"]
    suite = TaskSuite(names, byte_tokenizer, 100, max_questions=20)
    read: list[int] = []
    results = suite.run(run.model, on_tokens=read.append)
    assert [result.name for result in results] == names
    assert sum(read) == suite.tokens()
    for name, result in zip(names, results, strict=True):
        task = table3.load(name, byte_tokenizer, 20)
        (alone,) = task.results(score(run.model, task.requests, context_length=100))
        assert (result.value, result.standard_error) == (alone.value, alone.standard_error)
        too_long = [len(request.context + request.continuation[:-1]) > 100 for request in task.requests]
        assert 0 < result.cut == fmean(too_long) < 1
    assert TaskSuite(names, byte_tokenizer, 10_000, max_questions=20).run(run.model)[0].cut == 0


def test_a_task_with_parts(run: Any, byte_tokenizer: ChosenTokenizer) -> None:
    suite = TaskSuite(["copying", "openbook_qa"], byte_tokenizer, 70, max_questions=2)
    results = suite.run(run.model)
    assert [result.name for result in results] == ["copying", "copying/length16", "copying/length32", "openbook_qa"]
    assert [result.questions for result in results] == [4, 2, 2, 2]
    copying = memory_tasks.load("copying", byte_tokenizer, 70, 2)
    assert results[:3] == copying.results(score(run.model, copying.requests))
    assert results[3].cut > 0


def test_a_context_that_is_too_short(byte_tokenizer: ChosenTokenizer) -> None:
    for name in ("recall", "copying", "facts"):
        with pytest.raises(UltraMemError, match=f"task {name}: no question fits in the 31 tokens"):
            TaskSuite([name], byte_tokenizer, 31)


def test_means() -> None:
    results = [
        TaskResult(name, "accuracy", value=0.1 * i, standard_error=0.01 * i, questions=10 + i, chance=0.25, cut=0.5)
        for i, name in enumerate(table3.LABELS)
    ]
    *kept, mean = with_means(results)
    assert kept == results
    assert (mean.name, mean.metric, mean.questions) == ("table3", "mean", 9 * 10 + 36)
    assert mean.value == pytest.approx(0.4)
    assert mean.standard_error == pytest.approx(0.01 * sqrt(sum(i * i for i in range(9))) / 9)
    assert (mean.chance, mean.cut) == pytest.approx((0.25, 0.5))
    assert with_means(results[1:]) == results[1:]
