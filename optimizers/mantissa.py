"""bf16 weights that lose nothing: the model has the upper 16 bits of each fp32 weight, the optimizer the lower 16.

modded-nanogpt #57. Forward and backward pass read bf16 without a cast, and gradients are bf16 on the wire; the update acts
on fp32 weights, put together for its duration.
"""

import torch
from torch import Tensor, nn

from engine.spec import UsageError
from optimizers.average import Averaged
from optimizers.base import Chain, parts
from optimizers.schedule_free import ScheduleFree


def halves(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> its upper 16 bits as bf16 (rounded towards zero), its lower 16 bits as int16."""
    bits = weight.view(torch.int32)
    low = bits & 0xFFFF
    return (bits >> 16).to(torch.int16).view(torch.bfloat16), torch.where(low > 0x7FFF, low - 0x10000, low).to(torch.int16)


def whole(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 that `halves` took apart."""
    return ((high.view(torch.int16).to(torch.int32) << 16) | (low.to(torch.int32) & 0xFFFF)).view(torch.float32)


def to_bf16(weights: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Make fp32 weights bf16, in place; returns the lower halves, which `keep_mantissas` wants."""
    lower = {}
    for p in weights:
        p.data, lower[p] = halves(p.data)
    return lower


def keep_mantissas(optimizer: torch.optim.Optimizer, lower: dict[nn.Parameter, Tensor]) -> Chain:
    """Let a fresh `optimizer` update bf16 weights and their `lower` halves as the fp32 weights that they form. In its groups an
    fp32 stand-in, without memory except in a step, takes the place of each weight (a weight that changed its type would lose
    DistributedDataParallel's hooks). The lower halves lie in the state, as `mantissa`. Returned as a chain, whose
    load_state_dict keeps the types of saved state. Raises UsageError: the optimizer evaluates other weights than it trains."""
    if isinstance(optimizer, Averaged) or any(isinstance(part, ScheduleFree) for part in parts(optimizer)):
        raise UsageError("--weights bf16 knows no averages: use --weights fp32")
    optimizer = optimizer if isinstance(optimizer, Chain) else Chain(optimizer)
    for part in optimizer.parts:
        stands_for = {}
        for group in part.param_groups:
            for i, p in enumerate(group["params"]):
                if p in lower:
                    group["params"][i] = stand_in = nn.Parameter(nothing(p.shape, p.device))
                    stands_for[stand_in] = p
                    optimizer.state[stand_in]["mantissa"] = lower[p]

        def lift(part, args, kwargs, stands_for=stands_for) -> None:
            for stand_in, p in stands_for.items():
                stand_in.data = whole(p.data, part.state[stand_in].pop("mantissa"))
                stand_in.grad = None if p.grad is None else p.grad.float()

        def lay(part, args, kwargs, stands_for=stands_for) -> None:
            for stand_in, p in stands_for.items():
                high, part.state[stand_in]["mantissa"] = halves(stand_in.data)
                p.data.copy_(high)
                stand_in.data, stand_in.grad = nothing(p.shape, p.device), None

        part.register_step_pre_hook(lift)
        part.register_step_post_hook(lay)
    return optimizer


def nothing(shape: torch.Size, device: torch.device) -> Tensor:
    """An fp32 tensor of that shape which takes no memory."""
    return torch.zeros((), device=device).expand(shape)
