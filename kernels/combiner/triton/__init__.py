"""The fused kernels; imports Triton, so it is imported at first use (`config` alone does not)."""
