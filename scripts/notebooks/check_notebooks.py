"""Check what the stored notebooks promise; print each fault as file, cell and one sentence.

python scripts/notebooks/check_notebooks.py [NAME ...]     all of them if none is named

The exit status is 1 if there is a fault.

nbval runs every cell, but passes a notebook without any outputs; so what it compares with is
checked here. Cells are numbered from 1, Markdown cells included.
"""

import argparse
import ast
import re
import statistics
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import cells
import notebook_files
import setup_cell
from nbformat import NotebookNode

MAX_BYTES = 1_000_000
MAX_COLUMNS = 96  # what the page shows of a line on a screen of 1366 pixels
MAX_LINES, MAX_MEDIAN = 25, 8  # of a code cell, and of the median of those that are not folded
MAX_LISTED = 40  # lines of one listed Python object
FOLDED = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
Fault = tuple[int, str]  # the cell's number, 0 for the notebook as a whole, and a sentence

# not compared by nbval (conftest.py): a cell with only such outputs is checked for nothing
NOT_COMPARED = {"image/png", "image/jpeg", "image/svg+xml", "text/html"}
NOT_COMPARED |= {"application/vnd.gptlite.figure+html"}  # a figure, for the site
SHOWS = {"show", "say", "table", "figure", "machine_line", "print", "display"}

# a number and a unit of time, size, rate, ratio or loss, in text without formulae and code
NUMBER = r"(?<![\w.#/])(?<![A-Za-z]-)(?!(?:19|20)\d\ds)[~<>±+−-]?\d[\d,.]*\s?-?"
UNIT = (
    r"(?:[nµμum]?s|secs?|seconds?|min|minutes?|h|hours?|[kMG]?Hz|[kKMGTP]i?B"
    r"|(?:kilo|mega|giga|tera)bytes?"
    r"|[kMGTP]FLOPs?|[kMGT]OPs?|tok|nats?|%|percent|per cent)(?:/\w+|\s(?:per|a|an)\s\w+)?"
)
RATE = (
    r"(?:tokens?|characters?|steps?|bytes?|FLOPs?|operations?|words?|samples?)"
    r"(?:/|\s(?:per|a|each)\s)(?:s|second|ms|minute|min|hour)"
)
FACTOR = r"(?:times|fold|x(?!\s*\d)|×(?!\s*\d))"
MEASUREMENT = re.compile(rf"{NUMBER}(?:{RATE}|{UNIT}|{FACTOR})(?![\w/])")
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)


def setup(notebook: NotebookNode, path: Path) -> Iterator[Fault]:
    """The setup cell and the Colab link are as _config.yml says."""
    for sentence in setup_cell.differences(notebook, path.name):
        yield 0, sentence


def counts(notebook: NotebookNode, path: Path) -> Iterator[Fault]:
    """The code cells ran once each, in order, in a fresh kernel; the first fault is named."""
    code = cells.code(notebook)
    for number, cell in code:
        if not cell.source.strip():
            yield number, "the code cell is empty; delete it."
    for expected, (number, cell) in enumerate(code, 1):
        if (count := cell.execution_count) != expected:
            yield (
                number,
                f"the execution count is {count}, not {expected}; re-execute the notebook.",
            )
            return


def length(notebook: NotebookNode, path: Path) -> Iterator[Fault]:
    """A code cell fits the screen."""
    for number, cell in cells.code(notebook):
        lines = len(cell.source.splitlines())
        if lines > MAX_LINES:
            yield (
                number,
                f"the code cell has {lines} lines, but at most {MAX_LINES} may stand in one.",
            )


def width(notebook: NotebookNode, path: Path) -> Iterator[Fault]:
    """A line of code fits the page: in a cell, and in a listing of the package's source."""
    for number, cell in cells.code(notebook):
        yield from ((number, fault) for fault in _too_wide("the code cell", cell.source))
    for number, output in cells.outputs(notebook):
        for _, source in cells.listings(output):
            yield from ((number, fault) for fault in _too_wide("the listing", source))


def median(notebook: NotebookNode, path: Path) -> Iterator[Fault]:
    """Most of the code that a reader sees comes in small steps."""
    lines = _visible_lines(notebook)
    if lines and statistics.median(lines) > MAX_MEDIAN:
        yield (
            0,
            f"the median of its {len(lines)} code cells that are not folded is "
            f"{statistics.median(lines):g} lines, but may be at most {MAX_MEDIAN}.",
        )


