"""How the logits are cut into tiles: one is in memory at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..options import Options
from ..rowmath import RowMath
from .products import dtype_of_products

#: Bytes of a tile if the caller gives no chunk_rows. On a GPU it is large enough for matrix
#: products at full speed, in both schedules.
ACCELERATOR_BUDGET = 128 << 20
#: On a CPU, tiles of columns stay in the cache between the product and the kernels that read them.
#: Measured on AVX2: 1 to 16 MiB take the same time, 64 MiB take 1.1 to 1.2 times as long. So more
#: is never used, even where chunk_rows allows it.
CPU_TILE = 4 << 20
#: A chunk of grad_in_forward has all columns. Each chunk converts the whole weight twice and adds
#: to the whole sum of its gradient. The more rows it has, the less that counts: measured 1.88 times
#: the bare products with 32 rows, 1.31 with 128, 1.18 with 512. This is 256 rows of 131072 columns.
CPU_CHUNK = 128 << 20
#: A tile has at least so many columns, if the vocabulary has: narrower products are slower, and
#: each tile adds a set of statistics.
COLUMNS = 1024
#: And at most so many if their part of the weight is converted before it is multiplied.
CONVERTED_COLUMNS = 4 * COLUMNS
#: Its columns are a multiple of this, so that rows of all dtypes start at multiples of 16 bytes.
MULTIPLE = 64


@dataclass(frozen=True)
class Tiling:
    """Tiles of at most `rows` x `columns` that cover `all_rows` x `all_columns`."""

    rows: int
    columns: int
    all_rows: int
    all_columns: int

    @classmethod
    def of(cls, size: int, rows: int, columns: int, widest: int) -> "Tiling":
        """Tiles of at most `size` logits and `widest` columns, as many rows high as possible.

        All rows of a tile share one read of its part of the weight, and a tile with all rows
        completes its part of the weight's gradient.
        """
        wide = max(COLUMNS, size // max(rows, 1) // MULTIPLE * MULTIPLE)
        wide = max(1, min(wide, columns, size, widest))
        return cls(max(1, min(rows, size // wide)), wide, rows, columns)

    def columns_of_tiles(self) -> Iterator[slice]:
        return slices(self.all_columns, self.columns)

    def rows_of_tiles(self) -> Iterator[slice]:
        return slices(self.all_rows, self.rows)

    @property
    def tiles_per_row(self) -> int:
        return -(-self.all_columns // self.columns)

    @property
    def whole_height(self) -> bool:
        """Whether a tile has all rows."""
        return self.rows >= self.all_rows


def size_of(chunk_rows: int | None, columns: int, hidden: Tensor, one_pass: bool = False) -> int:
    """Logits of a tile: at most as many as `chunk_rows` rows of `columns` have."""
    on_cpu = hidden.device.type == "cpu"
    budget = (CPU_CHUNK if one_pass else CPU_TILE) if on_cpu else ACCELERATOR_BUDGET
    size = budget // dtype_of_products(hidden).itemsize
    if chunk_rows is None:
        return size
    asked = chunk_rows * columns
    return min(asked, size) if on_cpu and not one_pass else asked


def chunk_height(chunk_rows: int | None, columns: int, hidden: Tensor) -> int:
    """Rows of a chunk with all `columns`: `chunk_rows`, or what the budget allows."""
    return chunk_rows or max(1, size_of(None, columns, hidden, one_pass=True) // columns)


def columns_everywhere(columns: int, options: Options, math: RowMath, ranks: int) -> int:
    """Columns of a shard, the same number on every rank: that of equal shards if they are uneven.

    The ranks exchange statistics chunk by chunk, so their chunks must have the same rows.
    """
    uneven = ranks > 1 and options.vocab_start is not None
    return -(-math.vocab_size // ranks) if uneven else columns


def slices(end: int, step: int) -> Iterator[slice]:
    for begin in range(0, end, step):
        yield slice(begin, min(begin + step, end))
