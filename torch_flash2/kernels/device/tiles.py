"""Where a program works and how it loads rows: shared by the portable kernels, forward and backward.

B segments, H query heads, M query rows, N keys, D head dim. A "place" of a tensor is (batch, head, start): where its
segment begins.
"""

import triton
import triton.language as tl

from ..bundles import PagedRows, Sizes


@triton.jit
def sizes_of(coded):
    """The sizes behind a launch's `Sizes.coded`."""
    return Sizes((coded.B - 3) // 2, (coded.H - 3) // 2, (coded.group - 3) // 2, (coded.M - 3) // 2, (coded.N - 3) // 2)


@triton.jit
def tile_count(cu, B, length, BLOCK: tl.constexpr):
    """How many tiles of BLOCK rows the grid has for each head and (unless packed) batch entry.

    Packed: segment b owns the tiles from cu[b] // BLOCK + b on, which is always enough for it, and no length is read by
    the host; one more pseudo-segment B holds the rows after the last document.
    """
    if cu is None:
        return tl.cdiv(length, BLOCK)
    else:
        return length // BLOCK + B + 1


@triton.jit
def find_segment(cu, B, tile, BLOCK: tl.constexpr):
    """The last segment b of 0 .. B whose first tile is not after `tile`, by bisection."""
    low = 0
    high = B
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu + middle) // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def locate(pid, cu, B, heads, length, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Tile, head and segment of a program. LAST_FIRST: of rows, the last tiles are the longest under a causal mask."""
    tiles = tile_count(cu, B, length, BLOCK)
    tile = pid % tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile
    rest = pid // tiles
    head = rest % heads
    if cu is None:
        b = rest // heads
    else:
        b = find_segment(cu, B, tile, BLOCK)
        tile -= tl.load(cu + b) // BLOCK + b
    return tile, head, b


@triton.jit
def extent(b, cu, used, B, length):
    """(batch, start, stored, used): where segment b lies in the tensor, how many rows are stored there, how many count.

    Clamped to the tensor, so that no bad length reads outside it.
    """
    if cu is None:
        batch = b
        start = b * 0
        stored = length
        count = length
    else:
        batch = b * 0
        start = tl.minimum(tl.maximum(tl.load(cu + b), 0), length)
        end = tl.where(b < B, tl.load(cu + tl.minimum(b + 1, B)), length)
        stored = tl.maximum(tl.minimum(end, length) - start, 0)
        count = tl.where(b < B, stored, 0)
    if used is not None:
        count = tl.minimum(tl.maximum(tl.load(used + tl.minimum(b, B - 1)), 0), count)
    return batch, start, stored, count


