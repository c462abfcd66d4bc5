import torch
from torch import nn
from torch.nn.functional import rms_norm

from ultramem import Memory, MemoryConfig, RowwiseAdamW


class Model(nn.Module):
    def __init__(self, d_model=128, num_blocks=4):
        super().__init__()
        config = MemoryConfig(num_keys=64, key_dim=64, value_dim=64, pre_value_dim=64)
        self.memory = Memory(config, d_model, num_blocks)  # one layer per block; all share one table
        self.feed_forwards = nn.ModuleList(
            nn.Sequential(nn.Linear(d_model, 256), nn.SiLU(), nn.Linear(256, d_model)) for _ in range(num_blocks)
        )

    def forward(self, x):
        for feed_forward, memory_layer in zip(self.feed_forwards, self.memory.layers, strict=True):
            normed = rms_norm(x, x.shape[-1:])
            x = x + feed_forward(normed) + memory_layer(normed)
        return x


model = Model()
optimizer = RowwiseAdamW(model.memory.parameter_groups(3e-3, model))  # AdamW, but for the table
x, target = torch.randn(2, 4, 32, 128)  # inputs and targets: 4 sequences of 32 tokens each
for step in range(20):
    loss = (model(x) - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.memory.refresh()  # once after each optimizer step
    print(f"step {step}: loss {loss:.3f}")
