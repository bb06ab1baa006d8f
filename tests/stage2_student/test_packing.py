"""A pool's documents in blocks: every row once, no block too long, as many blocks as the rows alone say."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stage2_student.packing import num_blocks, pack

# Tokens of MBPP's 374 training documents with the demo teacher's tokenizer, the special ones included.
MBPP_ROWS = np.fromstring("""
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
""", np.int64, sep=" ") - 1  # fmt: skip


def packed(rows, block_size, seed=0):
    return pack(np.array(rows, np.int64), block_size, np.random.default_rng(seed))


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(st.integers(0, 90), max_size=300), block_size=st.integers(1, 64), seed=st.integers(0, 2**32))
@example(rows=[], block_size=8, seed=0)
@example(rows=[0, 0], block_size=8, seed=0)
@example(rows=[8, 16, 9], block_size=8, seed=0)
@example(rows=[7] * 500, block_size=10, seed=0)
def test_every_row_once_and_no_block_too_long(rows, block_size, seed):
    segments = packed(rows, block_size, seed)
    seen = [np.zeros(n, np.int64) for n in rows]
    assert len(segments.borders) - 1 == num_blocks(np.int64(sum(rows)), block_size)
    for number in range(len(segments.borders) - 1):
        docs, starts, stops = segments.block(number)
        assert (stops - starts).sum() <= block_size and (stops > starts).all()
        for doc, start, stop in zip(docs, starts, stops, strict=True):
            seen[doc][start:stop] += 1
    assert all((part == 1).all() for part in seen)
    again = packed(rows, block_size, seed)
    assert all(np.array_equal(a, b) for a, b in zip(segments, again, strict=True))


def test_segments_of_a_long_document_are_as_long_as_a_block():
    segments = packed([25], 10)
    assert sorted(zip(segments.starts.tolist(), segments.stops.tolist(), strict=True)) == [(0, 10), (10, 20), (20, 25)]


def test_only_what_fits_nowhere_is_cut():
    """Two of 7 do not fit into 10 rows, and 7 blocks are to hold ten of them: three are cut, into the others' gaps."""
    segments = packed([7] * 10, 10)
    whole = [int(doc) for doc, a, b in zip(*segments[:3], strict=True) if b - a == 7]
    assert (len(segments.borders) - 1, len(whole)) == (7, 7)
    cut = sorted((int(b - a) for a, b in zip(segments.starts, segments.stops, strict=True) if b - a < 7))
    assert sum(cut) == 21 and max(cut) == 3


@pytest.mark.parametrize(
    ("block_size", "number", "least", "num_cuts"), [(512, 136, 135, 4), (1024, 68, 68, 0), (2048, 34, 34, 0)]
)
def test_one_in_a_hundred_blocks_is_spare_on_mbpp_and_hardly_a_document_is_cut(block_size, number, least, num_cuts):
    segments = packed(MBPP_ROWS, block_size)
    assert (len(MBPP_ROWS), int(MBPP_ROWS.sum())) == (374, 68_753)
    assert (len(segments.borders) - 1, -(-68_753 // block_size)) == (number, least)
    longer = int((block_size < MBPP_ROWS).sum())
    assert len(segments.docs) == 374 + longer + num_cuts