def listed(notebook: NotebookNode, path: Path) -> Iterator[Fault]:
    """A listed object of Python is short enough to be read in one piece."""
    for number, output in cells.outputs(notebook):
        for language, source in cells.listings(output):
            lines = source.splitlines()
            if language == "python" and len(lines) > MAX_LISTED:
                yield (
                    number,
                    f"the listing of `{_first_definition(lines)}` has {len(lines)} lines, but "
                    f"one object may have at most {MAX_LISTED}; list its parts, or make them.",
                )


def title(notebook: NotebookNode, path: Path) -> Iterator[Fault]:
    """One title, at the very top."""
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        yield 1, "the first cell is not Markdown that begins with the title (`# ...`)."
    for number, cell in cells.markdown(notebook):
        text = _without_code(cell.source)
        if len(re.findall(r"^# ", text, re.MULTILINE)) > (number == 1):
            yield number, "there is a second title (`# ...`); sections begin with `##`."


def prose(notebook: NotebookNode, path: Path) -> Iterator[Fault]:
    """No measurement is typed by hand: a cell computes it and `say` prints it.

    A Markdown cell tagged `published` may quote numbers if it links to their source.
    """
    for number, cell in cells.markdown(notebook):
        if "published" in cell.metadata.get("tags", []):
            if not re.search(r"\]\(https?://|<https?://", cell.source):
                yield number, "the cell is tagged `published`, but links to no publication."
            continue
        for match in MEASUREMENT.finditer(_plain(cell.source)):
            yield (
                number,
                f"the measurement “{match[0].strip()}” is typed; compute it in a cell and "
                "print it with `say`.",
            )


def alt_text(notebook: NotebookNode, path: Path) -> Iterator[Fault]:
    """Every image says what it shows, and none is fetched from another host."""
    for number, cell in cells.markdown(notebook):
        yield from ((number, fault) for fault in _images(_without_code(cell.source)))
    for number, output in cells.outputs(notebook):
        data, metadata = output.get("data", {}), output.get("metadata", {})
        texts = [cells.text(data.get(mime, "")) for mime in ("text/html", "image/svg+xml")]
        texts.append(_without_code(cells.text(data.get("text/markdown", ""))))
        yield from ((number, fault) for text in texts for fault in _images(text))
        for mime in sorted({"image/png", "image/jpeg", "image/gif"} & data.keys()):
            if not {**metadata, **metadata.get(mime, {})}.get("alt", "").strip():
                yield (
                    number,
                    f"the {mime} output has no alt text; display the figure with "
                    "gptlite.show.figure.",
                )


def outputs(notebook: NotebookNode, path: Path) -> Iterator[Fault]:
    """Stored outputs are there, and those that nbval shall compare are of such a kind."""
    for number, cell in cells.code(notebook):
        if not cell.execution_count:
            continue
        tagged = "nbval-check-output" in cell.metadata.get("tags", [])
        if tagged and not cell.outputs:
            yield (
                number,
                "the cell is tagged nbval-check-output, but has no output to compare with.",
            )
        elif tagged and not any(map(_is_compared, cell.outputs)):
            yield (
                number,
                "the cell is tagged nbval-check-output, but nbval compares none of its kinds "
                "of output.",
            )
        elif not cell.outputs and _should_show(cell.source):
            yield (
                number,
                "the cell displays something, but no output is stored; re-execute the "
                "notebook.",
            )


def clean(notebook: NotebookNode, path: Path) -> Iterator[Fault]:
    """Stored outputs are of a run without errors or warnings, and of no one machine."""
    for number, output in cells.outputs(notebook):
        if output.output_type == "error":
            yield number, f"the stored output is an error ({output.ename}: {output.evalue})."
        if output.get("name") == "stderr":
            line = cells.text(output.text).strip().partition("\n")[0]
            yield number, f"the cell wrote to stderr ({line})."
        kinds = {mime: t for mime, t in output.get("data", {}).items() if mime[:6] != "image/"}
        text = "".join(map(cells.text, [output.get("text", ""), *kinds.values()]))
        if match := re.search(r"\bat 0x[0-9a-f]{6,}", text):
            yield (
                number,
                f"the output shows a memory address ({match[0]}), which differs in every run.",
            )
        home = r"(?<![\w.])/(?:home|root|Users|work|tmp|private|mnt)/[\w./-]+"
        if match := re.search(home, text):
            yield number, f"the output shows a path of one machine ({match[0]})."


