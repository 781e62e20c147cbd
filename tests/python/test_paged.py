"""flash_attention_paged and flash_attention_paged_varlen: pages against the float64 oracle and the dense call."""

import contextlib

import mlx.core as mx
import mlx_mfa as mfa
import numpy as np
import pytest
from caches import keywords, make_pools, make_problem, paged_inputs, paged_parts, random_paged
from entry_points import BLOCKS, check_entry, run_block
from problems import DTYPES, cpu_kernels_only, needs_kernels, normal, to_mlx
from sequences import pack, unpack

pytestmark = [needs_kernels, cpu_kernels_only]


@pytest.mark.parametrize("block", BLOCKS)
def test_random_pages_are_within_the_error_rule(block, seed):
    def check(rng, index):
        case, pools, arguments = random_paged(rng, int(rng.choice((1, 1, 2, 5, 17, 33, 70))))
        p = case.problem
        table, lengths, rows = pools.table, pools.lengths, None
        if rng.random() < 0.3:  # rows of a longer table
            rows = rng.permutation(len(lengths) + 2)[: len(lengths)]
            table, lengths = np.full((len(rows) + 2, table.shape[1]), -1, np.int32), np.full(len(rows) + 2, 10**6)
            table[rows], lengths[rows] = pools.table, pools.lengths

        def call(x):
            q, k, v = (x.pop(n) for n in "qkv")
            remap = None if rows is None else mx.array(rows)
            return mfa.flash_attention_paged(
                q, k, v, mx.array(table), mx.array(lengths), cache_batch_idx=remap, **keywords(p), **(arguments | x)
            )

        inputs = paged_inputs(p, pools, arguments, p.q)
        check_entry(case, inputs, call, paged_parts(pools, arguments, p.k.shape[2]), seed=index)

    run_block(block, seed, check)


@pytest.mark.parametrize("block", BLOCKS)
def test_random_packed_queries_are_within_the_error_rule(block, seed):
    def check(rng, index):
        case, pools, arguments = random_paged(rng, int(rng.choice((1, 5, 40))))
        p = case.problem
        B, _, _, Nq, Nk, _, _ = p.shape
        counts = rng.integers(0, Nq + 1, B)
        counts[int(rng.integers(0, B))] = Nq
        # Each sequence has its own number of queries: those behind are hidden, and positions are those of its own.
        real = np.arange(Nq)[None, :] < counts[:, None]
        p.mask = (True if p.mask is None else p.mask) & np.broadcast_to(real[:, None, :, None], (B, 1, Nq, Nk))
        case.d_o *= real[:, None, :, None]
        case.dlse *= real[:, None]
        p.q_offset = np.maximum(0, pools.lengths - counts)
        case.d_o_array = to_mlx(pack(case.d_o, counts), p.dtype)
        cu = mx.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))

        def call(x):
            q, k, v = (x.pop(n) for n in "qkv")
            return mfa.flash_attention_paged_varlen(
                q, k, v, mx.array(pools.table), mx.array(pools.lengths), cu, max_seqlen_q=Nq, **keywords(p),
                **(arguments | x),
            )  # fmt: skip

        parts = paged_parts(pools, arguments, Nk) | {"q": lambda g: {"q": unpack(g, counts, Nq)}}
        inputs = paged_inputs(p, pools, arguments, pack(p.q, counts))
        check_entry(
            case,
            inputs,
            call,
            parts,
            seed=index,
            pack=lambda x: pack(x, counts),
            unpack=lambda x: unpack(x, counts, Nq),
        )

    run_block(block, seed, check)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Nq", [1, 3, 70])
