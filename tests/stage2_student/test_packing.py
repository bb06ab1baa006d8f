"""The pack plan holds every row of every document exactly once per epoch."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stage2_student.config import StudentConfig
from stage2_student.order import POOL_WINDOWS, WINDOW_DOCUMENTS
from stage2_student.packing import pack

# Tokens of MBPP's 374 training documents with the demo teacher's tokenizer, the special ones included.
MBPP_LENGTHS = np.fromstring("""
352 122 306 83 104 132 197 170 106 303 192 201 260 154 325 213 174 162 198 253 276 340 208 74 146 85 188 306 134 318
138 186 151 127 261 107 126 155 169 106 93 278 142 188 228 117 101 229 203 164 145 357 277 83 116 159 154 218 215
158 350 339 178 134 176 104 121 99 296 99 200 150 104 122 136 150 111 89 124 103 127 139 135 174 179 273 150 121 333
241 323 127 109 418 158 279 149 356 173 186 157 333 208 139 252 238 187 79 385 154 175 220 109 172 181 75 284 183
113 297 379 396 281 104 156 182 150 160 134 264 160 130 259 167 172 111 131 119 98 219 114 136 277 125 223 138 396
126 333 169 249 158 227 303 208 129 190 335 127 127 145 112 169 123 102 286 163 128 185 133 198 153 164 175 109 244
188 323 293 319 174 137 409 172 151 111 121 133 89 99 186 119 184 144 322 140 139 105 109 101 123 133 129 120 165
181 106 151 163 338 164 111 76 83 346 127 246 118 372 92 282 188 209 114 141 232 161 203 193 126 143 139 133 520 99
291 111 265 382 113 171 235 226 169 151 294 126 112 147 165 122 129 205 234 124 251 286 166 342 151 158 176 323 167
219 134 154 128 342 201 147 193 100 139 167 127 81 159 133 143 172 99 213 176 193 138 88 356 235 161 127 89 146 219
293 246 109 170 160 110 152 302 151 78 139 347 194 172 108 130 230 274 100 127 229 276 141 218 96 239 276 230 218 90
121 268 187 190 152 119 108 203 152 153 104 294 102 458 349 384 146 177 231 109 121 214 115 167 344 378 290 209 170
119 102 156 105 228 124 110 229 135 161 99 146 188 97 102 300 90 287 153 96 254
""", np.int64, sep=" ")  # fmt: skip

lengths = st.lists(st.integers(1, 90), max_size=400)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, block_size=st.integers(1, 64), seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
@example(lengths=[], block_size=8, seed=0, epoch=0)
@example(lengths=[1, 1], block_size=8, seed=0, epoch=0)
@example(lengths=[9, 17, 10], block_size=8, seed=0, epoch=0)
@example(lengths=[3] * (WINDOW_DOCUMENTS * POOL_WINDOWS + 1), block_size=8, seed=0, epoch=1)
def test_every_row_once_and_no_block_too_long(lengths, block_size, seed, epoch):
    lengths = np.array(lengths, np.int64)
    blocks = pack([lengths], block_size, seed=seed, epoch=epoch)
    seen = [np.zeros(max(n - 1, 0), np.int64) for n in lengths]
    for block in blocks:
        assert 0 < sum(piece.stop - piece.start for piece in block) <= block_size
        for piece in block:
            assert piece.start < piece.stop <= lengths[piece.doc] - 1
            seen[piece.doc][piece.start : piece.stop] += 1
    assert all((rows == 1).all() for rows in seen)
    assert blocks == pack([lengths.copy()], block_size, seed=seed, epoch=epoch)


def test_pieces_of_a_long_document_are_as_long_as_a_block():
    blocks = pack([np.array([26])], 10, seed=0, epoch=0)
    assert sorted(piece for block in blocks for piece in block) == [(0, 0, 10), (0, 10, 20), (0, 20, 25)]


def test_epochs_and_seeds_differ():
    lengths = np.random.default_rng(0).integers(2, 60, 300)
    plans = [pack([lengths], 64, seed=seed, epoch=epoch) for seed, epoch in itertools.product((0, 1), repeat=2)]
    assert all(a != b for a, b in itertools.combinations(plans, 2))
    assert [p.doc for block in plans[0] for p in block] != sorted(p.doc for block in plans[0] for p in block)


@pytest.mark.parametrize(("block_size", "number", "least"), [(512, 137, 135), (1024, 68, 68), (2048, 34, 34)])
def test_less_than_two_percent_is_wasted_on_mbpp(block_size, number, least):
    blocks = pack([MBPP_LENGTHS], block_size, seed=0, epoch=0)
    rows = int((MBPP_LENGTHS - 1).sum())
    assert (len(MBPP_LENGTHS), rows) == (374, 68_753)
    assert (len(blocks), -(-rows // block_size)) == (number, least)
    assert 1 - rows / (len(blocks) * block_size) < 0.02
    assert StudentConfig().block_size == 512


def test_reading_stays_near_in_the_cache():
    """A pool spans few windows: while it is emitted, few shards are needed."""
    number = WINDOW_DOCUMENTS * POOL_WINDOWS * 3
    blocks = pack([np.full(number, 33)], 64, seed=0, epoch=0)
    first_pool = {piece.doc // WINDOW_DOCUMENTS for block in blocks[: len(blocks) // 3] for piece in block}
    assert len(first_pool) == POOL_WINDOWS
