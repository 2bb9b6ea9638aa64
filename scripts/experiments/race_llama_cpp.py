"""Decoding, and reading a prompt, in turns with llama.cpp and with PyTorch's own best.

    python -m venv peers && peers/bin/pip install llama-cpp-python gguf    # takes minutes
    python scripts/experiments/race_llama_cpp.py peers/bin/python

All have the same weights of GPT-2 small's shape, random ones: speed does not depend on them.
llama.cpp runs in a process of its own, llama_cpp_peer.py, which is stopped while it is not its
turn. With --record the result is kept with the book.
"""

import argparse
import copy
import json
import os
import signal
import subprocess
import tempfile
import types
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

# large tensors in large pages; read when torch allocates its first
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch

from gptlite.bench import measure_alternately, ratio
from gptlite.compilation.linears import (
    GemvLinear,
    load_kernels,
    pack_weights,
    single_query_attention,
)
from gptlite.generate import decode_one_token, prefill
from gptlite.kv_cache import StaticKVCache
from gptlite.model import GPT, GPT2_SMALL
from gptlite.quantization.grids import INT4, INT8
from gptlite.quantization.model import quantize_model
from gptlite.results import Measurement, measurement, record
from gptlite.roofline import Machine

PROMPT, NEW = 128, 128
STATIC = {"dynamic": False, "fullgraph": True}
STOCK = "PyTorch max-autotune"
SCHEMES = {"int8": INT8, "int4": INT4}
PEER = Path(__file__).with_name("llama_cpp_peer.py")


class LlamaCpp:
    """llama.cpp in another process, with the weights of a model in one number format."""

    def __init__(
        self,
        python: str,
        model: GPT,
        number: str,
        prompt: list[int],
        further: list[int],
        folder: Path,
    ):
        path = folder / "weights.npz"
        weights = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
        np.savez(path, **weights)
        task = json.dumps({"prompt": prompt, "further": further, "shape": asdict(model.config)})
        command = [python, str(PEER), str(path), number, str(torch.get_num_threads()), task]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self._answer()

    def ask(self, request: str):
        """Its answer, when it is done."""
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        self.process.send_signal(signal.SIGCONT)
        answer = self._answer()
        # or its threads would wait for more by asking all the time
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"llama.cpp ended with status {self.process.wait()}; what it said stands above."
            )
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.send_signal(signal.SIGCONT)
        # its input ends, so it ends, and deletes its copy of the weights
        self.process.communicate()


class Compiled:
    """The same requests, answered by two compiled functions."""

    def __init__(self, model: GPT, prompt: list[int], further: list[int]):
        self.model, self.prompt = model, torch.tensor([prompt])
        self.further = torch.tensor(further).view(-1, 1, 1)
        self.cache = StaticKVCache(
            model.config,
            max_len=len(prompt) + len(further),
            dtype=model.wpe.weight.dtype,
        )
        self.read = torch.compile(fresh(prefill), **STATIC)
        self.step = torch.compile(fresh(decode_one_token), **STATIC)

    def prefill(self) -> torch.Tensor:
        self.cache.rewind()
        return self.read(self.model, self.prompt, self.cache)

    def decode(self) -> None:
        self.cache.rewind(len(self.prompt[0]))
        for token in self.further:
            self.step(self.model, token, self.cache)

    def choose(self) -> list[int]:
        logits = [self.prefill()]
        logits += [self.step(self.model, token, self.cache) for token in self.further]
        return torch.cat(logits).argmax(-1).tolist()


class Ours(Compiled):
    """As the chapter on compilation does it: Linear and attention swapped, weights packed."""

    def __init__(self, model: GPT, number: str, prompt: list[int], further: list[int]):
        load_kernels()
        if number in SCHEMES:
            quantize_model(model, SCHEMES[number])
        else:
            model.swap_linears(GemvLinear)
        packed = pack_weights(model).set_attention(single_query_attention)
        super().__init__(packed, prompt, further)
        # nothing that guards and checks of sizes look at can change here; and C++ calls the
        # kernels sooner than Python
        options, skip = {"size_asserts": False, "cpp_wrapper": True}, "skip_all_guards_unsafe"
        if hasattr(torch.compiler, skip):  # from torch 2.10 on
            options["guard_filter_fn"] = getattr(torch.compiler, skip)
        self.step = torch.compile(fresh(decode_one_token), **STATIC, options=options)
        # the prompt's products on weights packed for them
        with torch._inductor.config.patch(freezing=True):
            self.prefill()
        self.decode()