def test_bits_are_those_of_the_dense_call_for_any_pages(dtype, Nq, seed):
    rng = np.random.default_rng(seed)
    lengths = np.array([0, 5, 130, 1025])
    p = make_problem(rng, lengths, Hq=4, Hkv=2, Nq=Nq, D=32, Dv=16, dtype=dtype)
    q, k, v, d_o = (to_mlx(x, dtype) for x in (p.q, p.k, p.v, normal(rng, (4, 4, Nq, 16), dtype)))

    def dense(q, k, v):
        return mfa.flash_attention(q, k, v, causal=True, kv_lengths=mx.array(lengths), return_lse=True)

    expected = dense(q, k, v)
    _, gradients = mx.vjp(lambda *x: dense(*x)[0], [q, k, v], [d_o])
    for page in (1, 5, 16, 64, 256):
        pools = make_pools(rng, p.k, p.v, lengths, page)
        arrays = [q, to_mlx(pools.k, dtype), to_mlx(pools.v, dtype)]

        def paged(q, k, v, pools=pools):
            return mfa.flash_attention_paged(
                q, k, v, mx.array(pools.table), mx.array(lengths), causal=True, return_lse=True
            )

        for x, y in zip(paged(*arrays), expected):
            assert mx.array_equal(x, y).item(), f"page {page}"
        _, (dq, dk, dv) = mx.vjp(lambda *x, paged=paged: paged(*x)[0], arrays, [d_o])
        assert mx.array_equal(dq, gradients[0]).item(), f"page {page}"
        for x, y in ((dk, gradients[1]), (dv, gradients[2])):
            gathered = pools.gather(np.array(x.astype(mx.float32)), 1025)
            assert np.array_equal(gathered, np.array(y.astype(mx.float32))), f"page {page}"


def test_prefill_chunks_and_decoding_in_one_call_have_the_bits_of_calls_of_their_own(seed):
    rng = np.random.default_rng(seed)
    lengths, counts = (
        np.array([70, 130, 600, 0, 3]),
        [70, 40, 1, 2, 0],
    )  # prefill, a chunk, decoding, no keys, no queries
    p = make_problem(rng, lengths, Hq=4, Hkv=2, Nq=70, D=32, Dv=32, dtype="float32")
    pools = make_pools(rng, p.k, p.v, lengths, 16)
    k, v, table = to_mlx(pools.k, "float32"), to_mlx(pools.v, "float32"), mx.array(pools.table)
    cu = np.concatenate([[0], np.cumsum(counts)])
    out, lse = mfa.flash_attention_paged_varlen(
        to_mlx(pack(p.q, counts), "float32"), k, v, table, lengths.tolist(), cu.tolist(), causal=True, return_lse=True
    )
    for b, n in enumerate(counts):
        own, own_lse = mfa.flash_attention_paged(
            to_mlx(p.q[b : b + 1, :, :n], "float32"), k, v, table[b : b + 1], [int(lengths[b])], causal=True,
            return_lse=True,
        )  # fmt: skip
        assert mx.array_equal(out[:, :, cu[b] : cu[b + 1]], own).item(), f"sequence {b}"
        assert mx.array_equal(lse[:, :, cu[b] : cu[b + 1]], own_lse).item(), f"sequence {b}"


def test_the_gradient_of_a_shared_page_is_the_sum(seed):
    rng = np.random.default_rng(seed)
    q, k, v = (to_mlx(normal(rng, s, "float32"), "float32") for s in ((2, 2, 5, 8), (4, 4, 2, 8), (4, 4, 2, 8)))
    table, lengths = mx.array([[2, 0], [2, 3]]), mx.array([7, 6])

    def loss(k, v, rows):
        o = mfa.flash_attention_paged(q[rows], k, v, table[rows], lengths[rows], causal=True)
        return (o * mx.arange(1, 9)).sum()

    together = mx.grad(loss, argnums=(0, 1))(k, v, slice(0, 2))
    apart = [mx.grad(loss, argnums=(0, 1))(k, v, slice(b, b + 1)) for b in (0, 1)]
    for x, a, b in zip(together, *apart):
        assert mx.allclose(x, a + b, rtol=1e-5, atol=1e-5).item()
        assert mx.abs(x[1]).max().item() == 0
        assert mx.abs(x[2]).min().item() > 0


