"""Every choice is a GPT; the search finds the best within the budget, and repeats itself."""

import itertools
import json
import sys
from dataclasses import asdict, replace

import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptlite.files import ASSETS
from gptlite.kv_cache import KVCache
from gptlite.model import GPT, GPTConfig
from gptlite.pruning.shape_search import CHOICES, Tried, pareto_front, search, suggest_config

LIKE = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=6, vocab_size=11)
BUDGET = 10.0

optuna.logging.set_verbosity(optuna.logging.WARNING)


def attempt(i, config):
    """A made-up world: layers take time, width and layers help."""
    latency = float(config.n_layer * (1 + config.hidden / config.n_embd / 6))
    loss = 3 - 0.1 * config.n_layer - 0.001 * config.n_embd + 0.01 * config.kv_heads
    return Tried(config, latency, loss if latency <= BUDGET else None)


def test_every_choice_is_a_gpt_for_the_same_context_and_vocabulary():
    for values in itertools.product(*CHOICES.values()):
        choices = dict(zip(CHOICES, values, strict=True))
        config = suggest_config(optuna.trial.FixedTrial(choices), LIKE)
        assert (config.block_size, config.vocab_size) == (LIKE.block_size, LIKE.vocab_size)
        assert (
            config.n_embd == config.n_head * config.head_dim
            and config.n_head % config.kv_heads == 0
        )
        assert (
            config.hidden == choices["MLP ratio"] * config.n_embd
            and config.n_layer == choices["layers"]
        )


def test_a_choice_with_all_that_is_unusual_generates():
    choices = {
        "layers": 2,
        "heads": 4,
        "head size": 16,
        "queries of a KV head": 8,
        "MLP ratio": 3,
    }
    config = suggest_config(optuna.trial.FixedTrial(choices), LIKE)
    assert config.kv_heads == 1  # no more queries share a head than there are
    model, cache = GPT(config).eval(), KVCache(config)
    idx = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(idx, cache), model(idx))


def test_it_finds_better_shapes_than_chance_and_none_that_is_too_slow():
    found = search(LIKE, attempt, 60)
    assert len(found) == 60
    best = (
        min(t.loss for t in found[:10] if t.loss is not None),
        min(t.loss for t in found if t.loss is not None),
    )
    assert best[1] < best[0]
    assert all(t.latency > BUDGET for t in found if t.loss is None) and any(
        t.loss is None for t in found
    )


def test_the_same_results_lead_to_the_same_shapes():
    found = search(LIKE, attempt, 25, seed=3)
    kept = [t.config for t in found]
    assert [t.config for t in search(LIKE, lambda i, config: found[i], 25, seed=3)] == kept
    assert [t.config for t in search(LIKE, attempt, 25, seed=4)] != kept


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_front_is_what_no_other_beats(points):
    front = pareto_front(points)
    assert [points[i] for i in front] == sorted({points[i] for i in front})

    def beaten(p):
        return any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)

    assert {points[i] for i in front} == {p for p in points if not beaten(p)}


def test_what_is_too_slow_is_told_as_pruned_and_the_rest_with_its_loss(monkeypatch):
    """A loss told for a shape that was never trained would be the best of all."""

    def slow(config):
        return {"loss": None} if config.n_layer > 3 else {}

    studies, create = [], optuna.create_study
    monkeypatch.setattr(
        optuna,
        "create_study",
        lambda **options: studies.append(create(**options)) or studies[0],
    )
    found = search(LIKE, lambda i, c: replace(attempt(i, c), **slow(c)), 30)
    told = [(trial.state.name, trial.value) for trial in studies[0].trials]
    assert told == [("PRUNED", None) if t.loss is None else ("COMPLETE", t.loss) for t in found]
    assert 0 < sum(t.loss is None for t in found) < 30


def test_the_recorded_search_is_the_one_that_runs():
    """The book's record, asked for again shape by shape: of the same sampler, then as now."""
    runs = json.loads((ASSETS / "results" / "pruning" / "search.json").read_text())["runs"]
    trials = [runs[f"trial {i}"] for i in range(sum(name.startswith("trial") for name in runs))]

    def recorded(i, config):
        assert asdict(config) == trials[i]["config"], i
        return Tried(config, trials[i]["latency"][0], trials[i]["val_loss"])

    assert len(search(GPTConfig(), recorded, len(trials))) == 24


def test_no_trials_and_no_optuna(monkeypatch):
    with pytest.raises(ValueError, match="trials is 0, but must be at least 1"):
        search(LIKE, attempt, 0)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        ModuleNotFoundError, match="the search needs Optuna; pip install optuna"
    ):
        search(LIKE, attempt, 1)
