"""Margins and tails as a shard stores them: codec `q` (companded u8 differences) and codec `f16` (the reference).

A row's K margins m_i = z_1 − z_i and its tail ρ_T are the K+1 cells of a partition. At temperature T the decoded
weights are exp(−m̂_i/T) and exp(ρ̂_T − m̂_K/T), divided by their sum.

**Codec `q`.** u(m) = 120 (1 − e^{−m/5}) below the knee 5 ln 4.8, and 95 + 5 (m − 5 ln 4.8) above; the code is
c = rint(u(m)) and m̂ = u⁻¹(c). u is increasing, its slope 1/step(m) with step(m) = min(e^{m/5}/24, 0.2).

**Bound.** Let δ be the error of a cell's logit at T, so that the decoded distribution is q ∝ p e^δ. Then

    KL(p‖q) = log E_p[e^δ] − E_p[δ] ≤ E_p[e^δ − 1 − δ] ≤ ½ e^ε E_p[δ²],    ε = max |δ|,

by log x ≤ x − 1 and by Taylor's remainder. It holds for both codecs. For `q`:

- Rounding moves u by at most ½, and the slope of u never rises, so |m̂ − m| ≤ ½ step(max(m, m̂)). Below the knee,
  u(m̂) ≤ u(m) + ½ gives e^{−m̂/5} ≥ e^{−m/5} − 1/240, so step(m̂) ≤ step(m)/(1 − 4.8/240), hence
  |m̂ − m| ≤ h(m) = min(e^{m/5}/47.04, 0.1), and |δ_i| ≤ h(m_i)/T. The first entry's margin is 0, exactly.
- The tail is coded relative to the decoded m̂_K, so that its logit errs by rounding alone: |δ_τ| ≤ 1/(2s).
- With φ(x) = e^x − 1 − x, KL ≤ λ = sup (Σ_i w_i φ(h(m_i)/T) + w_τ φ(1/(2s))) / (1 + Σ_i w_i + w_τ), w_i = e^{−m_i/T},
  i = 2…K. At the supremum each term w (φ − λ) is at its largest, which is at the same m for all i, and w_τ is 0 or
  unbounded: λ solves (K−1) max_m e^{−m/T} (φ(h(m)/T) − λ) = λ, or is φ(1/(2s)) if that is larger. For K ≤ 256 and T in
  {0.5, 1, 1.5, 2} the solution is at most 1.7e-3 (`tests/shared/cache/test_codec.py` solves it), for any input at all.
- Margins stored as 1,500 and tails clipped at ±32,767 have weights below e^{−750}: no figure of float64 changes.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from shared.cache.format import MAX_MARGIN, Array, indptr

KNEE = 5 * math.log(4.8)
ESCAPE = 255
CELLS, CELLS_PER_NAT = 1 << 16, 1 << 10  # of the table of codes: margins below 64
BLOCK_ROWS = 4_096
BLOCK_ENTRIES = 1 << 15  # stay in a processor's cache
NO_TAIL = -32_768
MAX_TAIL = 32_767
HALF_FLOATS = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def tail_scale(top_k: int) -> int:
    """Steps per nat of the stored tail, from the build's requested top-k."""
    return 24 if top_k > 64 else 16


def encode_margins(margins: Array, k: Array, codec: str) -> tuple[dict[str, Array], Array, Array]:
    """Encode a shard's margins.

    Args:
        margins: f32 `[E]`, finite, 0 first and ascending within each row.
        k: i64 `[S]`, entries of each row.
        codec: `q` or `f16`.

    Returns:
        The codec's data sets; the codes `[E]` and the codebook f32 that a reader will decode from them.
    """
    if codec == "f16":
        half = np.minimum(margins, np.float32(MAX_MARGIN)).astype(np.float16)
        return {"topk_margins": half}, half.view(np.uint16), HALF_FLOATS
    codes = _codes(margins)
    codebook = _codebook(int(codes.max(initial=-1)) + 1)
    differences = np.zeros_like(codes)
    np.subtract(codes[1:], codes[:-1], out=differences[1:])
    differences[_row_starts(k)] = 0
    escaped = np.flatnonzero(differences >= ESCAPE)
    escapes = differences[escaped].astype(np.uint32)
    arrays = {
        "codebook": codebook,
        "topk_codes": np.minimum(differences, ESCAPE, out=differences).astype(np.uint8),
        "esc_pos": escaped,
        "esc_value": escapes,
    }
    return arrays, codes, codebook


def decode_margins(arrays: Mapping[str, Array], k: Array, codec: str) -> Array:
    """Decode a shard's margins: f32 `[E]`, z_1 − z_i. Inverse of `encode_margins`."""
    codes, codebook = decode_codes(arrays, k, codec)
    margins: Array = codebook[codes]
    return margins


