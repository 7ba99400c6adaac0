"""Video files with sound become chunk-aligned frames and samples: `from mirasol.media import load`; what comes piece by
piece, from files of any length, cameras, servers and pipes: `open_live`."""

from .clip import Clip, load
from .live import Live, Picture, Sound, open_live

__all__ = ["Clip", "Live", "Picture", "Sound", "load", "open_live"]
