"""Memory tasks: their text is parsed again, and models that know everything, nothing or the facts answer them."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from random import Random
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from ultramem.data.facts import make_documents, make_facts
from ultramem.data.tokenizers import END_OF_TEXT, PADDING, ChosenTokenizer, train_bpe
from ultramem.evaluation.memory_tasks import (
    MemoryQuestion,
    MemoryTask,
    copying_questions,
    fact_questions,
    recall_questions,
)
from ultramem.evaluation.scoring import Request, Score, score
from ultramem.hosts.olmo_core import ModelConfig
from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.runs.results import TaskResult

LENGTH = 512


def across_words() -> ChosenTokenizer:
    """Its tokens are of any characters that often follow each other, such as a quote and the letter after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_documents(make_facts())[:500], trainer)
    return ChosenTokenizer(tokenizer, "across words", 0, 1)


TOKENIZERS = {
    "words": train_bpe(make_documents(make_facts())[:500] + ["zo = ri\nif key is None: path = text\n"] * 50, 512),
    "across words": across_words(),
}
MAKERS = (recall_questions, copying_questions, fact_questions)
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def text_of(tokenizer: ChosenTokenizer, request: Request) -> tuple[str, str]:
    """Context, which must begin with the end of the text before, and continuation."""
    assert request.context[0] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in request.context[1:] + request.continuation
    return (
        tokenizer.tokenizer.decode(list(request.context[1:])),
        tokenizer.tokenizer.decode(list(request.continuation)),
    )


def texts_of(tokenizer: ChosenTokenizer, question: MemoryQuestion) -> list[str]:
    """The whole text of each choice."""
    return ["".join(text_of(tokenizer, choice)) for choice in question.choices]


@each_tokenizer
def test_recall(tokenizer: ChosenTokenizer) -> None:
    questions = recall_questions(tokenizer, LENGTH, max_questions=20)
    assert len({question.choices for question in questions}) == len(questions)
    answers = Counter()
    for question in questions:
        pairs, length = map(int, re.fullmatch(r"recall/pairs(\d+)/length(\d+)", question.parts[1]).groups())
        assert question.parts[0] == "recall"
        assert question.possible == pairs
        assert length - 30 < max(len(choice.input()) for choice in question.choices) <= length
        texts = texts_of(tokenizer, question)
        assert len({text.rpartition("=")[0] for text in texts}) == 1
        *lines, _ = texts[0].splitlines()
        ast.parse("\n".join(lines))
        assigned = [match.groups() for line in lines if (match := re.fullmatch(r"([a-z]{4}) = ([a-z]{4})", line))]
        values = dict(assigned)
        assert len(values) == len(assigned) == pairs
        assert len({*values, *values.values()}) == 2 * pairs
        asked = [re.fullmatch(r"([a-z]{4}) = ([a-z]{4})\n", text.splitlines(keepends=True)[-1]) for text in texts]
        (name,) = {match[1] for match in asked}
        chosen = [match[2] for match in asked]
        assert len(chosen) == len({*chosen}) == min(pairs, 16)
        assert {*chosen} <= {*values.values()}
        assert chosen[question.answer] == values[name]
        assert len(re.findall(rf"\b{name}\b", "\n".join(lines))) == 1
        assert len(re.findall(rf"\b{values[name]}\b", "\n".join(lines))) == 1
        answers[question.answer / len(chosen) < 0.5] += 1
    assert min(answers.values()) > 0.3 * len(questions)  # the right one's place says nothing


def test_recall_of_what_fits() -> None:
    parts = {n: {q.parts[1] for q in recall_questions(TOKENIZERS["words"], n, 3)} for n in (127, 128, 1024)}
    assert parts[127] == set()
    assert parts[128] == {"recall/pairs4/length128", "recall/pairs16/length128"}  # 64 pairs have over 256 tokens
    assert parts[1024] == {
        *(f"recall/pairs{pairs}/length{length}" for pairs in (4, 16) for length in (128, 256, 512, 1024)),
        *(f"recall/pairs64/length{length}" for length in (512, 1024)),
    }


@each_tokenizer
def test_copying(tokenizer: ChosenTokenizer) -> None:
    questions = copying_questions(tokenizer, LENGTH, max_questions=10)
    assert Counter(question.parts for question in questions) == {
        ("copying", f"copying/length{length}"): 10 for length in (16, 32, 64, 128, 256)
    }
    drawn: set[int] = set()
    for question in questions:
        (request,) = question.choices
        length = int(question.parts[1].removeprefix("copying/length"))
        start, *tokens = request.context + request.continuation
        assert start == tokenizer.eos_token_id
        assert len(request.continuation) == length - 1
        assert tokens[:length] == tokens[length:]
        assert len({*tokens}) == length
        assert len(request.input()) == 2 * length
        drawn |= {*tokens}
    special = {tokenizer.tokenizer.token_to_id(token) for token in (END_OF_TEXT, PADDING)}
    assert drawn == {*range(tokenizer.vocab_size)} - special
    assert questions[0].possible == len(drawn)


