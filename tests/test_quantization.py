"""A model in few bits: every Linear swapped, its losses, its bytes, and its file."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st

from gptlite import checkpoints
from gptlite.checkpoints import load_pretrained, read_tensors, write_tensors
from gptlite.corpus import CharTokenizer, sample_batch
from gptlite.generate import generate, stream_text
from gptlite.kv_cache import KVCache
from gptlite.model import GPT, GPTConfig
from gptlite.quantization.files import load_quantized, save_quantized
from gptlite.quantization.fits import awq, gptq, relative_error
from gptlite.quantization.grids import INT4, INT8, Grid, round_to_nearest
from gptlite.quantization.linear import Int4Linear, QuantizedEmbedding, QuantizedLinear
from gptlite.quantization.model import input_gram, quantize_model
from gptlite.quantization.training import qlora
from gptlite.train import evaluate

LETTERS, INFO = CharTokenizer(), {"name": "tiny", "val_loss": 1.25}
GRIDS = [INT8, INT4, Grid(3, 32), Grid(4, 64, symmetric=False)]


@pytest.fixture(scope="module")
def make(make_model):
    """A function that makes a tiny model of the plays' vocabulary; rows fill blocks of 64."""
    return lambda **config: make_model(
        **{"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 65} | config
    )


@pytest.fixture(scope="module")
def teacher():
    return load_pretrained("teacher").model


def prompt(B, T, seed=0):
    return torch.randint(65, (B, T), generator=torch.Generator().manual_seed(seed))


def quantized(model, *args, **options):
    """A quantized copy."""
    twin = copy.deepcopy(model)
    quantize_model(twin, *args, **options)
    return twin


def linears(model, kind=nn.Linear):
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


# swapping


@pytest.mark.parametrize("grid", GRIDS)
def test_every_linear_is_swapped_and_the_embedding_shares_the_head(make, grid):
    model = make()
    before = linears(copy.deepcopy(model))
    reports = quantize_model(model, grid)
    made = linears(model, QuantizedLinear)
    assert not linears(model) and isinstance(model.wte, QuantizedEmbedding)
    assert set(made) == {r.name for r in reports} == set(before) and len(reports) == 2 * 4 + 1
    for name, linear in before.items():
        assert torch.equal(
            made[name].weight, round_to_nearest(linear.weight.detach(), grid).dequantize()
        )
        assert (made[name].bias is None) == (linear.bias is None)
        assert linear.bias is None or torch.equal(made[name].bias, linear.bias)
    assert torch.equal(model.wte(torch.arange(65)), model.lm_head.weight)
    assert not any(name.startswith("wte") for name in model.state_dict())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reports_say_what_the_tensors_are(make, grid, dtype):
    model = make(n_kv_head=1).to(dtype)
    before = linears(copy.deepcopy(model))
    for report in quantize_model(model, grid):
        linear, made = before[report.name], model.get_submodule(report.name)
        assert report.shape == tuple(linear.weight.shape) == tuple(made.weight.shape)
        assert report.before == sum(p.nbytes for p in linear.parameters())
        assert report.after == made.nbytes == sum(t.nbytes for t in made.state_dict().values())
        assert report.after < report.before
        assert report.error == pytest.approx(
            relative_error(linear.weight.float(), made.weight), rel=1e-5
        )


def test_bytes_by_hand(make):
    reports = {r.name: r for r in quantize_model(make(), INT4)}
    fc = reports["h.1.mlp.c_fc"]
    assert fc.shape == (256, 64)
    assert fc.before == 256 * 64 * 4 + 256 * 4
    assert fc.after == 256 * 64 * 4.25 / 8 + 256 * 4
    head = reports["lm_head"]
    assert head.before == 65 * 64 * 4
    assert head.after == 96 * 64 * 4.25 / 8  # the rows filled up to whole 32


def test_a_copy_that_is_quantized_leaves_the_original_alone(make):
    model, idx = make(), prompt(2, 20)
    before, logits = {name: t.clone() for name, t in model.state_dict().items()}, model(idx)
    for fit, calibration in ((round_to_nearest, None), (gptq, idx), (awq, idx)):
        twin = quantized(model, INT4, fit, calibration=calibration)
        assert not torch.equal(twin(idx), logits)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(idx), logits) and model.lm_head.weight is model.wte.weight
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@torch.no_grad()
def test_fewer_bits_say_something_more_different(make):
    model, idx = make(), prompt(2, 20)
    exact = model(idx)
    off = [
        (quantized(model, grid)(idx) - exact).norm() / exact.norm()
        for grid in (INT8, INT4, Grid(2, 64))
    ]
    assert 1e-4 < off[0] < 0.3 * off[1] and off[1] < 0.5 * off[2]


