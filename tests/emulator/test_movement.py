"""Instructions that move data, between lanes, through memory and to tensor cores, in kernels written by hand."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from emulator.handwritten import LOGIC, aligned, at, integers, map_of, raw, run

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about infinities and NaN
LATE = pytest.mark.parametrize("late", [False, True])


def test_loads_and_stores():
    """Vectors, signed parts of words, local memory of each lane, generic addresses of every space, packing."""
    data = np.random.default_rng(0).integers(0, 2**32 - 1, 32 * 4, np.uint32)
    out, small = np.zeros((32, 4), np.uint32), np.zeros((32, 4), np.int32)
    body = f"""{at(0, 16)} {at(1, 16, to="%d30")} {at(2, 16, to="%d29")}
        .local .align 16 .b8 here[16]; mov.u64 %d1, here; cvta.local.u64 %d2, %d1; mad.lo.u32 %r9, %t, 8, shared;
        cvt.u64.u32 %d3, %r9; cvta.shared.u64 %d4, %d3; cvta.to.shared.u64 %d5, %d4;
        ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d30]; ld.global.v2.b64 {{%d6, %d7}}, [%d30];
        st.local.v2.b32 [%d1+8], {{%r1, %r2}}; ld.b64 %d8, [%d2+8]; mov.b64 {{%r5, %r6}}, %d8;
        st.b64 [%d4], %d7; ld.shared.v2.b32 {{%r7, _}}, [%d5]; ld.shared.b32 %r8, [%r9+4];
        st.global.v2.b32 [%d31], {{%r6, %r5}}; mov.b64 %d9, {{%r8, %r7}}; st.b64 [%d31+8], %d9;
        ld.global.s8 %r1, [%d30+3]; ld.global.u8 %r2, [%d30+3];
        ld.global.s16 %r3, [%d30+6]; ld.global.u16 %r4, [%d30+6];
        st.global.v4.b32 [%d29], {{%r1, %r2, %r3, %r4}};"""
    assert run(body, out, data, small, shared=256) == []
    assert_array_equal(out, data.reshape(32, 4)[:, [1, 0, 3, 2]])
    rows = data.view(np.uint8).reshape(32, 16)
    signed_byte, signed_half = rows.view(np.int8)[:, 3], rows.view(np.int16)[:, 3]
    assert_array_equal(small.T, [signed_byte, rows[:, 3], signed_half, rows.view(np.uint16)[:, 3]])


def test_divergence():
    """Lanes leave a loop after 0 to 31 turns, some return on the way, and the rest meet again."""
    out = np.full(32, -1, np.int32)
    body = f"""{at(0, 4)} mov.u32 %r1, 0; and.b32 %r2, %t, 7; setp.eq.u32 %p1, %r2, 5;
        loop: setp.ge.u32 %p2, %r1, %t; @%p2 bra done; add.u32 %r1, %r1, 1; setp.eq.u32 %p3, %r1, 9;
        and.pred %p3, %p3, %p1; @%p3 ret; bra loop;
        done: setp.gt.u32 %p4, %t, 15; @!%p4 bra low; mul.lo.u32 %r1, %r1, 10; bra.uni end;
        low: {{ .reg .b32 %r1x; mov.u32 %r1x, 100; add.u32 %r1, %r1, %r1x; }} bra.uni end;
        end: st.global.b32 [%d31], %r1;"""
    assert run(body, out) == []
    lane = np.arange(32)
    expected = np.where(lane > 15, lane * 10, lane + 100)
    assert_array_equal(out, np.where((lane % 8 == 5) & (lane >= 9), -1, expected))


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode):
    for amount, width in itertools.product((0, 1, 3, 8, 17, 31), (32, 16, 8, 4)):
        clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
        out = np.zeros((32, 2), np.int32)
        body = f"""{at(0, 8)} add.u32 %r2, %t, 100; shfl.sync.{mode}.b32 %r1|%p1, %r2, {amount}, {clamp}, -1;
            selp.u32 %r3, 1, 0, %p1; st.global.v2.b32 [%d31], {{%r1, %r3}};"""
        assert run(body, out) == []
        for lane in range(32):
            first = lane // width * width
            sources = {"up": lane - amount, "down": lane + amount, "bfly": lane ^ amount, "idx": first + amount % width}
            source = sources[mode]
            inside = source >= first if mode == "up" else source < first + width
            assert out[lane].tolist() == [100 + (source if inside else lane), inside]


def test_redux_and_elect():
    """Of the lanes 3 to 31 that are not divisible by 4."""
    out = np.zeros((32, 16), np.uint32)
    lanes = [k for k in range(3, 32) if k % 4]
    mask = sum(1 << k for k in lanes)
    values = np.random.default_rng(0).integers(0, 2**32 - 1, 32, np.uint32)
    operations = ["add.s32", "min.s32", "max.s32", "min.u32", "max.u32", "and.b32", "or.b32", "xor.b32"]
    results = [f"redux.sync.{op} %r{k}, %r20, {mask};" for k, op in enumerate(operations, 1)]
    body = f"""{at(0, 64)} {at(1, 4, to="%d30")} ld.global.b32 %r20, [%d30]; and.b32 %r21, %t, 3;
        setp.eq.u32 %p1, %r21, 0; @%p1 bra end; setp.lt.u32 %p1, %t, 3; @%p1 bra end;
        {" ".join(results)} elect.sync %r9|%p4, {mask}; selp.u32 %r10, 1, 0, %p4; bar.warp.sync {mask};
        {" ".join(f"st.global.b32 [%d31+{4 * k}], %r{k + 1};" for k in range(10))} end:"""
    assert run(body, out, values) == []
    taken = values[lanes]
    as_signed = taken.view(np.int32)
    sums = [int(as_signed.sum()), as_signed.min(), as_signed.max(), taken.min(), taken.max()]
    sums += [f.reduce(taken) for f in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)]
    expected = [*(int(v) % 2**32 for v in sums), 3]
    for lane in range(32):
        assert out[lane, :10].tolist() == ([*expected, lane == 3] if lane in lanes else [0] * 10)


def test_special_registers():
    names = (
        "tid.x tid.y ctaid.x ctaid.y ctaid.z ntid.x nctaid.x nctaid.y nctaid.z laneid warpid lanemask_lt lanemask_eq"
    )
    names = names.split()
    out = np.zeros((24, 64, len(names)), np.uint32)
    body = """mov.u32 %r1, %ctaid.z; mad.lo.u32 %r1, %r1, 3, %ctaid.y; mad.lo.u32 %r1, %r1, 2, %ctaid.x;
        mad.lo.u32 %r1, %r1, 64, %t;""" + at(0, 4 * len(names), "%r1")
    body += "".join(f"mov.u32 %r2, %{n}; st.global.b32 [%d31+{4 * k}], %r2;" for k, n in enumerate(names))
    assert run(body, out, threads=64, grid=(2, 3, 4), seed=3) == []
    for block, t in itertools.product(range(24), (0, 31, 32, 63)):
        at_block = [block % 2, block // 2 % 3, block // 6]
        assert out[block, t].tolist() == [t, 0, *at_block, 64, 2, 3, 4, t % 32, t // 32, (1 << t % 32) - 1, 1 << t % 32]


ATOMICS: dict[str, tuple[Callable[..., Any], str]] = {"add": (operator.add, "s32 u32 s64 u64 f32 f64")}
ATOMICS |= {"min": (min, "s32 u32 s64 u64"), "max": (max, "s32 u32 s64 u64"), "exch": (lambda a, b: b, "b32 b64")}
ATOMICS |= {op: (f, "b32 b64") for op, f in LOGIC.items()}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("op", "kind"), [(op, kind) for op, (_, kinds) in ATOMICS.items() for kind in kinds.split()])
def test_atomics(op, kind, space):
    """Lanes take their turns in order: each sees the results of those before."""
    bits = int(kind[1:])
    r, view = "%r" if bits == 32 else "%d", f"{ {'s': 'i', 'f': 'f'}.get(kind[0], 'u') }{bits // 8}"
    values = np.resize(integers(bits), 32).view(view)
    if kind[0] == "f":
        values = np.random.default_rng(0).normal(size=32).astype(view)
    old, cell, seen = np.zeros_like(values), values[-1:].copy(), [values[-1]]
    for v in values:
        seen.append(np.array(ATOMICS[op][0](seen[-1], v), view)[()])
    body = f"""{at(0, bits // 8)} {at(1, bits // 8, to="%d30")} ld.global.b{bits} {r}1, [%d30];
        mov.b64 %d20, {"shared" if space == "shared" else "%a2"}; setp.eq.u32 %p1, %t, 0;
        @%p1 ld.global.b{bits} {r}3, [%a2]; @%p1 st.{space}.b{bits} [%d20], {r}3;
        atom.{space}.{op}.{kind} {r}2, [%d20], {r}1; st.global.b{bits} [%d31], {r}2;
        @%p1 red.{space}.or.b{bits} [%d20], 1; @%p1 ld.{space}.b{bits} {r}3, [%d20];
        @%p1 st.global.b{bits} [%a2], {r}3;"""
    assert run(body, old, values, cell, shared=8) == []
    assert_array_equal(old, seen[:-1])
    assert cell.view(f"u{bits // 8}")[0] == seen[-1].view(f"u{bits // 8}") | 1


def test_compare_and_swap():
    cell, old = np.array([7], np.uint32), np.zeros(32, np.uint32)
    body = f"""{at(0, 4)} add.u32 %r1, %t, 7; add.u32 %r2, %t, 8;
        atom.global.acq_rel.gpu.cas.b32 %r3, [%a1], %r1, %r2; st.global.b32 [%d31], %r3;"""
    assert run(body, old, cell) == []
    assert_array_equal(old, np.arange(7, 39))
    assert cell[0] == 39


@pytest.mark.parametrize(("count", "trans"), [(n, t) for n in (1, 2, 4) for t in ("", ".trans")])
def test_ldmatrix_stmatrix(count, trans):
    """Row r of matrix m lies where lane 8 m + r says; lane l holds the pair at row l / 4, columns 2 (l % 4)."""
    source, out, stored = (np.zeros((count, 8, 8), np.uint16) for _ in range(3))
    source[:] = np.random.default_rng(0).integers(0, 2**16 - 1, source.shape)
    held = np.zeros((32, count, 2), np.uint16)
    registers, row = ", ".join(f"%r{k + 20}" for k in range(count)), "{%r4, %r5, %r6, %r7}"
    body = f"""mov.u32 %r1, shared; and.b32 %r2, %t, {8 * count - 1}; mad.lo.u32 %r3, %r2, 48, %r1; {at(0, 16, "%r2")}
        ld.global.v4.b32 {row}, [%d31]; st.shared.v4.b32 [%r3], {row}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r3]; {at(1, 4 * count)}
        {" ".join(f"st.global.b32 [%d31+{4 * k}], %r{k + 20};" for k in range(count))} bar.warp.sync -1;
        stmatrix.sync.aligned.m8n8.x{count}.shared.b16 [%r3+2048], {{{registers}}}; bar.warp.sync -1;
        ld.shared.v4.b32 {row}, [%r3+2048]; {at(2, 16, "%r2")} st.global.v4.b32 [%d31], {row};
        bar.warp.sync -1; stmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 [%r3], {{{registers}}}; bar.warp.sync -1;
        ld.shared.v4.b32 {row}, [%r3]; {at(3, 16, "%r2")} st.global.v4.b32 [%d31], {row};"""
    assert run(body, source, held, out, stored, shared=4096) == []
    loaded = source.transpose(0, 2, 1) if trans else source
    assert_array_equal(held, loaded.reshape(count, 32, 2).transpose(1, 0, 2))
    assert_array_equal(out, loaded)
    assert_array_equal(stored, loaded.transpose(0, 2, 1))


def operands(kind: str, *shapes: tuple[int, int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Whole numbers, whose sums are exact, as bits and as numbers; what tf32 has below its last bit is ignored."""
    values = [np.random.default_rng(k).integers(-8, 9, shape).astype(np.float64) for k, shape in enumerate(shapes)]
    return [raw(v, kind) | (0x1ABC if kind == "tf32" else 0) for v in values], values


def a_fragment(a: np.ndarray, of: int) -> np.ndarray:
    """A [16, K] as PTX deals it to lanes: [32, registers] of 32 bits. of: elements in a register."""
    lane, registers = np.arange(32), range(a.shape[1] // of // 2)
    held = [a[lane // 4 + r % 2 * 8, r // 2 * 4 * of + lane % 4 * of + e] for r in registers for e in range(of)]
    return np.ascontiguousarray(np.stack(held, 1)).view(np.uint32)


def load(array: int, first: int, count: int) -> tuple[str, str]:
    """Statements that load a lane's registers, and their names."""
    names = [f"%r{first + r}" for r in range(count)]
    statements = at(array, 4 * count) + "".join(f"ld.global.b32 {n}, [%d31+{4 * r}]; " for r, n in enumerate(names))
    return statements, "{" + ", ".join(names) + "}"


@pytest.mark.parametrize(("kind", "k"), [("bf16", 8), ("bf16", 16), ("f16", 8), ("f16", 16), ("tf32", 4), ("tf32", 8)])
def test_mma(kind, k):
    (a, b), (x, y) = operands(kind, (16, k), (k, 8))
    lane, of = np.arange(32), 1 if kind == "tf32" else 2
    c = np.random.default_rng(3).integers(-99, 99, (16, 8)).astype(np.float32)
    left = a_fragment(a, of)
    right = np.stack([b[r * 4 * of + lane % 4 * of + e, lane // 4] for r in range(k // of // 4) for e in range(of)], 1)
    right = np.ascontiguousarray(right).view(np.uint32)
    rows, columns = lane[:, None] // 4 + np.array([0, 0, 8, 8]), lane[:, None] % 4 * 2 + np.array([0, 1, 0, 1])
    sums, out = np.ascontiguousarray(c[rows, columns]), np.zeros((32, 4), np.float32)

    loads = [load(1, 10, left.shape[1]), load(2, 20, right.shape[1]), load(3, 30, 4)]
    body = f"""{" ".join(statements for statements, _ in loads)}
        mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32
        {{%r40, %r41, %r42, %r43}}, {", ".join(n for _, n in loads)};
        {at(0, 16)} st.global.v4.b32 [%d31], {{%r40, %r41, %r42, %r43}};"""
    assert run(body, out, left, right, sums) == []
    assert_array_equal(out, (x @ y + c)[rows, columns])


SWIZZLES = {"none": (0, 16, 0), "128": (1, 128, 7), "64": (2, 64, 3), "32": (3, 32, 1)}  # code, bytes a row, mask


def swizzled(offset: np.ndarray, mask: int) -> np.ndarray:
    """Units of 16 bytes change places by the number of their 128 bytes."""
    return offset ^ (offset >> 7 & mask) << 4


def in_shared(x: np.ndarray, swizzle: str, along_k: bool) -> tuple[np.ndarray, int]:
    """An operand [MN, K] in its canonical layout (PTX ISA, "Strides"), and its descriptor without the address.

    along_k: K-major. The cores of 8 rows by 16 bytes, or whole swizzled atoms of 8 rows, are apart by the two strides.
    """
    code, width, mask = SWIZZLES[swizzle]
    size, unit, across = x.itemsize, 16 // x.itemsize, width // x.itemsize
    mn, k = np.indices(x.shape)
    if along_k:
        leading, stride = (x.shape[0] * 16, 128) if swizzle == "none" else (16, 8 * width)
        across_k = k // unit * leading + k % unit * size if swizzle == "none" else k * size
        offset = mn // 8 * stride + mn % 8 * width + across_k
    else:
        near = 8 * width  # an atom of 8 k by `width` bytes along MN; atoms follow each other along k, then along MN
        far = x.shape[1] // 8 * near
        offset = mn // across * far + k // 8 * near + k % 8 * width + mn % across * size
        leading, stride = (near, far) if swizzle == "none" else (far, near)
    out = np.zeros(offset.max() // size + 1, x.dtype)
    out[swizzled(offset, mask) // size] = x
    return out, leading >> 4 << 16 | stride >> 4 << 32 | code << 62


WGMMA = [
    *itertools.product(("bf16", "tf32"), (8, 64, 256), SWIZZLES, (False,), (True,), (True,)),
    *itertools.product(("f16",), (64,), SWIZZLES, (False,), (True, False), (True, False)),
    *itertools.product(("bf16", "f16"), (64, 192), SWIZZLES, (True,), (True,), (True, False)),
    ("f16", 40, "none", False, False, False),
    ("tf32", 32, "128", True, True, True),
]


@LATE
@pytest.mark.parametrize(("kind", "n", "swizzle", "in_registers", "a_along_k", "b_along_k"), WGMMA)
def test_wgmma(kind, n, swizzle, in_registers, a_along_k, b_along_k, late):
    """D = -A B for the first part of K, then D += A B: the descriptors move along K inside and between atoms."""
    size = 4 if kind == "tf32" else 2
    step, width = 32 // size, SWIZZLES[swizzle][1]
    k = 2 * step if swizzle == "none" else width // size
    (a, b), (x, y) = operands(kind, (64, k), (n, k))
    layouts = [in_shared(a, swizzle, a_along_k), in_shared(b, swizzle, b_along_k)]
    begin = [0, 1024 * -(-layouts[0][0].nbytes // 1024)]
    store = np.zeros((begin[1] + layouts[1][0].nbytes) // 4 + 1, np.uint32)
    for first, (layout, _) in zip(begin, layouts, strict=True):
        store.view(np.uint8)[first : first + layout.nbytes] = layout.view(np.uint8)
    tiles = a.reshape(4, 16, k // step, step).transpose(2, 0, 1, 3).reshape(-1, 16, step)
    fragments = np.concatenate([a_fragment(tile, 4 // size) for tile in tiles])
    wait_all, (_, d) = "wgmma.wait_group.sync.aligned 0;", load(0, 1, n // 2)
    majors = (
        [] if kind == "tf32" else [int(not b_along_k)] if in_registers else [int(not a_along_k), int(not b_along_k)]
    )
    products = ""
    for s in range(0, k, step):
        for name, rows, along_k, first, (_, descriptor) in zip(
            ("%d1", "%d2"), (64, n), (a_along_k, b_along_k), begin, layouts, strict=True
        ):
            moved = s * width if not along_k else s * size * (rows if swizzle == "none" else 1)
            products += f"mov.b64 {name}, {descriptor | (first + moved) >> 4};"
        if in_registers:
            products += f"{wait_all} {load(2, 251, 4)[0].replace('%i', '%r250')} add.u32 %r250, %r250, 128;"
        words = ", ".join(
            map(str, [d, load(2, 251, 4)[1] if in_registers else "%d1", "%d2", "%p1", 1 if s else -1, 1, *majors])
        )
        products += f"""setp.ne.b32 %p1, {s}, 0; wgmma.fence.sync.aligned;
            wgmma.mma_async.sync.aligned.m64n{n}k{step}.f32.{kind}.{kind} {words}; wgmma.commit_group.sync.aligned;"""
    out = np.zeros((128, n // 2), np.float32)
    body = f"""mov.u32 %r250, %t; mov.u32 %r200, %t;
        fill: setp.ge.u32 %p2, %r200, {store.size}; @%p2 bra filled; {at(1, 4, "%r200")} ld.global.b32 %r201, [%d31];
        mad.lo.u32 %r202, %r200, 4, shared; st.shared.b32 [%r202], %r201; add.u32 %r200, %r200, 128; bra fill;
        filled: fence.proxy.async.shared::cta; bar.sync 0; {products} {wait_all}
        {at(0, 2 * n)} {" ".join(f"st.global.b32 [%d31+{4 * r}], %r{r + 1};" for r in range(n // 2))}"""
    assert run(body, out, store, fragments, threads=128, shared=store.nbytes, late=late) == []
    thread, r = np.arange(128)[:, None], np.arange(n // 2)
    row, column = thread // 32 * 16 + thread % 32 // 4 + 8 * (r // 2 % 2), r // 4 * 8 + thread % 4 * 2 + r % 2
    expected = x[:, step:] @ y[:, step:].T - x[:, :step] @ y[:, :step].T
    assert_array_equal(out, expected[row, column])


@LATE
@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async(size, late):
    """Three groups, of which the first is waited for alone; some lanes take fewer bytes, or none: the rest is zero."""
    data, out = aligned((3, 32, 16), np.uint8), np.zeros((3, 32, size), np.uint8)
    data[:] = np.random.default_rng(0).integers(0, 256, data.shape)
    data[:, :, size:] = 0
    taken = np.arange(32) % (size + 1)
    how, words = (
        "cg" if size == 16 else "ca",
        {4: ("", "%r3"), 8: (".v2", "{%r3, %r4}"), 16: (".v4", "{%r3, %r4, %r5, %r6}")},
    )
    vector, registers = words[size]
    copy = [f"cp.async.{how}.shared.global [%r1+{1024 * g}], [%d30+{512 * g}], {size}" for g in range(3)]
    read = [f"ld.shared{vector}.b32 {registers}, [%r1+{1024 * g}];" for g in range(3)]
    read = [f"{read[g]} st.global{vector}.b32 [%d31+{32 * size * g}], {registers};" for g in range(3)]
    body = f"""mad.lo.u32 %r1, %t, {size}, shared; rem.u32 %r2, %t, {size + 1}; {at(1, 16, to="%d30")} {at(0, size)}
        {copy[0]}, %r2; cp.async.commit_group; {copy[1]}; cp.async.commit_group; {copy[2]}, %r2;
        cp.async.commit_group; cp.async.wait_group 2; {read[0]} cp.async.wait_group 1; {read[1]}
        cp.async.wait_all; {read[2]}"""
    assert run(body, out, data, shared=4096, late=late) == []
    for g in range(3):
        for lane in range(32):
            n = size if g == 1 else taken[lane]
            assert out[g, lane].tolist() == [*data[g, lane, :n], *[0] * (size - n)]


INIT = "setp.eq.u32 %p1, %t, 0; mov.u32 %r1, shared; @%p1 mbarrier.init.shared::cta.b64 [%r1], {}; bar.sync 0;"


def wait(phase: str, name: str, address: str = "[%r1]") -> str:
    return f"{name}: mbarrier.try_wait.parity.shared::cta.b64 %p9, {address}, {phase}; @!%p9 bra {name};"


def boxes(array: np.ndarray, box: tuple[int, ...], corner: tuple[int, ...]) -> np.ndarray:
    """What lies there, and zeros beyond the edges."""
    padded = np.pad(array, [(b, b) for b in box])
    return padded[tuple(slice(c + b, c + 2 * b) for c, b in zip(corner, box, strict=True))]


def bulk(corner: tuple[int, ...], tensor: str) -> str:
    """A copy to %r2, for which the mbarrier at %r1 waits; coordinates go from the innermost outwards."""
    opcode = f"cp.async.bulk.tensor.{len(corner)}d.shared::cluster.global.mbarrier::complete_tx::bytes"
    return f"{opcode} [%r2], [{tensor}, {{{', '.join(map(str, corner[::-1]))}}}], [%r1];"


TAKE = "ld.shared.b32 %r3, [%r4+1024]; st.global.b32 [%d31], %r3;"
TMA = [
    ((20, 64), (16, 32), (0, 0), np.uint16),
    ((20, 64), (16, 32), (8, -8), np.uint16),
    ((20, 72), (8, 16), (-3, 64), np.float32),
    ((5, 6, 32), (2, 4, 8), (-1, 4, 28), np.uint16),
    ((3, 4, 5, 16), (2, 2, 4, 16), (2, -1, 3, -4), np.uint16),
    ((5, 6, 32), (2, 4, 32), (4, 5, 1), np.uint8),
]  # shape, box, corner, type


def fits(box: tuple[int, ...], kind: Any, swizzle: str) -> bool:
    return swizzle == "none" or box[-1] * np.dtype(kind).itemsize <= SWIZZLES[swizzle][1]


@LATE
@pytest.mark.parametrize(
    ("shape", "box", "corner", "kind", "swizzle"),
    [(*case, swizzle) for case in TMA for swizzle in SWIZZLES if fits(case[1], case[3], swizzle)],
)
def test_bulk_copy(shape, box, corner, kind, swizzle, late):
    data = aligned(shape, kind)
    data[:] = np.random.default_rng(0).integers(1, 200, shape)
    code = {"none": 0, "32": 1, "64": 2, "128": 3}[swizzle]
    expected = boxes(data, box, corner).astype(kind)
    offset = swizzled(np.arange(expected.size) * data.itemsize, SWIZZLES[swizzle][2])
    count = expected.nbytes // 4
    out = np.zeros(count, np.uint32)
    body = f"""{INIT.format(1)} mov.b64 %d1, map0; cvta.param.u64 %d2, %d1; add.u32 %r2, %r1, 1024;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {expected.nbytes}; @%p1 {bulk(corner, "%d2")}
        {wait("0", "full")} {at(0, 4)} mad.lo.u32 %r4, %t, 4, %r1; {TAKE}"""
    assert run(body, out, data, threads=count, shared=1024 + 4096, maps=[map_of(data, box, code)], late=late) == []
    found = out.view(kind)[offset // data.itemsize]
    assert_array_equal(found, expected.ravel())


def replaced(rows: int, columns: int) -> str:
    """Statements that write a map of array 1, [rows, columns] of 16 bits with boxes of 8 by 32, to array 2."""
    fields = {"global_address": "%a1", "rank": "1", "global_stride": f"0, {2 * columns}", "elemtype": "6"}
    lines = [*fields.items(), ("box_dim", "0, 32"), ("box_dim", "1, 8"), ("swizzle_mode", "2"), ("fill_mode", "0")]
    lines += [("global_dim", f"0, {columns}"), ("global_dim", f"1, {rows}"), ("interleave_layout", "0")]
    lines += [("element_stride", "0, 1"), ("element_stride", "1, 1")]
    kind = {"global_address": "b64", "global_stride": "b64"}
    writes = [f"tensormap.replace.tile.{n}.shared::cta.b1024.{kind.get(n, 'b32')} [%r7], {v};" for n, v in lines]
    publish = (
        "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%a2], [%r7], 0x80;"
    )
    return f"""mad.lo.u32 %r5, %t, 4, shared; setp.lt.u32 %p2, %t, 32; mov.u32 %r6, 0; add.u32 %r7, %r1, 512;
        @%p2 st.shared.b32 [%r5+512], %r6; bar.sync 0; @%p1 {" @%p1 ".join(writes)} bar.sync 0;
        @%p2 {publish} bar.sync 0;"""


ACQUIRE = "fence.proxy.tensormap::generic.acquire.gpu [%a2], 0x80;"


def use_of_replaced(acquire: str) -> str:
    return f"""{INIT.format(1)} {replaced(20, 64)} {acquire} add.u32 %r2, %r1, 1024;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 512; @%p1 {bulk((16, 40), "%a2")} {wait("0", "full")}
    {at(0, 4)} mad.lo.u32 %r4, %t, 4, %r1; {TAKE}"""


@LATE
def test_tensormap_replace(late):
    data, where, out = aligned((20, 64), np.uint16), aligned(128, np.uint8), np.zeros(128, np.uint32)
    data[:] = np.arange(data.size).reshape(data.shape)
    assert run(use_of_replaced(ACQUIRE), out, data, where, threads=128, shared=2048, late=late) == []
    found = out.view(np.uint16)[swizzled(np.arange(256) * 2, 3) // 2].reshape(8, 32)
    assert_array_equal(found, boxes(data, (8, 32), (16, 40)))


PIPELINE = (
    """setp.eq.u32 %p1, %t, 0; mov.u32 %r1, shared; @%p1 mbarrier.init.shared::cta.b64 [%r1], 64;
    @%p1 mbarrier.init.shared::cta.b64 [%r1+8], 32; bar.sync 0; setp.ge.u32 %p2, %t, 32; mov.u32 %r5, 0; mov.u32 %r6, 0;
    mad.lo.u32 %r4, %t, 4, %r1; @!%p2 bra consumer;
    producer: {empty} mad.lo.u32 %r7, %r5, 100, %t; st.shared.b32 [%r4+1024], %r7;
    mbarrier.arrive.shared::cta.b64 _, [%r1]; add.u32 %r5, %r5, 1; setp.lt.u32 %p3, %r5, 6; @%p3 bra producer; ret;
    consumer: and.b32 %r8, %r5, 1; {filled} ld.shared.b32 %r7, [%r4+1152]; ld.shared.b32 %r9, [%r4+1280];
    add.u32 %r7, %r7, %r9; add.u32 %r6, %r6, %r7; mbarrier.arrive.shared::cta.b64 _, [%r1+8];
    add.u32 %r5, %r5, 1; setp.lt.u32 %p3, %r5, 6; @%p3 bra consumer; """
    + at(0, 4)
    + "st.global.b32 [%d31], %r6;"
)
EMPTY = "xor.b32 %r8, %r5, 1; and.b32 %r8, %r8, 1;" + wait("%r8", "free", "[%r1+8]")
FILLED = wait("%r8", "full")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mbarrier_phases(seed):
    """Two warps fill a buffer six times that a third one empties."""
    out = np.zeros(32, np.uint32)
    assert run(PIPELINE.format(empty=EMPTY, filled=FILLED), out, threads=96, shared=2048, seed=seed) == []
    assert_array_equal(out, sum(200 * turn + 96 + 2 * np.arange(32) for turn in range(6)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_named_barriers_and_setmaxnreg(seed):
    """Warps 1 and 2 hand a value on through barrier 1, at which they do not wait; warp 3 takes no part."""
    out = np.zeros(32, np.uint32)
    body = f"""mov.u32 %r1, shared; mad.lo.u32 %r4, %t, 4, %r1; setp.eq.u32 %p1, %w, 3; @%p1 bra spare;
        setp.eq.u32 %p2, %w, 0; @%p2 bra take;
        setmaxnreg.dec.sync.aligned.u32 40; st.shared.b32 [%r4], %t; bar.arrive 1, 96; ret;
        take: setmaxnreg.inc.sync.aligned.u32 208; barrier.sync 1, 96; ld.shared.b32 %r5, [%r4+128];
        ld.shared.b32 %r6, [%r4+256]; add.u32 %r5, %r5, %r6; {at(0, 4)} st.global.b32 [%d31], %r5; ret;
        spare: setmaxnreg.dec.sync.aligned.u32 96;"""
    assert run(body, out, threads=128, shared=512, seed=seed, directives=".maxnreg 128") == []
    assert_array_equal(out, 96 + 2 * np.arange(32))
