"""Trees of draft tokens: golden masks, attention of a tree over a cache, and the replaced package's proxy."""

import dataclasses

import caches
import mlx.core as mx
import numpy as np
import oracle
import pytest
from entry_points import BLOCKS, check_entry, run_block
from problems import (
    cpu_kernels_only,
    golden,
    keywords,
    make_case,
    make_problem,
    mfa,
    needs_kernels,
    random_arrays,
    random_case,
    to_numpy,
)

NOT_OFFERED = ("kv_lengths",)


def random_parents(rng, N):
    return np.array([int(rng.integers(max(-1, i - 6), i)) for i in range(N)])


def depths_and_ancestors(parents):
    N = len(parents)
    depths, seen = np.zeros(N, int), np.eye(N, dtype=bool)
    for i, up in enumerate(parents):
        if up >= 0:
            depths[i] = depths[up] + 1
            seen[i] |= seen[up]
    return depths, seen


def test_golden_tree():
    case = golden("speculative.json")["tree"]
    tree = mfa.make_tree_mask(case["parents"])
    assert tree.depths.tolist() == case["position_offset"]
    assert [np.flatnonzero(row).tolist() for row in np.array(tree.visible)] == case["visible"]
    assert tree.bits.tolist() == [[bits] for bits in case["bitmask"]]


