"""What the summary kernels share: which tokens a tile holds, the activation, and masked loads."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Never specialised: a new number of tokens compiles nothing.
LENGTHS = ["n_a", "n_b", "n_c", "tokens", "tiles", "items"]


@triton.jit
def tile_of(tile, n_a, n_b, n_c, BP: tl.constexpr, SOURCES: tl.constexpr):
    """Tiles never straddle sources. Returns: source, first token inside it, its tokens, tokens before it."""
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
    return source, first, count, before


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
def load_tile(rows, columns, inside, D: tl.constexpr, BD: tl.constexpr):
    """[rows, BD] from row pointers [rows, 1]; zero outside. Columns need no mask where BD divides D."""
    if D % BD == 0:
        return tl.load(rows + columns[None, :], mask=inside[:, None], other=0.0)
    return tl.load(rows + columns[None, :], mask=inside[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def load_tokens(rows, places, columns, inside, D: tl.constexpr, BD: tl.constexpr):
    """Tokens with their positions added (`places` None: without), in the dtype of the tokens."""
    v = load_tile(rows, columns, inside, D, BD)
    if places is not None:
        v = (v.to(tl.float32) if v.dtype.primitive_bitwidth == 16 else v) + load_tile(places, columns, inside, D, BD)
        v = v.to(rows.dtype.element_ty)
    return v


@triton.jit
def load_w2(w2_a, w2_b, k, j, K: tl.constexpr, J: tl.constexpr, KA: tl.constexpr, JA: tl.constexpr):
    """Second layer at rows k and columns j (of any shape that broadcasts) of one summary, or of two side by side."""
    weights = tl.load(w2_a + (k * JA + j), mask=(k < KA) & (j < JA), other=0.0)
    if KA < K:
        mask = (k >= KA) & (k < K) & (j >= JA) & (j < J)
        weights += tl.load(w2_b + ((k - KA) * (J - JA) + (j - JA)), mask=mask, other=0.0)
    return weights


@triton.jit
def load_b2(b2_a, b2_b, k, K: tl.constexpr, KA: tl.constexpr):
    """Biases of the scores of one summary, or of two side by side."""
    bias = tl.load(b2_a + k, mask=k < KA, other=0.0)
    if KA < K:
        bias += tl.load(b2_b + (k - KA), mask=(k >= KA) & (k < K), other=0.0)
    return bias


@triton.jit
def sigmoid(x):
    """Without overflow on either side."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def gelu(h):
    """The tanh form: h sigmoid(2 u), u = sqrt(2 / pi) (h + 0.044715 h^3)."""
    return h * sigmoid(1.5957691216057308 * h * (1.0 + 0.044715 * h * h))


@triton.jit
def gelu_slope(h):
    """The derivative of `gelu`."""
    s = sigmoid(1.5957691216057308 * h * (1.0 + 0.044715 * h * h))
    return s + h * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * h * h)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in the dtype of acc."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
