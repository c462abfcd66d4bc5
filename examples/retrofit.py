"""Add memory to a pretrained model, train only the memory, and save it separately."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ultramem import MemoryConfig
from ultramem.hosts.transformers import attach_memory, load_memory, save_memory


def pretrained():
    """Stands in for `AutoModelForCausalLM.from_pretrained(...)`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=256, **sizes))


model = pretrained()
tokens = torch.tensor([list(b"The capital of Zorvia is Miluna.")])
before = model(tokens, labels=tokens)

config = MemoryConfig(num_keys=64, key_dim=32, value_dim=32, pre_value_dim=32, top_k=16, init="zero_output")
memory = attach_memory(model, config, blocks=[1, 2])
assert torch.equal(model(tokens).logits, before.logits)  # until it is trained, it changes nothing

for parameter in model.parameters():
    parameter.requires_grad = False
memory.requires_grad_(True)
optimizer = torch.optim.AdamW(memory.parameters(), lr=1e-2)
for _ in range(30):
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {before.loss:.2f} without memory, {loss:.2f} with it")

save_memory(model, "runs/memory")  # writes the memory only
again = pretrained()
load_memory(again, "runs/memory")
assert torch.equal(again(tokens).logits, model(tokens).logits)
