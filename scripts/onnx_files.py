"""The ONNX files that the site serves: graphs to walk through, the teacher to run, and what predicts its speed.

python scripts/onnx_files.py FOLDER      writes FOLDER/graphs and FOLDER/models; `make book` does so by itself
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
from onnx import TensorProto, helper, numpy_helper

from gptlite import onnx_export, onnx_weights
from gptlite.checkpoints import Checkpoint, load_pretrained, write_atomically
from gptlite.generate import generate
from gptlite.kv_cache import KVCache
from gptlite.model import GPTConfig
from gptlite.onnx_runtime import check_onnx, optimized

PROMPT, CHARACTERS = "ROMEO:\n", 100
CALIBRATION_OPS = 200
GROUP = 32  # weights to a scale in 4 bits


@cache
def exported_teacher() -> tuple[Checkpoint, onnx.ModelProto]:
    """The trained teacher, and one step of it with its cache: exported once for all files."""
    checkpoint = load_pretrained("teacher")
    return checkpoint, onnx_export.export_cached(checkpoint.model)


def write_graphs(folder: Path) -> None:
    """Graphs without weights: the two-head block, captured in several ways, and the GPT."""
    torch.manual_seed(0)
    block, x = onnx_export.TwoHeadBlock().eval(), torch.randn(2, 8, 64)
    given = ([x], ["x"], ["y"], {"x": {0: "B", 1: "T"}})
    checkpoint, step = exported_teacher()
    graphs = {
        "block_trace": onnx_export.export_torchscript(block, *given),
        "block_script": onnx_export.export_torchscript(torch.jit.script(block), *given),
        "block_eval_raw": onnx_export.export(block, *given, optimize=False),
        "block_eval": onnx_export.export(block, *given),
        "block_train": onnx_export.export(block, *given, training=True),
        "gpt": onnx_export.export_gpt(checkpoint.model),
        "gpt_appending": step,
        "gpt_optimized": optimized(step),
        "gpt_int8": optimized(onnx_weights.quantize_dynamic(step)),
    }
    for name, graph in graphs.items():
        write_atomically(folder / f"{name}.onnx", onnx_weights.without_weights(graph).SerializeToString())


def write_models(folder: Path) -> None:
    """The teacher in three precisions, files that calibrate a reader's machine, and models.json about all of them."""
    checkpoint, exported = exported_teacher()
    model, config = checkpoint.model, checkpoint.model.config
    precisions = {
        "fp32": exported,
        "int8": onnx_weights.quantize_dynamic(exported),
        "int4": onnx_weights.quantize_int4(exported, GROUP),
    }
    about = {}
    for name, graph in precisions.items():
        check_onnx(graph)
        content = onnx_weights.store_half(graph).SerializeToString()
        write_atomically(folder / f"{name}.onnx", content)
        rest = [node for node in optimized(graph).graph.node if "MatMul" not in node.op_type]
        about[name] = {
            "file": f"{name}.onnx",
            "bytes": len(content),
            "compressed": len(gzip.compress(content, 6)),
            "ops": len(rest),  # all but products; attention's own and the head's are in no term
        }
        write_atomically(folder / f"calibrate-{name}.onnx", products_only(config, PRODUCTS[name]).SerializeToString())
    write_atomically(folder / "calibrate-ops.onnx", additions(config).SerializeToString())
    idx = checkpoint.tokenizer.encode(PROMPT)[None]
    text = generate(model, idx, CHARACTERS, KVCache(config), temperature=0)[0, idx.shape[1] :]
    shape = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    description = {
        "config": {name: getattr(config, name) for name in shape}
        | {"n_kv_head": config.kv_heads, "head_dim": config.head_dim},
        "vocabulary": "".join(checkpoint.tokenizer.characters),
        "models": about,
        "calibration": {**{name: f"calibrate-{name}.onnx" for name in about}, "ops": "calibrate-ops.onnx"},
        "calibration_ops": CALIBRATION_OPS,
        "greedy": {"prompt": PROMPT, "text": checkpoint.tokenizer.decode(text)},
    }
    write_atomically(folder / "models.json", json.dumps(description, indent=1).encode())