def test_copying_of_what_fits() -> None:
    lengths = [q.parts[1] for q in copying_questions(TOKENIZERS["words"], 127, 1)]
    assert lengths == ["copying/length16", "copying/length32"]
    few = train_bpe(["x"], 258)
    assert few.vocab_size == 258
    assert len(copying_questions(few, 1024, 1)) == 5
    few.tokenizer.add_tokens(["an added token"])
    assert copying_questions(few, 1024, 1)[-1].possible == 256


@each_tokenizer
def test_facts(tokenizer: ChosenTokenizer) -> None:
    pattern = re.compile(r'birthplace\["(\w+)"\] = "(\w+)"\n')
    written = dict(match for document in make_documents(make_facts()) for match in pattern.findall(document))
    exposures = {fact.name: fact.exposures for fact in make_facts()}
    questions = fact_questions(tokenizer, LENGTH)
    asked, seen = Counter(), Counter()
    for question in questions:
        matches = [pattern.fullmatch(text) for text in texts_of(tokenizer, question)]
        (name,) = {match[1] for match in matches}
        values = [match[2] for match in matches]
        assert len(values) == len({*values}) == 16
        assert {*values} <= {*written.values()}
        assert question.possible == len({*written.values()}) == 64
        if name in written:  # those that are stated seldom may not have this form
            assert values[question.answer] == written[name]
        seen[name in written] += 1
        number = exposures[name]
        assert question.parts == (("facts",) if number else ()) + (f"facts/exposures{number}",)
        asked[number] += 1
    assert asked == dict.fromkeys((0, 1, 2, 4, 8, 16, 32, 64, 128), 256)
    assert seen[True] > 6 * 256
    places = Counter(question.answer for question in questions)
    assert min(places[place] for place in range(16)) > 90  # 144 are expected


@each_tokenizer
def test_tokens_are_those_of_the_training(tokenizer: ChosenTokenizer) -> None:
    """Also where one of them lies across the border between context and answer: for all choices the same."""
    crossing = 0
    for question in fact_questions(tokenizer, LENGTH, 10):
        assert len({choice.context for choice in question.choices}) == 1
        for choice in question.choices:
            context, continuation = text_of(tokenizer, choice)
            tokens = tokenizer.tokenizer.encode(context + continuation).ids
            assert choice.context[1:] + choice.continuation == tuple(tokens)
            assert continuation.endswith('"\n')
            crossing += '"' in continuation[:-2]
    assert (crossing > 0) == (tokenizer.name == "across words")


def test_facts_without_room() -> None:
    tokenizer = TOKENIZERS["words"]
    longest = max(len(choice.input()) for question in fact_questions(tokenizer, 512) for choice in question.choices)
    assert len(fact_questions(tokenizer, longest)) == 9 * 256
    assert fact_questions(tokenizer, longest - 1) == []


@pytest.mark.parametrize("make", MAKERS)
def test_questions_are_always_the_same(make: Any) -> None:
    tokenizer = TOKENIZERS["words"]
    questions = make(tokenizer, LENGTH, 20)
    assert questions == make(tokenizer, LENGTH, 20)
    # Fewer are the first of each part, and longer contexts leave the others alone.
    by_part, fewer = defaultdict(list), defaultdict(list)
    for question in questions:
        by_part[question.parts].append(question)
    for question in make(tokenizer, 2 * LENGTH, 7):
        fewer[question.parts].append(question)
    assert all(fewer[part] == found[:7] for part, found in by_part.items())


class Oracle:
    """A model that knows the right answers, or the wrong ones, token by token.

    Args:
        answers: contexts with what it is to say after them.
        vocab_size: of the logits.
    """

    device = torch.device("cpu")

    def __init__(self, answers: Sequence[Request], vocab_size: int) -> None:
        self.vocab_size, self.next = vocab_size, {}
        for answer in answers:
            tokens = answer.context + answer.continuation
            for place in range(len(answer.context), len(tokens)):
                self.next[tokens[:place]] = tokens[place]

    def __call__(self, tokens: Tensor, logits_to_keep: Tensor) -> Tensor:
        logits = torch.zeros(*logits_to_keep.shape, self.vocab_size)
        for row, places in enumerate(logits_to_keep.tolist()):
            for column, place in enumerate(places):
                known = self.next.get(tuple(tokens[row, : place + 1].tolist()))
                if known is not None:
                    logits[row, column, known] = 20.0
        return logits


