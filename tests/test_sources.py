import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sources

CODE = '''\
"""A module."""
import os

LIMIT = 3


def f(x: int, *rest: str, key=None) -> "int":
    """What it returns."""
    y = [x for x in rest if x] or {"a": 1, **{}}
    return f"{x!r:>{LIMIT}} and {y}" "more", b"1", 1.5, None, ..., True


class A(dict):
    """A class."""

    n: int = 0  # a field

    async def g(self):
        match self:
            case {"a": [1, *_]}:
                await self
        lambda: (yield)
'''
# the same on every release of Python, and so in every notebook
DIGEST = "6652fee7a59333d8"


def meaning(code: str) -> str:
    return sources.meaning(ast.parse(code))


SAME = {
    "a comment": ("n: int = 0  # a field", "n: int = (\n        0\n    )"),
    "another docstring": ('"""What it returns."""', '"""It returns this,\n\n    and why."""'),
    "no docstring": ('    """What it returns."""\n', ""),
    "a docstring alone": ('"""A module."""\n', ""),
    "a cut text": ('"more"', "\"mo\" 're'"),
    "quotes": ('f"{x!r:>{LIMIT}} and {y}"', "f'{x!r:>{LIMIT}} an' f'd {y}'"),
}
OTHER = {
    "a number": ("LIMIT = 3", "LIMIT = 4"),
    "a number's type": ("LIMIT = 3", "LIMIT = 3.0"),
    "a truth for a one": ("LIMIT = 3", "LIMIT = True"),
    "a text": ('"more"', '"less"'),
    "a text in an f-string": (" and {y}", " or {y}"),
    "a default": ("key=None", "key=0"),
    "no default": ("key=None", "key"),
    "an operator": ("or {", "and {"),
    "an import": ("import os", "import sys"),
    "an annotation": ('"int"', '"float"'),
    "a conversion": ("{x!r:", "{x!s:"),
    "order": ('b"1", 1.5', '1.5, b"1"'),
}


@pytest.mark.parametrize("case", SAME)
def test_what_means_the_same_has_the_same_digest(case):
    assert SAME[case][0] in CODE
    assert meaning(CODE.replace(*SAME[case])) == meaning(CODE)


@pytest.mark.parametrize("case", OTHER)
def test_what_means_something_else_has_another_digest(case):
    assert OTHER[case][0] in CODE
    assert meaning(CODE.replace(*OTHER[case])) != meaning(CODE)


def test_every_release_of_python_gives_the_same_digest():
    assert meaning(CODE) == DIGEST
    script = f"import ast, sources; print(sources.meaning(ast.parse({CODE!r})))"
    for name in ("python3.10", "python3.11", "python3.12", "python3.13", "python3.14"):
        if python := shutil.which(name):
            done = subprocess.run(
                [python, "-c", script],
                cwd=Path(sources.__file__).parent,
                capture_output=True,
                text=True,
            )
            # a pyenv shim of a release that is not chosen refuses
            assert done.returncode or done.stdout.strip() == DIGEST, name
    assert sys.version_info >= (3, 10)


CPP = """// Rows of numbers.
#include "lanes.h"
float f(float x) {  /* twice */
    return 2 * x;  // "not a string
}
const char* address = "http://here";
"""


def test_comments_and_layout_of_cpp_do_not_count():
    terse = '#include "lanes.h" float f(float x) { return 2 * x; } '
    terse += 'const char* address = "http://here";'
    assert sources.cpp_meaning(CPP) == sources.cpp_meaning(terse)
    for old, new in (("2 * x", "3 * x"), ("//here", "//there"), ("lanes.h", "codes.h")):
        assert sources.cpp_meaning(CPP.replace(old, new)) != sources.cpp_meaning(CPP)


def test_pins_of_one_package_stand_together():
    requirements = """# the package
torch==2.13.0
numpy==2.4.6; python_version >= "3.11"
numpy==2.2.6;  python_version < "3.11"

netron>=9.3,<10  # not exactly
"""
    numpy = 'numpy==2.4.6; python_version >= "3.11" | numpy==2.2.6; python_version < "3.11"'
    assert sources.pins(requirements) == {
        "torch": "torch==2.13.0",
        "numpy": numpy,
        "netron": "netron>=9.3,<10",
    }
