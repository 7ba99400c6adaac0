"""Operators for chunked audio-video models: `from mirasol.kernels import chunked_attention`."""

from .attention import chunked_attention as chunked_attention
from .attention import merge_attention as merge_attention
from .attention import visible_pairs as visible_pairs
from .combiner.api import combiner_project as combiner_project
from .combiner.api import last_m as last_m
from .tubes.api import extract_tubes as extract_tubes
from .tubes.geometry import TUBEVIT_TUBES as TUBEVIT_TUBES
from .tubes.geometry import Tube as Tube
from .tubes.geometry import check_tubes as check_tubes
from .tubes.geometry import tube_centres as tube_centres
from .tubes.geometry import tube_grid as tube_grid
