"""Kernels written by hand: a few statements of PTX on numpy arrays, and exact arithmetic to judge them by."""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from emulator.machine import Kernel, Module, Schedule, tensor_map

REGISTER = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}  # by bytes
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
LOGIC = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
FORMATS = {
    "bf16": (8, 127, 16),
    "f16": (11, 15, 16),
    "tf32": (11, 127, 32),
    "f32": (24, 127, 32),
    "f64": (53, 1023, 64),
}


@cache
def kernel(body: str, arrays: int, maps: int, directives: str = "", declarations: str = "") -> Kernel:
    parameters = [f".param .u64 pointer{k}" for k in range(arrays)]
    parameters += [f".param .align 64 .b8 map{k}[128]" for k in range(maps)]
    loads = [f"ld.param.b64 %a{k}, [pointer{k}];" for k in range(arrays)]
    return Kernel(
        Module(f"""
            .version 8.5
            .target sm_90a
            {declarations}
            .extern .shared .align 1024 .b8 shared[];
            .visible .entry kernel({", ".join(parameters)}) {directives} {{
            .reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<300>; .reg .b64 %d<32>; .reg .b64 %a<8>;
            .reg .b32 %t; .reg .b32 %i; .reg .b32 %w;
            {" ".join(loads)} mov.u32 %t, %tid.x; shr.u32 %w, %t, 5;
            mov.u32 %i, %ctaid.x; mov.u32 %r0, %ntid.x; mad.lo.u32 %i, %i, %r0, %t;
            {body}
            ret;
            }}"""),
        "kernel",
    )


def run(
    body: str,
    *arrays: np.ndarray,
    threads: int = 32,
    grid: Sequence[int] = (1, 1, 1),
    shared: int = 0,
    maps: Sequence[bytes] = (),
    directives: str = "",
    declarations: str = "",
    **schedule: Any,
) -> list[str]:
    """What the emulator has against `body`. %a0 and so on hold the arrays' addresses, which it may write; %t and %i the
    thread in its block and in the grid, %w the warp."""
    found = kernel(body, len(arrays), len(maps), directives, declarations)
    parameters = bytearray(sum(p.size for p in found.code.parameters) + 64)
    values = [struct.pack("Q", x.ctypes.data) for x in arrays] + list(maps)
    for p, value in zip(found.code.parameters, values, strict=True):
        parameters[p.offset : p.offset + p.size] = value
    tensors = [(x.ctypes.data, x.nbytes, f"array{k}") for k, x in enumerate(arrays)]
    return found.launch(grid, threads, bytes(parameters), tensors, shared=shared, schedule=Schedule(**schedule)).errors


def at(k: int, size: int, index: str = "%i", to: str = "%d31") -> str:
    """Statements that put the address of an element of array k into `to`."""
    return f"mad.wide.u32 {to}, {index}, {size}, %a{k}; "


