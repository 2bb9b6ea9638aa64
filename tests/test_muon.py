"""Muon against the singular value decomposition, and against PyTorch's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptlite.muon import Muon, orthogonalize


def polar_factor(G):
    """U V^T, what Newton-Schulz approaches, by the singular value decomposition."""
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 99))
def test_singular_values_land_near_one(m, n, seed):
    torch.manual_seed(seed)
    G = torch.randn(m, n) * 10 ** torch.randn(1)
    values = torch.linalg.svdvals(orthogonalize(G))
    # the polynomial rises with its argument up to there
    keep = torch.linalg.svdvals(G) > 0.002 * G.norm()
    assert values[: keep.sum()].min() > 0.67
    assert values.max() < 1.22


def test_the_singular_vectors_stay():
    """The polynomial acts on singular values alone: its values are U^T X V, a diagonal."""
    torch.manual_seed(0)
    G = torch.randn(5, 9, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    x = S / S.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    torch.testing.assert_close(
        U.mT @ orthogonalize(G) @ Vh.mT, torch.diag(x), atol=1e-6, rtol=0
    )


def test_shapes_tall_wide_and_stacked():
    torch.manual_seed(0)
    G = torch.randn(3, 8, 5)
    torch.testing.assert_close(orthogonalize(G.mT), orthogonalize(G).mT)
    torch.testing.assert_close(orthogonalize(G)[1], orthogonalize(G[1]))
    assert not orthogonalize(torch.zeros(4, 3)).any()  # no gradient, no step, no NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_matrix_of_low_rank_does_not_explode(dtype, rank):
    """As early gradients are; X X^T carried on in 8 bits made this one of norm 10^5."""
    torch.manual_seed(0)
    G = (torch.randn(32, rank) @ torch.randn(rank, 24)).to(dtype)
    values = torch.linalg.svdvals(orthogonalize(G).float())
    assert values[:rank].min() > 0.6
    assert values.max() < 1.3


def test_one_step_by_hand():
    """The momentum is (1 - beta) g, Nesterov's look-ahead (1 - beta^2) g: both along g."""
    torch.manual_seed(0)
    p, g = torch.nn.Parameter(torch.randn(12, 3)), torch.randn(12, 3)
    before = p.detach().clone()
    p.grad = g.clone()
    Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    # a tall matrix takes longer steps
    expected = before * (1 - 0.1 * 0.5) - 0.1 * (12 / 3) ** 0.5 * orthogonalize(g)
    torch.testing.assert_close(p.detach(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(p.grad, g)  # the gradient is only read


@pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon of its own"
)
def test_equals_pytorchs_muon():
    """The same path over several steps, to the rounding of bfloat16, which PyTorch's has."""
    torch.manual_seed(0)
    start = [torch.randn(24, 8), torch.randn(8, 24), torch.randn(8, 8)]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    same = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    one, two = Muon(ours, **same, dtype=torch.bfloat16), torch.optim.Muon(theirs, **same)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        one.step()
        two.step()
    for p, q, s in zip(ours, theirs, start, strict=True):
        # without Nesterov or the factor for tall matrices: 0.2 and more
        assert (p - q).norm() < 0.06 * (q - s).norm()


def test_a_closure_is_asked_for_the_loss_and_the_gradient():
    """As of every optimizer; if it were not, the step would be that of old gradients."""
    p, twin = (torch.nn.Parameter(torch.eye(3)) for _ in range(2))

    def closure():
        loss = (p @ p).sum()
        loss.backward()
        return loss

    assert Muon([p], lr=0.1).step(closure) == 3
    (twin @ twin).sum().backward()
    assert Muon([twin], lr=0.1).step() is None
    assert torch.equal(p, twin) and not torch.equal(p, torch.eye(3))


def test_parameters_without_a_gradient_stay():
    p, q = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    p.grad = torch.eye(2)
    Muon([p, q], lr=0.1).step()
    assert not torch.equal(p.detach(), torch.ones(2, 2))
    assert torch.equal(q.detach(), torch.ones(2, 2))


def test_takes_matrices_only():
    with pytest.raises(
        ValueError, match=r"Muon takes matrices, but a parameter has the shape \(3,\)\."
    ):
        Muon([torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))])
