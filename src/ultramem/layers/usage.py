"""Counting what a memory layer reads, for its metrics."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Usage:
    """What one memory layer read and returned since the last report.

    Args:
        window_rows: rows that the layer can reach.
        device: where the counts are kept.
    """

    def __init__(self, window_rows: int, device: torch.device | str) -> None:
        self._reads = torch.zeros(window_rows, dtype=torch.int64, device=device)
        # tokens, highest scores, lowest scores, output elements, their sum, the sum of their squares
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)

    @torch.no_grad()
    def record(self, window_rows: Tensor, scores: Tensor, output: Tensor) -> None:
        """Add one forward pass.

        Args:
            window_rows: (tokens, k), rows read, counted from the window's start.
            scores: (tokens, k, cores).
            output: (tokens, d_model).
        """
        self._reads += torch.bincount(window_rows.flatten(), minlength=self._reads.numel())
        mean_scores, flat = scores.double().mean(-1), output.double()
        tokens = torch.full_like(self._sums[0], output.shape[0])
        top, last = mean_scores.amax(1).sum(), mean_scores.amin(1).sum()
        elements = torch.full_like(tokens, flat.numel())
        self._sums += torch.stack([tokens, top, last, elements, flat.sum(), flat.square().sum()])

    def metrics(self, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
        """Scalars: share of rows read, KL divergence of the reads from uniform (nats), output std, mean scores.

        Args:
            group: with `torch.distributed`, the counts of these processes are added up; by default of all.
        """
        reads, sums = _summed(self._reads, group), _summed(self._sums, group)
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


def _summed(counts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the processes of a group; each keeps its own counts for the next report."""
    counts = counts.clone()
    if dist.is_initialized():
        dist.all_reduce(counts, group=group)
    return counts
