"""Reading run configurations: presets, replaced values, defaults, and what is said about mistakes."""

import dataclasses

import pytest
import yaml

from ultramem import MemoryConfig
from ultramem.errors import ConfigError, UltraMemError
from ultramem.hosts.olmo_core import PRESETS
from ultramem.runs.config import (
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainerConfig,
    WandbConfig,
)
from ultramem.runs.config_files import as_begun, load_config

SECTIONS = (RunConfig, DataConfig, TrainerConfig, OptimizerConfig, ScheduleConfig, LoggingConfig, WandbConfig)
CONTENT = {
    "model": {"d_model": 32, "num_blocks": 2, "num_heads": 2, "feed_forward_size": 64},
    "data": {"sequence_length": 16},
    "trainer": {"batch_size": 64, "steps": 10},
}


@pytest.fixture
def write(tmp_path, token_directory):
    """Writes a configuration file with sections replaced, and returns its path."""

    def write(**sections):
        content = {
            name: CONTENT.get(name, {}) | section
            for name, section in ({name: {} for name in CONTENT} | sections).items()
        }
        content["data"].setdefault("directory", str(token_directory))
        content["trainer"].setdefault("directory", str(tmp_path / "run"))
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_written_out_and_read_back(write, tmp_path):
    config = load_config(
        write(
            model={"memory": {"kind": "ultramem", "insertion": "0:1"}},
            optimizer={"learning_rate": 1e-5, "max_grad_norm": None},
            logging={"wandb": {"project": "p"}},
        )
    )
    config.save(tmp_path / "copy.yaml")
    assert load_config(tmp_path / "copy.yaml") == config
    assert not list(tmp_path.glob("*.partial"))


def test_values_are_replaced(write):
    config = load_config(
        write(),
        [
            "--optimizer.learning_rate=3e-4",
            "--model.memory.top_k=16",
            "--optimizer.betas=[0.8, 0.9]",
            "trainer.tokens=1e4",
            "--trainer.steps=null",
            "--logging.wandb.project=there",
            "--trainer.evaluate_interval=null",
        ],
    )
    assert config.optimizer.learning_rate == 3e-4
    assert config.model.memory == MemoryConfig(top_k=16)
    assert config.optimizer.betas == (0.8, 0.9)
    assert (config.trainer.steps, config.trainer.tokens) == (157, None)  # 10000 / 64, rounded up
    assert config.logging.wandb == WandbConfig("there")
    assert config.trainer.evaluate_interval is None


def test_vocabulary_is_the_datas_unless_given(write):
    assert load_config(write()).model.vocab_size == 128  # of 100 tokens
    assert load_config(write(), ["--model.vocab_size=100"]).model.vocab_size == 100
    assert load_config(write(model={"preset": "dense_227m"})).model.vocab_size == 128


def test_an_own_file_in_the_run_directory_is_no_run(write):
    """Only what version 0.1 wrote itself, with all fields, means AdamW."""
    own = load_config(write(model={"preset": "ultramem_v2_small", "memory": {"top_k": 8}}))
    own.trainer.directory.mkdir(exist_ok=True)
    stored = own.trainer.directory / "config.yaml"
    stored.write_text("model: {preset: ultramem_v2_small, memory: {top_k: 8}}")
    assert as_begun(own) == own
    stored.write_text("model: [")
    assert as_begun(own) == own
    own.save(stored)
    content = yaml.safe_load(stored.read_text())
    for name in ("optimizer", "row_beta", "table_dtype"):
        del content["model"]["memory"][name]
    content["model"]["memory"]["value_lr"] = None
    stored.write_text(yaml.safe_dump(content))
    memory = as_begun(own).model.memory
    assert (memory.optimizer, memory.value_lr) == ("adamw", None)