def myst(notebook: NotebookNode, path: Path) -> Iterator[Fault]:
    """Plain Markdown only: Colab shows roles and directives as raw text."""
    texts = [(number, cell.source) for number, cell in cells.markdown(notebook)]
    texts += [
        (number, cells.text(output.get("data", {}).get("text/markdown", "")))
        for number, output in cells.outputs(notebook)
    ]
    for number, text in texts:
        plain = _without_fences_and_math(text)
        found = re.search(r"^ *(?:`{3,}|~{3,}|:{3,})\{[\w:.-]+\}", text, re.MULTILINE)
        found = found or re.search(r"^\([\w-]+\)=$", plain, re.MULTILINE)
        # a role is a name in braces right before code: {cite}`this`
        for span in CODE_SPAN.finditer(plain):
            found = found or re.search(r"\{[a-zA-Z][\w:.+-]*\}$", plain[: span.start()])
        if found:
            yield (
                number,
                f"“{found[0].strip()}” is MyST, which Colab shows as raw text; use plain "
                "Markdown.",
            )


def size(notebook: NotebookNode, path: Path) -> Iterator[Fault]:
    """The file stays small."""
    if path.stat().st_size >= MAX_BYTES:
        size = path.stat().st_size
        yield 0, f"the file has {size} bytes, but must have fewer than {MAX_BYTES}."


RULES = (setup, counts, length, width, median, listed, title, prose, alt_text, outputs, clean)
RULES += (myst, size)


def names(
    notebooks: dict[Path, NotebookNode], package: Path
) -> Iterator[tuple[Path, int, str]]:
    """No function or class is defined twice, in the notebooks and the package."""
    where = dict(_defined_in(package))
    for path, notebook in notebooks.items():
        for number, cell in cells.code(notebook):
            for name in _defined(cells.tree(cell.source)):
                if name in where:
                    yield (
                        path,
                        number,
                        f"{name} is already defined in {where[name]}; import it or name this "
                        "otherwise.",
                    )
                else:
                    where[name] = f"{path.name}, cell {number}"


def check(paths: list[Path], package: Path = notebook_files.ROOT / "gptlite") -> list[str]:
    """All faults of the notebooks at `paths`, as they are printed."""
    notebooks, faults = {}, []
    for path in paths:
        notebook = _read(path)
        if isinstance(notebook, str):
            faults.append((path, 0, notebook))
        else:
            notebooks[path] = notebook
    for path, notebook in notebooks.items():
        faults += [
            (path, number, sentence)
            for rule in RULES
            for number, sentence in rule(notebook, path)
        ]
    faults += names(notebooks, package)
    return [
        f"{path.name}{f', cell {number}' if number else ''}: {sentence}"
        for path, number, sentence in faults
    ]


def _read(path: Path) -> NotebookNode | str:
    """The notebook, or what is wrong with the file."""
    try:
        return notebook_files.read(path)
    except ValueError as error:
        return str(error)


def _too_wide(what: str, source: str) -> Iterator[str]:
    """A sentence if a line of code is too wide; only the widest is named."""
    widest = max(map(len, source.splitlines()), default=0)
    if widest > MAX_COLUMNS:
        [line, *_] = [line for line in source.splitlines() if len(line) == widest]
        yield (
            f"{what} has a line of {widest} columns, but at most {MAX_COLUMNS} fit the page "
            f"({line.strip()[:50]}…)."
        )


def _visible_lines(notebook: NotebookNode) -> list[int]:
    """Lines of each code cell that a reader sees unfolded; the setup cell is not counted."""
    code = [cell for _, cell in cells.code(notebook)][1:]
    seen = [cell for cell in code if not FOLDED & {*cell.metadata.get("tags", [])}]
    return [len(cell.source.splitlines()) for cell in seen]


def _first_definition(lines: list[str]) -> str:
    """The line of a listing that begins its first function or class, or else its first line."""
    starts = (line for line in lines if re.match(r"\s*(?:async )?(?:def|class) ", line))
    return next(starts, lines[0]).strip().rstrip(":")


def _is_compared(output: NotebookNode) -> bool:
    """Whether nbval compares an output: a stream, or data of which one kind is compared."""
    return not output.get("data") or not set(output.data) <= NOT_COMPARED


