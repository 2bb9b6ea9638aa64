"""What several tests share."""

import os
import shutil

import hypothesis
import pytest
import sums
import torch
from screenshot import CHROMIUM_FLAGS

from gptlite.corpus import Corpus, load_corpus
from gptlite.model import GPT, GPTConfig

# No deadline: no test may depend on how long something takes. The same examples each time, so
# that a failure belongs to the change at hand; `--hypothesis-profile=explore` draws new ones.
hypothesis.settings.register_profile("book", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=200)
hypothesis.settings.load_profile("book")

# Without a GPU, Triton's kernels run in its interpreter, if this is set before anything (as
# torch.compile) imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny products gain nothing from a second thread, and stall where its core is wanted."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def browser():
    """Chromium, for the tests of one file; without it they are skipped, or, with $CI, fail."""
    playwright_api = pytest.importorskip("playwright.sync_api")
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if chromium is None:
        message = (
            "there is no Chromium here; install it (Debian, Ubuntu: apt install chromium)."
        )
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def plays() -> Corpus:
    """The book's corpus; where it cannot be had, a test that needs it is skipped."""
    try:
        return load_corpus("plays")
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """A tiny text that a tiny model can learn."""
    return sums.corpus()


@pytest.fixture(scope="session")
def make_model():
    """A function that makes a tiny model in evaluation mode, with larger weights than at first.

    A freshly initialised GPT gives nearly the same logits everywhere, so that a wrong mask or
    position hardly shows.
    """

    def make(seed: int = 0, **config) -> GPT:
        tiny = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": 17}
        torch.manual_seed(seed)
        model = GPT(GPTConfig(**tiny | config)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
        return model

    return make
