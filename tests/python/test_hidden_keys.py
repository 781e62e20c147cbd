"""NaN in every key and value that a mask, a length or a tile hides, in each entry point: no result has another bit."""

import mlx.core as mx
import numpy as np
import pytest
from problems import cpu_kernels_only, mfa, needs_kernels, random_arrays
from rotary import tables

pytestmark = [needs_kernels, cpu_kernels_only]

N = 70
HIDDEN = np.isin(np.arange(N), (3, 17, 18, 40, 69))
STARTS = [0, 30, N]
TABLE, LENGTHS = np.array([[3, 1, 7], [0, 9, 2]]), [24, 20]
OF_PAGES = np.isin(np.arange(24), (5, 6, 13))
TREE = [-1, 0, 0, 1, 2]


def visible(hidden):
    return mx.array(~hidden)[None, None, None]


def batch():
    """q, k, v; the same with NaN in hidden keys."""
    q, k, v = random_arrays(1, (2, 4, N, 16), (2, 2, N, 16), (2, 2, N, 16))
    return (q, k, v), (q, poisoned(k, HIDDEN), poisoned(v, HIDDEN))


def poisoned(x, hidden):
    return mx.where(mx.array(hidden)[:, None], mx.nan, x)


def alone(hidden=HIDDEN):
    q, k, v = random_arrays(2, (1, 4, N, 16), (1, 2, N, 16), (1, 2, N, 16))
    return (q, k, v), (q, poisoned(k, hidden), poisoned(v, hidden))


def packed(rows):
    """``[1, H, N, 3, D]`` of the first heads of q, k and v."""
    return tuple((mx.stack([q[:, :2], k, v], 3),) for q, k, v in rows)


