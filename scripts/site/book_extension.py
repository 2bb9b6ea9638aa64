"""A Sphinx extension: computed facts, drawings of notebooks, MathJax, the address of the site.

No number is typed by hand: `{trained}` and the directives read checkpoints and results.
"""

import gzip
import importlib.util
import json
import math
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from safetensors import safe_open
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxRole

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "assets" / "checkpoints"
RECORDS = ROOT / "assets" / "results" / "training"
# max_iters * batch_size * block_size of its config/train_shakespeare_char.py
NANOGPT_TOKENS = 5000 * 64 * 256


def runs() -> dict[str, Path]:
    """The files that training runs left, by name: checkpoints, and records without weights."""
    return {
        path.stem: path
        for path in sorted([*CHECKPOINTS.glob("*.safetensors"), *RECORDS.glob("*.json")])
    }


def run_info(name: str) -> dict[str, Any]:
    """Return what a run of `gptlite.train` says of itself, in its checkpoint or its record."""
    path = runs().get(name)
    if path is None:
        raise ExtensionError(
            f"no training run is called {name!r}; known are {', '.join(runs()) or 'none'}"
        )
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    with safe_open(path, framework="numpy") as file:
        info = json.loads(file.metadata()["info"])
        info["parameters"] = sum(
            math.prod(file.get_slice(key).get_shape()) for key in file.keys()
        )
    return info


def facts(name: str) -> dict[str, str]:
    """The facts of a checkpoint that a page may quote, as text."""
    info = run_info(name)
    train, config = info["train"], info["config"]
    # a run that began with the weights of another has seen that one's tokens, too
    parts = [(train, train["steps"])]
    if "start" in info:
        parts.append((info["start"]["train"], info["start"]["steps"]))
    tokens = sum(steps * of["batch_size"] for of, steps in parts) * config["block_size"]
    machine, dtype = info["machine"], info["machine"]["dtype"].removeprefix("torch.")
    return {
        "loss": f"{info['val_loss']:.3f}",
        "bits": f"{info['val_loss'] / math.log(2):.3f}",
        "parameters": f"{info['parameters'] / 1e6:.1f} M",
        "steps": f"{train['steps']:,}",
        "lengths": " and then ".join(
            f"{n:,}" for _, n in [*info["log"].get("prolonged", []), [0, train["steps"]]]
        ),
        "batch": f"{train['batch_size']} × {config['block_size']}",
        "tokens": f"{tokens / 1e6:.1f} M",
        "tokens_per_parameter": f"{tokens / info['parameters']:.1f}",
        "of_nanogpt": f"{100 * tokens / NANOGPT_TOKENS:.0f}%",
        "compute": f"{6 * info['parameters'] * tokens / 1e15:.2f} PFLOP",
        "warmup": f"{train['warmup']}",
        "decay_from": f"{100 * train['decay_from']:.0f}%",
        "lr": f"{train['lr']:g}",
        "adamw_lr": f"{train['adamw_lr']:g}",
        "weight_decay": f"{train['weight_decay']:g}",
        "dropout": f"{config['dropout']:g}",
        "penalty": f"{info.get('confidence_penalty', 0):g}",
        "minutes": f"{info['log']['seconds'] / 60:.0f}",
        "corpus": info["corpus"],
        "machine": f"{machine['device']}, torch {machine['torch']}, {dtype}",
        "date": info["date"],
        "command": info["command"],
    }


