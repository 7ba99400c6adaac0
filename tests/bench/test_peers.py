"""Peers of attention: what a machine lacks is said in a sentence, and what can be checked without a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from cases import attention as suite_attention
from cases.attention_shapes import QUICK, Shape
from core.harness import Comparison, Unavailable, Variant, Verdict, compare
from core.rows import Settings
from peers import attention as peers
from peers import tlx

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 2, 2, 16, 4, 8)
WINDOWED = replace(SHAPE, window=2)


def reference(shape: Shape, q, k, v):
    return peers.dense(shape, CPU, SDPBackend.MATH)(q, k, v)


@pytest.mark.parametrize("shape", [SHAPE, WINDOWED])
def test_intervals_of_cudnn_are_the_rule(shape):
    """[1, 3, B N]: the mask that they describe gives what the loop over chunks gives."""
    intervals = peers.cudnn_intervals(shape)
    assert intervals.shape == (1, 3, shape.batch * shape.length)
    assert intervals.dtype == torch.int32
    assert intervals.is_contiguous()
    first, begin, end = intervals[0, :, : shape.length, None]
    assert torch.equal(intervals[0, :, : shape.length], intervals[0, :, shape.length :])
    keys = torch.arange(shape.length)
    mask = (keys < first) | ((keys >= begin) & (keys < end))
    q, k, v = torch.randn(3, shape.batch, shape.heads, shape.length, shape.head_dim)
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(found, peers.loop(shape, None)(q, k, v))
    torch.testing.assert_close(found, reference(shape, q, k, v))


@pytest.mark.parametrize("shape", [SHAPE, WINDOWED])
def test_the_rule_of_flex_attention(shape):
    positions = torch.arange(shape.length)
    mask = peers._visible(shape)(None, None, positions[:, None], positions[None, :])
    q, k, v = torch.randn(3, shape.batch, shape.heads, shape.length, shape.head_dim)
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(found, reference(shape, q, k, v))


def absent(package: str) -> bool:
    return importlib.util.find_spec(package) is None


@pytest.mark.parametrize(
    ("make", "package", "sentence"),
    [
        (lambda: peers.flash2(SHAPE), "flash_attn", "flash_attn is not installed"),
        (lambda: peers.flash4(SHAPE, CPU), "flash_attn", "FlashAttention-4 cannot be imported .*flash-attn-4"),
        (lambda: peers.cudnn_flex(SHAPE, CPU), "cudnn", "cudnn.flex_attention cannot be imported .*1.32"),
        (
            lambda: peers.flex(SHAPE, CPU, torch.float32, "fwd", "FLASH"),
            "flash_attn",
            "FlashAttention-4 cannot be imported",
        ),
    ],
)
def test_absent_packages_are_named_with_the_way_to_get_them(make, package, sentence):
    if not absent(package):
        pytest.skip(f"{package} is here")
    with pytest.raises(Unavailable, match=sentence):
        make()


def test_too_many_scores_and_a_backward_on_the_cpu_are_refused():
    with pytest.raises(Unavailable, match="MATH keeps all scores"):
        peers.dense(replace(SHAPE, tokens=4096), CPU, SDPBackend.MATH)
    with pytest.raises(Unavailable, match="no backward on the CPU"):
        peers.flex(SHAPE, CPU, torch.float32, "bwd")


def test_without_backends_flex_attention_says_so(monkeypatch):
    monkeypatch.setattr(peers, "FlexKernelOptions", type("Old", (), {"__annotations__": {}}))
    with pytest.raises(Unavailable, match="no backends to choose"):
        peers.flex(SHAPE, CPU, torch.float32, "fwd", "TRITON")


def stand_in(folder: Path, script: str) -> Path:
    """An interpreter whose place a script takes."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{script}\n")
    path.chmod(0o755)
    return path


def test_tlx_runs_in_a_process_of_its_own(tmp_path):
    answer = {"median_ms": 2.0, "p20_ms": 1.9, "p80_ms": 2.1, "n": 25, "error": 0.001, "allowed": 0.01}
    python = stand_in(
        tmp_path,
        f"import sys\nassert sys.argv[2:] == ['2', '2', '32', '16']\nprint('noise')\nprint({json.dumps(answer)!r})",
    )
    assert peers.tlx(SHAPE, python) == answer
    assert peers.tlx_command(SHAPE, python)[1].endswith("peers/tlx.py")


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ('print(\'{"unavailable": "no fbtriton"}\')', "no fbtriton"),
        ("import sys; sys.exit('broken')", "ended with 1: broken"),
        ("", "ended with 0"),
    ],
)
def test_what_tlx_lacks_is_said(tmp_path, script, sentence):
    with pytest.raises(Unavailable, match=sentence):
        peers.tlx(SHAPE, stand_in(tmp_path, script))


def test_tlx_needs_an_interpreter(tmp_path):
    with pytest.raises(Unavailable, match="--tlx-python"):
        peers.tlx(SHAPE, None)
    with pytest.raises(Unavailable, match="is no file"):
        peers.tlx(SHAPE, tmp_path / "nowhere")


def test_the_process_of_tlx_refuses_in_a_sentence():
    assert "blocks of 128" in tlx.main(["1", "1", "100", "64"])["unavailable"]
    if absent("triton.language.extra.tlx"):
        assert "pip install fbtriton" in tlx.main(["1", "1", "128", "64"])["unavailable"]


@pytest.mark.parametrize("mode", ["fwd", "bwd"])
def test_a_gpu_gets_every_peer(mode):
    """The names alone: nothing is built."""
    found = suite_attention._peers(QUICK[0], Settings(torch.device("cuda")), mode, torch.bfloat16, Variant)
    names = [variant.name for variant in found]
    assert len(found) == len(set(names))
    for wanted in (
        "flash, dense mask",
        "efficient, dense mask",
        "cudnn, dense mask",
        "math, dense mask",
        "FlexAttention",
    ):
        assert any(wanted in name for name in names), wanted
    for package in ("FlashAttention-4", "cuDNN flex_attention", "loop of flash_attn"):
        assert package in names
    assert ("FlashAttention-4, deterministic" in names) == (mode == "bwd")
    assert all(v.judged or v.name in (suite_attention.FULL, "causal SDPA", "causal SDPA cuDNN") for v in found)


def test_what_another_package_refuses_is_skipped_and_what_is_wrong_fails():
    def refusing():
        raise NotImplementedError("not on this GPU")

    variants = [
        Variant("refuses", lambda: refusing, foreign=True),
        Variant("breaks", lambda: refusing),
        Variant("wrong", lambda: lambda: torch.zeros(1), foreign=True),
    ]
    judge = lambda name, outputs: Verdict(problem="all zeros")  # noqa: E731
    case = Comparison("attention", "case", variants, judge, baseline="wrong")
    rows = {row.impl: row for row in compare(case, Settings(CPU, effort="quick"))}
    assert rows["refuses"].status == "SKIP"
    assert "not on this GPU" in rows["refuses"].reason
    assert rows["breaks"].status == "FAIL"
    assert rows["wrong"].status == "FAIL"
    assert rows["wrong"].median_ms is None
