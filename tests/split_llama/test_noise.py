from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from split_llama.config import BlockRange
from split_llama.errors import UsageError
from split_llama.noise import (
    Accountant,
    Floats,
    NoiseChain,
    NoiseScope,
    NoiseSpec,
    PrefixNoise,
    apply,
    calibrate_clip,
    clip_rows,
    count_exact_rows,
)

SECRET = bytes(range(32))
SCOPE = NoiseScope(
    model="m" * 64, adapter="", blocks=BlockRange(1, 31), width=65, spec=NoiseSpec(0.02, 1.5), numerics="float32"
)
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=12)


def noise(**changes: object) -> PrefixNoise:
    return PrefixNoise(SECRET, replace(SCOPE, **changes))  # type: ignore[arg-type]


def chain_of(source: PrefixNoise, tokens: list[int]) -> NoiseChain:
    chain = NoiseChain(source)
    chain.append(tokens)
    return chain


def rows_of(source: PrefixNoise, tokens: list[int], first: int = 0) -> Floats:
    """The unit noise of positions `first`.. of a whole token sequence."""
    return source.unit_rows(chain_of(source, tokens).digests(first))


@pytest.mark.parametrize(
    ("text", "sigma"), [("0.02", 0.02), (" 0 ", 0), ("mean-abs=0.02", 0.02 * math.sqrt(math.pi / 2)), ("1e-3", 1e-3)]
)
def test_noise_is_read_as_deviation_or_mean_absolute_value(text: str, sigma: float) -> None:
    assert NoiseSpec.parse(text).sigma == pytest.approx(sigma)


@pytest.mark.parametrize("text", ["", "much", "-1", "nan", "inf", "mean-abs=", "mean-abs=-0.1", "sigma=0.1"])
def test_unusable_noise_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="noise"):
        NoiseSpec.parse(text)


def test_no_noise_means_no_clipping() -> None:
    assert NoiseSpec.parse("0").with_clip(1.0) == NoiseSpec(0)
    assert NoiseSpec.parse("0.1").with_clip(2.0) == NoiseSpec(0.1, 2.0)
    with pytest.raises(UsageError, match="switches clipping off"):
        NoiseSpec(0, 1.0)
    with pytest.raises(UsageError, match="clip norm"):
        NoiseSpec(0.1, 0)


def test_the_same_prefix_gives_the_same_noise_after_a_restart_and_another_token_does_not() -> None:
    rows = rows_of(noise(), [1, 5, 9, 7], 0)
    assert (rows_of(noise(), [1, 5, 9, 7], 2) == rows[2:]).all()
    other = rows_of(noise(), [1, 5, 9, 8], 0)
    assert (other[:3] == rows[:3]).all()
    assert not np.isclose(other[3], rows[3], atol=1e-6).any()
    earlier = rows_of(noise(), [2, 5, 9, 7], 0)
    assert not np.isclose(earlier, rows, atol=1e-6).any()


def test_the_noise_stays_the_same_from_version_to_version() -> None:
    expected = [-0.5245657, -0.0244993, -0.1584107, -0.7349317]
    assert rows_of(noise(), [1, 5, 9, 7], 3)[0, [0, 1, 63, 64]].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n" * 64},
        {"adapter": "a" * 64},
        {"blocks": BlockRange(1, 30)},
        {"blocks": BlockRange(2, 31)},
        {"spec": NoiseSpec(0.03, 1.5)},
        {"spec": NoiseSpec(0.02, 1.6)},
        {"spec": NoiseSpec(0.02)},
        {"numerics": "int8"},
    ],
)
def test_whatever_changes_the_states_or_the_setting_changes_the_noise(change: dict[str, object]) -> None:
    assert abs(np.corrcoef(rows_of(noise(**change), [1, 2], 1)[0], rows_of(noise(), [1, 2], 1)[0])[0, 1]) < 0.5
    assert not set(chain_of(noise(**change), [1, 2]).digests(0)) & set(chain_of(noise(), [1, 2]).digests(0))


def test_fields_of_the_scope_cannot_run_into_each_other() -> None:
    assert replace(SCOPE, model="a", adapter="b").encode() != replace(SCOPE, model="ab", adapter="").encode()


def test_the_secret_decides_and_must_have_its_length() -> None:
    other = PrefixNoise(bytes(32), SCOPE)
    assert not np.isclose(rows_of(other, [1], 0), rows_of(noise(), [1], 0), atol=1e-6).any()
    with pytest.raises(UsageError, match="32 bytes, 5 came"):
        PrefixNoise(b"short", SCOPE)


@given(tokens=TOKENS, more=TOKENS, data=st.data())
def test_a_chain_advances_and_forks_as_if_built_anew(tokens: list[int], more: list[int], data: st.DataObject) -> None:
    source = noise()
    at = data.draw(st.integers(0, len(tokens)))
    chain = chain_of(source, tokens)
    fork = chain.fork(at)
    fork.append(more)
    assert fork.digests(0) == chain_of(source, tokens[:at] + more).digests(0)
    assert chain.digests(0) == chain_of(source, tokens).digests(0)
    again = chain.fork(at)
    for token in more:
        again.append([token])
    assert (again.digests(0), again.tip) == (fork.digests(0), fork.tip)
    assert (again.unit_rows(again.digests(at)) == rows_of(source, tokens[:at] + more, at)).all()


