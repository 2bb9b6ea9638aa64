"""Checkpoints: files that carry a model with its configuration, vocabulary and history."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gptlite.corpus import CharTokenizer
from gptlite.files import ASSETS
from gptlite.model import GPT, GPTConfig, check_tied
from gptlite.tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

FOLDER = ASSETS / "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model in evaluation mode, its tokenizer, and `info`: how it was trained."""

    model: GPT
    tokenizer: CharTokenizer
    info: dict[str, Any]


def save(
    path: Path,
    model: GPT,
    tokenizer: CharTokenizer,
    info: dict[str, Any],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a model that `load` reads again; a ValueError says why it could not.

    `dtype` is that of the file: float16 keeps 11 bits of each weight and halves the size.
    """
    check_plain(model)
    tensors = own_tensors(model)
    for name, t in tensors.items():
        if not t.to(dtype).isfinite().all():
            most = t.abs().max().item()
            raise ValueError(f"{name} has weights up to {most:g}, not all finite in {dtype}.")
    described = {"config": asdict(model.config), "characters": tokenizer.characters}
    write_tensors(path, {n: t.to(dtype) for n, t in tensors.items()}, {**info, **described})


def load(path: Path | str) -> Checkpoint:
    """The model at `path` in float32, with its tokenizer and info."""
    tensors, info = read_tensors(Path(path))
    model, tokenizer = take_description(info, path)
    load_weights(model, tensors, path)
    return Checkpoint(model, tokenizer, info)


def take_description(info: dict[str, Any], source: Path | str) -> tuple[GPT, CharTokenizer]:
    """A fresh model and the tokenizer that an info describes, which leave the info."""
    try:
        model = GPT(GPTConfig(**info.pop("config"))).eval()
        return model, CharTokenizer(info.pop("characters"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} does not describe a GPT ({error}).") from None


def check_plain(model: GPT) -> None:
    """Raise a ValueError unless a model is what its config describes, with nothing swapped."""
    with torch.device("meta"):
        plain = GPT(model.config)
    found, expected = _parts(model), _parts(plain)
    for name in sorted(found.keys() | expected.keys()):
        have, want = (parts.get(name, "missing") for parts in (found, expected))
        if have != want:
            raise ValueError(
                f"the model is not as its config says: {name or 'it'} is {have}, not {want}; "
                "take it as it was before it was compiled, quantized or pruned in place."
            )
    check_tied(model)


def _parts(model: nn.Module) -> dict[str, str]:
    """The class of every module and the shape of every tensor."""
    found: dict[str, Any] = {**dict(model.named_modules()), **model.state_dict()}
    return {
        name: f"a {type(part).__module__}.{type(part).__qualname__}"
        + (f" of {tuple(part.shape)}" if isinstance(part, Tensor) else "")
        for name, part in found.items()
    }


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors by name, but for each GPT's head, whose matrix the embedding has."""
    for module in model.modules():
        if isinstance(module, GPT):
            check_tied(module)
    tensors = model.state_dict()
    return {n: t for n, t in tensors.items() if n.split(".")[-2:] != ["lm_head", "weight"]}


def load_weights(
    model: nn.Module, tensors: dict[str, Tensor], source: Path | str = "the checkpoint"
) -> None:
    """Copy tensors into a model; a ValueError names the first that does not fit."""
    expected = own_tensors(model)
    for name in sorted(expected.keys() | tensors.keys()):
        have, want = (tuple(d[name].shape) if name in d else None for d in (tensors, expected))
        if have != want:
            raise ValueError(
                f"{source} is of another architecture: "
                f"{name} is {have}, but the model's is {want}."
            )
    model.load_state_dict(tensors, strict=False)


def load_pretrained(name: str = "teacher") -> Checkpoint:
    """A checkpoint that comes with the book, by name."""
    if not FOLDER.is_dir():
        raise FileNotFoundError(
            f"the book's checkpoints are not installed with the package ({FOLDER} is missing); "
            "clone the book and run there, or load a file of yours with checkpoints.load."
        )
    known = sorted(p.stem for p in FOLDER.glob("*.safetensors"))
    if name not in known:
        raise ValueError(
            f"no checkpoint is called {name!r}; known are {', '.join(known) or 'none'}."
        )
    return load(FOLDER / f"{name}.safetensors")


# GPT-2's Linear is Hugging Face's Conv1D, which stores its matrix transposed
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# what a `GPT2Config` may vary and our GPT does not
_GPT2 = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}


def _transposed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.t() if n.endswith(_TRANSPOSED) else t for n, t in tensors.items()}


def from_hugging_face(theirs: "GPT2LMHeadModel") -> GPT:
    """Our model with the weights of a `GPT2LMHeadModel`; a ValueError names what differs."""
    c = theirs.config
    for name, value in {**_GPT2, "n_inner": 4 * c.n_embd}.items():
        if getattr(c, name, None) not in (None, value):
            raise ValueError(
                f"the model's {name} is {getattr(c, name)}, but GPT-2's is {value}."
            )
    tensors = {n.removeprefix("transformer."): t for n, t in theirs.state_dict().items()}
    if not torch.equal(tensors.pop("lm_head.weight"), tensors["wte.weight"]):
        raise ValueError("the model's lm_head.weight is another matrix than its wte.weight.")
    model = GPT(GPTConfig(c.n_layer, c.n_head, c.n_embd, c.n_positions, c.vocab_size)).eval()
    load_weights(model, _transposed(tensors), "the Hugging Face model")
    return model


def to_hugging_face(model: GPT) -> "GPT2LMHeadModel":
    """A Hugging Face `GPT2LMHeadModel` with our model's weights."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise ImportError(
            "Hugging Face's GPT-2 needs transformers: pip install transformers."
        ) from None
    check_plain(model)
    c = model.config
    if c.kv_heads != c.n_head:
        raise ValueError(
            f"GPT-2 has no grouped queries, but the model has {c.kv_heads} KV heads "
            f"for {c.n_head} heads."
        )
    if (c.n_head * c.head_dim, c.hidden) != (c.n_embd, 4 * c.n_embd):
        raise ValueError(
            f"GPT-2 has heads as wide as its {c.n_embd} channels and MLPs four times as wide, "
            f"but the model's are {c.n_head * c.head_dim} and {c.hidden} wide."
        )
    config = GPT2Config(
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        n_positions=c.block_size,
        vocab_size=c.vocab_size,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = GPT2LMHeadModel(config).eval()
    theirs.transformer.load_state_dict(_transposed(own_tensors(model)))
    return theirs


def load_gpt2(name: str = "gpt2") -> GPT:
    """OpenAI's GPT-2 weights from the Hugging Face hub ("gpt2", "gpt2-medium", ...).

    Needs a network the first time.
    """
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        raise ImportError(
            "the GPT-2 weights need transformers: pip install transformers."
        ) from None
    return from_hugging_face(GPT2LMHeadModel.from_pretrained(name))