def test_quantizing_twice_is_refused(make):
    model = quantized(make())
    before = model.state_dict()
    with pytest.raises(
        ValueError,
        match=r"^h\.0\.attn\.c_attn is a QuantizedLinear already, but must be a Linear; begin",
    ):
        quantize_model(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError, RuntimeError])
@pytest.mark.parametrize("calls", [1, 4, 9])
def test_what_fails_half_way_leaves_the_model_as_it_was(make, stop, calls):
    model, idx, seen = make(), prompt(2, 20), []
    modules, before = dict(model.named_modules()), copy.deepcopy(model.state_dict())

    def interrupted(weight, grid, gram):
        seen.append(weight)
        if len(seen) == calls:
            raise stop("in the middle")
        return round_to_nearest(weight, grid)

    with pytest.raises(stop):
        quantize_model(model, INT4, interrupted, idx)
    assert dict(model.named_modules()) == modules and model.lm_head.weight is model.wte.weight
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    twin = make()
    assert quantize_model(model, INT8) == quantize_model(twin, INT8)  # nothing twice
    assert torch.equal(model(idx), twin(idx))


def test_rows_that_only_the_fourth_linear_cannot_cut(make):
    """Its rows are of 20 neurons; the first three have rows of 64."""
    model, idx = make(n_hidden=20), prompt(2, 20)
    wanted = model(idx)
    with pytest.raises(ValueError, match="rows of 20 weights cannot be cut into groups of 64"):
        quantize_model(model, INT4)
    assert len(linears(model)) == 9 and torch.equal(model(idx), wanted)


def test_a_model_with_adapters_or_of_other_linears_is_refused(make):
    for swapped in (qlora(make()), make().swap_linears(Int4Linear)):
        with pytest.raises(
            ValueError, match=r"h\.0\.attn\.c_attn is a \w+ already, but must be"
        ):
            quantize_model(swapped)


def test_a_head_that_is_another_matrix_is_tied_again_or_refused(make):
    model, idx = make(), prompt(2, 20)
    wanted = quantized(model)(idx)
    model.lm_head.weight = nn.Parameter(model.wte.weight.detach().clone())
    assert torch.equal(quantized(model)(idx), wanted)
    model.lm_head.weight = nn.Parameter(model.wte.weight.detach() + 1)
    with pytest.raises(ValueError, match=r"lm_head\.weight is another matrix than wte\.weight"):
        quantize_model(model)
    assert len(linears(model)) == 9


def test_rows_that_groups_do_not_divide_are_refused(make):
    model = make(n_embd=32)
    with pytest.raises(
        ValueError, match=r"rows of 32 weights cannot be cut into groups of 64\."
    ):
        quantize_model(model, INT4)
    assert len(linears(model)) == 9


def test_weights_that_are_no_numbers_are_refused(make):
    model = make()
    model.h[1].mlp.c_fc.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match="the weight has 1 numbers that are infinite or NaN"):
        quantize_model(model, INT4)


@pytest.mark.parametrize("fit", [gptq, awq])
def test_what_looks_at_inputs_needs_calibration(make, fit):
    with pytest.raises(ValueError, match=r"calibration|the gram matrix is None"):
        quantize_model(make(), INT4, fit)


