"""GPTlite: GPT-2's architecture in one file.

Grouped queries, and heads and MLPs of any width, are the only additions. Shapes use one letter
each: B batch, T time, C channels (n_embd), H heads, D head size, V vocabulary. C = H * D, but
where heads have been taken out.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# attention(q, k, v, mask) with q (B, H, Tq, D) and k, v (B, H_kv, Tk, D) -> (B, H, Tq, D); the
# mask (Tq, Tk) is True where a query may see a key; None: causal, and the last query sees all
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class LayerCache(Protocol):
    """What attention asks of one layer of a cache."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep new keys and values (B, H_kv, T, D); return all that attention is to see.

        They have the shape (B, H_kv, Tk, D).
        """
        ...

    def mask(self, T: int) -> Tensor | None:
        """True (T, Tk) where one of the last T queries may see a key; None: all up to it."""
        ...


class Cache(Protocol):
    """What the model asks of a KV cache, in this order; all caches here are of this form."""

    def positions(self, T: int, block_size: int, device: torch.device) -> Tensor:
        """Positions (T,) of the next T tokens, for a model that has `block_size` of them.

        A ValueError if the cache has no room for the tokens, or the model no positions.
        """
        ...

    def layer(self, i: int) -> LayerCache:
        """What block i needs to see."""
        ...

    def advance(self, T: int) -> None:
        """Count T appended tokens as past; called once, after the last layer."""
        ...


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; the default is the book's teacher, 10.8 M parameters."""

    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    block_size: int = 256  # the longest context: one learned position for each
    vocab_size: int = 65
    n_kv_head: int | None = None  # heads of keys and values; None: n_head, fewer are shared
    dropout: float = 0.0  # on the embedding and on each residual branch, in training only
    head_size: int | None = None  # None: n_embd / n_head; what pruning leaves may be another
    n_hidden: int | None = None  # neurons of an MLP; None: 4 n_embd

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "dropout" and value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1.")
        C, H, H_kv = self.n_embd, self.n_head, self.kv_heads
        if self.head_size is None and C % H:
            raise ValueError(f"n_embd is {C}, which n_head = {H} does not divide.")
        if H % H_kv:
            raise ValueError(f"n_head is {H}, which n_kv_head = {H_kv} does not divide.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but must be at least 0 and below 1.")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, H_kv."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_dim(self) -> int:
        """Channels of one head, D."""
        return self.n_embd // self.n_head if self.head_size is None else self.head_size

    @property
    def hidden(self) -> int:
        """Neurons of an MLP."""
        return 4 * self.n_embd if self.n_hidden is None else self.n_hidden


GPT2_SMALL = GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257)
GPT2_XL = GPTConfig(n_layer=48, n_head=25, n_embd=1600, block_size=1024, vocab_size=50257)


def causal_mask(Tq: int, Tk: int, device: torch.device | None = None) -> Tensor:
    """True (Tq, Tk) where one of the *last* Tq positions may see a key: a rectangle."""
    return torch.ones(Tq, Tk, dtype=torch.bool, device=device).tril(Tk - Tq)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention as on paper (Vaswani et al., 2017, equation 1), masked to the past."""
    H, Tq, D = q.shape[1:]
    k = k.repeat_interleave(H // k.shape[1], dim=1)  # (B, H_kv, Tk, D) -> (B, H, Tk, D)
    v = v.repeat_interleave(H // v.shape[1], dim=1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)  # (B, H, Tq, Tk)
    mask = causal_mask(Tq, k.shape[2], q.device) if mask is None else mask
    scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v  # (B, H, Tq, D)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same function through PyTorch's fused `scaled_dot_product_attention`."""
    Tq, Tk = q.shape[2], k.shape[2]
    # `is_causal` aligns the *first* query with the first key, so it is right only for a square;
    # one query sees all keys
    square = mask is None and 1 < Tq == Tk
    if mask is None and 1 < Tq < Tk:
        mask = causal_mask(Tq, Tk, q.device)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=square, enable_gqa=grouped
    )


class CausalSelfAttention(nn.Module):
    """Queries, keys and values from one product, attention over past and present, and back."""

    def __init__(self, config: GPTConfig, attention: Attention):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.kv_heads
        self.head_dim, self.attention = config.head_dim, attention
        width = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        self.c_attn = nn.Linear(config.n_embd, width)
        self.c_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        B, T, _ = x.shape
        # (B, T, (H + 2 H_kv) D) -> (B, H + 2 H_kv, T, D)
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        mask = None
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H_kv, past + T, D)
            mask = cache.mask(T)
        y = self.attention(q, k, v, mask)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, H D) -> (B, T, C)


