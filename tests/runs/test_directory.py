"""Whose a run directory is, and what a start removes from it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ultramem.errors import UltraMemError
from ultramem.runs.config import LoggingConfig
from ultramem.runs.contents import DataContents, FileContent, recorded_contents
from ultramem.runs.directory import CHECKPOINT_BYTES, RunDirectory
from ultramem.runs.tokens import open_token_data
from ultramem.training import train


@pytest.fixture
def run(make_config):
    """A run that has just been claimed."""
    directory = RunDirectory(make_config())
    directory.path.mkdir()
    assert directory.claim(overwrite=False) is None
    return directory


def checkpoint(run, step):
    for name in ("train/rank0.pt", "model_and_optim/.metadata", ".metadata.json"):
        path = run.checkpoint(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_finds_the_latest_and_removes_what_is_unfinished(run):
    for step in (5, 10, 20):
        checkpoint(run, step)
    (run.checkpoint(20) / ".metadata.json").unlink()
    (run.path / "step25-tmp" / "train").mkdir(parents=True)
    for name in ("step notes.txt", "step10.txt"):
        (run.path / name).touch()
    assert run.claim(overwrite=False) == 10
    assert sorted(path.name for path in run.path.glob("step*")) == ["step notes.txt", "step10", "step10.txt", "step5"]


def contents(directory):
    """Every file with what it holds, every link, every empty directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
        if not path.is_dir() or path.is_symlink() or not any(path.iterdir())
    }


USERS = [
    "step10-analysis/plot.png",
    "step10.kept/train/rank0.pt",
    "step10_copy/model_and_optim/.metadata",
    "step25-tmp.tar",
    "step010/train/rank0.pt",
    "step5x/notes",
    "step/notes",
    "mystep5/notes",
    "notes.txt",
    ".hidden",
]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_user_keeps_in_a_run_is_never_removed(run, overwrite):
    for name in USERS:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("mine")
    (run.path / "step20-tmp" / "train").mkdir(parents=True)
    (run.path / "step20-tmp" / "train" / "rank0.pt").touch()
    checkpoint(run, 10)
    (run.path / "metrics.jsonl").touch()
    assert run.claim(overwrite) == (None if overwrite else 10)
    found = contents(run.path)
    assert {name for name, content in found.items() if content == b"mine"} == set(USERS)
    rest = {name.partition("/")[0] for name in found} - {name.partition("/")[0] for name in USERS}
    assert rest == ({"config.yaml"} if overwrite else {"config.yaml", "metrics.jsonl", "step10"})


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "step20/plot.png",
        "step20/train/rank0.pt.bak",
        "step20/train/deep/rank0.pt",
        "step20/analysis/",
        "step20-tmp/notes",
        "step20",
        "step20-tmp",
    ],
)
def test_what_is_in_the_way_of_a_checkpoint_is_said_before(run, name, overwrite):
    checkpoint(run, 10)
    (run.path / name).parent.mkdir(parents=True, exist_ok=True)
    (run.path / name).mkdir() if name.endswith("/") else (run.path / name).touch()
    before = contents(run.path)
    with pytest.raises(
        UltraMemError, match=r"/step20\S* is where a checkpoint goes, and .* is not of one; rename it or"
    ):
        run.claim(overwrite)
    assert contents(run.path) == before


def test_a_link_to_a_checkpoint_elsewhere_is_read_and_never_removed(run, tmp_path):
    checkpoint(run, 10)
    run.checkpoint(10).rename(tmp_path / "archive")
    run.checkpoint(10).symlink_to(tmp_path / "archive")
    assert run.claim(overwrite=False) == 10
    before = contents(tmp_path)
    with pytest.raises(UltraMemError, match=r"/step10 is where a checkpoint goes, and /\S+/step10 is not of one"):
        run.claim(overwrite=True)
    assert contents(tmp_path) == before


def test_what_is_not_in_the_way(run):
    checkpoint(run, 10)
    (run.checkpoint(10) / "plot.png").touch()  # of a complete one
    for name in ("step5", "step31"):  # before the latest, after the last
        (run.path / name).mkdir()
        (run.path / name / "plot.png").touch()
    before = contents(run.path)
    assert run.claim(overwrite=False) == 10
    assert contents(run.path) == before
    with pytest.raises(UltraMemError, match=r"step10/plot.png is not of one"):
        run.claim(overwrite=True)


def test_checking_changes_nothing(run):
    checkpoint(run, 10)
    (run.path / "step20-tmp").mkdir()
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    before = contents(run.path)
    assert run.find_step(overwrite=False) == 10
    assert run.find_step(overwrite=True) is None
    for overwrite in (False, True):
        run.check_room(overwrite)
    assert contents(run.path) == before


def test_torn_line_is_cut(run):
    path, line = run.path / "metrics.jsonl", '{"step": 1, "metrics": {}}\n'
    path.write_text(f'{line}{{"step"')
    run.claim(overwrite=False)
    assert path.read_text() == line
    (run.path / "summary.json").write_text('{"system": "", "parameters": {}}')
    path.write_text("{")
    run.claim(overwrite=False)
    assert path.read_text() == ""


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl"])
def test_files_of_something_else_beside_a_configuration_stay(run, name):
    (run.path / name).write_text('{"title": "thesis"}\n{"torn')
    with pytest.raises(UltraMemError, match=rf"{name} is a file that ultramem did not write; choose another"):
        run.claim(overwrite=False)
    assert (run.path / name).read_text() == '{"title": "thesis"}\n{"torn'


