"""What goes in comes out, broken and foreign files are named, and nothing is ever unpickled."""

import ast
import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn.utils import parametrize

import gptlite
from gptlite import checkpoints
from gptlite.checkpoints import (
    from_hugging_face,
    load,
    load_pretrained,
    load_weights,
    own_tensors,
    save,
    to_hugging_face,
    write_tensors,
)
from gptlite.corpus import CharTokenizer
from gptlite.pruning import BitmapLinear, CsrLinear
from gptlite.quantization import Grid, LoRALinear, QATLinear, quantize_model

LETTERS = CharTokenizer("abcdefghijklmnopq")
INFO = {
    "command": "python -m gptlite.train",
    "val_loss": 1.25,
    "log": {"train_loss": [2.0, 1.5]},
}


@pytest.fixture(scope="module")
def whole(make_model, tmp_path_factory):
    """The bytes of a good checkpoint."""
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"
    save(path, make_model(n_kv_head=2), LETTERS, INFO)
    return path.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_comes_back_as_it_was_saved(make_model, tmp_path, dtype):
    model, path = make_model(n_kv_head=2, dropout=0.25), tmp_path / "deep" / "model.safetensors"
    save(path, model, LETTERS, INFO, dtype)
    back = load(str(path))
    assert back.model.config == model.config
    assert back.tokenizer.characters == LETTERS.characters
    assert back.info == INFO
    assert not back.model.training
    assert back.model.lm_head.weight is back.model.wte.weight
    for (name, p), q in zip(model.named_parameters(), back.model.parameters(), strict=True):
        assert q.dtype == torch.float32
        # in float32 to the bit, else rounded once
        assert torch.equal(q, p.to(dtype).float()), name
    # the tied matrix is stored once
    assert path.stat().st_size < model.n_params() * dtype.itemsize + 5000


def test_float16_is_close_enough_to_generate_from(make_model, tmp_path):
    model = make_model()
    save(tmp_path / "m", model, LETTERS, {})
    idx = torch.arange(17)[None]
    torch.testing.assert_close(
        load(tmp_path / "m").model(idx), model(idx), atol=0.02, rtol=0.02
    )


def test_saving_leaves_the_model_and_the_info_alone(make_model, tmp_path):
    model = make_model()
    before, info = [p.clone() for p in model.parameters()], json.loads(json.dumps(INFO))
    save(tmp_path / "m", model, LETTERS, info)
    assert info == INFO
    assert all(
        torch.equal(p, q) and q.dtype == torch.float32
        for p, q in zip(before, model.parameters(), strict=True)
    )


# What `load` could not read


def compiled(model):
    return torch.compile(model)


def quantized(model):
    quantize_model(model, Grid(4, 8))
    return model


def masked(model):
    class Mask(torch.nn.Module):
        def forward(self, weight):
            return weight * (weight > 0)

    parametrize.register_parametrization(model.h[1].mlp.c_fc, "weight", Mask())
    return model


def adapted(model):
    return model.swap_linears(lambda linear: LoRALinear(linear, tuple(linear.weight.shape)))


def rounding(model):
    """Its tensors have the same names and shapes, but it is another function."""
    return model.swap_linears(lambda linear: QATLinear(linear, Grid(3, 8)))


def shortened(model):
    del model.h[1]
    return model


def narrowed(model):
    model.h[0].mlp.c_fc = torch.nn.Linear(32, 99)
    return model


def untied(model):
    model.lm_head = torch.nn.Linear(32, 17, bias=False)
    return model


