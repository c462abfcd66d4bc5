"""Weighted sums of rows of a large table."""

from torch import Tensor

from ultramem.ops.backend import HAS_KERNELS, takes_kernels
from ultramem.ops.weighted_lookup import bags, naive
from ultramem.ops.weighted_lookup.reads import Reads

if HAS_KERNELS:
    from ultramem.ops.weighted_lookup import fused


def weighted_lookup(reads: Reads, values: Tensor, pre_values: Tensor | None = None) -> Tensor:
    """Each token's sum of its rows' values, weighted by its scores and its products with the pre-values.

    Autograd makes a gradient as large as the table for each call; where several lookups read one table in a pass, a
    `TrainableTable` makes one for all.

    Row numbers must be those of the table. Plain PyTorch raises an IndexError for others on a CPU; kernels read beyond
    the table, as to look at numbers first would make them wait. Memory layers make only numbers that are right, also
    of scores that are not finite, and check the permutation that they use when it is loaded.

    Args:
        reads: which rows, and what weighs them.
        values: (table_rows, value_dim), where value_dim is a multiple of the number of cores.
        pre_values: (table_rows, pre_value_dim), same dtype, with `reads.pre_input`.

    Returns:
        (tokens, value_dim), or with `reads.virtual_copies` (tokens, num_virtual_copies * value_dim), the copies' sums
        side by side; in the values' dtype, from kernels under autocast in autocast's.

    Raises:
        UltraMemError: the backend is `fused`, and there is no kernel for the arguments.
    """
    if takes_kernels("weighted_lookup", HAS_KERNELS and fused.supports(reads, values, pre_values)):
        return fused.weighted_lookup(reads, values, pre_values)
    if takes_kernels("weighted_lookup", bags.supports(reads, values, pre_values)):
        return bags.weighted_lookup(reads, bags.Source(values), None if pre_values is None else bags.Source(pre_values))
    return naive.weighted_lookup(reads, values, pre_values)
