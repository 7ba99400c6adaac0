"""What the emulator reports: each check in a kernel that breaks it, and nothing in the one that is mended."""

from __future__ import annotations

import re

import numpy as np
import pytest

from emulator import machine
from emulator.handwritten import aligned, at, map_of, run
from emulator.ptx import UnsupportedError
from emulator.test_movement import ACQUIRE, EMPTY, FILLED, INIT, PIPELINE, bulk, use_of_replaced, wait

ADDRESS = "mad.lo.u32 %r4, %t, 4, shared;"
STORE, LOAD = "st.shared.b32 [%r4], %t;", "ld.shared.b32 %r5, [%r4+128];"  # of what the next warp stores
HERE = ".local .align 16 .b8 here[16]; mov.u64 %d1, here;"
FIRST = "setp.eq.u32 %p1, %w, 0;"  # the first of two warps
HALF = "setp.lt.u32 %p1, %t, 16; @!%p1 bra end;"
ARRIVE = "mbarrier.arrive.shared::cta.b64 _, "

# words of the message, statements, and what in the place of {} breaks the check or mends it
SHARED = [
    ("shared store out of bounds", "{}", "st.shared.b32 [%r4+1900], %t;", STORE),
    ("shared load out of bounds", STORE + "{}", "ld.shared.b32 %r5, [%r4+2048];", "ld.shared.b32 %r5, [%r4];"),
    ("misaligned shared load", STORE + "{}", "ld.shared.b32 %r5, [%r4+2];", "ld.shared.b32 %r5, [%r4];"),
    ("never written", "{} ld.shared.b32 %r5, [%r4];", "", STORE),
    ("reads shared byte", f"{STORE} {{}} {FIRST} @%p1 {LOAD}", "", "bar.sync 0;"),
    ("which warp 0 read", f"{STORE} bar.sync 0; {FIRST} @%p1 {LOAD} {{}} @!%p1 {STORE}", "", "bar.sync 0;"),
    ("overwrites shared byte", "mov.u32 %r1, shared; st.shared.b32 [%r1], {};", "%w", "7"),
    ("local access out of bounds", HERE + "st.local.b32 [%d1+{}], %t;", "16", "12"),
    ("predicate on which the lanes", "setp.lt.u32 %p1, %t, {}; @%p1 bar.sync 0;", "40", "64"),
    ("a barrier is met with", FIRST + "@%p1 bar.arrive 1, 64; @!%p1 bar.sync 1, {};", "96", "64"),
    ("waits at a barrier", FIRST + "@%p1 bar.sync 1, {};", "64", "32"),
    ("wait for each other", HALF + "bar.warp.sync {}; end: bar.warp.sync -1;", "-1; bar.sync 0", "65535"),
    ("waits for an mbarrier", f"{INIT.format(64)} {{}} {ARRIVE} [%r1]; {wait('0', 'full')}", "@%p1", ""),
    ("more arrivals than its count of 1", f"{INIT.format(1)} @%p1 {ARRIVE} [%r1], {{}};", "2", "1"),
    ("no mbarrier at shared byte", f"{INIT.format(1)} @%p1 {ARRIVE} [%r1{{}}];", "+8", ""),
    ("shfl reads lane 31", HALF + "shfl.sync.idx.b32 %r5, %t, {}, 31, 65535; end:", "31", "3"),
    ("trap", "setp.gt.u32 %p1, %t, {}; @%p1 trap;", "62", "63"),
    ("setmaxnreg asks for 41", "setmaxnreg.dec.sync.aligned.u32 {};", "41", "40"),
    ("setmaxnreg asks for 208", "setmaxnreg.dec.sync.aligned.u32 {};", "208", "104"),
    ("for registers", FIRST + "@%p1 bra end; setmaxnreg.inc.sync.aligned.u32 {}; end:", "208", "128"),
]


@pytest.mark.parametrize(("words", "around", "broken", "mended"), SHARED)
def test_shared_and_barriers(words, around, broken, mended):
    def errors(part: str) -> list[str]:
        return run(ADDRESS + around.replace("{}", part), threads=64, shared=2048, directives=".maxnreg 128", seed=1)

    assert errors(mended) == []
    assert words in errors(broken)[0]


VECTOR = (
    "mad.wide.u32 %d1, %t, 4, %a0; and.b32 %r5, %t, {}; setp.eq.u32 %p1, %r5, 0; @%p1 st.global.v2.b32 [%d1], {%t, %t};"
)
COPY = "cp.async.ca.shared.global [%r4], [%d31], 4; cp.async.commit_group; cp.async.wait_group {};"
GLOBAL = [
    ("global load out of bounds: 4 bytes", "ld.global.b32 %r5, [%d31+{}];", "4", "0"),
    ("global store out of bounds: 4 bytes", "st.global.b32 [%d31+{}], %t;", "256", "0"),
    ("misaligned global store of 8 bytes", VECTOR, "2", "1"),
    ("cp.async is not waited for", COPY, "1", "0"),
    ("never written", COPY + "ld.shared.b32 %r5, [%r4]; cp.async.wait_all;", "1", "0"),
]


@pytest.mark.parametrize(("words", "statements", "broken", "mended"), GLOBAL)
def test_global(words, statements, broken, mended):
    def errors(part: str) -> list[str]:
        return run(at(0, 4) + ADDRESS + statements.replace("{}", part), aligned(64), threads=64, shared=2048, late=True)

    assert errors(mended) == []
    assert words in errors(broken)[0]


