"""Report pages: figures, escaping, missing parts, comparison, and how the file is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ultramem.cli import app
from ultramem.errors import UltraMemError
from ultramem.report import page, write_report
from ultramem.report.run import Run

MakeRun = Callable[..., Path]
LOSS_ONLY = [{"step": 1, "time": 0, "metrics": {"train/CE loss": 8.5}}]
NONE = "\N{EN DASH}"  # in place of a figure
VOID = {"meta", "image", "br"}


class Page(HTMLParser):
    """What a reader and a browser find in a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text_of: dict[str, list[str]] = {}
        self.tiles: dict[str, tuple[float, str]] = {}
        self.rows: list[list[str]] = []
        self.labels: list[str] = []
        self.references: list[str] = []
        self.value = ""
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.references += [found[name] or "" for name in ("src", "href", "xlink:href") if name in found]
        if tag == "svg":
            self.labels.append(found["aria-label"] or "")
        if tag == "data":
            self.value = found["value"] or ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)
            self.text_of.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.text_of[tag][-1] += data
        if "data" in self.open and "dd" in self.open:
            self.tiles[self.text_of["dt"][-1]] = (float(self.value), data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def text(self, tag: str) -> list[str]:
        return [" ".join(text.split()) for text in self.text_of.get(tag, [])]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.6, "1.00 k"),
        (5400, "5.40 k"),
        (227_345_408, "227 M"),
        (999_999_999, "1.00 B"),
        (1_183_452_672, "1.18 B"),
    ],
)
def test_abbreviate(value: float, text: str) -> None:
    assert page.abbreviate(value) == text


def test_in_unit() -> None:
    assert page.in_unit(4_520_000, "B") == "4.52 MB"
    assert page.in_unit(454_690_816_000, "FLOP") == "455 GFLOP"


