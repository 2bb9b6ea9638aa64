"""Labels stay with their samples under any shuffle and interruption; others are refused."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sums import TEXT, VOCABULARY
from torch.utils.data import DataLoader

from gptlite.corpus import CharTokenizer, windows
from gptlite.distillation.label_files import fingerprint, label_bytes, record_dtype
from gptlite.distillation.labels import LabelStore, spread_rest, write_labels
from gptlite.distillation.losses import Distillation, Ensemble, forward_kl
from gptlite.model import GPT, GPTConfig
from gptlite.train import TrainConfig, train

T = 8
SHAPE = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=T, vocab_size=VOCABULARY)
V = SHAPE.vocab_size


def new_model(seed=0, **config):
    torch.manual_seed(seed)
    model = GPT(replace(SHAPE, **config))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # an opinion
    return model.eval()


@pytest.fixture(scope="module")
def teacher():
    return new_model(1)


@pytest.fixture(scope="module", params=[None, 3], ids=["all", "top 3"])
def store(request, corpus, teacher, tmp_path_factory):
    return write_labels(
        tmp_path_factory.mktemp("labels"), teacher, corpus, T, k=request.param, B=7
    )


@torch.no_grad()
def wanted(teacher, x, k):
    log_p = teacher(x).log_softmax(-1)
    return log_p if k is None else spread_rest(*log_p.topk(k), V)


def check(x, log_p, teacher, k):
    torch.testing.assert_close(log_p, wanted(teacher, x, k), atol=0.02, rtol=2**-9)


# Alignment


def test_every_window_has_its_own_labels(store, corpus, teacher):
    expected = list(windows(corpus.train, T=T, B=1))
    assert len(store) == len(expected) == len([store[i] for i in range(len(store))])
    for i, (x, y) in enumerate(expected):
        mine = store[i]
        assert torch.equal(mine[0], x[0]) and torch.equal(mine[1], y[0])
        assert mine[2].shape == (T, V) and mine[2].dtype == torch.float32
        check(mine[0][None], mine[2][None], teacher, store.k)


def test_any_shuffle_and_any_number_of_workers(store, teacher):
    spawned = {"num_workers": 2, "multiprocessing_context": "spawn"}
    for options in ({}, {}, spawned):
        seen = 0
        for x, _, log_p in DataLoader(store, batch_size=5, shuffle=True, **options):
            check(x, log_p, teacher, store.k)
            seen += len(x)
        assert seen == len(store)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(B=st.integers(1, 40), step=st.integers(0, 200), seed=st.integers(0, 5))
def test_the_loops_batches_are_aligned_and_depend_on_the_arguments_alone(
    store, teacher, corpus, B, step, seed
):
    x, y, log_p = store.sample(corpus.train, T, B, step, seed)
    check(x, log_p, teacher, store.k)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert all(map(torch.equal, store.sample(corpus.train, T, B, step, seed), (x, y, log_p)))


def test_a_pass_takes_each_window_once(store, corpus):
    n, starts = len(store), {}
    for step in range(2 * n):
        x, _, _ = store.sample(corpus.train, T, 1, step)
        starts.setdefault(step // n, []).append(tuple(x[0].tolist()))
    expected = sorted(tuple(store[i][0].tolist()) for i in range(n))
    assert sorted(starts[0]) == sorted(starts[1]) == expected and starts[0] != starts[1]


def test_each_seed_has_an_order_of_its_own(store, corpus):
    """The order of a pass is PyTorch's permutation for this seed, and not another's."""
    n, orders = len(store), {}
    for seed in (0, 1, 2):
        rng = torch.Generator().manual_seed(1_000_003 * seed)
        torch.randint(T, (1,), generator=rng)  # the offset that is drawn first
        orders[seed] = torch.randperm(n, generator=rng)[:12]
        x, _, _ = store.sample(corpus.train, T, 12, 0, seed)
        assert torch.equal(x, torch.stack([store[i][0] for i in orders[seed].tolist()]))
    assert not any(torch.equal(orders[0], orders[seed]) for seed in (1, 2))


def test_training_from_the_store_is_training_with_the_teacher(store, corpus, teacher):
    """Equal up to the rounding of labels to float16, or to what top-k leaves out."""
    config, found = TrainConfig(steps=12, batch_size=8, warmup=2), []

    def asked(*arguments):
        x, y, _ = store.sample(*arguments)
        return x, y, wanted(teacher, x, store.k)

    def of_another_batch(tokens, T, B, step, seed):  # the seed's bug
        x, y, _ = store.sample(tokens, T, B, step, seed)
        return x, y, store.sample(tokens, T, B, step + 1, seed)[2]

    for sample in (store.sample, asked, of_another_batch):
        student = new_model(2)
        train(
            student,
            corpus,
            config,
            loss_fn=Distillation(alpha=1.0),
            sample=sample,
            eval_every=0,
        )
        found.append(student(corpus.val[None, :T].long()))
    assert (found[0] - found[1]).abs().max() < 0.05 * (found[0] - found[2]).abs().max()


# Size, and what the k likeliest leave out


@pytest.mark.parametrize(
    ("vocabulary", "k", "bytes_a_token"),
    [(65, None, 130), (65, 8, 24), (50257, 8, 32), (99999, 1, 6)],
)
def test_bytes_are_predicted(vocabulary, k, bytes_a_token):
    assert label_bytes(3, 5, vocabulary, k) == 15 * bytes_a_token


def test_the_file_has_the_bytes_that_were_predicted(store):
    assert (
        (store.path / "labels.bin").stat().st_size
        == store.nbytes
        == label_bytes(len(store), T, V, store.k)
    )


def test_top_8_of_65_take_less_than_a_quarter():
    assert label_bytes(1, 1, 65, 8) < label_bytes(1, 1, 65) / 4


@given(st.integers(2, 30), st.integers(0, 99), st.data())
def test_what_is_left_is_shared_and_all_adds_up_to_one(vocabulary, seed, data):
    k = data.draw(st.integers(1, vocabulary))
    z = 3 * torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(seed))
    log_p = z.log_softmax(-1)
    full = spread_rest(*log_p.topk(k), vocabulary)
    torch.testing.assert_close(full.exp().sum(-1), torch.ones(2), atol=1e-4, rtol=0)
    kept = log_p.topk(k).indices
    assert torch.equal(full.gather(-1, kept), log_p.gather(-1, kept))
    assert forward_kl(full, log_p) >= -1e-6
    if k == vocabulary:
        assert torch.equal(full, log_p)


def test_more_of_the_likeliest_are_nearer():
    z = (3 * torch.randn(50, 30, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    off = [forward_kl(spread_rest(*z.topk(k), 30), z).item() for k in (1, 2, 4, 8, 16, 30)]
    assert off == sorted(off, reverse=True) and off[-1] < 1e-6


# Interruption, and what is refused


@pytest.mark.parametrize("k", [None, 2])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path, corpus, teacher, k):
    whole = write_labels(tmp_path / "whole", teacher, corpus, T, k=k, B=7)
    asked = []
    for stop in (7, 50, None):
        kept = write_labels(tmp_path / "parts", teacher, corpus, T, k=k, B=7, stop_after=stop)
        assert (kept is None) == (stop is not None)
        if stop:
            done = json.loads((tmp_path / "parts" / "about.json").read_text())["done"]
            asked.append(done)
            with pytest.raises(
                ValueError, match=f"end at window {done} of {len(whole)}; write_labels goes on"
            ):
                LabelStore(tmp_path / "parts", corpus)
    assert asked[0] < asked[1] < len(whole)
    assert (tmp_path / "parts" / "labels.bin").read_bytes() == (
        tmp_path / "whole" / "labels.bin"
    ).read_bytes()


def test_what_is_done_is_not_asked_again(tmp_path, corpus, teacher):
    write_labels(tmp_path, teacher, corpus, T)
    before = (tmp_path / "labels.bin").stat().st_mtime_ns
    calls = []
    handle = teacher.register_forward_hook(lambda *_: calls.append(1))
    write_labels(tmp_path, teacher, corpus, T)
    handle.remove()
    assert not calls and (tmp_path / "labels.bin").stat().st_mtime_ns == before


def test_a_kill_in_the_middle_of_a_batch_costs_that_batch_alone(tmp_path, corpus, teacher):
    whole = write_labels(tmp_path / "whole", teacher, corpus, T, B=7)
    write_labels(tmp_path / "parts", teacher, corpus, T, B=7, stop_after=20)
    with open(
        tmp_path / "parts" / "labels.bin", "r+b"
    ) as file:  # bytes that no about.json tells of
        file.seek(label_bytes(21, T, V))
        file.write(b"\xff" * 40)
    write_labels(tmp_path / "parts", teacher, corpus, T, B=7)
    assert (tmp_path / "parts" / "labels.bin").read_bytes() == (
        whole.path / "labels.bin"
    ).read_bytes()


def test_a_file_that_lost_its_end_is_not_gone_on_with(tmp_path, corpus, teacher):
    write_labels(tmp_path, teacher, corpus, T, B=7, stop_after=20)
    size = (tmp_path / "labels.bin").stat().st_size
    os.truncate(tmp_path / "labels.bin", size // 2)
    with pytest.raises(
        ValueError, match=f"has {size // 2} bytes, but must have {size}; delete the folder"
    ):
        write_labels(tmp_path, teacher, corpus, T, B=7)


@pytest.mark.parametrize("stop", [7, None])
def test_the_teacher_is_left_as_it_was(tmp_path, corpus, stop):
    model = new_model(1).train()
    seen = []
    model.register_forward_hook(lambda m, *_: seen.append(m.training))
    write_labels(tmp_path, model, corpus, T, B=7, n=20, stop_after=stop)
    assert model.training and not any(seen)


def test_labels_of_another_teacher_text_or_kind_are_refused(tmp_path, corpus, teacher):
    write_labels(tmp_path, teacher, corpus, T, n=20)
    other = replace(corpus, train=corpus.train.flip(0))
    larger = replace(corpus, tokenizer=CharTokenizer(TEXT + "#"))
    for change in (
        {"teacher": new_model(9)},
        {"corpus": other},
        {"corpus": larger},
        {"k": 2},
        {"n": 21},
        {"T": 4},
    ):
        arguments = {"teacher": teacher, "corpus": corpus, "T": T, "n": 20} | change
        with pytest.raises(ValueError, match=f"are others .*{next(iter(change))}"):
            write_labels(tmp_path, **arguments)
    for wrong in (other, larger):
        with pytest.raises(ValueError, match=r"are others \(corpus \w{16} -> \w{16}"):
            LabelStore(tmp_path, wrong)
    with pytest.raises(ValueError, match=r"are others \(teacher"):
        LabelStore(tmp_path, corpus, new_model(9))
    assert len(LabelStore(tmp_path, corpus, teacher)) == 20


def test_missing_truncated_and_broken_stores(tmp_path, corpus, teacher):
    with pytest.raises(FileNotFoundError, match=r"no labels at .*; write_labels makes them"):
        LabelStore(tmp_path / "none", corpus)
    write_labels(tmp_path, teacher, corpus, T)
    size = (tmp_path / "labels.bin").stat().st_size
    os.truncate(tmp_path / "labels.bin", size - 1)
    with pytest.raises(ValueError, match=f"has {size - 1} bytes, but must have {size}"):
        LabelStore(tmp_path, corpus)
    (tmp_path / "labels.bin").unlink()
    with pytest.raises(ValueError, match=f"has 0 bytes, but must have {size}"):
        LabelStore(tmp_path, corpus)
    for text, says in (
        ("{", "is not whole"),
        ("[]", "does not describe labels"),
        ('{"n": 1}', "does not describe"),
    ):
        (tmp_path / "about.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            LabelStore(tmp_path, corpus)


def test_a_flipped_bit_is_found(tmp_path, corpus, teacher):
    write_labels(tmp_path, teacher, corpus, T, n=20)
    content = bytearray((tmp_path / "labels.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "labels.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"labels\.bin has SHA-256 .*; delete the folder"):
        LabelStore(tmp_path, corpus)


def test_labels_of_before_there_were_digests_are_read(tmp_path, corpus, teacher):
    write_labels(tmp_path, teacher, corpus, T, n=20)
    about = json.loads((tmp_path / "about.json").read_text())
    del about["sha256"]
    (tmp_path / "about.json").write_text(json.dumps(about))
    assert len(LabelStore(tmp_path, corpus, teacher)) == 20


def test_bad_numbers(tmp_path, corpus, teacher, store):
    for k in (0, V + 1):
        with pytest.raises(
            ValueError, match=f"k is {k}, but must be from 1 to the vocabulary's {V}"
        ):
            record_dtype(V, k)
    whole = (len(corpus.train) - 1) // T
    for n in (0, whole + 1):
        with pytest.raises(
            ValueError,
            match=f"n is {n}, but the text has from 1 to {whole} windows of {T} tokens",
        ):
            write_labels(tmp_path, teacher, corpus, T, n=n)
    with pytest.raises(
        ValueError, match="the labels are of another text than the one to train on"
    ):
        store.sample(corpus.val, T, 2, 0)
    with pytest.raises(ValueError, match=f"for windows of {T} tokens, not of 4"):
        store.sample(corpus.train, 4, 2, 0)
    for i in (-1, len(store)):
        with pytest.raises(
            IndexError, match=re.escape(f"window {i} is asked for, but there are windows 0 to")
        ):
            store[i]


def test_the_fingerprint_sees_weights_and_shape(teacher):
    same, other = new_model(1), new_model(1)
    with torch.no_grad():
        other.ln_f.bias[0] += 1e-6
    assert fingerprint(same) == fingerprint(teacher) != fingerprint(other)
    assert re.fullmatch(r"[0-9a-f]{16}", fingerprint(teacher))
    heads = new_model(1, n_head=4)
    assert all(map(torch.equal, heads.state_dict().values(), teacher.state_dict().values()))
    assert fingerprint(heads) != fingerprint(teacher)


def test_the_fingerprint_sees_every_teachers_settings():
    """Those of all in an ensemble; one more option that is None changes nothing."""
    pairs = [Ensemble(new_model(1), new_model(2, n_head=heads)) for heads in (2, 4)]
    assert fingerprint(pairs[0]) != fingerprint(pairs[1])


def test_a_teacher_that_answers_with_no_numbers_is_not_kept(tmp_path, corpus):
    model = new_model(1)
    model.ln_f.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="the teacher's logits are NaN"):
        write_labels(tmp_path, model, corpus, T, n=20)
    assert not (tmp_path / "about.json").exists()
