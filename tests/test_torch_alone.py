"""The core needs torch and nothing else."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
for name in ("numpy", "olmo_core", "olmo_eval", "transformers", "tokenizers", "datasets", "safetensors", "typer",
             "rich", "markupsafe", "matplotlib", "pyarrow", "tensorboard", "zstandard", "yaml", "triton"):
    sys.modules[name] = None  # an import of it fails

import torch
from ultramem import Memory, MemoryConfig

for kind in ("pkm", "memory_plus", "ultramem", "ultramem_v2"):
    memory = Memory(MemoryConfig(kind=kind, num_keys=8, key_dim=8, value_dim=16, top_k=4), d_model=16, num_blocks=2)
    memory.track_usage()
    memory.layers[1](torch.randn(2, 3, 16)).sum().backward()
    memory.refresh()
    assert memory.usage_metrics()
print("done")
"""


def test_torch_is_enough() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert run.stdout == "done\n", run.stderr
