"""Translation of training flags of the published UltraMem code to our run configuration."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import shlex
from collections.abc import Callable
from typing import Any

from ultramem.configuration.decoding import decode
from ultramem.configuration.overrides import set_key
from ultramem.configuration.yaml_text import dump_yaml, parse_yaml
from ultramem.convert.published_checkpoint import FIXED_KEYS, MEMORY_KEYS, MODEL_KEYS, PublishedModel
from ultramem.errors import ConfigError, UltraMemError
from ultramem.runs.config import LARGEST_COUNT, RunConfig

# Values that missing flags have in the configuration file of all published commands. Its block_type is moe, though,
# which the commands for models with memory replace.
ASSUMED = {
    "model.d_model": "2048",
    "model.n_layers": "16",
    "model.n_heads": "16",
    "model.mlp_ratio": "1",
    "model.weight_tying": "false",
    "model.block_type": "sequential",
    "model.max_sequence_length": "4096",
    "global_train_batch_size": "1024",
}
_MODEL_OPTIONS = [field.name for field in dataclasses.fields(PublishedModel)]
_VALUE_LR_FLAGS = {
    "optimizer.mem_value_lr_times": "model.memory.value_lr_multiplier",
    "optimizer.mem_value_lr_max_steps_rate": "model.memory.value_lr_decay",
}


def translate_flags(flags: str) -> str:
    """Translate a training command line of the published code.

    Flags are written as `--model.mem_knn=32`, `--model.mem_knn 32`, `--mem_knn=32` or `mem_knn=32`. Missing ones have
    the published defaults, or the values in the configuration file of the published commands, which a comment lists.
    Further comments have the command before the flags, and the flags without an equivalent here.

    Args:
        flags: the command line or its flags, quoted as for a shell.

    Returns:
        YAML that `load_config` reads once `data.directory` is filled in, and `trainer.steps` if the flags do not give
        the length of training.

    Raises:
        UltraMemError: a word is not a flag, or a value is invalid.
    """
    command, given = _split(flags)
    draft = _Draft(given)
    published = draft.published_model()
    _translate_model(draft, published)
    _translate_lengths(draft)
    _translate_schedule(draft)
    _translate_alike(draft)
    _translate_memory(draft, published)
    draft.check()
    return draft.text(command)


def _split(flags: str) -> tuple[str, dict[str, str]]:
    """Split into the command before the flags, and the flags' full names and values."""
    try:
        words = shlex.split(re.sub(r"\\\r?\n", " ", flags))
    except ValueError as error:
        raise UltraMemError(f"flags: {error}; quote them as for a shell") from error
    scripts = [i for i, word in enumerate(words) if re.fullmatch(r"[^-].*\.(py|sh)", word)]
    start = scripts[0] + 1 if scripts else 0
    while start < len(words) and not _is_flag(words[start]):
        start += 1
    given = {}
    rest = words[start:]
    while rest:
        word = rest.pop(0)
        name, separator, value = word.partition("=")
        if not _is_flag(word):
            raise UltraMemError(f"{word!r}: is not a flag; write --NAME=VALUE, such as --model.mem_knum=360")
        if not separator:
            value = rest.pop(0) if rest and not _is_flag(rest[0]) else "true"
        given[_full_name(name.lstrip("-").replace("-", "_"))] = value
    if not given:
        raise UltraMemError("flags: must not be empty; write --NAME=VALUE, such as --model.mem_knum=360")
    return " ".join(words[:start]), given


def _is_flag(word: str) -> bool:
    return re.match(r"--?[A-Za-z_][\w.-]*(=|$)|[A-Za-z_][\w.-]*=", word) is not None


def _full_name(name: str) -> str:
    if f"optimizer.{name}" in _VALUE_LR_FLAGS:
        return f"optimizer.{name}"
    return f"model.{name}" if name.startswith("mem_") or name in _MODEL_OPTIONS or name in FIXED_KEYS else name


