"""Importing is free of surprises: torch is enough for the core, and nothing happens by it."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TORCH_ALONE = """
import sys

class Missing:
    '''As if these were not installed.'''
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {others}:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Missing())
import gptlite.kv_cache, gptlite.generate, gptlite.model
import gptlite.corpus, gptlite.device, gptlite.muon
import gptlite.compilation.linears, gptlite.flash_attention.tiles, gptlite.smaller_caches
import gptlite.quantization.linear, gptlite.quantization.activations
import gptlite.quantization.training, gptlite.distillation.losses
import gptlite.pruning.masks, gptlite.pruning.structure, gptlite.pruning.shape_search
from gptlite.generate import generate
import torch

torch.manual_seed(0)
model = gptlite.model.GPT(gptlite.model.GPTConfig(1, 1, 8, 8, 5)).eval()
cache = gptlite.kv_cache.KVCache(model.config)
print(generate(model, torch.zeros(1, 1, dtype=torch.long), 3, cache).shape[1])
"""

NOTHING_HAPPENS = """
import contextlib, io, json, os, sys, threading
import torch

def state():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "random numbers": torch.random.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "running threads": threading.active_count(),
        "environment": dict(os.environ),
        "folder": sorted(os.listdir()),
        "CUDA": torch.cuda.is_initialized(),
    }

before, printed = state(), io.StringIO()
with contextlib.redirect_stdout(printed):
    import gptlite.model, gptlite.kv_cache, gptlite.generate
    import gptlite.corpus, gptlite.train, gptlite.checkpoints
    import gptlite.compilation.linears, gptlite.flash_attention.tiles, gptlite.smaller_caches
    import gptlite.quantization.model, gptlite.quantization.activations
    import gptlite.quantization.training, gptlite.distillation.labels
    import gptlite.pruning.masks, gptlite.pruning.structure, gptlite.pruning.shape_search
after = state()
changed = [name for name in before if before[name] != after[name]]
others = ("transformers", "matplotlib", "IPython", "onnx", "torchao", "optuna", "torch._dynamo")
heavy = [m for m in others if m in sys.modules]
print(json.dumps({"changed": changed, "heavy": heavy, "printed": printed.getvalue()}))
"""


def python(code, folder):
    env = {k: v for k, v in os.environ.items() if k != "GPTLITE_CACHE"}
    env |= {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(folder),
        "XDG_CACHE_HOME": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_core_works_with_torch_alone(tmp_path):
    others = [
        "safetensors",
        "tqdm",
        "transformers",
        "matplotlib",
        "IPython",
        "onnx",
        "onnxruntime",
        "torchao",
        "triton",
    ]
    assert python(TORCH_ALONE.replace("{others}", repr(set(others))), tmp_path) == "4\n"


def test_nothing_happens_at_import(tmp_path):
    assert json.loads(python(NOTHING_HAPPENS, tmp_path)) == {
        "changed": [],
        "heavy": [],
        "printed": "",
    }
    assert not list(tmp_path.iterdir())  # no cache folder either
