"""Machine code for cards that are not there: every kernel compiles, uses the tensor core, spills nothing.

``cross_compile.py`` compiles in a process of its own for each architecture; both run at once.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

SCRIPT = Path(__file__).with_name("cross_compile.py")
ARCHITECTURES = (90, 100)

#: Kernels that do not run on an architecture, and why. All others are compiled for both.
ELSEWHERE = {
    (90, "gemm_scaled._scaled_kernel"): "Hopper has no block scales",
    (100, "gemm_hopper._gemm_kernel"): "wgmma is Hopper's alone",
}

#: Bytes of stack a thread may use, and why; none, for all kernels that are not named.
SPILLS: dict[tuple[int, str], tuple[int, str]] = {}

#: Instructions that a kernel is made of, and must contain.
INSTRUCTIONS = {
    (90, "gemm_hopper._gemm_kernel"): ("wgmma.mma_async.sync.aligned.m64n128k32.f32.e",),  # e4m3 or e5m2
    (100, "gemm_scaled._scaled_kernel"): (
        "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale",
        "tcgen05.cp.cta_group::1.warpx4.32x128b",  # scales: shared to tensor memory, in the order they lie
        "cp.async.bulk.tensor.5d.shared",  # and by TMA to shared memory before
    ),
}

#: Quantisers, which convert two numbers an instruction.
QUANTISERS = [
    "fake_quantize._fake_quantize_kernel",
    "fake_quantize_blocks._fake_quantize_blocks_kernel",
    "quantize_blocks._quantize_blocks_kernel",
    "quantize_columns._quantize_columns_kernel",
    "quantize_rows._quantize_rows_kernel",
    "swiglu_backward_columns._swiglu_backward_columns_kernel",
    "swiglu_backward_rows._swiglu_backward_rows_kernel",
    "swiglu_rows._swiglu_rows_kernel",
]

#: Shared memory a thread block may have on either card, bytes.
SHARED = 232448


class Compiled(NamedTuple):
    """What one process reports: all kernels there are, and the variants it compiled."""

    kernels: list[str]
    variants: list[dict]

    def of(self, kernel):
        return [x for x in self.variants if x["kernel"] == kernel]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Both architectures, compiled from nothing, once for all workers of a parallel run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cross"
    done = folder / "done"
    try:
        folder.mkdir()
    except FileExistsError:  # another worker is at it
        patience = time.monotonic() + 600
        while not done.exists():
            assert time.monotonic() < patience, "the worker that compiles does not come to an end"
            time.sleep(0.2)
    else:
        try:
            compile_all(folder)
        finally:
            done.touch()
    out = {}
    for architecture in ARCHITECTURES:
        report = folder / f"{architecture}.json"
        assert report.exists(), (folder / f"{architecture}.log").read_text()[-4000:]
        found = json.loads(report.read_text())
        out[architecture] = Compiled(found["kernels"], found["compiled"])
    return out


def compile_all(folder):
    running = []
    for architecture in ARCHITECTURES:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {
            "TRITON_CACHE_DIR": str(folder / f"cache{architecture}"),
            "PYTHONPATH": str(SCRIPT.parents[1]),
            "PYTHONWARNINGS": "ignore",
        }
        report = folder / f"{architecture}.json"
        with (folder / f"{architecture}.log").open("w") as log:
            command = [sys.executable, str(SCRIPT), str(architecture), str(report)]
            running.append((subprocess.Popen(command, env=environment, stdout=log, stderr=log), report))
    for process, report in running:
        if process.wait(timeout=500) != 0:
            report.unlink(missing_ok=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_of_the_package_compiles(architecture, compiled):
    """A new kernel is launched in ``cross_compile.py``, or named in ELSEWHERE with a reason."""
    every = compiled[architecture].kernels
    assert len(every) >= 15
    missing = {name for name in every if not compiled[architecture].of(name)}
    assert missing == {name for where, name in ELSEWHERE if where == architecture}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills_but_what_the_table_allows(architecture, compiled):
    found = {}
    for variant in compiled[architecture].variants:
        name = variant["kernel"]
        found[name] = max(found.get(name, 0), variant["stack"])
    allowed = {name: limit for (where, name), (limit, _) in SPILLS.items() if where == architecture}
    excess = {name: stack for name, stack in found.items() if stack > allowed.get(name, 0)}
    assert not excess
    assert all(found[name] > 0 for name in allowed), "the table allows what is no longer needed"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_memory_fits(architecture, compiled):
    for variant in compiled[architecture].variants:
        assert variant["shared"] <= SHARED, variant


@pytest.mark.parametrize(("architecture", "kernel"), INSTRUCTIONS)
def test_products_run_on_the_tensor_core(architecture, kernel, compiled):
    variants = compiled[architecture].of(kernel)
    assert variants
    for variant in variants:
        for wanted in INSTRUCTIONS[architecture, kernel]:
            assert any(name.startswith(wanted) for name in variant["instructions"]), (wanted, variant)


def test_the_hopper_product_multiplies_either_format(compiled):
    """E5M2 operands, as recipes give gradients: another instruction, nothing else."""
    names = {n for v in compiled[90].of("gemm_hopper._gemm_kernel") for n in v["instructions"]}
    for element in ("e4m3", "e5m2"):
        assert f"wgmma.mma_async.sync.aligned.m64n128k32.f32.{element}.{element}" in names


@pytest.mark.parametrize(
    ("architecture", "fp8", "bf16"),
    [
        (
            90,
            "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3",
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
        ),
        (100, "tcgen05.mma.cta_group::1.kind::f8f6f4", "tcgen05.mma.cta_group::1.kind::f16"),
    ],
)
def test_the_portable_product_multiplies_either_width(architecture, fp8, bf16, compiled):
    variants = compiled[architecture].of("gemm_portable._portable_kernel")
    for variant in variants:
        wanted = fp8 if variant["constants"]["SCALED"] == "True" else bf16
        assert any(name.startswith(wanted) for name in variant["instructions"]), (wanted, variant)
    assert {variant["constants"]["SCALED"] for variant in variants} == {"True", "False"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", QUANTISERS)
def test_quantisers_convert_in_hardware(architecture, kernel, compiled):
    variants = compiled[architecture].of(kernel)
    assert variants
    for variant in variants:
        assert any(name.startswith("cvt.rn.satfinite.e") for name in variant["instructions"]), variant