def elementwise(statements: str, result: Any, *operands: np.ndarray) -> np.ndarray:
    """What the statements make of each element: "{d}" of "{a}", "{b}" and "{c}". An opcode alone is one statement."""
    if "{" not in statements:
        statements += " " + ", ".join(["{d}", "{a}", "{b}", "{c}"][: 1 + len(operands)]) + ";"
    count = operands[0].size
    padded = [np.resize(x, -(-count // 32) * 32) for x in operands]
    out = np.zeros(padded[0].size, result)
    names = {"d": f"{REGISTER[out.itemsize]}1"}
    body = ""
    for k, (name, x) in enumerate(zip("abc", padded, strict=False), 1):
        names[name] = f"{REGISTER[x.itemsize]}{k + 1}"
        body += at(k, x.itemsize) + f"ld.global.b{8 * x.itemsize} {names[name]}, [%d31]; "
    body += statements.format(**names) + at(0, out.itemsize) + f" st.global.b{8 * out.itemsize} [%d31], {names['d']};"
    assert run(body, out, *padded, grid=(out.size // 32, 1, 1)) == []
    return out[:count]


def aligned(shape: Any, kind: Any = np.float32) -> np.ndarray:
    """Zeros at a multiple of 128 bytes, as tensors on a device lie."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    store = np.zeros(size + 128, np.uint8)
    return store[-store.ctypes.data % 128 :][:size].view(kind).reshape(shape)


def integers(bits: int) -> np.ndarray:
    """Values at the edges of a width, and random ones."""
    edges = [0, 1, 2, 7, 31, 32, 2**bits - 1, 2**bits - 2, 2 ** (bits - 1), 2 ** (bits - 1) - 1, 2 ** (bits // 2)]
    random = np.random.default_rng(0).integers(0, 2**bits - 1, 8, np.uint64, endpoint=True)
    return np.array([*edges, *random.tolist()], UNSIGNED[bits // 8])


def map_of(array: np.ndarray, box: Sequence[int], swizzle: int) -> bytes:
    """Of a contiguous array; the box with the innermost dimension last."""
    return tensor_map(array.ctypes.data, array.shape, array.strides[:-1], box, array.itemsize, swizzle)


def numbers(raw: np.ndarray, kind: str) -> np.ndarray:
    """float64 of the bits of a format."""
    if kind == "bf16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view({"f16": np.float16, "f32": np.float32, "tf32": np.float32, "f64": np.float64}[kind]).astype(
        np.float64
    )


def raw(values: Any, kind: str) -> np.ndarray:
    """Bits of numbers that the format holds."""
    values = np.asarray(values, np.float64)
    if kind == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    floating = {"f16": np.float16, "f64": np.float64}.get(kind, np.float32)
    return values.astype(floating).view(UNSIGNED[FORMATS[kind][2] // 8])


def rounded(x: Fraction, kind: str, mode: str = "rn") -> float:
    precision, high, _ = FORMATS[kind]
    largest = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** high
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    unit = Fraction(2) ** (max(exponent, 1 - high) - precision + 1)
    whole, rest = divmod(size, unit)
    away = mode == ("rm" if x < 0 else "rp")
    nearest = 2 * rest > unit or (2 * rest == unit and (whole % 2 == 1 or mode == "rna"))
    size = (whole + (nearest if mode in ("rn", "rna") else away and rest > 0)) * unit
    if size > largest:
        size = float("inf") if mode in ("rn", "rna") or away else largest
    return float(np.copysign(float(size), -1 if x < 0 else 1))


def exact(f: Callable[..., Any], kind: str, *operands: np.ndarray) -> np.ndarray:
    """Bits of f, computed exactly and rounded once."""
    found = []
    for values in zip(*(numbers(x, kind) for x in operands), strict=True):
        with np.errstate(all="ignore"):
            signs = [
                v if v == 0 or not np.isfinite(v) else np.copysign(1, v) for v in values
            ]  # decide about infinities
            try:
                x = f(*map(Fraction, values)) if np.isfinite(values).all() else None
                found.append(f(*map(np.float64, signs)) if x is None else rounded(x, kind) if x else f(*values))
            except ZeroDivisionError:
                found.append(f(*map(np.float64, signs)))
    return raw(found, kind)


def floats(kind: str) -> np.ndarray:
    """Bits of edge cases and of random numbers."""
    precision, high, width = FORMATS[kind]
    one, infinity = high << (precision - 1), (2 * high + 1) << (precision - 1)
    edges = [
        0,
        1,
        (1 << (precision - 1)) - 1,
        1 << (precision - 1),
        one - 1,
        one,
        one + 1,
        infinity - 1,
        infinity,
        infinity + 1,
    ]
    random = np.random.default_rng(0)
    anything = random.integers(0, 2**width - 1, 24, np.uint64, endpoint=True).tolist()
    tame = [
        int(one + e * 2 ** (precision - 1) + m)
        for e, m in zip(random.integers(-4, 4, 24), random.integers(0, 99, 24), strict=True)
    ]
    return np.array([*edges, *(e | 1 << (width - 1) for e in edges), *anything, *tame], UNSIGNED[width // 8])


def pairs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each with each."""
    return np.repeat(values, values.size), np.tile(values, values.size)


def check(statements: str, expected: np.ndarray, *operands: np.ndarray, kind: str = "") -> None:
    """That `elementwise` gives these bits; for a kind of floating point, or any NaN where a NaN is expected."""
    found, kept = elementwise(statements, expected.dtype, *operands), np.ones(expected.size, bool)
    if kind:
        found, expected = (x.view(UNSIGNED[FORMATS[kind][2] // 8]) for x in (found, expected))
        kept = ~np.isnan(numbers(expected, kind))
        np.testing.assert_array_equal(~np.isnan(numbers(found, kind)), kept, statements)
    np.testing.assert_array_equal(found[kept], expected[kept], statements)
