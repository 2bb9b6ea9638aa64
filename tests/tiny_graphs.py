"""A tiny GPT and its graphs, each exported once for all tests that run it."""

from functools import cache

import torch

from gptlite.model import GPT, GPTConfig
from gptlite.onnx_export.cache import AppendingGPT, CachedGPT

CONFIG = GPTConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, block_size=24, vocab_size=17)
FORMS = {
    form.returns + ", by layer" * by_layer: (form, by_layer)
    for form in (CachedGPT, AppendingGPT)
    for by_layer in (False, True)
}


@cache
def model() -> GPT:
    """The model, its weights far larger than at initialisation (see `make_model`)."""
    torch.manual_seed(0)
    made = GPT(CONFIG).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


@cache
def exported(name: str):
    """Its graph by one of FORMS, or of logits alone."""
    from gptlite.onnx_export.exporters import export_cached, export_gpt

    return export_cached(model(), *FORMS[name]) if name in FORMS else export_gpt(model())
