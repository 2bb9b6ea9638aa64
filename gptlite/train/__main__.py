"""Train a preset on a corpus and write assets/checkpoints/NAME.safetensors."""

import argparse
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gptlite import checkpoints
from gptlite.corpus import Corpus, load_corpus, windows
from gptlite.device import fast_dtype, pick_device, processor_name
from gptlite.files import check_can_write, write_atomically
from gptlite.model import GPT, GPTConfig
from gptlite.tensor_files import read_tensors
from gptlite.train.config import TrainConfig
from gptlite.train.loop import train
from gptlite.train.losses import LossFn, evaluate, next_token_loss, penalized_loss

PRESETS = {  # of 10.8, 1.0 and 0.4 M parameters
    "teacher": (GPTConfig(dropout=0.1), TrainConfig(steps=5500, batch_size=16)),
    "student": (GPTConfig(n_layer=3, n_head=4, n_embd=160), TrainConfig(steps=1500)),
    "draft": (GPTConfig(n_layer=2, n_head=4, n_embd=128), TrainConfig(steps=2000)),
}


def main(argv: Iterable[str] | None = None) -> None:
    """The command line."""
    args = _parse(argv)
    shape, config = PRESETS[args.preset]
    given = {k: v for k, v in vars(args).items() if v is not None}
    config = replace(config, **{k: given[k] for k in asdict(config) if k in given})
    shape = replace(shape, **{k: given[k] for k in asdict(shape) if k in given})
    out, state = _places(args)
    device = _join()
    corpus = load_corpus(args.corpus)
    # refuses a text that is too short to be evaluated on
    next(windows(corpus.val, T=shape.block_size, B=1))
    torch.manual_seed(config.seed)
    model = GPT(replace(shape, vocab_size=len(corpus.tokenizer))).to(device)
    args.dtype = fast_dtype(device) if args.dtype == "auto" else getattr(torch, args.dtype)
    recipe, loss_fn = _recipe(args, model)
    print(
        f"{model.n_params():,} parameters on {device} in {args.dtype}; "
        f"the run is kept in {state}",
        file=sys.stderr,
    )
    log = train(
        model,
        corpus,
        config,
        loss_fn=loss_fn,
        state_path=state,
        save_every=args.save_every,
        eval_every=args.eval_every,
        dtype=args.dtype,
        compile=args.compile,
        recipe=recipe,
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        machine = {
            "device": processor_name(device),
            "torch": torch.__version__,
            "dtype": str(args.dtype),
        }
        about = {**recipe, "machine": machine, "log": log}
        _finish(args, out, model, corpus, config, about)
    if dist.is_initialized():
        dist.destroy_process_group()


def _places(args: argparse.Namespace) -> tuple[Path, Path]:
    """Where the result goes, and the unfinished run; an OSError says that one cannot."""
    out = args.out or checkpoints.FOLDER / f"{args.preset}.safetensors"
    if not out.name:
        raise IsADirectoryError(f"--out is {out}, which is a folder; name a file in it.")
    state = args.state or out.with_name(out.stem + ".state")
    if out.absolute() == state.absolute():
        raise ValueError(f"--out and --state are both {out}; name two files.")
    for path in (out, state):
        check_can_write(path)
    return out, state


def _join() -> torch.device:
    """The device of this process, which under torchrun is one of a group from now on."""
    device = pick_device()
    if "LOCAL_RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    return device


def _recipe(args: argparse.Namespace, model: GPT) -> tuple[dict[str, Any], LossFn]:
    """What the configuration does not say of a run; and its loss. The model begins as asked."""
    recipe, weight = {}, args.confidence_penalty
    if args.start:
        recipe["start"] = _begin(model, args.start)
    if weight is None:
        return recipe, next_token_loss
    if not 0 <= weight < math.inf:
        raise ValueError(f"--confidence-penalty is {weight}, but must be a number from 0 on.")
    return recipe | {"confidence_penalty": weight}, partial(penalized_loss, weight=weight)


def _begin(model: GPT, path: Path) -> dict[str, Any]:
    """Load the weights of a checkpoint, or of another run's state; how those came about."""
    tensors, info = read_tensors(path)
    try:
        found = {
            "name": path.stem,
            "train": info["train"],
            "steps": len(info["log"]["train_loss"]),
        }
    except (KeyError, TypeError):
        raise ValueError(
            f"{path} does not say how it was trained; start from what python -m gptlite.train "
            "has written."
        ) from None
    weights = {
        n.removeprefix("model."): t
        for n, t in tensors.items()
        if not n.startswith("optimizer.")
    }
    checkpoints.load_weights(model, weights, path)
    return found


def _finish(
    args: argparse.Namespace,
    out: Path,
    model: GPT,
    corpus: Corpus,
    config: TrainConfig,
    about: dict[str, Any],
) -> None:
    """Evaluate the model, and write it: or its record alone, where `out` is named so."""
    val_loss = evaluate(model, corpus.val, model.config.block_size)
    if not math.isfinite(val_loss):
        raise FloatingPointError(
            f"the held-out loss is {val_loss}, so that {out} is not written; a lower learning "
            "rate may help."
        )
    info = {
        "command": _command(args, config.steps, about["log"].get("prolonged", [])),
        "val_loss": val_loss,
        "corpus": _file_name(args.corpus),
        "fingerprint": corpus.fingerprint,
        "train": asdict(config),
        **about,
        "date": time.strftime("%Y-%m-%d"),
    }
    if out.suffix == ".json":  # an experiment: its record is kept, not its weights
        record = {**info, "config": asdict(model.config), "parameters": model.n_params()}
        write_atomically(out, json.dumps(record).encode())
    else:
        checkpoints.save(out, model, corpus.tokenizer, info)
    minutes = about["log"]["seconds"] / 60
    print(f"{out}: held-out loss {val_loss:.4f} nats a character, {minutes:.1f} minutes")


def _command(args: argparse.Namespace, steps: int, prolonged: list[list[int]]) -> str:
    """The command that makes the same weights anywhere, whatever was left to this machine.

    Files are named without the folder that they are in here. A run that was prolonged takes a
    command for each of its lengths, one line each.
    """
    elsewhere = ("preset", "out", "state", "save_every", "eval_every", "compile")
    given = {k: v for k, v in vars(args).items() if v is not None and k not in elsewhere}
    given |= {name: _file_name(given[name]) for name in ("corpus", "start") if name in given}
    given["dtype"] = str(args.dtype).removeprefix("torch.")
    lines = []
    for reached, length in [*prolonged, (steps, steps)]:
        asked = given | ({"steps": length} if prolonged else {})
        options = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items()]
        line = shlex.join(["python", "-m", "gptlite.train", args.preset, *options])
        lines.append(line if reached == length else f"{line}  # stopped at step {reached}")
    return "\n".join(lines)


