"""The ONNX files that the site serves: graphs to walk through, the teacher to run, and what predicts its speed.

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
from gptlite.onnx_export.runtime import check_onnx, optimized

PROMPT, CHARACTERS = "ROMEO:\n", 100
GROUP = 32  # weights to a scale in 4 bits


@cache
def exported_teacher() -> tuple[Checkpoint, onnx.ModelProto]:
    """The trained teacher, and one step of it with its cache, an input for each layer: exported once for all files."""
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
        write_atomically(
            folder / f"{name}.onnx", weights.without_weights(graph).SerializeToString()
        )


def write_models(folder: Path) -> None:
    """The teacher in three precisions, files that calibrate a reader's machine, and models.json about all of them."""
    checkpoint, exported = exported_teacher()
    model, config = checkpoint.model, checkpoint.model.config
    precisions = {
        "fp32": exported,
        "int8": weights.quantize_dynamic(exported),
        "int4": weights.quantize_int4(exported, GROUP),
    }
    about = {}
    for name, graph in precisions.items():
        check_onnx(graph)
        content = weights.store_half(graph).SerializeToString()
        write_atomically(folder / f"{name}.onnx", content)
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
    shape = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    description = {
        "config": {name: getattr(config, name) for name in shape}
        | {"n_kv_head": config.kv_heads, "head_dim": config.head_dim},
        "vocabulary": "".join(checkpoint.tokenizer.characters),
        "models": about,
        "calibration": {name: f"calibrate-{name}.onnx" for name in parts},
        "greedy": {"prompt": PROMPT, "text": checkpoint.tokenizer.decode(text)},
    }
    write_atomically(folder / "models.json", json.dumps(description, indent=1).encode())


# A product (R, K) x (K, N), its weight made of one number when the file is loaded: a few
# kilobytes of file read as many bytes a step as the model. The numbers differ by layer, or the
# runtime would make equal weights one, and keep what passes through them near its size.
Product = Callable[
    [str, str, int, int, int], tuple[list[onnx.NodeProto], list[onnx.TensorProto]]
]


def _expand(
    name: str, value: np.ndarray, shape: list[int]
) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    constants = [
        numpy_helper.from_array(value, f"{name}.one"),
        numpy_helper.from_array(np.array(shape), f"{name}.shape"),
    ]
    return helper.make_node("Expand", [f"{name}.one", f"{name}.shape"], [name]), constants