def test_queries_of_another_dtype_are_cast_to_the_pool_and_back(seed):
    rng = np.random.default_rng(seed)
    q = to_mlx(normal(rng, (1, 2, 3, 8), "float32"), "float32")
    k = to_mlx(normal(rng, (2, 4, 2, 8), "bfloat16"), "bfloat16")
    out = mfa.flash_attention_paged(q, k, k, mx.array([[1, 0]]), [6])
    assert out.dtype == mx.float32
    same = mfa.flash_attention_paged(q.astype(mx.bfloat16), k, k, mx.array([[1, 0]]), [6])
    assert mx.array_equal(out, same.astype(mx.float32)).item()


def test_pools_are_not_copied(peak_bytes):
    k, v = mx.zeros((1024, 16, 2, 64)), mx.zeros((1024, 16, 2, 64))
    q, table = mx.zeros((1, 4, 1, 64)), mx.arange(1024)[None]
    mx.eval(k, v, q, table)
    peak = peak_bytes(lambda: mx.eval(mfa.flash_attention_paged(q, k, v, table, [16 * 1024])))
    assert peak < k.nbytes // 8


def test_views_of_pools_are_read_in_place(seed):
    rng = np.random.default_rng(seed)
    pool = to_mlx(normal(rng, (6, 2, 4, 2, 8), "float32"), "float32")  # keys and values of a page together
    k, v, q = pool[:, 0], pool[:, 1], to_mlx(normal(rng, (1, 2, 3, 8), "float32"), "float32")
    out = mfa.flash_attention_paged(q, k, v, mx.array([[5, 2]]), [7], causal=True)
    dense = [mx.concatenate([x[5], x[2]]).transpose(1, 0, 2)[None, :, :7] for x in (k, v)]
    assert mx.array_equal(out, mfa.flash_attention(q, *dense, causal=True)).item()


def test_no_sequences_no_queries_and_no_keys():
    pool = mx.full((2, 4, 1, 8), mx.nan)
    for B, N in ((0, 3), (2, 0), (2, 3)):
        o, lse = mfa.flash_attention_paged(
            mx.ones((B, 2, N, 8)), pool, pool, mx.full((B, 2), -1), mx.zeros((B,), mx.int32), return_lse=True
        )
        assert o.shape == (B, 2, N, 8)
        assert mx.all(o == 0).item()
        assert mx.all(lse == -mx.inf).item()
    o = mfa.flash_attention_paged_varlen(mx.ones((1, 2, 3, 8)), pool, pool, mx.array([[-1]]), [0], [0, 3])
    assert mx.all(o == 0).item()


def test_works_under_compile_checkpoint_vmap_and_async_eval(seed):
    rng = np.random.default_rng(seed)
    q, k, v = (to_mlx(normal(rng, s, "float32"), "float32") for s in ((2, 2, 5, 8), (6, 4, 2, 8), (6, 4, 2, 8)))
    table, lengths, rows = mx.array([[2, 0], [1, 3], [4, 5]]), mx.array([7, 6, 8]), mx.array([2, 0])

    def function(q, k, v, table, lengths, rows):
        return mfa.flash_attention_paged(q, k, v, table, lengths, cache_batch_idx=rows, causal=True)

    arguments = (q, k, v, table, lengths, rows)
    expected = function(*arguments)
    compiled = mx.compile(function)(*arguments)
    mx.async_eval(compiled)
    assert mx.array_equal(compiled, expected).item()
    assert mx.array_equal(mx.checkpoint(function)(*arguments), expected).item()
    mapped = mx.vmap(function, in_axes=(0, None, None, None, None, 0))(
        mx.stack([q, 2 * q]), k, v, table, lengths, mx.array([[2, 0], [1, 1]])
    )
    assert mx.array_equal(mapped[0], expected).item()
    assert mx.array_equal(mapped[1], function(2 * q, k, v, table, lengths, mx.array([1, 1]))).item()
    gradients = mx.vmap(mx.grad(lambda *x: function(*x).sum(), argnums=1), in_axes=(0, None, None, None, None, None))(
        mx.stack([q, 2 * q]), k, v, table, lengths, rows
    )
    alone = mx.grad(lambda *x: function(*x).sum(), argnums=1)(*arguments)
    assert mx.array_equal(gradients[0], alone).item()


