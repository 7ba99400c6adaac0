"""What the pooling kernels share: which tokens a tile holds, and masked loads."""

from __future__ import annotations

import triton
import triton.language as tl

# Never specialised: a new number of tokens compiles nothing.
LENGTHS = ["n_a", "n_b", "n_c", "tokens", "tiles", "items"]


@triton.jit
def tile_of(tile, n_a, n_b, n_c, BP: tl.constexpr, SOURCES: tl.constexpr):
    """Tiles never straddle sources. Returns: source, its tokens [BP], which of them exist, tokens before.

    Tokens are counted in 64 bits, as strides times tokens may pass 2^31.
    """
    source = tile * 0
    first = tile * BP
    count = n_a
    before = tile * 0
    if SOURCES > 1:
        tiles_a = tl.cdiv(n_a, BP)
        if tile >= tiles_a:
            source += 1
            first = (tile - tiles_a) * BP
            count = n_b
            before += n_a
    if SOURCES > 2:
        tiles_ab = tl.cdiv(n_a, BP) + tl.cdiv(n_b, BP)
        if tile >= tiles_ab:
            source += 1
            first = (tile - tiles_ab) * BP
            count = n_c
            before += n_b
    token = first.to(tl.int64) + tl.arange(0, BP)
    return source, token, token < count, before


@triton.jit
def pick(source, a, b, c, SOURCES: tl.constexpr):
    """The one of three pointers or numbers that belongs to `source`."""
    found = a
    if SOURCES > 1:  # noqa: SIM102 - decided at compile time, so that a missing source is never looked at
        if source == 1:
            found = b
    if SOURCES > 2:  # noqa: SIM102
        if source == 2:
            found = c
    return found


@triton.jit
def token_rows(
    source, item, token, a, b, c, batch_a, batch_b, batch_c, row_a, row_b, row_c, SOURCES: tl.constexpr
):  # fmt: skip
    """Pointers [BP, 1] to tokens of one source of one batch item."""
    base = pick(source, a, b, c, SOURCES) + item * pick(source, batch_a, batch_b, batch_c, SOURCES)
    return base + (token * pick(source, row_a, row_b, row_c, SOURCES))[:, None]


@triton.jit
def place_rows(positions, place, D: tl.constexpr):
    """Pointers [BP, 1] to the positions of tokens, None without positions."""
    rows = None
    if positions is not None:
        rows = positions + (place * D)[:, None]
    return rows


@triton.jit
def load_block(rows, columns, inside, D: tl.constexpr, BD: tl.constexpr):
    """[rows, BD] from row pointers [rows, 1]; zero outside. Columns need no mask where BD divides D."""
    mask = inside[:, None]
    if D % BD != 0:
        mask = mask & (columns < D)[None, :]
    return tl.load(rows + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_tokens(rows, places, columns, inside, D: tl.constexpr, BD: tl.constexpr):
    """Tokens with their positions added (`places` None: without), in the dtype of the tokens."""
    v = load_block(rows, columns, inside, D, BD)
    if places is not None:
        v = (v.to(tl.float32) if v.dtype.primitive_bitwidth == 16 else v) + load_block(places, columns, inside, D, BD)
        v = v.to(rows.dtype.element_ty)
    return v
