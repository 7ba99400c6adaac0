"""Chunked attention: chunk-causal, windowed, packed and streaming attention that takes two integers for a mask."""

from mirasol.kernels.attention.api import chunked_attention, merge_attention, visible_pairs

__all__ = ["chunked_attention", "merge_attention", "visible_pairs"]
