"""A run directory with files of any content is reported on, or its file is named in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from hostile import allowed, changed, damaged, json_files, numbers
from ultramem.report import plots, write_report

METRICS = {
    "train/CE loss": 3.5,
    "train/tokens": 64,
    "optim/total grad norm": 1.5,
    "optim/learning rate (model)": 1e-3,
    "throughput/tokens per second": 1000,
    "eval/heldout/CE loss": 2.5,
    "memory/layer 00/rows read": 0.5,
    "memory/layer 01/top score": 0.5,
}
LINES = [{"step": step, "time": 0.5, "metrics": METRICS} for step in (1, 2)]
FILES = ["summary.json", "evaluation.json", "tasks.json", "samples.json"]


@pytest.fixture(scope="module")
def run(write_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("whole"), lines=LINES)


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time."""
    monkeypatch.setattr(plots, "svg", lambda *arguments: Markup("drawing"))


def reported(run: Path, name: str, content: bytes) -> None:
    """Write reports of a copy of the run in which a file has this content."""
    copy = run.with_name("copy")
    shutil.copytree(run, copy, dirs_exist_ok=True)
    (copy / name).write_bytes(content)
    with allowed():
        write_report([copy])
    with allowed():
        write_report([run, copy], run.with_name("both.html"))


@pytest.mark.usefixtures("without_plots")
@settings(max_examples=settings().max_examples // 2)
@given(data=st.data(), name=st.sampled_from(FILES))
def test_any_file(run: Path, data: st.DataObject, name: str) -> None:
    reported(run, name, data.draw(json_files(json.loads((run / name).read_text()))))


@pytest.mark.usefixtures("without_plots")
@settings(max_examples=settings().max_examples // 2)
@given(content=damaged("".join(json.dumps(line) + "\n" for line in LINES)))
def test_any_metrics_file(run: Path, content: bytes) -> None:
    reported(run, "metrics.jsonl", content)


@pytest.mark.usefixtures("without_plots")
@settings(max_examples=settings().max_examples // 2)
@given(lines=changed(LINES))
@example([{"step": 1e999, "metrics": METRICS}, *LINES])
@example([{"step": 10**400, "metrics": METRICS}, *LINES])
@example([{"step": 2**62, "metrics": METRICS}, *LINES])
def test_any_metrics(run: Path, lines: object) -> None:
    text = "".join(json.dumps(line) + "\n" for line in (lines if isinstance(lines, list) else [lines]))
    reported(run, "metrics.jsonl", text.encode())


@settings(max_examples=settings().max_examples // 10)
@given(name=st.sampled_from([*METRICS, "memory/layer 99999999999/x", "moe/block 1/$x^"]), number=numbers)
@example("optim/total grad norm", "1e308")
def test_any_number_is_drawn(tmp_path_factory: pytest.TempPathFactory, run: Path, name: str, number: str) -> None:
    path = shutil.copytree(run, tmp_path_factory.getbasetemp() / "drawn", dirs_exist_ok=True)
    lines = [f'{{"step": {step}, "metrics": {{"{name}": {value}}}}}\n' for step, value in ((1, 1), (2, number))]
    (path / "metrics.jsonl").write_text("".join(lines))
    with allowed():
        write_report([path])


@pytest.mark.usefixtures("without_plots")
@settings(max_examples=settings().max_examples // 2)
@given(content=damaged("model:\n  d_model: 32\ndata: {sequence_length: 16}\n"))
def test_any_configuration(run: Path, content: bytes) -> None:
    reported(run, "config.yaml", content)
