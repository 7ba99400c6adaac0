"""The Combiner's projection: the last m tokens of every chunk, normalised and projected."""

from mirasol.kernels.combiner.api import combiner_project, last_m

__all__ = ["combiner_project", "last_m"]
