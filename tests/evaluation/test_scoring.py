"""Scores of requests in batches against each request alone, in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from ultramem.errors import UltraMemError
from ultramem.evaluation.scoring import Request, Score, score
from ultramem.hosts.olmo_core.model import MemoryTransformer


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Of many lengths, in no order."""
    drawn = random.Random(0)

    def tokens(longest: int) -> tuple[int, ...]:
        return tuple(drawn.choices(range(384), k=drawn.randint(1, longest)))

    return [Request(tokens(20), tokens(6)) for _ in range(40)]


def score_alone(model: MemoryTransformer, context: tuple[int, ...], continuation: tuple[int, ...]) -> Score:
    """A pass for each token of the continuation, each over exactly the tokens before it."""
    text, total, matches = [*context], 0.0, 0
    for token in continuation:
        with torch.no_grad():
            logits = model(torch.tensor([text]))[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        matches += int(logits.argmax()) == token
        text.append(token)
    return Score(total, matches)


def assert_equal(found: list[Score], expected: list[Score]) -> None:
    assert [s.log_likelihood for s in found] == pytest.approx([s.log_likelihood for s in expected], rel=1e-4, abs=1e-4)
    assert [s.matches for s in found] == [s.matches for s in expected]


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_values(run: Any, requests: list[Request], batch_tokens: int) -> None:
    expected = [score_alone(run.model, r.context, r.continuation) for r in requests]
    assert_equal(score(run.model, requests, batch_tokens=batch_tokens), expected)


def test_matches(run: Any) -> None:
    context = (5, 300, 17)
    with torch.no_grad():
        best = int(run.model(torch.tensor([context]))[0, -1].argmax())
    other = (best + 1) % 384
    assert [s.matches for s in score(run.model, [Request(context, (best,)), Request(context, (other,))])] == [1, 0]


def test_a_long_context_is_cut_on_the_left(run: Any, requests: list[Request]) -> None:
    expected = [score_alone(run.model, r.context[-(8 + 1 - len(r.continuation)) :], r.continuation) for r in requests]
    assert_equal(score(run.model, requests, context_length=8), expected)


def test_a_continuation_is_always_read_whole(run: Any) -> None:
    request = Request((1, 2, 3), (4, 5, 6, 7, 8, 9))
    assert request.input(context_length=4) == (3, 4, 5, 6, 7, 8)
    assert_equal(score(run.model, [request], context_length=4), [score_alone(run.model, (3,), request.continuation)])


def test_batches_hold_what_they_may_and_the_longest_come_first(run: Any, requests: list[Request]) -> None:
    shapes: list[torch.Size] = []
    run.model.register_forward_pre_hook(lambda _, arguments: shapes.append(arguments[0].shape))
    read: list[int] = []
    score(run.model, requests, batch_tokens=60, on_tokens=read.append)
    lengths = [len(r.context) + len(r.continuation) - 1 for r in requests]
    assert sum(rows for rows, _ in shapes) == len(requests)
    assert all(rows * width <= 60 for rows, width in shapes)
    assert [width for _, width in shapes] == sorted((width for _, width in shapes), reverse=True)
    assert shapes[0][1] == max(lengths)
    assert len(read) == len(shapes)
    assert sum(read) == sum(lengths)


def test_only_the_logits_of_continuations_are_computed(run: Any) -> None:
    shapes: list[torch.Size] = []
    run.model.lm_head.w_out.register_forward_hook(lambda _, __, output: shapes.append(output.shape))
    score(run.model, [Request(tuple(range(15)), (1, 2)), Request(tuple(range(9)), (3,))])
    assert shapes == [(2, 2, 384)]


def test_nothing(run: Any) -> None:
    assert score(run.model, []) == []
    for context, continuation in (((), (1,)), ((1,), ())):
        with pytest.raises(UltraMemError, match="has no tokens"):
            Request(context, continuation)


def test_a_model_that_diverged(run: Any) -> None:
    run.model.embeddings.weight.data[3] = float("nan")
    with pytest.raises(UltraMemError, match="output is not finite"):
        score(run.model, [Request((1, 2), (4,)), Request((3, 2), (4,))])
