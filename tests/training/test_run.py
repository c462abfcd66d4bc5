"""Whole runs of tiny models: what they write, how they go on after every kind of end."""

import contextlib
import errno
import json
import os
import re
import resource
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._inductor.config as inductor
from olmo_core.distributed.checkpoint.filesystem import RemoteFileSystemWriter
from olmo_core.train import Checkpointer
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from tiny_training import at_step
from ultramem.convert.transformers_models import to_transformers
from ultramem.data.token_sequences import TokenSequences
from ultramem.errors import UltraMemError
from ultramem.files import whole_files
from ultramem.hosts.olmo_core import model_statistics
from ultramem.layers.read_counter import ReadCounter
from ultramem.runs.checkpoints import load_model
from ultramem.tables.gradient_accumulator import GradientAccumulator
from ultramem.tables.trainable import TrainableTable
from ultramem.training import LoggingConfig, OptimizerConfig, RunConfig, WandbConfig, load_config, train
from ultramem.training.evaluation import HeldoutCallback
from ultramem.training.metrics import MetricsFile, ProgressReport


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def steps_kept(directory):
    return sorted(int(path.name.removeprefix("step")) for path in directory.glob("step*"))


def assert_same_model(one, other):
    first, second = load_model(one)[0].state_dict(), load_model(other)[0].state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_writes_what_the_report_reads(make_config, metrics_of, capsys):
    config = make_config()
    result = train(config)
    directory = config.trainer.directory
    assert (result.directory, result.step, result.status) == (directory, 30, "finished")

    assert load_config(directory / "config.yaml") == config
    summary = json.loads((directory / "summary.json").read_text())
    statistics = model_statistics(config.model, 16)
    assert summary["parameters"]["total"] == statistics.total
    assert summary["parameters"]["active_without_embeddings"] == statistics.active_without_embeddings
    assert summary["memory"] == {"table_rows": 2 * 144, "window_rows": 144, "layers": 2}
    assert summary["train_tokens"] == 30 * 128
    assert summary["train_bytes"] == 3 * 30 * 128
    assert summary["world_size"] == 1
    assert (directory / "tokenizer.json").is_file()

    metrics = metrics_of(directory)
    assert list(metrics) == list(range(1, 31))
    assert all(metrics[step]["train/tokens"] == 128 * step for step in metrics)
    assert metrics[1]["train/CE loss"] == pytest.approx(np.log(128), abs=0.5)
    assert metrics[30]["train/CE loss"] < metrics[1]["train/CE loss"]
    names = {"optim/learning rate (model)", "optim/learning rate (values)", "optim/total grad norm", "train/CE loss"}
    assert all(names <= values.keys() for values in metrics.values())
    for step, values in metrics.items():
        reported = {name for name in values if name.startswith("memory/")}
        assert bool(reported) == (step % 5 == 0)
        if reported:
            assert "memory/layer 01/singular value 2" in reported
            assert 0 < values["memory/layer 00/rows read"] <= 1
        assert ("eval/heldout/CE loss" in values) == (step % 15 == 0)
    heldout = {name.rpartition("/")[2]: value for name, value in metrics[30].items() if name.startswith("eval/")}
    assert heldout["perplexity"] == pytest.approx(np.exp(heldout["CE loss"]))
    assert heldout["bits per byte"] == pytest.approx(heldout["CE loss"] / np.log(2) / 3)
    assert any("throughput/tokens per second" in values for values in metrics.values())
    assert not [name for values in metrics.values() for name in values if "LR (group" in name or "device" in name]

    output = capsys.readouterr().out
    assert re.search(r"step 28/30  loss \d\.\d+  [\d,]+ tokens/s  learning rate \d\.\d+e-\d+  0:00:\d\d left", output)
    assert "step 30  held-out: loss" in output


def test_mixture_of_experts_reports_per_block(make_config, metrics_of):
    config = make_config("moe", steps=5)
    train(config)
    metrics = metrics_of(config.trainer.directory)[5]
    for block in ("00", "01"):
        assert 1 <= metrics[f"moe/block {block}/load imbalance"] <= 4
        assert f"moe/block {block}/router Z loss" in metrics
    assert json.loads((config.trainer.directory / "summary.json").read_text())["memory"] is None


