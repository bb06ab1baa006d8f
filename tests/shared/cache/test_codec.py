"""The codecs' bound, for rows of every shape, and the stored figures against a float64 reference."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cache.codec import MAX_TAIL, NO_TAIL, decode_margins, decode_tail, encode_margins, encode_tail, tail_scale
from shared.cache.encode import encode_shard
from shared.cache.shard import decode_shard
from tests.support.cache_rows import GRID, shard_of_logits

BOUND_NATS = 1.7e-3


def phi(x):
    return np.expm1(x) - x


def margin_error(margins):
    """h(m) of the docstring: the largest rounding error of a margin."""
    return np.minimum(np.exp(margins / 5) / 47.04, 0.1)


def supremum_nats(K, T, scale):
    """λ of the docstring, by bisection over a fine grid of margins."""
    margins = np.linspace(0, 60, 60_001)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        gain = (K - 1) * np.max(np.exp(-margins / T) * (phi(margin_error(margins) / T) - middle))
        low, high = (middle, high) if gain > middle else (low, middle)
    return max(high, float(phi(1 / (2 * scale))))


@pytest.mark.parametrize("T", GRID)
def test_bound_of_the_docstring(T):
    for K in (1, 2, 64, 65, 256):
        assert supremum_nats(K, T, tail_scale(K)) <= BOUND_NATS


def test_the_bound_is_nearly_reached():
    """Margins on both sides of a rounding boundary at the proof's worst place: within 10 % of the supremum."""
    edge = -5 * math.log1p(-40.5 / 120)
    margins = np.concatenate([[0], np.full(125, edge - 1e-5), np.full(130, edge + 1e-5)]).astype(np.float32)
    _, codes, codebook = encode_margins(margins, np.array([256]), "q")
    decoded = codebook[codes]
    exact, found = (partition(values, -np.inf, 0.5)[:-1] for values in (margins, decoded))
    kl = float(np.sum(np.exp(exact) * (exact - found)))
    assert 0.9 * BOUND_NATS < kl <= supremum_nats(256, 0.5, tail_scale(256)) <= BOUND_NATS


@st.composite
def rows(draw):
    """Logits of one row `[V]` and its number of entries."""
    V = draw(st.integers(1, 300))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    kinds = ["flat", "one-hot", "plateaus", "ties", "normal", "wide", "huge", "escapes", "far", "masked"]
    kind = draw(st.sampled_from(kinds))
    logits = {
        "flat": lambda: np.zeros(V),
        "one-hot": lambda: np.where(np.arange(V) == rng.integers(V), 1e4, 0.0),
        "plateaus": lambda: rng.integers(0, 3, V) * draw(st.floats(0.01, 12)),
        "ties": lambda: np.round(rng.normal(0, 2, V)),
        "normal": lambda: rng.normal(0, draw(st.floats(0.01, 5)), V),
        "wide": lambda: rng.normal(0, 100, V),
        "huge": lambda: rng.normal(0, 1, V) * 10.0 ** rng.integers(-30, 30, V),
        "escapes": lambda: rng.integers(0, 4, V) * 60.0,
        "far": lambda: rng.uniform(-4000, 0, V),
        "masked": lambda: np.where((rng.random(V) < 0.5) & (np.arange(V) > 0), -np.inf, rng.normal(0, 3, V)),
    }[kind]()
    largest = min(int(np.isfinite(logits).sum()), 256)
    return logits.astype(np.float32), draw(st.sampled_from([1, largest]) | st.integers(1, largest))


def partition(margins, log_tail, T):
    """Log-probabilities of the K+1 cells in float64."""
    logits = np.append(-margins.astype(np.float64) / T, log_tail)
    top = logits.max()
    return logits - top - math.log(np.exp(logits - top).sum())