def test_puts_aside_what_is_later(run):
    for step in (5, 10, 20):
        checkpoint(run, step)
    lines = ['{"step": 4}\n', "damaged\n", "[]\n", '{"step": 5}\n', '{"step": 6}\n', '{"step": 4}\n']
    (run.path / "metrics.jsonl").write_text("".join(lines))
    assert run.put_aside(20, "unused") == []
    assert run.put_aside(10, "damaged") == ["step20.damaged"]
    checkpoint(run, 20)
    assert run.put_aside(10, "damaged") == ["step20.damaged2"]
    assert (run.path / "metrics.jsonl").read_text() == "".join(lines)
    assert run.put_aside(5, "unused") == ["step10.unused", "metrics.jsonl.unused"]
    assert (run.path / "metrics.jsonl.unused").read_text() == "".join(lines)
    assert (run.path / "metrics.jsonl").read_text() == "".join(lines[:4] + lines[5:])
    assert (run.latest_step(), run.step_before(5), run.step_of("step5")) == (5, None, 5)


def test_what_may_change(run):
    trainer = replace(
        run.config.trainer, checkpoint_interval=7, async_checkpoints=True, precision="bfloat16", micro_batch_size=16
    )
    changed = replace(run.config, trainer=trainer, logging=LoggingConfig(tensorboard=True))
    assert RunDirectory(changed).claim(overwrite=False) is None
    assert "checkpoint_interval: 7" in (run.path / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("trainer", "steps", 31), ("trainer", "seed", 1), ("model", "d_model", 64), ("optimizer", "eps", 1e-7)],
)
def test_what_may_not(run, section, key, value):
    old = getattr(getattr(run.config, section), key)
    other = replace(run.config, **{section: replace(getattr(run.config, section), **{key: value})})
    written = (run.path / "config.yaml").read_text()
    with pytest.raises(
        UltraMemError, match=rf"holds another run \({section}.{key}={old} there, {value} here\); choose"
    ):
        RunDirectory(other).claim(overwrite=False)
    assert (run.path / "config.yaml").read_text() == written


def test_overwrite_removes_the_run_and_nothing_else(run, make_config):
    checkpoint(run, 5)
    ours = [
        "metrics.jsonl",
        "report.html",
        "data_order/global_indices_dataset_size1_epoch1_seed0_v1.npy",
        "data_order/global_indices_dataset_size1_epoch1_seed0_v1.12.npy.tmp",
        "tensorboard/events.out.tfevents.1.host.2.3",
        "wandb/wandb/run-20260101_000000-abc/files/deep/config.yaml",
        "wandb/wandb/offline-run-20260101_000000-abc/run.wandb",
        "wandb/wandb/debug-internal.log",
        "wandb/run-20260101_000000-abc/logs/debug.log",
        ".ultramem-0123456789abcdef.partial",
    ]
    users = [
        "notes.txt",
        "data_order/mine.npy",
        "tensorboard/plot.png",
        "tensorboard/other/events.out.tfevents.1.host.2.3",
        "wandb/wandb/notes.txt",
        "wandb/settings",
    ]
    for name in (*ours, *users):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).touch()
    (run.path / "wandb" / "wandb" / "latest-run").symlink_to("run-20260101_000000-abc")
    other = RunDirectory(make_config("dense"))
    assert other.claim(overwrite=True) is None
    assert set(contents(run.path)) == {"config.yaml", *users}
    assert other.others() == [
        *sorted(["data_order/mine.npy", "notes.txt"]),
        "tensorboard/other/",
        "tensorboard/plot.png",
        "wandb/settings",
        "wandb/wandb/notes.txt",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "model: {preset: x}",  # a part of a configuration
        "model: {}\ndata: {}\ntrainer: {}\ndeployment: {}",  # of another program
        "- model\n- data\n- trainer",
        "title: thesis",
        "",
    ],
)
def test_a_directory_with_a_configuration_of_something_else_is_not_a_run(run, make_config, text):
    checkpoint(run, 5)
    (run.path / "config.yaml").write_text(text)
    before = contents(run.path)
    with pytest.raises(UltraMemError, match=r"config.yaml that cannot be read .*; choose another directory with \S+$"):
        RunDirectory(make_config("dense")).claim(overwrite=True)
    assert contents(run.path) == before


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl"])
def test_a_configuration_alone_is_not_a_run(run, make_config, name):
    (run.path / name).write_text('{"title": "thesis"}\n')
    before = contents(run.path)
    with pytest.raises(UltraMemError, match=r"holds another run .*; choose another directory with \S+$"):
        RunDirectory(make_config("dense")).claim(overwrite=True)
    assert contents(run.path) == before
    content = {"system": "", "parameters": {}, "step": 1, "metrics": {}}
    (run.path / name).write_text(json.dumps(content) + "\n")
    with pytest.raises(UltraMemError, match=r"holds another run .*, or replace that run with --overwrite$"):
        RunDirectory(make_config("dense")).claim(overwrite=False)
    RunDirectory(make_config("dense")).claim(overwrite=True)
    assert set(contents(run.path)) == {"config.yaml"}


