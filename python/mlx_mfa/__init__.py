"""Flash attention for MLX: softmax attention forward and backward, with every score modifier, without storing scores.

``flash_attention`` is the entry point; ``explain`` says which implementation runs a call and why. On the CPU, importing
the package also puts its matrix products in the place of MLX's, which are slow there: see ``mlx_mfa.hooks``.
"""

from ._mlx import version_error as _version_error
from ._version import __version__

if _version_error():  # the extension would fail to load, with an undefined symbol
    raise ImportError(_version_error())

from .attention import explain, explain_calls, flash_attention, merge_attention_states
from .block_selection import (
    make_draft_mask,
    make_lcsa_mask,
    make_sla_mask,
    make_sliding_tile_mask,
    make_sparge_mask,
    make_topk_spatial_mask,
    make_vsa_mask,
    make_xattention_mask,
)
from .device import diagnostics, get_device_info, get_supported_configs, is_mfa_available, warmup_kernels
from .hooks import disable, enable, enable_by_default, hooks_status
from .kv_cache import append_to_cache, flash_attention_kvcache, flash_attention_kvcache_rope_append
from .linear import addmm, gather_mm, gather_qmm, matmul, quantized_matmul, set_packed_weights_limit
from .masks import (
    BlockMask,
    make_causal_block_mask,
    make_causal_segment_mask,
    make_cross_stream_mask,
    make_diagonal_mask,
    make_segment_mask,
    make_sink_window_mask,
    make_sliding_window_mask,
    make_strided_mask,
)
from .neighbourhood import flash_attention_gna
from .packed import flash_attention_kv_packed, flash_attention_qkv_packed
from .paged import flash_attention_paged, flash_attention_paged_varlen
from .prefix import flash_attention_cascade, flash_attention_splitfuse, make_shared_prefix_cache
from .rope import flash_attention_rope, flash_attention_rope_unified
from .rope_tables import make_rope_3d_tables
from .sparse import flash_attention_sparse, sparse_attention_dispatch, sparse_attention_nax
from .speculative import (
    TreeMask,
    flash_attention_speculative_verify,
    flash_attention_speculative_verify_paged,
    flash_attention_tree,
    make_tree_mask,
)
from .topk import flash_attention_topk
from .varlen import flash_attention_varlen, flash_attention_varlen_kv_packed, flash_attention_varlen_qkv_packed
from .video_masks import (
    make_adaptive_window_mask,
    make_axial_spatial_mask,
    make_axial_temporal_mask,
    make_dilated_temporal_mask,
    make_gna_mask,
    make_reference_frame_mask,
    make_spatial_2d_mask,
    make_spatial_3d_mask,
    make_temporal_distance_bias,
    make_temporal_group_mask,
    temporal_distance_bias_to_mask,
    tile_order,
)

enable_by_default()
del enable_by_default

__all__ = [
    "BlockMask",
    "TreeMask",
    "__version__",
    "addmm",
    "append_to_cache",
    "diagnostics",
    "disable",
    "enable",
    "explain",
    "explain_calls",
    "flash_attention",
    "flash_attention_cascade",
    "flash_attention_gna",
    "flash_attention_kv_packed",
    "flash_attention_kvcache",
    "flash_attention_kvcache_rope_append",
    "flash_attention_paged",
    "flash_attention_paged_varlen",
    "flash_attention_qkv_packed",
    "flash_attention_rope",
    "flash_attention_rope_unified",
    "flash_attention_sparse",
    "flash_attention_speculative_verify",
    "flash_attention_speculative_verify_paged",
    "flash_attention_splitfuse",
    "flash_attention_topk",
    "flash_attention_tree",
    "flash_attention_varlen",
    "flash_attention_varlen_kv_packed",
    "flash_attention_varlen_qkv_packed",
    "gather_mm",
    "gather_qmm",
    "get_device_info",
    "get_supported_configs",
    "hooks_status",
    "is_mfa_available",
    "make_adaptive_window_mask",
    "make_axial_spatial_mask",
    "make_axial_temporal_mask",
    "make_causal_block_mask",
    "make_causal_segment_mask",
    "make_cross_stream_mask",
    "make_diagonal_mask",
    "make_dilated_temporal_mask",
    "make_draft_mask",
    "make_gna_mask",
    "make_lcsa_mask",
    "make_reference_frame_mask",
    "make_rope_3d_tables",
    "make_segment_mask",
    "make_shared_prefix_cache",
    "make_sink_window_mask",
    "make_sla_mask",
    "make_sliding_tile_mask",
    "make_sliding_window_mask",
    "make_sparge_mask",
    "make_spatial_2d_mask",
    "make_spatial_3d_mask",
    "make_strided_mask",
    "make_temporal_distance_bias",
    "make_temporal_group_mask",
    "make_topk_spatial_mask",
    "make_tree_mask",
    "make_vsa_mask",
    "make_xattention_mask",
    "matmul",
    "merge_attention_states",
    "quantized_matmul",
    "set_packed_weights_limit",
    "sparse_attention_dispatch",
    "sparse_attention_nax",
    "temporal_distance_bias_to_mask",
    "tile_order",
    "warmup_kernels",
]
