"""Operators for chunked audio-video models: `from mirasol.kernels import chunked_attention`."""
