"""Sampling against distributions worked out by hand."""

from __future__ import annotations

import pytest
import torch

from ultramem.errors import ConfigError
from ultramem.evaluation import sample

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], dtype=torch.float64)
LOGITS = PROBABILITIES.log()
DRAWS = 40_000


def frequencies(logits: torch.Tensor, **options: float | None) -> torch.Tensor:
    drawn = sample(logits.expand(DRAWS, -1), generator=torch.Generator().manual_seed(0), **options)
    return torch.bincount(drawn, minlength=logits.numel()) / DRAWS


def assert_distributed(found: torch.Tensor, expected: list[float]) -> None:
    wanted = torch.tensor(expected) / sum(expected)
    assert torch.equal(found > 0, wanted > 0)
    assert (found - wanted).abs().max() < 5 * (0.25 / DRAWS) ** 0.5  # five standard deviations


def test_without_limits_tokens_have_the_probabilities_of_the_softmax() -> None:
    assert_distributed(frequencies(LOGITS + 3), PROBABILITIES.tolist())


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    assert_distributed(
        frequencies(LOGITS, temperature=temperature), [p ** (1 / temperature) for p in PROBABILITIES.tolist()]
    )


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.39, [1]), (0.41, [1, 3]), (0.64, [1, 3]), (0.66, [1, 3, 4]), (0.94, [0, 1, 3, 4]), (1.0, [0, 1, 2, 3, 4])],
)
def test_nucleus_is_the_smallest_set_of_that_probability(top_p: float, kept: list[int]) -> None:
    expected = [p if token in kept else 0.0 for token, p in enumerate(PROBABILITIES.tolist())]
    assert_distributed(frequencies(LOGITS, top_p=top_p), expected)


def test_nucleus_that_is_met_exactly_takes_no_further_token() -> None:
    quarters = torch.tensor([0.25, 0.5, 0.25]).log()
    assert_distributed(frequencies(quarters, top_p=0.5), [0.0, 1.0, 0.0])


@pytest.mark.parametrize(("top_k", "kept"), [(1, [1]), (2, [1, 3]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])])
def test_top_k(top_k: int, kept: list[int]) -> None:
    expected = [p if token in kept else 0.0 for token, p in enumerate(PROBABILITIES.tolist())]
    assert_distributed(frequencies(LOGITS, top_k=top_k), expected)


def test_top_k_takes_exactly_k_of_equal_tokens() -> None:
    assert (frequencies(torch.zeros(10), top_k=3) > 0).sum() == 3


def test_top_p_is_a_share_of_what_top_k_and_temperature_leave() -> None:
    # Squared and cut to three: 0.16, 0.0625, 0.04 of 0.2625. The first two have 0.848 of it.
    assert_distributed(frequencies(LOGITS, temperature=0.5, top_k=3, top_p=0.8), [0.0, 0.16, 0.0, 0.0625, 0.0])


def test_temperature_0_is_greedy() -> None:
    logits = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, 0), logits.argmax(-1))


def test_a_tiny_temperature_is_greedy_too() -> None:
    logits = torch.tensor([[1e4, -1e4, 1e4 + 1], [float("-inf"), 0.0, -1.0]])
    assert sample(logits, 1e-300).tolist() == [2, 1]


def test_same_seed_same_tokens() -> None:
    logits = torch.zeros(100, 1000)
    first, again, other = (sample(logits, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: must be 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0.0: must be above 0"),
        ({"top_p": 1.1}, r"top_p=1.1: .* at most 1"),
    ],
)
def test_values_that_cannot_work(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(LOGITS, **options)