# calibration


@torch.no_grad()
def test_each_layer_is_fitted_to_what_it_gets_from_those_already_quantized(make):
    model, idx, seen = make(), prompt(3, 30), []

    def fit(weight, grid, gram):
        seen.append((weight.clone(), gram))
        return round_to_nearest(weight, grid)

    original = copy.deepcopy(model)
    reports = quantize_model(model, INT4, fit, idx)
    expected = {}
    hooks = [
        m.register_forward_pre_hook(
            lambda m, args, name=name: expected.update({name: args[0].flatten(0, -2)})
        )
        for name, m in linears(model, QuantizedLinear).items()
    ]
    x = original.wte(idx) + original.wpe(torch.arange(30))  # the embedding is swapped last
    for block in model.h:
        x = block(x)
    model.lm_head(model.ln_f(x))
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(reports) == len(expected) == 9
    for (weight, gram), report in zip(seen, reports, strict=True):
        linear, X = original.get_submodule(report.name), expected[report.name]
        assert torch.equal(weight, linear.weight)
        torch.testing.assert_close(gram, X.T @ X / 90, atol=1e-3, rtol=1e-3)
        off = X @ (model.get_submodule(report.name).weight - linear.weight).T
        direct = (off.norm() / (X @ linear.weight.T).norm()).item()
        assert report.error == pytest.approx(direct, rel=1e-2)


@torch.no_grad()
def test_without_calibration_there_is_no_gram_matrix(make):
    grams = []
    quantize_model(
        make(),
        INT4,
        lambda weight, grid, gram: grams.append(gram) or round_to_nearest(weight, grid),
    )
    assert grams == [None] * 9


@torch.no_grad()
def test_a_gram_matrix_is_the_mean_of_the_rows_products():
    linear, x = nn.Linear(8, 3), torch.randn(2, 5, 8)
    gram = input_gram(linear, linear, x)
    torch.testing.assert_close(gram, torch.einsum("btj,btk->jk", x, x) / 10)
    assert input_gram(linear.bfloat16(), linear, x.bfloat16()).dtype == torch.float32
    with pytest.raises(ZeroDivisionError):
        input_gram(linear, lambda x: 1 / 0, x)
    assert not linear._forward_hooks and not linear._forward_pre_hooks


@torch.no_grad()
def test_gptq_and_awq_put_out_what_is_nearer(teacher, plays):
    """The teacher's first block and head, in three bits, for eight windows of text."""
    calibration, _ = sample_batch(plays.train, 128, 8, step=0)
    model = copy.deepcopy(teacher)
    model.h = model.h[:1]
    errors = {}
    for fit in (round_to_nearest, gptq, awq):
        reports = quantize_model(copy.deepcopy(model), Grid(3, 64), fit, calibration)
        errors[fit] = sum(r.error for r in reports) / len(reports)
    assert errors[gptq] < 0.5 * errors[round_to_nearest]
    assert errors[awq] < errors[round_to_nearest]


# losses and text


@pytest.mark.parametrize(("grid", "most"), [(INT8, 0.001), (INT4, 0.02)])
@torch.no_grad()
def test_the_teacher_loses_little(teacher, plays, grid, most):
    held_out = plays.val[: 8 * 256 + 1]
    exact, found = (
        evaluate(model, held_out, 256, 4) for model in (teacher, quantized(teacher, grid))
    )
    assert exact < 1.6
    assert abs(found - exact) < most


@pytest.mark.parametrize("grid", [INT8, INT4])
def test_greedy_text_is_the_same_with_a_cache(make, grid):
    model, idx = quantized(make(), grid), prompt(2, 5)
    without = generate(model, idx, 20, temperature=0)
    assert torch.equal(
        generate(model, idx, 20, KVCache(model.config, B=2), temperature=0), without
    )
    assert len(without.unique()) > 3