@pytest.fixture(scope="module")
def full_run(write_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all parts, and its report."""
    path = write_run(tmp_path_factory.mktemp("full"))
    assert write_report([path]) == path / "report.html"
    return path


@pytest.fixture(scope="module")
def full_page(full_run: Path) -> Page:
    return Page(full_run / "report.html")


def test_tiles_carry_the_exact_values(full_run: Path, full_page: Page) -> None:
    tiles = full_page.tiles
    assert tiles["Held-out bits per byte"] == (1.0967, "1.097")
    assert tiles["Held-out loss"] == (2.4321, "2.432")
    assert tiles["Active parameters"] == (227_345_408, "227 M")
    assert tiles["Total parameters"] == (1_183_452_672, "1.18 B")
    assert tiles["FLOPs per token"] == (454_690_816, "455 MFLOP")
    assert tiles["Read per token"] == (4_520_000, "4.52 MB")
    assert tiles["Memory rows"] == (2_592_000, "2.59 M")
    assert tiles["Last step"] == (600, "600")
    reports = [json.loads(line)["metrics"] for line in (full_run / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(report["throughput/tokens per second"] for report in reports)
    assert tiles["Tokens per second"][0] == pytest.approx((rates[299] + rates[300]) / 2)
    last_seven = [report["train/CE loss"] for report in reports[-7:]]  # half of 2% of 600 steps, and the last
    assert tiles["Training loss"][0] == pytest.approx(sum(last_seven) / 7)


def test_notes_say_without_embeddings_unigram_and_perplexity(full_page: Page) -> None:
    notes = full_page.text("small")
    assert "189 M without embeddings" in notes
    assert "1.14 B without embeddings" in notes
    assert "unigram model: 3.218" in notes
    assert "perplexity 11.38" in notes


def test_page_has_every_part(full_run: Path, full_page: Page) -> None:
    assert full_page.labels == [
        "Loss by step",
        "Learning rate of each parameter group by step",
        "Gradient norm by step",
        "Tokens per second by step",
        "Rows read by layer and step",
        "KL from uniform by layer and step",
        "Output std by layer and step",
        "Top score by layer and step",
        "Last score by layer and step",
        "Singular value 1 by layer and step",
        "Singular value 2 by layer and step",
    ]
    assert full_page.text("h2") == ["Training", "Memory layers", "Evaluation", "Tasks", "Samples", "Configuration"]
    assert (full_run / "config.yaml").read_text() in full_page.text_of["pre"][-1]
    assert "def read_lines(path):" in full_page.text("pre")[0]
    assert full_page.text("article")[1].endswith("temperature 1.0 top-p 0.9 seed 1")


def test_tasks(full_page: Page) -> None:
    rows = {row[0]: row[1:] for row in full_page.rows}
    assert rows["piqa"] == ["length-normalised accuracy", "62.3", "1.1", "50.0", "1,838", "25.0 %"]
    assert rows["sciq"] == ["accuracy", "71.0", "1.4", "25.0", "1,000", NONE]
    assert "Of checkpoint step600." in full_page.text("p")


def test_tasks_side_by_side(full_run: Path, make_run: MakeRun) -> None:
    other, without = make_run("other"), make_run("without", finished=False)
    tasks = json.loads((other / "tasks.json").read_text())
    tasks["results"][0]["value"] = 0.5
    tasks["results"][1]["name"] = "arc_easy"
    (other / "tasks.json").write_text(json.dumps(tasks))
    written = write_report([full_run, other, without], other / "all.html")
    rows = {row[0]: [cell.strip() for cell in row[1:]] for row in Page(written).rows}
    assert rows["piqa"] == ["length-normalised accuracy", "62.3 ± 1.1", "50.0 ± 1.1", NONE]
    assert rows["sciq"] == ["accuracy", "71.0 ± 1.4", NONE, NONE]
    assert rows["arc_easy"] == ["accuracy", NONE, "71.0 ± 1.4", NONE]
    assert written.read_text().count('<td class="best"><data value="0.6234">') == 1
    without_tasks = Page(write_report([without, make_run("bare", finished=False)], other / "none.html"))
    assert "Tasks" not in without_tasks.text("h2")


def test_moe_run_has_its_own_heat_maps(make_run: MakeRun) -> None:
    found = Page(write_report([make_run(system="moe")]))
    assert "Mixture of experts" in found.text("h2")
    assert "Memory layers" not in found.text("h2")
    assert "Load imbalance by block and step" in found.labels
    assert "Memory rows" not in found.tiles


def test_unfinished_run_takes_held_out_figures_from_training(make_run: MakeRun) -> None:
    path = make_run(system="dense", finished=False)
    found = Page(write_report([path]))
    last = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])["metrics"]
    assert found.tiles["Held-out bits per byte"][0] == last["eval/heldout/bits per byte"]
    assert found.tiles["Held-out loss"][0] == last["eval/heldout/CE loss"]
    assert not {"Evaluation", "Tasks", "Samples"} & set(found.text("h2"))


def test_run_with_a_single_metric(make_run: MakeRun) -> None:
    path = make_run(lines=LOSS_ONLY, finished=False)
    found = Page(write_report([path]))
    assert found.labels == ["Loss by step"]
    assert found.tiles["Training loss"] == (8.5, "8.500")
    assert "Held-out loss" not in found.tiles


def test_nothing_is_fetched(full_run: Path, make_run: MakeRun) -> None:
    other = make_run("other", lines=LOSS_ONLY)
    for written in (full_run / "report.html", write_report([full_run, other], other / "both.html")):
        html = written.read_text()
        assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in Page(written).references)
        assert set(re.findall(r"https?://[^\s\"'<]*", html)) <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
        }
        assert not re.search(r"<script|@import|url\((?!#)", html)


def test_text_from_files_is_escaped(make_run: MakeRun) -> None:
    attack = "<script>alert('$x_1$ & \"y\"')</script>"
    metrics = {"train/CE loss": 3.0, f"memory/layer 00/{attack}": 1.0, f"{attack.replace('/', '')}/layer 00/x": 1.0}
    path = make_run(lines=[{"step": 1, "time": 0, "metrics": metrics}])
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps({**summary, "system": attack, "git": attack, "device": attack}))
    (path / "config.yaml").write_text(f"model: {json.dumps(attack)}\n")
    (path / "samples.json").write_text(json.dumps([{"prompt": attack, "text": attack + attack, "seed": 1}]))
    evaluation = json.loads((path / "evaluation.json").read_text())
    (path / "evaluation.json").write_text(json.dumps({**evaluation, "checkpoint": attack}))
    other = make_run("<b>other", lines=LOSS_ONLY)
    for written in (write_report([path]), write_report([path, other], path / "both.html")):
        found = Page(written)
        assert "script" not in found.text_of
        assert "b" not in found.text_of or "other" not in found.text("b")
        assert any(attack in text for text in found.text("main"))


def test_bytes_that_are_not_known(make_run: MakeRun) -> None:
    path = make_run()
    evaluation = json.loads((path / "evaluation.json").read_text())
    unknown = {**evaluation, "bits_per_byte": None, "unigram_bits_per_byte": None}
    (path / "evaluation.json").write_text(json.dumps(unknown))
    tiles = Page(write_report([path])).tiles
    assert "Held-out bits per byte" not in tiles
    assert tiles["Held-out loss"][0] == evaluation["loss"]


def test_torn_lines_are_reported(make_run: MakeRun) -> None:
    path = make_run(lines=LOSS_ONLY)
    content = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text("{torn\n" + content + '{"step": 601, "tim')
    assert "1 unreadable line of metrics.jsonl left out." in Page(write_report([path])).text("p")


def test_comparison_table_and_differences(make_run: MakeRun) -> None:
    runs = [make_run("memory"), make_run("moe", "moe", 1), make_run("dense", "dense", 2, finished=False)]
    found = Page(write_report(runs, runs[0].parent / "both.html"))
    table = {row[0]: row[1:] for row in found.rows}
    assert table["memory"][:3] == ["ultramem_v2", "1.097", "2.432"]
    assert table["memory"][-6:] == ["227 M", "189 M", "1.18 B", "1.14 B", "455 MFLOP", "4.52 MB"]
    assert table["moe"][0] == "moe"
    last = json.loads((runs[2] / "metrics.jsonl").read_text().splitlines()[-1])["metrics"]
    assert table["dense"][1] == f"{last['eval/heldout/bits per byte']:.3f}"
    assert table["model.memory.kind"] == ["ultramem_v2", "moe", "dense"]
    assert table["trainer.steps"] == ["600", "601", "602"]
    assert "optimizer.lr" not in table
    assert 'class="best"><data value="1.0967">' in (runs[0].parent / "both.html").read_text()


def test_comparison_is_by_tokens_only_if_all_runs_count_them(make_run: MakeRun) -> None:
    runs = [make_run("one"), make_run("two", seed=1)]
    output = runs[0].parent / "both.html"
    assert "Training loss by tokens" in Page(write_report(runs, output)).labels
    uncounted = make_run("three", lines=LOSS_ONLY, finished=False)
    found = Page(write_report([*runs, uncounted], output))
    assert "Training loss by step" in found.labels
    unmeasured = next(row for row in found.rows if row[0] == "three")[2:4]
    assert unmeasured == ["\N{EN DASH}", "\N{EN DASH}"]


def test_comparison_of_runs_without_held_out_results(make_run: MakeRun) -> None:
    runs = [make_run(name, lines=LOSS_ONLY, finished=False) for name in ("one", "two")]
    found = Page(write_report(runs, runs[0].parent / "both.html"))
    row = next(row for row in found.rows if row[0] == "one")
    assert row[2:5] == ["\N{EN DASH}", "\N{EN DASH}", "8.500"]


def test_tokens_between_reports_are_interpolated(make_run: MakeRun) -> None:
    lines = [
        {"step": step, "time": 0, "metrics": {"loss": 10.0 - step} | ({"train/tokens": 100 * step} if step % 2 else {})}
        for step in range(1, 6)
    ]
    run = Run.read(make_run(lines=lines))
    by_tokens = page._by_tokens(run, run.series("loss"))
    assert by_tokens.steps.tolist() == [100, 200, 300, 400, 500]
    assert by_tokens.values.tolist() == [9, 8, 7, 6, 5]


def test_runs_of_one_name_are_told_apart_by_path(make_run: MakeRun) -> None:
    runs = [make_run(name, lines=LOSS_ONLY) for name in ("a/run", "b/run")]
    rows = Page(write_report(runs, runs[0] / "both.html")).rows
    assert {str(run) for run in runs} <= {row[0] for row in rows if row}


def test_a_run_named_twice_is_one_run(make_run: MakeRun) -> None:
    path = make_run(lines=LOSS_ONLY)
    assert write_report([path, path / ".." / path.name]) == path / "report.html"


def test_several_runs_need_an_output(make_run: MakeRun) -> None:
    with pytest.raises(UltraMemError, match="--output"):
        write_report([make_run("one", lines=LOSS_ONLY), make_run("two", lines=LOSS_ONLY)])
    with pytest.raises(UltraMemError, match="at least one"):
        write_report([])


def test_unwritable_output_leaves_nothing(make_run: MakeRun) -> None:
    path = make_run(lines=LOSS_ONLY)
    before = set(path.iterdir())
    for output in (path / "absent" / "report.html", path / "config.yaml" / "report.html", path):
        with pytest.raises(UltraMemError, match=r"cannot be written \(.*\); choose another place"):
            write_report([path], output)
    assert set(path.iterdir()) == before
    assert set(path.parent.iterdir()) == {path}


def test_a_failed_write_keeps_the_earlier_report(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_run(lines=LOSS_ONLY)
    write_report([path])
    earlier = (path / "report.html").read_text()

    def full_disk(target: Path, text: str, encoding: str) -> int:
        target.write_bytes(text.encode(encoding)[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(UltraMemError, match="No space left on device"):
        write_report([path])
    assert (path / "report.html").read_text() == earlier
    assert not [file for file in path.iterdir() if file.name.startswith(".")]


def test_a_page_of_someone_else_is_kept(make_run: MakeRun) -> None:
    path = make_run(lines=LOSS_ONLY)
    (path / "page.html").write_text("<title>thesis</title>")
    with pytest.raises(UltraMemError, match=r"page\.html is a file that ultramem did not write; choose another name"):
        write_report([path], path / "page.html")
    assert (path / "page.html").read_text() == "<title>thesis</title>"


def test_a_run_that_does_not_exist(tmp_path: Path) -> None:
    for output in (None, tmp_path / "report.html"):
        with pytest.raises(UltraMemError, match=r"/typo does not exist; give the trainer.directory"):
            write_report([tmp_path / "typo"], output)


def test_broken_yaml_is_named_in_a_comparison(make_run: MakeRun) -> None:
    runs = [make_run("one", lines=LOSS_ONLY), make_run("two", lines=LOSS_ONLY)]
    (runs[1] / "config.yaml").write_text("a: [1,\n")
    with pytest.raises(UltraMemError, match=re.escape(str(runs[1] / "config.yaml"))):
        write_report(runs, runs[0] / "both.html")


def test_command(make_run: MakeRun) -> None:
    runs = [make_run("one", lines=LOSS_ONLY), make_run("two", lines=LOSS_ONLY)]
    result = CliRunner().invoke(app, ["report", str(runs[0])])
    assert result.exit_code == 0
    assert str(runs[0] / "report.html") in result.output
    output = runs[0].parent / "both.html"
    result = CliRunner().invoke(app, ["report", *map(str, runs), "--output", str(output)])
    assert result.exit_code == 0
    assert "2 training runs" in Page(output).text("h1")
