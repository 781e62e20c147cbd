"""Values that say where rows lie, in every entry point that takes them: a mistake is one ValueError of the call."""

import mlx.core as mx
import numpy as np
import pytest
from problems import cpu_kernels_only, mfa
from test_explain import in_new_process

pytestmark = cpu_kernels_only

DTYPES = [mx.int32, mx.int64, mx.uint32, mx.int16, mx.uint8]


def zeros(*shape):
    return mx.zeros(shape)


def tables(positions=16, columns=4):
    return {"rotary_cos": mx.ones((positions, columns)), "rotary_sin": mx.ones((positions, columns))}


def pools():
    return {"block_table": [[0, 1], [2, 3]], "seq_lens": [8, 7]}


def starts():
    return {"cu_seqlens_q": [0, 3, 6], "cu_seqlens_k": [0, 5, 8]}


# What is right: two sequences, pages of 4 tokens, 4 of them, 8 or 16 tokens of room.
RIGHT = {
    "flash_attention_varlen": lambda: {"q": zeros(1, 2, 6, 8), "k": zeros(1, 2, 8, 8), "v": zeros(1, 2, 8, 8)}
    | starts(),
    "flash_attention_varlen_qkv_packed": lambda: {"qkv": zeros(1, 2, 6, 3, 8), "cu_seqlens_q": [0, 3, 6],
                                                  "cu_seqlens_k": [0, 3, 6]},
    "flash_attention_varlen_kv_packed": lambda: {"q": zeros(1, 2, 6, 8), "kv": zeros(1, 2, 8, 2, 8)} | starts(),
    "flash_attention_paged": lambda: {"q": zeros(2, 2, 3, 8), "k_pages": zeros(4, 4, 2, 8),
                                      "v_pages": zeros(4, 4, 2, 8)} | pools(),
    "flash_attention_paged_varlen": lambda: {"q": zeros(1, 2, 6, 8), "k_pages": zeros(4, 4, 2, 8),
                                             "v_pages": zeros(4, 4, 2, 8), "block_table": [[0, 1], [2, 3]],
                                             "cu_seqlens_q": [0, 3, 6], "seq_lens_kv": [8, 7]},
    "flash_attention_speculative_verify_paged": lambda: {
        "q_target": zeros(2, 2, 3, 8), "k_pages": zeros(4, 4, 2, 8), "v_pages": zeros(4, 4, 2, 8),
        "draft_ids": mx.zeros((2, 3), mx.int32)} | pools(),
    "flash_attention_kvcache": lambda: {"q": zeros(2, 2, 3, 8), "k_cache": zeros(2, 2, 16, 8),
                                        "v_cache": zeros(2, 2, 16, 8), "k_new": zeros(2, 2, 3, 8),
                                        "v_new": zeros(2, 2, 3, 8), "seq_lens": [1, 2]},
    "flash_attention_kvcache_rope_append": lambda: {
        "q": zeros(2, 2, 3, 8), "k_cache": zeros(2, 2, 16, 8), "v_cache": zeros(2, 2, 16, 8),
        "k_new": zeros(2, 2, 3, 8), "v_new": zeros(2, 2, 3, 8), "seq_lens": [1, 2]} | tables(),
    "append_to_cache": lambda: {"cache": zeros(2, 2, 16, 8), "rows": zeros(2, 2, 3, 8), "starts": [1, 2]},
    "flash_attention_rope": lambda: {"q": zeros(2, 2, 3, 8), "k": zeros(2, 2, 9, 8), "v": zeros(2, 2, 9, 8)}
    | tables(),
    "flash_attention_rope_unified": lambda: {"q": zeros(2, 2, 3, 8), "k": zeros(2, 2, 9, 8), "v": zeros(2, 2, 9, 8)}
    | tables(),
    "flash_attention": lambda: {"q": zeros(2, 2, 3, 8), "k": zeros(2, 2, 9, 8), "v": zeros(2, 2, 9, 8)},
    "flash_attention_kv_packed": lambda: {"q": zeros(2, 2, 3, 8), "kv": zeros(2, 2, 9, 2, 8)},
    "flash_attention_qkv_packed": lambda: {"qkv": zeros(2, 2, 9, 3, 8)},
    "make_shared_prefix_cache": lambda: {"prefix_q": zeros(2, 2, 3, 8), "prefix_k": zeros(2, 2, 9, 8),
                                         "prefix_v": zeros(2, 2, 9, 8)},
    "flash_attention_speculative_verify": lambda: {"q_target": zeros(2, 2, 3, 8), "k_cache": zeros(2, 2, 9, 8),
                                                   "v_cache": zeros(2, 2, 9, 8),
                                                   "draft_ids": mx.zeros((2, 3), mx.int32)},
    "flash_attention_cascade": lambda: {"q": zeros(2, 2, 3, 8), "k_prefix": zeros(1, 2, 5, 8),
                                        "v_prefix": zeros(1, 2, 5, 8), "k": zeros(2, 2, 9, 8), "v": zeros(2, 2, 9, 8)},
    "flash_attention_splitfuse": lambda: {"q_prefill": zeros(2, 2, 3, 8), "k_prefill": zeros(2, 2, 9, 8),
                                          "v_prefill": zeros(2, 2, 9, 8), "q_decode": zeros(2, 2, 1, 8),
                                          "k_cache_decode": zeros(2, 2, 9, 8), "v_cache_decode": zeros(2, 2, 9, 8)},
    "flash_attention_tree": lambda: {"q": zeros(2, 2, 3, 8), "k": zeros(2, 2, 9, 8), "v": zeros(2, 2, 9, 8),
                                     "parents": [-1, 0, 1]},
    "flash_attention_sparse": lambda: {"q": zeros(2, 2, 32, 8), "k": zeros(2, 2, 32, 8), "v": zeros(2, 2, 32, 8),
                                       "block_mask": mx.ones((1, 1), mx.bool_)},
    "sparse_attention_dispatch": lambda: {"Q": zeros(2, 2, 32, 8), "K": zeros(2, 2, 32, 8), "V": zeros(2, 2, 32, 8),
                                          "mask": mx.ones((2, 2), mx.bool_)},
    "sparse_attention_nax": lambda: {"Q": zeros(2, 2, 32, 8), "K": zeros(2, 2, 32, 8), "V": zeros(2, 2, 32, 8),
                                     "mask": mx.ones((1, 1), mx.bool_)},
    "flash_attention_gna": lambda: {"q": zeros(2, 2, 9, 8), "k": zeros(2, 2, 9, 8), "v": zeros(2, 2, 9, 8),
                                    "seq_shape": (9,), "window_size": (3,), "stride": (1,)},
    "flash_attention_topk": lambda: {"q": zeros(2, 2, 3, 8), "k": zeros(2, 2, 9, 8), "v": zeros(2, 2, 9, 8),
                                     "topk_ratio": 0.5},
}  # fmt: skip

