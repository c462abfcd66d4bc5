"""Counting what a memory layer reads, for its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ultramem.ops.weighted_lookup.reads import Reads

if TYPE_CHECKING:
    from ultramem.layers.memory_layer import MemoryLayer


class ReadCounter:
    """What one memory layer read and returned in training mode since the last report, for every `every`-th token.

    Nothing here waits for a GPU. A compiler takes all of it into its program, and a CUDA graph can hold it.
    """

    def __init__(self, window_rows: int, device: torch.device | str, every: int = 1) -> None:
        self._every = every
        self._reads = torch.zeros(window_rows, dtype=torch.int64, device=device)
        self._one = torch.ones((), dtype=torch.int64, device=device)
        # tokens, highest scores, lowest scores, output elements, their sum, the sum of their squares
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)

    @torch.no_grad()
    def observe(self, layer: MemoryLayer, reads: Reads, output: Tensor) -> None:
        """Add one forward pass; see `ReadObserver`."""
        if layer.training:
            self.count(reads.rows[:: self._every] - layer.window_start, layer.table.rows)
            self.summarise(reads.scores[:: self._every], output[:: self._every])

    def count(self, in_window: Tensor, table_rows: int) -> None:
        """Add reads (tokens, k) of rows, counted from the window's start; below zero is beyond the table's end."""
        flat = torch.where(in_window < 0, in_window + table_rows, in_window).flatten()
        self._reads.scatter_add_(0, flat, self._one.expand_as(flat))

    def summarise(self, scores: Tensor, output: Tensor) -> None:
        """Add scores (tokens, k, cores) and the layer's output (tokens, d_model)."""
        mean_scores, flat = scores.float().mean(-1), output.float()
        tokens, elements = (torch.full_like(self._sums[0], count) for count in (output.shape[0], flat.numel()))
        sums = mean_scores.amax(1).sum(), mean_scores.amin(1).sum(), flat.sum(), flat.square().sum()
        top, last, total, squares = (part.double() for part in sums)
        self._sums += torch.stack([tokens, top, last, elements, total, squares])

    def metrics(self) -> dict[str, Tensor]:
        """Scalars: share of rows read, KL divergence of the reads from uniform (nats), output std, mean scores.

        With `torch.distributed` the counts of all processes are added up: a collective call.
        """
        reads, sums = _summed(self._reads), _summed(self._sums)
        tokens, top, last, elements, total, squares = sums.unbind()
        share = reads.double() / reads.sum().clamp(min=1)
        mean = total / elements.clamp(min=1)
        variance = (squares / elements.clamp(min=1) - mean.square()).clamp(min=0)
        return {
            "rows read": (reads > 0).double().mean(),
            "KL from uniform": torch.special.xlogy(share, share * share.numel()).sum(),
            "output std": variance.sqrt(),
            "top score": top / tokens.clamp(min=1),
            "last score": last / tokens.clamp(min=1),
        }

    def reset(self) -> None:
        """Start counting anew."""
        self._reads.zero_()
        self._sums.zero_()


def _summed(counts: Tensor) -> Tensor:
    """The sum over all processes; each keeps its own counts for the next report."""
    counts = counts.clone()
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts
