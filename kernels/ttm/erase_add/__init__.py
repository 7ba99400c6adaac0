"""The erase-add write of Neural Turing Machines."""

from .write import EraseAdd

__all__ = ["EraseAdd"]