class Stock(Compiled):
    """The best that PyTorch offers by itself: its own products, tried when it compiles."""

    def __init__(self, model: GPT, prompt: list[int], further: list[int]):
        super().__init__(model, prompt, further)
        with torch._inductor.config.patch(freezing=True, max_autotune=True):
            self.prefill()
            self.decode()


def fresh(f: Callable) -> Callable:
    """The same function with code of its own: what is compiled is kept with the code."""
    return types.FunctionType(f.__code__.replace(), f.__globals__, f.__name__)


def race(python: str, number: str, repeats: int) -> list[Measurement]:
    """Both phases in one number format of the weights; beside few bits all is bfloat16."""
    torch.manual_seed(0)
    model = GPT(GPT2_SMALL).eval()
    model = model if number == "float32" else model.bfloat16()
    tokens = torch.randint(GPT2_SMALL.vocab_size, (PROMPT + NEW,)).tolist()
    prompt, further = tokens[:PROMPT], tokens[PROMPT:]
    with tempfile.TemporaryDirectory() as folder:
        peer = LlamaCpp(python, model, number, prompt, further, Path(folder))
    runners = {} if number in SCHEMES else {STOCK: Stock(copy.deepcopy(model), prompt, further)}
    runners["gptlite"] = Ours(model, number, prompt, further)
    chosen, found = peer.ask("choose"), []
    for who, runner in runners.items():
        same = np.mean([a == b for a, b in zip(runner.choose(), chosen, strict=True)])
        agree = (
            f"after {same:.1%} of the tokens {who} and llama.cpp find the same one likeliest"
        )
        print(f"{number}: {agree}", flush=True)
    context = {"dtype": number, "batch": 1, "context": f"{PROMPT} + {NEW}"}
    context["peer"] = f"llama-cpp-python {peer.version}"
    command = f"python scripts/experiments/{Path(__file__).name} PYTHON"
    # a turn takes about a second
    for phase, calls, count in (("prefill", 8, PROMPT), ("decode", 1, NEW)):
        turns = {"llama.cpp": lambda phase=phase: peer.ask(phase)}
        turns |= {who: getattr(runner, phase) for who, runner in runners.items()}
        fns = {
            who: lambda turn=turn, calls=calls: [turn() for _ in range(calls)]
            for who, turn in turns.items()
        }
        times = measure_alternately(fns, repeats=repeats, warmup=1, device="cpu")
        label = f"GPT-2 small, {number} {phase}"
        for who, t in times.items():
            speed = [calls * count / seconds for seconds in (t.median, t.high, t.low)]
            unit = "tokens/s"
            found.append(Measurement(f"{label}, {who}", *speed, unit, command, context=context))
            print(f"{label}, {who}: {speed[0]:.1f} {unit}")
        for who in [who for who in times if who != "gptlite"]:
            gain, over = ratio(times[who], times["gptlite"]), f"{label}, gptlite over {who}"
            found.append(measurement(over, gain, command=command, **context))
            print(f"{over}: {gain}", flush=True)
    peer.close()
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    python = "the Python of an environment with llama-cpp-python and gguf"
    parser.add_argument("python", help=python)
    numbers = ["float32", "bfloat16", *SCHEMES]
    parser.add_argument("--numbers", nargs="+", default=numbers, choices=numbers)
    parser.add_argument("--repeats", type=int, default=9)
    kept = "add the result to assets/results"
    parser.add_argument("--record", action="store_true", help=kept)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    found = [m for number in args.numbers for m in race(args.python, number, args.repeats)]
    if args.record:
        print(record(Machine.calibrate(torch.device("cpu")), found))


if __name__ == "__main__":
    main()