class _Draft:
    """A configuration that is being translated: `content`, with the sections of ours.

    `given` has the texts of all given flags, `values` of those without shell variables, and of assumed flags.
    """

    def __init__(self, given: dict[str, str]) -> None:
        self.given = given
        self._reasons = {flag: "a variable of the shell" for flag, text in given.items() if "$" in text}
        known = {flag: text for flag, text in given.items() if flag not in self._reasons}
        self._assumed = {flag: text for flag, text in ASSUMED.items() if flag not in known}
        if "model.mlp_hidden_size" in known:
            self._assumed.pop("model.mlp_ratio", None)
        self.values = self._assumed | known
        self.content: dict[str, Any] = {section.name: {} for section in dataclasses.fields(RunConfig)}
        self._sources: dict[str, str] = {}
        self._translated: set[str] = set()

    def read(self, flag: str) -> Any:
        """Read the value of a flag, and mark the flag as translated."""
        self._translated.add(flag)
        return parse_yaml(self.values[flag], f"--{flag}")

    def number(self, flag: str, low: int = 1) -> int:
        """Read the value of a flag that must be a whole number of at least `low`."""
        value = self.read(flag)
        if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 or not low <= value < 2**63:
            raise UltraMemError(f"--{flag}={self.values[flag]!r}: must be a whole number of at least {low}")
        return int(value)

    def set(self, key: str, value: Any, flag: str) -> None:
        """Set one of our dotted keys from a flag, and mark the flag as translated."""
        set_key(self.content, key, value)
        self._sources[key] = flag
        self._translated.add(flag)

    def refuse(self, flag: str, reason: str = "") -> None:
        self._reasons.setdefault(flag, reason)

    def published_model(self) -> PublishedModel:
        keys = [key for key in _MODEL_OPTIONS if f"model.{key}" in self.values]
        options = {key: parse_yaml(self.values[f"model.{key}"], f"--model.{key}") for key in keys}
        if any(flag.startswith("model.mem_") for flag in self.values):
            options.setdefault("mem_type", "ultramem_v2")
        return decode(PublishedModel, options, path="--model")

    def check(self) -> None:
        """Raise an error that names the flag if one of our values is invalid."""
        content = copy.deepcopy(self.content)
        content["model"].setdefault("vocab_size", 128)  # a placeholder: the data's is not known yet
        content["data"]["directory"] = "not known yet"
        if self._lacks_steps:
            content["trainer"]["steps"] = LARGEST_COUNT
        try:
            decode(RunConfig, content)
        except ConfigError as error:
            key = re.split(r"[^\w.]", str(error), maxsplit=1)[0]
            source = f"--{self._sources[key]}: here " if key in self._sources else "flags: "
            raise UltraMemError(f"{source}{error}") from error

    def text(self, command: str) -> str:
        lines = ["# fill in: data.directory" + (", trainer.steps" if self._lacks_steps else "")]
        if command:
            lines.append(f"# skipped, and what it names is not read: {_on_one_line(command)}")
        if self._assumed:
            lines.append("# not among the flags, so assumed: " + " ".join(map(_as_flag, self._assumed.items())))
        sections = {name: section for name, section in self.content.items() if section}
        lines.append(dump_yaml(sections).rstrip("\n"))
        for flag, text in self.given.items():
            if flag in self._reasons or flag not in self._translated:
                reason = f" ({self._reasons[flag]})" if self._reasons.get(flag) else ""
                lines.append(f"# no equivalent: {_as_flag((flag, text))}{reason}")
        return "\n".join(lines) + "\n"

    @property
    def _lacks_steps(self) -> bool:
        return self.content["trainer"].get("steps", 1) is None


def _as_flag(item: tuple[str, str]) -> str:
    return _on_one_line(f"--{item[0]}={item[1]}")


def _on_one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _translate_model(draft: _Draft, published: PublishedModel) -> None:
    for name, value in published.model_fields().items():
        flag = f"model.{MODEL_KEYS[name]}"
        if name == "feed_forward_size":
            draft.set(f"model.{name}", value, flag if flag in draft.values else "model.mlp_ratio")
        elif flag in draft.values and draft.read(flag) is not None:
            draft.set(f"model.{name}", value, flag)
    if "model.n_kv_heads" in draft.values and draft.read("model.n_kv_heads") not in (None, published.n_heads):
        draft.refuse("model.n_kv_heads", f"here {published.n_heads}")
    for flag, accepted in _FIXED_FLAGS.items():
        if flag in draft.values and draft.read(flag) not in accepted:
            draft.refuse(flag, f"here {json.dumps(accepted[0])}")


def _translate_memory(draft: _Draft, published: PublishedModel) -> None:
    fields = published.memory_fields()
    unused = f"{published.mem_type} does not use it" if fields else "the model has no memory"
    used = {f"model.{MEMORY_KEYS[name]}" for name in fields or ()} | {"model.mem_type"}
    if published.mem_type == "ultramem_v2":
        used.add("model.mem_use_glu_act")
    for key in _MODEL_OPTIONS:
        flag = f"model.{key}"
        if key.startswith("mem_") and flag in draft.values:
            if flag in used:
                draft.read(flag)
            else:
                draft.refuse(flag, unused)
    draft.refuse("model.mem_tucker_rank_penalty", "the published code does not apply it")
    if fields:
        for name, value in fields.items():
            draft.set(f"model.memory.{name}", value, f"model.{MEMORY_KEYS[name]}")
        draft.set("model.memory.init", "published", "model.mem_type")
    for flag, key in _VALUE_LR_FLAGS.items():
        if flag in draft.values and fields and published.mem_type != "memory_plus":
            draft.set(key, draft.read(flag), flag)
        else:
            draft.refuse(flag, unused)