OF_STARTS = [
    ({"cu_seqlens_q": [1, 3, 6]}, "cu_seqlens_q must begin with 0; got 1"),
    ({"cu_seqlens_q": [0, 3, 5]}, "cu_seqlens_q must end with the number of packed queries, 6; got 5"),
    ({"cu_seqlens_q": [0, 4, 3]}, "cu_seqlens_q must not decrease; got 3 after 4"),
    ({"cu_seqlens_q": [0, -1, 6]}, "cu_seqlens_q must not decrease; got -1 after 0"),
    ({"cu_seqlens_q": [0, 3, 6], "max_seqlen_q": 2}, "no sequence may have more than 2 queries; got 3 in sequence 0"),
    ({"cu_seqlens_q": [[0, 3, 6]]}, r"cu_seqlens_q must have 1 dimension; got shape \(1,3\)"),
    ({"cu_seqlens_q": [0, 3, 2**31 + 6]}, "cu_seqlens_q must be integers of 32 bits; got 2147483654"),
    ({"cu_seqlens_q": [0.0, 3.0, 6.0]}, "cu_seqlens_q must have an integer dtype; got float32"),
    ({"cu_seqlens_q": [[0], [3, 6]]}, "cu_seqlens_q must hold integers of 64 bits; got"),
]
OF_STARTS_OF_KEYS = [
    *OF_STARTS,
    ({"cu_seqlens_k": [0, 5, 7]}, "cu_seqlens_k must end with the number of packed keys"),
    ({"cu_seqlens_k": [0, 8]}, "cu_seqlens_q and cu_seqlens_k must have one shape"),
    ({"kv_lengths": [2, 4]}, r"kv_lengths must be in \[0, 3\], the keys of sequence 1; got 4"),
    ({"kv_lengths": [2]}, r"kv_lengths must have shape \(2,\)"),
    ({"kv_lengths": [-1, 2]}, "kv_lengths must be in .* got -1 for batch entry 0"),
]
OF_PAGES = [
    ({"block_table": [[0, 1], [2, 4]]}, r"block_table must name pages in \[0, 4\) .* got 4 at entry 1 of sequence 1"),
    ({"block_table": [[-1, 1], [2, 3]]}, "block_table must name pages .* got -1 at entry 0 of sequence 0"),
    ({"block_table": [0, 1]}, "block_table must have 2 dimensions; got shape"),
    ({"block_table": [[0.0, 1.0], [2.0, 3.0]]}, "block_table must have an integer dtype; got float32"),
    ({"seq_lens": [9, 8]}, r"seq_lens must be in .* got 9 for batch entry 0"),
    ({"seq_lens": [8, -1]}, r"seq_lens must be in .* got -1 for batch entry 1"),
    ({"seq_lens": [2**40, 8]}, "seq_lens must be integers of 32 bits; got 1099511627776"),
    ({"seq_lens": [8, 8, 8]}, "block_table and seq_lens must have one count of sequences; got 2 and 3"),
    ({"seq_lens": [8, 2**64]}, "seq_lens(_kv)? must hold integers of 64 bits; got"),
    ({"cache_batch_idx": [0, 2]}, r"cache_batch_idx must be in \[0, 2\); got 2 at entry 1"),
    ({"cache_batch_idx": [-1, 1]}, r"cache_batch_idx must be in \[0, 2\); got -1 at entry 0"),
    ({"cache_batch_idx": [1, 0], "seq_lens": [8, 9]}, "seq_lens must be in .* got 9 for batch entry 0"),
    ({"cache_batch_idx": [1, 1], "block_table": [[0, 1], [7, 3]]}, "got 7 at entry 0 of sequence 0"),
]
OF_LENGTHS = [
    ({"kv_lengths": [10, 2]}, r"kv_lengths must be in \[0, Nk\] = \[0, 9\]; got 10 for batch entry 0"),
    ({"kv_lengths": [2, -1]}, "got -1 for batch entry 1"),
    ({"kv_lengths": [2**40, 2]}, "got 1099511627776 for batch entry 0"),
    ({"kv_lengths": [1, 2, 3]}, r"kv_lengths must have shape \(2,\)"),
    ({"kv_lengths": [[1, 2]]}, r"kv_lengths must have shape \(2,\)"),
    ({"kv_lengths": [1.0, 2.0]}, "kv_lengths must have an integer dtype; got float32"),
    ({"kv_lengths": [[1], [2, 3]]}, "kv_lengths must hold integers of 64 bits; got"),
]
OF_APPENDS = [
    ({"seq_lens": [13, 14]}, "sequences must have room for .* got length 14 for sequence 1"),
    ({"seq_lens": [-1, 0]}, "sequences must have room for .* got length -1 for sequence 0"),
    ({"seq_lens": [1, 2, 3]}, "seq_lens must have one length for each of the 2 rows"),
    ({"cache_batch_idx": [0, 2]}, r"cache_batch_idx must be in \[0, 2\); got 2 at entry 1"),
    ({"cache_batch_idx": [1, 1]}, "each page may be appended to once; got page 1"),
]
OF_POSITIONS = [
    ({"cache_seqlens": [0, 14]}, r"the positions of .* \[0, 16\); got \[14, 17\) for sequence 1"),
    ({"cache_seqlens": [-1, 0]}, r"the positions of .* got \[-1, 2\) for sequence 0"),
    ({"cache_seqlens": [0, 1, 2]}, "cache_seqlens must have one position for each of the 2 batch entries; got 3"),
    ({"cache_seqlens": 14}, r"the positions of .* got \[14, 17\) for sequence 0"),
    ({"cache_seqlens": [0.5, 1.0]}, "cache_seqlens must have an integer dtype; got float32"),
    ({"cache_seqlens": [0, 2**33]}, "cache_seqlens must be integers of 32 bits; got 8589934592"),
    ({"rotary_dim": 4}, "rotary_dim must be twice the columns of the rotary tables, 8; got 4"),
    ({"rotary_sin": (16, 3)}, "rotary_cos and rotary_sin must have one shape"),
]
OF_KEY_POSITIONS = [
    ({"k_offset": [0, 8]}, r"the positions of keys .* got \[8, 17\) for sequence 1"),
    ({"k_offset": 8}, r"the positions of keys .* got \[8, 17\) for sequence 0"),
    ({"k_offset": [0]}, "k_offset must have one position for each of the 2 batch entries; got 1"),
]
OF_TILES = [
    ({"mask": (3, 2)}, "block_mask must have"),
    ({"mask": (2, 2, 2, 2, 2)}, "block_mask must have shape"),
    ({"block_tile": 0}, "block_size must be positive; got"),
    ({"block_tile": (1, 2, 3)}, "block_size must be an integer or a pair"),
    ({"Q": (2, 3, 32, 8)}, "the heads of q must be a multiple"),
    ({"kv_lengths": [33, 2]}, r"kv_lengths must be in \[0, Nk\] = \[0, 32\]; got 33"),
    ({"kv_lengths": [1, 2, 3]}, "kv_lengths must have shape"),
    ({"window_size": (-2, 0)}, "window_size must be at least 0"),
]

