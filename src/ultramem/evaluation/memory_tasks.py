"""Memory tasks: values in the context (`recall`), the context itself (`copying`), and `facts` of the training data.

The questions are generated, and depend on the tokenizer and the context length alone. They are Python code or random
tokens, and begin like a training document, after an end-of-text token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from random import Random
from statistics import fmean, pvariance

from ultramem.data.facts import TEMPLATES, Fact, made_up_words, make_facts
from ultramem.data.tokenizers import ChosenTokenizer
from ultramem.errors import UltraMemError
from ultramem.evaluation.scoring import Request, Score
from ultramem.runs.results import TaskResult

MOST_CHOICES = 16
QUESTIONS_OF_A_PART = 100  # default for a number of pairs and length
RECALL_PAIRS = (4, 16, 64)
RECALL_LENGTHS = (128, 256, 512, 1024)
COPYING_LENGTHS = (16, 32, 64, 128, 256)
FILLER = (
    "{0} = {1}.{2}({3})\n",
    "if {0} is None: {0} = {1}\n",
    "for {0} in {1}: {2}.append({0})\n",
    "print({0}, {1})\n",
    "assert {0} in {1}\n",
    "{0} += len({1})\n",
    "from {0} import {1}\n",
    "# {0} of the {1}\n",
)
# None of these could be a made-up word.
FILLER_NAMES = "count entry field index items key length path result text value width"


@dataclass(frozen=True)
class MemoryQuestion:
    """A question to a model.

    Attributes:
        parts: names of the task and part that it counts for, such as `recall` and `recall/pairs16/length256`.
        choices: the context with each answer to choose from; a single one if there is no choice.
        answer: index of the right one.
        possible: number of possible answers, or of possible tokens; one guess in this many is right.
    """

    parts: tuple[str, ...]
    choices: tuple[Request, ...]
    answer: int
    possible: int


def recall_questions(
    tokenizer: ChosenTokenizer, context_length: int, max_questions: int | None = None
) -> list[MemoryQuestion]:
    """Multi-query associative recall (arXiv:2312.04927): which value the context assigns to a name.

    The context has 4, 16 or 64 assignments between made-up words, such as `zori = kale`, and other lines of Python
    between them, for a length of 128, 256, 512 or 1024 tokens. It ends with one of the names and ` =`. There are no
    quotes: with fewer tokens between name and value, smaller models can solve the task. The choice is among the values
    in the context, or 16 of them.

    Contexts longer than the model's `context_length`, or too short for all pairs, are left out. There are 100 questions
    per number of pairs and length, or `max_questions`.
    """
    questions: list[MemoryQuestion] = []
    for length in RECALL_LENGTHS:
        for pairs in RECALL_PAIRS if length <= context_length else ():
            random = Random(f"recall/{pairs}/{length}")
            made = [
                _recall_question(pairs, length, tokenizer, random) for _ in range(max_questions or QUESTIONS_OF_A_PART)
            ]
            fitting = [question for question in made if question is not None]
            if len(fitting) == len(made):
                questions += fitting
    return questions


def _recall_question(pairs: int, length: int, tokenizer: ChosenTokenizer, random: Random) -> MemoryQuestion | None:
    words = made_up_words(2 * pairs, random, syllables=2)
    names, values = words[:pairs], words[pairs:]
    chosen = random.sample(range(pairs), min(pairs, MOST_CHOICES))
    answer = random.randrange(len(chosen))
    endings = _requests(tokenizer, f"{names[chosen[answer]]} =", [f" {values[i]}\n" for i in chosen])
    lines = [f"{name} = {value}\n" for name, value in zip(names, values, strict=True)]
    encoded = [encoding.ids for encoding in tokenizer.encode(lines)]
    room = length - sum(map(len, encoded)) - max(len(ending.input()) for ending in endings)
    if room < 0:
        return None
    while room >= len(line := _filler(tokenizer, random)):
        encoded.insert(random.randrange(len(encoded) + 1), line)
        room -= len(line)
    before = tuple(token for line in encoded for token in line)
    choices = tuple(
        Request((tokenizer.eos_token_id, *before, *ending.context[1:]), ending.continuation) for ending in endings
    )
    return MemoryQuestion(("recall", f"recall/pairs{pairs}/length{length}"), choices, answer, possible=pairs)


def _filler(tokenizer: ChosenTokenizer, random: Random) -> list[int]:
    line = random.choice(FILLER).format(*random.sample(FILLER_NAMES.split(), 4))
    return tokenizer.encode([line])[0].ids


def copying_questions(
    tokenizer: ChosenTokenizer, context_length: int, max_questions: int | None = None
) -> list[MemoryQuestion]:
    """Copying from the context (arXiv:2402.01032): random tokens, repeated once.

    The tokens of a sequence are all different, so that each one determines the next. The first token of the repetition
    is given, as nothing else shows where it begins. The model predicts the others, each after the right ones before it.

    Special tokens and other added ones are not used. Sequences have 16, 32, 64, 128 and 256 tokens; those that do not
    fit twice in the model's `context_length`, or have more tokens than the vocabulary, are left out. There are 100
    questions per length, or `max_questions`.
    """
    added = {*tokenizer.tokenizer.get_added_tokens_decoder(), tokenizer.eos_token_id, tokenizer.pad_token_id}
    vocabulary = sorted({*tokenizer.tokenizer.get_vocab().values()} - added)
    questions = []
    for length in COPYING_LENGTHS:
        random = Random(f"copying/{length}")
        fits = 2 * length <= context_length and length <= len(vocabulary)
        for _ in range(max_questions or QUESTIONS_OF_A_PART if fits else 0):
            tokens = random.sample(vocabulary, length)
            copy = Request((tokenizer.eos_token_id, *tokens, tokens[0]), tuple(tokens[1:]))
            questions.append(
                MemoryQuestion(("copying", f"copying/length{length}"), (copy,), 0, possible=len(vocabulary))
            )
    return questions


def fact_questions(
    tokenizer: ChosenTokenizer,
    context_length: int,
    max_questions: int | None = None,
    facts: Sequence[Fact] | None = None,
) -> list[MemoryQuestion]:
    """The facts of `ultramem write-facts`, by the number of times that its documents state them.

    The context is the beginning of the first template, such as `birthplace["zorivu"] = "`. The choice is among 16 of
    the 64 values. A model trained without the documents can only guess; so can every model for facts stated 0 times.

    If a question does not fit in the model's `context_length`, there are none. There are 256 questions per number of
    exposures, or `max_questions`. `facts`, with 16 values or more, take the place of those of the command.
    """
    facts = sorted(facts or make_facts(), key=lambda fact: fact.exposures == 0)  # results of the others come first
    values = sorted({fact.value for fact in facts})
    before, after = TEMPLATES[0].split("{value}")
    questions, asked = [], dict.fromkeys((fact.exposures for fact in facts), 0)
    for fact in facts:
        if asked[fact.exposures] == max_questions:
            continue
        asked[fact.exposures] += 1
        random = Random(f"facts/{fact.name}")
        chosen = random.sample([value for value in values if value != fact.value], MOST_CHOICES - 1)
        answer = random.randrange(MOST_CHOICES)
        chosen.insert(answer, fact.value)
        choices = _requests(tokenizer, before.format(name=fact.name), [f"{value}{after}\n" for value in chosen])
        parts = ("facts", f"facts/exposures{fact.exposures}")
        questions.append(MemoryQuestion(parts if fact.exposures else parts[1:], choices, answer, possible=len(values)))
    longest = max(len(choice.input()) for question in questions for choice in question.choices)
    return questions if longest <= context_length else []


def _requests(tokenizer: ChosenTokenizer, context: str, continuations: Sequence[str]) -> tuple[Request, ...]:
    """Make a request of the context, after an end-of-text token, and each continuation.

    Context and continuation are encoded together. If a token crosses their border, all continuations begin with the
    first token that does so in any of them, as their probabilities can be compared only after the same tokens.
    """
    texts = [context + continuation for continuation in continuations]
    encodings = tokenizer.encode(texts)
    border = min(sum(end <= len(context) for _, end in encoding.offsets) for encoding in encodings)
    while len({tuple(encoding.ids[:border]) for encoding in encodings}) > 1:
        border -= 1
    ids = [encoding.ids for encoding in encodings]
    return tuple(Request((tokenizer.eos_token_id, *own[:border]), tuple(own[border:])) for own in ids)


class MemoryTask:
    """Questions of a task, and results from a model's scores."""

    def __init__(self, questions: Sequence[MemoryQuestion]) -> None:
        self.questions = questions
        self.requests = [choice for question in questions for choice in question.choices]

    def results(self, scores: Sequence[Score]) -> list[TaskResult]:
        """Results of the task and its parts from the scores of the requests, in their order.

        Questions with choices have two metrics: `accuracy`, the share whose right answer is the most probable choice,
        and `exact match`, the share that greedy decoding answers right. Others have `token accuracy`, the share of
        tokens that are the most probable ones.
        """
        # By result and part: values, and those of guessing.
        outcomes: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        remaining = iter(scores)
        for question in self.questions:
            found = [next(remaining) for _ in question.choices]
            right = found[question.answer].matches / len(question.choices[question.answer].continuation)
            most_probable = max(range(len(found)), key=lambda i: found[i].log_likelihood)
            part = question.parts[-1]
            for name in question.parts:
                if len(found) == 1:
                    outcomes[name, "token accuracy"][part].append((right, 1 / question.possible))
                else:
                    outcomes[name, "accuracy"][part].append((most_probable == question.answer, 1 / len(found)))
                    outcomes[f"{name}/exact", "exact match"][part].append((right == 1, 1 / question.possible))
        return [_mean(name, metric, list(parts.values())) for (name, metric), parts in outcomes.items()]


def _mean(name: str, metric: str, parts: Sequence[Sequence[tuple[float, float]]]) -> TaskResult:
    """The mean over parts. Their sizes are fixed, so that only the questions of each are random."""
    values, chances = zip(*(pair for part in parts for pair in part), strict=True)
    variance = sum(len(part) * pvariance([value for value, _ in part]) for part in parts) / len(values) ** 2
    return TaskResult(name, metric, fmean(values), sqrt(variance), questions=len(values), chance=fmean(chances))


QUESTIONS: dict[str, Callable[[ChosenTokenizer, int, int | None], list[MemoryQuestion]]] = {
    "recall": recall_questions,
    "copying": copying_questions,
    "facts": fact_questions,
}


def load(name: str, tokenizer: ChosenTokenizer, context_length: int, max_questions: int | None = None) -> MemoryTask:
    """Make one of the tasks in `QUESTIONS`. Raises UltraMemError if no question fits in the context."""
    questions = QUESTIONS[name](tokenizer, context_length, max_questions)
    if not questions:
        raise UltraMemError(
            f"task {name}: no question fits in the {context_length} tokens that the model reads at once; leave it out"
        )
    return MemoryTask(questions)