def fp32_product(
    x: str, y: str, K: int, N: int, i: int
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """MatMul with a float32 weight."""
    weight, constants = _expand(f"{y}.w", np.array((1 + i / 100) / K, np.float32), [K, N])
    return [weight, helper.make_node("MatMul", [x, f"{y}.w"], [y])], constants


def int8_product(
    x: str, y: str, K: int, N: int, i: int
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """What the runtime makes of a dynamically quantized product: one operator."""
    weight, constants = _expand(f"{y}.w", np.array(64 + i, np.int8), [K, N])
    constants.append(numpy_helper.from_array(np.array(1 / (64 * K), np.float32), f"{y}.scale"))
    product = helper.make_node(
        "DynamicQuantizeMatMul", [x, f"{y}.w", f"{y}.scale"], [y], domain="com.microsoft"
    )
    return [weight, product], constants


def int4_product(
    x: str, y: str, K: int, N: int, i: int
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """MatMulNBits: two weights a byte, i and 6 - i, each stored with 8 added; a scale a group. For 8 layers at most."""
    weight, constants = _expand(
        f"{y}.w", np.array(16 * (8 + i) + 14 - i, np.uint8), [N, K // GROUP, GROUP // 2]
    )
    scale, more = _expand(
        f"{y}.s", np.array((1 + i / 100) / (3 * K), np.float32), [N * K // GROUP]
    )
    product = helper.make_node(
        "MatMulNBits",
        [x, f"{y}.w", f"{y}.s"],
        [y],
        domain="com.microsoft",
        K=K,
        N=N,
        bits=4,
        block_size=GROUP,
        accuracy_level=4,
    )
    return [weight, scale, product], constants + more


PRODUCTS: dict[str, Product] = {
    "fp32": fp32_product,
    "int8": int8_product,
    "int4": int4_product,
}


def products_only(config: GPTConfig, product: Product) -> onnx.ModelProto:
    """y (1, T, C) = all products of the blocks with weights, and nothing else, of x (1, T, C)."""
    C, A, hidden = config.n_embd, config.n_head * config.head_dim, config.hidden
    nodes, constants, x = [], [], "x"
    ends = [
        numpy_helper.from_array(np.array([n]), name)
        for name, n in (("from", 0), ("to", A), ("axis", 2))
    ]
    for i in range(config.n_layer):
        chain = (
            ("qkv", C, A + 2 * config.kv_heads * config.head_dim),
            ("out", A, C),
            ("up", C, hidden),
            ("down", hidden, C),
        )
        for name, K, N in chain:
            if name == "out":  # the projection back reads as many channels as the queries have
                nodes.append(
                    helper.make_node("Slice", [x, "from", "to", "axis"], [f"{x}.heads"])
                )
                x = f"{x}.heads"
            more, given = product(x, f"{name}.{i}", K, N, i)
            nodes, constants, x = nodes + more, constants + given, f"{name}.{i}"
    nodes.append(helper.make_node("Identity", [x], ["y"]))
    ends_of_graph = (
        helper.make_tensor_value_info(end, TensorProto.FLOAT, [1, "T", C]) for end in "xy"
    )
    graph = helper.make_graph(
        nodes, "products", *([end] for end in ends_of_graph), [*constants, *ends]
    )
    opsets = [helper.make_opsetid("", exporters.OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


class Repeat(nn.Module):
    """In place of the product that makes queries, keys and values of x: x itself, as each of them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.channels = config.kv_heads * config.head_dim

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H * D) -> (B, T, (H + 2 H_kv) * D)."""
        return torch.cat([x, x[..., : self.channels], x[..., : self.channels]], dim=-1)


class AttentionOnly(nn.Module):
    """y, new = attention(x (B, T, H * D), past): what each layer does with the cache, and no product with weights."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_layer, self.attention = (
            config.n_layer,
            CausalSelfAttention(config, two_part_attention),
        )
        self.attention.c_attn, self.attention.c_proj = Repeat(config), nn.Identity()

    def forward(self, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = PastCache(past, PairLayer)
        for i in range(self.n_layer):
            x = self.attention(x, cache.layer(i))
        return (x, *cache.tensors())


class BetweenOnly(nn.Module):
    """What the blocks do beside products and attention, to x (B, T, C) and to an MLP's hidden (B, T, n_hidden)."""

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
    x, past = (
        torch.zeros(2, 3, config.n_head * config.head_dim),
        empty_past(config, 2, 5, by_layer=True),
    )
    given, new = (cache_names(config, word, by_layer=True) for word in ("past", "new"))
    dynamic = {"x": {0: "B", 1: "T"}} | {name: {0: "B", 2: "P"} for name in given}
    return _bare(
        exporters.export(AttentionOnly(config), [x, *past], ["x", *given], ["y", *new], dynamic)
    )


def between_only(config: GPTConfig) -> onnx.ModelProto:
    """`BetweenOnly` as a graph."""
    args, names = (
        [torch.zeros(2, 3, n) for n in (config.n_embd, config.hidden)],
        ["x", "hidden"],
    )
    dynamic = {name: {0: "B", 1: "T"} for name in names}
    return _bare(exporters.export(BetweenOnly(config), args, names, ["y", "hidden_y"], dynamic))


def _bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the exporter's notes on its origin, which are most of a file without weights."""
    for part in (
        model,
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
    ):
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
