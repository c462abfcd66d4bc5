"""Names of tasks, several tasks at once, and `ultramem evaluate --tasks` on checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from ultramem.configuration.decoding import decode
from ultramem.data.tokenizers import ChosenTokenizer
from ultramem.errors import ConfigError, UltraMemError
from ultramem.evaluation import TaskEvaluation, evaluate_tasks, memory_tasks, print_task_table, table3
from ultramem.evaluation.scoring import score
from ultramem.evaluation.tasks import GROUPS, TASKS, TaskSuite, task_names, with_means
from ultramem.report.run import Tasks
from ultramem.runs.checkpoints import find_checkpoint
from ultramem.runs.results import TaskResult
from ultramem.runs.tokenizer import find_tokenizer


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


def evaluation(run: Path, checkpoint: str = "step7", **values: float) -> TaskEvaluation:
    """Made-up results of tasks."""
    results = [TaskResult(name, "accuracy", value, 0.02, 1500, 0.25) for name, value in values.items()]
    return TaskEvaluation(checkpoint, results, 16, 5000.0, run)


def test_values(run: Any) -> None:
    (found,) = evaluate_tasks([run.path], ["openbook_qa", "arc_easy"], max_questions=25, device="cpu")
    suite = TaskSuite(["openbook_qa", "arc_easy"], find_tokenizer(find_checkpoint(run.path)), 16, 25)
    assert found.results == suite.run(run.model)
    assert (found.checkpoint, found.run, found.context_length) == ("step7", run.path, 16)
    assert found.tokens_per_second > 0


def test_the_batch_size_does_not_matter_but_the_length_does(run: Any) -> None:
    options = {"tasks": ["openbook_qa"], "max_questions": 50}
    (once,), (small,), (long,) = (
        evaluate_tasks([run.path], **options),
        evaluate_tasks([run.path], **options, batch_size=1),
        evaluate_tasks([run.path], **options, sequence_length=400),
    )
    assert small.results == once.results
    assert once.results[0].cut > 0.9
    assert long.results[0].cut == 0


def test_several_checkpoints(run: Any, tmp_path: Path) -> None:
    run.save_checkpoint(9)
    paths = [run.path / "step7", run.path]
    first, second = evaluate_tasks(paths, ["openbook_qa"], max_questions=10)
    assert (first.checkpoint, second.checkpoint) == ("step7", "step9")
    assert first.results == second.results


def test_mistakes_come_before_the_work(run: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tasks=squad"):
        next(evaluate_tasks([run.path], ["squad"]))
    for option in ("max_questions", "batch_size", "sequence_length"):
        with pytest.raises(ConfigError, match=f"{option}=0: must be at least 1"):
            next(evaluate_tasks([run.path], ["piqa"], **{option: 0}))
    with pytest.raises(UltraMemError, match="neither a run directory"):
        next(evaluate_tasks([run.path, tmp_path / "nothing"], ["piqa"]))
    (run.path / "tokenizer.json").unlink()
    with pytest.raises(UltraMemError, match=r"tokenizer.json does not exist; copy"):
        next(evaluate_tasks([run.path], ["piqa"]))


def test_saving(tmp_path: Path) -> None:
    path = evaluation(tmp_path, piqa=0.5, sciq=0.3).save()
    assert path == tmp_path / "tasks.json"
    content = json.loads(path.read_text())
    assert content["checkpoint"] == "step7"
    assert content["results"][0] == asdict(TaskResult("piqa", "accuracy", 0.5, 0.02, 1500, 0.25))
    assert [result.value for result in decode(Tasks, content).results] == [0.5, 0.3]


def test_other_tasks_of_the_same_checkpoint_are_kept(tmp_path: Path) -> None:
    def saved() -> dict[str, float]:
        results = json.loads((tmp_path / "tasks.json").read_text())["results"]
        return {result["name"]: result["value"] for result in results}

    evaluation(tmp_path, **dict.fromkeys(GROUPS["table3"], 0.5)).save()
    assert saved()["table3"] == 0.5
    evaluation(tmp_path, piqa=0.95).save()
    assert saved()["sciq"] == 0.5
    assert saved()["table3"] == pytest.approx((8 * 0.5 + 0.95) / 9)
    parts = {"recall": 0.5, "recall/pairs4/length128": 0.5}
    evaluation(tmp_path, **parts).save()
    evaluation(tmp_path, recall=0.25).save()  # of a shorter context, which has no such part
    assert saved()["recall"] == 0.25
    assert "recall/pairs4/length128" not in saved()
    few = replace(evaluation(tmp_path, sciq=0.1), max_questions=10)
    assert few.save() is None  # on all questions there is more already
    assert saved()["recall"] == 0.25
    few.save(tmp_path / "elsewhere.json")
    evaluation(tmp_path, piqa=0.3).save(tmp_path / "elsewhere.json")
    elsewhere = json.loads((tmp_path / "elsewhere.json").read_text())["results"]
    assert [result["name"] for result in elsewhere] == ["piqa"]
    replace(few, checkpoint="step8").save()
    assert saved() == {"sciq": 0.1}
    evaluation(tmp_path, checkpoint="step8", sciq=0.2).save()
    assert saved() == {"sciq": 0.2}
    (tmp_path / "tasks.json").write_text("[]")
    evaluation(tmp_path, piqa=0.4).save()
    assert saved() == {"piqa": 0.4}


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    one, other = evaluation(tmp_path / "[one]", piqa=0.5), evaluation(tmp_path / "other", piqa=0.4321)
    cut = TaskResult("sciq", "length-normalised accuracy", 0.25, 0.0137, 1000, 0.25, cut=0.125)
    one.results.append(cut)
    other.results.append(TaskResult("sciq", "length-normalised accuracy", 0.5, 0.0158, 1000, 0.25))
    print_task_table([one, other])
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    assert rows[0] == ["piqa", "1,500", "25.0", "50.0 ± 2.0", "43.2 ± 2.0"]
    assert rows[1] == ["sciq", "1,000", "25.0", "25.0 ± 1.4", "50.0 ± 1.6"]
    assert rows[2] == ["tokens per second", "", "", "5,000", "5,000"]
    assert "[one]/step7" in printed
    assert "accuracy: piqa" in printed
    assert "length-normalised accuracy: sciq" in printed
    assert "[one]/step7: contexts cut on the left to 16 tokens: sciq 12.5 %" in printed
    assert "other/step7:" not in printed


def test_parts_that_only_some_models_have_room_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = "copying", "copying/length16", "copying/length32"
    results = [TaskResult(name, "token accuracy", 0.5, 0.01, 100, 0.001) for name in names]
    short, long = (TaskEvaluation(f"step{n}", results[:n], 16, 5000.0, tmp_path) for n in (2, 3))
    print_task_table([short, long])
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    assert [row[0] for row in rows[:3]] == [*names]
    assert [row[3:] for row in rows[1:3]] == [["50.0 ± 1.0", "50.0 ± 1.0"], ["", "50.0 ± 1.0"]]
    assert "token accuracy: copying\n" in printed


def test_memory_tasks_depend_on_the_length(run: Any) -> None:
    once, again = (list(evaluate_tasks([run.path], ["copying"], max_questions=1, sequence_length=n)) for n in (40, 80))
    names = [[result.name for result in evaluation.results] for (evaluation,) in (once, again)]
    assert names == [["copying", "copying/length16"], ["copying", "copying/length16", "copying/length32"]]
    with pytest.raises(UltraMemError, match="task copying: no question fits in the 16 tokens"):
        next(evaluate_tasks([run.path], ["copying"]))