def test_heldout_loss_is_the_models(make_config, metrics_of, token_directory):
    config = make_config(steps=5)
    train(config)
    model, _ = load_model(config.trainer.directory)
    tokens = np.fromfile(token_directory / "heldout" / "part-00000.npy", dtype="<u2").astype(np.int64)
    windows = [tokens[start : start + 16] for start in range(0, len(tokens) - 1, 16)]
    chosen = [windows[i * len(windows) // 20] for i in range(20)]
    total, count = 0.0, 0
    with torch.no_grad():
        for window in chosen:
            logits = model(torch.from_numpy(window)[None, :-1])[0].double().log_softmax(-1)
            total -= sum(logits[i, token].item() for i, token in enumerate(window[1:]))
            count += len(window) - 1
    assert metrics_of(config.trainer.directory)[5]["eval/heldout/CE loss"] == pytest.approx(total / count, rel=1e-5)


def test_evaluation_changes_nothing_in_training(make_config, metrics_of):
    often, never = (
        make_config(directory="often", evaluate_interval=2),
        make_config(directory="never", evaluate_interval=None),
    )
    train(often)
    train(never)
    kept = "train/", "optim/", "memory/"
    results = [
        {step: {name: value for name, value in values.items() if name.startswith(kept)} for step, values in run.items()}
        for run in map(metrics_of, (often.trainer.directory, never.trainer.directory))
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("system", "micro_batch_size", "stops"),
    [
        ("ultramem_v2", 32, (13, 23)),  # with dropout; from within an epoch, and from its very end
        ("ultramem", None, (24,)),
        ("moe", 64, (17,)),
    ],
)
def test_killed_run_goes_on_exactly(system, micro_batch_size, stops, make_config, losses_of, in_child, monkeypatch):
    whole = make_config(system, "whole", micro_batch_size=micro_batch_size)
    train(whole)
    broken = make_config(system, "broken", micro_batch_size=micro_batch_size)
    for step in stops:
        with monkeypatch.context() as patch:
            at_step(patch, step, kill)
            assert in_child(lambda: train(broken)) == -signal.SIGKILL
        assert max(steps_kept(broken.trainer.directory)) == step // 10 * 10
    assert train(broken).status == "finished"
    assert losses_of(broken.trainer.directory) == losses_of(whole.trainer.directory)
    assert_same_model(broken.trainer.directory, whole.trainer.directory)


@pytest.mark.parametrize("step", [15, 30])
def test_killed_between_a_checkpoint_and_its_evaluation(step, make_config, metrics_of, in_child, monkeypatch):
    """The curve of held-out losses has all its points, and the step keeps its other metrics."""
    whole, broken = (make_config(directory=name, checkpoint_interval=15) for name in ("whole", "broken"))
    train(whole)
    evaluate = HeldoutCallback.perform_eval
    with monkeypatch.context() as patch:
        patch.setattr(HeldoutCallback, "perform_eval", lambda self: kill() if self.step == step else evaluate(self))
        assert in_child(lambda: train(broken)) == -signal.SIGKILL
    assert max(steps_kept(broken.trainer.directory)) == step
    assert "eval/heldout/CE loss" not in metrics_of(broken.trainer.directory)[step]
    assert train(broken).status == "finished"
    assert train(broken).status == "already finished"
    expected, found = (
        {step: {name: value for name, value in metrics.items() if "throughput" not in name} for step, metrics in run}
        for run in (metrics_of(config.trainer.directory).items() for config in (whole, broken))
    )
    assert found == expected


@pytest.mark.parametrize("moment", ["writing", "naming"])
def test_killed_while_writing_a_checkpoint(moment, make_config, losses_of, in_child, monkeypatch):
    config = make_config()
    owner, name = (RemoteFileSystemWriter, "finish") if moment == "writing" else (Checkpointer, "_save_metadata")
    original, calls = getattr(owner, name), []

    def second_time_lethal(*arguments, **options):
        calls.append(arguments)
        return original(*arguments, **options) if len(calls) == 1 else kill()

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, second_time_lethal)
        assert in_child(lambda: train(config)) == -signal.SIGKILL
    directory = config.trainer.directory
    assert (directory / ("step20-tmp" if moment == "writing" else "step20")).is_dir()
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "tor')
    assert train(config).status == "finished"
    assert steps_kept(directory) == [10, 20, 30]
    whole = make_config(directory="whole")
    train(whole)
    assert losses_of(directory) == losses_of(whole.trainer.directory)


def test_keeps_the_last_checkpoints_also_of_earlier_processes(make_config, monkeypatch):
    config = make_config(checkpoint_interval=4, steps=22, keep_checkpoints=2)
    with monkeypatch.context() as patch:
        at_step(patch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(config).status == "interrupted"
    assert steps_kept(config.trainer.directory) == [4, 8, 10]
    train(config)
    assert steps_kept(config.trainer.directory) == [16, 20, 22]


def test_keeps_all_checkpoints(make_config):
    config = make_config(checkpoint_interval=2, steps=7, keep_checkpoints=None, evaluate_interval=None)
    train(config)
    assert steps_kept(config.trainer.directory) == [2, 4, 6, 7]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_leaves(number, make_config, losses_of, monkeypatch, capsys):
    config = make_config()
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: os.kill(os.getpid(), number))
        result = train(config)
    assert (result.step, result.status) == (7, "interrupted")
    assert number.name in capsys.readouterr().out
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert train(config).status == "finished"
    whole = make_config(directory="whole")
    train(whole)
    assert losses_of(config.trainer.directory) == losses_of(whole.trainer.directory)


def test_second_interrupt_leaves_at_once(make_config, in_child, monkeypatch):
    config = make_config()

    def interrupt_twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    at_step(monkeypatch, 12, interrupt_twice)
    assert in_child(lambda: train(config)) == 128 + signal.SIGINT
    assert steps_kept(config.trainer.directory) == [10]


def test_finished_run_stays_as_it_is(make_config):
    config = make_config(steps=4)
    train(config)
    written = (config.trainer.directory / "metrics.jsonl").read_text()
    assert train(config).status == "already finished"
    assert (config.trainer.directory / "metrics.jsonl").read_text() == written


def test_overwrite_starts_anew(make_config, losses_of):
    first, second = make_config(steps=4), make_config("dense", steps=6)
    train(first)
    with pytest.raises(UltraMemError, match=r"holds another run \(trainer.steps=4 there, 6 here, model.memory"):
        train(second)
    train(second, overwrite=True)
    assert sorted(losses_of(second.trainer.directory)) == [1, 2, 3, 4, 5, 6]
    assert steps_kept(second.trainer.directory) == [6]


def files_in(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fault", ["missing weights", "other weights", "model", "memory", "space", "directory"])
def test_a_run_is_not_cleared_for_one_that_cannot_start(fault, make_config, monkeypatch, tmp_path):
    old = make_config(steps=2, evaluate_interval=None)
    train(old)
    before = files_in(old.trainer.directory)
    new = replace(old, trainer=replace(old.trainer, steps=1))
    if fault == "missing weights":
        new = replace(new, trainer=replace(new.trainer, initial_weights=tmp_path / "nowhere"))
    elif fault == "other weights":
        other = make_config("dense").model
        model = to_transformers(other.build("cpu").state_dict(), other)
        model.save_pretrained(tmp_path / "other")
        new = replace(new, trainer=replace(new.trainer, initial_weights=tmp_path / "other"))
    elif fault == "model":
        monkeypatch.setattr(
            type(new.model), "build", lambda *_, **__: (_ for _ in ()).throw(UltraMemError("too large"))
        )
    elif fault == "memory":
        monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    elif fault == "space":
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
        monkeypatch.setattr("ultramem.runs.directory.CHECKPOINT_BYTES", 100)
    else:
        (old.trainer.directory / "step1").mkdir()
        (old.trainer.directory / "step1" / "notes").touch()
        before = files_in(old.trainer.directory)
    with pytest.raises((UltraMemError, MemoryError)):
        train(new, overwrite=True)
    assert files_in(old.trainer.directory) == before


def test_a_users_directories_stay_even_in_a_finished_run(make_config):
    config = make_config(steps=2, evaluate_interval=None)
    names = [config.trainer.directory / name for name in ("step2-analysis", "step2.damaged", "step7")]
    for path in names:
        (path / "train").mkdir(parents=True)
        (path / "train" / "notes").write_text("mine")
    for _ in range(2):
        train(config)
    train(config, overwrite=False)
    for path in names:
        assert (path / "train" / "notes").read_text() == "mine"


def test_a_directory_in_the_way_stops_the_run_before_its_first_step(make_config, capsys):
    config = make_config()
    notes = config.trainer.directory / "step10" / "notes"
    notes.parent.mkdir(parents=True)
    notes.touch()
    with pytest.raises(UltraMemError, match=r"step10 is where a checkpoint goes, and .*notes is not of one; rename it"):
        train(config)
    assert capsys.readouterr().out == ""
    assert list(config.trainer.directory.rglob("*")) == [notes.parent, notes]


@pytest.mark.parametrize("name", ["step4", "step4-tmp"])
def test_a_directory_that_comes_into_the_way_is_kept(name, make_config, monkeypatch):
    config = make_config(steps=5, checkpoint_interval=2, evaluate_interval=None)
    notes = config.trainer.directory / name / "notes"
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: (notes.parent.mkdir(), notes.touch()))
        with pytest.raises(
            UltraMemError, match=rf"/{name} is in the way of a checkpoint; rename it .*last good .*step2"
        ):
            train(config)
    assert notes.is_file()
    notes.parent.rename(config.trainer.directory / "my notes")
    assert train(config).status == "finished"


def test_what_a_user_keeps_in_a_checkpoint_is_not_removed_with_it(make_config, monkeypatch):
    config = make_config(checkpoint_interval=2, steps=5, keep_checkpoints=1, evaluate_interval=None)
    notes = config.trainer.directory / "step2" / "notes"
    at_step(monkeypatch, 3, lambda: notes.touch())
    train(config)
    assert steps_kept(config.trainer.directory) == [2, 4, 5]
    assert notes.is_file()
    load_model(notes.parent)


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_divergence_stops_and_keeps_the_last_good_checkpoint(what, make_config, monkeypatch, losses_of):
    config = make_config()
    factor = {"of all": 1.0}

    def spoil():
        factor["of all"] = float("nan")

    # Step 20, at the end of which a checkpoint is due, is the first bad one: its loss, or only its gradient.
    at_step(monkeypatch, 20, spoil)
    take, lookup = GradientAccumulator.take, TrainableTable.lookup
    monkeypatch.setattr(
        GradientAccumulator, "take", lambda *arguments: [gradient * factor["of all"] for gradient in take(*arguments)]
    )
    if what == "loss":
        monkeypatch.setattr(TrainableTable, "lookup", lambda *given: lookup(*given) * factor["of all"])
    with pytest.raises(UltraMemError, match=rf"the {what} is nan at step 20; .*last good checkpoint is .*step10"):
        train(config)
    assert steps_kept(config.trainer.directory) == [10]
    assert max(losses_of(config.trainer.directory)) == 19


def test_divergence_before_any_checkpoint(make_config):
    config = make_config("dense", optimizer=OptimizerConfig(learning_rate=1e30, max_grad_norm=None))
    with pytest.raises(UltraMemError, match=r"is (nan|inf) at step \d+; .*; there is no checkpoint yet"):
        train(config)


def test_divergence_at_the_first_step_is_not_the_learning_rates(make_config):
    config = make_config("dense")
    config = replace(config, model=replace(config.model, init_std=1e30))
    with pytest.raises(UltraMemError, match=r"^the .* is nan at step 1, the first: check the weights that it"):
        train(config)


def test_weights_that_are_not_finite_are_named_on_resuming(make_config, monkeypatch):
    config = make_config("dense", steps=20)
    at_step(monkeypatch, 11, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(config)

    def load_spoilt(trainer, checkpoint, model):
        trainer.train_module.model.embeddings.weight.data[3] = float("inf")

    monkeypatch.setattr("ultramem.training.run.load_checkpoint", load_spoilt)
    with pytest.raises(UltraMemError, match=r"step11 has weights that are not finite, in embeddings\.weight: "):
        train(config)


@pytest.mark.parametrize("place", ["tensors", "state"])
def test_full_disk_loses_nothing(place, make_config, monkeypatch, losses_of):
    config = make_config()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        at_step(
            patch,
            11,
            lambda: (
                patch.setattr(RemoteFileSystemWriter, "write_data", full)
                if place == "tensors"
                else patch.setattr(Checkpointer, "_save_train_state", full)
            ),
        )
        with pytest.raises(
            UltraMemError, match=r"step 20 cannot be written .*No space left .*free some space.*last good .*step10"
        ):
            train(config)
    assert steps_kept(config.trainer.directory) == [10]
    load_model(config.trainer.directory)
    assert train(config).status == "finished"
    assert len(losses_of(config.trainer.directory)) == 30


def test_file_size_limit_during_a_checkpoint(make_config, in_child, monkeypatch, capfd):
    config = make_config(checkpoint_interval=3, steps=6)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    with monkeypatch.context() as patch:
        at_step(patch, 4, limit)
        assert in_child(lambda: train(config)) == 1
    assert re.search(
        r"UltraMemError: the checkpoint of step 6 cannot be written to .*; free some space", capfd.readouterr().err
    )
    assert steps_kept(config.trainer.directory) == [3]
    assert train(config).status == "finished"


def test_directory_that_cannot_be_written(make_config, monkeypatch):
    def full(self, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(RunConfig, "save", full)
    with pytest.raises(UltraMemError, match=r"config.yaml cannot be written or read: No space left"):
        train(make_config())


def test_an_error_without_a_file_name(make_config, monkeypatch):
    def full(self, path):
        raise OSError("no room\nat all")

    monkeypatch.setattr(RunConfig, "save", full)
    with pytest.raises(UltraMemError, match=r"^a file cannot be written or read: no room$"):
        train(make_config())


def test_full_disk_while_writing_metrics(make_config, monkeypatch):
    config = make_config()
    original = MetricsFile.log_metrics

    def full(self, step, metrics):
        if step == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        original(self, step, metrics)

    monkeypatch.setattr(MetricsFile, "log_metrics", full)
    with pytest.raises(UltraMemError, match=r"metrics.jsonl cannot be written \(No space left.*last good .*step10"):
        train(config)


def test_file_size_limit_while_writing_metrics(make_config, in_child, monkeypatch, capfd, losses_of):
    sizes = {"steps": 7, "checkpoint_interval": 3, "metrics_interval": 1, "evaluate_interval": None}
    config = make_config(**sizes)
    metrics = config.trainer.directory / "metrics.jsonl"

    def limit():
        size = metrics.stat().st_size + 30  # within a line
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def run():
        with pytest.raises(UltraMemError) as error:  # its traceback would not fit
            train(config)
        print(error.value)

    with monkeypatch.context() as patch:
        at_step(patch, 5, limit)
        assert in_child(run) == 0
    message = capfd.readouterr().out.splitlines()[-1]
    assert re.search(r"^\S+/metrics.jsonl cannot be written \(File too large\); free .*last good .*step3$", message)
    assert not metrics.read_text().endswith("\n")
    assert train(config).status == "finished"
    whole = make_config(directory="whole", **sizes)
    train(whole)
    assert losses_of(config.trainer.directory) == losses_of(whole.trainer.directory)


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "tokenizer.json"])
def test_a_full_disk_at_the_beginning(name, make_config, monkeypatch):
    config = make_config(steps=2, evaluate_interval=None)
    original = whole_files.whole_file

    def full(path):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(whole_files, "whole_file", full)
        with pytest.raises(
            UltraMemError, match=rf"^\S+/run/{name} cannot be written or read: No space left on device$"
        ):
            train(config)
    assert train(config).status == "finished"
    assert (config.trainer.directory / name).is_file()


def test_a_full_disk_while_writing_events(make_config, monkeypatch, capfd):
    config = make_config(steps=7, checkpoint_interval=3, metrics_interval=1, logging=LoggingConfig(tensorboard=True))
    original = RecordWriter.write

    def full(self, content):
        original(self, content)
        if current["step"] == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    current = {"step": 0}
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: current.update(step=5))
        patch.setattr(RecordWriter, "write", full)
        with pytest.raises(
            UltraMemError, match=r"tensorboard/events\S+ cannot be written \(No space left .*; free.*last good .*step3"
        ):
            train(config)
    assert capfd.readouterr().err == ""
    assert train(config).status == "finished"