def test_another_optimizer_than_the_presets(write):
    """The preset's rate is for its own."""
    section = {"preset": "ultramem_v2_medium", "memory": {"optimizer": "adamw"}}
    assert load_config(write(model=section)).model.memory.value_lr is None
    section["memory"]["value_lr"] = 1e-3
    assert load_config(write(model=section)).model.memory.value_lr == 1e-3


def test_another_kind_than_the_presets(write):
    """What the other kind prescribes is chosen anew, and what it has no use for is left out."""
    section = {"preset": "ultramem_v2_227m", "memory": {"kind": "memory_plus", "value_dim": 768}}
    memory, preset = load_config(write(model=section)).model.memory, PRESETS["ultramem_v2_227m"].memory
    assert (memory.kind, memory.pre_value_dim, memory.share_ratio, memory.value_lr) == ("memory_plus", 0, 1.0, 5e-3)
    assert (memory.num_keys, memory.key_dim, memory.top_k) == (preset.num_keys, preset.key_dim, preset.top_k)


def test_preset_with_changes(write):
    config = load_config(
        write(model={"preset": "ultramem_v2_227m", "num_blocks": 3, "memory": {"top_k": 8}, "num_heads": 4}),
        ["--model.feed_forward_size=99", "--model.d_model=768"],
    )
    preset = PRESETS["ultramem_v2_227m"]
    assert config.model == dataclasses.replace(
        preset,
        num_blocks=3,
        num_heads=4,
        feed_forward_size=99,
        vocab_size=128,
        memory=dataclasses.replace(preset.memory, top_k=8),
    )
    plain = load_config(write(model={"preset": "ultramem_v2_227m", "memory": None}), ["--model.d_model=768"])
    assert plain.model.memory is None


def test_another_kind_of_memory_takes_its_own_defaults(write):
    config = load_config(
        write(model={"preset": "ultramem_v2_227m", "memory": {"kind": "ultramem", "share_ratio": 1.0}})
    )
    assert config.model.memory == dataclasses.replace(
        MemoryConfig(kind="ultramem"), num_keys=360, key_dim=192, value_dim=192, pre_value_dim=192, top_k=32
    )