def _file_name(path: str | Path) -> str:
    """What a file is called; a reader's own `plays` is not taken for the book's."""
    name = Path(path).name
    mistaken = name in ("plays", "tinyshakespeare") and str(path) != name
    return f"./{name}" if mistaken else name


def _parse(argv: Iterable[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gptlite.train",
        description="Train teacher, student or draft; a run that was killed goes on.",
    )
    add = parser.add_argument
    add("preset", choices=PRESETS)
    add(
        "--corpus",
        default="plays",
        help="plays, tinyshakespeare, or the path of a text file",
    )
    for name, value in (asdict(TrainConfig()) | {"dropout": 0.0}).items():
        add(
            f"--{name.replace('_', '-')}",
            type=type(value),
            help="default: the preset's",
        )
    add(
        "--start",
        type=Path,
        help="weights to begin with: a checkpoint, or the state of another run",
    )
    add(
        "--confidence-penalty",
        type=float,
        metavar="WEIGHT",
        help="of the entropy of the predictions; default: none",
    )
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    has_compiler = bool(shutil.which("c++") or shutil.which("g++") or torch.cuda.is_available())
    add("--compile", action=argparse.BooleanOptionalAction, default=has_compiler)
    add("--eval-every", type=int, default=250, metavar="STEPS")
    add("--save-every", type=int, default=100, metavar="STEPS")
    add(
        "--out",
        type=Path,
        help="default: assets/checkpoints/PRESET.safetensors; a name in .json keeps a record "
        "of the run and no weights",
    )
    add(
        "--state",
        type=Path,
        help="where the unfinished run is kept; default: beside --out",
    )
    return parser.parse_args(list(argv) if argv is not None else None)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