def decode_codes(arrays: Mapping[str, Array], k: Array, codec: str) -> tuple[Array, Array]:
    """A shard's margins as codes `[E]`, in the narrowest unsigned type that holds them, and their codebook f32.

    A half float is its own code, in a codebook of all 65,536.
    """
    if codec == "f16":
        return arrays["topk_margins"].view(np.uint16), HALF_FLOATS
    codebook, kind = arrays["codebook"], np.min_scalar_type(max(len(arrays["codebook"]) - 1, 0))
    codes = arrays["topk_codes"].astype(kind)
    codes[arrays["esc_pos"]] = arrays["esc_value"]
    rows = k[k > 0]
    if len(rows) and np.all(rows == rows[0]):
        # A fixed k: column by column, in blocks that stay in cache, which beats one long running sum.
        codes_NK = codes.reshape(len(rows), rows[0])
        for start in range(0, len(rows), BLOCK_ROWS):
            block = codes_NK[start : start + BLOCK_ROWS]
            for column in range(1, rows[0]):
                block[:, column] += block[:, column - 1]
    else:
        # One running sum over all rows may wrap around; taking each row's first sum off undoes that.
        np.cumsum(codes, dtype=kind, out=codes)
        codes -= np.repeat(codes[_row_starts(k)], rows)
    return codes, codebook


def margin_bound(margins: Array, codec: str) -> Array:
    """How far a decoded margin may be from the exact one, from the larger of the two: half of the step there."""
    if codec == "f16":
        bound: Array = np.abs(margins) * 2**-11 + 2**-25
    else:
        bound = 0.5 * np.minimum(np.exp(margins / 5) / 24, 0.2)
    return bound


def encode_tail(
    tail_log: Array, last_margins: Array, k: Array, temperatures: Sequence[float], scale: int, V: int
) -> Array:
    """Encode tails relative to the row's last decoded margin.

    Args:
        tail_log: f64 `[S, T]`, log Σ_{j∉K} exp((z_j − z_1)/T), −inf where it underflows or nothing is left.
        last_margins: f32 `[S]`, decoded m̂_K; any value in empty rows.
        k: i64 `[S]`; temperatures: the grid; scale: steps per nat; V: tokenizer size.

    Returns:
        i16 `[S, T]`, −32768 where k = 0 or k = V and nowhere else.
    """
    relative = tail_log + last_margins.astype(np.float64)[:, None] / np.asarray(temperatures)
    codes: Array = np.clip(np.rint(scale * relative), -MAX_TAIL, MAX_TAIL)
    codes[(k == 0) | (k == V)] = NO_TAIL
    return codes.astype(np.int16)


def decode_tail(codes: Array, last_margins: Array, temperature: float | Array, scale: int) -> Array:
    """Decode one temperature's tails i16 `[S]`: f64 `[S]`, log weight relative to the first entry, −inf where none.

    With margins `[S, 1]` and a grid `[T]`, those of the whole grid, `[S, T]`.
    """
    log_weights = codes / scale - last_margins.astype(np.float64) / temperature
    return np.where(codes == NO_TAIL, -np.inf, log_weights)


def last_margins(codes: Array, codebook: Array, k: Array) -> Array:
    """Each row's last decoded margin, 0 in empty rows: f32 `[S]` from codes `[E]`."""
    last = np.zeros(len(k), np.float32)
    rows = np.flatnonzero(k)
    last[rows] = codebook[codes[indptr(k)[rows + 1] - 1]]
    return last


def _codes(margins: Array) -> Array:
    """The code of each margin, i16, as float64 gives it: from a table, but where a cell of that holds two."""
    codes, table = np.empty(len(margins), np.int16), _code_table()
    for start in range(0, len(margins), BLOCK_ENTRIES):
        block, block_codes = (array[start : start + BLOCK_ENTRIES] for array in (margins, codes))
        cells = (np.minimum(block, np.float32(CELLS / CELLS_PER_NAT)) * np.float32(CELLS_PER_NAT)).astype(np.intp)
        table.take(cells, out=block_codes, mode="clip")
        undecided = np.flatnonzero(block_codes < 0)
        block_codes[undecided] = _exact_codes(np.minimum(block[undecided].astype(np.float64), MAX_MARGIN))
    return codes


@functools.cache
def _code_table() -> Array:
    """The code of all margins in the i-th cell of 1/1024 nat, −1 where it has two, and for all beyond the cells."""
    codes = _exact_codes(np.arange(CELLS + 1) / CELLS_PER_NAT)
    return np.append(np.where(codes[1:] == codes[:-1], codes[1:], -1), -1).astype(np.int16)


def _exact_codes(margins: Array) -> Array:
    codes: Array = np.rint(np.where(margins < KNEE, -120 * np.expm1(-margins / 5), 95 + 5 * (margins - KNEE)))
    return codes


def _codebook(size: int) -> Array:
    codes = np.arange(size, dtype=np.float64)
    low = -5 * np.log1p(-np.minimum(codes, 95) / 120)
    return np.where(codes < 95, low, KNEE + (codes - 95) / 5).astype(np.float32)


def _row_starts(k: Array) -> Array:
    starts: Array = indptr(k)[:-1][k > 0]
    return starts