CHANGES = {
    compiled: "it is a torch._dynamo.eval_frame.OptimizedModule, not a gptlite.model.GPT",
    quantized: "h.0.attn.c_attn is a gptlite.quantization.linear.QuantizedLinear, not a",
    masked: "h.1.mlp.c_fc is a torch.nn.utils.parametrize.ParametrizedLinear, not a",
    adapted: "h.0.attn.c_attn is a gptlite.quantization.training.LoRALinear, not a",
    rounding: "h.0.attn.c_attn is a gptlite.quantization.training.QATLinear, not a",
    shortened: "h.1 is missing, not a gptlite.model.Block",
    narrowed: "h.0.mlp.c_fc.bias is a torch.Tensor of (99,), not a torch.Tensor of (128,)",
    untied: "lm_head.weight is another matrix than wte.weight",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_load_could_not_read_is_not_saved_over_what_it_could(make_model, tmp_path, change):
    path = tmp_path / "m"
    save(path, make_model(), LETTERS, {})
    before, message = path.read_bytes(), CHANGES[change]
    with pytest.raises(ValueError, match=re.escape(message)):
        save(path, change(make_model()), LETTERS, {})
    assert path.read_bytes() == before


@pytest.mark.parametrize("swap", [CsrLinear, BitmapLinear])
def test_a_model_whose_weights_are_stored_otherwise_is_not_saved(make_model, tmp_path, swap):
    with pytest.raises(ValueError, match=f"c_attn is a .*{swap.__name__}, not a torch.nn"):
        save(tmp_path / "m", make_model().swap_linears(swap), LETTERS, {})


def test_a_model_compiled_in_place_is_saved_as_it_is(make_model, tmp_path):
    model = make_model()
    model.compile()
    save(tmp_path / "m", model, LETTERS, {}, torch.float32)
    assert torch.equal(load(tmp_path / "m").model.wpe.weight, model.wpe.weight)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (
            1e6,
            torch.float16,
            "h.1.mlp.c_fc.bias has weights up to 1e+06, not all finite in torch.fl",
        ),
        (
            math.nan,
            torch.float32,
            "h.1.mlp.c_fc.bias has weights up to nan, not all finite in torch",
        ),
    ],
)
def test_a_weight_that_the_file_cannot_hold_is_refused(
    make_model, tmp_path, value, dtype, message
):
    model, path = make_model(), tmp_path / "m"
    save(path, model, LETTERS, {})
    before = path.read_bytes()
    model.h[1].mlp.c_fc.bias.data[3] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        save(path, model, LETTERS, {}, dtype)
    assert path.read_bytes() == before
    model.h[1].mlp.c_fc.bias.data[3] = 6e4  # float16 ends at 65,504
    save(path, model, LETTERS, {})
    assert load(path).model.h[1].mlp.c_fc.bias[3] == 6e4


def test_what_a_training_state_and_a_load_keep_is_tied(make_model):
    """Their tensors have no head, so that another head would be gone."""
    pair = torch.nn.ModuleDict({"first": make_model(), "second": untied(make_model())})
    with pytest.raises(ValueError, match=r"lm_head\.weight is another matrix than wte\.weight"):
        own_tensors(pair)
    with pytest.raises(ValueError, match=r"lm_head\.weight is another matrix than wte\.weight"):
        load_weights(untied(make_model()), own_tensors(make_model()))


# Broken and foreign files


@given(st.data())
def test_a_truncated_checkpoint(whole, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "cut.safetensors"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(
        ValueError, match=r"cut\.safetensors is not a whole checkpoint \(.*\)\."
    ):
        load(path)


@given(st.binary(max_size=300))
def test_random_bytes(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("random") / "random.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"random\.safetensors is not a "):
        load(path)


@given(st.data())
def test_a_changed_byte_is_never_worse_than_a_sentence(whole, tmp_path_factory, data):
    """In the header it is an error in one sentence, or harmless (in the digest's name)."""
    path = tmp_path_factory.mktemp("flip") / "flip.safetensors"
    header = 8 + int.from_bytes(whole[:8], "little")
    at, byte = data.draw(st.integers(0, header - 1)), data.draw(st.integers(0, 255))
    path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
    said = "flip.safetensors"
    try:
        load(path)
    except ValueError as error:
        said = str(error)
    assert "flip.safetensors" in said


def test_files_of_others(tmp_path):
    path = tmp_path / "theirs.safetensors"
    for metadata in (None, {"format": "pt"}, {"info": "3"}, {"info": "[]"}, {"info": "null"}):
        save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(
            ValueError,
            match=r"theirs\.safetensors is not a GPTlite checkpoint: it does not say",
        ):
            load(path)
    save_file({"weight": torch.zeros(2)}, path, metadata={"info": "{"})
    with pytest.raises(ValueError, match=r"theirs\.safetensors is not a whole checkpoint"):
        load(path)


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"config": {}},  # no characters
        {"config": 3, "characters": "ab"},
        {"config": {"n_layers": 2}, "characters": "ab"},
        {"config": {"n_layer": "two"}, "characters": "ab"},
        {"config": {"n_layer": 1.5, "n_head": 1, "n_embd": 4}, "characters": "ab"},
        {"config": {"n_embd": 7}, "characters": "ab"},
        {"config": {"n_layer": 0}, "characters": "ab"},
        {"config": {"n_layer": 1, "n_head": 1, "n_embd": 4}, "characters": 3},
    ],
)
def test_a_checkpoint_that_describes_no_gpt(tmp_path, info):
    write_tensors(tmp_path / "odd", {"a": torch.zeros(3)}, info)
    with pytest.raises(ValueError, match=r"odd does not describe a GPT \(.*\)\."):
        load(tmp_path / "odd")


