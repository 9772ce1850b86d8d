"""The grouped FP8 GEMM for Hopper, in Gluon: one producer warp, two consumer warpgroups.

    rows         out[i] = sa[i] sb[g] (A[i] . B[g]) + bias[g]      rows i of group g; A, B along K
    contraction  out[g] = sa[g] sb[g] (A[:, t] . B[:, t])          t in segment g

A thread block owns a tile of 128 x 256 and goes on to the next until there are no more (persistent).
One warp fetches 128 of the contraction at a time through TMA into a ring of four buffers; each
consumer multiplies 64 rows of it. Hopper's accumulator keeps some 14 bits, so every product of 128
goes into a fresh one and is then added to float32 registers (``promote``). A consumer does so in two
pieces of 128 columns: 128 registers of sums and 64 of a product fit, 256 would not. While one adds,
the other keeps the tensor core busy.

Per step and block: 48 KB fetched, 2 * 128 * 256 * 128 operations, 171 operations a byte: at 1300 TFLOP/s
that is 7.6 TB/s, close to what L2 gives, so the tile's shape decides. 192 x 128 with three consumers
(154 operations a byte) is 2 to 8 % slower. Bands of eight row tiles let L2 serve most of it; without
any reuse there the card's 3 TB/s would feed 510 TFLOP/s.
Shared memory: 4 * (128 + 256) * 128 + 2 * 64 * 128 * 2 bytes = 224 KB of 227.

This is the only file that uses Gluon, whose names move between Triton releases; where it cannot be
imported, ``gemm.py`` says so and uses the portable kernel.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moefp8.kernels._tiles import Shape, bias_stride, locate, multiprocessors

#: Rows to a consumer warpgroup and number of them, columns of a piece, contraction to a step.
_ROWS, _CONSUMERS, _COLUMNS, _STEP = 64, 2, 128, 128
TILE_ROWS = _ROWS * _CONSUMERS
#: Steps in flight: four fill the shared memory that the output tile leaves.
_STAGES = 4
#: Row tiles to a band. 4, 8 and 16 are level, 32 is slower.
_BAND = 8

# Renamed after Triton 3.6, where the old names raise.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

ROWS, CONSUMERS, COLUMNS = gl.constexpr(_ROWS), gl.constexpr(_CONSUMERS), gl.constexpr(_COLUMNS)
STEP, STAGES, BAND = gl.constexpr(_STEP), gl.constexpr(_STAGES), gl.constexpr(_BAND)
TILE = gl.constexpr(TILE_ROWS)


@gluon.jit
def _produce(shape, lists, rings, a_desc, b_desc, CONTRACTION: gl.constexpr, WIDTH: gl.constexpr):
    a_ring, b_ring, full, empty = rings
    tiles, ends = lists
    step = 0
    for t in range(gl.program_id(0), shape[0] * shape[1], gl.num_programs(0)):
        _, _, a_row, b_row, a_at, b_at, steps, _, _ = locate(
            t, shape, tiles, ends, CONTRACTION, TILE, WIDTH, STEP, BAND
        )
        for k in range(steps):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), step // STAGES & 1 ^ 1)
            mbarrier.expect(full.index(slot), (TILE + WIDTH) * STEP)
            for c in gl.static_range(CONSUMERS):
                load_tile(
                    a_desc, [a_row + c * ROWS, a_at + k * STEP],
                    full.index(slot), a_ring.index(slot * CONSUMERS + c),
                )  # fmt: skip
            load_tile(b_desc, [b_row, b_at + k * STEP], full.index(slot), b_ring.index(slot))
            step += 1


@gluon.jit
def _elements(row, n, columns, c_end):
    """Offsets of a piece in the result, and which of them are in it."""
    at = gl.expand_dims(row.to(gl.int64) * columns, 1) + gl.expand_dims(n, 0)
    return at, gl.expand_dims(row < c_end, 1) & gl.expand_dims(n < columns, 0)


@gluon.jit
def _store(c, out, row, n, columns, c_end):
    at, here = _elements(row, n, columns, c_end)
    gl.store(c + at, out, mask=here)


@gluon.jit
def _multiply(rings, slot, PIECE: gl.constexpr, acc, WARPGROUP: gl.constexpr, FRESH: gl.constexpr):
    """One step's product with the columns of a piece, into ``acc`` or a fresh accumulator; it runs on."""
    a_ring, b_ring, _, _ = rings
    b = b_ring.index(slot).slice(PIECE * COLUMNS, COLUMNS, 0).permute((1, 0))
    a = a_ring.index(slot * CONSUMERS + WARPGROUP)
    return warpgroup_mma(a, b, acc, use_acc=not FRESH, is_async=True)


