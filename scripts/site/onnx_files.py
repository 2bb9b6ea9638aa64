"""The ONNX files of the site: graphs to walk through, the teacher, and what predicts its speed.

python scripts/site/onnx_files.py FOLDER      writes FOLDER/graphs and FOLDER/models; `make
book` does so by itself
"""

import gzip
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn as nn
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from gptlite.checkpoints import Checkpoint, load_pretrained
from gptlite.files import write_atomically
from gptlite.generate import generate
from gptlite.kv_cache import KVCache
from gptlite.model import CausalSelfAttention, GPTConfig
from gptlite.onnx_export import exporters, weights
from gptlite.onnx_export.cache import (
    AppendingGPT,
    PairLayer,
    PastCache,
    cache_names,
    empty_past,
    two_part_attention,
)
from gptlite.onnx_export.files import save_onnx
from gptlite.onnx_export.sessions import optimized

PROMPT, CHARACTERS = "ROMEO:\n", 100
GROUP = 32  # weights to a scale in 4 bits


@cache
def exported_teacher() -> tuple[Checkpoint, onnx.ModelProto]:
    """The trained teacher, and one step of it with its cache by layer: exported once."""
    checkpoint = load_pretrained("teacher")
    return checkpoint, exporters.export_cached(checkpoint.model, AppendingGPT, by_layer=True)


def write_graphs(folder: Path) -> None:
    """Graphs without weights: the two-head block, captured in several ways, and the GPT."""
    torch.manual_seed(0)
    block, x = exporters.TwoHeadBlock().eval(), torch.randn(2, 8, 64)
    given = ([x], ["x"], ["y"], {"x": {0: "B", 1: "T"}})
    checkpoint, step = exported_teacher()
    graphs = {
        "block_trace": exporters.export_torchscript(block, *given),
        "block_script": exporters.export_torchscript(torch.jit.script(block), *given),
        "block_eval_raw": exporters.export(block, *given, optimize=False),
        "block_eval": exporters.export(block, *given),
        "block_train": exporters.export(block, *given, training=True),
        "gpt": exporters.export_gpt(checkpoint.model),
        "gpt_appending": step,
        "gpt_optimized": optimized(step),
        "gpt_int8": optimized(weights.quantize_dynamic(step)),
    }
    for name, graph in graphs.items():
        content = weights.without_weights(graph).SerializeToString()
        write_atomically(folder / f"{name}.onnx", content)


def write_models(folder: Path) -> None:
    """The teacher in three precisions, what calibrates a machine, and models.json on all."""
    checkpoint, exported = exported_teacher()
    model, config = checkpoint.model, checkpoint.model.config
    precisions = {
        "fp32": exported,
        "int8": weights.quantize_dynamic(exported),
        "int4": weights.quantize_int4(exported, GROUP),
    }
    about = {}
    for name, graph in precisions.items():
        save_onnx(weights.store_half(graph), folder / f"{name}.onnx")
        content = (folder / f"{name}.onnx").read_bytes()
        about[name] = {
            "file": f"{name}.onnx",
            "bytes": len(content),
            "compressed": len(gzip.compress(content, 6)),
        }
    parts = {name: products_only(config, product) for name, product in PRODUCTS.items()}
    parts |= {"attention": attention_only(config), "between": between_only(config)}
    for name, graph in parts.items():
        write_atomically(folder / f"calibrate-{name}.onnx", graph.SerializeToString())
    idx = checkpoint.tokenizer.encode(PROMPT)[None]
    text = generate(model, idx, CHARACTERS, KVCache(config), temperature=0)[0, idx.shape[1] :]
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    shape = {name: getattr(config, name) for name in names}
    description = {
        "config": shape | {"n_kv_head": config.kv_heads, "head_dim": config.head_dim},
        "vocabulary": "".join(checkpoint.tokenizer.characters),
        "models": about,
        "calibration": {name: f"calibrate-{name}.onnx" for name in parts},
        "greedy": {"prompt": PROMPT, "text": checkpoint.tokenizer.decode(text)},
    }
    write_atomically(folder / "models.json", json.dumps(description, indent=1).encode())


# A product (R, K) x (K, N), its weight made of one number when the file is loaded: a few
# kilobytes of file read as many bytes a step as the model. The numbers differ by layer, or the
# runtime would make equal weights one, and keep what passes through them near its size.
Part = tuple[list[onnx.NodeProto], list[onnx.TensorProto]]
Product = Callable[[str, str, int, int, int], Part]
MICROSOFT = "com.microsoft"  # the domain of the runtime's own operators


def _expand(
    name: str, value: np.ndarray, shape: list[int]
) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    one, size = f"{name}.one", f"{name}.shape"
    constants = [
        numpy_helper.from_array(value, one),
        numpy_helper.from_array(np.array(shape), size),
    ]
    return helper.make_node("Expand", [one, size], [name]), constants


def fp32_product(x: str, y: str, K: int, N: int, i: int) -> Part:
    """MatMul with a float32 weight."""
    weight, constants = _expand(f"{y}.w", np.array((1 + i / 100) / K, np.float32), [K, N])
    return [weight, helper.make_node("MatMul", [x, f"{y}.w"], [y])], constants


