"""Checkpoints: safetensors files that carry their configuration, vocabulary and history; nothing is unpickled."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlite.corpus import CharTokenizer
from gptlite.files import ASSETS, write_atomically
from gptlite.model import GPT, GPTConfig

FOLDER = ASSETS / "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model in evaluation mode, its tokenizer, and `info`: how, when and on what it was trained."""

    model: GPT
    tokenizer: CharTokenizer
    info: dict[str, Any]


def write_tensors(path: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write tensors and a JSON-able `info` to one safetensors file, which appears only when it is whole."""
    import safetensors.torch

    whole = {name: t.contiguous() for name, t in tensors.items()}
    # not with safetensors' own save_file: that lets nobody else read the file
    write_atomically(path, safetensors.torch.save(whole, {"info": json.dumps(info)}))


def read_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote; a ValueError says what is wrong with a broken or foreign file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}.")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            info = json.loads((file.metadata() or {}).get("info", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint ({error}).") from None
    if not isinstance(info, dict):
        raise ValueError(f"{path} is not a GPTlite checkpoint: it does not say what it holds.")
    return tensors, info


def save(
    path: Path, model: GPT, tokenizer: CharTokenizer, info: dict[str, Any], dtype=torch.float16
) -> None:
    """Write a model; `dtype` is that of the file (float16 keeps 11 bits of each weight and halves the size)."""
    tensors = {n: t.to(dtype) for n, t in own_tensors(model).items()}
    write_tensors(
        path,
        tensors,
        {**info, "config": asdict(model.config), "characters": tokenizer.characters},
    )


def load(path: Path | str) -> Checkpoint:
    """The model at `path` in float32, with its tokenizer and info."""
    tensors, info = read_tensors(Path(path))
    model, tokenizer = take_description(info, path)
    load_weights(model, tensors, path)
    return Checkpoint(model, tokenizer, info)


def take_description(info: dict[str, Any], source: Path | str) -> tuple[GPT, CharTokenizer]:
    """A fresh model and the tokenizer that a checkpoint's info describes; their descriptions leave the info."""
    try:
        return GPT(GPTConfig(**info.pop("config"))).eval(), CharTokenizer(
            info.pop("characters")
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} does not describe a GPT ({error}).") from None


def own_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """A model's tensors by name, without the heads: each is its embedding's matrix, whose tensor is there already."""
    return {
        n: t
        for n, t in model.state_dict().items()
        if n.split(".")[-2:] != ["lm_head", "weight"]
    }


def load_weights(
    model: GPT, tensors: dict[str, Tensor], source: Path | str = "the checkpoint"
) -> None:
    """Copy `tensors` into a model; a ValueError names the first that is missing, unknown or of another shape."""
    expected = own_tensors(model)
    for name in sorted(expected.keys() | tensors.keys()):
        have, want = (tuple(d[name].shape) if name in d else None for d in (tensors, expected))
        if have != want:
            raise ValueError(
                f"{source} is of another architecture: {name} is {have}, but the model's is {want}."
            )
    model.load_state_dict(tensors, strict=False)


def load_pretrained(name: str = "teacher") -> Checkpoint:
    """A checkpoint that comes with the book, by name."""
    known = sorted(p.stem for p in FOLDER.glob("*.safetensors"))
    if name not in known:
        raise ValueError(
            f"no checkpoint is called {name!r}; known are {', '.join(known) or 'none'}."
        )
    return load(FOLDER / f"{name}.safetensors")


# GPT-2's Linear is Hugging Face's Conv1D, which stores its matrix transposed
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_GPT2 = {  # what a `GPT2Config` may vary and our GPT does not
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}


def from_hugging_face(theirs: torch.nn.Module) -> GPT:
    """Our model with the weights of a Hugging Face `GPT2LMHeadModel`; a ValueError names what is not as in GPT-2."""
    c = theirs.config
    for name, value in {**_GPT2, "n_inner": 4 * c.n_embd}.items():
        if getattr(c, name, None) not in (None, value):
            raise ValueError(
                f"the model's {name} is {getattr(c, name)}, but GPT-2's is {value}."
            )
    model = GPT(GPTConfig(c.n_layer, c.n_head, c.n_embd, c.n_positions, c.vocab_size)).eval()
    tensors = {n.removeprefix("transformer."): t for n, t in theirs.state_dict().items()}
    tensors = {
        n: t.t() if n.endswith(_TRANSPOSED) else t
        for n, t in tensors.items()
        if n != "lm_head.weight"
    }
    load_weights(model, tensors, "the Hugging Face model")
    return model


def to_hugging_face(model: GPT) -> torch.nn.Module:
    """A Hugging Face `GPT2LMHeadModel` with our model's weights."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise ImportError(
            "Hugging Face's GPT-2 needs transformers: pip install transformers."
        ) from None
    c = model.config
    if c.kv_heads != c.n_head:
        raise ValueError(
            f"GPT-2 has no grouped queries, but the model has {c.kv_heads} KV heads for {c.n_head} heads."
        )
    if (c.n_head * c.head_dim, c.hidden) != (c.n_embd, 4 * c.n_embd):
        raise ValueError(
            f"GPT-2 has heads as wide as its {c.n_embd} channels and MLPs four times as wide, but the model's are "
            f"{c.n_head * c.head_dim} and {c.hidden} wide."
        )
    shape = {
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_embd": c.n_embd,
        "n_positions": c.block_size,
    }
    theirs = GPT2LMHeadModel(
        GPT2Config(**shape, vocab_size=c.vocab_size, bos_token_id=None, eos_token_id=None)
    ).eval()
    ours = {
        n: t.t() if n.endswith(_TRANSPOSED) else t
        for n, t in model.state_dict().items()
        if n != "lm_head.weight"
    }
    theirs.transformer.load_state_dict(ours)
    return theirs


def load_gpt2(name: str = "gpt2") -> GPT:
    """OpenAI's GPT-2 weights from the Hugging Face hub ("gpt2", "gpt2-medium", ...); needs a network the first time."""
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        raise ImportError(
            "the GPT-2 weights need transformers: pip install transformers."
        ) from None
    return from_hugging_face(GPT2LMHeadModel.from_pretrained(name))