MISTAKES = {
    "flash_attention_varlen": OF_STARTS_OF_KEYS,
    "flash_attention_varlen_qkv_packed": [*OF_STARTS, ({"num_kv_heads": 3}, "num_kv_heads must be at most")],
    "flash_attention_varlen_kv_packed": [*OF_STARTS_OF_KEYS, ({"kv": (1, 2, 8, 3, 8)}, "axis 3 of kv")],
    "flash_attention_paged": OF_PAGES,
    "flash_attention_paged_varlen": [*OF_STARTS, *OF_PAGES],
    "flash_attention_speculative_verify_paged": [
        *OF_PAGES,
        ({"draft_ids": (2, 4)}, r"draft_ids must have shape \[B, N\] of the queries"),
        ({"temperature": 0.0}, "temperature must be finite and positive"),
    ],
    "flash_attention_kvcache": OF_APPENDS,
    "flash_attention_kvcache_rope_append": [*OF_APPENDS, *OF_POSITIONS],
    "append_to_cache": [
        ({"starts": [13, 14]}, "sequences must have room for .* got length 14 for sequence 1"),
        ({"starts": [-1, 0]}, "got length -1 for sequence 0"),
        ({"starts": [1]}, "starts must have one position for each of the 2 rows|rows must have the batch of starts"),
        ({"starts": [[1, 2]]}, "starts must have 1 dimension"),
        ({"starts": [1.0, 2.0]}, "starts must have an integer dtype; got float32"),
        ({"starts": [1, 2**32]}, "starts must be integers of 32 bits; got 4294967296"),
        ({"cache": (2, 16, 2, 8), "block_table": [[0], [2]]}, r"block_table must name pages in \[0, 2\)"),
        ({"cache": (2, 16, 2, 8), "block_table": [[1], [1]]}, "each page may be appended to once; got page 1"),
        ({"cache": (2, 16, 2, 8), "block_table": [[0]]}, "block_table must have one row for each of the 2 sequences"),
        ({"rows": (2, 3, 3, 8)}, "rows must have the batch of starts"),
    ],
    "flash_attention_rope": [*OF_POSITIONS, *OF_KEY_POSITIONS, *OF_LENGTHS],
    "flash_attention_rope_unified": [
        *OF_POSITIONS,
        *OF_KEY_POSITIONS,
        *OF_LENGTHS,
        ({"seq_lens": [3, 3]}, "seq_lens must not be given without a cache; got"),
        ({"k_cache": (2, 2, 4, 8), "v_cache": (2, 2, 4, 8), "k_offset": 1}, "k_offset must not be given with a cache"),
        ({"block_table": [[0], [1]], "k_cache": (2, 2, 4, 8)}, "block_table excludes k_cache"),
        ({"rope_3d": {"grid_h": 1, "grid_w": 1}}, "rope_3d excludes rotary_cos and rotary_sin; got both"),
        ({"rotary_cos": None, "rotary_sin": None}, "or rope_3d, must be given; got neither"),
        (
            {"rotary_cos": None, "rotary_sin": None, "rope_3d": {"grid_h": 1, "grid_w": 16, "deep": 1}},
            "rope_3d must have keys of",
        ),
    ],
    "flash_attention": OF_LENGTHS,
    "flash_attention_kv_packed": OF_LENGTHS,
    "flash_attention_qkv_packed": OF_LENGTHS,
    "make_shared_prefix_cache": [*OF_LENGTHS, ({"prefix_v": (2, 2, 8, 8)}, "k and v must have the same length")],
    "flash_attention_speculative_verify": OF_LENGTHS,
    "flash_attention_cascade": OF_LENGTHS,
    "flash_attention_splitfuse": [
        *(({f"{name}_decode": x for name, x in changes.items()}, message) for changes, message in OF_LENGTHS),
        ({"q_prefill": None, "q_decode": None}, "q_prefill or q_decode must be given; got None for both"),
        ({"k_prefill": None}, "q_prefill needs keys and values; got None"),
        ({"v_prefill": (2, 2, 8, 8)}, "k and v must have the same length"),
        ({"window_size": (-2, 0)}, "window_size must be at least 0"),
    ],
    "flash_attention_tree": [
        ({"kv_lengths": [10, 3]}, r"kv_lengths must be in \[N, Nk\] = \[3, 9\]; got 10 for batch entry 0"),
        ({"kv_lengths": [3, 2]}, "got 2 for batch entry 1"),
        ({"kv_lengths": [3, 2**40]}, "kv_lengths must be integers of 32 bits; got 1099511627776"),
        ({"parents": [-1, 1, 0]}, "the parent of node 1 must be a node before it or -1; got 1"),
        ({"parents": [-1, 0]}, r"parents must have shape \[N\] or \[B, N\]"),
        ({"parents": [[-1, 0, 1], [-1]]}, "parents must hold integers of 64 bits; got"),
        ({"window_size": (-5, -9)}, r"window_size must be .* got \(-5, -9\)"),
    ],
    "sparse_attention_dispatch": OF_TILES,
    "sparse_attention_nax": OF_TILES,
    "flash_attention_gna": [
        *OF_LENGTHS,
        ({"causal": "no"}, "causal must be a bool or one for each axis; got"),
        ({"causal": [0.5]}, "causal must be a bool or one for each axis; got"),
        ({"stride": (4,)}, "stride"),
    ],
    "flash_attention_topk": OF_LENGTHS,
}