class MLP(nn.Module):
    """Wider, four times by default, GELU in its tanh form (as GPT-2), and back."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.hidden)
        self.c_proj = nn.Linear(config.hidden, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """One layer: each part reads a normalised copy of the residual stream, and adds to it."""

    def __init__(self, config: GPTConfig, attention: Attention):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, attention)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), cache))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """A GPT-2: embeddings, `n_layer` blocks, a LayerNorm, and a head tied to the embedding."""

    def __init__(self, config: GPTConfig, attention: Attention = sdpa_attention):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, attention) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # tied: one matrix, read twice
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's: normal(0, 0.02), less by sqrt(2 n_layer) for what is added to the stream."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (CausalSelfAttention, MLP)):  # applied after its children
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(
        self, idx: Tensor, cache: Cache | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits (B, T, V) for the token after each of idx (B, T), given also the cache's past.

        With `last_only` the head, the widest matrix, works for the last position alone: logits
        of the shape (B, 1, V).
        """
        T, longest = idx.shape[1], self.config.block_size
        if cache is not None:
            positions = cache.positions(T, longest, idx.device)
        elif longest < T:
            raise ValueError(f"{T} tokens are more than the model's block_size of {longest}.")
        else:
            positions = torch.arange(T, device=idx.device)
        x = self.dropout(self.wte(idx) + self.wpe(positions))  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache.layer(i))
        if cache is not None:
            cache.advance(T)
        return self.lm_head(self.ln_f(x[:, -1:] if last_only else x))

    def set_attention(self, attention: Attention) -> "GPT":
        """The same model computing its attention with another function."""
        for module in self.modules():
            if isinstance(module, CausalSelfAttention):
                module.attention = attention
        return self

    def swap_linears(
        self,
        make: Callable[[nn.Linear], nn.Module],
        where: Callable[[str, nn.Linear], bool] | None = None,
    ) -> "GPT":
        """The same model, in place, with `make(linear)` where each Linear was, also the head.

        `where(name, linear)` says which, by dotted names; None means all. Everything is made
        before anything is set, so that a `make` that fails leaves the model as it was.
        """
        linears = {n: m for n, m in self.named_modules() if isinstance(m, nn.Linear)}
        if not linears:
            raise ValueError(
                "the model has no Linear left to swap; begin with a copy of the original."
            )
        chosen = {n: m for n, m in linears.items() if where is None or where(n, m)}
        if not chosen:
            raise ValueError(f"none is to be swapped of the Linears {', '.join(linears)}.")
        for name, module in {n: make(linear) for n, linear in chosen.items()}.items():
            parent, _, child = name.rpartition(".")
            setattr(self.get_submodule(parent), child, module)
        return self

    def n_params(self) -> int:
        """Parameters, the tied matrix counted once."""
        return sum(p.numel() for p in self.parameters())


def check_tied(model: GPT) -> None:
    """Tie a model's head to its embedding again if both are equal; else a ValueError.

    `lm_head = nn.Linear(...)`, `load_state_dict(assign=True)` and `to_empty()` part the two
    without a word. Whoever keeps one matrix for both, as every file does, calls this before.
    """
    if getattr(model.lm_head, "bias", None) is not None:
        raise ValueError("the model's head has a bias, which no GPT-2 has and would be lost.")
    head, embedding = (m._parameters.get("weight") for m in (model.lm_head, model.wte))
    if head is embedding or head is None or embedding is None:
        return  # tied, or swapped for something that is not one matrix
    alike = all(getattr(head, a) == getattr(embedding, a) for a in ("shape", "dtype", "device"))
    if not alike or head.is_meta or not torch.equal(head, embedding):
        raise ValueError(
            "the model's lm_head.weight is another matrix than wte.weight, which would be kept "
            "in its place; tie them first: model.lm_head.weight = model.wte.weight."
        )
    model.lm_head.weight = model.wte.weight


# fn(module, inputs, output); what it returns, unless None, takes the output's place
Watcher = Callable[[nn.Module, tuple[Any, ...], Any], Any]


@contextmanager
def watch(modules: Iterable[nn.Module], fn: Watcher) -> Iterator[None]:
    """While it lasts, each forward of one of the modules calls `fn(module, inputs, output)`."""
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(fn))
        yield
