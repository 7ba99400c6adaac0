"""The erase-add write of Neural Turing Machines."""

from .configs import size_refusals
from .write import EraseAdd

__all__ = ["EraseAdd", "size_refusals"]