def test_the_teacher_writes_the_same_with_a_cache_and_in_eight_bits(teacher):
    idx, model = LETTERS.encode("\nHAMLET:\n")[None], quantized(teacher, INT8)
    without = generate(model, idx, 16, temperature=0)
    assert torch.equal(generate(model, idx, 16, KVCache(model.config), temperature=0), without)
    assert torch.equal(
        generate(teacher, idx, 16, KVCache(model.config), temperature=0), without
    )


def test_a_quantized_model_writes_text(make):
    model = quantized(make())
    text = "".join(
        stream_text(model, LETTERS, "To be", 6, KVCache(model.config), temperature=0)
    )
    assert text == LETTERS.decode(
        generate(model, LETTERS.encode("To be")[None], 6, temperature=0)[0, 5:]
    )


@pytest.mark.parametrize("grid", [INT8, INT4, Grid(4, 32, symmetric=False)])
@torch.no_grad()
def test_a_quantized_model_in_bfloat16_says_nearly_the_same(make, grid):
    model, idx = quantized(make(), grid), prompt(2, 20)
    exact, found = model(idx), copy.deepcopy(model).to(torch.bfloat16)(idx)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.1 * exact.norm()


@torch.no_grad()
def test_a_quantized_model_in_float16_says_nearly_the_same(make):
    model, idx = quantized(make()), prompt(2, 20)
    exact, found = model(idx), copy.deepcopy(model).half()(idx)
    assert found.dtype == torch.float16
    assert (found.float() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("grid", [INT8, INT4, Grid(4, 32, symmetric=False)])
@torch.no_grad()
def test_a_quantized_model_answers_in_a_run_in_bfloat16(make, grid):
    """As a teacher whose weights stay in float32 while autocast chooses for each product."""
    model, idx = quantized(make(), grid), prompt(2, 20)
    exact = model(idx)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(idx)
    assert (found.float() - exact).norm() < 0.1 * exact.norm()


def test_a_gradient_reaches_what_is_not_quantized(make):
    model = quantized(make())
    model(prompt(2, 9)).square().mean().backward()
    assert model.wpe.weight.grad.abs().sum() > 0
    assert model.h[0].ln_1.weight.grad.abs().sum() > 0


# files


def save(path, model):
    save_quantized(path, model, LETTERS, INFO)
    return path


@given(
    st.sampled_from(GRIDS), st.sampled_from([round_to_nearest, awq]),
    st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1, 2]),
)  # fmt: skip
@torch.no_grad()
def test_a_model_comes_back_bit_for_bit(make, tmp_path_factory, grid, fit, dtype, n_kv_head):
    idx, path = prompt(2, 20), tmp_path_factory.mktemp("file") / "deep" / "model.safetensors"
    model = quantized(
        make(n_kv_head=n_kv_head), grid, fit, None if fit is round_to_nearest else idx
    ).to(dtype)
    back = load_quantized(str(save(path, model)))
    assert back.info == INFO and back.tokenizer.characters == LETTERS.characters
    assert back.model.config == model.config and not back.model.training
    mine, theirs = model.state_dict(), back.model.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert torch.equal(back.model(idx), model(idx))
    assert [m.bits for m in linears(back.model, QuantizedLinear).values()] == [
        m.bits for m in linears(model, QuantizedLinear).values()
    ]


def test_saving_leaves_the_model_and_the_info_alone(make, tmp_path):
    model = quantized(make())
    before, info = {name: t.clone() for name, t in model.state_dict().items()}, dict(INFO)
    save_quantized(tmp_path / "m", model, LETTERS, info)
    assert info == INFO
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_file_is_as_large_as_its_bits_say(make, tmp_path):
    model = quantized(make())
    size = save(tmp_path / "m", model).stat().st_size
    tensors = sum(t.nbytes for t in model.state_dict().values())
    assert tensors < size < tensors + 10_000  # which describes about forty tensors
    assert tensors == sum(t.nbytes for t in read_tensors(tmp_path / "m")[0].values())