RACE = """setp.eq.u32 %p1, %t, 0; @!%p1 bra end; mov.u32 %r5, %ctaid.x; setp.eq.u32 %p2, %r5, 0; @!%p2 bra second;
    st.global.b32 [%a0], 5; {release} ret;
    second: {acquire} {touch} end:"""
COUNT = "atom.global.{}.gpu.add.u32 %r6, [%a1], 1;"


@pytest.mark.parametrize("touch", ["ld.global.b32 %r7, [%a0];", "st.global.b32 [%a0], 6;"])
def test_race_of_blocks(touch):
    def errors(release: str, acquire: str) -> list[str]:
        body = RACE.format(release=release, acquire=acquire, touch=touch)
        return run(body, np.zeros(1, np.uint32), np.zeros(1, np.uint32), grid=(2, 1, 1))

    assert errors(COUNT.format("release"), COUNT.format("acquire")) == []
    assert errors(COUNT.format("acq_rel"), COUNT.format("acq_rel")) == []
    for release, acquire in (("relaxed", "acquire"), ("release", "relaxed")):
        assert "what block 0 wrote, byte 0 of array0" in errors(COUNT.format(release), COUNT.format(acquire))[0]


PRODUCT = f"""{ADDRESS} mov.b32 %r5, 0; st.shared.b32 [%r4], %r5; st.shared.b32 [%r4+512], %r5; {{fence}} bar.sync 0;
    mov.b64 %d1, {8 << 16 | 16 << 32}; setp.ne.b32 %p1, 0, 0; wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
        {{{{%r10, %r11, %r12, %r13}}}}, {{{{%r5, %r5, %r5, %r5}}}}, %d1, %p1, 1, 1, 0;
    wgmma.commit_group.sync.aligned; {{before}} bar.sync 0; {{store}} {{after}}"""
PROXY = "fence.proxy.async.shared::cta;"
DONE = "wgmma.wait_group.sync.aligned 0;"
WGMMA = [
    ("without a fence.proxy.async", dict(before=DONE), dict(fence=PROXY, before=DONE)),
    ("wgmma still reads it", dict(fence=PROXY, store=STORE, after=DONE), dict(fence=PROXY, store=STORE, before=DONE)),
    ("wgmma is not waited for", dict(fence=PROXY), dict(fence=PROXY, after=DONE)),
]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("words", "broken", "mended"), WGMMA)
def test_wgmma(words, broken, mended, late):
    def errors(parts: dict[str, str]) -> list[str]:
        body = PRODUCT.format(**dict(fence="", before="", store="", after="") | parts)
        return run(body, threads=128, shared=1024, late=late)

    assert errors(mended) == []
    assert words in errors(broken)[0]


def test_bulk_copy_is_not_waited_for():
    data = aligned((8, 32), np.uint16)
    copy = f"""{INIT.format(1)} mov.b64 %d1, map0; cvta.param.u64 %d2, %d1; add.u32 %r2, %r1, 1024;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 512; @%p1 {bulk((0, 0), "%d2")}"""
    maps = [map_of(data, (8, 32), 0)]
    assert run(copy + wait("0", "full"), data, shared=2048, maps=maps, late=True) == []
    assert "a bulk copy is not waited for" in run(copy, data, shared=2048, maps=maps, late=True)[0]


def test_tensor_map_without_fence():
    data, where, out = aligned((20, 64), np.uint16), aligned(128, np.uint8), np.zeros(128, np.uint32)
    assert run(use_of_replaced(ACQUIRE), out, data, where, threads=128, shared=2048) == []
    assert "without fence.proxy.tensormap" in run(use_of_replaced(""), out, data, where, threads=128, shared=2048)[0]


@pytest.mark.parametrize(
    ("parts", "words"),
    [(dict(empty=EMPTY, filled=""), "never written"), (dict(empty="", filled=FILLED), "waits for an mbarrier")],
)
def test_buffer_without_waits(parts, words):
    """The pipeline of test_mbarrier_phases, where one side does not wait for the other."""
    body = PIPELINE.format(**parts)
    found = [run(body, np.zeros(32, np.uint32), threads=96, shared=2048, seed=seed) for seed in range(4)]
    assert any(words in error for errors in found for error in errors)


def test_skipped_load_is_nan():
    out = np.zeros(32, np.float32)
    body = f"{at(0, 4)} setp.lt.u32 %p1, %t, 8; @%p1 ld.global.b32 %r1, [%d31]; st.global.b32 [%d31], %r1;"
    assert run(body, out) == []
    np.testing.assert_array_equal(np.isnan(out), np.arange(32) >= 8)


def test_limit_of_instructions(monkeypatch):
    monkeypatch.setattr(machine, "LIMIT", 1000)
    loop = "mov.u32 %r1, 0; again: add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, {}; @%p1 bra again;"
    assert run(loop.format(50)) == []
    assert "the limit of 1000 instructions" in run(loop.format(5000))[0]


def test_threads():
    assert run("", threads=64, directives=".reqntid 64") == []
    with pytest.raises(ValueError, match="threads must be 64, as the kernel says, it was 32"):
        run("", threads=32, directives=".reqntid 64")


UNSUPPORTED = ["add.rz.f32 %r1, %r2, %r3", "cvt.rn.tf32.f32 %r1, %r2", "vadd.u32.u32.u32 %r1, %r2, %r3"]
UNSUPPORTED += ["mov.u32 %r1, %smid", "cp.reduce.async.bulk %r1, %r2", "atom.global.add.noftz.f16 %h1, [%d1], %h2"]


@pytest.mark.parametrize("statement", UNSUPPORTED)
def test_unsupported(statement):
    with pytest.raises(UnsupportedError, match=r"kernel, line \d+: " + re.escape(statement)):
        run(statement + ";")