def test_a_full_disk_behind_the_output(make_config):
    config = make_config(steps=2, metrics_interval=1, evaluate_interval=None)
    with open("/dev/full", "w") as output:  # noqa: PTH123
        console = Console(file=output)
        console.print = lambda *_, **__: None  # at first there is room
        callbacks = []
        original = ProgressReport.pre_train

        def pre_train(self):
            callbacks.append(self)
            del console.print
            original(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ProgressReport, "pre_train", pre_train)
            with pytest.raises(
                UltraMemError, match=r"^standard output cannot be written \(No space left on device\); free"
            ):
                train(config, console=console)
        with contextlib.suppress(OSError):
            output.close()
    assert train(config).status == "finished"


def test_broken_token_file_in_an_evaluation(make_config, monkeypatch):
    def read(self):
        raise UltraMemError("token file x has id 999; give others")

    monkeypatch.setattr(TokenSequences, "__iter__", read)
    with pytest.raises(UltraMemError, match=r"^token file x has id 999; give others; the last good checkpoint is .*"):
        train(make_config())


def test_checkpoint_of_another_model(make_config):
    small, large = make_config(steps=2), make_config(directory="large", steps=2)
    model = replace(large.model, feed_forward_size=64)
    large = replace(large, model=model, trainer=replace(large.trainer, steps=4))
    train(small)
    large.trainer.directory.mkdir()
    (small.trainer.directory / "step2").rename(large.trainer.directory / "step2")
    large.save(large.trainer.directory / "config.yaml")
    with pytest.raises(
        UltraMemError, match=r"does not fit the run's configuration: .*feed_forward.* has the shape \(\d+, \d+\), not"
    ):
        train(large)