# A product (R, K) x (K, N), its weight made of one number when the file is loaded: a few kilobytes of file read as many
# bytes a step as the model. The numbers differ by layer, or the runtime would make equal weights one, and keep what
# passes through them near its size.
Product = Callable[[str, str, int, int, int], tuple[list[onnx.NodeProto], list[onnx.TensorProto]]]


def _expand(name: str, value: np.ndarray, shape: list[int]) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    constants = [
        numpy_helper.from_array(value, f"{name}.one"),
        numpy_helper.from_array(np.array(shape), f"{name}.shape"),
    ]
    return helper.make_node("Expand", [f"{name}.one", f"{name}.shape"], [name]), constants


def fp32_product(x: str, y: str, K: int, N: int, i: int) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """MatMul with a float32 weight."""
    weight, constants = _expand(f"{y}.w", np.array((1 + i / 100) / K, np.float32), [K, N])
    return [weight, helper.make_node("MatMul", [x, f"{y}.w"], [y])], constants


def int8_product(x: str, y: str, K: int, N: int, i: int) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """What the runtime makes of a dynamically quantized product: one operator."""
    weight, constants = _expand(f"{y}.w", np.array(64 + i, np.int8), [K, N])
    constants.append(numpy_helper.from_array(np.array(1 / (64 * K), np.float32), f"{y}.scale"))
    product = helper.make_node("DynamicQuantizeMatMul", [x, f"{y}.w", f"{y}.scale"], [y], domain="com.microsoft")
    return [weight, product], constants


def int4_product(x: str, y: str, K: int, N: int, i: int) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """MatMulNBits: two weights a byte, i and 6 - i, each stored with 8 added; a scale a group. For 8 layers at most."""
    weight, constants = _expand(f"{y}.w", np.array(16 * (8 + i) + 14 - i, np.uint8), [N, K // GROUP, GROUP // 2])
    scale, more = _expand(f"{y}.s", np.array((1 + i / 100) / (3 * K), np.float32), [N * K // GROUP])
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


PRODUCTS: dict[str, Product] = {"fp32": fp32_product, "int8": int8_product, "int4": int4_product}


def products_only(config: GPTConfig, product: Product) -> onnx.ModelProto:
    """y (R, C) = all products of the blocks with weights, and nothing else, of x (R, C)."""
    C, A, hidden = config.n_embd, config.n_head * config.head_dim, config.hidden
    nodes, constants, x = [], [], "x"
    ends = [numpy_helper.from_array(np.array([n]), name) for name, n in (("from", 0), ("to", A), ("axis", 1))]
    for i in range(config.n_layer):
        chain = (
            ("qkv", C, A + 2 * config.kv_heads * config.head_dim),
            ("out", A, C),
            ("up", C, hidden),
            ("down", hidden, C),
        )
        for name, K, N in chain:
            if name == "out":  # the projection back reads as many channels as the queries have
                nodes.append(helper.make_node("Slice", [x, "from", "to", "axis"], [f"{x}.heads"]))
                x = f"{x}.heads"
            more, given = product(x, f"{name}.{i}", K, N, i)
            nodes, constants, x = nodes + more, constants + given, f"{name}.{i}"
    nodes.append(helper.make_node("Identity", [x], ["y"]))
    return _model("products", nodes, ["R", C], [*constants, *ends])


def additions(config: GPTConfig) -> onnx.ModelProto:
    """y (1, C) = x added up `CALIBRATION_OPS` times: next to nothing but starting operators."""
    names = ["x", *(f"sum.{i}" for i in range(CALIBRATION_OPS - 1)), "y"]
    nodes = [helper.make_node("Add", [a, "x"], [b]) for a, b in zip(names, names[1:], strict=False)]
    return _model("additions", nodes, [1, config.n_embd], [])


def _model(
    name: str, nodes: list[onnx.NodeProto], shape: list[int | str], constants: list[onnx.TensorProto]
) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(end, TensorProto.FLOAT, shape) for end in "xy")
    opsets = [helper.make_opsetid("", onnx_export.OPSET), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, name, [x], [y], constants)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def main() -> None:
    """The command line."""
    folder = Path(sys.argv[1])
    write_graphs(folder / "graphs")
    write_models(folder / "models")


if __name__ == "__main__":
    main()