def ask(model: object, questions: Sequence[MemoryQuestion]) -> dict[str, TaskResult]:
    """Results by name."""
    task = MemoryTask(questions)
    results = task.results(score(cast(MemoryTransformer, model), task.requests))
    by_name = {result.name: result for result in results}
    assert len(by_name) == len(results)
    return by_name


@pytest.mark.parametrize("make", MAKERS)
@each_tokenizer
def test_a_model_that_knows_the_answers(make: Any, tokenizer: ChosenTokenizer) -> None:
    questions = make(tokenizer, LENGTH, 3)
    right = Oracle([question.choices[question.answer] for question in questions], tokenizer.vocab_size)
    results = ask(right, questions)
    assert {result.value for result in results.values()} == {1.0}
    assert {result.standard_error for result in results.values()} == {0.0}
    names = {part for question in questions for part in question.parts}
    if make is not copying_questions:
        names |= {f"{name}/exact" for name in names}
    assert {*results} == names
    wrong = Oracle([question.choices[question.answer - 1] for question in questions], tokenizer.vocab_size)
    expected = {1.0} if make is copying_questions else {0.0}
    assert {result.value for result in ask(wrong, questions).values()} == expected


def test_means_and_errors() -> None:
    request = Request((0,), (5, 6, 7, 8))
    copy = [MemoryQuestion(("copying", f"copying/length{i}"), (request,), 0, possible=10) for i in (5, 5, 9)]
    results = MemoryTask(copy).results([Score(-1.0, 4), Score(-1.0, 2), Score(-1.0, 0)])
    assert {r.metric for r in results} == {"token accuracy"}
    assert [(r.name, r.questions) for r in results] == [("copying", 3), ("copying/length5", 2), ("copying/length9", 1)]
    assert [r.value for r in results] == pytest.approx([0.5, 0.75, 0.0])
    assert [r.standard_error for r in results] == pytest.approx([(2 * 0.25**2) ** 0.5 / 3, 0.25 / 2**0.5, 0.0])
    assert [r.chance for r in results] == pytest.approx([0.1] * 3)

    choices = [MemoryQuestion(("facts",), (request,) * 4, answer, possible=8) for answer in (2, 0)]
    scores = [Score(-9.0, 1), Score(-8.0, 4), Score(-7.0, 3), Score(-8.0, 4)] * 2
    accuracy, exact = MemoryTask(choices).results(scores)
    assert (accuracy.name, accuracy.metric, accuracy.value, accuracy.chance) == ("facts", "accuracy", 0.5, 0.25)
    assert (exact.name, exact.metric, exact.value, exact.chance) == ("facts/exact", "exact match", 0.0, 0.125)


def test_a_model_that_knows_nothing_guesses() -> None:
    tokenizer = TOKENIZERS["words"]
    model = ModelConfig(d_model=16, num_blocks=1, num_heads=2, feed_forward_size=16, vocab_size=512).build()
    model.init_weights(max_seq_len=128)
    model.eval()
    questions = [question for make in MAKERS for question in make(tokenizer, 128, 50)]
    results = ask(model, questions)
    for name in ("recall", "facts", "facts/exposures0"):
        found = results[name]
        spread = (found.chance * (1 - found.chance) / found.questions) ** 0.5
        assert abs(found.value - found.chance) < 4 * spread, name
    assert results["recall/pairs4/length128"].chance == 1 / 4
    assert results["recall/pairs16/length128"].chance == 1 / 16
    assert results["facts"].chance == 1 / 16
    assert results["copying"].value < 0.02


def test_a_model_that_was_trained_with_facts_knows_them() -> None:
    facts = make_facts(per_exposure=16, exposures=(0, 32), num_values=16, seed=1)
    documents = make_documents(facts)
    tokenizer = train_bpe(documents, 400)
    torch.manual_seed(0)
    model = ModelConfig(d_model=64, num_blocks=2, num_heads=2, feed_forward_size=128, vocab_size=400).build()
    model.init_weights(max_seq_len=256)
    encoded = [torch.tensor([0, *encoding.ids]) for encoding in tokenizer.tokenizer.encode_batch(documents)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        rows = Random(step).sample(encoded, 8)
        tokens = pad_sequence(rows, batch_first=True)
        labels = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=-100)
        cross_entropy(model(tokens[:, :-1]).flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    results = ask(model.eval(), fact_questions(tokenizer, 128, facts=facts))
    assert results["facts"].value > 0.9
    assert results["facts/exposures0"].value < 0.4
