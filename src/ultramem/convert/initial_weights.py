"""Initial weights from another model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from ultramem.errors import UltraMemError
from ultramem.hosts.olmo_core import ModelConfig


def read_model_config(path: Path) -> ModelConfig:
    """Read the configuration of the model in a transformers directory.

    Raises:
        UltraMemError: there is no model, the training host does not support it, or transformers is not installed.
    """
    _check_installed()
    from ultramem.convert.transformers_models import read_config

    return read_config(path)


def load_weights(model: nn.Module, path: Path, config: ModelConfig) -> None:
    """Replace all parameters and buffers, sharded or not, with those of the model in a transformers directory.

    Raises:
        UltraMemError: the model is missing or damaged, its names or shapes are not those of `config`, or transformers
            is not installed.
    """
    _check_installed()
    from ultramem.convert.transformers_models import read_model

    _, state = read_model(path)
    expected = {name: tuple(tensor.shape) for name, tensor in config.build("meta").state_dict().items()}
    for name in sorted({*expected, *state}):
        found = tuple(state[name].shape) if name in state else None
        if found != expected.get(name):
            raise UltraMemError(
                f"trainer.initial_weights={path}: {name} is {found or 'missing'} there, "
                f"{expected.get(name) or 'missing'} in this run's model; leave the model section out to take the model "
                "as it is there"
            )
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))


def _check_installed() -> None:
    if find_spec("transformers") is None:
        raise UltraMemError(
            "trainer.initial_weights needs the package transformers; install it with: pip install 'ultramem[train,hf]'"
        )
