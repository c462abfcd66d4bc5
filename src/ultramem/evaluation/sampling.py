"""Sampling the next token from logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ultramem.errors import ConfigError


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Check the arguments of `sample`.

    Raises:
        ConfigError: a value is invalid.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"temperature={temperature}: must be 0 (always the most probable token) or above")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k}: must be at least 1; leave it out to choose among all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p}: must be above 0 and at most 1; leave it out to choose among all tokens")


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample a token from each row of logits.

    The logits are divided by the temperature. Then the `top_k` most probable tokens are kept, and of these the
    nucleus: the smallest set of most probable tokens whose total probability is at least `top_p` (Holtzman et al.,
    arXiv:1904.09751).

    Args:
        logits: (..., vocabulary), floating point.
        temperature: sampling temperature; 0 takes the most probable token, whatever the other arguments.
        top_k: number of tokens to sample from; None for all.
        top_p: total probability of the tokens to sample from, in (0, 1]; None for all.
        generator: random number generator on the device of the logits; None for PyTorch's default.

    Returns:
        (...), int64, token ids.

    Raises:
        ConfigError: a value is invalid.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()
    # With a largest logit of 0 the smallest temperature does not overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    probabilities, tokens = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        probabilities[..., top_k:] = 0
    if top_p is not None:
        probabilities /= probabilities.sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= top_p] = 0
    rows = probabilities.view(-1, probabilities.shape[-1])
    drawn = torch.multinomial(rows, 1, generator=generator).view(*tokens.shape[:-1], 1)
    return tokens.gather(-1, drawn).squeeze(-1)
