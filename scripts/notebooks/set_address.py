"""Say where the repository is.

python scripts/notebooks/set_address.py https://github.com/OWNER/REPO

The address stands in _config.yml; this writes it there and into everything that follows it:
README.md, CITATION.cff, and the setup cell and the link to Colab of each notebook. Without an
argument it brings the followers in line with _config.yml. The workflow that publishes the book
runs it, so that a fork's pages lead to the fork.
"""

import re
import sys
from pathlib import Path

import notebook_files
import readme
import setup_cell

ROOT = Path(__file__).resolve().parents[2]
FOLLOWERS = ("README.md", "CITATION.cff")


def follow(text: str, old: str, new: str) -> str:
    """`text` with the repository `old`, as OWNER/REPO, replaced by `new` in every address."""
    text = re.sub(rf"(github\.com/|/github/){re.escape(old)}(?![\w.-])", rf"\g<1>{new}", text)
    pages = []
    for name in (old, new):
        owner, repository = name.split("/")
        pages.append(f"{owner.lower()}.github.io/{repository}")
    return text.replace(*pages)


def repository_in(text: str) -> str | None:
    """The first repository, as OWNER/REPO, that an address in `text` marks as this one."""
    marks = r"repository-code: \"https://github\.com/|colab\.research\.google\.com/github/"
    found = re.search(rf"(?:{marks})([\w.-]+/[\w.-]+)", text)
    return found[1] if found else None


def main() -> None:
    """The command line."""
    config = ROOT / "_config.yml"
    if len(sys.argv) > 1:
        address = sys.argv[1].rstrip("/").removesuffix(".git")
        if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address):
            sys.exit(
                f"set_address: {address} is not of the form https://github.com/OWNER/REPO."
            )
        text = config.read_text(encoding="utf-8")
        config.write_text(re.sub(r"(?m)^(  url: ).*$", rf"\g<1>{address}", text, count=1))
        setup_cell.repository.cache_clear()
    new = setup_cell.repository()[0].removeprefix("https://github.com/")
    for name in FOLLOWERS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        path.write_text(follow(text, repository_in(text) or new, new), encoding="utf-8")
    for path in notebook_files.find([]):
        notebook = notebook_files.read(path)
        if setup_cell.differences(notebook, path.name):
            setup_cell.put(notebook, path.name)
            notebook_files.write(notebook, path)
    readme.README.write_text(readme.text(), encoding="utf-8")
    print(f"README.md, CITATION.cff and the notebooks name {new}.")


if __name__ == "__main__":
    main()
