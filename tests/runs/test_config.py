"""The sections of a run's configuration."""

import dataclasses
import inspect
import re

import pytest

from ultramem.errors import ConfigError
from ultramem.runs.config import (
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainerConfig,
    WandbConfig,
)

SECTIONS = (RunConfig, DataConfig, TrainerConfig, OptimizerConfig, ScheduleConfig, LoggingConfig, WandbConfig)


def test_every_field_is_documented():
    for section in SECTIONS:
        documentation = inspect.getdoc(section)
        for field in dataclasses.fields(section):
            assert re.search(rf"^    {field.name}: ", documentation, re.MULTILINE), (section, field.name)


@pytest.mark.parametrize("name", ["vocab_size", "eos_token_id", "dtype"])
def test_token_files_need_their_facts(name, tmp_path):
    facts = {"vocab_size": 10, "eos_token_id": 0, "dtype": "uint16"}
    DataConfig(train_files=(tmp_path / "a.npy",), **facts)
    with pytest.raises(ConfigError, match=f"^{name} is missing; token files without a directory need it"):
        DataConfig(train_files=(tmp_path / "a.npy",), **(facts | {name: None}))
