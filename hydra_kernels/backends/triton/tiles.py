"""In which order the programs of a product take its blocks."""

import triton
import triton.language as tl


@triton.jit
def tile_of(pid, num_rows, num_cols, GROUP: tl.constexpr):
    """(row, column) of a block: GROUP rows by all columns, and so on, so that what the programs in
    flight read stays in L2."""
    width = GROUP * num_cols
    first = pid // width * GROUP
    group = tl.minimum(num_rows - first, GROUP)
    return first + pid % width % group, pid % width // group
