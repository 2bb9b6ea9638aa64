"""What the pages compute: facts of a checkpoint, its losses drawn, recorded results."""

import json
import math
import re
import shlex
import subprocess
from dataclasses import asdict

import book_extension
import matplotlib.pyplot as plt
import nbformat
import pytest
from docutils import nodes
from nbformat import v4
from sphinx.errors import ExtensionError

from gptlite import checkpoints, results
from gptlite.corpus import CharTokenizer
from gptlite.figures import figure_output
from gptlite.pictures import DRAWING
from gptlite.roofline import Machine
from gptlite.train import TrainConfig


@pytest.fixture
def a_checkpoint(tmp_path, monkeypatch, make_model):
    """A tiny checkpoint called tiny, as the only one."""
    model = make_model(vocab_size=5)
    log = {"train_loss": [2.0, 1.5, 1.2, 1.0], "val_loss": [[2, 1.6]], "seconds": 90.0}
    info = {
        "command": "python -m gptlite.train tiny --steps=4",
        "val_loss": math.log(2),
        "corpus": "plays",
        "train": asdict(TrainConfig(steps=4, batch_size=8)),
        "log": log,
        "machine": {"device": "A processor", "torch": "2.13.0", "dtype": "torch.float32"},
        "date": "2026-11-24",
    }
    checkpoints.save(tmp_path / "tiny.safetensors", model, CharTokenizer("abcde"), info)
    monkeypatch.setattr(book_extension, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(book_extension, "RECORDS", tmp_path)
    return model


def test_a_run_recorded_without_weights_stands_behind_the_checkpoints(a_checkpoint, tmp_path):
    record = {
        **book_extension.run_info("tiny"),
        "val_loss": 2 * math.log(2),
        "parameters": 10**9,
    }
    (tmp_path / "another.json").write_text(json.dumps(record))
    assert book_extension.facts("another")["loss"] == "1.386"
    table = book_extension.Checkpoints.markdown(None)
    assert [line.split("|")[1].strip() for line in table[2:4]] == ["`tiny`", "`another`"]


def test_a_long_command_is_cut_as_a_shell_reads_it(a_checkpoint, monkeypatch):
    info = book_extension.run_info("tiny")
    info["command"] += " --weight-decay=0.1" * 9
    monkeypatch.setattr(book_extension, "run_info", lambda name: info)
    table = book_extension.Checkpoints.markdown(None)
    shown = table[table.index("```bash") + 2 : -1]
    assert len(shown) > 2
    assert max(map(len, shown)) <= 80
    said = "\n".join(shown).replace(
        "python -m gptlite.train", "printf '%s\\n'", 1
    )  # shlex does not join lines
    read = subprocess.run(
        ["sh", "-c", said], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert read == shlex.split(info["command"])[3:]


def test_facts_are_read_from_the_file(a_checkpoint):
    facts = book_extension.facts("tiny")
    assert facts["loss"] == "0.693"
    assert facts["bits"] == "1.000"
    assert facts["parameters"] == f"{a_checkpoint.n_params() / 1e6:.1f} M"
    assert facts["tokens"] == f"{4 * 8 * a_checkpoint.config.block_size / 1e6:.1f} M"
    assert facts["batch"] == f"8 × {a_checkpoint.config.block_size}"
    assert facts["machine"] == "A processor, torch 2.13.0, float32"


def test_a_run_is_set_beside_nanogpts(a_checkpoint, monkeypatch):
    """As many characters as nanoGPT's 81.92 million, each of six FLOPs a parameter."""
    info = book_extension.run_info("tiny")
    info["train"] |= {"steps": 10_000, "batch_size": 32}
    info["config"]["block_size"], info["parameters"] = 256, 10**6
    monkeypatch.setattr(book_extension, "run_info", lambda name: info)
    facts = book_extension.facts("tiny")
    assert (facts["of_nanogpt"], facts["compute"]) == ("100%", "0.49 PFLOP")


def test_an_unknown_checkpoint_is_refused_with_the_known_ones(a_checkpoint):
    with pytest.raises(ExtensionError, match="'teecher'; known are tiny"):
        book_extension.facts("teecher")


def test_the_curve_is_drawn_and_described(a_checkpoint):
    figure = book_extension.training_curve("tiny")
    assert re.search(
        r'<svg[^>]* role="img" aria-label="Training and held-out loss of the tiny over 4 steps',
        figure,
    )
    assert "0.693 nats" in figure
    assert figure == book_extension.training_curve("tiny")  # the same bytes each time


def test_a_prolonged_run_has_the_learning_rate_of_each_of_its_lengths(a_checkpoint):
    info = book_extension.run_info("tiny")
    info["train"] |= {"steps": 40, "warmup": 2}
    alone = book_extension.learning_rates(info)
    assert len(alone) == 40
    assert max(alone) == 1 and alone[-1] < 0.1
    info["log"]["prolonged"] = [[20, 20]]
    rates = book_extension.learning_rates(info)
    assert len(rates) == 40
    assert rates[19] < 0.1 < 0.5 < rates[20] == alone[20]
    assert rates[20:] == alone[20:]


def test_the_lengths_of_a_run(a_checkpoint, monkeypatch):
    info = book_extension.run_info("tiny")
    assert book_extension.facts("tiny")["lengths"] == "4"
    info["log"]["prolonged"] = [[2000, 2000]]
    monkeypatch.setattr(book_extension, "run_info", lambda name: info)
    assert book_extension.facts("tiny")["lengths"] == "2,000 and then 4"


def test_recorded_results_name_value_spread_and_command():
    machine = Machine(
        name="A processor", device="cpu", threads=2, read_bandwidth=2e10, read_kernel="sum",
        matvec=[[1e6, 2e10]], flops={"float32": 1e11}, overhead=5e-6,
        date="2026-11-24", torch="2.13.0",
    )  # fmt: skip
    measured = results.Measurement(
        "decode",
        0.0123,
        0.0119,
        0.013,
        "s",
        "make run NB=x",
        "2026-11-24",
        "2.13.0",
        {"batch": 1},
    )
    lines = book_extension.results_of_machine(results.Results(machine, {"decode": measured}))
    assert "20.0 GB/s" in lines[0]
    assert "100 GFLOP/s in float32" in lines[0]
    assert "| decode (batch 1) | 12.3 ms | 11.9 ms to 13.0 ms | 2026-11-24 | 2.13.0 |" in lines
    assert "make run NB=x" in lines


def test_a_folded_cell_says_what_it_is():
    def cell(source: str, mode: str | None) -> nodes.container:
        code = nodes.literal_block(source, source)
        return nodes.container("", code, hide_mode=mode, prompt_show="?", prompt_hide="?")

    document = nodes.container(
        "",
        cell("#@title Solution to 1\nx = 1", "all"),
        cell("#@title Shown\nx", None),
        cell("y", "input"),
    )
    book_extension.name_folded_cells(None, document)
    named, shown, plain = document.children
    assert (named["prompt_show"], named.astext()) == ("Solution to 1", "x = 1")
    assert (shown["prompt_show"], shown.astext()) == ("?", "#@title Shown\nx")
    assert (plain["prompt_show"], plain.astext()) == ("Code", "y")


class Book:
    """What Sphinx hands to the extension: where pages come from."""

    class env:  # noqa: N801
        @staticmethod
        def doc2path(page):
            return page


def test_of_a_figure_the_site_takes_the_drawing_and_of_other_outputs_everything():
    figure, metadata = figure_output(plt.figure(), "Nothing.")
    metadata["scrapbook"] = {"name": "empty", "mime_prefix": ""}
    plt.close("all")
    outputs = [
        v4.new_output("display_data", data=figure, metadata=metadata),
        v4.new_output("display_data", data={"image/png": "", "text/html": "<b>other</b>"}),
        v4.new_output("stream", text=DRAWING),
    ]
    cells = [v4.new_markdown_cell("text"), v4.new_code_cell("", outputs=outputs)]
    text = nbformat.writes(v4.new_notebook(cells=cells))
    source = [text]
    book_extension.take_drawings(Book, "notebooks/a.ipynb", source)
    [drawing, *others] = nbformat.reads(source[0], as_version=4).cells[1].outputs
    assert drawing.data == {"text/html": figure[DRAWING], "text/plain": "Figure: Nothing."}
    assert drawing.metadata == metadata
    assert others == outputs[1:]
    for page, content in (("page.md", text), ("notebooks/a.ipynb", "{}")):
        source = [content]
        book_extension.take_drawings(Book, page, source)
        assert source == [content]


def test_the_app_s_place_names_what_is_downloaded(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "ort").mkdir()
    models = {
        name: {"bytes": size}
        for name, size in (("fp32", 21_800_000), ("int8", 11_100_000), ("int4", 6_500_000))
    }
    (tmp_path / "models" / "models.json").write_text(json.dumps({"models": models}))
    (tmp_path / "ort" / "ort-wasm-simd-threaded.wasm").write_bytes(bytes(14_000_000))
    text = book_extension.try_it(tmp_path)
    assert "<form" in text and "{{" not in text
    assert all(
        size in text for size in ("21.8 MB", "11.1 MB", "6.50 MB", "14.0 MB", "14000000")
    )


def test_without_the_app_its_place_says_so(tmp_path):
    text = book_extension.try_it(tmp_path)
    assert "left out" in text and "<form" not in text


def test_the_app_takes_the_place_of_the_fallback(tmp_path, monkeypatch):
    """The page is written while the app is made: with the fallback, which the app replaces."""
    monkeypatch.setattr(
        book_extension, "try_it", lambda app: f"<p>the model of {app.name}</p>\n"
    )
    [node] = book_extension.TryIt.run(None)
    page = tmp_path / "book" / "try_it.html"
    book_extension.place_app(tmp_path, tmp_path / "models")  # a book without such a page
    page.parent.mkdir()
    page.write_text(f"<main>{node.astext()}</main>")
    book_extension.place_app(tmp_path, tmp_path / "models")
    assert page.read_text().replace("\n", "") == "<main><p>the model of models</p></main>"
    with pytest.raises(ValueError, match="no place for the app"):
        book_extension.place_app(tmp_path, tmp_path / "models")