def int8_product(x: str, y: str, K: int, N: int, i: int) -> Part:
    """What the runtime makes of a dynamically quantized product: one operator."""
    weight, constants = _expand(f"{y}.w", np.array(64 + i, np.int8), [K, N])
    constants.append(numpy_helper.from_array(np.array(1 / (64 * K), np.float32), f"{y}.scale"))
    ends = [x, f"{y}.w", f"{y}.scale"], [y]
    product = helper.make_node("DynamicQuantizeMatMul", *ends, domain=MICROSOFT)
    return [weight, product], constants


def int4_product(x: str, y: str, K: int, N: int, i: int) -> Part:
    """MatMulNBits with a scale a group, for 8 layers at most.

    Two weights make a byte, i and 6 - i, each stored with 8 added.
    """
    codes = np.array(16 * (8 + i) + 14 - i, np.uint8)
    weight, constants = _expand(f"{y}.w", codes, [N, K // GROUP, GROUP // 2])
    one = np.array((1 + i / 100) / (3 * K), np.float32)
    scale, more = _expand(f"{y}.s", one, [N * K // GROUP])
    ends = [x, f"{y}.w", f"{y}.s"], [y]
    shape = {"K": K, "N": N, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
    product = helper.make_node("MatMulNBits", *ends, domain=MICROSOFT, **shape)
    return [weight, scale, product], constants + more


PRODUCTS = {"fp32": fp32_product, "int8": int8_product, "int4": int4_product}


def products_only(config: GPTConfig, product: Product) -> onnx.ModelProto:
    """y (1, T, C) = all products of the blocks with weights, and no more, of x (1, T, C)."""
    C, A, hidden = config.n_embd, config.n_head * config.head_dim, config.hidden
    qkv = A + 2 * config.kv_heads * config.head_dim
    nodes, x = [], "x"
    cut = {"from": 0, "to": A, "axis": 2}
    constants = [numpy_helper.from_array(np.array([n]), name) for name, n in cut.items()]
    for i in range(config.n_layer):
        for name, K, N in (
            ("qkv", C, qkv),
            ("out", A, C),
            ("up", C, hidden),
            ("down", hidden, C),
        ):
            if name == "out":  # the projection back reads as many channels as the queries have
                nodes.append(helper.make_node("Slice", [x, *cut], [f"{x}.heads"]))
                x = f"{x}.heads"
            more, given = product(x, f"{name}.{i}", K, N, i)
            nodes, constants, x = nodes + more, constants + given, f"{name}.{i}"
    nodes.append(helper.make_node("Identity", [x], ["y"]))
    ends = [helper.make_tensor_value_info(e, TensorProto.FLOAT, [1, "T", C]) for e in "xy"]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", exporters.OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


class Repeat(nn.Module):
    """In place of the product that makes queries, keys and values of x: x, as each of them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.channels = config.kv_heads * config.head_dim

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H * D) -> (B, T, (H + 2 H_kv) * D)."""
        return torch.cat([x, x[..., : self.channels], x[..., : self.channels]], dim=-1)


class AttentionOnly(nn.Module):
    """y, new = attention(x (B, T, H * D), past): all that a layer does with its cache.

    There is no product with weights.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_layer = config.n_layer
        self.attention = CausalSelfAttention(config, two_part_attention)
        self.attention.c_attn, self.attention.c_proj = Repeat(config), nn.Identity()

    def forward(self, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = PastCache(past, PairLayer)
        for i in range(self.n_layer):
            x = self.attention(x, cache.layer(i))
        return (x, *cache.tensors())


class BetweenOnly(nn.Module):
    """The blocks beside products and attention, on x (B, T, C) and hidden (B, T, n_hidden)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_layer, self.ln = config.n_layer, nn.LayerNorm(config.n_embd)

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(self.n_layer):
            x = x + self.ln(x)
            hidden = F.gelu(hidden, approximate="tanh")
            x = x + self.ln(x)
        return x, hidden


def attention_only(config: GPTConfig) -> onnx.ModelProto:
    """`AttentionOnly` as a graph, its inputs and outputs named as the model's."""
    x = torch.zeros(2, 3, config.n_head * config.head_dim)
    past = empty_past(config, 2, 5, by_layer=True)
    given, new = (cache_names(config, word, by_layer=True) for word in ("past", "new"))
    dynamic = {"x": {0: "B", 1: "T"}} | {name: {0: "B", 2: "P"} for name in given}
    args, names = [x, *past], (["x", *given], ["y", *new])
    return _bare(exporters.export(AttentionOnly(config), args, *names, dynamic))


def between_only(config: GPTConfig) -> onnx.ModelProto:
    """`BetweenOnly` as a graph."""
    args, names = (
        [torch.zeros(2, 3, n) for n in (config.n_embd, config.hidden)],
        ["x", "hidden"],
    )
    dynamic = {name: {0: "B", 1: "T"} for name in names}
    return _bare(exporters.export(BetweenOnly(config), args, names, ["y", "hidden_y"], dynamic))


def _bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the exporter's notes on its origin: most of a file without weights."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output):
        del part.metadata_props[:]
    del model.graph.value_info[:]
    return model


def main() -> None:
    """The command line."""
    folder = Path(sys.argv[1])
    write_graphs(folder / "graphs")
    write_models(folder / "models")


if __name__ == "__main__":
    main()
