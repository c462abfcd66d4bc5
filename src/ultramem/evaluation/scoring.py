"""Scoring continuations of contexts by their log-likelihood, for evaluation tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import get_rank, get_world_size
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from ultramem.device import autocast
from ultramem.errors import UltraMemError
from ultramem.hosts.olmo_core.model import MemoryTransformer

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Request:
    """A context and a continuation, each of at least one token."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __post_init__(self) -> None:
        if not (self.context and self.continuation):
            raise UltraMemError(
                "a context or a continuation has no tokens; the tokenizer cannot write this task's text"
            )

    def input(self, context_length: int | None = None) -> tuple[int, ...]:
        """Tokens that the model reads: all but the last, at most `context_length`.

        A context that is too long is cut on the left, to at least one token; the continuation is never cut.
        """
        kept = self.context
        if context_length is not None:
            kept = kept[-max(1, context_length + 1 - len(self.continuation)) :]
        return kept + self.continuation[:-1]


@dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation, in nats, and how many of its tokens are the most probable at their places."""

    log_likelihood: float
    matches: int


@torch.no_grad()  # in training, tensors of inference mode that stay in caches would break the next step
def score(
    model: MemoryTransformer,
    requests: Sequence[Request],
    *,
    context_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    on_tokens: Callable[[int], object] | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[Score]:
    """Score requests by a model in evaluation mode, the longest first, in batches of similar length.

    Args:
        context_length: maximum number of tokens that the model reads, such as its training sequence length; see
            `Request.input`. None for no limit.
        batch_tokens: maximum number of tokens per batch, including padding, unless a single request has more.
        on_tokens: called after each batch with the number of tokens read, without padding.
        group: processes that share the batches with `torch.distributed`; each gets all scores. By default all.

    Returns one score per request, in their order. Raises UltraMemError if the model's output is not finite.
    """
    lengths = [len(request.input(context_length)) for request in requests]
    batches = list(_batches(requests, lengths, batch_tokens))
    rank, processes = get_rank(group), get_world_size(group)
    found = torch.zeros(2, len(requests), dtype=torch.float64, device=model.device)
    for first in range(0, len(batches), processes):
        # FSDP needs a pass of every process each time; processes without a batch of their own repeat one.
        batch = batches[min(first + rank, len(batches) - 1)]
        scores = _score_batch(model, [requests[i] for i in batch], context_length)
        if first + rank < len(batches):
            found[:, batch] = scores
        if on_tokens is not None:
            on_tokens(sum(lengths[i] for other in batches[first : first + processes] for i in other))
    if processes > 1:
        dist.all_reduce(found, group=group)
    if not found.isfinite().all():
        raise UltraMemError(
            "the model's output is not finite, as its training diverged; use an earlier checkpoint: RUN/stepN, and for "
            "training --from-checkpoint stepN"
        )
    return [Score(log_likelihood, int(matches)) for log_likelihood, matches in found.T.tolist()]


def _batches(requests: Sequence[Request], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of at most `batch_tokens` with padding, longest first, so that memory runs out early."""
    batch: list[int] = []
    # Equally long ones are in order of their continuations, as the logits of a batch are padded to the longest.
    for i in sorted(range(len(requests)), key=lambda i: (-lengths[i], -len(requests[i].continuation))):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _score_batch(model: MemoryTransformer, requests: Sequence[Request], context_length: int | None) -> Tensor:
    """Log-likelihoods and matches, (2, batch), float64."""
    inputs = [request.input(context_length) for request in requests]
    # Padding on the right does not matter, as attention is causal.
    continuations = [torch.tensor(request.continuation) for request in requests]
    wanted = [torch.arange(len(read) - len(end), len(read)) for read, end in zip(inputs, continuations, strict=True)]
    tokens = pad_sequence([torch.tensor(read) for read in inputs], batch_first=True).to(model.device)
    targets = pad_sequence(continuations, batch_first=True, padding_value=-1).to(model.device)
    places = pad_sequence(wanted, batch_first=True).to(model.device)  # positions of the wanted logits
    with autocast(model.device):
        logits = model(tokens, logits_to_keep=places)
    losses = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    matches = logits.argmax(-1) == targets
    return torch.stack([-losses.double().view_as(targets).sum(1), matches.double().sum(1)])