def test_changed_data(make_config, token_directory, tmp_path):
    config = make_config(steps=2)
    tokens = tmp_path / "train.npy"
    original = (token_directory / "train" / "part-00000.npy").read_bytes()
    tokens.write_bytes(original)
    data = replace(config.data, directory=None, train_files=(tokens,), vocab_size=100, eos_token_id=0, dtype="uint16")
    config = replace(config, data=data)
    train(config)
    tokens.write_bytes(original[:-64])
    longer = replace(config, trainer=replace(config.trainer, steps=4))
    longer.save(config.trainer.directory / "config.yaml")
    with pytest.raises(
        UltraMemError, match=r"train.npy has changed since the run began; restore it, or start another run"
    ):
        train(longer)


def test_one_gradient_of_a_shared_table(make_config, monkeypatch):
    config = make_config(steps=1, micro_batch_size=64, evaluate_interval=None)
    model = replace(config.model, num_blocks=5)
    gradients = []
    original = GradientAccumulator.take

    def count(*arguments):
        gradients.append(original(*arguments))
        return gradients[-1]

    monkeypatch.setattr(GradientAccumulator, "take", count)
    train(replace(config, model=model))
    # Two backward passes; values and pre-values; five layers.
    assert [[gradient.shape for gradient in taken] for taken in gradients] == [[(5 * 144, 8)] * 2] * 2


