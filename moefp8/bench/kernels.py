"""Where the kernels of this library run."""

from importlib.util import find_spec

import torch


def no_kernels(device: torch.device) -> str | None:
    """Why this library's Hopper kernels do not run on ``device``, or None."""
    if find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return (
            None if capability[0] == 9 else f"needs a Hopper GPU, this has compute capability {capability}"
        )
    import triton

    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    return f"needs a Hopper GPU, not {device.type} (TRITON_INTERPRET=1 runs the kernels on a CPU)"
