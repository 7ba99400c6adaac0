"""Operators for chunked audio-video models: `from mirasol.kernels import chunked_attention`."""

from mirasol.kernels.attention import chunked_attention as chunked_attention
from mirasol.kernels.attention import merge_attention as merge_attention
from mirasol.kernels.attention import visible_pairs as visible_pairs
from mirasol.kernels.combiner.api import combiner_project as combiner_project
from mirasol.kernels.combiner.api import last_m as last_m
from mirasol.kernels.ttm import EraseAddParams as EraseAddParams
from mirasol.kernels.ttm import LatentQueryParams as LatentQueryParams
from mirasol.kernels.ttm import MeanPoolParams as MeanPoolParams
from mirasol.kernels.ttm import MlpParams as MlpParams
from mirasol.kernels.ttm import TokenLearnerParams as TokenLearnerParams
from mirasol.kernels.ttm import group_tokens as group_tokens
from mirasol.kernels.ttm import scan_flops as scan_flops
from mirasol.kernels.ttm import summary_backward_flops as summary_backward_flops
from mirasol.kernels.ttm import summary_flops as summary_flops
from mirasol.kernels.ttm import ttm_read as ttm_read
from mirasol.kernels.ttm import ttm_scan as ttm_scan
from mirasol.kernels.ttm import ttm_step as ttm_step
from mirasol.kernels.ttm import ttm_write as ttm_write
from mirasol.kernels.ttm import ungroup_tokens as ungroup_tokens
from mirasol.kernels.tubes.api import extract_tubes as extract_tubes
from mirasol.kernels.tubes.geometry import TUBEVIT_TUBES as TUBEVIT_TUBES
from mirasol.kernels.tubes.geometry import Tube as Tube
from mirasol.kernels.tubes.geometry import check_tubes as check_tubes
from mirasol.kernels.tubes.geometry import tube_centres as tube_centres
from mirasol.kernels.tubes.geometry import tube_grid as tube_grid
from mirasol.kernels.tubes.native import build_info as build_info