def test_relative_paths_start_at_the_working_directory(write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_config(write(), ["--trainer.directory=runs/a"]).trainer.directory == tmp_path / "runs" / "a"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--optimizer.learning_rat=1",
            "optimizer.learning_rat: unknown key; did you mean optimizer.learning_rate?",
        ),
        ("--learning_rate=1", "learning_rate: unknown key; did you mean optimizer.learning_rate?"),
        ("--model.memory.topk=1", "model.memory.topk: unknown key; did you mean model.memory.top_k?"),
        ("--trainer.seed.x=1", "trainer.seed={'x': 1}: must be a whole number"),
        ("--optimizer.learning_rate=fast", "optimizer.learning_rate='fast': must be a number"),
        ("--optimizer.learning_rate=true", "optimizer.learning_rate=True: must be a number"),
        ("--optimizer.learning_rate=0", "optimizer.learning_rate=0.0: must be above 0"),
        ("--optimizer.learning_rate=.nan", "optimizer.learning_rate=nan: must be a finite number"),
        ("--optimizer.betas=[0.9]", "optimizer.betas=[0.9]: must be a list of 2 values"),
        ("--optimizer.betas=0.9", "optimizer.betas=0.9: must be a list, such as [a, b]"),
        ("--optimizer.betas=[0.9, x]", "optimizer.betas[1]='x': must be a number"),
        ("--optimizer.betas=[0.9, 1]", "optimizer.betas=[0.9, 1.0]: must be two numbers from 0 to below 1"),
        ("--optimizer.eps=0", "optimizer.eps=0.0: must be above 0"),
        ("--optimizer.eps=.inf", "optimizer.eps=inf: must be a finite number"),
        ("--optimizer.eps=-0.0", "optimizer.eps=-0.0: must be above 0"),
        ("--optimizer.eps=1e308", "optimizer.eps=1e+308: must be above 0 and at most 1"),
        ("--optimizer.eps=5e-324", "optimizer.eps=5e-324: must be 0 or from 1e-30 to 1e+30 in size, for float32"),
        ("--optimizer.max_grad_norm=1e200", "optimizer.max_grad_norm=1e+200: must be 0 or from 1e-30"),
        ("--optimizer.weight_decay=1e30", "optimizer.weight_decay=1e+30: must be at least 0 and at most 100"),
        ("--trainer.steps=true", "trainer.steps=True: must be a whole number"),
        ("--trainer.steps=1e200", "trainer.steps=1e+200: must be a whole number"),
        ("--trainer.steps=4294967296", "trainer.steps=4294967296: must be at least 1 and at most 2147483647"),
        (
            "--trainer.steps=18446744073709551616",
            "--trainer.steps, line 1: not valid YAML: a whole number has at most 64",
        ),
        (
            f"--trainer.steps={'9' * 5000}",
            "--trainer.steps, line 1: not valid YAML: a whole number has at most 64 bits",
        ),
        ("--model.num_blocks=1e9", "model.num_blocks=1000000000: must be at least 1 and at most 4096"),
        ("--optimizer.weight_decay=-1", "optimizer.weight_decay=-1.0: must be at least 0"),
        ("--optimizer.value_weight_decay=-1", "optimizer.value_weight_decay=-1.0: must be at least 0"),
        ("--optimizer.max_grad_norm=0", "optimizer.max_grad_norm=0.0: must be above 0"),
        ("--optimizer=5", "optimizer=5: must be a section of keys and values"),
        ("--schedule.kind=step", "schedule.kind='step': must be one of cosine, linear, wsd, constant"),
        ("--schedule.warmup_steps=-1", "schedule.warmup_steps=-1: must be at least 0"),
        ("--schedule.warmup_steps=11", "schedule.warmup_steps=11: must be at most trainer.steps=10"),
        ("--schedule.warmup_share=2", "schedule.warmup_share=2.0: must be at least 0 and at most 1"),
        ("--schedule.decay_share=2", "schedule.decay_share=2.0: must be at least 0 and at most 1"),
        ("--schedule.final_share=1", "schedule.final_share=1.0: must be at least 0 and below 1"),
        (
            "--trainer.batch_size=100",
            "trainer.batch_size=100: must be a multiple of data.sequence_length=16, such as 96",
        ),
        ("--trainer.micro_batch_size=8", "trainer.micro_batch_size=8: must be a multiple of data.sequence_length=16"),
        ("--trainer.batch_size=null", "trainer.batch_size=None: must be a whole number"),
        ("--trainer.tokens=100", "trainer.tokens=100: steps=10 sets the length already; leave out one of them"),
        ("--trainer.steps=null", "trainer.steps is missing; give either steps or tokens"),
        ("--trainer.steps=0", "trainer.steps=0: must be at least 1"),
        ("--trainer.tokens=0", "trainer.tokens=0: must be at least 1"),
        ("--trainer.steps=1.5", "trainer.steps=1.5: must be a whole number"),
        ("--trainer.checkpoint_interval=0", "trainer.checkpoint_interval=0: must be at least 1"),
        ("--trainer.keep_checkpoints=0", "trainer.keep_checkpoints=0: must be at least 1"),
        ("--trainer.metrics_interval=0", "trainer.metrics_interval=0: must be at least 1"),
        ("--trainer.memory_metrics_interval=0", "trainer.memory_metrics_interval=0: must be at least 1"),
        ("--trainer.evaluate_interval=0", "trainer.evaluate_interval=0: must be at least 1"),
        ("--trainer.evaluate_tokens=0", "trainer.evaluate_tokens=0: must be at least 1"),
        ("--trainer.evaluate_tasks=piqa", "trainer.evaluate_tasks='piqa': must be a list, such as [a, b]"),
        ("--trainer.evaluate_tasks=[3]", "trainer.evaluate_tasks[0]=3: must be text"),
        ("--trainer.evaluate_tasks_interval=0", "trainer.evaluate_tasks_interval=0: must be at least 1"),
        ("--trainer.evaluate_tasks_questions=0", "trainer.evaluate_tasks_questions=0: must be at least 1"),
        ("--trainer.seed=-1", "trainer.seed=-1: must be at least 0 and below 4294967296"),
        ("--trainer.precision=half", "trainer.precision='half': must be one of auto, float32, bfloat16"),
        ("--trainer.device=tpu", "trainer.device='tpu': must be one of auto, cpu, cuda"),
        ("--trainer.parallel=tp", "trainer.parallel='tp': must be one of auto, none, ddp, fsdp"),
        ("--trainer.compile=1", "trainer.compile=1: must be true or false"),
        ("--trainer.cuda_graphs=1", "trainer.cuda_graphs=1: must be true or false"),
        ("--trainer.async_checkpoints=1", "trainer.async_checkpoints=1: must be true or false"),
        ("--trainer.deterministic=1", "trainer.deterministic=1: must be true or false"),
        ("--trainer.activation_checkpointing=no", "trainer.activation_checkpointing='no': must be true or false"),
        ("--trainer.directory=3", "trainer.directory=3: must be a path"),
        ("--trainer.initial_weights=3", "trainer.initial_weights=3: must be a path"),
        ("--logging.tensorboard=2", "logging.tensorboard=2: must be true or false"),
        ("--logging.wandb.entity=me", "logging.wandb.project is missing; set it"),
        ("--logging.wandb.project=3", "logging.wandb.project=3: must be text"),
        ("--data.sequence_length=1", "data.sequence_length=1: must be at least 2"),
        ("--data.vocab_size=9", "data.vocab_size: directory="),
        ("--data.eos_token_id=9", "data.eos_token_id: directory="),
        ("--data.dtype=uint16", "data.dtype: directory="),
        ("--data.dtype=int8", "data.dtype='int8': must be one of uint16, uint32"),
        ("--data.train_files=[a.npy]", "data.train_files: directory="),
        ("--data.heldout_files=[a.npy]", "data.heldout_files: directory="),
        ("--data.verify=1", "data.verify=1: must be true or false"),
        ("--data.more_directories=3", "data.more_directories=3: must be"),
        (
            "--data.directory=null",
            "data.directory is missing; give a directory written by `ultramem tokenize`, or train_files",
        ),
        ("--model.num_heads=3", "model.num_heads=3: must divide d_model=32"),
        ("--model.memory.top_k=0", "model.memory.top_k=0: must be"),
        ("--model.memory.insertion=1:2", "model.memory.insertion='1:2': block 2 does not exist"),
        ("--model.preset=ultramem", "model.preset='ultramem': unknown preset; did you mean"),
        ("--trainer", "--trainer: is not an option; to replace a value write --KEY=VALUE"),
        ("--trainer.steps=[1", "--trainer.steps, line 1: not valid YAML"),
    ],
)
def test_mistakes(write, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(), [override])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_every_field_has_a_mistake():
    overrides = next(mark.args[1] for mark in test_mistakes.pytestmark)
    tried = {override.removeprefix("--").partition("=")[0].rpartition(".")[2] for override, _ in overrides}
    fields = {field.name for section in SECTIONS for field in dataclasses.fields(section)}
    assert fields - tried <= {"model", "data", "schedule", "logging", "wandb", "entity"}


@pytest.mark.parametrize("missing", ["model", "data", "trainer"])
def test_missing_section(write, missing):
    path = write()
    content = yaml.safe_load(path.read_text())
    del content[missing]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=f"^{missing}.* is missing"):
        load_config(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read \(No such file or directory\); check the path"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="must have sections"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "binary.yaml")


def test_missing_data(write, tmp_path):
    with pytest.raises(UltraMemError, match=r"nowhere does not exist; write it with `ultramem tokenize"):
        load_config(write(data={"directory": str(tmp_path / "nowhere")}))