MISTAKES = {
    "q of rank 3": ({"q": (2, 9, 8)}, "q must have 4 dimensions"),
    "pools of rank 3": ({"k_pages": (4, 4, 8)}, r"k must have 4 dimensions \[pages, page_size, Hkv, D\]; got shape"),
    "other pages": ({"v_pages": (5, 4, 2, 8)}, "k and v must have the same pages; got 4 of 4 tokens and 5 of 4"),
    "other heads": ({"v_pages": (4, 4, 1, 8)}, "k and v must have the same number of heads; got 2 and 1"),
    "other head dimension": ({"q": (2, 2, 3, 16)}, "q and k must have the same head dimension; got 16 and 8"),
    "heads that do not divide": ({"q": (2, 3, 3, 8)}, "the heads of q must be a multiple of the heads of k; got 3"),
    "other batch": ({"q": (3, 2, 3, 8)}, "q must have one batch entry for each of the 2 sequences of the block table"),
    "integer pools": ({"dtype": mx.int32}, "the keys must be float32, float16 or bfloat16; got int32"),
    "other dtypes": ({"v_dtype": mx.float16}, "keys and values must have one dtype; got float32 and float16"),
    "table of rank 1": ({"block_table": [0, 1]}, "block_table must have 2 dimensions; got shape"),
    "float table": ({"block_table": [[0.0, 1.0], [2.0, 3.0]]}, "block_table must have an integer dtype; got float32"),
    "lengths of rank 2": ({"seq_lens": [[8, 8]]}, "seq_lens must have 1 dimension; got shape"),
    "float lengths": ({"seq_lens": [8.0, 8.0]}, "seq_lens must have an integer dtype; got float32"),
    "counts": ({"seq_lens": [8, 8, 8]}, "block_table and seq_lens must have one count of sequences; got 2 and 3"),
    "page behind the pool": ({"block_table": [[0, 1], [2, 4]]},
                             r"block_table must name pages in \[0, 4\) for the keys that a sequence has; got 4 at "
                             "entry 1 of sequence 1"),
    "missing page": ({"block_table": [[-1, 1], [2, 3]]}, "got -1 at entry 0 of sequence 0"),
    "negative length": ({"seq_lens": [8, -1]}, r"seq_lens must be in \[0, Nk\] = \[0, 8\]; got -1 for batch entry 1"),
    "long length": ({"seq_lens": [9, 8]}, r"seq_lens must be in \[0, Nk\] = \[0, 8\]; got 9 for batch entry 0"),
    "page size": ({"block_size": 16}, "block_size must be the page size of the pools, 4; got 16"),
    "pages of no tokens": ({"k_pages": (4, 0, 2, 8), "v_pages": (4, 0, 2, 8), "seq_lens": [0, 0]},
                           "the page size of a pool must be positive; got 0"),
    "index behind the table": ({"cache_batch_idx": [0, 2]}, r"cache_batch_idx must be in \[0, 2\); got 2 at entry 1"),
    "negative index": ({"cache_batch_idx": [-1, 1]}, r"cache_batch_idx must be in \[0, 2\); got -1 at entry 0"),
    "float index": ({"cache_batch_idx": [0.0, 1.0]}, "cache_batch_idx must have an integer dtype; got float32"),
    "mask of other shape": ({"mask": (1, 1, 1, 7)}, "mask must be broadcastable"),
    "window": ({"window_size": 3}, "window_size must be a tuple"),
    "dropout": ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\]; got 1.5"),
    "backend": ({"backend": "composed"}, 'backend must be "auto" or "mfa"'),
}  # fmt: skip
OF_PACKED = {
    "batch of packed queries": ({"q": (2, 2, 6, 8)}, "packed q must have batch size 1; got 2"),
    "count of starts": ({"cu_seqlens_q": [0, 6]}, "cu_seqlens_q must have one element more than the 2 sequences"),
    "float starts": ({"cu_seqlens_q": [0.0, 1.0, 6.0]}, "cu_seqlens_q must have an integer dtype"),
    "first start": ({"cu_seqlens_q": [1, 3, 6]}, "cu_seqlens_q must begin with 0; got 1"),
    "last start": ({"cu_seqlens_q": [0, 3, 5]}, "cu_seqlens_q must end with the number of packed queries, 6; got 5"),
    "descending starts": ({"cu_seqlens_q": [0, 7, 6]}, "no sequence may have more than 6 queries; got 7 in sequence 0"),
    "long sequence": ({"max_seqlen_q": 2}, "no sequence may have more than 2 queries; got 3 in sequence 0"),
    "negative longest": ({"max_seqlen_q": -1}, "max_seqlen_q must not be negative; got -1"),
}


