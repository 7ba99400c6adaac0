"""Tables of questions, the clips that they are asked of, and batches of both."""

from .clips import ClipSource, ClipTensors, clip_chunks, load_clip
from .collate import collate
from .features import FeatureCache, cache_features
from .loader import Batch, Loader
from .origins import read_examples
from .shards import Shards, write_shards
from .table import Example, read_table

__all__ = [
    "Batch",
    "ClipSource",
    "ClipTensors",
    "Example",
    "FeatureCache",
    "Loader",
    "Shards",
    "cache_features",
    "clip_chunks",
    "collate",
    "load_clip",
    "read_examples",
    "read_table",
    "write_shards",
]