def arguments_with(name, changes, dtype=None):
    """The right arguments with ``changes``; tuples are shapes, and integers are arrays of ``dtype`` if it is given."""
    given = RIGHT[name]() | changes
    if "seq_lens" in given and "seq_lens_kv" in given:
        given["seq_lens_kv"] = given.pop("seq_lens")
    for key, x in given.items():
        if isinstance(x, tuple) and key not in ("window_size", "block_tile", "stride", "seq_shape"):
            fill = {"mask": mx.ones(x, mx.bool_), "draft_ids": mx.zeros(x, mx.int32)}
            given[key] = fill[key] if key in fill else mx.zeros(x)
        elif key == "block_table":
            given[key] = mx.array(x) if dtype is None else as_dtype(x, dtype)
        elif isinstance(x, list) and dtype is not None and key not in ("causal", "parents"):
            given[key] = as_dtype(x, dtype)
    return given


def as_dtype(values, dtype):
    """An array of ``dtype`` with data, or what was given where that cannot hold it."""
    try:
        array = np.array(values)
    except ValueError:
        return values
    name = str(dtype).rpartition(".")[2]
    if array.dtype.kind != "i" or (array.astype(name) != array).any():
        return mx.array(values) if array.dtype.kind != "O" else values
    result = mx.array(array.astype(name))
    assert result.dtype == dtype
    return result


