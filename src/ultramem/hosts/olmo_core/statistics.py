"""What a model costs: parameters, floating-point operations and bytes for each token."""

from __future__ import annotations

from dataclasses import dataclass

from ultramem.hosts.olmo_core.config import ModelConfig


@dataclass(frozen=True)
class ModelStatistics:
    """Costs of a model.

    Attributes:
        total: all parameters.
        active: parameters that one token uses: of a table the rows that it reads, of experts those chosen.
        embeddings: parameters of the embedding and of the output layer, counted once if they are tied.
        flops_per_token: floating-point operations of a forward pass for one token at the given sequence length.
        bytes_per_token: bytes of weights and rows that one token reads at batch size 1, in bfloat16.
    """

    total: int
    active: int
    embeddings: int
    flops_per_token: int
    bytes_per_token: int

    @property
    def total_without_embeddings(self) -> int:
        """All parameters but the embeddings."""
        return self.total - self.embeddings

    @property
    def active_without_embeddings(self) -> int:
        """Parameters that one token uses, without the embeddings."""
        return self.active - self.embeddings


def model_statistics(config: ModelConfig, sequence_length: int) -> ModelStatistics:
    """Count on the meta device; nothing is allocated.

    Args:
        config: of the model.
        sequence_length: tokens that the attention's operations are counted for.
    """
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
        # A training step's operations: a third of them are the forward pass's.
        flops_per_token=model.num_flops_per_token(sequence_length) // 3,
        bytes_per_token=2 * (active - embeddings + matrix + config.d_model),
    )
