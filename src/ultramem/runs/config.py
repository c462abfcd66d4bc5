"""The configuration of a training run: a dataclass for each section, which checks its values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ultramem.configuration.decoding import encode
from ultramem.configuration.field_types import check_field, check_range, check_types, field_types, without_none
from ultramem.configuration.yaml_text import dump_yaml
from ultramem.errors import ConfigError
from ultramem.files.whole_files import write_text
from ultramem.hosts.olmo_core import ModelConfig

LARGEST_COUNT = 2**31 - 1  # of steps and of tokens in a batch: their product fits into 64 bits
LARGEST_WEIGHT_DECAY = 100


@dataclass(frozen=True)
class DataConfig:
    """Training and held-out data: a directory written by `ultramem tokenize`, or single token files.

    Relative paths start at the working directory.

    Attributes:
        directory: directory written by `ultramem tokenize`.
        sequence_length: tokens per training sequence. Documents are joined and cut into sequences.
        more_directories: with `directory`: more such directories to train on, written with the same tokenizer. Their
            held-out data is not used.
        train_files: instead of `directory`: headerless little-endian token files to train on.
        heldout_files: token files to evaluate on, with `train_files`.
        vocab_size: with `train_files`: one more than the largest token id.
        eos_token_id: with `train_files`: the token that ends a document.
        dtype: with `train_files`: `uint16` or `uint32`.
        verify: whether to read every token file once, before training and before an evaluation, and compare it with its
            checksum and with what the run began with. Switch it off where that takes too long, with terabytes.
    """

    directory: Path | None = None
    sequence_length: int = 1024
    more_directories: tuple[Path, ...] = ()
    train_files: tuple[Path, ...] = ()
    heldout_files: tuple[Path, ...] = ()
    vocab_size: int | None = None
    eos_token_id: int | None = None
    dtype: Literal["uint16", "uint32"] | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        _make_absolute(self, "directory", "more_directories", "train_files", "heldout_files")
        check_range(self, "sequence_length", least=2, most=LARGEST_COUNT)
        check_range(self, "vocab_size", least=1, most=2**32)
        check_range(self, "eos_token_id", least=0, below=2**32)
        for_files = {name: getattr(self, name) for name in ("vocab_size", "eos_token_id", "dtype")}
        if self.directory is not None:
            given = [name for name, value in for_files.items() if value is not None]
            given += [name for name in ("train_files", "heldout_files") if getattr(self, name)]
            if given:
                raise ConfigError(f"{given[0]}: directory={self.directory} sets it already; leave out one of them")
        elif not self.train_files:
            raise ConfigError("directory is missing; give a directory written by `ultramem tokenize`, or train_files")
        elif self.more_directories:
            raise ConfigError("more_directories: needs directory; list all token files in train_files instead")
        else:
            for name, value in for_files.items():
                if value is None:
                    raise ConfigError(f"{name} is missing; token files without a directory need it")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101). The learning rate of memory tables is set in `model.memory`.

    Attributes:
        learning_rate: peak learning rate.
        betas: decay rates of the two moments.
        eps: term added to the denominator.
        weight_decay: weight decay of all parameters.
        value_weight_decay: weight decay of the values and pre-values of memory tables; by default `weight_decay`.
        max_grad_norm: maximum gradient norm, to which larger gradients are clipped; null for no clipping.
    """

    learning_rate: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    value_weight_decay: float | None = None
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "learning_rate", above=0)
        check_field(self, "betas", all(0 <= beta < 1 for beta in self.betas), "two numbers from 0 to below 1")
        check_range(self, "eps", above=0, most=1)
        check_range(self, "weight_decay", "value_weight_decay", least=0, most=LARGEST_WEIGHT_DECAY)
        check_range(self, "max_grad_norm", above=0)


@dataclass(frozen=True)
class ScheduleConfig:
    """The schedule of the learning rate: a linear warm-up, then `kind`.

    Attributes:
        kind: `cosine`, `linear`, `wsd` (constant, then linear decay over the last `decay_share`) or `constant`.
        warmup_steps: warm-up steps; null for `warmup_share`.
        warmup_share: warm-up as a share of all steps.
        decay_share: decay of `wsd` as a share of all steps.
        final_share: final learning rate as a share of the peak learning rate; not used by `constant`.
    """

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int | None = None
    warmup_share: float = 0.02
    decay_share: float = 0.1
    final_share: float = 0.1

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "warmup_steps", least=0)
        check_range(self, "warmup_share", "decay_share", least=0, most=1)
        check_range(self, "final_share", least=0, below=1)


