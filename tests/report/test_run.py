"""Reading run directories: repeated steps, torn lines, missing and broken files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ultramem.errors import UltraMemError
from ultramem.report.run import Run

MakeRun = Callable[..., Path]


def line(step: int, **metrics: float) -> dict[str, object]:
    return {"step": step, "time": 0.0, "metrics": metrics}


def test_series_are_the_reported_values(make_run: MakeRun) -> None:
    path = make_run(lines=[line(1, loss=3.0), line(2, loss=2.5, rate=7), line(3, loss=2.25)])
    run = Run.read(path)
    np.testing.assert_array_equal(run.series("loss").steps, [1, 2, 3])
    np.testing.assert_array_equal(run.series("loss").values, [3.0, 2.5, 2.25])
    np.testing.assert_array_equal(run.series("rate").steps, [2])
    assert len(run.series("absent").steps) == len(run.series("absent").values) == 0


def test_last_report_of_a_repeated_step_wins_and_steps_rise(make_run: MakeRun) -> None:
    first_life = [line(step, loss=10.0 + step) for step in (1, 2, 3, 4)]
    resumed = [line(step, loss=20.0 + step) for step in (3, 4, 5)]
    run = Run.read(make_run(lines=[*first_life, *resumed]))
    np.testing.assert_array_equal(run.series("loss").steps, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(run.series("loss").values, [11, 12, 23, 24, 25])
    assert run.last_step == 5


def test_torn_last_line_is_ignored(make_run: MakeRun) -> None:
    path = make_run(lines=[line(1, loss=3.0), line(2, loss=2.0)])
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line(3, loss=1.0))[:-9])
    run = Run.read(path)
    assert run.last_step == 2
    assert run.unreadable_lines == 0


def test_line_torn_by_a_crash_and_appended_to_is_skipped_and_counted(make_run: MakeRun) -> None:
    path = make_run(lines=[line(1, loss=3.0)])
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "ti' + json.dumps(line(2, loss=2.0)).encode() + b"\n\xff\x00\n")
        file.write(json.dumps(line(3, loss=1.0)).encode() + b"\n")
    run = Run.read(path)
    np.testing.assert_array_equal(run.series("loss").steps, [1, 3])
    assert run.unreadable_lines == 2


def test_metrics_that_are_no_numbers_are_left_out(make_run: MakeRun) -> None:
    path = make_run(lines=[{"step": 1, "time": 0, "metrics": {"loss": None, "name": "x", "rate": float("nan")}}])
    run = Run.read(path)
    assert set(run.metrics[1]) == {"rate"}
    assert np.isnan(run.series("rate").values).all()


def test_layer_series_form_a_layer_by_step_grid(make_run: MakeRun) -> None:
    lines = [
        line(10, **{"memory/layer 03/rows read": 0.1, "memory/layer 12/rows read": 0.2, "loss": 1.0}),
        line(15, loss=1.0),
        line(20, **{"memory/layer 12/rows read": 0.4, "moe/block 00/load imbalance": 1.5}),
    ]
    rows_read, imbalance = Run.read(make_run(lines=lines)).layer_series
    assert (rows_read.group, rows_read.axis, rows_read.name) == ("memory", "layer", "rows read")
    assert rows_read.layers == [3, 12]
    np.testing.assert_array_equal(rows_read.steps, [10, 20])
    np.testing.assert_array_equal(rows_read.values, [[0.1, np.nan], [0.2, 0.4]])
    assert (imbalance.group, imbalance.axis, imbalance.name) == ("moe", "block", "load imbalance")
    np.testing.assert_array_equal(imbalance.values, [[1.5]])


def test_continuation_does_not_repeat_the_prompt(make_run: MakeRun) -> None:
    path = make_run()
    samples = [
        {"prompt": "import ", "text": "import os", "temperature": 1.0, "top_k": None, "seed": 0},
        {"prompt": "import ", "text": "sys"},
    ]
    (path / "samples.json").write_text(json.dumps(samples))
    with_prompt, without = Run.read(path).samples
    assert (with_prompt.continuation, without.continuation) == ("os", "sys")
    assert with_prompt.settings == {"temperature": 1.0, "seed": 0}


@pytest.mark.parametrize("missing", ["config.yaml", "summary.json"])
def test_not_a_run_directory(make_run: MakeRun, missing: str) -> None:
    path = make_run()
    (path / missing).unlink()
    with pytest.raises(UltraMemError, match=f"not a run directory, as it has no {missing}"):
        Run.read(path)


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "time": 0, "metr', '{"step": 1, "metrics": {}}\n'])
def test_run_without_metrics(make_run: MakeRun, content: str | None) -> None:
    path = make_run()
    (path / "metrics.jsonl").unlink()
    if content is not None:
        (path / "metrics.jsonl").write_text(content)
    with pytest.raises(UltraMemError, match="no metrics yet"):
        Run.read(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("summary.json", '{"system": "dense"}'),
        ("evaluation.json", '{"loss": "low"}'),
        ("evaluation.json", "null"),
        ("tasks.json", "[]"),
        ("tasks.json", '{"checkpoint": "step1", "results": [{"name": "piqa"}]}'),
        ("samples.json", '{"prompt": "x"}'),
        ("samples.json", '[{"prompt": "x", "text": 5}]'),
    ],
)
def test_broken_files_are_named(make_run: MakeRun, name: str, content: str) -> None:
    path = make_run()
    (path / name).write_text(content)
    with pytest.raises(UltraMemError, match=name):
        Run.read(path)


@pytest.mark.parametrize("change", [{"split": "train"}, {"split": "files"}, {"data": "data/other"}])
def test_losses_on_other_data_are_not_the_runs(make_run: MakeRun, change: dict[str, str]) -> None:
    path = make_run()
    assert Run.read(path).evaluation is not None
    content = json.loads((path / "evaluation.json").read_text())
    (path / "evaluation.json").write_text(json.dumps(content | change))
    assert Run.read(path).evaluation is None