@pytest.mark.parametrize("N", [0, 1, 31, 32, 33, 100])
def test_masks_of_random_trees(N, seed):
    parents = np.stack([random_parents(np.random.default_rng([seed, N, t]), N) for t in range(3)])
    trees = mfa.make_tree_mask(mx.array(parents.astype(np.int32)))
    words = -(-N // 32)
    assert trees.bits.shape == (3, N, words)
    for t in range(3):
        depths, seen = depths_and_ancestors(parents[t])
        assert np.array_equal(np.array(trees.depths[t]), depths)
        assert np.array_equal(np.array(trees.visible[t]), seen)
        bits = np.array(trees.bits[t])[:, :, None] >> np.arange(32, dtype=np.uint32) & 1
        assert np.array_equal(bits.reshape(N, 32 * words)[:, :N].astype(bool), seen)
        one = mfa.make_tree_mask(parents[t].tolist())
        assert np.array_equal(np.array(one.bits), np.array(trees.bits[t]))


def tree_sizes(rng):
    while True:
        B, Hkv, G = int(rng.integers(1, 4)), int(rng.choice((1, 2, 3))), int(rng.choice((1, 1, 2, 4)))
        N, committed = int(rng.choice((1, 2, 7, 16, 33, 65))), int(rng.choice((0, 1, 31, 64, 129, 300)))
        if B * Hkv * G * N * (N + committed) <= 1e5:
            D, Dv = (int(rng.choice((1, 8, 17, 40, 64, 128))) for _ in range(2))
            return B, Hkv * G, Hkv, N, N + committed, D, Dv


@needs_kernels
@pytest.mark.parametrize("block", BLOCKS)
def test_random_trees_are_attention_with_their_mask(block, seed):
    def check(rng, index):
        case = random_case(rng, tree_sizes, NOT_OFFERED)
        p = case.problem
        B, _, _, N, Nk, _, _ = p.shape
        batched, ragged = rng.random() < 0.5, rng.random() < 0.5
        parents = np.stack([random_parents(rng, N) for _ in range(B if batched else 1)])
        lengths = rng.integers(N, Nk + 1, size=B) if ragged else np.full(B, Nk)
        mask, distance = np.zeros((B, 1, N, Nk), bool), np.zeros((B, 1, N, Nk))
        for b in range(B):
            depths, seen = depths_and_ancestors(parents[b if batched else 0])
            committed = lengths[b] - N
            mask[b, 0, :, :committed] = True
            mask[b, 0, :, committed : lengths[b]] = seen
            at = np.arange(Nk)
            at[committed : lengths[b]] = committed + depths
            distance[b, 0] = at[None, :] - (committed + depths)[:, None]
        if p.window and p.window[0] >= 0:
            mask &= -distance <= p.window[0]
        if p.mask is not None:
            mask = mask & p.mask
        if ragged and rng.random() < 0.5:  # what lies behind the tree must not matter
            behind = mx.array(np.arange(Nk)[None, :] >= lengths[:, None])[:, None, :, None]
            nan = mx.array(float("nan"))
            case.arrays |= {n: mx.where(behind, nan.astype(x.dtype), x) for n, x in case.arrays.items() if n in "kv"}
        case.problem = dataclasses.replace(p, causal=False, window=None, mask=mask, distance=distance)
        case.label = f"batched {batched} lengths {lengths} {case.label}"

        def call(x):
            options = keywords(p, x)
            del options["causal"], options["kv_lengths"]
            given = mx.array(parents if batched else parents[0])
            return mfa.flash_attention_tree(
                x["q"],
                x["k"],
                x["v"],
                given,
                kv_lengths=lengths.tolist() if ragged else None,
                return_lse=True,
                **options,
            )

        check_entry(case, case.arrays, call, seed=index)

    run_block(block, seed, check)


def test_a_chain_is_causal_attention():
    q, k, v = random_arrays(3, (2, 4, 9, 16), (2, 2, 50, 16), (2, 2, 50, 16))
    chain = list(range(-1, 8))
    expected, lse = mfa.flash_attention(q, k, v, causal=True, window_size=(20, 0), return_lse=True)
    out, tree_lse = mfa.flash_attention_tree(q, k, v, chain, window_size=(20, 0), return_lse=True)
    assert mx.allclose(out, expected, atol=1e-6)
    assert mx.allclose(tree_lse, lse, atol=1e-5)


def test_each_path_of_a_tree_gives_what_its_tokens_give_as_a_chain():
    parents = golden("speculative.json")["tree"]["parents"]
    q, k, v = random_arrays(4, (1, 2, 7, 16), (1, 2, 47, 16), (1, 2, 47, 16))
    out = mfa.flash_attention_tree(q, k, v, parents)
    for leaf in (3, 4, 6):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        keys = mx.array(list(range(40)) + [40 + node for node in path])
        alone = mfa.flash_attention(q[:, :, mx.array(path)], k[:, :, keys], v[:, :, keys], causal=True)
        assert mx.allclose(out[:, :, leaf], alone[:, :, -1], atol=1e-6)


def test_what_a_tree_hides_is_not_read():
    q, k, v = random_arrays(5, (2, 2, 3, 16), (2, 2, 40, 16), (2, 2, 40, 16))
    lengths = [40, 21]
    expected = mfa.flash_attention_tree(q, k, v, [-1, 0, 0], kv_lengths=lengths)
    behind = (mx.arange(40)[None, :] >= mx.array(lengths)[:, None])[:, None, :, None]
    poisoned = [mx.where(behind, mx.array(float("nan")), x) for x in (k, v)]
    assert mx.array_equal(mfa.flash_attention_tree(q, *poisoned, [-1, 0, 0], kv_lengths=lengths), expected)
    # A node that another does not see: the sibling and what hangs on it stay finite.
    for x in poisoned:
        x[:, :, 38] = float("nan")
    k_bad, v_bad = k.at[:, :, 38].add(float("nan")), v.at[:, :, 38].add(float("nan"))
    out = mfa.flash_attention_tree(q, k_bad, v_bad, [-1, -1, 0])
    whole = mfa.flash_attention_tree(q, k, v, [-1, -1, 0])
    assert mx.array_equal(out[:, :, 0], whole[:, :, 0])
    assert mx.isnan(out[:, :, 1]).all()
    assert mx.array_equal(out[:, :, 2], whole[:, :, 2])


def test_a_tree_reads_its_cache_in_place(peak_bytes):
    q, k, v = random_arrays(6, (2, 4, 8, 64), (2, 2, 20_000, 64), (2, 2, 20_000, 64))
    mx.eval(q, k, v)
    chain = list(range(-1, 7))
    for lengths in (None, [20_000, 15_000]):
        peak = peak_bytes(lambda: mx.eval(mfa.flash_attention_tree(q, k, v, chain, kv_lengths=lengths)))  # noqa: B023
        assert peak < k.nbytes / 8


def test_trees_given_as_lists_and_arrays_of_any_integer_dtype_agree():
    q, k, v = random_arrays(5, (2, 2, 3, 16), (2, 2, 10, 16), (2, 2, 10, 16))
    expected = mfa.flash_attention_tree(q, k, v, [[-1, 0, 1], [-1, 0, 0]])
    for dtype in (mx.int8, mx.int32, mx.int64):
        parents = mx.array([[-1, 0, 1], [-1, 0, 0]], dtype)
        assert mx.array_equal(mfa.flash_attention_tree(q, k, v, parents), expected)
    backwards = mx.array([[1, 0, -1], [0, 0, -1]])[:, ::-1]
    assert mx.array_equal(mfa.flash_attention_tree(q, k, v, backwards), expected)


MISTAKES = {
    "a parent after its child": ({"parents": [-1, 2, 0]}, "the parent of node 1 must be a node before it or -1; got 2"),
    "its own parent": ({"parents": [-1, 1, 0]}, "the parent of node 1 must be a node before it or -1; got 1"),
    "below -1": ({"parents": [-2, 0, 0]}, "the parent of node 0 must be a node before it or -1; got -2"),
    "fractions": ({"parents": [-1.0, 0.0, 0.0]}, "parents must have an integer dtype; got float32"),
    "rank 3": ({"parents": [[[-1, 0, 0]]]}, r"parents must have shape \[N\] or \[B, N\]; got \(1,1,3\)"),
    "another count": ({"parents": [-1, 0]}, r"parents must have shape .* of q, \(3\) or \(2,3\); got \(2\)"),
    "another batch": ({"parents": [[-1, 0, 0]]}, r"parents must have shape .*; got \(1,3\)"),
    "fewer keys than nodes": (
        {"k": mx.zeros((2, 2, 2, 8)), "v": mx.zeros((2, 2, 2, 8))},
        "k and v must hold the 3 nodes of the tree; got 2 tokens",
    ),
    "other length of v": ({"v": mx.zeros((2, 2, 8, 8))}, "k and v must have the same length; got 9 and 8"),
    "lengths without the tree": (
        {"kv_lengths": [9, 2]},
        r"kv_lengths must be in \[N, Nk\] = \[3, 9\]; got 2 for batch entry 1",
    ),
    "lengths past the cache": ({"kv_lengths": [10, 5]}, r"kv_lengths must be in \[N, Nk\] = \[3, 9\]; got 10"),
    "a length too few": ({"kv_lengths": [9]}, r"kv_lengths must have shape \(2,\), one length for each batch entry"),
    "q of rank 3": ({"q": mx.zeros((4, 3, 8))}, "q, k and v must have 4 dimensions"),
    "heads": ({"q": mx.zeros((2, 3, 3, 8))}, "the heads of q must be a multiple"),
    "sinks of key heads": ({"sinks": mx.zeros(2)}, r"sinks must have shape \(4,\), one value for each head"),
    "slopes of key heads": ({"alibi_slopes": mx.zeros(2)}, r"alibi_slopes must have shape \(4,\)"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_a_tree_is_refused(mistake, request):
    if mistake.startswith("lengths"):
        request.getfixturevalue("on_cpu")  # GPUs clip lengths rather than wait for their values
    change, words = MISTAKES[mistake]
    arguments = {
        "q": mx.zeros((2, 4, 3, 8)),
        "k": mx.zeros((2, 2, 9, 8)),
        "v": mx.zeros((2, 2, 9, 8)),
        "parents": [-1, 0, 0],
    }
    mfa.flash_attention_tree(**arguments)
    with pytest.raises(ValueError, match=rf"^\[flash_attention_tree\] .*{words}"):
        mfa.flash_attention_tree(**(arguments | change))


def test_random_malformed_trees_are_refused_or_run(seed):
    rng = np.random.default_rng(seed)
    q, k, v = random_arrays(1, (1, 1, 4, 8), (1, 1, 6, 8), (1, 1, 6, 8))
    refused = 0
    for _ in range(10_000):
        parents = rng.choice((-(2**62), -2, -1, 0, 1, 2, 3, 4, 2**40), size=4)
        expected = all(-1 <= up < i for i, up in enumerate(parents))
        try:
            out = mfa.flash_attention_tree(q, k, v, mx.array(parents))
        except ValueError:
            refused += 1
            assert not expected
        else:
            assert expected
            assert out.shape == q.shape
    assert refused > 5000


def test_traced_parents_are_refused():
    q, k, v = random_arrays(5, (1, 2, 3, 16), (1, 2, 10, 16), (1, 2, 10, 16))
    with pytest.raises(ValueError, match="parents must be known when the graph is built"):
        mx.compile(lambda parents: mfa.flash_attention_tree(q, k, v, parents))(mx.array([-1, 0, 0]))


# ---------------------------------------------------------------------------------------------- the proxy


def verify_sizes(rng):
    while True:
        B, Hkv, G = int(rng.integers(1, 4)), int(rng.choice((1, 2, 3))), int(rng.choice((1, 1, 2, 4)))
        N, Nk = int(rng.choice((1, 2, 5, 9, 17))), int(rng.choice((1, 7, 33, 64, 129, 300)))
        if B * Hkv * G * N * Nk <= 1e5:
            D, Dv = (int(rng.choice((1, 8, 17, 40, 64, 128))) for _ in range(2))
            return B, Hkv * G, Hkv, N, Nk, D, Dv


@needs_kernels
@pytest.mark.parametrize("block", BLOCKS)
def test_random_verifications_are_attention(block, seed):
    def check(rng, index):
        case = random_case(rng, verify_sizes)
        B, _, _, N, _, _, _ = case.problem.shape

        def call(x):
            return mfa.flash_attention_speculative_verify(
                x["q"], x["k"], x["v"], mx.zeros((B, N), mx.int32), **keywords(case.problem, x)
            )[:2]

        check_entry(case, case.arrays, call, seed=index)

    run_block(block, seed, check)


@needs_kernels
@cpu_kernels_only
@pytest.mark.parametrize("block", BLOCKS)
def test_random_verifications_over_pages_are_attention(block, seed):
    def check(rng, index):
        N = int(rng.choice((1, 2, 5, 9, 17)))
        case, pools, arguments = caches.random_paged(rng, N)
        p = case.problem
        options = caches.keywords(p)
        del options["return_lse"]

        def call(x):
            q, k, v = (x.pop(n) for n in "qkv")
            ids = mx.zeros((len(pools.lengths), N), mx.int32)
            return mfa.flash_attention_speculative_verify_paged(
                q, k, v, mx.array(pools.table), mx.array(pools.lengths), ids, **options, **(arguments | x)
            )[:2]

        inputs = caches.paged_inputs(p, pools, arguments, p.q)
        check_entry(case, inputs, call, caches.paged_parts(pools, arguments, p.k.shape[2]), seed=index)

    run_block(block, seed, check)


def test_verify_returns_attention_and_the_documented_proxy():
    p = make_problem(3, B=2, Hq=4, Hkv=2, Nq=5, Nk=40, D=16, Dv=12, causal=True)
    arrays = make_case(p).arrays
    ids = np.array([[0, 3, 11, 12, -1], [7, 1000, 5, 2, 2]])
    for dtype in (mx.int32, mx.int16, mx.int64):
        given = mx.array(ids).astype(dtype)
        out, lse, proxy = mfa.flash_attention_speculative_verify(
            arrays["q"], arrays["k"], arrays["v"], given, temperature=0.5
        )
        answer = oracle.exact(p)
        logits = answer.o.mean(axis=1) / 0.5
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = np.take_along_axis(expected, ids.clip(0, 11)[..., None], 2)[..., 0]
        assert np.abs(to_numpy(out) - answer.o).max() < 1e-5
        assert np.abs(np.array(lse) * oracle.LN2 - answer.lse).max() < 1e-5
        assert proxy.dtype == mx.float32
        assert np.abs(np.array(proxy) - expected).max() < 1e-5


@needs_kernels
@cpu_kernels_only
def test_verify_of_pages_is_verify_of_the_same_keys():
    page, lengths = 8, [20, 13]
    q, k, v = random_arrays(3, (2, 4, 3, 16), (2, 2, 24, 16), (2, 2, 24, 16))
    table = mx.array([[4, 0, 2], [5, 1, 3]], mx.int32)
    pools = []
    for x in (k, v):
        pages = x.reshape(2, 2, 3, page, 16).transpose(0, 2, 3, 1, 4).reshape(6, page, 2, 16)
        pool = mx.zeros_like(pages)
        pool[table.reshape(-1)] = pages
        pools.append(pool)
    ids = mx.array([[1, 2, 3], [15, 16, -1]])
    options = {"temperature": 0.7, "softcap": 3.0}
    mine = mfa.flash_attention_speculative_verify_paged(q, *pools, table, lengths, ids, block_size=page, **options)
    expected = mfa.flash_attention_speculative_verify(q, k, v, ids, kv_lengths=lengths, **options)
    assert all(mx.array_equal(a, b) for a, b in zip(mine, expected))
    with pytest.raises(ValueError, match=r"^\[flash_attention_speculative_verify_paged\] temperature must be finite"):
        mfa.flash_attention_speculative_verify_paged(q, *pools, table, lengths, ids, temperature=0)


def test_verify_takes_the_modifiers():
    q, k, v = random_arrays(3, (1, 2, 3, 16), (1, 2, 20, 16), (1, 2, 20, 16))
    options = {"scale": 0.4, "causal": False, "softcap": 3.0, "window_size": (5, 2), "kv_lengths": [17]}
    out, lse, _ = mfa.flash_attention_speculative_verify(q, k, v, mx.zeros((1, 3), mx.int32), **options)
    expected = mfa.flash_attention(q, k, v, return_lse=True, **options)
    assert mx.array_equal(out, expected[0])
    assert mx.array_equal(lse, expected[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"draft_ids": mx.zeros((1, 3))}, "draft_ids must have an integer dtype; got float32"),
        (
            {"draft_ids": mx.zeros((3,), mx.int32)},
            r"draft_ids must have shape \[B, N\] of the queries, \(1,3\); got \(3\)",
        ),
        ({"draft_ids": mx.zeros((1, 4), mx.int32)}, r"draft_ids must have shape .* got \(1,4\)"),
        ({"temperature": 0.0}, "temperature must be finite and positive; got 0"),
        ({"temperature": -1.0}, "temperature must be finite and positive; got -1"),
        ({"temperature": float("nan")}, "temperature must be finite and positive; got nan"),
        ({"temperature": float("inf")}, "temperature must be finite and positive; got inf"),
    ],
)
def test_mistake_in_verify_is_refused(change, words):
    q, k, v = random_arrays(3, (1, 2, 3, 16), (1, 2, 20, 16), (1, 2, 20, 16))
    arguments = {"q_target": q, "k_cache": k, "v_cache": v, "draft_ids": mx.zeros((1, 3), mx.int32)}
    with pytest.raises(ValueError, match=rf"^\[flash_attention_speculative_verify\] {words}"):
        mfa.flash_attention_speculative_verify(**(arguments | change))
