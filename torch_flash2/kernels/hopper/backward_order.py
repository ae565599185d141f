"""Additions to dQ's sums in one order, so that equal calls give equal bits: a tile of keys is added to a tile of rows
after the tile of keys that follows it.

M query rows, N keys. Tiles of keys are claimed in that order too, each head's from its last one on. So what a program
waits for is claimed, and by a program that waits only for what was claimed before: the first of all never waits.
The warpgroup that adds dQ's products looks at barriers in shared memory alone. A warp beside it looks, ahead of it,
whether the following tile of keys was added; another one waits until additions have arrived, and says so. With these
waits in the warpgroup itself a call took 1.1 to 1.3 times as long (H200, 2026-11-21).
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .backward_pipeline import KeyPlace, advance, filled, free_key_task, freed, get_key_task, key_task
from .backward_sums import sums_number
from .pipeline import FIELDS, barriers, field

# Behind a KeyTask's numbers: what `added_before` gives.
BEFORE = gl.constexpr(FIELDS.value)
# How many turns the warps that keep order may be apart.
TURNS = gl.constexpr(4)


class Additions(NamedTuple):
    """For each tile of sums the number of the tile of keys that was added last; and of TURNS turns, with barriers as a
    ring has them, that it is this program's turn (filled), that its additions are under way (made), and that they have
    arrived (free)."""

    added: Any
    filled: Any
    made: Any
    free: Any


@gluon.jit
def additions_to(added):
    """Of a kernel."""
    return Additions(added, barriers(TURNS, 1), barriers(TURNS, 1), barriers(TURNS, 1))


@gluon.jit
def added_before(place, spans, sizes, rules, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr,
                 BOTTOM_RIGHT: gl.constexpr, STEPS: gl.constexpr):  # fmt: skip
    """The first row that the tile of keys after the one at a place visits: rows from there on that this one visits
    are visited by that one too, for where rows start and stop only grows with the key."""
    beyond = KeyPlace(place.n0 + BLOCK_N, place.h, place.b, place.batch, place.start, place.stored, place.used)
    task, _, _ = key_task(beyond, spans, sizes, rules, BLOCK_N, BLOCK_M, BOTTOM_RIGHT, False, STEPS)
    return gl.where(task.count > 0, task.start, 0x7FFFFFFF)


@gluon.jit
def await_turn(additions, j):
    """Wait until the j-th tile of rows may be added to."""
    filled(additions, j, TURNS)


@gluon.jit
def end_turn(additions, j):
    """Additions to the j-th tile of rows are under way."""
    mbarrier.arrive(additions.made.index(j % TURNS))


@gluon.jit
def keep_order(SAYS: gl.constexpr, tasks, rule, SHAPE: gl.constexpr):
    """A warp: it lets the warpgroup beside it add to one tile of rows after the other, or SAYS what is added."""
    turn = gl.to_tensor(0)
    at = gl.to_tensor(0)
    going = gl.to_tensor(1)
    while going > 0:
        task = get_key_task(tasks, turn, SHAPE.TASKS, 1)
        if task.count >= 0:
            _keep_order(SAYS, at, turn % SHAPE.TASKS, task, tasks, rule, SHAPE)
        going, at = free_key_task(tasks, turn, at, rule.sizes.group, SHAPE.TASKS, 1)
        turn += 1


@gluon.jit
def _keep_order(SAYS: gl.constexpr, first, slot, task, tasks, rule, SHAPE: gl.constexpr):
    """The same for one task, from the first-th turn on."""
    BLOCK_M: gl.constexpr = SHAPE.BLOCK
    # Tiles of keys, counted from 1.
    number = task.n0 // (64 * SHAPE.GROUPS) + 1
    before = field(tasks, slot * 16 + BEFORE, 1)
    additions = rule.additions
    h = task.h * rule.sizes.group
    i = task.count * 0
    for j in range(first, first + task.count * rule.sizes.group):
        tile = task.start // BLOCK_M + i
        place = additions.added + sums_number(h, tile, task, rule, BLOCK_M)
        if SAYS:
            mbarrier.wait(additions.made.index(j % TURNS), (j // TURNS) & 1)
            _say(place, number)
            mbarrier.arrive(additions.free.index(j % TURNS))
        else:
            freed(additions, j, TURNS)
            if tile * BLOCK_M >= before:
                _await(place, number + 1)
            mbarrier.arrive(additions.filled.index(j % TURNS))
        h, i = advance(h, i, task, SHAPE)


@gluon.jit
def _await(place, number):
    """Wait (one warp) until there is a number in a place."""
    ASM: gl.constexpr = (
        "{ .reg .pred p; .reg .b32 v; AGAIN: ld.acquire.gpu.global.u32 v, [$1]; setp.ne.u32 p, v, $2;"
        " @p bra AGAIN; mov.u32 $0, 0; }"
    )
    gl.inline_asm_elementwise(
        ASM, "=r,l,r", [place.to(gl.int64, bitcast=True), number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _say(place, number):
    """Write a number to a place (one warp), after all that this program has added."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    ASM: gl.constexpr = "{ .reg .pred p; setp.eq.u32 p, $3, 0; @p st.release.gpu.global.u32 [$1], $2; mov.u32 $0, 0; }"
    at = place.to(gl.int64, bitcast=True)
    gl.inline_asm_elementwise(ASM, "=r,l,r,r", [at, number, lane], dtype=gl.int32, is_pure=False, pack=1)
