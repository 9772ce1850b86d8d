"""Compile every kernel as its launcher would launch it, for a GPU that is not there.

``python tests/cross_compile.py 90 out.json`` calls both implementations and their launchers on fake CUDA
tensors. Triton is told that a card of that compute capability is active and to compile what is launched,
no more. So what is compiled are the constants, the options and the alignment that a real call gives, and
a test need not repeat them. It runs in a process of its own, since tests interpret kernels instead.

Written for each compilation: kernel, its constants, registers and stack of a thread, shared memory, and
how often each matrix, tensor-memory and bulk-copy instruction occurs in the PTX.
"""

import collections
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

INSTRUCTION = re.compile(
    r"wgmma\.mma_async[\w.]+|tcgen05\.(?:mma|cp|ld|st)[\w.:]+|cp\.async\.bulk\.tensor[\w.]+"
    r"|cvt\.rn\.satfinite\.[\w.]+"
)
#: Streaming multiprocessors, and shared memory a block may have, in bytes.
CARDS = {90: (132, 232448), 100: (148, 232448)}


class FakeDriver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def pretend(capability):
    """From here on there is one card of that capability, and operators of moefp8 are their launchers."""
    triton.runtime.driver.set_active(FakeDriver(capability))
    card = types.SimpleNamespace(multi_processor_count=CARDS[capability][0])
    torch.cuda.get_device_properties = lambda device=None: card
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    # Fake tensors have no address; torch's allocator aligns to 512 bytes.
    FakeTensor.data_ptr = lambda self: 512

    register = torch.library.custom_op

    def custom_op(name, fn=None, **options):
        if not name.startswith("moefp8::"):
            return register(name, fn, **options)

        def launcher(*args):
            return fn(*args)

        launcher.register_fake = launcher.register_vmap = lambda rule: rule
        return launcher

    torch.library.custom_op = custom_op


