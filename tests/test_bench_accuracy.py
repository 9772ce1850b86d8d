"""What the benchmarks of accuracy and of quantisers measure."""

import pytest
import torch
from bench_cases import CPU

from moefp8 import MXFP8, dequantize_mx, quantize_mx
from moefp8.bench import accumulation, candidates, quantize, timing


def test_operands_of_the_bias_are_exact_in_every_format() -> None:
    x = accumulation._representable(96, 64, torch.Generator().manual_seed(0))
    assert (x > 0).float().mean() > 0.99
    for axis in (0, 1):
        for group in (32, -1):
            q = quantize_mx(x, axis, group=group)
            assert torch.equal(dequantize_mx(q), x)
        assert (x.amax(axis) == 448).all()  # so the scale of a row, amax / 448, is 1


def test_bias_sees_a_short_sum() -> None:
    """A product that loses a quarter of everything has a bias of -25 %; this library's has none.

    float32 sums of n positive terms err by at most n 2^-24, here 64 terms; each of the results is then
    rounded to bfloat16, at most 2^-8 of it either way (half an ulp of 8 bits).
    """

    def short(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        return 0.75 * torch._grouped_mm(a, b, offs=offs)

    lossy = candidates.Candidate("lossy", lambda case: candidates.differentiable(short, case))
    both = [lossy, *candidates.ours({"mxfp8": MXFP8}, None)]
    rows = accumulation.measure_bias(both, 64, 32, timing.Timer(CPU), lambda: None)
    bound = 64 * 2**-24 + 2**-8
    assert [row.product for row in rows[::2]] == ["fwd", "dgrad", "wgrad"]
    for row in rows:
        want = -0.25 if row.candidate == "lossy" else 0.0
        # 0.75 rounds a second time.
        assert abs(row.value - want) <= 2 * bound


def test_sqnr() -> None:
    assert accumulation.sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(20.0)


@pytest.mark.parametrize("name", list(accumulation.DISTRIBUTIONS))
def test_distributions_are_finite_and_drawn_from_the_generator(name: str) -> None:
    draw = accumulation.DISTRIBUTIONS[name]
    first, again = (draw((64, 128), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.isfinite().all()


def test_bytes_of_a_quantiser() -> None:
    inputs = quantize.Inputs(
        torch.zeros(64, 32), torch.zeros(64, 48), torch.zeros(2, 48, 32), torch.tensor([32, 64])
    )
    bytes_of = {q.name: q.bytes_moved(inputs) for q in quantize.OURS}
    assert bytes_of["moefp8 rows of cotangent, mx"] == 64 * 48 * (2 + 1)
    assert bytes_of["moefp8 weight both ways, mx"] == 2 * 48 * 32 * 2 * (2 + 1)  # read once for each
    assert bytes_of["moefp8 reference rows, mx 32"] == 64 * 32 * (2 + 1) + 64
