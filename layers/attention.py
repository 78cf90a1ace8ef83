"""Causal attention: one function, four pieces of code that compute it.

    plain     written out: the reference for the others
    chunked   plain, one block of queries at a time: skips what the mask would throw away. The default on CPUs
    sdpa      PyTorch's fused attention. The default on GPUs; with a window or documents it stores the mask, T x T
    flex      FlexAttention: fused whatever the mask, and skips the blocks that it empties. The default on CUDA GPUs with
              Triton, with a window or documents. Backward on CUDA only; no dropout

Each takes q, k, v [B, H, T, D], the factor `scale` on q.k, the probability `dropout` on the attention weights, and two limits
besides causality on what a token sees:

    window      itself and the window - 1 tokens before it (arXiv 2310.06825, modded-nanogpt #13); 0: all before it. For flex
                also a 0-dim integer tensor, which torch.compile lets change without a new graph
    documents   [B, T], a number per document: only tokens of its own document (modded-nanogpt #12); None: all
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from engine.spec import UsageError
from layers import kernels


class KeyValues:
    """Keys and values of the tokens so far, for text that is continued token by token; `room` tokens at most."""

    def __init__(self, room: int):
        self.room, self.length = room, 0

    def extend(self, *new: Tensor) -> list[Tensor]:
        """Keys and values [B, T, H, D] of the next tokens -> of all tokens since `length` was 0."""
        if not self.length:
            self.kept = [x.new_empty(x.size(0), self.room, *x.shape[2:]) for x in new]
        begin, self.length = self.length, self.length + new[0].size(1)
        for kept, x in zip(self.kept, new):
            kept[:, begin : self.length] = x
        return [kept[:, : self.length] for kept in self.kept]


def visible(T: int, window: int, documents: Tensor | None, device: torch.device, past: int = 0) -> Tensor:
    """Which keys (last dimension) each query after the first `past` may see: bool [T - past, T], with documents [B, 1, ...]."""
    at = torch.arange(T, device=device)
    distance = at[past:, None] - at
    seen = (distance >= 0) & (distance < window) if window else distance >= 0
    return seen if documents is None else seen & (documents[:, None, past:, None] == documents[:, None, None, :])


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, window: int = 0, documents: Tensor | None = None
) -> Tensor:
    """softmax(scale q k^T + mask) v, written out: the reference for the others. Queries are those of the last keys."""
    scores = (q @ k.transpose(-2, -1)).float() * scale
    hidden = ~visible(k.size(-2), window, documents, q.device, past=k.size(-2) - q.size(-2))
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(q.dtype)
    return F.dropout(weights, dropout) @ v


def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, window: int = 0, documents: Tensor | None = None,
    chunk: int = 128,
) -> Tensor:  # fmt: skip
    """Plain attention one block of queries at a time, each against the keys that any of them sees. On CPUs with bf16 matrix
    units this beats PyTorch's flash attention, which spends its time outside them (benchmarks/README.md)."""
    T = q.size(-2)
    hidden = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device)
    hidden = hidden.triu(1) + hidden.tril(-window) if window else hidden.triu(1)
    q, k = q * scale, k.transpose(-2, -1)
    outputs = []
    for start in range(0, T, chunk):
        end = min(start + chunk, T)
        first = max(0, start + 1 - window) if window else 0
        scores = q[..., start:end, :] @ k[..., first:end] + hidden[start:end, first:end]
        if documents is not None:
            others = documents[:, None, start:end, None] != documents[:, None, None, first:end]
            scores = scores.masked_fill(others, float("-inf"))
        outputs.append(F.dropout(scores.softmax(-1), dropout) @ v[..., first:end, :])
    return torch.cat(outputs, dim=-2)


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, window: int = 0, documents: Tensor | None = None
) -> Tensor:
    """PyTorch's fused attention."""
    mask = visible(q.size(-2), window, documents, q.device) if window or documents is not None else None
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scale)


def block_mask(T: int, window: int | Tensor, documents: Tensor | None, device: torch.device) -> BlockMask:
    """FlexAttention's form of `visible`. Layers that share a mask share it under torch.compile, which computes it once."""

    def seen(b, h, query, key):
        inside = query >= key
        if isinstance(window, Tensor) or window:
            inside = inside & (query - key < window)
        return inside if documents is None else inside & (documents[b, query] == documents[b, key])

    batch, apart = None if documents is None else len(documents), device.type == "cuda" and not torch.compiler.is_compiling()
    return create_block_mask(seen, batch, None, T, T, device=device, _compile=apart)


stored_mask = lru_cache(block_mask)  # of windows alone, outside torch.compile
fused_flex = lru_cache(lambda: torch.compile(flex_attention, dynamic=False))  # FlexAttention is fused by compiling it only


def flexible_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, window: int | Tensor = 0, documents: Tensor | None = None
) -> Tensor:
    """FlexAttention (arXiv 2412.05496): compiled on CUDA; on a CPU PyTorch's unfused form of it, forward only. Raises
    UsageError: dropout, or gradients on a device where PyTorch has none for it."""
    if dropout:
        raise UsageError("--attention flex has no dropout: use --attention sdpa, or --dropout 0")
    if q.requires_grad or k.requires_grad or v.requires_grad:
        check("flex", q.device)
    compiling = torch.compiler.is_compiling()
    make = stored_mask if isinstance(window, int) and documents is None and not compiling else block_mask
    mask = make(q.size(-2), window, documents, q.device)
    attend = flex_attention if compiling or q.device.type != "cuda" else fused_flex()
    return attend(q, k, v, block_mask=mask, scale=scale)


ATTENTION: dict[str, Callable[..., Tensor]] = {"plain": plain_attention, "chunked": chunked_attention}
ATTENTION |= {"sdpa": sdpa_attention, "flex": flexible_attention}


def check(backend: str, device: torch.device) -> None:
    """Can it train there? Raises UsageError: it has no backward pass on this device."""
    if backend == "flex" and device.type != "cuda":
        raise UsageError(f"--attention flex trains on CUDA only, not on {device.type}: use --attention chunked or auto")


def choose(device: torch.device, dropout: float, masked: bool, backend: str = "auto") -> str:
    """The back-end: `auto` resolved, any other as it is."""
    if backend != "auto":
        return backend
    if device.type == "cpu":
        return "chunked"
    fused = device.type == "cuda" and kernels.triton is not None  # FlexAttention is compiled to Triton
    return "flex" if masked and fused and not dropout else "sdpa"


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float = 0.0, window: int | Tensor = 0,
    documents: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T + causal mask) v, [B, H, T, D], by the back-end that `choose` gives; a window that is a tensor: by
    flex alone; where keys were kept (`KeyValues`): plain. Raises UsageError: the back-end cannot do this here."""
    if isinstance(window, int) and window >= k.size(-2):
        window = 0
    if q.size(-2) < k.size(-2):
        return plain_attention(q, k, v, scale, dropout, window, documents)
    masked = isinstance(window, Tensor) or bool(window) or documents is not None
    return ATTENTION[choose(q.device, dropout, masked, backend)](q, k, v, scale, dropout, window, documents)
