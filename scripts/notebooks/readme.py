"""The computed parts of README.md: what each chapter gains, and the picture of the ladder.

python scripts/notebooks/readme.py      write both, from the stored outputs of the notebooks

A chapter says what it gains under the name `gain` (see `gptlite.show.say`); the ladder is the
table that the chapter on quantization keeps under the name `rung3`.
"""

import html
import io
import re
import sys
from collections.abc import Iterator

import notebook_files
import setup_cell
import yaml
from nbformat import NotebookNode

ROOT = notebook_files.ROOT
README, PICTURE = ROOT / "README.md", ROOT / "assets" / "figures" / "ladder.png"
KEPT = "application/papermill.record/"  # the prefix of what `gptlite.show` keeps under a name
BEGIN, END = "<!-- computed by scripts/notebooks/readme.py -->", "<!-- until here -->"


def chapters() -> Iterator[str]:
    """Names of the chapters' notebooks, in the order of the table of contents."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    for part in toc["parts"]:
        for entry in part["chapters"]:
            if entry["file"].startswith("notebooks/"):
                yield entry["file"].removeprefix("notebooks/")


def kept(notebook: NotebookNode, name: str) -> str:
    """The text or table that a notebook keeps under a name; a ValueError if it keeps none."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("metadata", {}).get("scrapbook", {}).get("name") == name:
                for kind, text in output.data.items():
                    if kind.startswith(KEPT):
                        return text if isinstance(text, str) else "".join(text)
    raise ValueError(f"nothing is kept under the name {name}; execute the notebook again.")


def read(name: str) -> NotebookNode:
    """A chapter's notebook as it is stored."""
    return notebook_files.read(notebook_files.NOTEBOOKS / f"{name}.ipynb")


def table() -> str:
    """A Markdown table of the chapters: title, gain, and where to read and to run each."""
    lines = ["| chapter | what it gains here | |", "|:--|:--|:--|"]
    for name in chapters():
        notebook = read(name)
        title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
        links = f"[notebook](notebooks/{name}.ipynb)"
        if setup_cell.published():
            links += f", [Colab]({setup_cell.colab_link(f'{name}.ipynb')})"
        lines.append(f"| {title} | {kept(notebook, 'gain')} | {links} |")
    return "\n".join(lines)


def rungs() -> list[tuple[str, float, str]]:
    """Technique, tokens per second and gain over no cache of each rung, as stored."""
    rows = re.findall(r"<tr>(.*?)</tr>", kept(read("quantization"), "rung3"))
    header, *rest = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    name, speed, gain = map(header.index, ("technique", "tokens/s", "over no cache"))
    return [
        (html.unescape(row[name]), float(row[speed].replace(",", "")), row[gain].split()[0])
        for row in rest
    ]


def picture() -> bytes:
    """The ladder as a PNG: a bar for each rung, its speed and its gain at its end."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    from gptlite.colors import COLORS
    from gptlite.show import style

    names, speeds, gains = zip(*rungs(), strict=True)
    with mpl.rc_context():
        style()
        fig, ax = plt.subplots(figsize=(8, 2.6))
        ax.grid(False)
        ax.barh(names, speeds, color=COLORS["blue"])
        for i, (speed, gain) in enumerate(zip(speeds, gains, strict=True)):
            ax.text(speed, i, f" {speed:g} ({gain})", va="center")
        ax.invert_yaxis()
        ax.set_xlim(0, 1.2 * max(speeds))
        ax.set_xlabel("tokens a second, GPT-2 small's shape, batch 1")
        file = io.BytesIO()
        fig.savefig(file, dpi=160, facecolor="white", metadata={"Description": str(rungs())})
        plt.close(fig)
    return file.getvalue()


def text() -> str:
    """README.md with its computed parts as the notebooks have them."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{README.name} has no part between {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def write() -> None:
    """Write README.md and the picture that it shows."""
    sys.path.insert(0, str(ROOT))
    from gptlite.files import write_atomically

    write_atomically(README, text().encode())
    write_atomically(PICTURE, picture())


if __name__ == "__main__":
    write()
