from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from split_llama.errors import UsageError
from training.compute.ragged import SHARE_FROM, Ragged, RaggedAttention

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 24), min_size=1, max_size=6).map(tuple)


def reference(lengths: tuple[int, ...], window: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax written out, sequence by sequence."""
    out, start = [], 0
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    for length in lengths:
        rows = slice(start, start + length)
        scores = torch.einsum("qhk,shk->hqs", q[rows], k[rows]) / q.shape[2] ** 0.5
        behind = torch.arange(length)[:, None] - torch.arange(length)
        seen = (behind >= 0) & ((behind < window) if window else torch.tensor(True))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        out.append(torch.einsum("hqs,shk->qhk", weights, v[rows]))
        start += length
    return torch.cat(out)


def states(rows: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(True) for shape in shapes]


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, window=st.sampled_from([0, 1, 5, 16, 100]))
def test_attention_and_its_gradient_equal_a_softmax_written_out(lengths: tuple[int, ...], window: int) -> None:
    ragged = Ragged(lengths)
    qkv = states(ragged.rows)
    upstream = torch.randn(ragged.rows, 4, 8, dtype=torch.float64)
    found = RaggedAttention(ragged, [7, window], CPU)(1, *qkv)
    expected = reference(lengths, window, *qkv)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, qkv, upstream), torch.autograd.grad(expected, qkv, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("lengths", [(6, 6), (9, 6, 2)])
def test_a_sequence_of_nan_spoils_no_other(lengths: tuple[int, ...]) -> None:
    ragged = Ragged(lengths)
    qkv = states(ragged.rows)
    clean = RaggedAttention(ragged, [0], CPU)(0, *qkv)
    spoiled = [x.detach().clone() for x in qkv]
    for x in spoiled:
        x[: lengths[0]] = float("nan")
    found = RaggedAttention(ragged, [0], CPU)(0, *spoiled)
    assert torch.equal(found[lengths[0] :], clean[lengths[0] :])
    assert found[: lengths[0]].isnan().all()


@given(lengths=LENGTHS)
def test_padding_is_at_most_half(lengths: tuple[int, ...]) -> None:
    ragged = Ragged(lengths)
    together = ragged.alike()
    assert sorted(index for alike in together for index in alike) == list(range(len(lengths)))
    assert ragged.rows <= ragged.padded_rows <= ragged.rows / SHARE_FROM


def test_rows_starts_and_positions() -> None:
    ragged = Ragged((3, 1, 2))
    assert (ragged.rows, ragged.starts) == (6, (0, 3, 4))
    assert ragged.positions().tolist() == [0, 1, 2, 0, 0, 1]
    assert Ragged(()).positions().tolist() == []


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(UsageError, match=r"at least one token.*\(3, 0\)"):
        Ragged((3, 0))
