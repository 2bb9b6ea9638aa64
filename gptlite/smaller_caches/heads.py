"""Fewer heads of keys and values, each for several heads of queries (Ainslie et al., 2023)."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gptlite.checkpoints import check_plain
from gptlite.model import GPT, CausalSelfAttention, causal_mask


def share_kv_heads(model: GPT, n_kv_head: int) -> GPT:
    """A copy of a model with fewer heads of keys and values, each the mean of several.

    Not the same function: a little training afterwards wins back most of what the means lose
    (Ainslie et al., 2023).
    """
    check_plain(model)
    config, D = model.config, model.config.head_dim
    if n_kv_head < 1 or config.kv_heads % n_kv_head:
        raise ValueError(
            f"n_kv_head is {n_kv_head}, which does not divide the model's "
            f"{config.kv_heads} KV heads."
        )
    tensors = model.state_dict()
    # weights (H D + 2 H_kv D, C) and biases (H D + 2 H_kv D)
    for name in [name for name in tensors if "c_attn" in name]:
        widths = [heads * D for heads in (config.n_head, config.kv_heads, config.kv_heads)]
        q, k, v = tensors[name].split(widths)
        groups = [
            t.view(n_kv_head, -1, D, *t.shape[1:]) for t in (k, v)
        ]  # (H_kv, group, D, ..)
        tensors[name] = torch.cat([q, *(t.mean(1).flatten(0, 1) for t in groups)])
    attention = next(m.attention for m in model.modules() if isinstance(m, CausalSelfAttention))
    made = GPT(replace(config, n_kv_head=n_kv_head), attention).to(model.wte.weight)
    made.load_state_dict(tensors)
    return made.train(model.training)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention in which heads that share keys are further queries of one head.

    So no key is copied or read twice. It takes and returns what every attention does:
    q (B, H, Tq, D), k and v (B, H_kv, Tk, D).
    """
    (B, H, Tq, D), (H_kv, Tk) = q.shape, k.shape[1:3]
    if H % H_kv:
        raise ValueError(f"q has {H} heads, which the {H_kv} heads of k do not divide.")
    if mask is None and Tq > 1:
        mask = causal_mask(Tq, Tk, q.device)
    rows = q.reshape(B, H_kv, H // H_kv * Tq, D)  # (B, H_kv, group * Tq, D)
    mask = None if mask is None else mask.repeat(H // H_kv, 1)  # (group * Tq, Tk)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).view(B, H, Tq, D)