@pytest.mark.parametrize("system", ["ultramem_v2", "ultramem", "moe"])  # with dropout; across blocks; with sorting
def test_activation_checkpointing_changes_nothing(system, make_config, losses_of):
    plain = make_config(system, "plain", steps=6)
    checkpointed = make_config(system, "checkpointed", steps=6, activation_checkpointing=True)
    train(plain)
    train(checkpointed)
    assert losses_of(plain.trainer.directory) == losses_of(checkpointed.trainer.directory)


def test_deterministic_while_training(make_config, monkeypatch):
    def settings():
        filled = torch.utils.deterministic.fill_uninitialized_memory
        return torch.get_deterministic_debug_mode(), filled, inductor.deterministic, os.environ.get(name)

    name, seen = "CUBLAS_WORKSPACE_CONFIG", []
    monkeypatch.delenv(name, raising=False)
    at_step(monkeypatch, 1, lambda: seen.append(settings()))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = settings()
        train(make_config(steps=1, deterministic=True))
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [(2, False, True, ":4096:8")]  # 2: an error


@pytest.mark.gpu
@pytest.mark.parametrize("system", ["dense", "moe", "memory_plus", "ultramem", "ultramem_v2"])
def test_deterministic_on_a_gpu(system, make_config, losses_of):
    """With everything that training does, some of it not deterministic otherwise."""
    options = {"steps": 12, "compile": True, "deterministic": True}
    once, again = (make_config(system, directory, **options) for directory in ("once", "again"))
    train(once)
    train(again)
    assert losses_of(once.trainer.directory) == losses_of(again.trainer.directory)
    assert_same_model(once.trainer.directory, again.trainer.directory)