class TrainedRole(SphinxRole):
    """{trained}`teacher loss`: one fact of a checkpoint."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """The fact as text, or as code if it is a command."""
        name, _, fact = self.text.partition(" ")
        known = facts(name)
        if fact not in known:
            raise ExtensionError(f"{name} has no fact {fact!r}; known are {', '.join(known)}")
        self.env.note_dependency(str(runs()[name]))
        kind = nodes.literal if fact == "command" else nodes.inline
        return [kind(known[fact], known[fact])], []


class MarkdownDirective(Directive):
    """A directive whose content is Markdown that a function of this module computes."""

    has_content = False
    optional_arguments = 1
    final_argument_whitespace = True

    def markdown(self) -> list[str]:
        """The lines to show."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """The parsed lines."""
        container = nodes.container()
        self.state.nested_parse(
            StringList(self.markdown(), source=type(self).__name__),
            self.content_offset,
            container,
        )
        return container.children


class Checkpoints(MarkdownDirective):
    """```{checkpoints}```: a table of the book's checkpoints and of runs recorded without."""

    def markdown(self) -> list[str]:
        """One row a checkpoint, and the commands below."""
        names = sorted(
            runs(), key=lambda n: (runs()[n].suffix == ".json", -run_info(n)["parameters"])
        )
        rows = {name: facts(name) for name in names}
        lines = [
            "| | parameters | corpus | tokens seen | nats a character, held out "
            "| bits | minutes |"
        ]
        lines.append("|:--|--:|:--|--:|--:|--:|--:|")
        for name, f in rows.items():
            cells = [
                f"`{name}`",
                f["parameters"],
                f["corpus"],
                f["tokens"],
                f["loss"],
                f["bits"],
                f["minutes"],
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", "The commands that made them:", "", "```bash"]
        for f in rows.values():
            lines += [f"# {f['corpus']}, {f['machine']}, {f['date']}"]
            for command in f["command"].splitlines():
                parts = textwrap.wrap(
                    command, 78, subsequent_indent="    ", break_on_hyphens=False
                )
                lines += " \\\n".join(parts).splitlines()
        return [*lines, "```"]


class TrainingCurve(Directive):
    """```{training-curve} teacher```: the losses that a checkpoint's log holds, drawn."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The figure as inline SVG in the page's own text colour."""
        return [nodes.raw("", training_curve(self.arguments[0]), format="html")]


def learning_rates(info: dict[str, Any]) -> list[float]:
    """Return the learning rate of each step, of the length it then had, as a share."""
    from gptlite.train import TrainConfig, lr_factor

    rates: list[float] = []
    lengths = [*info["log"].get("prolonged", []), [info["train"]["steps"]] * 2]
    for reached, steps in lengths:
        config = TrainConfig(**{**info["train"], "steps": steps})
        rates += [lr_factor(step, config) for step in range(len(rates), reached)]
    return rates


def training_curve(name: str) -> str:
    """An HTML figure of training and held-out loss over the steps."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    from gptlite.colors import COLORS
    from gptlite.figures import figure_html, style

    info = run_info(name)
    log, steps = info["log"], info["train"]["steps"]
    losses = log["train_loss"]
    style()
    fig, ax = plt.subplots(figsize=(5.5, 3.2))
    window = max(1, steps // 100)
    recent = (losses[max(0, i - window) : i + 1] for i in range(len(losses)))
    smooth = [sum(some) / len(some) for some in recent]
    ax.plot(
        range(1, len(losses) + 1),
        smooth,
        color=COLORS["blue"],
        label=f"training, mean of {window} steps",
    )
    if log["val_loss"]:
        ax.plot(
            *zip(*log["val_loss"], strict=True),
            "o-",
            color=COLORS["orange"],
            label="a part of the held-out text",
        )
    ax.plot(steps, info["val_loss"], "s", color=COLORS["red"], label="all of it, at the end")
    rates = learning_rates(info)
    ax.fill_between(
        range(1, steps + 1),
        [0.3 * rate for rate in rates],
        color="black",
        alpha=0.08,
        lw=0,
        transform=ax.get_xaxis_transform(),
        label="learning rate (no scale)",
    )
    ax.set(xlabel="step", ylabel="loss, nats a character", xlim=(0, steps * 1.01))
    low = min(losses[-1], info["val_loss"])
    ax.set_ylim(low - 0.15, min(max(losses), low + 1.6))
    ax.legend()
    again = " and, after it was raised once more, again" if "prolonged" in log else ""
    alt = (
        f"Training and held-out loss of the {name} over {steps} steps. Shaded, the learning "
        f"rate: high at first, then falling in a straight line{again}. "
        f"The held-out loss ends at {info['val_loss']:.3f} nats a character."
    )
    markup = figure_html(fig, alt)
    plt.close(fig)
    return markup


class RecordedResults(Directive):
    """```{recorded-results}```: every measurement in assets/results, by machine."""

    def run(self) -> list[nodes.Node]:
        """The sections."""
        from gptlite import results

        sections: list[nodes.Node] = []
        for stem, recorded in results.load().items():
            title = results.machine_title(recorded.machine)
            section = nodes.section("", nodes.title(title, title), ids=[stem], names=[stem])
            lines = StringList(results_of_machine(recorded), source="recorded-results")
            self.state.nested_parse(lines, self.content_offset, section)
            sections.append(section)
        return sections or [nodes.paragraph("", "No results have been recorded yet.")]


def results_of_machine(recorded: Any) -> list[str]:
    """Return the Markdown lines of a machine's calibration, measurements and commands."""
    from gptlite.units import quantity

    machine = recorded.machine
    rates = ", ".join(
        f"{quantity(rate / 1e9, 'GFLOP/s')} in {dtype}" for dtype, rate in machine.flops.items()
    )
    lines = [
        f"Calibrated on {machine.date} with torch {machine.torch}: reads memory at "
        f"{quantity(machine.read_bandwidth / 1e9, 'GB/s')}, multiplies matrices at {rates}, "
        f"and takes {quantity(machine.overhead, 's')} to start an operator.",
        "",
        "| | median | quartiles | measured | with torch |",
        "|:--|--:|--:|--:|--:|",
    ]
    for m in recorded.measurements.values():
        context = ", ".join(
            f"{key} {value}" for key, value in m.context.items() if str(value) not in m.metric
        )
        name = m.metric + (f" ({context})" if context else "")
        spread = (
            f"{quantity(m.low, m.unit)} to {quantity(m.high, m.unit)}" if m.low < m.high else ""
        )
        lines.append(
            f"| {name} | {quantity(m.value, m.unit)} | {spread} | {m.date} | {m.torch} |"
        )
    commands = dict.fromkeys(m.command for m in recorded.measurements.values() if m.command)
    return (
        [*lines, "", "To measure it again:", "", "```bash", *commands, "```"]
        if commands
        else lines
    )


class TryIt(Directive):
    """```{try-it}```: the place of the model in the page, and why it is not there.

    The app is made while the pages are; build_book.py puts it here when both are there.
    """

    def run(self) -> list[nodes.Node]:
        """The fallback, which stays where the model is left out of a build."""
        return [nodes.raw("", fallback(), format="html")]


def fallback() -> str:
    """The HTML that stands where the app will be."""
    return (ROOT / "assets" / "try_it" / "fallback.html").read_text(encoding="utf-8")


def place_app(site: Path, app: Path) -> None:
    """Put the app into the page that has a place for it, if there is such a page."""
    page = site / "book" / "try_it.html"
    if page.exists():
        text = page.read_text(encoding="utf-8")
        if text.count(place := fallback().strip()) != 1:
            raise ValueError(f"{page.name} has no place for the app; look at TryIt.")
        page.write_text(text.replace(place, try_it(app).strip()), encoding="utf-8")


def try_it(app: Path) -> str:
    """Return the HTML of the app in a folder, or the fallback if static_apps.py left it out."""
    from gptlite.units import quantity

    source = ROOT / "assets" / "try_it"
    if not (app / "models" / "models.json").exists():
        return fallback()
    models = json.loads((app / "models" / "models.json").read_text(encoding="utf-8"))["models"]
    runtime = (app / "ort" / "ort-wasm-simd-threaded.wasm").read_bytes()
    facts = {name: quantity(model["bytes"], "bytes") for name, model in models.items()}
    facts["runtime"] = quantity(len(runtime), "bytes")
    facts["runtime compressed"] = quantity(len(gzip.compress(runtime, 6)), "bytes")
    facts["runtime bytes"] = str(len(runtime))
    text = (source / "app.html").read_text(encoding="utf-8").partition("-->")[2]
    return re.sub(r"\{\{([^}]*)\}\}", lambda place: facts[place[1]], text)


def name_folded_cells(app: Sphinx, doctree: nodes.document) -> None:
    """Say what a hidden cell is: code, or the NAME of its first line `#@title NAME`.

    That is Colab's way; the line itself is dropped.
    """
    for cell in doctree.findall(nodes.container):
        if cell.get("hide_mode") == "input":
            cell["prompt_show"] = cell["prompt_hide"] = "Code"
        code = next(cell.findall(nodes.literal_block), None) if cell.get("hide_mode") else None
        first, _, rest = code.astext().partition("\n") if code else ("", "", "")
        if first.startswith("#@title "):
            cell["prompt_show"] = cell["prompt_hide"] = first.removeprefix("#@title ").strip()
            code.rawsource, code.children = rest, []
            code += nodes.Text(rest)


def take_drawings(app: Sphinx, page: str, source: list[str]) -> None:
    """Of each figure in a notebook that is read, leave the drawing, as HTML, and no picture."""
    from gptlite.pictures import DRAWING

    if DRAWING not in source[0] or not app.env.doc2path(page).endswith(".ipynb"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if DRAWING in data:
                output["data"] = {"text/html": data[DRAWING], "text/plain": data["text/plain"]}
    source[0] = json.dumps(notebook)


NO_ADDRESS = (
    "This copy of the book has no address yet: the buttons that open a page on Colab, show its "
    "source and report an error appear where the book is published."
)


def set_addresses(app: Sphinx, config: Any) -> None:
    """Say where the site will be: on the pages of the repository that `_config.yml` names.

    As long as that is OWNER/REPO nothing may lead there: no buttons, and every page says why.
    """
    options = config.html_theme_options
    owner, repository = options["repository_url"].rstrip("/").split("/")[-2:]
    site = f"https://{owner.lower()}.github.io/{repository}/"
    if (owner, repository) == ("OWNER", "REPO"):
        site = "http://localhost:8000/"  # where `make serve` shows it
        options |= {"use_repository_button": False, "use_issues_button": False}
        options["launch_buttons"] = {}
        options["extra_footer"] = f"{options.get('extra_footer', '')} {NO_ADDRESS}".strip()
    config.html_baseurl = config.html_baseurl or site
    config.ogp_site_url = config.ogp_site_url or config.html_baseurl


def name_list_items(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Call the entries of a bibliography items of its list, as screen readers expect."""
    if "citation-list" in context.get("body", ""):
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Put MathJax beside the pages, so that reading asks no other host.

    It is one script and its fonts, of the 24 MB that are shipped.
    """
    if error or app.builder.format != "html":
        return
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise ExtensionError("MathJax is missing; pip install sphinx-mathjax-offline")
    source, target = (
        Path(spec.origin).parent / "static" / "mathjax",
        Path(app.outdir) / "_static" / "mathjax",
    )
    fonts = "output/chtml/fonts/woff-v2"
    shutil.copytree(source / fonts, target / fonts, dirs_exist_ok=True)
    shutil.copy(source / "tex-chtml.js", target)
    extensions = "input/tex/extensions"  # TeX packages that a formula asks for by using them
    shutil.copytree(source / extensions, target / extensions, dirs_exist_ok=True)


def lighten(app: Sphinx, error: Exception | None) -> None:
    """Take from the site what no reader needs: maps, and 1.5 MB of icons as a script.

    The style has the icons as fonts.
    """
    static = Path(app.outdir) / "_static"
    if error or not static.exists():
        return
    icons = static / "scripts" / "fontawesome.js"
    if icons.exists():
        icons.write_text("// The icons are in vendor/fontawesome/webfonts.\n", encoding="utf-8")
    for surplus in [*static.rglob("*.map"), *static.glob("*webpack-macros.html")]:
        surplus.unlink()


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    sys.path.insert(0, str(ROOT))
    app.add_role("trained", TrainedRole())
    app.add_directive("checkpoints", Checkpoints)
    app.add_directive("training-curve", TrainingCurve)
    app.add_directive("recorded-results", RecordedResults)
    app.add_directive("try-it", TryIt)
    app.connect("config-inited", set_addresses, priority=900)
    app.connect("source-read", take_drawings)
    app.connect("doctree-read", name_folded_cells)
    app.connect("html-page-context", name_list_items)
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", lighten)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
