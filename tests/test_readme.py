"""README.md says what the notebooks have measured, and its code runs."""

import re

import pytest
import readme
import torch
from torch import nn

from gptlite.checkpoints import to_hugging_face
from gptlite.corpus import CharTokenizer

README = readme.README.read_text(encoding="utf-8")


def block(word: str) -> str:
    """The Python block of README.md in which a word stands."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (found,) = (code for code in blocks if word in code)
    return found


def test_the_computed_parts_are_those_of_the_stored_notebooks():
    assert readme.text() == README, "run python scripts/notebooks/readme.py"
    with open(readme.PICTURE, "rb") as file:
        picture = file.read()
    assert str(readme.rungs()).encode() in picture, "run python scripts/notebooks/readme.py"


def test_every_chapter_has_a_row_with_a_number():
    rows = re.findall(r"(?m)^\| .+ \| (.+) \| \[notebook\]\(notebooks/(\w+)\.ipynb\)", README)
    assert [name for _, name in rows] == list(readme.chapters())
    assert all(re.search(r"\d", gain) and len(gain) < 120 for gain, _ in rows), rows


def test_the_ladder_is_the_table_of_the_chapter():
    """Read by hand from the stored HTML: technique, tokens/s and gain, first and last rung."""
    table = readme.kept(readme.read("quantization"), "rung3")
    cells = [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", table)]
    first, *_, last = (cells[i : i + 7] for i in range(0, len(cells), 7))
    for rung, row in ((readme.rungs()[0], first), (readme.rungs()[-1], last)):
        assert rung[:2] == (row[1], float(row[2]))
        assert row[3].startswith(f"{rung[2]} (")


def test_a_notebook_without_a_gain_is_named():
    notebook = readme.read("kv_cache")
    with pytest.raises(ValueError, match="nothing is kept under the name nonsense"):
        readme.kept(notebook, "nonsense")


def test_eight_bits_in_any_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Sequential(nn.Linear(32, 16))).eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        before = model(x)
        exec(block("Int8Linear"), {"model": model})
        after = model(x)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert 0 < (after - before).norm() / before.norm() < 0.02


def test_gpt2_in_the_book_s_model(make_model):
    pytest.importorskip("transformers")
    names = {
        "theirs": to_hugging_face(make_model(n_embd=64)),
        "prompt": torch.zeros(1, 2, dtype=torch.long),
    }
    exec(block("from_hugging_face"), names)
    assert names["tokens"].shape == (1, 10)


def test_the_model_speaks(make_model, monkeypatch, capsys):
    from types import SimpleNamespace

    from gptlite import checkpoints

    tokenizer = CharTokenizer()
    model = make_model(vocab_size=len(tokenizer), block_size=256)
    teacher = SimpleNamespace(model=model, tokenizer=tokenizer)
    monkeypatch.setattr(checkpoints, "load_pretrained", lambda name: teacher)
    exec(block("load_pretrained"), {})
    assert len(capsys.readouterr().out) == 200


def test_every_command_of_the_readme_is_a_target():
    makefile = (readme.ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z-]+)(?: [A-Z]+=|`|  )", README)):
        assert re.search(rf"(?m)^{target}:", makefile), target