@pytest.mark.parametrize("grid", [INT8, INT4])
def test_the_teachers_file_is_as_large_as_its_bits_say(teacher, tmp_path, grid):
    model = copy.deepcopy(teacher)
    reports = quantize_model(model, grid)
    bits = sum(grid.bits_per_weight(r.shape[1]) * r.shape[0] * r.shape[1] for r in reports)
    rest = sum(p.nbytes for p in model.parameters())
    size = save(tmp_path / "m", model).stat().st_size
    assert bits / 8 + rest < size < 1.01 * (bits / 8 + rest)
    assert load_quantized(tmp_path / "m").model.config == teacher.config


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    """The tensors, info and bytes of a good file."""
    path = save(tmp_path_factory.mktemp("whole") / "m", quantized(make()))
    tensors, info = read_tensors(path)
    return SimpleNamespace(tensors=tensors, info=info, content=path.read_bytes())


def refused(path, tensors, info):
    """The one sentence with which a file is refused."""
    write_tensors(path, tensors, info)
    with pytest.raises(ValueError) as caught:
        load_quantized(path)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


FC = "h.1.mlp.c_fc"


@pytest.mark.parametrize("part", ["codes", "scale"])
def test_a_file_without_a_part_is_refused(whole, tmp_path, part):
    tensors = {name: t for name, t in whole.tensors.items() if name != f"{FC}.{part}"}
    message = refused(tmp_path / "m", tensors, whole.info)
    assert message == f"{tmp_path / 'm'} is not a whole quantized model: it has no {FC}.{part}."


@pytest.mark.parametrize("name", [f"{FC}.bias", "ln_f.bias", "wpe.weight", "ln_f.weight"])
def test_a_file_without_the_rest_is_refused(whole, tmp_path, name):
    message = refused(
        tmp_path / "m", {n: t for n, t in whole.tensors.items() if n != name}, whole.info
    )
    shape = tuple(whole.tensors[name].shape)
    says = f"is of another architecture: {name} is None, but the model's is {shape}."
    assert message == f"{tmp_path / 'm'} {says}"


def test_a_file_with_a_tensor_more_is_refused(whole, tmp_path):
    message = refused(
        tmp_path / "m", whole.tensors | {"wte.weight": torch.zeros(2)}, whole.info
    )
    assert "wte.weight is (2,), but the model's is (65, 64)" in message
    message = refused(tmp_path / "m", whole.tensors | {"probe": torch.zeros(2)}, whole.info)
    assert "probe is (2,), but the model's is None" in message


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("codes", torch.zeros(8, 9, 128, dtype=torch.uint8)),
        ("codes", torch.zeros(7, 8, 128, dtype=torch.uint8)),
        ("codes", torch.zeros(8, 8, 127, dtype=torch.uint8)),
        ("codes", torch.zeros(5, dtype=torch.uint8)),
        ("codes", torch.zeros(8, 8, 128, dtype=torch.int8)),
        ("codes", torch.zeros(8, 8, 128)),
        ("scale", torch.zeros(7, 1, 32).bfloat16()),
        ("scale", torch.zeros(8, 1, 31).bfloat16()),
        ("scale", torch.zeros(8, 3, 32).bfloat16()),
        ("scale", torch.zeros(8, 0, 32).bfloat16()),
        ("scale", torch.zeros(5).bfloat16()),
        ("middle", torch.zeros(8, 2, 32).bfloat16()),
        ("middle", torch.zeros(3).bfloat16()),
        ("input_scale", torch.zeros(3)),
    ],
)
def test_a_file_with_a_part_of_another_shape_or_format_is_refused(whole, tmp_path, part, wrong):
    """When it is read, and not when the model first runs."""
    message = refused(tmp_path / "m", whole.tensors | {f"{FC}.{part}": wrong}, whole.info)
    assert (
        str(tuple(wrong.shape)) in message
        or str(wrong.dtype).removeprefix("torch.") in message.lower()
    )


