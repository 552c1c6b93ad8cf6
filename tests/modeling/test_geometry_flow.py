"""Pure functions: patches, positions, and the algebra of the straight path."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from modeling.flow import (
    CONDITIONING,
    clean_from_velocity,
    euler_times,
    gate,
    interpolate,
    logit_from_time,
    shift_time,
    time_from_logit,
    velocity,
)
from modeling.geometry import patchify, position_ids, unpatchify


def test_patchify_puts_every_element_where_the_rule_says():
    channels, h, w, p = 3, 2, 3, 2
    image = torch.arange(channels * h * p * w * p, dtype=torch.float32).reshape(channels, h * p, -1)
    tokens = patchify(image, p)
    assert tokens.shape == (h * w, p * p * channels)
    for c in range(channels):
        for y in range(h * p):
            for x in range(w * p):
                token, row, column = (y // p) * w + x // p, y % p, x % p
                assert tokens[token, (row * p + column) * channels + c] == image[c, y, x]


@pytest.mark.parametrize(("c", "h", "w", "p"), [(3, 2, 3, 14), (16, 5, 1, 2), (1, 1, 1, 1)])
def test_unpatchify_inverts_patchify(c, h, w, p):
    image = torch.randn(c, h * p, w * p)
    assert torch.equal(unpatchify(patchify(image, p), h, w, p), image)


def test_patchify_refuses_a_remainder():
    with pytest.raises(ValueError, match="29x28 is no multiple of the stride 14"):
        patchify(torch.zeros(3, 29, 28), 14)


def test_position_ids_count_rows_of_the_table():
    assert position_ids(2, 3, side=10).tolist() == [0, 1, 2, 10, 11, 12]
    with pytest.raises(ValueError, match="grid of 11x2 patches does not fit .* side 10"):
        position_ids(11, 2, side=10)


@pytest.mark.parametrize("side", [8, 10, 64, 70])
def test_interpolated_positions_are_buckets_of_exact_fractions(side):
    edges = [Fraction(i, side) for i in range(1, side)]
    for n in (1, 2, 3, 7, side - 1, side, side + 1, 3 * side):
        rows = [sum(edge <= Fraction(i, n) for edge in edges) for i in range(n)]
        assert position_ids(n, 1, side, interpolate=True).tolist() == [r * side for r in rows]
        assert position_ids(1, n, side, interpolate=True).tolist() == rows


@pytest.mark.parametrize("n", [3, 5, 8, 13])
def test_interpolated_positions_agree_with_bucketize_off_the_edges(n):
    side = 8
    edges = torch.arange(1, side, dtype=torch.float64) / side
    fractions = torch.arange(n, dtype=torch.float64) / n
    buckets = torch.bucketize(fractions, edges, right=True)
    expected = (buckets[:, None] * side + buckets).flatten()
    assert torch.equal(position_ids(n, n, side, interpolate=True), expected)


def test_velocity_leads_back_to_the_clean_latent():
    z0, noise, t = torch.randn(5, 7).double(), torch.randn(5, 7).double(), torch.rand(5, 1).double()
    z_t, v = interpolate(z0, noise, t), velocity(z0, noise)
    torch.testing.assert_close(clean_from_velocity(z_t, v, t), z0, rtol=0, atol=1e-15)
    clean = clean_from_velocity(z_t, v, t)
    torch.testing.assert_close((z_t - clean) / t, v, rtol=1e-12, atol=1e-12)
    assert torch.equal(interpolate(z0, noise, torch.zeros(1).double()), z0)
    assert torch.equal(interpolate(z0, noise, torch.ones(1).double()), noise)


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0, 4.0])
def test_shift(shift):
    assert (shift_time(0.0, shift), shift_time(1.0, shift)) == (0.0, 1.0)
    assert shift_time(0.5, shift) == pytest.approx(shift / (1 + shift))
    for t in (0.001, 0.3, 0.9):
        logit = math.log(t / (1 - t))
        assert (shift_time(t, shift) - t) * (shift - 1) >= 0
        assert time_from_logit(logit, shift) == pytest.approx(shift_time(t, shift), rel=1e-12)
        assert logit_from_time(shift_time(t, shift), shift) == pytest.approx(logit, rel=1e-9)
        assert time_from_logit(logit_from_time(t, shift), shift) == pytest.approx(t, rel=1e-12)


def test_times_at_the_ends():
    assert time_from_logit(CONDITIONING, 3.0) == 0.0
    assert time_from_logit(math.inf, 3.0) == 1.0
    assert logit_from_time(1.0, 3.0) == math.inf
    assert time_from_logit(0.0, 1.0) == 0.5
    assert 0 <= time_from_logit(-710.0, 1.0) < 1e-300
    assert time_from_logit(-30.0, 1.0) == pytest.approx(math.exp(-30), rel=1e-9)


def test_gate_is_a_ramp():
    ts = (0.0, 0.075, 0.15, 0.3, 0.31, 1.0)
    assert [gate(t, 0.3) for t in ts] == pytest.approx([1.0, 0.75, 0.5, 0.0, 0.0, 0.0])


def test_euler_times_fall_from_one_to_zero_and_are_shifted():
    times = euler_times(9, 3.0)
    assert times[0] == 1.0 and times[-1] == 0.0 and len(times) == 9
    assert all(a > b for a, b in pairwise(times))
    assert times[4] == pytest.approx(3 * 0.5 / 2)


def test_one_time_is_no_step():
    with pytest.raises(ValueError, match="num_timesteps=1"):
        euler_times(1, 1.0)