CASES = [(name, i) for name, mistakes in MISTAKES.items() for i in range(len(mistakes))]


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_computed(name):
    for dtype in (None, *DTYPES):
        mx.eval(getattr(mfa, name)(**arguments_with(name, {}, dtype)))


@pytest.mark.parametrize(("name", "index"), CASES)
def test_a_mistake_is_a_value_error_of_the_call_whatever_the_dtype(name, index):
    changes, message = MISTAKES[name][index]
    if name == "flash_attention_varlen_qkv_packed" and "cu_seqlens_q" in changes:  # queries and keys are the same rows
        changes = changes | {"cu_seqlens_k": [0, 3, 6]}
    for dtype in (None, *DTYPES):
        with pytest.raises(ValueError, match=rf"^\[{name}\] .*({message})") as error:
            getattr(mfa, name)(**arguments_with(name, changes, dtype))
        assert "; got" in str(error.value) or "one pos" in str(error.value), str(error.value)


@pytest.mark.parametrize("name", RIGHT)
def test_calls_are_explained_by_their_name(name):
    calls = mfa.explain_calls(getattr(mfa, name), **arguments_with(name, {}))
    if name != "append_to_cache":
        assert {c["function"] for c in calls} == {name}


def test_values_in_any_strides_are_checked_by_the_call():
    table = mx.array(np.array([[0, 9], [2, 9], [1, 9], [4, 9]]))
    mx.eval(columns := table[:, 0])
    mx.eval(pairs := columns.reshape(2, 2))
    given = arguments_with("flash_attention_paged", {})
    with pytest.raises(ValueError, match="got 4 at entry 1 of sequence 1"):
        mfa.flash_attention_paged(**given | {"block_table": pairs})
    mx.eval(swapped := mx.array([[0, 2], [1, 4]]).T)
    with pytest.raises(ValueError, match="got 4 at entry 1 of sequence 1"):
        mfa.flash_attention_paged(**given | {"block_table": swapped})