@settings(max_examples=150, deadline=None)
@given(row=rows(), codec=st.sampled_from(["q", "f16"]))
def test_kl_is_bounded_and_measured_right(row, codec):
    logits, k = row
    V = len(logits)
    arrays = shard_of_logits(np.stack([logits, logits]), [2], np.array([k, 0]), np.array([0, V // 2]))
    options = {"temperatures": GRID, "top_k": k, "head_width": V, "tokenizer_size": V}
    image, statistics = encode_shard(arrays, codec=codec, **options)
    shard = decode_shard(image, "test")
    scale = tail_scale(k)
    assert shard.margins[0] == 0
    for column, T in enumerate(GRID):
        decoded_tail = decode_tail(shard.tail[:, column], shard.last_margins, T, scale)[0]
        exact = partition(arrays.topk_margins, arrays.tail_log[0, column], T)
        decoded = partition(shard.margins, decoded_tail, T)
        p = np.exp(exact)
        alive = p > 0
        kl = float(np.sum(p[alive] * (exact[alive] - decoded[alive])))
        assert kl <= BOUND_NATS
        assert list(statistics["codec_kl_nats"][f"{T:g}"].values()) == pytest.approx([kl, kl], abs=1e-12)
        assert statistics["captured_mass"][f"{T:g}"]["mean"] == pytest.approx(float(p[:-1].sum()), abs=1e-12)

        errors = np.append((arrays.topk_margins.astype(np.float64) - shard.margins) / T, 0.0)
        if alive[-1]:
            errors[-1] = decoded_tail - arrays.tail_log[0, column]
            assert abs(errors[-1]) <= 0.5 / scale + 1e-9
        epsilon = np.abs(errors[alive]).max()
        assert kl <= 0.5 * math.exp(epsilon) * float(np.sum(p[alive] * errors[alive] ** 2)) + 1e-12

        targets = shard.targets(0, 2, T, column, k)
        np.testing.assert_allclose(targets.logp[0], decoded[:-1], rtol=3e-7, atol=3e-6)
        assert (shard.tail[0, column] == NO_TAIL) == (k == V) == (targets.log_tail[0] == -np.inf)
        if k < V:
            np.testing.assert_allclose(targets.log_tail[0], decoded[-1], rtol=3e-7, atol=3e-6)
            total = np.exp(targets.logp[0].astype(np.float64)).sum() + np.exp(np.float64(targets.log_tail[0]))
            assert total == pytest.approx(1, abs=1e-5)
        assert targets.k.tolist() == [k, 0]
        assert np.all(targets.logp[1] == -np.inf)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_margins_err_by_at_most_half_a_step_and_keep_their_order(data):
    lengths = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=12))
    finite = st.floats(0, 1e6, width=32)
    margins = []
    for length in lengths:
        rest = sorted(data.draw(st.lists(finite, min_size=max(length - 1, 0), max_size=max(length - 1, 0))))
        margins += ([0.0, *rest]) if length else []
    margins, k = np.array(margins, np.float32), np.array(lengths)
    arrays, codes, codebook = encode_margins(margins, k, "q")
    decoded = decode_margins(arrays, k, "q")
    assert np.array_equal(decoded, codebook[codes])
    clipped = np.minimum(margins.astype(np.float64), 1500)
    assert np.all(np.abs(decoded - clipped) <= margin_error(clipped) + 1e-4 * (clipped > 100) + 1e-6)
    starts = np.concatenate([[0], np.cumsum(k)[:-1]])[k > 0]
    assert np.all(decoded[starts] == 0)
    inside = np.ones(len(margins), bool)
    inside[starts] = False
    assert np.all(np.diff(decoded, prepend=np.float32(0))[inside] >= 0)
    assert np.array_equal(arrays["esc_pos"], np.flatnonzero(arrays["topk_codes"] == 255))
    assert np.all(arrays["esc_value"] >= 255)


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1500, width=32))
def test_codes_are_the_nearest_in_float64(margin):
    """Also where float32 would round u(m) to the wrong side."""
    arrays, *_ = encode_margins(np.array([0, margin], np.float32), np.array([2]), "q")
    code = int(arrays["esc_value"][0]) if len(arrays["esc_value"]) else int(arrays["topk_codes"][1])
    knee = 5 * math.log(4.8)
    companded = 120 * (1 - math.exp(-margin / 5)) if margin < knee else 95 + 5 * (margin - knee)
    assert abs(code - companded) <= 0.5 + 1e-9
    assert len(arrays["codebook"]) == code + 1


def test_the_documented_codes():
    """Codes and codebook by hand: 0 → 0, the knee 5 ln 4.8 → 95, five codes per nat above."""
    knee = 5 * math.log(4.8)
    margins = np.array([0, 0.02, 0.03, knee, knee + 10, 1500, 3e38], np.float32)
    arrays, codes, codebook = encode_margins(margins, np.array([7]), "q")
    decoded = codebook[codes]
    assert arrays["topk_codes"].tolist() == [0, 0, 1, 94, 50, 255, 0]
    assert arrays["esc_pos"].tolist() == [5]
    assert arrays["esc_value"].tolist() == [round(95 + 5 * (1500 - knee)) - 145]
    expected = [0, 0, -5 * math.log1p(-1 / 120), knee, knee + 10]
    np.testing.assert_allclose(decoded[:5], expected, rtol=1e-7)
    assert decoded[5] == decoded[6] == pytest.approx(1500, abs=0.1)


@pytest.mark.parametrize(("tail", "code"), [(-np.inf, -MAX_TAIL), (-5000.0, -MAX_TAIL), (-2.0, -32), (-0.03, 0)])
def test_tail_codes(tail, code):
    """Underflow is the smallest code, not the absence of a tail: −32768 says k = 0 or k = V alone."""
    k = np.array([3, 0, 9])
    codes = encode_tail(np.full((3, 1), tail), np.zeros(3, np.float32), k, [1.0], 16, 9)
    assert codes[:, 0].tolist() == [code, NO_TAIL, NO_TAIL]


def test_codes_are_those_of_float64():
    """Random margins, and floats on both sides of every border between two codes."""
    borders = np.arange(7_556) + 0.5
    with np.errstate(invalid="ignore", divide="ignore"):
        borders = np.where(borders < 95, -5 * np.log1p(-borders / 120), 5 * math.log(4.8) + (borders - 95) / 5)
    near = borders[borders < 1_500].astype(np.float32)
    near = np.concatenate([near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(2_000))])
    rng = np.random.default_rng(0)
    margins = np.concatenate([near, rng.exponential(9, 200_000), rng.uniform(0, 1_500, 200_000)]).astype(np.float32)
    margins = np.minimum(margins, np.float32(1_500))
    exact = margins.astype(np.float64)
    u = np.where(exact < 5 * math.log(4.8), -120 * np.expm1(-exact / 5), 95 + 5 * (exact - 5 * math.log(4.8)))
    arrays, codes, codebook = encode_margins(margins, np.ones(len(margins), np.int64), "q")
    assert np.array_equal(codebook[codes], arrays["codebook"][np.rint(u).astype(np.int64)])