def test_weights_of_another_architecture(make_model):
    model = make_model()
    weights = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    before = [p.clone() for p in model.parameters()]
    wrong = {
        "wte.weight is (18, 32), but the model's is (17, 32).": weights
        | {"wte.weight": torch.zeros(18, 32)},
        "ln_f.bias is None, but the model's is (32,).": {
            n: t for n, t in weights.items() if n != "ln_f.bias"
        },
        "h.2.ln_1.bias is (32,), but the model's is None.": weights
        | {"h.2.ln_1.bias": torch.zeros(32)},
    }
    for message, tensors in wrong.items():
        with pytest.raises(
            ValueError, match=re.escape(f"mine is of another architecture: {message}")
        ):
            load_weights(model, tensors, "mine")
    # nothing was half loaded
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_a_checkpoint_whose_weights_do_not_fit_its_own_configuration(make_model, tmp_path):
    tensors = {n: t for n, t in make_model().state_dict().items() if n != "lm_head.weight"}
    config = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 12, "vocab_size": 17}
    write_tensors(tmp_path / "m", tensors, {"config": config, "characters": LETTERS.characters})
    with pytest.raises(
        ValueError, match=r"m is of another architecture: wpe\.weight is \(24, 32\), but"
    ):
        load(tmp_path / "m")


def test_no_checkpoint_there(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):  # a folder is none either
        with pytest.raises(FileNotFoundError, match=re.escape(f"no checkpoint at {path}.")):
            load(path)


def test_an_unknown_name_lists_the_known(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path)
    with pytest.raises(
        ValueError, match=re.escape("no checkpoint is called 'teacher'; known are none.")
    ):
        load_pretrained()
    for name in ("teacher", "draft"):
        save(tmp_path / f"{name}.safetensors", make_model(), LETTERS, {"name": name})
    (tmp_path / "teacher.state").write_bytes(b"unfinished")
    for name in ("taecher", "../teacher", "teacher.safetensors", ""):
        message = f"no checkpoint is called {name!r}; known are draft, teacher."
        with pytest.raises(ValueError, match=re.escape(message)):
            load_pretrained(name)
    assert load_pretrained().info["name"] == "teacher"
    assert load_pretrained("draft").info["name"] == "draft"


def test_outside_of_a_checkout_there_is_no_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path / "assets" / "checkpoints")
    message = (
        f"are not installed with the package ({tmp_path / 'assets' / 'checkpoints'} is missing"
    )
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        load_pretrained()


def test_every_checkpoint_of_the_book_loads_and_says_how_it_was_made():
    paths = list(checkpoints.FOLDER.glob("*.safetensors"))
    assert {"teacher", "draft"} <= {path.stem for path in paths}
    for path in paths:
        info = load_pretrained(path.stem).info
        assert info.keys() >= {
            "command",
            "val_loss",
            "train",
            "log",
            "machine",
            "corpus",
            "date",
        }, path
        assert len(info["log"]["train_loss"]) == info["train"]["steps"]
        assert info["command"].startswith("python -m gptlite.train ")
        assert str(Path.home()) not in json.dumps(info)  # no trace of one machine's folders
        assert path.stat().st_size < 25e6


# Hugging Face's


def test_a_head_of_its_own_is_not_lost_on_the_way_to_or_from_hugging_face(make_model):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"lm_head\.weight is another matrix than wte\.weight"):
        to_hugging_face(untied(make_model()))
    with pytest.raises(ValueError, match=r"c_attn is a .*QATLinear, not a"):
        to_hugging_face(rounding(make_model()))
    theirs = to_hugging_face(make_model())
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight * 2)
    with pytest.raises(ValueError, match=r"lm_head\.weight is another matrix than its wte"):
        from_hugging_face(theirs)


def test_hugging_faces_library_is_asked_for_only_where_it_is_used(make_model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(
        ImportError,
        match=r"Hugging Face's GPT-2 needs transformers: pip install transformers\.",
    ):
        to_hugging_face(make_model())
    with pytest.raises(
        ImportError, match=r"the GPT-2 weights need transformers: pip install transformers\."
    ):
        checkpoints.load_gpt2()


# Nothing is unpickled

UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def names_used(tree):
    """Dotted names, and modules imported, in a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module or ""
        elif isinstance(node, (ast.Attribute, ast.Name)):
            yield ast.unparse(node)


def unsafe_names(source):
    bad = {
        "torch.load",
        "torch.save",
        "torch.hub.load",
        "np.load",
        "numpy.load",
        "eval",
        "exec",
        "compile",
    }
    return sorted(
        n for n in names_used(ast.parse(source)) if n in bad or n.split(".")[0] in UNSAFE
    )


def test_nothing_in_the_package_unpickles_or_evaluates():
    sources = sorted(Path(gptlite.__file__).parent.rglob("*.py"))
    assert len(sources) > 8
    for source in sources:
        found = [
            n for n in unsafe_names(source.read_text()) if n != "compile"
        ]  # an argument of `train` is called so
        assert not found, f"{source.name} uses {found}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "from torch import load",
        "eval('1')",
    ],
)
def test_the_scan_above_finds_what_it_looks_for(source):
    assert unsafe_names(source)