def test_positions_are_checked_though_the_tables_are_still_to_be_computed():
    given = arguments_with("flash_attention_rope", {"cache_seqlens": [0, 14]})
    given["rotary_cos"] = given["rotary_cos"] * 2
    with pytest.raises(ValueError, match=r"got \[14, 17\) for sequence 1"):
        mfa.flash_attention_rope(**given)


def test_starts_of_no_sequence_are_checked():
    given = arguments_with("flash_attention_varlen", {"cu_seqlens_q": [0], "cu_seqlens_k": [0]})
    with pytest.raises(ValueError, match="cu_seqlens_q must end with the number of packed queries, 6; got 0"):
        mfa.flash_attention_varlen(**given)


REFUSALS = """
import mlx.core as mx
import mlx_mfa as mfa

q, pool, new = mx.zeros((1, 2, 9, 8)), mx.zeros((4, 4, 2, 8)), mx.zeros((1, 2, 1, 8))
mx.eval(q, pool, new)
calls = {
    "paged": lambda: mfa.flash_attention_paged(q, pool, pool, mx.array([[0, 1, 9]]) + 0, [12]),
    "append": lambda: mfa.append_to_cache(q, new, mx.array([9]) + 0),
    "remapped": lambda: mfa.flash_attention_paged(q, pool, pool, mx.array([[0, 1, 2]]), [12],
                                                  cache_batch_idx=mx.array([4]) + 0),
    "rope": lambda: mfa.flash_attention_rope(q, q, q, mx.ones((16, 4)), mx.ones((16, 4)),
                                             cache_seqlens=mx.array([13]) + 0),
}
refused = 0
for i in range(800):
    try:
        mx.eval(calls["CALL"]() * 2 + 1)
    except RuntimeError as error:
        refused += str(error).startswith("[")
mx.eval(mfa.flash_attention(q, q, q))
print(refused)
"""


@pytest.mark.parametrize("call", ["paged", "append", "remapped", "rope"])
def test_a_process_that_is_refused_again_and_again_goes_on(call):
    run = in_new_process(REFUSALS.replace("CALL", call))
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == 800