@gluon.jit
def _finish(
    acc, column, group, steps, c_row, c_end, shape, result, layout: gl.constexpr,
    BIAS: gl.constexpr, ADD: gl.constexpr, TMA_STORE: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """Scale a piece, add the bias and what is there already, and store it."""
    c_desc, c_tiles, c, a_scale, b_scale, bias, bias_stride = result
    num_groups, columns = shape[2], shape[4]
    across: gl.constexpr = gl.SliceLayout(0, layout)
    one_each: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    row = c_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    mine = column + gl.arange(0, COLUMNS, one_each)
    # Loaded before the products, to arrive while they run, scales cost 3 to 4 % of the speed.
    # A tile without steps multiplies nothing, and its scales may never have been written.
    sa = gl.load(a_scale + row, mask=row < gl.where(steps > 0, c_end, 0), other=0.0)
    sb = gl.load(b_scale + group * columns + mine, mask=mine < gl.where(steps > 0, columns, 0), other=0.0)
    if BIAS:
        biased = gl.where(group < num_groups, columns, 0)
        added = gl.load(bias + group * bias_stride + mine, mask=mine < biased, other=0.0)
        added = added.to(gl.float32)
    acc = acc * gl.expand_dims(sa, 1) * gl.expand_dims(gl.convert_layout(sb, across), 0)
    if BIAS:
        acc = acc + gl.expand_dims(gl.convert_layout(added, across), 0)
    out = acc.to(c.dtype.element_ty)
    if ADD:  # two roundings, as if the product had been written and then added
        at, here = _elements(row, column + gl.arange(0, COLUMNS, across), columns, c_end)
        there = gl.load(c + at, mask=here, other=0.0)
        out = (out.to(gl.float32) + there.to(gl.float32)).to(c.dtype.element_ty)
    if TMA_STORE:
        if c_row + ROWS <= c_end:
            tile = c_tiles.index(WARPGROUP)
            tma.store_wait(0)
            tile.store(out)
            fence_async_shared()
            store_tile(c_desc, [c_row, column], tile)
        else:  # the tile ends inside this warpgroup: do not write into the next group
            _store(c, out, row, column + gl.arange(0, COLUMNS, across), columns, c_end)
    else:
        _store(c, out, row, column + gl.arange(0, COLUMNS, across), columns, c_end)


@gluon.jit
def _consume(
    shape, lists, rings, result, CONTRACTION: gl.constexpr, PROMOTE: gl.constexpr, BIAS: gl.constexpr,
    ADD: gl.constexpr, TMA_STORE: gl.constexpr, WIDTH: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    tiles, ends = lists
    full, empty = rings[2], rings[3]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 32]
    )
    step = 0
    for t in range(gl.program_id(0), shape[0] * shape[1], gl.num_programs(0)):
        group, column, _, _, _, _, steps, c_row, c_end = locate(
            t, shape, tiles, ends, CONTRACTION, TILE, WIDTH, STEP, BAND
        )
        c_row = c_row + WARPGROUP * ROWS
        left = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
        right = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
        if PROMOTE == 0:  # never: one step's products behind the release of its buffer
            for k in range(steps):
                slot = step % STAGES
                mbarrier.wait(full.index(slot), step // STAGES & 1)
                left = _multiply(rings, slot, 0, left, WARPGROUP, False)
                right = _multiply(rings, slot, 1, right, WARPGROUP, False)
                left, right = warpgroup_mma_wait(2, deps=(left, right))
                if k > 0:
                    mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
                step += 1
            left, right = warpgroup_mma_wait(0, deps=(left, right))
            if steps > 0:
                mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        elif PROMOTE == 1:
            for _ in range(steps):
                slot = step % STAGES
                mbarrier.wait(full.index(slot), step // STAGES & 1)
                part = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
                part = _multiply(rings, slot, 0, part, WARPGROUP, True)
                part = warpgroup_mma_wait(0, deps=(part,))
                left = left + part
                part = _multiply(rings, slot, 1, part, WARPGROUP, True)
                part = warpgroup_mma_wait(0, deps=(part,))
                mbarrier.arrive(empty.index(slot), count=1)
                right = right + part
                step += 1
        else:  # several steps into one accumulator; the registers allow one piece
            for first in range(0, steps, PROMOTE):
                part = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
                for k in range(first, gl.minimum(first + PROMOTE, steps)):
                    slot = step % STAGES
                    mbarrier.wait(full.index(slot), step // STAGES & 1)
                    part = _multiply(rings, slot, 0, part, WARPGROUP, False)
                    part = warpgroup_mma_wait(1, deps=(part,))
                    if k > first:
                        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
                    step += 1
                part = warpgroup_mma_wait(0, deps=(part,))
                mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
                left = left + part

        if c_row < c_end:
            _finish(
                left, column, group, steps, c_row, c_end, shape, result, layout,
                BIAS, ADD, TMA_STORE, WARPGROUP,
            )  # fmt: skip
            if WIDTH > COLUMNS:
                _finish(
                    right, column + COLUMNS, group, steps, c_row, c_end, shape, result, layout,
                    BIAS, ADD, TMA_STORE, WARPGROUP,
                )  # fmt: skip
    if TMA_STORE:
        tma.store_wait(0)


@gluon.jit
def _gemm_kernel(
    a_desc, b_desc, c_desc, c, a_scale, b_scale, bias, bias_stride, tiles, ends,
    row_tiles, column_tiles, num_groups, rows, columns, length, b_rows, b_length,
    CONTRACTION: gl.constexpr, PROMOTE: gl.constexpr, BIAS: gl.constexpr, ADD: gl.constexpr,
    TMA_STORE: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES * CONSUMERS, ROWS, STEP], a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, WIDTH, STEP], b_desc.layout)
    c_tiles = gl.allocate_shared_memory(
        c_desc.dtype, [CONSUMERS if TMA_STORE else 1, ROWS, COLUMNS], c_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    shape = (row_tiles, column_tiles, num_groups, rows, columns, length, b_rows, b_length)
    lists = (tiles, ends)
    rings = (a_ring, b_ring, full, empty)
    result = (c_desc, c_tiles, c, a_scale, b_scale, bias, bias_stride)
    gl.warp_specialize(
        [
            (_consume, (shape, lists, rings, result, CONTRACTION, PROMOTE, BIAS, ADD, TMA_STORE, WIDTH, 0)),
            (_consume, (shape, lists, rings, result, CONTRACTION, PROMOTE, BIAS, ADD, TMA_STORE, WIDTH, 1)),
            (_produce, (shape, lists, rings, a_desc, b_desc, CONTRACTION, WIDTH)),
        ],
        [4, 1],
        [232, 24],
    )


#: Of tiles in shared memory, by bytes to an element of the result; made once, which takes microseconds.
_FP8 = gl.NVMMASharedLayout(128, 8)
_STORED = {2: gl.NVMMASharedLayout(128, 16), 4: gl.NVMMASharedLayout(128, 32)}


def _promotion(promote: int, length: int) -> int:
    """Steps between promotions for the kernel: 0 if ``length``, the longest contraction, has no more."""
    steps = max(promote // _STEP, 1)
    return 0 if steps > 1 and steps * _STEP >= length else steps


def launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor,
    tiles: Tensor, ends: Tensor, shape: Shape, contraction: bool, promote: int, add: bool,
) -> None:  # fmt: skip
    """Fill ``out``, or add to it; the arguments are those of ``gemm._launch``."""
    flat = out.view(-1, shape.columns)
    # A float32 output tile does not fit beside the ring: it is stored from registers.
    tma_store = out.itemsize == 2
    steps = _promotion(promote, a.shape[1])
    width = 2 * _COLUMNS if steps < 2 else _COLUMNS
    shape = shape._replace(column_tiles=triton.cdiv(shape.columns, width))
    grid = min(shape.row_tiles * shape.column_tiles, multiprocessors(a.device))
    _gemm_kernel[(grid,)](
        TensorDescriptor.from_tensor(a, [_ROWS, _STEP], _FP8),
        TensorDescriptor.from_tensor(b, [width, _STEP], _FP8),
        TensorDescriptor.from_tensor(flat, [_ROWS, _COLUMNS], _STORED[out.itemsize]),
        flat, a_scale, b_scale, out if bias is None else bias, bias_stride(bias), tiles, ends, *shape,
        CONTRACTION=contraction, PROMOTE=steps, BIAS=bias is not None,
        ADD=add, TMA_STORE=tma_store, WIDTH=width, num_warps=4, maxnreg=168,
        enable_fp_fusion=not add,  # a float32 product would be scaled and added in one rounding
    )  # fmt: skip