@dataclass(frozen=True)
class TrainerConfig:
    """Length of training, batch size, device, checkpoints and reports.

    Attributes:
        directory: run directory, created if it does not exist.
        batch_size: tokens per step, over all processes; a multiple of the sequence length.
        steps: number of training steps. Either this or `tokens` is required.
        tokens: number of training tokens, rounded up to whole steps.
        micro_batch_size: tokens that a process handles at a time, to limit memory; by default its whole share of the
            batch. Does not change the result beyond rounding.
        precision: `float32`; `bfloat16` for autocast to bfloat16; `auto` for `bfloat16` on GPUs with hardware support
            for it, else `float32`.
        device: `cpu`, `cuda`, or `auto` for CUDA if available.
        parallel: for several processes (torchrun): `fsdp` (FSDP2, parameters are sharded) or `ddp` (each process has
            all parameters). `auto` is `fsdp` for several processes and `none` for one.
        compile: whether to compile the model; CUDA only. By default it is compiled there, which takes a minute or two.
        cuda_graphs: whether to capture the passes of a step as CUDA graphs after a few steps, where a single process
            trains on a GPU, so that it does not wait for the CPU to launch kernels.
        deterministic: whether to use deterministic algorithms, so that the same run on the same kind of machine gives
            the same bits. Slower on a GPU; on a CPU it also needs OMP_NUM_THREADS=1.
        activation_checkpointing: whether to recompute the blocks' activations in the backward pass instead of storing
            them.
        checkpoint_interval: steps between checkpoints; there is always one at the end.
        keep_checkpoints: number of checkpoints to keep, besides the last one of a run; null for all.
        async_checkpoints: whether to go on training while a checkpoint is written. Takes a copy of parameters and
            optimizer state in the CPU's memory meanwhile.
        metrics_interval: steps between progress reports. Metrics of every step are written.
        memory_metrics_interval: steps between reports of what each memory layer or mixture of experts reads.
        evaluate_interval: steps between evaluations on held-out data; null for none.
        evaluate_tokens: held-out tokens per evaluation, spread evenly over the files.
        evaluate_tasks: tasks to evaluate on, as in `ultramem evaluate --tasks`, such as `[table3, memory]`. Needs a
            tokenizer.
        evaluate_tasks_interval: steps between evaluations on tasks; null for the end of training only.
        evaluate_tasks_questions: maximum number of questions per task, or per part of a memory task; null for all.
        seed: seed for the order of the data and dropout. `model.seed` is that for the initial weights.
        initial_weights: transformers directory, such as `ultramem export` writes, with weights to start from. The model
            section may then be left out, or replace some of that model's values.
    """

    directory: Path
    batch_size: int
    steps: int | None = None
    tokens: int | None = None
    micro_batch_size: int | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    compile: bool | None = None
    cuda_graphs: bool = True
    deterministic: bool = False
    activation_checkpointing: bool = False
    checkpoint_interval: int = 1000
    keep_checkpoints: int | None = 2
    async_checkpoints: bool = False
    metrics_interval: int = 10
    memory_metrics_interval: int = 100
    evaluate_interval: int | None = 1000
    evaluate_tokens: int = 2**20
    evaluate_tasks: tuple[str, ...] = ()
    evaluate_tasks_interval: int | None = None
    evaluate_tasks_questions: int | None = None
    seed: int = 0
    initial_weights: Path | None = None

    def __post_init__(self) -> None:
        check_types(self)
        _make_absolute(self, "directory", "initial_weights")
        check_field(self, "directory", self.directory.name not in ("", ".."), "a directory with a name of its own")
        counts = {name for name, hint in field_types(TrainerConfig).items() if without_none(hint)[0] is int}
        check_range(self, *sorted(counts - {"seed", "tokens", "evaluate_tokens"}), least=1, most=LARGEST_COUNT)
        check_range(self, "tokens", "evaluate_tokens", least=1)
        check_range(self, "seed", least=0, below=2**32)
        if (self.steps is None) == (self.tokens is None):
            raise ConfigError(
                "steps is missing; give either steps or tokens"
                if self.steps is None
                else f"tokens={self.tokens}: steps={self.steps} sets the length already; leave out one of them"
            )
        if self.tokens is not None:
            object.__setattr__(self, "steps", -(-self.tokens // self.batch_size))
            object.__setattr__(self, "tokens", None)

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        assert self.steps is not None
        return self.steps


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases project for the metrics.

    Attributes:
        project: name of the project.
        entity: user or team; null for the account's default.
    """

    project: str
    entity: str | None = None

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class LoggingConfig:
    """Where metrics go besides the run directory's `metrics.jsonl`.

    Attributes:
        tensorboard: whether to write TensorBoard event files to `tensorboard/` in the run directory.
        wandb: Weights & Biases, or null. Needs the package `wandb`, and WANDB_API_KEY or WANDB_MODE=offline in the
            environment.
    """

    tensorboard: bool = False
    wandb: WandbConfig | None = None

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a training run. An invalid value raises `ConfigError` on construction.

    Attributes:
        model: the model. In YAML, `preset: NAME` takes the values of a preset, and further keys replace some of them.
            By default `vocab_size` is that of the data, rounded up to a multiple of 128.
        data: training and held-out data.
        trainer: length of training, batch size, device, checkpoints and reports.
        optimizer: AdamW.
        schedule: the learning rate over time.
        logging: other places for metrics.
    """

    model: ModelConfig
    data: DataConfig
    trainer: TrainerConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        check_types(self)
        length, batch, micro_batch = self.data.sequence_length, self.trainer.batch_size, self.trainer.micro_batch_size
        for name, size in (("batch_size", batch), ("micro_batch_size", micro_batch)):
            if size is not None and size % length:
                raise ConfigError(
                    f"trainer.{name}={size}: must be a multiple of data.sequence_length={length}, such as "
                    f"{max(size // length, 1) * length}"
                )
        warmup, steps = self.schedule.warmup_steps or 0, self.trainer.total_steps
        if warmup > steps:
            raise ConfigError(f"schedule.warmup_steps={warmup}: must be at most trainer.steps={steps}")

    def save(self, path: Path) -> None:
        """Write a YAML file that `load_config` reads, completely or not at all."""
        write_text(path, dump_yaml(encode(self)))


def _make_absolute(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        absolute = tuple(path.absolute() for path in value) if isinstance(value, tuple) else value and value.absolute()
        object.__setattr__(config, name, absolute)
