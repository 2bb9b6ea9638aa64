"""Make .venv from requirements.txt and install gptlite in it, editable, or say what is missing.

Run by the Makefile with whatever `python3` the reader has, so it is written to be read by old
versions as well.
"""

import os
import subprocess
import sys

FLOOR = (3, 10)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def fail(sentence):
    """Print one sentence and stop."""
    sys.exit("\nmake: " + sentence + "\n")


def run(command, **options):
    """Run a command with its output shown; return its exit status."""
    return subprocess.call(command, cwd=ROOT, **options)


def pip_install(python, arguments, log):
    """Run `pip install`, showing what a reader waits for; return its exit status and output."""
    # modules are compiled when they are first imported: most never are
    options = "--disable-pip-version-check --progress-bar off --no-compile"
    command = [python, "-m", "pip", "install"] + options.split() + arguments
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines = []
    with open(log, "a") as file:
        for raw in process.stdout:
            line = raw.decode("utf-8", "replace")
            file.write(line)
            lines.append(line)
            words = line.split()
            if words[:1] == ["Downloading"]:
                print("  " + " ".join(words[1:2] + words[-2:]))
            elif words[:1] == ["Installing"]:
                print("  installing %d packages" % line.count(","))
            elif words[:1] in (["ERROR:"], ["error:"]):
                print("  " + line.strip())
            sys.stdout.flush()
    return process.wait(), "".join(lines).lower()


def main(venv):
    """Check this Python, make the environment if there is none, fill it."""
    wanted = ".".join(str(n) for n in FLOOR)
    if sys.version_info < FLOOR:
        found = ".".join(str(n) for n in sys.version_info[:3])
        fail(
            "%s is Python %s, but the book needs %s or newer; name another one with "
            "`make book PYTHON=python3.11`." % (sys.executable, found, wanted)
        )
    try:
        import ensurepip  # noqa: F401  (Debian ships venv without it)
        import venv as _  # noqa: F401
    except ImportError:
        version = "%d.%d" % sys.version_info[:2]
        fail(
            "this Python has no venv module; install it (Debian, Ubuntu: apt-get install "
            "python%s-venv)." % version
        )

    python = os.path.join(venv, "bin", "python")
    if not os.path.exists(python) or run(
        [python, "-c", "import pip"], stderr=subprocess.DEVNULL
    ):
        print(
            "Making %s with Python %d.%d.%d"
            % ((os.path.relpath(venv, ROOT),) + sys.version_info[:3])
        )
        if run([sys.executable, "-m", "venv", "--clear", venv]):
            fail("python -m venv could not make %s; its own message is above." % venv)

    log = os.path.join(venv, "install.log")
    open(log, "w").close()
    print("Installing what requirements.txt lists (about 2 GB with torch, once)")
    extra = os.environ.get("PIP_ARGS", "").split()
    status, said = pip_install(python, ["-r", "requirements.txt"] + extra, log)
    if not status:
        status, said = pip_install(
            python, ["--no-deps", "--no-build-isolation", "-e", "."] + extra, log
        )
    if status:
        signs = "newconnectionerror, name resolution, connection refused, connection broken"
        signs += ", timed out, network is unreachable, connecttimeout, proxyerror, max retries"
        signs += ", no matching distribution"
        if "no space left" in said:
            fail(
                "the disk is full; the environment takes about 2 GB. The whole log is in %s."
                % log
            )
        if any(sign in said for sign in signs.split(", ")):
            fail(
                "the package index could not be reached or lacks a package; is there a "
                "network? The log is %s." % log
            )
        fail(
            "pip could not install the requirements; its own message is above, the whole log "
            "in %s." % log
        )


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]))
