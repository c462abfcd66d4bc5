"""A layer's grid of keys, made ready once for many searches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class GridSizes(NamedTuple):
    """How large a search is.

    Attributes:
        num_keys: keys of each axis.
        k: cells to choose for each head.
        axis_k: candidates of each axis, at most `num_keys`; their grid has `k` cells or more.
        rank: products of queries and keys in a score.
        heads: searches for each token, each with keys of its own.
    """

    num_keys: int
    k: int
    axis_k: int
    rank: int
    heads: int


@dataclass(frozen=True)
class Grid:
    """Keys, and what gives the cells of their grid scores and table rows. None of it depends on a token.

    Attributes:
        keys: (2, rank, heads, num_keys or more, key_dim), row and column keys, with all gains; contiguous. Those from
            `num_keys` on are padding.
        sizes: of the search.
        query_steps: the query of an axis, a rank and a head has the number `axis * a + rank * r + head * h`.
        norm_eps: queries are divided by the root of their mean square and this; None: they are taken as they are.
        cores: (cores, heads, rank, rank), in float32 or wider, for Tucker scores, which are the reads' scores. None:
            cells are sums of a row and a column score, and the reads' scores a softmax over them; then the rank is 1.
        u, t: (heads, rank), as the cores: weights of the ranks by which rows and columns are ranked.
        shuffle: (num_keys ** 2,), int64, the virtual row of each cell; None: its own number, `row * num_keys + column`.
        window_start, window_rows, table_rows: a virtual row is a row of the window after division by `window_rows`,
            which begins at the table's row `window_start` and may wrap around at the table's end.
        separate_copies: whether the virtual copies, the quotients of that division, are wanted.
    """

    keys: Tensor
    sizes: GridSizes
    query_steps: tuple[int, int, int]
    norm_eps: float | None
    cores: Tensor | None
    u: Tensor | None
    t: Tensor | None
    shuffle: Tensor | None
    window_start: int
    window_rows: int
    table_rows: int
    separate_copies: bool