def test_a_part_that_is_refused_is_named(whole, tmp_path):
    wrong = torch.zeros(8, 9, 128, dtype=torch.uint8)
    assert FC in refused(tmp_path / "m", whole.tensors | {f"{FC}.codes": wrong}, whole.info)


def test_a_file_of_another_model_is_refused(whole, tmp_path):
    config = whole.info["config"]
    for other in (
        {"n_embd": 128},
        {"n_layer": 3},
        {"n_layer": 1},
        {"vocab_size": 130},
        {"block_size": 16},
    ):
        refused(tmp_path / "m", whole.tensors, whole.info | {"config": config | other})
    for other in ({"n_head": 0}, {"n_heads": 2}):
        message = refused(
            tmp_path / "m", whole.tensors, whole.info | {"config": config | other}
        )
        assert "does not describe a GPT" in message


def test_files_that_are_no_quantized_models_are_refused(make, whole, tmp_path):
    assert "does not describe a GPT" in refused(
        tmp_path / "m", whole.tensors, {"name": "foreign"}
    )
    checkpoints.save(tmp_path / "float", make(), LETTERS, INFO)
    message = (
        f"{tmp_path / 'float'} is not a whole quantized model: it has no h.0.attn.c_attn.codes."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load_quantized(tmp_path / "float")
    save(tmp_path / "quantized", quantized(make()))
    with pytest.raises(ValueError, match="is of another architecture"):
        checkpoints.load(tmp_path / "quantized")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_quantized(tmp_path / "none")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_refused(whole, tmp_path, share):
    path = tmp_path / "m"
    path.write_bytes(whole.content[: int(share * len(whole.content))])
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a whole checkpoint")):
        load_quantized(path)


def test_a_model_that_is_not_quantized_is_not_saved(make, tmp_path):
    message = "the model is not quantized: h.0.attn.c_attn is a Linear, not a QuantizedLinear"
    with pytest.raises(ValueError, match=re.escape(message)):
        save(tmp_path / "m", make())
    assert not (tmp_path / "m").exists()


@torch.no_grad()
def test_a_model_fitted_as_it_is_initialised_comes_back(tmp_path):
    model = GPT(GPTConfig(2, 2, 64, 32, 65)).eval()
    quantize_model(model, INT4, gptq, prompt(4, 32))
    assert torch.equal(
        load_quantized(save(tmp_path / "m", model)).model(prompt(1, 32)), model(prompt(1, 32))
    )


@torch.no_grad()
def test_a_model_whose_embedding_is_not_the_heads_comes_back(make, tmp_path):
    """As swap_linears leaves it: the head in codes, the embedding in numbers."""
    model, idx = make().swap_linears(Int4Linear), prompt(2, 20)
    back = load_quantized(save(tmp_path / "m", model)).model
    assert type(back.wte) is nn.Embedding and torch.equal(back.wte.weight, model.wte.weight)
    assert torch.equal(back(idx), model(idx))


def test_what_would_not_come_back_is_not_saved(make, tmp_path):
    def part(model):
        return model.swap_linears(Int4Linear, where=lambda name, _: "mlp" in name)

    def short(model):
        model.h = model.h[:1]
        return model

    def probed(model):
        model.register_buffer("probe", torch.zeros(3))
        return model

    def mixed(model):
        model.ln_f.bfloat16()
        return model

    for broken, says in (
        (part(make()), r"not quantized: h\.0\.attn\.c_attn is a Linear"),
        (short(quantized(make())), r"not quantized: h\.1\.attn\.c_attn is a NoneType"),
        (torch.compile(quantized(make())), "not quantized: .* is a NoneType"),
        (probed(quantized(make())), r"probe is torch\.Size\(\[3\]\), but must be None"),
        (mixed(quantized(make())), r"in torch\.bfloat16 and torch\.float32; bring them to one"),
    ):
        with pytest.raises(ValueError, match=says):
            save(tmp_path / "m", broken)
        assert not (tmp_path / "m").exists()
