"""Pooling by Triton kernels; Triton is imported by `launch` and the kernels, not by `config`."""
