"""Where a program works and how it loads rows: shared by the portable kernels, forward and backward.

B segments, H query heads, M query rows, N keys, D head dim. A "place" of a tensor is (batch, head, start): where its
segment begins.
"""

import triton
import triton.language as tl

from ..bundles import PagedRows, Sizes


@triton.jit
def decoded(number):
    """The number behind `bundles.coded`."""
    return (number - 3) // 2


@triton.jit
def sizes_of(coded):
    """The sizes behind a launch's `Sizes.coded`."""
    return Sizes(decoded(coded.B), decoded(coded.H), decoded(coded.group), decoded(coded.M), decoded(coded.N))


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
def _count_segments(cu, B, tile, BLOCK: tl.constexpr):
    """As find_segment, by counting: no load waits for another. Not for Gluon, which wants a layout for each tensor."""
    count = 0
    for first in range(0, B + 1, 128):
        b = first + tl.arange(0, 128)
        start = tl.load(cu + b, mask=b <= B, other=0) // BLOCK + b
        count += tl.sum(((b <= B) & (start <= tile)).to(tl.int32), 0)
    return tl.maximum(count - 1, 0)


@triton.jit
def locate(pid, cu, B, heads, length, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Tile, head and segment of a program. LAST_FIRST: of rows, the last tiles are the longest under a causal mask.

    Neighbours share a head, and its keys; where packed, they share a tile: then the last programs to start are the
    shortest of the last document in all heads, and not all tiles of all documents in the last head.
    """
    tiles = tile_count(cu, B, length, BLOCK)
    if cu is None:
        tile = pid % tiles
        head = pid // tiles % heads
        b = pid // tiles // heads
    else:
        tile = pid // heads
        head = pid % heads
    if LAST_FIRST:
        tile = tiles - 1 - tile
    if cu is not None:
        b = _count_segments(cu, B, tile, BLOCK)
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
def load_rows(
    rows, row, limit, CHECK: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
    column=0, EVEN: tl.constexpr = False,
):  # fmt: skip
    """Columns column .. column + COLS of rows row .. row + BLOCK of a segment, [BLOCK, COLS]; columns past the tensor's
    are 0, and rows past limit where CHECK."""
    x = rows.x
    r = tl.arange(0, BLOCK)
    if isinstance(x, tl.tensor_descriptor):
        tile = x.load([rows.batch, rows.head, rows.start + row, column]).reshape(BLOCK, COLS)
        if CHECK:
            tile = tl.where((row + r < limit)[:, None], tile, 0.0)
    else:
        c = column + tl.arange(0, COLS)
        if WIDE:
            at = base_of(rows, row) + r.to(tl.int64)[:, None] * x.row + c.to(tl.int64)[None, :] * x.col
        else:
            at = base_of(rows, row) + r[:, None] * x.row + c[None, :] * x.col
        if EVEN and CHECK:
            tile = tl.load(at, mask=(row + r < limit)[:, None], other=0.0)
        elif EVEN:
            tile = tl.load(at)
        else:
            inside = (c < x.cols)[None, :]
            if CHECK:
                inside = (row + r < limit)[:, None] & inside
            tile = tl.load(at, mask=inside, other=0.0)
    return tile


@triton.jit
def load_pieces(
    rows, row, limit, CHECK: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, MODE: tl.constexpr
):  # fmt: skip
    """load_rows of WIDTH columns, as a tuple of pieces of at most MODE.PIECE columns."""
    COLS: tl.constexpr = min(WIDTH, MODE.PIECE)
    pieces = ()
    for i in tl.static_range(WIDTH // COLS):
        pieces = pieces + (load_rows(rows, row, limit, CHECK, BLOCK, COLS, MODE.WIDE, i * COLS, MODE.EVEN),)
    return pieces


@triton.jit
def paged_rows(x, b, head, paging):
    """The rows of segment b where keys are paged."""
    table = paging.table + tl.cast(b, tl.int64) * decoded(paging.row)
    return PagedRows(x, table, decoded(paging.pages), head)


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
def _load_paged(rows, pages, row, limit, column, BLOCK: tl.constexpr, COLS: tl.constexpr, PAGE: tl.constexpr):
    """As load_rows, checked, of rows in the pages that `page_numbers` gave."""
    x = rows.x
    r = tl.arange(0, BLOCK)
    c = column + tl.arange(0, COLS)
    base = x.ptr + tl.cast(rows.head, tl.int64) * x.head
    if PAGE % BLOCK == 0:
        base += pages.to(tl.int64) * x.batch + tl.cast(row % PAGE, tl.int64) * x.row
        at = base + (r[:, None] * x.row + c[None, :] * x.col)
    else:
        at = (base + (pages.to(tl.int64) * x.batch + (row + r) % PAGE * x.row))[:, None] + c[None, :] * x.col
    return tl.load(at, mask=(row + r < limit)[:, None] & (c < x.cols)[None, :], other=0.0)


@triton.jit
def load_keys_of(
    rows, pages, row, limit, CHECK: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, MODE: tl.constexpr
):  # fmt: skip
    """As load_pieces, of rows in the pages that `page_numbers` gave, always checked; or as load_pieces where MODE.PAGE
    is 0."""
    if MODE.PAGE > 0:
        COLS: tl.constexpr = min(WIDTH, MODE.PIECE)
        pieces = ()
        for i in tl.static_range(WIDTH // COLS):
            pieces = pieces + (_load_paged(rows, pages, row, limit, i * COLS, BLOCK, COLS, MODE.PAGE),)
        return pieces
    else:
        return load_pieces(rows, row, limit, CHECK, BLOCK, WIDTH, MODE)


@triton.jit
def load_keys(
    rows, row, limit, CHECK: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, MODE: tl.constexpr
):  # fmt: skip
    """As load_pieces, of rows in pages where MODE.PAGE is not 0."""
    pages = page_numbers(rows, row, limit, BLOCK, MODE.PAGE)
    return load_keys_of(rows, pages, row, limit, CHECK, BLOCK, WIDTH, MODE)


@triton.jit
def load_key_columns(rows, pages, row, limit, column, BLOCK: tl.constexpr, COLS: tl.constexpr, PAGE: tl.constexpr):
    """Columns column .. column + COLS of rows row .. row + BLOCK of a segment, 0 outside, in the pages that
    `page_numbers` gave where PAGE is not 0."""
    if PAGE > 0:
        return _load_paged(rows, pages, row, limit, column, BLOCK, COLS, PAGE)
    else:
        return load_rows(rows, row, limit, True, BLOCK, COLS, True, column)


@triton.jit
def zero_pieces(BLOCK: tl.constexpr, WIDTH: tl.constexpr, MODE: tl.constexpr):
    """An fp32 accumulator [BLOCK, WIDTH] of zeros, in pieces."""
    COLS: tl.constexpr = min(WIDTH, MODE.PIECE)
    pieces = ()
    for _ in tl.static_range(WIDTH // COLS):
        pieces = pieces + (tl.zeros([BLOCK, COLS], tl.float32),)
    return pieces


@triton.jit
def dot_pieces(x, y, MODE: tl.constexpr):
    """x y^T of two tiles in pieces of columns."""
    product = tl.dot(x[0], y[0].T, input_precision=MODE.PRECISION)
    for i in tl.static_range(1, len(x)):
        product = tl.dot(x[i], y[i].T, product, input_precision=MODE.PRECISION)
    return product


@triton.jit
def dot_rows(
    x, x_row, x_limit, BLOCK_X: tl.constexpr, y, y_row, y_limit, BLOCK_Y: tl.constexpr, WIDTH: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """x y^T of rows of two segments, each loaded piece by piece right where it is used."""
    COLS: tl.constexpr = min(WIDTH, MODE.PIECE)
    product = tl.zeros([BLOCK_X, BLOCK_Y], tl.float32)
    for i in tl.static_range(WIDTH // COLS):
        left = load_rows(x, x_row, x_limit, True, BLOCK_X, COLS, MODE.WIDE, i * COLS, MODE.EVEN)
        right = load_rows(y, y_row, y_limit, True, BLOCK_Y, COLS, MODE.WIDE, i * COLS, MODE.EVEN)
        product = tl.dot(left, right.T, product, input_precision=MODE.PRECISION)
    return product


@triton.jit
def add_dot(totals, x, y, MODE: tl.constexpr):
    """totals + x y, where totals and y are in pieces of columns."""
    sums = ()
    for i in tl.static_range(len(totals)):
        sums = sums + (tl.dot(x, y[i], totals[i], input_precision=MODE.PRECISION),)
    return sums


@triton.jit
def add_dot_rows(totals, x, y, row, limit, BLOCK_Y: tl.constexpr, MODE: tl.constexpr):
    """totals + x y, where totals are in pieces, and rows y are loaded piece by piece right where they are used."""
    sums = ()
    COLS: tl.constexpr = totals[0].shape[1]
    for i in tl.static_range(len(totals)):
        right = load_rows(y, row, limit, True, BLOCK_Y, COLS, MODE.WIDE, i * COLS, MODE.EVEN)
        sums = sums + (tl.dot(x.to(right.dtype), right, totals[i], input_precision=MODE.PRECISION),)
    return sums


@triton.jit
def scale_pieces(pieces, factor):
    """Every piece times a factor that broadcasts."""
    scaled = ()
    for i in tl.static_range(len(pieces)):
        scaled = scaled + (pieces[i] * factor,)
    return scaled


@triton.jit
def keep_pieces(keep, pieces):
    """Every piece where keep, which broadcasts, else 0."""
    kept = ()
    for i in tl.static_range(len(pieces)):
        kept = kept + (tl.where(keep, pieces[i], 0.0),)
    return kept


@triton.jit
def any_nan(pieces):
    """Whether an element of a tile in pieces is NaN."""
    found = tl.max((pieces[0] != pieces[0]).to(tl.int32))
    for i in tl.static_range(1, len(pieces)):
        found = tl.maximum(found, tl.max((pieces[i] != pieces[i]).to(tl.int32)))
    return found > 0


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
def store_pieces(rows, row, limit, pieces, BLOCK: tl.constexpr):
    """Store a tile in pieces of columns as rows row .. row + BLOCK of a segment, those below limit."""
    for i in tl.static_range(len(pieces)):
        store_columns(rows, row, limit, i * pieces[i].shape[1], pieces[i], BLOCK, pieces[i].shape[1])


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
