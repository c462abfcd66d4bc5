"""A run's `summary.json`: costs of the model, number of tokens, and the machine."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ultramem.files.json_files import read_json_object
from ultramem.hosts.olmo_core import ModelConfig, ModelStatistics
from ultramem.runs.config import RunConfig
from ultramem.runs.layout import SUMMARY_NAME
from ultramem.runs.tokens import TokenData

EOS_TOKEN_ID = "eos_token_id"  # also in the data, which may be moved
DATA = "data"  # sizes and checksums of its files


def make_summary(
    config: RunConfig, data: TokenData, statistics: ModelStatistics, device: torch.device, world_size: int
) -> dict[str, Any]:
    """The content for a run that starts now."""
    tokens = config.trainer.total_steps * config.trainer.batch_size
    return {
        "system": config.model.system,
        "parameters": {
            name: getattr(statistics, name)
            for name in ("total", "active", "total_without_embeddings", "active_without_embeddings")
        },
        "flops_per_token": statistics.flops_per_token,
        "bytes_per_token": statistics.bytes_per_token,
        "memory": _memory_sizes(config.model),
        "train_tokens": tokens,
        "train_bytes": None if data.train_bytes_per_token is None else round(tokens * data.train_bytes_per_token),
        EOS_TOKEN_ID: data.eos_token_id,
        "git": _git_revision(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "world_size": world_size,
    }


def read_summary(run: Path) -> dict[str, Any]:
    """The content in a run directory; empty if the file is missing or not valid."""
    return read_json_object(run / SUMMARY_NAME)


def _memory_sizes(model: ModelConfig) -> dict[str, int] | None:
    if model.memory is None:
        return None
    layers = len(model.memory.insertions(model.num_blocks))
    layout = model.memory.layout(layers)
    return {"table_rows": layout.num_tables * layout.table_rows, "window_rows": layout.window_rows, "layers": layers}


def _git_revision() -> str | None:
    """The Git revision of the working directory, marked if files differ from it."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
