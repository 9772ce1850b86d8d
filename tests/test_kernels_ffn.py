"""The kernels of the fused feed-forward beside their twins, see ``test_kernels.py``: equal bits."""

import pytest
import torch
import triton
import triton.language as tl
from specs import LAYOUTS
from test_kernels import DEVICES, FORMATS, LONG, ODD_LAYOUTS, draw, same_bits

from moefp8.kernels import (
    REGISTRY,
    _pieces,
    _swiglu,
    ffn,
    plan,
    quantize_columns,
    sm90,
    swiglu_backward_columns,
    swiglu_backward_rows,
    swiglu_gpu,
    swiglu_rows,
)
from moefp8.kernels.ffn import compose
from moefp8.kernels.gathered import Gathered
from moefp8.recipe import PRESETS, Gemm

pytestmark = [
    # The interpreter computes with NumPy, which warns of what NaN and infinities do in float32.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


# --- the arithmetic --------------------------------------------------------------------------------


@triton.jit
def _arithmetic_kernel(
    gate, up, cotangent, sigmoid, out_sigmoid, out, size,
    DTYPE: tl.constexpr, EXACT: tl.constexpr, HARDWARE: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    here = at < size
    g = _swiglu.load_wide(gate, at, here, HARDWARE)
    u = _swiglu.load_wide(up, at, here, HARDWARE)
    c = _swiglu.load_wide(cotangent, at, here, HARDWARE)
    s = _swiglu.sigmoid_at(g, sigmoid, at, here, EXACT, HARDWARE)
    tl.store(out_sigmoid + at, s, mask=here)
    tl.store(out + at, _swiglu.hidden_of(g, u, s, DTYPE, HARDWARE), mask=here)
    tl.store(out + size + at, _swiglu.d_gate_of(g, u, c, s, DTYPE, HARDWARE), mask=here)
    tl.store(out + 2 * size + at, _swiglu.d_up_of(g, c, s, DTYPE, HARDWARE), mask=here)


def arithmetic(gate, up, cotangent, *, exact):
    """Sigmoid (float32), hidden and the gradients of gate and up, by a kernel and by torch."""
    sigmoid = torch.empty(gate.numel(), device=gate.device)
    got = torch.empty(3, gate.numel(), dtype=gate.dtype, device=gate.device)
    hardware = gate.device.type == "cuda"
    dtype = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[gate.dtype]
    _arithmetic_kernel[(triton.cdiv(gate.numel(), 1024),)](
        gate, up, cotangent, _swiglu.sigmoid_for(gate), sigmoid, got, gate.numel(),
        DTYPE=dtype, EXACT=exact, HARDWARE=hardware, ELEMENTS=1024, enable_fp_fusion=False,
    )  # fmt: skip
    values = ffn.swiglu(gate, up), *ffn.swiglu_backward(gate, up, cotangent)
    return [sigmoid, *got], [gate.float().sigmoid(), *values]


def all_numbers(dtype, device):
    """Every number of 16 bits, or for float32 each of those and its neighbours."""
    codes = torch.arange(-(2**15), 2**15, device=device)
    if dtype != torch.float32:
        return codes.to(torch.int16).view(dtype)
    return (
        ((codes[:, None] << 16) + torch.arange(-2, 3, device=device)).to(torch.int32).view(dtype).flatten()
    )


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic(dtype, exact, device):
    """Every gate, against random numbers; without ``exact`` where it is not steep."""
    gate = all_numbers(dtype, device)
    up, cotangent = (draw(gate.shape, device, dtype=dtype, seed=i) for i in (1, 2))
    got, want = arithmetic(gate, up, cotangent, exact=exact)
    valid = torch.ones_like(gate, dtype=torch.bool)
    if not exact:
        valid &= ~(gate < _swiglu.STEEP.value)
    for x, y in zip(got, want, strict=True):
        same_bits(x[valid], y[valid])
        assert torch.equal(x[valid].signbit() | x[valid].isnan(), y[valid].signbit() | y[valid].isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_in_one_pass(dtype, device):
    """For feed-forwards that do not quantise: every gate, steep ones included."""
    gate = all_numbers(dtype, device)
    up, cotangent = (draw(gate.shape, device, dtype=dtype, seed=i) for i in (1, 2))
    same_bits(swiglu_gpu.swiglu(gate, up), ffn.swiglu(gate, up))
    got, want = (f.swiglu_backward(gate, up, cotangent) for f in (swiglu_gpu, ffn))
    for x, y in zip(got, want, strict=True):
        same_bits(x, y)


@pytest.mark.gpu
def test_sigmoid_of_every_float32():
    for start in range(-(2**31), 2**31, 2**26):
        gate = torch.arange(start, start + 2**26, device="cuda").to(torch.int32).view(torch.float32)
        got, want = arithmetic(gate, gate, gate, exact=True)
        same_bits(got[0], want[0])


@triton.jit
def _steep_kernel(gates, out, ROWS: tl.constexpr, LANES: tl.constexpr, HARDWARE: tl.constexpr):
    # One gate of each program among harmless ones, on either side of a pair.
    at = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    gate = tl.load(gates + tl.program_id(0))
    largest = _swiglu.steepness(tl.zeros((ROWS, LANES), gate.dtype))
    for odd in tl.static_range(2):
        found = tl.where(at == LANES + 6 + odd, gate, tl.where(at == 3, 100.0, -1.0).to(gate.dtype))
        now = _pieces.larger(largest, _swiglu.steepness(found), HARDWARE)
        tl.store(out + 2 * tl.program_id(0) + odd, _swiglu.any_steep(now, gate.dtype).to(tl.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_steep_gates_are_found(dtype, device):
    steep = torch.tensor(_swiglu.STEEP.value, dtype=dtype, device=device)
    up, down = (torch.nextafter(steep, steep.new_tensor(x)) for x in (0, -torch.inf))
    others = (-88, -1000, -torch.inf, 0, 87, 1000, torch.inf, -0.0, -1e-7)
    gates = torch.stack([up, steep, down, *(steep.new_tensor(x) for x in others)])
    out = torch.full((len(gates), 2), -1, dtype=torch.int32, device=device)
    _steep_kernel[(len(gates),)](gates, out, ROWS=2, LANES=64, HARDWARE=device == "cuda")
    assert torch.equal(out, (gates < steep).to(torch.int32)[:, None].expand(-1, 2))


# --- the kernels -----------------------------------------------------------------------------------


def operands(rows, columns, device, *, dtype=torch.bfloat16, poison=0, steep=False):
    """Gate, up and the cotangent of hidden."""
    gate, up, cotangent = (
        draw((rows, columns), device, dtype=dtype, poison=poison if i == 1 else 0, seed=i) for i in range(3)
    )
    gate = gate.clamp(-80, 80)
    if steep and gate.numel():  # where the sigmoid is subnormal, and where it is zero
        gate.view(-1)[:: 7 * columns // 5] = -88
        gate.view(-1)[:: 11 * columns // 5] = -120
        cotangent.view(-1)[:: 7 * columns // 5] *= 2.0**30
    return gate, up, cotangent


def check_rows(got, want, offs):
    used = int(offs[-1])
    same_bits(got.data[:used], want.data[:used])
    same_bits(got.scale[:used], want.scale[:used])
    same_bits(got.column_amax, want.column_amax)
    same_bits(got.poisoned, want.poisoned)


def check_all(gate, up, cotangent, offs, gemm):
    where = plan.plan(offs, gate.shape[0], 128)
    hidden = swiglu_rows.swiglu_rows(gate, up, where, gemm, column_amax=True)
    check_rows(hidden, swiglu_rows.reference(gate, up, offs, gemm), offs)
    rows = swiglu_backward_rows.swiglu_backward_rows(gate, up, cotangent, where, gemm, column_amax=True)
    wanted = swiglu_backward_rows.reference(gate, up, cotangent, offs, gemm)
    for got, want in zip(rows, wanted, strict=True):
        check_rows(got, want, offs)

    end, filled = int(where.ends[-1]), torch.diff(offs, prepend=offs.new_zeros(1)) > 0
    columns = swiglu_backward_columns.swiglu_backward_columns(
        gate, up, cotangent, where, *rows, hidden, gemm
    )
    wanted = swiglu_backward_columns.reference(gate, up, cotangent, offs, *rows, hidden, gemm)
    for (data, scale), (want_data, want_scale) in zip(columns, wanted, strict=True):
        assert data.shape == want_data.shape
        same_bits(data[:, :end], want_data[:, :end])
        same_bits(scale[filled], want_scale[filled])


CASES = [  # (layout, format, dtype, poison, steep)
    ("unaligned", "mx", torch.bfloat16, 0, False),
    ("tail", "row", torch.bfloat16, 3, False),
    ("empty groups", "e5m2", torch.float16, 0, True),
    ("single row", "floor", torch.float32, 0, False),
    ("no rows", "mx", torch.bfloat16, 0, False),
    ("long", "mx", torch.bfloat16, 3, False),
]
EVERY_CASE = [
    (x.name, name, torch.bfloat16, poison, poison > 0)
    for x in LAYOUTS
    for name in FORMATS
    for poison in (0, 5)
]


@pytest.mark.parametrize(
    ("device", "layout", "gemm_format", "dtype", "poison", "steep"),
    [("cpu", *case) for case in CASES]
    + [pytest.param("cuda", *case, marks=pytest.mark.gpu) for case in CASES + EVERY_CASE],
)
def test_swiglu_kernels(device, layout, gemm_format, dtype, poison, steep):
    layout = next(x for x in (*LAYOUTS, LONG) if x.name == layout)
    tensors = operands(layout.rows, 80, device, dtype=dtype, poison=poison, steep=steep)
    check_all(*tensors, layout.offs(device), FORMATS[gemm_format])


LENGTHS = [pytest.param("cuda", n, marks=pytest.mark.gpu) for n in (16, 768, 1408, 2048, 5120, 8192, 16400)]


@pytest.mark.parametrize(("device", "columns"), [("cpu", 16), ("cpu", 1408), *LENGTHS])
def test_row_lengths(columns, device):
    """Every tiling, and a poisoned element at each end of a row."""
    rows = 500 if device == "cuda" else 2
    gate, up, cotangent = operands(rows, columns, device, steep=device == "cuda")
    up[0, 0], up[rows - 1, -1] = float("nan"), float("inf")
    offs = torch.tensor([rows // 3, rows], dtype=torch.int32, device=device)
    check_all(gate, up, cotangent, offs, Gemm())


def test_columns_are_those_of_the_separate_quantiser(device):
    """The kernel, not its twin: the fused copy of hidden is what ``quantize_columns`` makes of it."""
    offs = ODD_LAYOUTS[0].offs(device)
    gate, up, cotangent = operands(int(offs[-1]), 48, device)
    where = plan.plan(offs, gate.shape[0], 128)
    hidden = swiglu_rows.swiglu_rows(gate, up, where, Gemm(), column_amax=True)
    rows = swiglu_backward_rows.swiglu_backward_rows(gate, up, cotangent, where, Gemm(), column_amax=True)
    *_, (data, scale) = swiglu_backward_columns.swiglu_backward_columns(
        gate, up, cotangent, where, *rows, hidden, Gemm()
    )
    want = quantize_columns.quantize_columns(ffn.swiglu(gate, up), where, hidden, Gemm())
    end = int(where.ends[-1])
    same_bits(data[:, :end], want[0][:, :end])
    same_bits(scale, want[1])


# --- the whole feed-forward ------------------------------------------------------------------------

COMPOSED = compose(sm90.rows_forward, sm90.rows_backward, sm90.group_sum)
FUSED = REGISTRY["triton"]
EVERY = (True,) * 8


def feed_forward(
    implementation, layout, recipe, device, *,
    needed=EVERY, top_k=0, scored="", prepared=False, order="",
):  # fmt: skip
    """Output and gradients; weights named in ``order`` lie transposed in memory, rows are gathered if
    ``top_k`` > 0."""
    dim, hidden, groups = 32, 48, len(layout.sizes)
    shapes = ((hidden, dim), (dim, hidden), (hidden, dim))
    weights = [draw((groups, *shape), device, seed=i) for i, shape in enumerate(shapes)]
    weights = [w.mT.contiguous().mT if str(i + 1) in order else w for i, w in enumerate(weights)]
    biases = [draw((groups, shape[0]), device, seed=i) for i, shape in enumerate(shapes)]
    generator = torch.Generator().manual_seed(0)
    if top_k:
        top_k = top_k if layout.rows % top_k == 0 else 1
        tokens = layout.rows // top_k
        slot = torch.randperm(tokens * top_k, generator=generator).to(device)
        scores = torch.rand(tokens, top_k, generator=generator).to(device)
        how = slot.argsort(), slot, top_k
        # On one side or the other, as layers have them, but here with top_k on both.
        x = Gathered(draw((tokens, dim), device), *how, scores if scored != "output" else None)
        g = Gathered(draw((tokens, dim), device, seed=9), *how, scores if scored != "input" else None)
    else:
        x, g = (Gathered(draw((layout.rows, dim), device, seed=seed)) for seed in (0, 9))
    copies = [FUSED.quantize_weights(w, recipe) for w in weights] if prepared else None
    common = (x, weights, biases, layout.offs(device))
    out, kept = implementation.ffn_forward(*common, recipe, copies)
    needed = (*needed[:7], needed[7] and g.scores is not None)
    dx, *rest = implementation.ffn_backward(kept, *common, g, recipe, needed)
    return out, *((None, None) if dx is None else dx), *rest


WHOLE = [  # (layout, preset, options)
    ("tail", "mxfp8", {"top_k": 3, "order": "13"}),
    (
        "single row",
        "fp8_rowwise",
        {"prepared": True, "needed": (True, False, True, False, False, True, False, False)},
    ),
]
EVERY_WHOLE = [
    *((x.name, "mxfp8", {"top_k": 2}) for x in LAYOUTS),
    *(("tail", "fp8_rowwise", {"top_k": 2, "scored": side}) for side in ("input", "output")),
    *(("tail", name, {"prepared": True, "order": "2"}) for name in ("mxfp8", "fp8_rowwise")),
    *(("unaligned", "mxfp8", {"top_k": 2, "needed": tuple(i == j for j in range(8))}) for i in range(8)),
    *(("unaligned", "mxfp8", {"top_k": 2, "needed": tuple(i != j for j in range(8))}) for i in range(8)),
]


@pytest.mark.parametrize(
    ("device", "layout", "preset", "options"),
    [("cpu", *case) for case in WHOLE]
    + [pytest.param("cuda", *case, marks=pytest.mark.gpu) for case in WHOLE + EVERY_WHOLE],
)
def test_fused_is_composed(device, layout, preset, options):
    """Bit for bit, and None exactly where a gradient is not needed."""
    layout, recipe = next(x for x in LAYOUTS if x.name == layout), PRESETS[preset]
    composed = FUSED._replace(ffn_forward=COMPOSED.forward, ffn_backward=COMPOSED.backward)
    got, want = (feed_forward(x, layout, recipe, device, **options) for x in (FUSED, composed))
    x_needed, *others, scores_needed = options.get("needed", EVERY)
    gathered, side = bool(options.get("top_k")), options.get("scored")
    on_input = x_needed and gathered and side != "output"
    on_output = scores_needed and gathered and side != "input"
    for needed, x, y in zip((True, x_needed, on_input, *others, on_output), got, want, strict=True):
        assert (x is not None) == (y is not None) == needed
        if needed:
            assert x.dtype == y.dtype
            assert x.shape == y.shape
            same_bits(x, y)
