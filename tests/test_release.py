"""A release is one command, and its wheel works where there is no checkout."""

import re
import subprocess

import pytest
import release

ROOT = release.ROOT


def git(folder, *command):
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    done = subprocess.run(
        ["git", *identity, *command], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small repository with all that a release writes to, on which `release` works."""
    for name in ("gptlite/__init__.py", "CITATION.cff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## Unreleased\n\n- A thing.\n\n## 0.1.0\n"
    )
    (tmp_path / "scripts" / "notebooks").mkdir(parents=True)
    (tmp_path / "scripts" / "notebooks" / "setup_cell.py").write_text("")
    for step in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "Begin")):
        git(tmp_path, *step)
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "test")
        monkeypatch.setenv(f"{name}_EMAIL", "test@example.org")
    monkeypatch.setattr(release, "ROOT", tmp_path)
    real = release.run
    monkeypatch.setattr(release, "run", lambda *c, cwd=tmp_path: real(*c, cwd=cwd))
    for name in ("current", "write_version"):
        function = getattr(release, name)
        monkeypatch.setattr(release, name, lambda *a, f=function: f(*a, root=tmp_path))
    monkeypatch.setattr(release, "build_wheel", lambda folder: folder / "gptlite-9.0.0.whl")
    monkeypatch.setattr(release, "try_wheel", lambda wheel: "tried")
    return tmp_path


def test_a_release_writes_the_version_everywhere_and_tags_it(checkout):
    wheel = release.release("9.0.0")
    assert wheel == checkout / "dist" / "gptlite-9.0.0.whl"
    assert '__version__ = "9.0.0"' in (checkout / "gptlite" / "__init__.py").read_text()
    citation = (checkout / "CITATION.cff").read_text()
    assert re.search(r"(?m)^version: 9\.0\.0$", citation)
    day = re.search(r"(?m)^date-released: (\d{4}-\d\d-\d\d)$", citation)[1]
    changes = (checkout / "CHANGELOG.md").read_text()
    assert f"## Unreleased\n\n## 9.0.0 ({day})\n\n- A thing.\n\n## 0.1.0\n" in changes
    assert git(checkout, "tag") == "v9.0.0\n"
    assert git(checkout, "status", "--porcelain") == ""
    assert git(checkout, "log", "-1", "--format=%s") == "Release 9.0.0\n"


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ("9.0", "must be of the form 1.2.3"),
        ("0.0.1", "must be above 0"),
        ("v9.0.0", "must be of the form 1.2.3"),
    ],
)
def test_a_version_that_is_none_is_refused(checkout, version, sentence):
    with pytest.raises(release.ReleaseError, match=sentence):
        release.release(version)
    assert git(checkout, "status", "--porcelain") == ""


def test_uncommitted_work_is_refused(checkout):
    (checkout / "new.txt").write_text("x")
    with pytest.raises(release.ReleaseError, match="commit them first"):
        release.release("9.0.0")


def test_a_release_that_changes_nothing_is_refused_and_leaves_all_as_it_was(checkout):
    changes = checkout / "CHANGELOG.md"
    changes.write_text(changes.read_text().replace("- A thing.\n\n", ""))
    git(checkout, "commit", "-qam", "Empty")
    with pytest.raises(release.ReleaseError, match="say there what changed"):
        release.release("9.0.0")
    assert git(checkout, "status", "--porcelain") == ""
    assert release.current() != "9.0.0"


def test_a_wheel_that_fails_leaves_all_as_it_was(checkout, monkeypatch):
    def fail(wheel):
        raise release.ReleaseError("the wheel is broken")

    monkeypatch.setattr(release, "try_wheel", fail)
    with pytest.raises(release.ReleaseError, match="broken"):
        release.release("9.0.0")
    assert git(checkout, "status", "--porcelain") == ""
    assert git(checkout, "tag") == ""


@pytest.mark.slow
def test_the_wheel_works_without_a_checkout(tmp_path):
    """Its model generates, the kernels are in it, the missing weights are a sentence."""
    said = release.try_wheel(release.build_wheel(tmp_path))
    assert said.startswith(release.current())
    assert "checkpoints are not installed with the package" in said
    assert said.count("\n") == 0