def test_bfloat16_stays_close(make_config, losses_of):
    wide, narrow = (
        make_config(directory="wide", precision="float32"),
        make_config(directory="narrow", precision="bfloat16"),
    )
    train(wide)
    train(narrow)
    losses = [list(losses_of(config.trainer.directory).values()) for config in (wide, narrow)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


def test_memory_plus_trains_its_values_at_a_constant_rate(make_config, metrics_of):
    config = make_config("memory_plus", steps=4)
    train(config)
    metrics = metrics_of(config.trainer.directory)
    assert [values["optim/learning rate (values)"] for values in metrics.values()] == pytest.approx([1e-3] * 4)


def test_tensorboard(make_config, losses_of):
    config = make_config(steps=6, logging=LoggingConfig(tensorboard=True))
    train(config)
    events = EventAccumulator(str(config.trainer.directory / "tensorboard")).Reload()
    written = {event.step: event.value for event in events.Scalars("train/CE loss")}
    assert written == pytest.approx(losses_of(config.trainer.directory))
    assert "memory/layer 00/rows read" in events.Tags()["scalars"]


def test_wandb_missing_or_without_key(make_config, monkeypatch):
    config = make_config(steps=2, logging=LoggingConfig(wandb=WandbConfig("project")))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UltraMemError, match="pip install wandb"):
        train(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "there")
    with pytest.raises(UltraMemError, match="set WANDB_API_KEY, or WANDB_MODE=offline"):
        train(config)
    assert not config.trainer.directory.exists()


def test_wandb_offline(make_config, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = make_config(steps=2, logging=LoggingConfig(wandb=WandbConfig("project")))
    train(config)
    assert list((config.trainer.directory / "wandb").rglob("*.wandb"))


def test_reads_of_every_fourth_token_are_counted(make_config, monkeypatch):
    counted = []
    summarise = ReadCounter.summarise

    def spy(self, scores, output):
        counted.append(len(output))
        summarise(self, scores, output)

    monkeypatch.setattr(ReadCounter, "summarise", spy)
    config = make_config(steps=2, evaluate_interval=1)
    train(config)
    layers = len(config.model.memory.insertions(config.model.num_blocks))
    assert counted == [config.trainer.batch_size // 4] * 2 * layers
