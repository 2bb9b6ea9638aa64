"""The ONNX files that the site serves, as the last build made them."""

import gzip
import json
import os

import pytest
from site_files import SITE

from gptlite.onnx_runtime import open_session

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.site

import onnx_files  # noqa: E402


@pytest.fixture(scope="module")
def models():
    folder = SITE / "try_it" / "models"
    if not folder.exists():
        message = "the model in the page was left out of this build; see the output of `make book`."
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    return folder


def test_what_a_reader_downloads_stays_small(models):
    about = json.loads((models / "models.json").read_text(encoding="utf-8"))["models"]
    runtime = sum(len(gzip.compress(path.read_bytes(), 6)) for path in (models.parent / "ort").glob("*.*"))
    total = {name: runtime + len(gzip.compress((models / f"{name}.onnx").read_bytes(), 6)) for name in about}
    assert total["int8"] <= 15e6
    assert total["int4"] <= 10e6
    assert total["int4"] < total["int8"] < total["fp32"]
    assert all(about[name]["bytes"] == (models / f"{name}.onnx").stat().st_size for name in about)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_calibration_multiplies_what_the_blocks_multiply(models, precision):
    import numpy as np
    import onnx

    from gptlite.checkpoints import load_pretrained

    config = load_pretrained("teacher").model.config
    path = models / f"calibrate-{precision}.onnx"
    assert path.stat().st_size < 20_000  # the weights are made when it is loaded
    graph = onnx.load(path).graph
    assert sum("MatMul" in node.op_type for node in graph.node) == 4 * config.n_layer
    for rows in (1, 5):
        y = open_session(path, threads=1).run(None, {"x": np.ones((rows, config.n_embd), np.float32)})[0]
        assert y.shape == (rows, config.n_embd)
        assert 0.1 < y.min() <= y.max() < 10  # neither overflow nor numbers too small to be fast


def test_the_additions_are_as_many_as_they_say(models):
    import numpy as np

    y = open_session(models / "calibrate-ops.onnx", threads=1, optimize=False).run(
        None, {"x": np.ones((1, 384), np.float32)}
    )[0]
    assert (y == onnx_files.CALIBRATION_OPS + 1).all()
