"""The Triton backend of chunked attention. Imports Triton."""
