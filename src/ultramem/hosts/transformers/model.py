"""The transformers model: a decoder with a memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from ultramem.config import MemoryConfig
from ultramem.errors import ConfigError, UltraMemError
from ultramem.files.checksums import CHECKSUMS_NAME, DamagedFileError
from ultramem.files.whole_files import write_text
from ultramem.hosts.transformers.attachment import Connection, add_auxiliary_loss, check_host_config
from ultramem.hosts.transformers.files import check_model_files
from ultramem.layers import HostScheme
from ultramem.memory import Memory

CODE_NAME = "modeling_ultramem.py"
_CODE = '''"""Lets `trust_remote_code=True` find this model's classes; they need `pip install "ultramem[hf]"`."""

from ultramem.hosts.transformers import UltraMemConfig, UltraMemForCausalLM, UltraMemModel

__all__ = ["UltraMemConfig", "UltraMemForCausalLM", "UltraMemModel"]
'''


class _NamedInItsDirectory:
    """Saved models refer to the classes that `CODE_NAME` imports, not to a copy of this library's source.

    After loading with `trust_remote_code=True` transformers would save such a copy, which later versions cannot read.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing, as `auto_map` names the classes already."""


class UltraMemConfig(_NamedInItsDirectory, Qwen3Config):
    """The configuration of a decoder with a memory. It extends that of Qwen3.

    The decoder has the architecture of Qwen3: RMSNorm before each sublayer, RoPE, query and key norms per head, SwiGLU.

    Attributes:
        memory: fields of `ultramem.MemoryConfig`; missing ones have its defaults.

    Raises:
        ConfigError: the memory's configuration is not valid, or does not fit the model.
    """

    model_type = "ultramem"

    memory: dict[str, Any] | None = None

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """As in transformers. Checksums of what was there before go; models call this first when they are saved."""
        Path(save_directory, CHECKSUMS_NAME).unlink(missing_ok=True)
        super().save_pretrained(save_directory, *args, **options)

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs["auto_map"] = {
            "AutoConfig": "modeling_ultramem.UltraMemConfig",
            "AutoModel": "modeling_ultramem.UltraMemModel",
            "AutoModelForCausalLM": "modeling_ultramem.UltraMemForCausalLM",
        }
        super().__post_init__(**kwargs)
        # All fields, so that new defaults of a later version do not change the model.
        self.memory = dataclasses.asdict(self.memory_config())

    def memory_config(self) -> MemoryConfig:
        """The memory's configuration."""
        names = {field.name for field in dataclasses.fields(MemoryConfig)}
        for name in self.memory or {}:
            if name not in names:
                raise ConfigError(f"memory.{name}: unknown field of MemoryConfig; remove it")
        config = MemoryConfig(**(self.memory or {}))
        check_host_config(config)
        config.layout(len(config.insertions(self.num_hidden_layers)))
        return config


class _SavedWithCode(_NamedInItsDirectory):
    """Saves the code with which `trust_remote_code=True` finds the classes, and checks what it loads."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """As in transformers. Files of a local directory are first compared with its `checksums.json`, if it has one.

        Raises:
            UltraMemError: a file is damaged, or its indices are not those of a memory.
        """
        if pretrained_model_name_or_path is not None:
            directory = Path(pretrained_model_name_or_path, options.get("subfolder") or "")
            if directory.is_dir():
                check_model_files(directory)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **options)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        try:
            model.memory.check_loaded()
        except DamagedFileError as error:
            raise UltraMemError(f"{pretrained_model_name_or_path}: {error}; write it again") from error
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """As in transformers."""
        if options.get("is_main_process", True) and not Path(save_directory).is_file():
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_text(Path(save_directory) / CODE_NAME, _CODE)  # first: the base class may upload the directory
        super().save_pretrained(save_directory, *args, **options)  # type: ignore[misc]


class UltraMemModel(_SavedWithCode, Qwen3Model):
    """The decoder without its output layer; its `memory` is an `ultramem.Memory`."""

    config_class = UltraMemConfig
    config: UltraMemConfig
    _no_split_modules = ["Qwen3DecoderLayer", "Memory"]  # noqa: RUF012, as in the base class

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__(config)
        std = config.initializer_range
        scheme = HostScheme.swiglu(config.hidden_size, config.intermediate_size, std, std)
        weight = self.embed_tokens.weight
        memory = Memory(
            config.memory_config(), config.hidden_size, config.num_hidden_layers, scheme=scheme,
            # While a checkpoint is loaded, the loader says what is on `meta`: parameters, and buffers or not.
            device=None if weight.is_meta else weight.device, dtype=weight.dtype,
        )  # fmt: skip
        if not weight.is_meta:
            _mark_initialised(memory)
        self.memory = memory
        self._own_connection = Connection(memory, self.layers)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise parameters that a checkpoint lacks; of the memory it must lack all or none."""
        memory = getattr(self, "memory", None)  # the base class' constructor comes before it
        if memory is None or module not in {*memory.modules()}:
            super()._init_weights(module)
            return
        parameters = dict(memory.named_parameters())
        if any(parameter.is_meta for parameter in parameters.values()):
            return  # `device_map` left it on disk
        loaded = [name for name, parameter in parameters.items() if getattr(parameter, "_is_hf_initialized", False)]
        if not loaded:
            memory.init_weights()
            _mark_initialised(memory)
        elif len(loaded) < len(parameters):
            missing = min(parameters.keys() - {*loaded})
            raise UltraMemError(f"the checkpoint lacks memory.{missing}, though it has memory.{loaded[0]}")


class UltraMemForCausalLM(_SavedWithCode, Qwen3ForCausalLM):
    """The decoder with its output layer: loads, generates, trains and saves like other models of transformers."""

    config_class = UltraMemConfig
    config: UltraMemConfig
    _no_split_modules = UltraMemModel._no_split_modules

    def __init__(self, config: UltraMemConfig) -> None:
        super(Qwen3ForCausalLM, self).__init__(config)
        self.model = UltraMemModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_forward_hook(add_auxiliary_loss, with_kwargs=True)
        self.post_init()

    @property
    def memory(self) -> Memory:
        """The decoder's memory."""
        return self.model.memory


def _mark_initialised(memory: Memory) -> None:
    """Keep transformers from initialising the memory again, module by module."""
    for part in (*memory.modules(), *memory.parameters()):
        part._is_hf_initialized = True  # type: ignore[attr-defined]


AutoConfig.register("ultramem", UltraMemConfig, exist_ok=True)
AutoModel.register(UltraMemConfig, UltraMemModel, exist_ok=True)
AutoModelForCausalLM.register(UltraMemConfig, UltraMemForCausalLM, exist_ok=True)