def test_a_configuration_that_says_the_same_stays_with_its_comments(run):
    config = run.path / "config.yaml"
    config.write_text(f"# mine\n{config.read_text()}")
    run.claim(overwrite=False)
    assert config.read_text().startswith("# mine\n")


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "metrics.jsonl"])
def test_a_directory_in_the_place_of_a_file(run, name):
    checkpoint(run, 5)
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).mkdir()
    with pytest.raises(UltraMemError):
        run.check_room(overwrite=False)


def test_a_file_in_the_place_of_a_directory(run):
    (run.path / "tensorboard").touch()
    run.check_room(overwrite=False)
    with pytest.raises(UltraMemError, match=r"tensorboard is where a directory goes; rename it"):
        RunDirectory(replace(run.config, logging=LoggingConfig(tensorboard=True))).check_room(overwrite=False)


def test_too_little_space_for_a_checkpoint(make_config, monkeypatch):
    run = RunDirectory(make_config("dense"))
    run.path.mkdir()
    run.config.save(run.path / "config.yaml")
    needed = 12 * run.statistics.total
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(UltraMemError, match=r"GB free, but a checkpoint of [\d,]+ parameters needs \S+ GB; free some"):
        run.check_room(overwrite=False)
    checkpoint(run, 5)
    (run.checkpoint(5) / "model_and_optim" / ".metadata").write_text("1")
    run.check_room(overwrite=True)  # with what will be removed


def test_files_of_a_checkpoint_weigh_about_what_is_reckoned(make_config):
    config = make_config(steps=1, evaluate_interval=None)
    train(config)
    weight = sum(path.stat().st_size for path in (config.trainer.directory / "step1").rglob("*") if path.is_file())
    assert RunDirectory(config).statistics.total * CHECKPOINT_BYTES <= weight


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_without_a_configuration_are_nobodys(make_config, overwrite):
    directory = RunDirectory(make_config())
    checkpoint(directory, 5)
    with pytest.raises(UltraMemError, match=r"has step5 but no config.yaml, which would tell what run it is"):
        directory.claim(overwrite)
    assert directory.checkpoint(5).is_dir()


def test_unreadable_configuration(run):
    (run.path / "config.yaml").write_text("model: [")
    for overwrite in (False, True):
        with pytest.raises(UltraMemError, match=r"has a config.yaml that cannot be read \(.*line 1.*; choose") as error:
            run.claim(overwrite)
        assert "--overwrite" not in str(error.value)  # it would not help


def test_only_one_process_at_a_time(run):
    second = RunDirectory(run.config)
    with run.locked(), pytest.raises(UltraMemError, match="another process is training in"), second.locked():
        pass
    with run.locked():
        pass


def test_directory_that_cannot_be_made(make_config, tmp_path):
    (tmp_path / "file").touch()
    run = RunDirectory(make_config(directory="file/run"))
    message = r"trainer.directory=.*file/run: cannot be created \(Not a directory\)"
    with pytest.raises(UltraMemError, match=message), run.locked():
        pass


def test_the_end_of_a_text_is_recorded(run):
    data = open_token_data(run.config.data)
    contents = DataContents.of(data, verify=True)
    run.describe(data, contents, torch.device("cpu"), 1)
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["eos_token_id"] == data.eos_token_id == 0
    # Of a run that version 0.1 began, what was known stays.
    del summary["eos_token_id"]
    old = summary | {"started": "long ago"}
    (run.path / "summary.json").write_text(json.dumps(old))
    run.describe(data, contents, torch.device("cpu"), 1)
    assert json.loads((run.path / "summary.json").read_text()) == old | {"eos_token_id": 0}
    del old["data"]
    (run.path / "summary.json").write_text(json.dumps(old))
    run.describe(data, contents, torch.device("cpu"), 1)
    assert recorded_contents(run.path) == contents
    run.describe(replace(data, eos_token_id=3), contents, torch.device("cpu"), 1)
    assert json.loads((run.path / "summary.json").read_text())["eos_token_id"] == 0


def test_other_data_is_refused(run):
    data = open_token_data(run.config.data)
    contents = DataContents.of(data, verify=True)
    run.describe(data, contents, torch.device("cpu"), 1)
    other = replace(contents, train=(FileContent("part-00000.npy", contents.train[0].bytes, "00000000"),))
    run.check_data(data, contents, overwrite=False)
    with pytest.raises(UltraMemError, match=r"train/part-00000.npy has changed since the run began"):
        run.check_data(data, other, overwrite=False)
    run.check_data(data, other, overwrite=True)
    (run.path / "tokenizer.json").write_text("{ }")
    with pytest.raises(UltraMemError, match=r"run/tokenizer.json is not that of the data, .*tokens.*/tokenizer.json"):
        run.check_data(data, contents, overwrite=False)
