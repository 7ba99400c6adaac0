"""A video file with sound becomes chunk-aligned frames and samples: `from mirasol.media import load`."""

from .clip import Clip, load

__all__ = ["Clip", "load"]
