"""Costs of a model: parameters, and floating-point operations and bytes per token."""

from __future__ import annotations

from dataclasses import dataclass

from ultramem.hosts.olmo_core.config import ModelConfig


@dataclass(frozen=True)
class ModelStatistics:
    """Costs of a model.

    Attributes:
        total: number of all parameters.
        active: number of parameters that a token uses; of tables only the rows read, of experts only the chosen ones.
        embeddings: number of parameters of the embedding and the output layer, counted once if they are tied.
        flops_per_token: floating-point operations per token of a forward pass at the given sequence length.
        bytes_per_token: bytes of weights and rows that a token reads at batch size 1, in bfloat16.
    """

    total: int
    active: int
    embeddings: int
    flops_per_token: int
    bytes_per_token: int

    @property
    def total_without_embeddings(self) -> int:
        """Number of all parameters without embeddings."""
        return self.total - self.embeddings

    @property
    def active_without_embeddings(self) -> int:
        """Number of parameters that a token uses, without embeddings."""
        return self.active - self.embeddings


def model_statistics(config: ModelConfig, sequence_length: int) -> ModelStatistics:
    """Compute the costs without allocating memory; the attention's operations depend on the sequence length."""
    model = config.build(device="meta")
    total = sum(parameter.numel() for parameter in model.parameters())
    matrix = config.vocab_size * config.d_model
    embeddings = matrix if config.tie_embeddings else 2 * matrix
    active = total
    if model.memory is not None:
        in_memory = sum(parameter.numel() for parameter in model.memory.parameters())
        active += sum(layer.active_parameters for layer in model.memory.layers) - in_memory
    if config.moe is not None:
        unused = config.moe.num_params(config.d_model) - config.moe.num_active_params(config.d_model)
        active -= config.num_blocks * unused
    return ModelStatistics(
        total=total,
        active=active,
        embeddings=embeddings,
        # A third of a training step's operations are the forward pass's.
        flops_per_token=model.num_flops_per_token(sequence_length) // 3,
        bytes_per_token=2 * (active - embeddings + matrix + config.d_model),
    )