def _translate_lengths(draft: _Draft) -> None:
    """Batch sizes, which the published code counts in sequences, and the length of training."""
    length = draft.number("model.max_sequence_length")
    draft.content["data"]["directory"] = None
    draft.set("data.sequence_length", length, "model.max_sequence_length")
    folder, name = draft.values.get("save_folder"), draft.values.get("run_name") or "published"
    draft.set("trainer.directory", folder or f"runs/{name}", "save_folder" if folder else "run_name")
    draft.set("trainer.batch_size", draft.number("global_train_batch_size") * length, "global_train_batch_size")
    if (flag := "device_train_microbatch_size") in draft.values:
        draft.set("trainer.micro_batch_size", draft.number(flag) * length, flag)
    text = draft.values.get("max_duration", "").strip()
    if not text or text.endswith("ep"):
        draft.set("trainer.steps", None, "max_duration")
        draft.refuse("max_duration", "write steps or tokens instead of epochs")
        return
    try:
        amount = int(float(text.removesuffix("T")))
    except (ValueError, OverflowError) as error:
        raise UltraMemError(
            f"--max_duration={text!r}: must be steps, such as 10000, or tokens, such as 5e11T"
        ) from error
    draft.set("trainer.tokens" if text.endswith("T") else "trainer.steps", amount, "max_duration")


def _translate_schedule(draft: _Draft) -> None:
    units = draft.read("scheduler.units") if "scheduler.units" in draft.values else "tokens"
    if units not in ("steps", "tokens"):
        raise UltraMemError(f"--scheduler.units={units!r}: must be steps or tokens")
    trainer = draft.content["trainer"]
    step = trainer["batch_size"] if units == "tokens" else 1
    if (flag := "scheduler.t_warmup") in draft.values:
        draft.set("schedule.warmup_steps", math.ceil(draft.number(flag, 0) / step), flag)
    if "scheduler.t_max" in draft.values and draft.read("scheduler.t_max") is not None:
        steps = trainer["steps"] if "steps" in trainer else math.ceil(trainer["tokens"] / trainer["batch_size"])
        if math.ceil(draft.number("scheduler.t_max") / step) != steps:
            draft.refuse("scheduler.t_max", "the schedule ends with the training")


def _translate_alike(draft: _Draft) -> None:
    """Flags with a single key of ours each."""
    for flag, (key, convert) in _ALIKE.items():
        if flag in draft.values:
            try:
                draft.set(key, convert(draft.read(flag)), flag)
            except (LookupError, TypeError):
                draft.refuse(flag)
    if "seed" in draft.values:
        for key in ("model.seed", "trainer.seed"):
            draft.set(key, draft.read("seed"), "seed")
    for flag in ("wandb.project", "wandb.entity"):
        if flag in draft.values and "wandb.project" in draft.values:
            draft.set(f"logging.{flag}", draft.read(flag), flag)


def _same(value: Any) -> Any:
    return value


def _at_least_one(value: Any) -> Any:
    """In the published code null, 0 and -1 mean none or all."""
    if value is None or (isinstance(value, int) and value < 1):
        raise LookupError
    return value


def _at_least_one_or_all(value: Any) -> Any:
    """In the published code -1 means all."""
    return None if value == -1 else _at_least_one(value)


_ALIKE: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "model.init_std": ("model.init_std", _same),
    "optimizer.learning_rate": ("optimizer.learning_rate", _same),
    "optimizer.betas": ("optimizer.betas", _same),
    "optimizer.eps": ("optimizer.eps", _same),
    "optimizer.weight_decay": ("optimizer.weight_decay", _same),
    "max_grad_norm": ("optimizer.max_grad_norm", _same),
    "scheduler.name": (
        "schedule.kind",
        {"cosine_with_warmup": "cosine", "linear_with_warmup": "linear", "constant": "constant"}.__getitem__,
    ),
    "scheduler.alpha_f": ("schedule.final_share", _same),
    "precision": ("trainer.precision", {"amp_bf16": "bfloat16", "fp32": "float32"}.__getitem__),
    "distributed_strategy": ("trainer.parallel", {"ddp": "ddp", "fsdp": "fsdp"}.__getitem__),
    "activation_checkpointing": (
        "trainer.activation_checkpointing",
        {"whole_layer": True, True: True, False: False, None: False}.__getitem__,
    ),
    "save_interval": ("trainer.checkpoint_interval", _at_least_one),
    "save_num_checkpoints_to_keep": ("trainer.keep_checkpoints", _at_least_one_or_all),
    "eval_interval": ("trainer.evaluate_interval", _at_least_one),
    "console_log_interval": ("trainer.metrics_interval", _at_least_one),
    "model.mem_log_interval": ("trainer.memory_metrics_interval", _at_least_one),
}

# Flags whose values are fixed here.
_FIXED_FLAGS: dict[str, tuple[Any, ...]] = {
    **{f"model.{key}": accepted for key, (_, accepted) in FIXED_KEYS.items()},
    "model.attention_dropout": (0,),
    "model.embedding_dropout": (0,),
    "model.residual_dropout": (0,),
    "model.init_fn": ("full_megatron",),
    "model.init_cutoff_factor": (3, None),
    "model.emb_init_std": (None,),
    "model.scale_emb_init": (False,),
    "max_grad_norm_ratio": (None,),
    "optimizer.name": ("adamw",),
    "optimizer.decay_embeddings": (True,),
    "optimizer.decay_norm_and_bias": (True,),
}
