"""``torch.utils.checkpoint`` under plain autograd; inside ``torch.func`` use ``moefp8.remat``."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_is_eager(case, use_reentrant):
    operands = case.operands()
    leaves = [x.clone().requires_grad_() for x in operands]
    checkpoint(case.loss, *leaves, use_reentrant=use_reentrant).backward()
    case.agree([x.grad for x in leaves], case.eager(*operands))


def test_checkpoint_keeps_no_residuals(form):
    """Nothing of the product is saved but what is passed in."""
    leaves = [x.clone().requires_grad_() for x in form.operands()]
    saved = []

    def pack(x):
        saved.append(x)
        return x

    def block(*operands):
        return form.call(*(2 * x for x in operands))

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        # Nothing is random here; otherwise the state of the GPU's generator is saved as well.
        out = checkpoint(block, *leaves, use_reentrant=False, preserve_rng_state=False)
    assert out.requires_grad
    own = {x.untyped_storage().data_ptr() for x in leaves}
    # torch 2.11 saves an empty placeholder as well.
    foreign = [
        x
        for x in saved
        if isinstance(x, torch.Tensor) and x.numel() and x.untyped_storage().data_ptr() not in own
    ]
    assert [(x.shape, x.dtype, x.device) for x in foreign] == []