def _without_fences_and_math(text: str) -> str:
    text = re.sub(
        r"^( *)(`{3,}|~{3,}).*?(?:^ *\2|\Z)", "", text, flags=re.MULTILINE | re.DOTALL
    )
    text = re.sub(r"\$\$.*?\$\$|\\begin\{(\w+\*?)\}.*?\\end\{\1\}", " ", text, flags=re.DOTALL)
    return re.sub(
        r"(?<![\\\d\w])\$(?=\S)[^$\n]*(?:\n(?!\n)[^$\n]*)*?(?<=\S)\$(?!\d)", " ", text
    )


def _without_code(text: str) -> str:
    """Markdown without code, and without what stands in formulae."""
    return CODE_SPAN.sub(" ", _without_fences_and_math(text))


def _plain(text: str) -> str:
    """What a reader reads as prose: no code, no formulae, no addresses, no tags."""
    text = re.sub(r"\]\([^)]*\)|<https?:[^>]*>|https?://\S+", " ", _without_code(text))
    text = re.sub(r"<!--.*?-->|<[a-zA-Z/][^>]*>", " ", text, flags=re.DOTALL)
    return (
        text.replace("\u00a0", " ")
        .replace("\u202f", " ")
        .replace("*", "")
        .replace("&nbsp;", " ")
    )


FETCHED = "would be fetched from another host by everyone who reads the page."


def _images(text: str) -> Iterator[str]:
    """Faults of the images in Markdown or HTML."""
    for alt, address in re.findall(r"!\[([^\]]*)\]\(([^)\s]*)", text):
        if not alt.strip():
            yield f"the image {address} has no alt text."
        if address.startswith(("http:", "https:", "//")):
            yield f"the image {address} {FETCHED}"
    for tag in re.findall(r"<img\b[^>]*>", text):
        if not re.search(r"""\balt=(?:"[^"]*\S[^"]*"|'[^']*\S[^']*')""", tag):
            yield f"the image {tag[:60]} has no alt text."
        if re.search(r"""\bsrc=["']?(?:https?:)?//""", tag):
            yield f"the image {tag[:60]} {FETCHED}"
    for tag in re.findall(r"<svg\b[^>]*>", text):
        described = re.search(r'\brole="img"', tag) and re.search(
            r'\baria-label="[^"]*\S[^"]*"', tag
        )
        if not described and 'aria-hidden="true"' not in tag:
            yield (
                'the drawing <svg> has no role="img" with an aria-label; display it with '
                "gptlite.show.figure."
            )


def _defined(tree: ast.Module) -> list[str]:
    """Functions and classes defined at the top level, under `if`, `try` and `with` too."""
    found, open_nodes = [], list(tree.body)
    while open_nodes:
        node = open_nodes.pop(0)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.append(node.name)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
            open_nodes = [
                child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)
            ] + open_nodes
    return found


@cache
def _defined_in(package: Path) -> dict[str, str]:
    """The module in which each function and class of the package is defined."""
    where = {}
    for module in sorted(package.rglob("*.py")):
        for name in _defined(ast.parse(module.read_text(encoding="utf-8"))):
            where[name] = f"gptlite/{module.relative_to(package).as_posix()}"
    return where


def _should_show(source: str) -> bool:
    """Whether a cell surely displays something: it calls what does, or ends with a value."""
    body = cells.tree(source).body
    values = [node.value for node in body if isinstance(node, ast.Expr)]
    calls = [value for value in values if isinstance(value, ast.Call)]
    if any(getattr(call.func, "id", "") in SHOWS for call in calls):
        return True
    ends_with_value = bool(values) and isinstance(body[-1], ast.Expr)
    ends_with_value = ends_with_value and not isinstance(values[-1], ast.Call | ast.Await)
    return ends_with_value and not source.rstrip().endswith(";")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if there is no fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a notebook, such as kv_cache; all if none is named",
    )
    paths = notebook_files.find(parser.parse_args(arguments).names)
    faults = check(paths)
    if faults:
        print("\n".join(faults))
        counted = [
            f"{len(found)} {word}{'s' * (len(found) > 1)}"
            for found, word in ((faults, "fault"), (paths, "notebook"))
        ]
        print(" in ".join(counted) + ".")
        return 1
    for path in paths:
        notebook = notebook_files.read(path)
        code, lines = cells.code(notebook), _visible_lines(notebook)
        print(
            f"{path.name}: {len(code)} code cells, {len(lines)} of them not folded, "
            f"median {statistics.median(lines or [0]):g} lines, "
            f"{path.stat().st_size / 1e3:.0f} kB."
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"check_notebooks: {error}")
