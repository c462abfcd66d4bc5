"""Synthetic run directories, as the training command would leave them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

STEPS = 600
LAYERS = 6

CONFIG = """\
model:
  d_model: 256
  blocks: {layers}
  memory:
    kind: {system}
    num_keys: 96
    top_k: 32
data:
  sequence_length: 512
optimizer:
  lr: 0.0004
trainer:
  steps: {steps}
"""

SUMMARY = {
    "parameters": {
        "total": 1_183_452_672,
        "active": 227_345_408,
        "total_without_embeddings": 1_144_818_176,
        "active_without_embeddings": 188_710_912,
    },
    "flops_per_token": 454_690_816,
    "bytes_per_token": 4_520_000,
    "memory": {"table_rows": 2_592_000, "window_rows": 1_295_044, "layers": LAYERS},
    "train_tokens": 12_800_000,
    "train_bytes": 41_000_000,
    "git": "3f2a9c1",
    "started": "2026-02-03T09:12:44+00:00",
    "torch": "2.10.0",
    "device": "CPU, 2 cores",
    "world_size": 1,
}

EVALUATION = {
    "checkpoint": "step600",
    "split": "heldout",
    "tokens": 1_048_576,
    "loss": 2.4321,
    "perplexity": 11.383,
    "bits_per_byte": 1.0967,
    "unigram_bits_per_byte": 3.2181,
}

TASKS = {
    "checkpoint": "step600",
    "results": [
        {
            "name": "piqa",
            "metric": "length-normalised accuracy",
            "value": 0.6234,
            "standard_error": 0.0113,
            "questions": 1838,
            "chance": 0.5,
            "cut": 0.25,
        },
        {
            "name": "sciq",
            "metric": "accuracy",
            "value": 0.71,
            "standard_error": 0.0143,
            "questions": 1000,
            "chance": 0.25,
            "cut": 0.0,
        },
    ],
}

SAMPLES = [
    {
        "prompt": "def read_lines(path):\n",
        "text": 'def read_lines(path):\n    """Read the lines."""\n    return list(open(path))\n',
        "temperature": 0.8,
        "top_k": 50,
        "top_p": None,
        "seed": 0,
    },
    {"prompt": "import ", "text": "import os\nimport sys\n", "temperature": 1.0, "top_p": 0.9, "seed": 1},
]


def report_at(step: int, random: np.random.Generator, system: str, seed: int) -> dict[str, float]:
    """What a plausible run reports at `step`: every step, every 10 and every 100 steps."""
    progress = step / STEPS
    loss = 2.3 + 0.1 * seed + 6.1 * math.exp(-step / 60)
    schedule = min(step / 30, 0.55 + 0.45 * math.cos(math.pi * progress))
    metrics = {
        "train/CE loss": loss + random.normal(0, 0.08),
        "train/tokens": step * 16384.0,
        "optim/learning rate (model)": 4e-4 * schedule,
        "optim/learning rate (values)": 4e-4 * schedule * (1 + 3 * (1 - progress)),
        "optim/total grad norm": (0.4 + 4 * math.exp(-step / 20)) * random.lognormal(0, 0.2),
        "throughput/tokens per second": 5400 + random.normal(0, 120),
    }
    if step % 10 == 0:
        for layer in range(LAYERS):
            if system == "moe":
                metrics[f"moe/block {layer:02d}/load imbalance"] = 1 + random.random() * (2 - progress)
                continue
            prefix = f"memory/layer {layer:02d}"
            metrics[f"{prefix}/rows read"] = 0.2 + 0.7 * progress * (1 - layer / 12) + random.normal(0, 0.01)
            metrics[f"{prefix}/KL from uniform"] = 1.8 - 1.2 * progress + 0.1 * layer
            metrics[f"{prefix}/output std"] = 0.02 * (1 + layer) * (1 + 2 * progress)
            metrics[f"{prefix}/top score"] = 2.0 + progress + random.normal(0, 0.05)
            metrics[f"{prefix}/last score"] = 0.6 + 0.2 * progress
            metrics[f"{prefix}/singular value 1"] = 1.2 + 0.3 * progress * layer
            metrics[f"{prefix}/singular value 2"] = 0.5 - 0.2 * progress
    if step % 100 == 0:
        metrics["eval/heldout/CE loss"] = loss + 0.05
        metrics["eval/heldout/bits per byte"] = (loss + 0.05) * 0.45
        metrics["eval/heldout/perplexity"] = math.exp(loss + 0.05)
    return metrics


@pytest.fixture(scope="session")
def write_run() -> Callable[..., Path]:
    """A function that writes a run directory below the one given and returns its path."""

    def write(
        directory: Path,
        name: str = "run",
        system: str = "ultramem_v2",
        seed: int = 0,
        lines: list[dict[str, Any]] | None = None,
        finished: bool = True,
    ) -> Path:
        run = directory / name
        run.mkdir(parents=True)
        random = np.random.default_rng(seed)
        if lines is None:
            lines = [
                {"step": step, "time": 1.77e9 + 3 * step, "metrics": report_at(step, random, system, seed)}
                for step in range(1, STEPS + 1)
            ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "config.yaml").write_text(CONFIG.format(layers=LAYERS, system=system, steps=STEPS + seed))
        memory = SUMMARY["memory"] if system.startswith("ultramem") else None
        (run / "summary.json").write_text(json.dumps({**SUMMARY, "system": system, "memory": memory}))
        if finished:
            (run / "evaluation.json").write_text(json.dumps(EVALUATION))
            (run / "tasks.json").write_text(json.dumps(TASKS))
            (run / "samples.json").write_text(json.dumps(SAMPLES))
        return run

    return write


@pytest.fixture
def make_run(write_run: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """The same below the test's own directory."""
    return partial(write_run, tmp_path)