def resources(cubin):
    """Registers and bytes of stack of a thread. Triton keeps no arrays there: stack means spilled."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", listing.stdout).groups()
    return int(registers), int(stack)


class Recorder:
    """Stands in for launching: compiles, once for each variant, and keeps what came out."""

    def __init__(self):
        self.seen = {}
        run = JITFunction.run

        def compile_only(fn, *args, grid, warmup, **options):
            kernel = run(fn, *args, grid=grid, warmup=True, **options)
            constants = {k: str(v) for k, v in options.items()}
            self.seen.setdefault(id(kernel), (f"{fn.__module__}.{fn.__name__}", constants, kernel))
            return kernel

        JITFunction.run = compile_only

    def report(self):
        out = []
        for name, constants, kernel in self.seen.values():
            registers, stack = resources(kernel.asm["cubin"])
            out.append({
                "kernel": name.removeprefix("moefp8.kernels."),
                "constants": constants,
                "registers": registers,
                "stack": stack,
                "shared": kernel.metadata.shared,
                "instructions": collections.Counter(INSTRUCTION.findall(kernel.asm["ptx"])),
            })  # fmt: skip
        return out


def kernels():
    """Name of every kernel of the package: what Triton compiles and is called ``..._kernel``."""
    import moefp8.kernels

    names = []
    for module in pkgutil.iter_modules(moefp8.kernels.__path__, "moefp8.kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if (
                isinstance(value, JITFunction)
                and name.endswith("_kernel")
                and value.__module__ == module.name
            ):
                names.append(f"{module.name}.{name}".removeprefix("moefp8.kernels."))
    return sorted(names)


def products(implementation, recipe, *, bias=False, out_dtype=torch.bfloat16):
    """Forward and backward of one grouped product at the main shape of the published benchmarks."""
    m, n, k, groups = 128000, 8192, 5120, 8
    a, g = torch.empty(m, k, dtype=torch.bfloat16), torch.empty(m, n, dtype=torch.bfloat16)
    b = torch.empty(groups, n, k, dtype=torch.bfloat16).mT
    offs = torch.empty(groups, dtype=torch.int32)
    added = torch.empty(groups, n, dtype=torch.bfloat16) if bias else None
    _, kept = implementation.rows_forward(a, b, offs, added, recipe, out_dtype)
    implementation.rows_backward(
        kept, a, b, offs, g, recipe, (True, True), (torch.bfloat16, out_dtype)
    )  # fmt: skip
    if bias:
        implementation.group_sum(g, offs)


def feed_forward(implementation, recipe):
    """Forward and backward of the experts, 16 of them, D = 2048 and H = 1408."""
    from moefp8.kernels.gathered import Gathered

    tokens, d, h, groups = 16384, 2048, 1408, 16
    x, offs = torch.empty(tokens, d, dtype=torch.bfloat16), torch.empty(groups, dtype=torch.int32)
    shapes = ((groups, h, d), (groups, d, h), (groups, h, d))
    weights = tuple(torch.empty(shape, dtype=torch.bfloat16) for shape in shapes)
    none = (None, None, None)
    copy, scores = torch.empty(2 * tokens, dtype=torch.int64), torch.empty(tokens, 2)
    rows = Gathered(x, copy, copy, 2, scores)
    _, kept = implementation.ffn_forward(rows, weights, none, offs, recipe, None)
    needed = (*(True,) * 4, *(False,) * 3, True)
    implementation.ffn_backward(kept, rows, weights, none, offs, rows, recipe, needed)


def routed():
    """The weighted sum over the two rows of each token, the transpose and gradients; SwiGLU in one pass."""
    from moefp8.kernels import combine_gpu, swiglu_gpu

    y, slot = torch.empty(8192, 2048, dtype=torch.bfloat16), torch.empty(8192, dtype=torch.int64)
    weights = torch.empty(4096, 2)
    combine_gpu.combine(y, slot, weights, 2)
    x = torch.empty(4096, 2048, dtype=torch.bfloat16)
    combine_gpu.spread(x, slot, weights, 2)
    combine_gpu.row_dots(y, slot, x, 2)
    combine_gpu.swiglu_dots(x, x, x)
    swiglu_gpu.swiglu(x, x)
    swiglu_gpu.swiglu_backward(x, x, x)


def launch_everything(capability):
    from moefp8 import BF16, FP8_ROWWISE, MXFP8, MXFP8_EXACT
    from moefp8.kernels import gemm, sm90, sm100
    from moefp8.kernels.fake_quantize import fake_quantize
    from moefp8.kernels.high_precision import high_precision_rows
    from moefp8.kernels.plan import plan
    from moefp8.kernels.quantize_blocks import quantize_blocks
    from moefp8.kernels.quantize_rows import quantize_rows
    from moefp8.kernels.swizzle import swizzle_rows

    rows, offs = torch.empty(4096, 160, dtype=torch.bfloat16), torch.empty(8, dtype=torch.int32)
    layout = plan(offs, 4096, 128)
    if capability == 90:
        for span, axis in ((64, -2), (128, -1), (160, -1), (128, -2), (256, -2)):
            fake_quantize(rows, offs, layout, axis, MXFP8_EXACT.fwd._replace(group=span))
        products(sm90.IMPLEMENTATION, MXFP8, bias=True)
        products(sm90.IMPLEMENTATION, MXFP8, out_dtype=torch.float32)
        unpromoted = MXFP8.fwd._replace(promote=2**20)
        wide = MXFP8.wgrad._replace(dtype=torch.float8_e5m2)
        products(sm90.IMPLEMENTATION, MXFP8._replace(fwd=unpromoted, wgrad=wide))
        products(sm90.IMPLEMENTATION, MXFP8_EXACT)
        quantize_blocks(rows, layout, MXFP8.fwd, MXFP8.fwd)
        quantize_rows(torch.empty(4096, 5120), layout, MXFP8.fwd, column_amax=True)
        feed_forward(sm90.IMPLEMENTATION, MXFP8)
        gemm.HOPPER_UNAVAILABLE = "for this test"  # from here on the portable kernel
    else:
        products(sm100.IMPLEMENTATION, MXFP8, bias=True)
        products(sm100.IMPLEMENTATION, MXFP8, out_dtype=torch.float32)
        products(sm100.IMPLEMENTATION, FP8_ROWWISE)
        for span in (32, 64):
            fake_quantize(rows, offs, layout, -1, MXFP8_EXACT.fwd._replace(group=span))
        high_precision_rows(rows, torch.empty(8, 160, 64, dtype=torch.bfloat16), offs)
    products(sm90.IMPLEMENTATION, BF16, bias=True)
    swizzle_rows(rows.to(torch.uint8), layout)
    feed_forward(sm90.IMPLEMENTATION, MXFP8)
    routed()


def main(capability, path):
    pretend(capability)
    recorder = Recorder()
    with FakeTensorMode(), torch.device("cuda"):
        launch_everything(capability)
    with Path(path).open("w") as file:
        json.dump({"kernels": kernels(), "compiled": recorder.report()}, file)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1: nothing would be compiled")
    main(int(sys.argv[1]), sys.argv[2])