def pools():
    """Queries and pools; the same with NaN in hidden keys, behind the sequences and in unused pages."""
    q, k, v = random_arrays(3, (2, 4, 9, 16), (10, 8, 2, 16), (10, 8, 2, 16))
    seen = np.zeros((10, 8), bool)
    for row, length in zip(TABLE, LENGTHS):
        for j in np.flatnonzero(~OF_PAGES[:length]):
            seen[row[j // 8], j % 8] = True
    nan = [mx.where(mx.array(seen)[..., None, None], x, mx.nan) for x in (k, v)]
    return (q, k, v), (q, *nan)


def rotation():
    cos, sin = tables(200, 16)
    return {"rotary_cos": mx.array(cos), "rotary_sin": mx.array(sin)}


def pages():
    return {"block_table": mx.array(TABLE), "seq_lens": LENGTHS, "mask": visible(OF_PAGES)}


def of_sequences():
    """The mask of HIDDEN for two packed sequences of 30 and 40 tokens."""
    return mx.array(~np.stack([np.pad(HIDDEN[:30], (0, 10)), HIDDEN[30:]]))[:, None, None]


BEHIND = np.isin(np.arange(N), [*range(25, 30), *range(60, N)])  # kv_lengths of [25, 30]
OF_TILES = np.isin(np.arange(N), [*range(16, 24), *range(46, 54)])  # the third tile of 8 keys of each sequence
TILES = np.arange(5) != 2

# What is called, and arrays without and with NaN.
CASES = {
    "sparse": (lambda *x: mfa.flash_attention_sparse(*x, mx.ones((3, 3), mx.bool_), mask=visible(HIDDEN)), batch),
    "dispatch": (
        lambda *x: mfa.sparse_attention_dispatch(
            *x, mx.ones((5, 5), mx.bool_), causal=True, token_mask=visible(HIDDEN)
        ),
        batch,
    ),
    "gna": (lambda *x: mfa.flash_attention_gna(*x, (7, 10), (3, 5), (1, 1), mask=visible(HIDDEN)), batch),
    "topk": (lambda *x: mfa.flash_attention_topk(*x, 0.3, causal=True, token_mask=visible(HIDDEN)), batch),
    "topk tiles": (
        lambda *x: mfa.flash_attention_topk(
            *x, 0.3, mask=mx.array(np.tile(np.arange(9) != 2, (9, 1))), block_size=8
        ),
        lambda: (batch()[0], (batch()[0][0], *(poisoned(x, np.arange(N) // 8 == 2) for x in batch()[0][1:]))),
    ),
    "rope": (lambda *x: mfa.flash_attention_rope(*x, **rotation(), mask=visible(HIDDEN)), batch),
    "rope_unified": (lambda *x: mfa.flash_attention_rope_unified(*x, **rotation(), mask=visible(HIDDEN)), batch),
    "kvcache": (lambda *x: mfa.flash_attention_kvcache(*x, mask=visible(HIDDEN)), batch),
    "kvcache, rotated": (lambda *x: mfa.flash_attention_kvcache(*x, **rotation(), mask=visible(HIDDEN)), batch),
    "cascade": (
        lambda q, k, v: mfa.flash_attention_cascade(q, *random_arrays(4, *[(1, 2, 30, 16)] * 2), k, v,
                                                    mask=visible(HIDDEN)),
        batch,
    ),
    "tree": (lambda q, k, v: mfa.flash_attention_tree(q[:, :, :5], k, v, TREE, mask=visible(HIDDEN)), batch),
    "tree, lengths": (
        lambda q, k, v: mfa.flash_attention_tree(q[:, :, :5], k, v, TREE, mask=visible(HIDDEN), kv_lengths=[60, 69]),
        batch,
    ),
    "verify": (
        lambda *x: mfa.flash_attention_speculative_verify(*x, mx.zeros((2, N), mx.int32), mask=visible(HIDDEN)), batch
    ),
    "splitfuse": (
        lambda *x: mfa.flash_attention_splitfuse(*x, *x, mask_prefill=visible(HIDDEN), mask_decode=visible(HIDDEN)),
        batch,
    ),
    "prefix": (lambda *x: mfa.make_shared_prefix_cache(*x, mask=visible(HIDDEN))[0], batch),
    "qkv_packed": (lambda x: mfa.flash_attention_qkv_packed(x, mask=visible(HIDDEN)), lambda: packed(batch())),
    "varlen": (lambda *x: mfa.flash_attention_varlen(*x, STARTS, STARTS, 40, 40, mask=of_sequences()), alone),
    "varlen, lengths": (
        lambda *x: mfa.flash_attention_varlen(*x, STARTS, STARTS, 40, 40, kv_lengths=[25, 30], causal=True),
        lambda: alone(BEHIND),
    ),
    "varlen, tiles": (
        lambda *x: mfa.flash_attention_varlen(
            *x, STARTS, STARTS, 40, 40, block_mask=mx.array(np.tile(TILES, (5, 1))), block_size=8
        ),
        lambda: alone(OF_TILES),
    ),
    "varlen_qkv_packed": (
        lambda x: mfa.flash_attention_varlen_qkv_packed(x, STARTS, STARTS, 40, 40, kv_lengths=[25, 30]),
        lambda: packed(alone(BEHIND)),
    ),
    "paged": (lambda *x: mfa.flash_attention_paged(*x, **pages(), causal=True), pools),
    "paged, all modifiers": (
        lambda *x: mfa.flash_attention_paged(
            *x, **pages(), causal=True, window_size=(15, 0), alibi_slopes=mx.array([0.1, 0.2, 0.3, 0.4]), softcap=3.0,
            sinks=mx.zeros(4), dropout_p=0.3, dropout_seed=5, attn_bias=mx.ones((1, 4, 1, 24)), return_lse=True,
        ),
        pools,
    ),
    "paged_varlen": (
        lambda q, k, v: mfa.flash_attention_paged_varlen(
            q[:1], k, v, mx.array(TABLE), LENGTHS, [0, 3, 9], max_seqlen_q=6, mask=visible(OF_PAGES)
        ),
        pools,
    ),
    "kvcache, pages": (lambda *x: mfa.flash_attention_kvcache(*x, **pages()), pools),
    "rope_unified, pages": (lambda *x: mfa.flash_attention_rope_unified(*x, **rotation(), **pages()), pools),
    "verify_paged": (
        lambda *x: mfa.flash_attention_speculative_verify_paged(
            *x, draft_ids=mx.zeros((2, 9), mx.int32), **pages()
        )[:2],
        pools,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_hidden_keys_reach_no_output_and_no_gradient(name):
    function, arrays = CASES[name]

    def results(given):
        def outputs(*x):
            out = function(*x)
            return list(out) if isinstance(out, (tuple, list)) else [out]

        out = outputs(*given)
        weights = [mx.cos(mx.arange(x.size)).reshape(x.shape).astype(x.dtype) for x in out]
        return out + list(mx.vjp(outputs, list(given), weights)[1])

    clean, nan = arrays()
    assert any(mx.isnan(x).any().item() for x in nan)
    for mine, expected in zip(results(nan), results(clean)):
        assert not mx.isnan(expected).any().item()
        assert mx.array_equal(mine, expected).item()
