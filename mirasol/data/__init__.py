"""Tables of questions, the clips that they are asked of, and batches of both."""

from .table import Example

__all__ = ["Example"]
