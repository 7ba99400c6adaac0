"""Sparse video tubes: geometry, extraction and its backends."""
