"""The core needs torch and nothing else, the transformers host little more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


TRANSFORMERS_PROGRAM = """
import sys
for name in ("olmo_core", "olmo_eval", "datasets", "matplotlib", "pyarrow", "tensorboard", "zstandard", "accelerate",
             "peft", "triton"):
    sys.modules[name] = None  # an import of it fails

import torch
from transformers import AutoModelForCausalLM
from ultramem.hosts.transformers import UltraMemConfig

sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, head_dim=8, eos_token_id=0)
memory = dict(num_keys=8, key_dim=8, value_dim=16, top_k=4)
model = AutoModelForCausalLM.from_config(UltraMemConfig(memory=memory, **sizes)).eval()
model.save_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False).shape[0])
"""


def test_transformers_and_safetensors_are_enough_to_generate(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRANSFORMERS_PROGRAM, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout == "1\n", run.stderr
