"""The ONNX files that the site serves, as the last build made them."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from site_files import SITE

from gptlite.checkpoints import load_pretrained
from gptlite.model import GPTConfig
from gptlite.onnx_export.cache import cache_names
from gptlite.onnx_export.files import load_onnx
from gptlite.onnx_export.sessions import open_session, optimized

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.site


@pytest.fixture(scope="module")
def models():
    folder = SITE / "try_it" / "models"
    if not folder.exists():
        message = (
            "the model in the page was left out of this build; see the output of `make book`."
        )
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    return folder


@pytest.fixture(scope="module")
def config() -> GPTConfig:
    """The teacher's shape."""
    return load_pretrained("teacher").model.config


def test_what_a_reader_downloads_stays_small(models):
    about = json.loads((models / "models.json").read_text(encoding="utf-8"))["models"]
    runtime = sum(
        len(gzip.compress(path.read_bytes(), 6)) for path in (models.parent / "ort").glob("*.*")
    )
    total = {
        name: runtime + len(gzip.compress((models / f"{name}.onnx").read_bytes(), 6))
        for name in about
    }
    assert total["int8"] <= 15e6
    assert total["int4"] <= 10e6
    assert total["int4"] < total["int8"] < total["fp32"]
    assert all(
        about[name]["bytes"] == (models / f"{name}.onnx").stat().st_size for name in about
    )


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_calibration_multiplies_what_the_blocks_multiply(models, config, precision):
    path = models / f"calibrate-{precision}.onnx"
    assert path.stat().st_size < 20_000  # the weights are made when it is loaded
    graph = onnx.load(path).graph
    assert sum("MatMul" in node.op_type for node in graph.node) == 4 * config.n_layer
    for T in (1, 5):
        y = open_session(path, threads=1).run(
            None, {"x": np.ones((1, T, config.n_embd), np.float32)}
        )[0]
        assert y.shape == (1, T, config.n_embd)
        assert (
            0.1 < y.min() <= y.max() < 10
        )  # neither overflow nor numbers too small to be fast


@pytest.mark.parametrize(("T", "P"), [(1, 0), (1, 7), (5, 0)])
def test_the_attention_alone_takes_and_returns_the_models_cache(models, config, T, P):
    path = models / "calibrate-attention.onnx"
    assert path.stat().st_size < 20_000
    session = open_session(path, threads=1)
    feed = {"x": np.ones((1, T, config.n_head * config.head_dim), np.float32)}
    shape = (1, config.kv_heads, P, config.head_dim)
    feed |= {
        name: np.ones(shape, np.float32) for name in cache_names(config, "past", by_layer=True)
    }
    assert {given.name for given in session.get_inputs()} == set(feed)
    names = [output.name for output in session.get_outputs()]
    y, *new = session.run(names, feed)
    assert names[1:] == cache_names(config, "new", by_layer=True)
    assert y == pytest.approx(
        np.ones((1, T, config.n_head * config.head_dim))
    )  # the mean of ones
    assert all(tensor.shape == (1, config.kv_heads, T, config.head_dim) for tensor in new)


def test_the_parts_leave_out_the_embedding_and_the_head_alone(models):
    whole = operators(models / "fp32.onnx")
    parts = sum(
        (
            operators(models / f"calibrate-{name}.onnx")
            for name in ("fp32", "attention", "between")
        ),
        Counter(),
    )
    rest = whole - parts
    assert (
        rest["MatMul"] == rest["LayerNormalization"] == 1
    )  # of the last position, before the head and in it
    assert not {"FusedMatMul", "Softmax", "Gelu", "Concat", "Transpose", "Split"} & set(rest)
    assert set(rest) <= {
        "MatMul",
        "LayerNormalization",
        "Gather",
        "Add",
        "Slice",
        "Shape",
        "Squeeze",
        "Unsqueeze",
    }


def operators(path: Path) -> Counter:
    """The operators of a file's optimised graph; a GELU is one with its bias or without."""
    graph = optimized(load_onnx(path)).graph
    return Counter(node.op_type.replace("FastGelu", "Gelu") for node in graph.node)