@triton.jit
def load_rows(rows, row, limit, CHECK: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """Rows row .. row + BLOCK of a segment, [BLOCK, COLS]; columns past the tensor's are 0, and rows past limit where
    CHECK."""
    x = rows.x
    r = tl.arange(0, BLOCK)
    if isinstance(x, tl.tensor_descriptor):
        tile = x.load([rows.batch, rows.head, rows.start + row, 0]).reshape(BLOCK, COLS)
        if CHECK:
            tile = tl.where((row + r < limit)[:, None], tile, 0.0)
    else:
        c = tl.arange(0, COLS)
        if WIDE:
            offsets = r.to(tl.int64)[:, None] * x.row + c.to(tl.int64)[None, :] * x.col
        else:
            offsets = r[:, None] * x.row + c[None, :] * x.col
        inside = (c < x.cols)[None, :]
        if CHECK:
            inside = (row + r < limit)[:, None] & inside
        tile = tl.load(base_of(rows, row) + offsets, mask=inside, other=0.0)
    return tile


@triton.jit
def paged_rows(x, b, head, paging):
    """The rows of segment b where keys are paged."""
    table = paging.table + tl.cast(b, tl.int64) * ((paging.row - 3) // 2)
    return PagedRows(x, table, (paging.pages - 3) // 2, head)


@triton.jit
def page_numbers(rows, row, limit, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """The pages of rows row .. row + BLOCK of a segment, 0 past limit: [BLOCK], or a scalar where all lie in one page
    because row is a multiple of BLOCK. A bad number counts as the nearest. Nothing where PAGE is 0."""
    if PAGE == 0:
        return 0
    else:
        if PAGE % BLOCK == 0:
            page = tl.load(rows.table + row // PAGE, mask=row < limit, other=0)
        else:
            r = row + tl.arange(0, BLOCK)
            page = tl.load(rows.table + r // PAGE, mask=r < limit, other=0)
        return tl.minimum(tl.maximum(page, 0), rows.pages - 1)


@triton.jit
def _paged(rows, pages, row, c, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """Pointers to columns c of rows row .. row + BLOCK of a segment in pages."""
    x = rows.x
    base = x.ptr + tl.cast(rows.head, tl.int64) * x.head
    if PAGE % BLOCK == 0:
        base += pages.to(tl.int64) * x.batch + tl.cast(row % PAGE, tl.int64) * x.row
        return base + (tl.arange(0, BLOCK)[:, None] * x.row + c[None, :] * x.col)
    else:
        at = pages.to(tl.int64) * x.batch + (row + tl.arange(0, BLOCK)) % PAGE * x.row
        return (base + at)[:, None] + c[None, :] * x.col


@triton.jit
def load_keys_of(
    rows, pages, row, limit, CHECK: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr, PAGE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """As load_rows, of rows in the pages that `page_numbers` gave, always checked; or as load_rows where PAGE is 0."""
    if PAGE > 0:
        c = tl.arange(0, COLS)
        inside = (row + tl.arange(0, BLOCK) < limit)[:, None] & (c < rows.x.cols)[None, :]
        return tl.load(_paged(rows, pages, row, c, BLOCK, PAGE), mask=inside, other=0.0)
    else:
        return load_rows(rows, row, limit, CHECK, BLOCK, COLS, WIDE)


@triton.jit
def load_keys(
    rows, row, limit, CHECK: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr, PAGE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """As load_rows, of rows in pages where PAGE is not 0."""
    pages = page_numbers(rows, row, limit, BLOCK, PAGE)
    return load_keys_of(rows, pages, row, limit, CHECK, BLOCK, COLS, PAGE, WIDE)


@triton.jit
def load_key_columns(rows, row, limit, column, BLOCK: tl.constexpr, COLS: tl.constexpr, PAGE: tl.constexpr):
    """As load_columns, of rows in pages where PAGE is not 0."""
    if PAGE > 0:
        c = column + tl.arange(0, COLS)
        inside = (row + tl.arange(0, BLOCK) < limit)[:, None] & (c < rows.x.cols)[None, :]
        pages = page_numbers(rows, row, limit, BLOCK, PAGE)
        return tl.load(_paged(rows, pages, row, c, BLOCK, PAGE), mask=inside, other=0.0)
    else:
        return load_columns(rows, row, limit, column, BLOCK, COLS)


@triton.jit
def store_rows(rows, row, limit, tile, BLOCK: tl.constexpr, COLS: tl.constexpr):
    """Store [BLOCK, COLS] as rows row .. row + BLOCK of a segment, those below limit."""
    x = rows.x
    r = tl.arange(0, BLOCK)
    c = tl.arange(0, COLS)
    inside = (row + r < limit)[:, None] & (c < x.cols)[None, :]
    tl.store(
        base_of(rows, row) + (r.to(tl.int64)[:, None] * x.row + c[None, :] * x.col),
        tile.to(x.ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def load_columns(rows, row, limit, column, BLOCK: tl.constexpr, COLS: tl.constexpr):
    """Columns column .. column + COLS of rows row .. row + BLOCK of a segment, by pointer; 0 outside."""
    x = rows.x
    r = tl.arange(0, BLOCK)
    c = column + tl.arange(0, COLS)
    inside = (row + r < limit)[:, None] & (c < x.cols)[None, :]
    return tl.load(
        base_of(rows, row) + (r.to(tl.int64)[:, None] * x.row + c.to(tl.int64)[None, :] * x.col), mask=inside, other=0.0
    )


@triton.jit
def row_pointers(rows, row, BLOCK: tl.constexpr):
    """Pointers [BLOCK] to rows row .. row + BLOCK of a segment."""
    return base_of(rows, row) + tl.arange(0, BLOCK).to(tl.int64) * rows.x.row


@triton.jit
def store_columns(rows, row, limit, column, tile, BLOCK: tl.constexpr, COLS: tl.constexpr):
    """Store [BLOCK, COLS] at columns column .. column + COLS of rows row .. row + BLOCK, those below limit."""
    x = rows.x
    r = tl.arange(0, BLOCK)
    c = column + tl.arange(0, COLS)
    inside = (row + r < limit)[:, None] & (c < x.cols)[None, :]
    tl.store(
        base_of(rows, row) + (r.to(tl.int64)[:, None] * x.row + c[None, :] * x.col),
        tile.to(x.ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def base_of(rows, row):
    """Pointer to a row of a segment, in 64 bits."""
    x = rows.x
    at = tl.cast(rows.start + row, tl.int64) * x.row
    return x.ptr + (tl.cast(rows.batch, tl.int64) * x.batch + tl.cast(rows.head, tl.int64) * x.head + at)


@triton.jit
def dense_at(x, batch, head, start_m, start_n):
    """(pointer, row stride, col stride) of a [B, H, M, N] tensor at the corner of a segment."""
    at = tl.cast(batch, tl.int64) * x.batch + tl.cast(head, tl.int64) * x.head
    at += tl.cast(start_m, tl.int64) * x.row + tl.cast(start_n, tl.int64) * x.col
    return x.ptr + at, x.row, x.col


@triton.jit
def load_at(at, m, n, inside):
    """Elements (m, n) of a tensor that `dense_at` describes; 0 outside."""
    return tl.load(at[0] + (m.to(tl.int64) * at[1] + n.to(tl.int64) * at[2]), mask=inside, other=0)


@triton.jit
def finite(tile):
    """The tile with 0 in place of NaN and infinities, and where those were."""
    good = tl.abs(tile.to(tl.float32)) < float("inf")
    return tl.where(good, tile, 0.0), ~good