def test_a_node_of_a_draft_tree_has_the_noise_of_its_path() -> None:
    source = noise()
    base = chain_of(source, [1, 2])
    digests = source.extend_tree(base.tip, [3, 4, 5, 6], [0b1, 0b11, 0b101, 0b1101])
    assert digests[1] == chain_of(source, [1, 2, 3, 4]).tip
    assert digests[3] == chain_of(source, [1, 2, 3, 5, 6]).tip


def test_the_noise_is_standard_normal_and_rows_are_independent() -> None:
    rows = rows_of(noise(width=4096), list(range(64)), 0).astype(np.float64)
    size = rows.size
    assert abs(rows.mean()) < 5 / math.sqrt(size)
    assert abs(rows.std() - 1) < 5 / math.sqrt(2 * size)
    assert abs((rows**3).mean()) < 5 * math.sqrt(15 / size)
    assert abs((rows**4).mean() - 3) < 5 * math.sqrt(96 / size)
    assert abs(np.abs(rows).mean() - math.sqrt(2 / math.pi)) < 5 / math.sqrt(size)
    correlation = np.corrcoef(rows) - np.eye(64)
    assert np.abs(correlation).max() < 6 / math.sqrt(4096)
    halves = np.corrcoef(rows[:, :2048].ravel(), rows[:, 2048:].ravel())[0, 1]
    assert abs(halves) < 5 / math.sqrt(size / 2)
    assert np.isfinite(rows).all()


def test_applying_adds_the_given_strength_to_clipped_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 65, generator=generator) * 0.02
    states[1] *= 1000
    unit = rows_of(noise(), [1, 2, 3], 0)
    out = apply(NoiseSpec(0.5, 1.5), states, unit)
    assert torch.allclose(out[[0, 2]], states[[0, 2]] + 0.5 * torch.from_numpy(unit)[[0, 2]])
    assert torch.allclose((out[1] - 0.5 * torch.from_numpy(unit)[1]).norm(), torch.tensor(1.5))


def test_a_constant_bos_row_stays_exact() -> None:
    states = torch.full((3, 65), 7.0)
    states[0, 3] = 1500
    out = apply(NoiseSpec(0.5, 1.5), states, rows_of(noise(), [1, 2, 3], 0), exact_rows=1)
    assert torch.equal(out[0], states[0])
    assert not torch.isclose(out[1:], states[1:]).any()


@pytest.mark.parametrize(
    ("tokens", "first", "bos", "expected"),
    [([1, 2], 0, 1, 1), ([2, 1], 0, 1, 0), ([1], 4, 1, 0), ([1], 0, None, 0), ([], 0, 1, 0)],
)
def test_only_bos_at_position_0_is_exact(tokens: list[int], first: int, bos: int | None, expected: int) -> None:
    assert count_exact_rows(tokens, first, bos) == expected


def test_noise_off_changes_nothing_but_the_dtype() -> None:
    states = torch.full((2, 65), 1000.0, dtype=torch.bfloat16)
    out = apply(NoiseSpec(0), states, rows_of(noise(), [1, 2], 0))
    assert out.dtype == torch.float32
    assert torch.equal(out, states.float())


def test_gradients_pass_and_clipping_scales_them() -> None:
    states = torch.tensor([[3.0, 4.0], [0.3, 0.4], [30.0, 40.0]], requires_grad=True)
    apply(NoiseSpec(0.1, 1.0), states, np.zeros((3, 2), np.float32), exact_rows=1)[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None
    # d(x / |x|)/dx of row 2 is (y^2, -xy) / |x|^3.
    assert torch.allclose(states.grad, torch.tensor([[1.0, 0.0], [1.0, 0.0], [1600 / 50**3, -1200 / 50**3]]))


@given(limit=st.floats(0.1, 100), scale=st.floats(0, 1e6))
def test_clipped_rows_keep_direction_and_limit(limit: float, scale: float) -> None:
    states = torch.tensor([[3.0, -4.0, 12.0]]) * scale
    clipped = clip_rows(states, limit)
    assert clipped.norm() <= limit * (1 + 1e-5)
    assert torch.allclose(clipped, states * min(1.0, limit / max(float(states.norm()), 1e-30)), rtol=1e-4)


def test_the_clip_norm_is_a_quantile_of_public_norms() -> None:
    assert calibrate_clip(range(1, 101), 0.5) == 51
    assert calibrate_clip([2.0], 0.99) == 2
    for norms in ([], [1, math.nan], [0.0, 1], [math.inf]):
        with pytest.raises(UsageError, match="norms"):
            calibrate_clip(norms)
    with pytest.raises(UsageError, match="quantile"):
        calibrate_clip([1.0], 0)


def test_the_accountant_counts_each_distinct_row_once() -> None:
    accountant = Accountant()
    chain = chain_of(noise(), [1, 2, 3])
    assert accountant.charge(chain.digests(1)) == 2  # position 0 is an exact BOS row
    assert accountant.charge(chain.digests(1)) == 0  # a replay
    fork = chain.fork(2)
    fork.append([4])
    assert accountant.charge(fork.digests(2)) == 1  # a rejected draft and what came instead are two rows
    assert accountant.charge(chain_of(noise(), [1, 2, 3]).digests(1)) == 0  # another session, the same prefix
    assert accountant.charge(chain_of(noise(blocks=BlockRange(2, 31)), [1, 2, 4]).digests(1)) == 2  # a new partition
    assert accountant.rows == 5
