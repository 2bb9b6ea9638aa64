"""The kernel computes what the tiles do, on a GPU or in Triton's interpreter (see conftest)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="there is no Triton for this system")

from gptlite.flash_attention.kernel import triton_flash_attention
from gptlite.model import naive_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ATOL = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def qkv(B, H_kv, groups, Tq, past, D, dtype=torch.float32, scale=1.0):
    """Random queries of the last Tq of past + Tq positions, and keys and values of all."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(B, H_kv * groups, Tq, D)] + 2 * [(B, H_kv, past + Tq, D)]
    return [(scale * torch.randn(shape, generator=rng)).to(DEVICE, dtype) for shape in shapes]


def agrees(q, k, v, far=1.0):
    """Against the naive twin in float32."""
    expected = naive_attention(q.float(), k.float(), v.float())
    found = triton_flash_attention(q, k, v)
    assert found.dtype == q.dtype
    torch.testing.assert_close(
        found.float(), expected, atol=far * ATOL[q.dtype], rtol=far * ATOL[q.dtype]
    )


@settings(max_examples=25)
@given(
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(0, 70),
    st.sampled_from([1, 8, 24, 64]),
    st.sampled_from(list(ATOL)),
)
def test_it_is_attention_for_any_shape(B, H_kv, groups, Tq, past, D, dtype):
    agrees(*qkv(B, H_kv, groups, Tq, past, D, dtype))


@pytest.mark.parametrize(
    ("Tq", "past"), [(1, 0), (1, 200), (64, 0), (130, 0), (65, 127), (128, 128)]
)
def test_at_the_edges_of_its_blocks(Tq, past):
    agrees(*qkv(1, 1, 2, Tq, past, 16))


def test_large_scores_do_not_overflow():
    agrees(
        *qkv(1, 1, 1, 70, 5, 8, scale=30.0), far=1e3
    )  # scores of thousands are rounded at the fourth digit


def test_nothing_is_written_beside_the_result(monkeypatch):
    """The result lies in a larger tensor, whose other numbers stay."""
    q, k, v = qkv(1, 2, 1, 19, 3, 5)
    room = torch.full((q.numel() + 64,), 7.0, device=DEVICE)
    monkeypatch.setattr(torch, "empty_like", lambda t: room[32 : 32 + t.numel()].view(t.shape))
    result = triton_flash_attention(q, k, v)
    assert result.data_ptr() == room[32:].data_ptr()
    assert (room[:32] == 7).all() and (room[-32:] == 7).all()


def test_what_is_not_contiguous_is_taken():
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(2, 2, 2, 9, 2, 8))
    assert not q.is_contiguous()
    agrees(q, k, v)


def test_what_it_cannot_do_is_said_in_one_sentence():
    q, k, v = qkv(1, 2, 1, 5, 0, 4)
    with pytest.raises(RuntimeError, match="has no backward pass"):
        triton_flash_attention(q.requires_grad_(), k, v)
    q = q.detach()
    with pytest.raises(ValueError, match="knows the causal mask alone"):
        triton_flash_attention(q, k, v, torch.ones(5, 5, dtype=torch.bool, device=DEVICE))
    with pytest.raises(TypeError, match=r"q, k and v are torch.float16, torch.float32"):
        triton_flash_attention(q.half(), k, v)
    with pytest.raises(ValueError, match="which the 2 heads of k do not divide"):
        triton_flash_attention(q[:, :1], k, v)
