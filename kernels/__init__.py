"""Operators for chunked audio-video models: `from mirasol.kernels import chunked_attention`."""

from .attention import chunked_attention as chunked_attention
from .attention import merge_attention as merge_attention
from .attention import visible_pairs as visible_pairs
from .combiner.api import combiner_project as combiner_project
from .combiner.api import last_m as last_m
from .ttm import EraseAddParams as EraseAddParams
from .ttm import LatentQueryParams as LatentQueryParams
from .ttm import MeanPoolParams as MeanPoolParams
from .ttm import MlpParams as MlpParams
from .ttm import TokenLearnerParams as TokenLearnerParams
from .ttm import group_tokens as group_tokens
from .ttm import scan_flops as scan_flops
from .ttm import summary_backward_flops as summary_backward_flops
from .ttm import summary_flops as summary_flops
from .ttm import ttm_read as ttm_read
from .ttm import ttm_scan as ttm_scan
from .ttm import ttm_step as ttm_step
from .ttm import ttm_write as ttm_write
from .ttm import ungroup_tokens as ungroup_tokens
from .tubes.api import extract_tubes as extract_tubes
from .tubes.geometry import TUBEVIT_TUBES as TUBEVIT_TUBES
from .tubes.geometry import Tube as Tube
from .tubes.geometry import check_tubes as check_tubes
from .tubes.geometry import tube_centres as tube_centres
from .tubes.geometry import tube_grid as tube_grid
from .tubes.native import build_info as build_info
