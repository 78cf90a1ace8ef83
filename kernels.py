"""Fast forms of a few operations, each beside the plain PyTorch that defines it.

Here: RMS normalisation for CPUs. PyTorch composes F.rms_norm there from about ten element-wise passes over memory,
which for small models costs more than the matrix products; this one makes three forward and five backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class CPURMSNorm(torch.autograd.Function):
    """With r = 1/rms(x), n = x r, h = g w:  dx = r (h - n mean(h n)),  dw = sum over rows of g n."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        # eps is added to the norm's square as in the reference; the norm itself is reduced in fp32
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).float()
        r = (norm.square() / x.size(-1) + eps).rsqrt().to(x.dtype)
        n = x * r
        ctx.save_for_backward(n, r, weight)
        return n if weight is None else n * weight

    @staticmethod
    def backward(ctx, g: Tensor):
        n, r, weight = ctx.saved_tensors
        h = g if weight is None else g * weight
        gn = g * n
        if weight is None:
            mean, dweight = gn.mean(-1, keepdim=True), None
        else:
            flat = gn.flatten(0, -2)
            mean = (flat @ weight / n.size(-1)).view(r.shape)  # mean(h n) = mean(w g n)
            dweight = flat.sum(0)
        return torch.addcmul(h, n, mean, value=-1).mul_(r), dweight, None


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """RMS normalisation over the last dimension of x; weight [C] in x's dtype or None.

    The reference under torch.compile (which fuses it) and on GPUs (where PyTorch has a kernel).
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return rms_norm_reference(x, weight, eps)
    return CPURMSNorm.apply(x, weight, eps)
