"""Token Turing Machine memory: read, write and scan over chunks."""

from mirasol.kernels.ttm.api import group_tokens, ttm_read, ttm_scan, ttm_step, ttm_write, ungroup_tokens
from mirasol.kernels.ttm.flops import scan_flops, summary_backward_flops, summary_flops
from mirasol.kernels.ttm.params import EraseAddParams, LatentQueryParams, MeanPoolParams, MlpParams, TokenLearnerParams

__all__ = [
    "EraseAddParams",
    "LatentQueryParams",
    "MeanPoolParams",
    "MlpParams",
    "TokenLearnerParams",
    "group_tokens",
    "scan_flops",
    "summary_backward_flops",
    "summary_flops",
    "ttm_read",
    "ttm_scan",
    "ttm_step",
    "ttm_write",
    "ungroup_tokens",
]
