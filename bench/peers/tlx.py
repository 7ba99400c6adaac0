"""Dense attention by the Hopper tutorial of TLX, checked and timed: python tlx.py BATCH HEADS TOKENS WIDTH

Stands alone, as its environment has another Triton (fbtriton) and neither mirasol nor what this folder imports. Writes
one line of JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

ROUNDS = 25
BLOCK = 128  # of queries and keys; the tutorial has no masks
L2_FLUSH_BYTES = 256 << 20


def main(arguments: list[str]) -> dict[str, Any]:
    batch, heads, tokens, width = map(int, arguments)
    if tokens % BLOCK:
        return {"unavailable": f"TLX's tutorial takes tokens in blocks of {BLOCK}, there are {tokens}"}
    try:
        import torch
        from triton.language.extra.tlx.tutorials import hopper_fa_ws_pipelined_pingpong_persistent as tutorial
    except Exception as error:
        return {"unavailable": f"TLX's tutorial cannot be imported (pip install fbtriton): {error}"}
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, heads, tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    scale = width**-0.5
    out = tutorial.attention(q, k, v, scale)[:1, :1, :BLOCK].double()
    first = (q[:1, :1, :BLOCK], k[:1, :1], v[:1, :1])

    def plain(dtype: Any) -> Any:
        rows, keys, values = (t.to(dtype) for t in first)
        return ((rows @ keys.mT * scale).softmax(-1) @ values).double()

    exact = plain(torch.float64)
    allowed = max(2 * (plain(torch.bfloat16) - exact).abs().max().item(), 5e-3 * exact.abs().max().item())
    error = (out - exact).abs().max().item()
    if not error <= allowed:
        return {"unavailable": f"TLX is wrong: error {error:.2e} exceeds {allowed:.2e}"}
    times = sorted(_milliseconds(torch, lambda: tutorial.attention(q, k, v, scale)) for _ in range(ROUNDS))
    median, p20, p80 = (times[int(share * (ROUNDS - 1))] for share in (0.5, 0.2, 0.8))
    return {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "n": ROUNDS, "error": error, "allowed": allowed}


def _milliseconds(torch: Any, call: Any) -> float:
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
