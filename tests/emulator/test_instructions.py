"""Instructions of one lane, in kernels written by hand, against Python's integers, exact fractions and numpy."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from emulator.handwritten import (
    FORMATS,
    LOGIC,
    UNSIGNED,
    check,
    elementwise,
    exact,
    floats,
    integers,
    numbers,
    pairs,
    raw,
    rounded,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about infinities and NaN
LATE = pytest.mark.parametrize("late", [False, True])
ARITHMETIC = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
INTEGERS = ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"]


def fma(a: Any, b: Any, c: Any) -> Any:
    return a * b + c


def signed(value: int, bits: int) -> int:
    return (int(value) + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def limits(kind: str) -> tuple[int, int]:
    bits = int(kind[1:])
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind[0] == "s" else (0, 2**bits - 1)


def check_integers(name: str, kind: str, f: Callable[..., int], *operands: np.ndarray, bits: int = 0) -> None:
    """f: of Python's integers; its result is cut to `bits`, by default those of `kind`."""
    width = bits or int(kind[1:])
    values = [[signed(v, 8 * x.itemsize) if kind[0] == "s" else int(v) for v in x] for x in operands]
    expected = [f(*v) % 2**width for v in zip(*values, strict=True)]
    check(f"{name}.{kind}", np.array(expected, UNSIGNED[width // 8]), *operands)


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_arithmetic(kind):
    bits = int(kind[1:])
    a, b = pairs(integers(bits))
    c, nonzero = b[::-1], np.where(b == 0, 3, b).astype(b.dtype)
    for name, f in {**ARITHMETIC, "mul.hi": lambda a, b: a * b >> bits, "min": min, "max": max}.items():
        check_integers(name.replace("mul", "mul.lo") if name == "mul" else name, kind, f, a, b)
    check_integers("div", kind, quotient, a, nonzero)
    check_integers("rem", kind, lambda a, b: a - quotient(a, b) * b, a, nonzero)
    check_integers("mad.lo", kind, fma, a, b, c)
    check_integers("shr", kind, lambda a, n: a >> (n % 2**32), a, b.astype(np.uint32) % 80)
    if kind[0] == "s":
        check_integers("neg", kind, operator.neg, a)
        check_integers("abs", kind, abs, a)
    if bits < 64:
        wide = np.resize(integers(2 * bits), a.size)
        check_integers("mul.wide", kind, operator.mul, a, b, bits=2 * bits)
        check_integers("mad.wide", kind, fma, a, b, wide, bits=2 * bits)
        check_integers("mad.hi", kind, lambda a, b, c: (a * b >> bits) + c, a, b, c)
    if kind == "s32":
        check_integers("min.relu", kind, lambda a, b: max(min(a, b), 0), a, b)
        check_integers("max.relu", kind, lambda a, b: max(a, b, 0), a, b)
    if bits > 16:
        position = np.resize(np.array([0, 1, 31, 40, 63, 200, 261], np.uint32), a.size)
        length = np.resize(np.arange(0, 71, 5, dtype=np.uint32), a.size)

        def field(a: int, p: int, n: int) -> int:
            p, n = p % 256, n % 256
            sign = a >> min(p + n - 1, bits - 1) & 1 if n and kind[0] == "s" else 0
            return sum((a % 2**bits >> p + k & 1 if k < n and p + k < bits else sign) << k for k in range(bits))

        check_integers("bfe", kind, field, a, position, length)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_bits(kind):
    bits = int(kind[1:])
    a, b = pairs(integers(bits))
    for name, f in LOGIC.items():
        check_integers(name, kind, f, a, b)
    check_integers("not", kind, operator.invert, a)
    check_integers("shl", kind, lambda a, n: a << n, a, b.astype(np.uint32) % 80)
    check_integers("shr", kind, lambda a, n: a >> n, a, b.astype(np.uint32) % 80)


def least(a: float, b: float) -> float:
    return b if a != a else a if b != b or (a, math.copysign(1, a)) < (b, math.copysign(1, b)) else b


def most(a: float, b: float) -> float:
    return -least(-a, -b)


@pytest.mark.parametrize("name", ["f32", "f64", "f16", "bf16", "f16x2", "bf16x2"])
def test_float_arithmetic(name):
    kind, full = name.removesuffix("x2"), name in ("f32", "f64")
    a, b = pairs(floats(kind))
    c = np.random.default_rng(1).permutation(b)
    x, y = numbers(a, kind), numbers(b, kind)
    rn, wide = ".rn" if full else "", np.uint32 if name.endswith("x2") else a.dtype

    def check_floats(opcode: str, expected: np.ndarray, *operands: np.ndarray) -> None:
        check(f"{opcode}.{name}", expected.view(wide), *(v.view(wide) for v in operands), kind=kind)

    for op, f in ARITHMETIC.items():
        check_floats(op + rn, exact(f, kind, a, b), a, b)
    check_floats("fma.rn", exact(fma, kind, a, b, c), a, b, c)
    check_floats("neg", raw(-x, kind), a)
    check_floats("abs", raw(abs(x), kind), a)
    for op, f in {"min": least, "max": most}.items():
        found = np.array([f(*v) for v in zip(x, y, strict=True)])
        check_floats(op, raw(found, kind), a, b)
        if full:
            check_floats(op + ".NaN", raw(np.where(np.isnan(x) | np.isnan(y), np.nan, found), kind), a, b)
    if full:
        check_floats("div.rn", exact(operator.truediv, kind, a, b), a, b)
        check_floats("sqrt.rn", np.sqrt(a.view(f"f{a.itemsize}")).view(a.dtype), a)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_fma_rounds_once(kind):
    """3 (1 + one unit) is a tie, and what is added says to which side: in float32 or in float64 it is lost."""
    added = [s * 2.0**e for e in (-24, -60, -120) for s in (-1, 1) if e >= -24 or kind != "f16"]
    a, b, c = (raw(v, kind) for v in ([3.0] * len(added), [1 + 2.0 ** (1 - FORMATS[kind][0])] * len(added), added))
    check(f"fma.rn.{kind}", exact(fma, kind, a, b, c), a, b, c, kind=kind)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(x & 0x7F800000, x, x & 0x80000000).astype(np.uint32)


def test_flush_to_zero():
    a, b = pairs(floats("f32"))
    c = np.random.default_rng(1).permutation(b)
    x, y, z = flushed(a), flushed(b), flushed(c)
    for op, f in {**ARITHMETIC, "div.rn": operator.truediv}.items():
        check(f"{op}.ftz.f32", flushed(exact(f, "f32", x, y)), a, b, kind="f32")
    check("fma.rn.ftz.f32", flushed(exact(fma, "f32", x, y, z)), a, b, c, kind="f32")
    check("abs.ftz.f32", x & 0x7FFFFFFF, a, kind="f32")
    check("neg.ftz.f32", x ^ 0x80000000, a, kind="f32")
    for op in ("min", "max"):
        check(f"{op}.ftz.f32", elementwise(f"{op}.f32", np.uint32, x, y), a, b, kind="f32")


@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_approximations(ftz):
    flush = flushed if ftz else np.array
    x = np.concatenate([floats("f32"), np.random.default_rng(0).normal(0, 20, 100).astype(np.float32).view(np.uint32)])
    functions = {
        "ex2": np.exp2,
        "lg2": np.log2,
        "rcp": np.reciprocal,
        "sqrt": np.sqrt,
        "rsqrt": lambda x: 1 / np.sqrt(x),
    }
    for op, f in functions.items():
        expected = flush(raw(f(numbers(flush(x), "f32")), "f32"))
        found = elementwise(f"{op}.approx{ftz}.f32", np.uint32, x)
        np.testing.assert_allclose(numbers(found, "f32"), numbers(expected, "f32"), rtol=2e-6, err_msg=op)


def check_convert(modifiers: str, to: str, source: str, x: np.ndarray, expected: list[Any]) -> None:
    """Where an integer is narrower than its register, the register holds it extended."""
    if to in FORMATS:
        return check(f"cvt{modifiers}.{to}.{source}", raw(expected, to), x, kind=to)
    bits = max(int(to[1:]), 16)
    return check(f"cvt{modifiers}.{to}.{source}", np.array([v % 2**bits for v in expected], UNSIGNED[bits // 8]), x)


def rounded_all(values: list[Any], kind: str, mode: str = "rn") -> list[float]:
    return [rounded(Fraction(v), kind, mode) if v and math.isfinite(v) else v for v in values]


@pytest.mark.parametrize("source", INTEGERS)
def test_convert_integers(source):
    bits = int(source[1:])
    beside_ties = [2**k + 2 ** (k - p) + e for k in range(bits) for p in (8, 11, 24, 53) if p <= k for e in (-1, 0, 1)]
    x = np.concatenate([integers(bits), np.array([1, *beside_ties], UNSIGNED[bits // 8])])
    values = [signed(v, bits) if source[0] == "s" else int(v) for v in x]
    for to in INTEGERS:
        low, high = limits(to)
        check_convert("", to, source, x, [(v - low) % (high - low + 1) + low for v in values])
        check_convert(".sat", to, source, x, [min(max(v, low), high) for v in values])
    for to, mode in itertools.product(("f16", "bf16", "f32", "f64"), ("rn", "rz", "rm", "rp")):
        check_convert("." + mode, to, source, x, rounded_all(values, to, mode))


@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "f64"])
def test_convert_floats(source):
    sides = itertools.product((8, 11, 24), (-1, 0, 1), (22, 50))
    special = [1 + 2.0**-p + e * 2.0**-q for p, e, q in sides] + [0.5, 1.5, 2.5, 127.5, 255.5, 32767.5, 65535.0, 7e4]
    x = np.concatenate([floats(source), raw(rounded_all([s * v for s in (1, -1) for v in special], source), source)])
    values = numbers(x, source).tolist()
    for to, mode in itertools.product(("f16", "bf16", "f32"), ("rn", "rz", "rm", "rp")):
        if FORMATS[source][0] <= FORMATS[to][0] or source in ("f16", "bf16"):
            continue
        expected = rounded_all(values, to, mode)
        check_convert("." + mode, to, source, x, expected)
        if mode in ("rn", "rz") and source == "f32":
            check_convert(f".{mode}.relu", to, source, x, [v if v > 0 or v != v else 0.0 for v in expected])
            packed = raw(np.stack([expected[::-1], expected], 1), to).view(np.uint32)[
                :, 0
            ]  # the upper half comes first
            check(f"cvt.{mode}.{to}x2.f32", packed, x, x[::-1], kind=to)
    for to in ("f32", "f64"):
        if FORMATS[to][2] > FORMATS[source][2]:
            check_convert("", to, source, x, values)
    if source in ("f32", "f64"):
        unit = rounded_all([min(v, 1.0) if v > 0 else 0.0 for v in values], "f32")
        check_convert(".rn.sat" if source == "f64" else ".sat", "f32", source, x, unit)
    for mode, f in {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}.items():
        whole = [math.copysign(f(v), v) if math.isfinite(v) else v for v in values]
        check_convert("." + mode, source, source, x, whole)
        for to in INTEGERS:
            low, high = limits(to)
            nan = (low or (high + 1) // 2) if source == "f64" or to in ("s64", "u64") else 0
            check_convert(
                "." + mode,
                to,
                source,
                x,
                [
                    nan if v != v else int(min(max(v, low), high)) if math.isfinite(v) else low if v < 0 else high
                    for v in whole
                ],
            )


def test_convert_ftz_and_tf32():
    x = floats("f32")
    for to, modifiers in {"f32": ".rpi", "f64": "", "s32": ".rpi"}.items():
        out = np.uint64 if to == "f64" else np.uint32
        expected = elementwise(f"cvt{modifiers}.{to}.f32", out, flushed(x))
        check(f"cvt{modifiers}.ftz.{to}.f32", expected, x, kind=to if to in FORMATS else "")
    check("cvt.rna.tf32.f32", raw(rounded_all(numbers(x, "f32").tolist(), "tf32", "rna"), "f32"), x, kind="f32")


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64", "b32", "f16", "bf16", "f32", "f64"])
def test_setp(kind):
    is_float = kind in FORMATS
    a, b = pairs(floats(kind)[:24] if is_float else integers(int(kind[1:])))
    x, y = (numbers(v, kind) if is_float else v.view(f"{'i' if kind[0] == 's' else 'u'}{v.itemsize}") for v in (a, b))
    nan = (x != x) | (y != y)
    expected = {name: f(x, y) & ~nan for name, f in COMPARISONS.items()}
    if is_float:
        expected |= {name + "u": f(x, y) | nan for name, f in COMPARISONS.items()} | {"num": ~nan, "nan": nan}
    elif kind[0] == "u":
        expected |= {"lo": x < y, "ls": x <= y, "hi": x > y, "hs": x >= y}
    elif kind[0] == "b":
        expected = {name: expected[name] for name in ("eq", "ne")}
    select = "%p1, {a}, {b}; selp.u32 {d}, 5, 9, %p1;"
    for name, truth in expected.items():
        check(f"setp.{name}.{kind} {select}", np.where(truth, 5, 9).astype(np.uint32), a, b)
    if kind == "f32":
        truth = numbers(flushed(a), kind) < numbers(flushed(b), kind)
        check(f"setp.lt.ftz.f32 {select}", np.where(truth, 5, 9).astype(np.uint32), a, b)


@pytest.mark.parametrize("combine", ["and", "or", "xor"])
@pytest.mark.parametrize("sign", ["", "!"])
def test_predicates(combine, sign):
    a, b = pairs(integers(32))
    third, f = a % 3 == 0, LOGIC[combine]
    c = ~third if sign else third
    p = f(a < b, c)
    expected = p + 2 * f(a >= b, c) + 4 * ~third + 8 * ~f(p, third)
    statements = f"""rem.u32 %r9, {{a}}, 3; setp.eq.u32 %p3, %r9, 0;
        setp.lt.{combine}.u32 %p1|%p2, {{a}}, {{b}}, {sign}%p3;
        selp.u32 {{d}}, 1, 0, %p1; @%p2 add.u32 {{d}}, {{d}}, 2; @!%p3 add.u32 {{d}}, {{d}}, 4;
        {combine}.pred %p4, %p1, %p3; not.pred %p4, %p4; mov.pred %p5, %p4; @%p5 add.u32 {{d}}, {{d}}, 8;"""
    check(statements, expected.astype(np.uint32), a, b)
