"""A GPT with its KV cache as an input and an output: a function without state, as a graph is.

The whole cache comes back (`CachedGPT`), or only what is new (`AppendingGPT`); each as one
tensor, or as one a layer.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from gptlite.model import GPT, GPTConfig, causal_mask, sdpa_attention


class ConcatLayer:
    """One layer's past, joined with what is new: every step copies it once more."""

    def __init__(self, past_k: Tensor, past_v: Tensor):
        self.k, self.v = past_k, past_v  # (B, H_kv, P, D)
        self.past = past_k.shape[2]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Past and present together (B, H_kv, P + T, D)."""
        self.k, self.v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        return self.k, self.v

    def mask(self, T: int) -> Tensor:
        """True (T, P + T) where a query may see a key; a branch on T would not be exported."""
        return torch.arange(self.past + T) <= self.past + torch.arange(T)[:, None]


class PairLayer(ConcatLayer):
    """One layer's past, not joined with what is new: `two_part_attention` reads both."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Any, Any]:
        """Keys, then values, each as a pair of past (B, H_kv, P, D) and new (B, H_kv, T, D)."""
        past_k, past_v = self.k, self.v
        self.k, self.v = k, v
        return (past_k, k), (past_v, v)

    def mask(self, T: int) -> Tensor:
        """True (T, T) where a query may see a new key; it sees the whole past."""
        return causal_mask(T, T)


def two_part_attention(
    q: Tensor, k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], mask: Tensor
) -> Tensor:
    """Attention over a past and new keys that were never joined.

    Their scores are joined instead, which are D times smaller.
    """
    (past_k, new_k), (past_v, new_v) = k, v
    P, q = past_k.shape[2], q / math.sqrt(q.shape[-1])
    past = _grouped(q, past_k.transpose(-2, -1))  # (B, H, T, P)
    new = _grouped(q, new_k.transpose(-2, -1)).masked_fill(~mask, -math.inf)  # (B, H, T, T)
    weights = torch.cat([past, new], dim=-1).softmax(dim=-1)  # (B, H, T, P + T)
    return _grouped(weights[..., :P], past_v) + _grouped(weights[..., P:], new_v)


def _grouped(a: Tensor, b: Tensor) -> Tensor:
    """a (B, H, T, n) @ b (B, H_kv, n, m) -> (B, H, T, m), with b repeated for no head."""
    (B, H, T, n), H_kv = a.shape, b.shape[1]
    if H_kv == H:
        return a @ b
    # the heads of a group share one b
    return (a.reshape(B, H_kv, H // H_kv * T, n) @ b).reshape(B, H, T, b.shape[-1])


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`sdpa_attention` with its mask always given.

    What it compares with T to do without one, an export would decide once, for all T.
    """
    mask = causal_mask(q.shape[2], k.shape[2], q.device) if mask is None else mask
    return sdpa_attention(q, k, v, mask)


class PastCache:
    """A KV cache as the model asks for one, over a past that is never written to.

    The past is one tensor (2 n_layer, B, H_kv, P, D), or a list with one (B, H_kv, P, D) for
    each layer's keys and each layer's values.
    """

    def __init__(self, past: Tensor | Sequence[Tensor], layer: type[ConcatLayer]):
        self.length = past[0].shape[2]
        self.layers = [layer(past[i], past[i + 1]) for i in range(0, len(past), 2)]

    def positions(self, T: int, block_size: int, device: torch.device) -> Tensor:
        """Positions (T,) of the next T tokens; a graph has no `if` for too long a text."""
        return torch.arange(self.length, self.length + T, device=device)

    def layer(self, i: int) -> ConcatLayer:
        """What block i of the model needs to see."""
        return self.layers[i]

    def advance(self, T: int) -> None:
        """Nothing to count: the length is the past's shape."""

    def tensors(self) -> list[Tensor]:
        """Keys and values of each layer, k before v: each (B, H_kv, P + T or T, D)."""
        return [tensor for layer in self.layers for tensor in (layer.k, layer.v)]


class CachedGPT(nn.Module):
    """logits (B, 1, V), present = model(idx (B, T), past): a function without state.

    `present` is the next `past`. Past and present are one tensor (2 n_layer, B, H_kv, .., D),
    taken apart and stacked again in the graph, or, with `by_layer`, arguments and outputs of
    their own for the keys and the values of each layer, each (B, H_kv, .., D).
    """

    layer: type[ConcatLayer] = ConcatLayer
    attention: Callable[..., Tensor] = staticmethod(masked_attention)
    returns = "present"

    def __init__(self, model: GPT, by_layer: bool = False):
        super().__init__()
        self.model, self.by_layer = copy.deepcopy(model).set_attention(self.attention), by_layer

    def forward(self, idx: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = PastCache(past if self.by_layer else past[0], self.layer)
        logits = self.model(idx, cache, last_only=True)
        if self.by_layer:
            return (logits, *cache.tensors())
        return logits, torch.stack(cache.tensors())


class AppendingGPT(CachedGPT):
    """logits (B, 1, V), new = model(idx (B, T), past): the caller appends `new` (.., T, D).

    No graph joins the two.
    """

    layer = PairLayer
    attention = staticmethod(two_part_attention)
    returns = "new"


def cache_names(config: GPTConfig, word: str, by_layer: bool) -> list[str]:
    """What a graph calls its past, present or new, as `word` says.

    One name, or for each layer's keys and values one: past.k0, past.v0, past.k1, ...
    """
    if not by_layer:
        return [word]
    return [f"{word}.{kind}{i}" for i in range(config.n_layer) for kind in "kv"]


def empty_past(
    config: GPTConfig, B: int = 1, P: int = 0, by_layer: bool = False
) -> list[Tensor]:
    """The zeros that a `CachedGPT` is called with after idx; with P = 0 the first call's."""
    zeros = torch.zeros(2 * config.n_layer, B, config.kv_heads, P, config.head_dim)
    return list(zeros) if by_layer else [zeros]