def call_with(function, changes):
    arguments = {"q": (2, 2, 3, 8), "k_pages": (4, 4, 2, 8), "v_pages": (4, 4, 2, 8), "block_table": [[0, 1], [2, 3]],
                 "seq_lens": [8, 7]}  # fmt: skip
    if function is mfa.flash_attention_paged_varlen:
        arguments |= {"q": (1, 2, 6, 8), "cu_seqlens_q": [0, 3, 6]}
    arguments |= changes
    k_dtype = arguments.pop("dtype", mx.float32)
    v_dtype = arguments.pop("v_dtype", k_dtype)
    for name, dtype in (("q", mx.float32), ("k_pages", k_dtype), ("v_pages", v_dtype)):
        arguments[name] = mx.zeros(arguments[name], dtype)
    arguments["block_table"] = mx.array(arguments["block_table"])
    if "mask" in arguments:
        arguments["mask"] = mx.ones(arguments["mask"], mx.bool_)
    if function is mfa.flash_attention_paged_varlen:
        arguments["seq_lens_kv"] = arguments.pop("seq_lens")
    return function(**arguments)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_input_is_one_clear_error(mistake):
    changes, message = MISTAKES[mistake]
    error = RuntimeError if mistake == "backend" else ValueError
    with pytest.raises(error, match=r"^\[flash_attention_paged\] .*" + message):
        call_with(mfa.flash_attention_paged, changes)


@pytest.mark.parametrize("mistake", OF_PACKED)
def test_bad_packed_input_is_one_clear_error(mistake):
    changes, message = OF_PACKED[mistake]
    with pytest.raises(ValueError, match=r"^\[flash_attention_paged_varlen\] .*" + message):
        call_with(mfa.flash_attention_paged_varlen, changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_lens": mx.array([8, 7]) + 1}, "seq_lens must be in"),
        ({"block_table": mx.array([[0, 1], [2, 3]]) + 1}, "block_table must name pages in"),
        ({"cache_batch_idx": mx.array([0, 1]) + 1}, "cache_batch_idx must be in"),
        ({"seq_lens": mx.array([8, 2**40]) * 1}, "seq_lens must be in"),
    ],
)
def test_values_that_are_computed_are_checked_when_they_are_evaluated(changes, message):
    out = call_with(mfa.flash_attention_paged, changes)
    with pytest.raises(RuntimeError, match=message):
        mx.eval(out)
    # MLX keeps an error with the event and with the stream, and may tell it a second time.
    with contextlib.suppress(RuntimeError, ValueError):
        mx.synchronize()
    mx.eval(call_with(mfa.flash_attention_paged, {}))  # the stream goes on


def test_random_metadata_is_computed_or_refused(seed):
    rng = np.random.default_rng(seed)
    q, pool = mx.ones((2, 1, 2, 4)), mx.ones((3, 2, 1, 4))
    accepted, cases = 0, 5000
    for _ in range(cases):
        table = rng.choice((-1, 0, 1, 2, 0, 1, 2, 3, 2**31 - 1, -(2**31)), (2, 2)).astype(np.int32)
        lengths = rng.choice((0, 1, 2, 3, 4, 5, -1, 2**31 - 1, -(2**31)), 2).astype(np.int32)
        try:
            out = mfa.flash_attention_paged(q, pool, pool, mx.array(table), mx.array(lengths))
        except ValueError:
            continue
        accepted += 1
        assert ((out == 1) == mx.array(lengths > 0)[:, None, None, None]).all().item()
    assert cases // 50 < accepted < cases // 2
