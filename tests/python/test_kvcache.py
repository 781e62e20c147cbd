"""flash_attention_kvcache, its rope_append form and append_to_cache: against the float64 oracle, and in place."""

import ctypes

import mlx.core as mx
import mlx_mfa as mfa
import numpy as np
import pytest
from caches import case_of, keywords, make_pools, make_problem, random_options, random_sizes
from entry_points import BLOCKS, check_entry, run_block
from problems import cpu_kernels_only, needs_kernels, normal, to_mlx, to_numpy
from rotary import RotaryRule, rotate, tables

pytestmark = [needs_kernels, cpu_kernels_only]

POSITIONS = 256
RENAMED = {"alibi_slopes": "alibi", "attn_bias": "bias"}
KINDS = ("grows", "preallocated", "pool")


class Cache:
    """A cache of random kind with ``before[b]`` keys and room for more, and the call's arguments that say so.

    ``index`` gives, for each token of the cache, the row of ``[B * Nk]`` that it holds; the last row is NaN.
    """

    def __init__(self, rng, kind, before, added, Nk, remaps):
        B, self.kind, self.before, self.arguments = len(before), kind, before, {}
        rows = np.arange(B * Nk).reshape(B, Nk)
        nothing = B * Nk
        order, count = np.arange(B), B
        if remaps:
            order, count = rng.permutation(B + 2)[:B], B + 2
            self.arguments["cache_batch_idx"] = mx.array(order)
        lengths = np.full(count, 10**6, np.int32)
        lengths[order] = before
        if kind == "pool":
            # Pages with room for the new tokens; each token's place is found by asking where its number went.
            places = np.arange(B * Nk, dtype=np.float64).reshape(B, 1, Nk, 1)
            pools = make_pools(rng, places, places, before + added, int(rng.choice((1, 2, 7, 16, 32))))
            held = np.isfinite(pools.k[..., 0, 0])
            self.index = np.where(held, np.nan_to_num(pools.k[..., 0, 0]), nothing).astype(np.int64)
            self.index[self.index % Nk >= np.append(before, 0)[self.index // Nk]] = nothing
            table = np.full((count, pools.table.shape[1]), -1, np.int32)
            table[order] = pools.table
            self.arguments |= {"block_table": mx.array(table), "seq_lens": mx.array(lengths)}
            self.keys, self.places = pools.keys, pools
        else:
            capacity = int(before[0]) if kind == "grows" else int((before + added).max()) + int(rng.integers(0, 4))
            capacity = max(capacity, 1) if kind == "preallocated" else capacity
            self.index = np.full((count, capacity), nothing)
            for b, n in enumerate(before):
                self.index[order[b], :n] = rows[b, :n]
            if kind == "preallocated":
                self.arguments["seq_lens"] = mx.array(lengths)
            self.keys, self.order = (capacity + added if kind == "grows" else capacity), order
        self.new = np.stack([rows[b, n : n + added] for b, n in enumerate(before)]) if added else None

    def of(self, x):
        """The cache that holds ``x`` ``[B, H, Nk, D]``, NaN where it holds nothing."""
        cache = self._rows(x)[mx.array(self.index)]
        return cache if self.kind == "pool" else cache.swapaxes(1, 2)

    def new_of(self, x):
        return None if self.new is None else self._rows(x)[mx.array(self.new)].swapaxes(1, 2)

    @staticmethod
    def _rows(x):
        B, H, Nk, D = x.shape
        flat = x.swapaxes(1, 2).reshape(B * Nk, H, D)
        return mx.concatenate([flat, mx.full((1, H, D), mx.nan, x.dtype)])

    def read(self, cache, total):
        """``[B, H, Nk, D]`` of a returned cache, 0 behind the keys; the rest must hold what it held."""
        cache = to_numpy(cache) if self.kind == "pool" else to_numpy(cache).swapaxes(1, 2)
        out = np.zeros((len(total), cache.shape[2], max(1, total.max()), cache.shape[3]))
        held = np.zeros(cache.shape[:2], bool)
        for b, n in enumerate(total):
            for j in range(n):
                if self.kind == "pool":
                    size = self.places.page_size
                    at = self.places.table[b, j // size], j % size
                else:
                    at = self.order[b], j
                out[b, :, j], held[at] = cache[at], True
        assert np.isnan(cache[~held]).all(), "written where no sequence has a token"
        return out


def unturned(x, back):
    return x


def random_call(rng, function):
    """A problem, its cache and the call's arguments; how q and k are turned, and whether k is at load; the lengths."""
    B, sizes = random_sizes(rng)
    kind, rotated = str(rng.choice(KINDS)), function is not mfa.flash_attention_kvcache
    appends = bool(rng.random() < 0.6) or rotated
    if function is mfa.flash_attention_rope_unified:  # it reads pools, and appends to the others
        appends = kind != "pool"
    remaps = bool(rng.random() < 0.3) and not (kind == "grows" and appends)
    added = int(rng.choice((1, 2, 9, 33))) if appends else 0
    before = np.full(B, rng.choice((0, 1, 16, 40))) if kind == "grows" else rng.choice((0, 1, 7, 16, 31, 64), B)
    if kind == "grows" and not appends:
        before = np.maximum(before, 1)
    total = before + added
    Nq = added if appends and rng.random() < 0.7 else int(rng.choice((1, 3, 20)))
    p = make_problem(rng, total, Nq=Nq, **sizes)
    Nk = p.k.shape[2]
    cache = Cache(rng, kind, before, added, Nk, remaps)
    options, arguments = random_options(rng, B, sizes["Hq"], Nq, Nk, cache.keys)
    for name, value in options.items():
        setattr(p, name, value)
    given, turn_q, turn_k, at_load = dict(cache.arguments), unturned, unturned, True
    if rng.random() < 0.5 or rotated:
        cos, sin = tables(POSITIONS, 2 * int(rng.integers(1, sizes["D"] // 2 + 1)))
        interleaved = bool(rng.random() < 0.5)
        q_first, new_first = np.maximum(0, total - Nq), before
        if rng.random() < 0.4:
            q_first = new_first = rng.integers(0, POSITIONS - 65, B)
            given["cache_seqlens"] = mx.array(q_first)
        at_load = kind == "grows" and not appends
        if rng.random() < 0.2:
            at_load = not at_load
            given["rotate_cached_keys"] = at_load
        given |= {"rotary_cos": mx.array(cos), "rotary_sin": mx.array(sin), "interleaved": interleaved}

        def turn_q(x, back):
            return rotate(x, cos, sin, q_first, interleaved, back)

        def turn_k(x, back):
            if at_load:
                return rotate(x, cos, sin, np.zeros(B, int), interleaved, back)
            turned, j = rotate(x, cos, sin, new_first - before, interleaved, back), np.arange(Nk)
            return np.where((j >= before[:, None])[:, None, :, None], turned, x)

    label = f"{kind} {sizes} before {before} added {added} Nq {Nq} remaps {remaps} {sorted(options)} {sorted(given)}"
    return case_of(rng, p, label), cache, given, arguments, turn_q, turn_k, at_load, total


@pytest.mark.parametrize(
    "function",
    [mfa.flash_attention_kvcache, mfa.flash_attention_kvcache_rope_append, mfa.flash_attention_rope_unified],
)
@pytest.mark.parametrize("block", BLOCKS)
def test_random_caches_are_within_the_error_rule(block, function, seed):
    def check(rng, index):
        case, cache, given, arguments, turn_q, turn_k, at_load, total = random_call(rng, function)
        p = case.problem

        def attend(x):
            q, k, v = (x.pop(n) for n in "qkv")
            options = given | keywords(p) | arguments | x
            if function is mfa.flash_attention_kvcache:
                return function(q, cache.of(k), cache.of(v), k_new=cache.new_of(k), v_new=cache.new_of(v), **options)
            if cache.new is None:  # rope_unified over pages
                return function(q, cache.of(k), cache.of(v), **options)
            # An empty cache that grows may be left out.
            old = (None, None) if cache.kind == "grows" and index % 2 and not cache.before.any() else (k, v)
            old = dict(zip(("k_cache", "v_cache"), (x if x is None else cache.of(x) for x in old)))
            if function is mfa.flash_attention_rope_unified:
                old["return_updated_cache"] = True
            return function(q, cache.new_of(k), cache.new_of(v), **old, **options)

        inputs = {n: to_mlx(getattr(p, n), p.dtype) for n in "qkv"}
        if cache.new is not None:
            _, _, k, v = attend(dict(inputs))
            tolerance = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}[p.dtype]
            expected = p.k if at_load else turn_k(p.k, False)
            for b, n in enumerate(total):
                expected[b, :, n:] = 0
            held = cache.read(k, total)
            assert np.abs(held - expected).max() <= tolerance * max(1, np.abs(expected).max())
            assert np.array_equal(cache.read(v, total), p.v)
            if not at_load:  # attention gets what is stored, rounded to the dtype of the cache
                turn_back, turn_k = turn_k, lambda x, back: turn_back(x, True) if back else held
        inputs |= {n: x for n, x in arguments.items() if mx.issubdtype(x.dtype, mx.floating)}
        parts = {n: lambda g, n=n: {RENAMED[n]: g} for n in arguments if n in RENAMED}
        Nk = p.k.shape[2]
        parts["attn_bias"] = lambda g: {"bias": g if g.shape[-1] == 1 else g[..., :Nk]}
        rule = RotaryRule(p, case.d_o, case.dlse, index, turn_q, turn_k)
        check_entry(case, inputs, lambda x: attend(x)[:2], parts, rule=rule)

    run_block(block, seed, check)


# ---------------------------------------------------------------------------------------------- in place


def address(x):
    mx.eval(x)
    return np.array(x, copy=False).__array_interface__["data"][0]


def rows(*shape, dtype="float32", seed=1):
    return to_mlx(normal(np.random.default_rng(seed), shape, dtype), dtype)


@pytest.mark.parametrize("kind", ["preallocated", "pool", "remapped"])
@pytest.mark.parametrize("rope", [False, True])
def test_steps_of_decoding_write_into_the_cache(kind, rope):
    B, H, D = 2, 2, 16
    table = mx.array([[5, 1, 3], [0, 4, 2]])
    shape = (6, 16, H, D) if kind == "pool" else (B + (kind == "remapped"), H, 48, D)
    k_cache, v_cache = mx.zeros(shape), mx.zeros(shape)
    where = {"pool": {"block_table": table}, "preallocated": {}, "remapped": {"cache_batch_idx": [2, 0]}}[kind]
    cos, sin = map(mx.array, tables(POSITIONS, D))
    rotation = {"rotary_cos": cos, "rotary_sin": sin} if rope else {}
    places = address(k_cache), address(v_cache)
    lengths = np.array([0, 0, 0])[: B + (kind == "remapped")]
    k_all, v_all = rows(B, H, 30, D), rows(B, H, 30, D, seed=2)
    q_all = rows(B, 4, 30, D, seed=3)
    outputs = []
    for first, n in ((0, 20), (20, 1), (21, 1), (22, 8)):
        part = slice(first, first + n)
        out, k_cache, v_cache = mfa.flash_attention_kvcache(
            q_all[:, :, part], k_cache, v_cache, k_new=k_all[:, :, part], v_new=v_all[:, :, part],
            seq_lens=lengths.tolist(), **where, **rotation,
        )  # fmt: skip
        mx.eval(out, k_cache, v_cache)
        outputs.append(out)
        lengths = lengths + n
        assert (address(k_cache), address(v_cache)) == places
    if rope:
        expected = mfa.flash_attention_rope(q_all, k_all, v_all, cos, sin, causal=True)
    else:
        expected = mfa.flash_attention(q_all, k_all, v_all, causal=True)
    assert mx.allclose(mx.concatenate(outputs, axis=2), expected, rtol=1e-4, atol=1e-5).item()


def test_a_cache_that_is_held_elsewhere_keeps_its_values():
    cache, new = mx.zeros((1, 2, 8, 4)), rows(1, 2, 1, 4)
    mx.eval(cache)
    appended = mfa.append_to_cache(cache, new, [3])
    assert address(appended) != address(cache)
    assert mx.all(cache == 0).item()
    assert mx.array_equal(appended[:, :, 3:4], new).item()


def test_one_array_as_both_caches_is_copied():
    cache, new = mx.zeros((1, 2, 8, 4)), rows(1, 2, 1, 4)
    _, k, v = mfa.flash_attention_kvcache(new, cache, cache, k_new=new, v_new=2 * new, seq_lens=[0])
    del cache
    mx.eval(k, v)
    assert mx.array_equal(2 * k, v).item()


def test_appending_in_place_takes_memory_for_the_rows_alone(peak_bytes):
    cache = mx.zeros((1, 8, 4096, 64))
    pool = mx.zeros((256, 16, 8, 64))
    new, table = rows(1, 8, 1, 64), mx.arange(256)[None]
    mx.eval(cache, pool, new, table)
    size = cache.nbytes

    def step():
        nonlocal cache, pool
        cache = mfa.append_to_cache(cache, new, [100])
        pool = mfa.append_to_cache(pool, new, [100], table)
        mx.eval(cache, pool)

    assert peak_bytes(step) < size // 100
    held = cache
    assert peak_bytes(step) >= size
    assert mx.array_equal(held, cache).item()


def test_views_are_appended_to_a_copy_of_their_own():
    parent = mx.zeros((2, 8, 3, 4))
    view = parent[:, :6].swapaxes(1, 2)
    new = rows(2, 3, 2, 4)
    appended = mfa.append_to_cache(view, new, [0, 4])
    del view
    mx.eval(appended)
    assert mx.all(parent == 0).item()
    assert mx.array_equal(appended[1, :, 4:], new[1]).item()
    broadcast = mfa.append_to_cache(mx.broadcast_to(mx.zeros((1, 3, 1, 1)), (2, 3, 6, 4)), new, [0, 4])
    assert mx.array_equal(broadcast, appended).item()


def test_an_append_that_does_not_fit_writes_nothing():
    new = rows(2, 2, 2, 4)
    cache = mx.zeros((2, 2, 8, 4))
    place = address(cache)
    starts = mx.array([0, 6]) + mx.array([0, 1])  # not known before it is evaluated
    cache = mfa.append_to_cache(cache, new, starts)
    with pytest.raises(RuntimeError, match="sequences must have room for their lengths and the 2 new tokens, 8 in all"):
        mx.eval(cache)
    assert not any(ctypes.string_at(place, 2 * 2 * 8 * 4 * 4))  # `cache` still holds the memory
    written = mfa.append_to_cache(mx.zeros((2, 2, 8, 4)), new, mx.array([0, 6]) + 0)  # the stream goes on
    assert any(ctypes.string_at(address(written), 2 * 2 * 8 * 4 * 4))


# What attention alone would refuse, once rows are in the cache: computed values, so that the evaluation refuses them.
REFUSED_STEPS = {
    "positions of queries": ({"cache_seqlens": 10, "queries": 6}, "the positions of queries must lie in"),
    "positions of new keys": ({"cache_seqlens": 12}, "the positions of new keys must lie in"),
    "positions of cached keys": ({"rotate_cached_keys": True, "seq_lens": 12}, "the positions of keys must lie in"),
    "an older page": ({"block_table": [[7, 1, 2, 3]], "seq_lens": 5}, "for the keys that a sequence has; got 7"),
    "no room": ({"seq_lens": 16}, "sequences must have room for"),
    "an index behind the cache": ({"cache_batch_idx": 1}, "cache_batch_idx must be in"),
}


@pytest.mark.parametrize("refused", REFUSED_STEPS)
def test_a_step_that_is_refused_when_it_is_evaluated_writes_nothing(refused):
    changes, message = REFUSED_STEPS[refused]
    changes = dict(changes)
    q = rows(1, 2, changes.pop("queries", 1), 8)
    new = rows(1, 2, 1, 8)
    table = changes.pop("block_table", None)
    shape = (4, 4, 2, 8) if table else (1, 2, 16, 8)
    caches = [mx.zeros(shape), mx.zeros(shape)]
    places = [address(x) for x in caches]
    options = {name: mx.array([x]) + 0 if type(x) is int else x for name, x in ({"seq_lens": 5} | changes).items()}
    if table:
        options["block_table"] = mx.array(table) + 0
    else:
        cos = mx.ones((12, 4))
        options |= {"rotary_cos": cos, "rotary_sin": cos}
    mx.eval(q, new)
    results = mfa.flash_attention_kvcache(q, *caches, k_new=new, v_new=new, **options)
    caches.clear()
    with pytest.raises(RuntimeError, match=message):
        mx.eval(results)
    for place in places:
        assert not any(ctypes.string_at(place, 16 * 2 * 8 * 4))
    del results


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_new_rows_are_cast_to_the_cache(dtype):
    cache = mx.zeros((1, 2, 8, 4), getattr(mx, dtype))
    new = rows(1, 2, 3, 4)
    out, k, v = mfa.flash_attention_kvcache(new, cache, cache, k_new=new, v_new=new, seq_lens=[2])
    assert out.dtype == mx.float32
    assert k.dtype == v.dtype == cache.dtype
    assert mx.array_equal(k[:, :, 2:5], new.astype(cache.dtype)).item()


def test_the_first_step_needs_no_cache():
    q, k, v = rows(2, 4, 5, 8), rows(2, 2, 5, 8, seed=2), rows(2, 2, 5, 6, seed=3)
    out, k_cache, v_cache = mfa.flash_attention_kvcache(q, None, None, k_new=k, v_new=v)
    assert mx.array_equal(out, mfa.flash_attention(q, k, v, causal=True)).item()
    assert mx.array_equal(k_cache, k).item()
    assert mx.array_equal(v_cache, v).item()


def test_the_rope_append_form_grows_caches_as_one_call_would():
    q, k, v = rows(1, 4, 12, 8), rows(1, 2, 12, 8, seed=2), rows(1, 2, 12, 8, seed=3)
    cos, sin = map(mx.array, tables(POSITIONS, 8))
    k_cache = v_cache = None
    outputs = []
    for part in (slice(0, 7), slice(7, 8), slice(8, 12)):
        out, k_cache, v_cache = mfa.flash_attention_kvcache_rope_append(
            q[:, :, part], k[:, :, part], v[:, :, part], k_cache, v_cache, cos, sin, part.start
        )
        outputs.append(out)
    expected = mfa.flash_attention_rope(q, k, v, cos, sin, causal=True)
    assert mx.allclose(mx.concatenate(outputs, axis=2), expected, rtol=1e-4, atol=1e-5).item()
    assert k_cache.shape == k.shape


# ---------------------------------------------------------------------------------------------- derivatives and maps


def test_what_is_overwritten_has_no_gradient():
    cache, new = rows(2, 2, 8, 4), rows(2, 2, 3, 4)
    weights = rows(2, 2, 8, 4, seed=5)

    def loss(cache, new):
        return (mfa.append_to_cache(cache, new, [1, 4]) * weights).sum()

    d_cache, d_new = mx.grad(loss, argnums=(0, 1))(cache, new)
    expected = mfa.append_to_cache(weights, mx.zeros((2, 2, 3, 4)), [1, 4])
    assert mx.array_equal(d_cache, expected).item()
    assert mx.array_equal(d_new[0], weights[0, :, 1:4]).item()
    assert mx.array_equal(d_new[1], weights[1, :, 4:7]).item()


def test_appending_is_linear_in_every_order_of_derivative():
    cache, new = rows(1, 2, 8, 4), rows(1, 2, 3, 4)
    cos, sin = map(mx.array, tables(POSITIONS, 4))
    q = rows(1, 2, 3, 4, seed=9)

    def stored(cache, new):
        return mfa.flash_attention_kvcache(
            q, cache, cache, k_new=new, v_new=new, seq_lens=[2], rotary_cos=cos, rotary_sin=sin
        )[1]

    def energy(new):
        return (stored(cache, new) ** 2).sum()

    _, tangents = mx.jvp(stored, [cache, new], [2 * cache, 2 * new])
    assert mx.allclose(tangents[0], 2 * stored(cache, new), atol=1e-6).item()
    # Rotation keeps lengths, so the gradient of the energy is twice the rows, and that of its sum is 2.
    assert mx.allclose(mx.grad(energy)(new), 2 * new, atol=1e-5).item()
    assert mx.allclose(mx.grad(lambda x: mx.grad(energy)(x).sum())(new), mx.full(new.shape, 2.0), atol=1e-5).item()


def test_works_under_compile_checkpoint_vmap_and_async_eval():
    q, new = rows(2, 4, 3, 8), rows(2, 2, 3, 8, seed=2)
    pool, table = rows(8, 4, 2, 8, seed=3), mx.array([[5, 1], [0, 4], [7, 2]])

    def function(q, pool, new, table, lengths, order):
        return mfa.flash_attention_kvcache(
            q, pool, pool, k_new=new, v_new=new, block_table=table, seq_lens=lengths, cache_batch_idx=order
        )

    arguments = (q, pool, new, table, mx.array([3, 0, 5]), mx.array([2, 0]))
    expected = function(*arguments)
    compiled = mx.compile(function)(*arguments)
    mx.async_eval(compiled)
    for x, y, z in zip(compiled, mx.checkpoint(function)(*arguments), expected):
        assert mx.array_equal(x, z).item()
        assert mx.array_equal(y, z).item()
    mapped = mx.vmap(function, in_axes=(None, None, 0, None, None, 0))(
        q, pool, mx.stack([new, 2 * new]), table, mx.array([3, 0, 5]), mx.array([[2, 0], [1, 0]])
    )
    for x, y in zip(mapped, expected):
        assert mx.array_equal(x[0], y).item()
    other = function(q, pool, 2 * new, table, mx.array([3, 0, 5]), mx.array([1, 0]))
    for x, y in zip(mapped, other):
        assert mx.array_equal(x[1], y).item()


def test_steps_that_overlap_are_right():
    """Steps that are not waited for may copy the cache, but never write what a step before still reads."""
    H, D, steps = 2, 16, 40
    k_cache, v_cache = mx.zeros((1, H, 64, D)), mx.zeros((1, H, 64, D))
    q, k, v = rows(1, H, steps, D), rows(1, H, steps, D, seed=2), rows(1, H, steps, D, seed=3)
    outputs = []
    for t in range(steps):
        out, k_cache, v_cache = mfa.flash_attention_kvcache(
            q[:, :, t : t + 1], k_cache, v_cache, k_new=k[:, :, t : t + 1], v_new=v[:, :, t : t + 1], seq_lens=[t]
        )
        mx.async_eval(out, k_cache, v_cache)
        outputs.append(out)
    expected = mfa.flash_attention(q, k, v, causal=True)
    assert mx.allclose(mx.concatenate(outputs, axis=2), expected, rtol=1e-5, atol=1e-5).item()


# ---------------------------------------------------------------------------------------------- bad input

MISTAKES = {
    "q of rank 3": ({"q": (2, 9, 8)}, "q must have 4 dimensions"),
    "one cache": ({"v_cache": None}, "k_cache and v_cache must be given together"),
    "one new array": ({"v_new": None}, "k_new and v_new must be given together"),
    "one table": ({"rotary_cos": (16, 4)}, "rotary_cos and rotary_sin must be given together"),
    "neither cache nor keys": ({"k_cache": None, "v_cache": None, "k_new": None, "v_new": None, "seq_lens": None},
                               "a cache or new keys must be given"),
    "cache of rank 3": ({"k_cache": (2, 16, 8)}, r"k_cache must have 4 dimensions \[B, Hkv, S, D\]; got shape"),
    "other caches": ({"v_cache": (2, 2, 15, 8)}, "k_cache and v_cache must differ in their last axis alone"),
    "lengths without cache": ({"k_cache": None, "v_cache": None}, "a cache with seq_lens must be given"),
    "table without lengths": ({"block_table": [[0], [1]], "seq_lens": None}, "a block_table needs seq_lens"),
    "other batch": ({"q": (3, 2, 3, 8)}, "q must have one batch entry for each of the 2 rows of the cache; got 3"),
    "count of lengths": ({"seq_lens": [1, 2, 3]}, "seq_lens must have one length for each of the 2 rows of the cache"),
    "float lengths": ({"seq_lens": [1.0, 2.0]}, "seq_lens must have an integer dtype"),
    "no room": ({"seq_lens": [13, 14]}, "sequences must have room for their lengths and the 3 new tokens, 16 in all; "
                                        "got length 14 for sequence 1"),
    "negative length": ({"seq_lens": [-1, 0]}, "got length -1 for sequence 0"),
    "new rows of rank 3": ({"k_new": (2, 3, 8)}, "k_new and v_new must have 4 dimensions"),
    "new heads": ({"k_new": (2, 4, 3, 8)}, "k_new must have the batch of q, and the heads and head dimension of the "
                                           r"cache, \[2, 2, N, 8\]; got shape \(2,4,3,8\)"),
    "new lengths": ({"v_new": (2, 2, 2, 8)}, "k_new and v_new must have the same length; got 3 and 2"),
    "page size": ({"k_cache": (4, 8, 2, 8), "v_cache": (4, 8, 2, 8), "block_table": [[0], [1]], "block_size": 16},
                  "block_size must be the page size of the pools, 8; got 16"),
    "pages of no tokens": ({"k_cache": (4, 0, 2, 8), "v_cache": (4, 0, 2, 8), "block_table": [[0], [1]],
                            "seq_lens": [0, 0]}, "the page size of a pool must be positive; got 0"),
    "shared page": ({"k_cache": (4, 8, 2, 8), "v_cache": (4, 8, 2, 8), "block_table": [[1], [1]]},
                    "each page may be appended to once; got page 1 for sequences 0 and 1"),
    "missing page": ({"k_cache": (4, 8, 2, 8), "v_cache": (4, 8, 2, 8), "block_table": [[1], [-1]]},
                     r"block_table must name pages in \[0, 4\) for the tokens that are appended; got -1 at entry 0 of "
                     "sequence 1"),
    "remap of a cache that grows": ({"cache_batch_idx": [1, 0], "seq_lens": None},
                                    "cache_batch_idx selects rows of a preallocated cache with seq_lens; got a cache "
                                    "that grows"),
    "rows written twice": ({"cache_batch_idx": [1, 1]}, "each page may be appended to once; got page 1"),
    "index behind the cache": ({"cache_batch_idx": [0, 2]}, r"cache_batch_idx must be in \[0, 2\); got 2 at entry 1"),
    "count of indices": ({"cache_batch_idx": [0]}, "cache_batch_idx must have one row for each of the 2 batch entries"),
    "late position": ({"rotary_cos": (16, 4), "rotary_sin": (16, 4), "cache_seqlens": [0, 14]},
                      r"the positions of new keys must lie in the rotary tables, \[0, 16\); got \[14, 17\)"),
    "lengths twice": ({"kv_lengths": [1, 2]}, "unexpected keyword argument"),
    "backend": ({"backend": "composed", "cache_batch_idx": [0, 1]}, 'backend must be "auto" or "mfa"'),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_input_is_one_clear_error(mistake):
    changes, message = MISTAKES[mistake]
    arguments = {"q": (2, 2, 3, 8), "k_cache": (2, 2, 16, 8), "v_cache": (2, 2, 16, 8), "k_new": (2, 2, 3, 8),
                 "v_new": (2, 2, 3, 8), "seq_lens": [1, 2]} | changes  # fmt: skip
    for name in ("q", "k_cache", "v_cache", "k_new", "v_new", "rotary_cos", "rotary_sin"):
        if arguments.get(name) is not None:
            arguments[name] = mx.zeros(arguments[name])
    if "block_table" in arguments:
        arguments["block_table"] = mx.array(arguments["block_table"])
    expected = {"lengths twice": TypeError, "backend": RuntimeError}.get(mistake, ValueError)
    with pytest.raises(expected, match=message) as error:
        mfa.flash_attention_kvcache(**arguments)
    assert expected is TypeError or str(error.value).startswith("[flash_attention_kvcache] ")


@pytest.mark.parametrize("appended", [None, 0])
def test_remapped_rows_of_an_empty_cache_see_nothing(appended):
    cache = mx.zeros((3, 2, 0, 8))
    new = {} if appended is None else {"k_new": rows(1, 2, 0, 8), "v_new": rows(1, 2, 0, 8)}

    def attend(q):
        out = mfa.flash_attention_kvcache(q, cache, cache, cache_batch_idx=[1], seq_lens=[0, 0, 0], **new)
        return out if appended is None else out[0]

    q = rows(1, 2, 5, 8)
    assert not attend(q).any().item()
    assert not mx.grad(lambda q: attend(q).sum())(q).any().item()


@pytest.mark.parametrize(
    ("cache", "rows", "table", "message"),
    [
        ((1, 2, 4, 0), (1, 2, 1, 0), None, "the head dimension of the cache must be positive; got 0"),
        ((4, 2, 2, 0), (1, 2, 1, 0), [[0]], "the head dimension of the cache must be positive; got 0"),
        ((4, 0, 2, 8), (1, 2, 0, 8), [[0]], "the page size of a pool must be positive; got 0"),
    ],
)
def test_a_cache_without_room_for_a_number_is_refused(cache, rows, table, message):
    table = None if table is None else mx.array(table)
    with pytest.raises(ValueError, match=r"^\[append_to_cache\] " + message):
        mfa.append_to_cache(mx.zeros(cache), mx.zeros(rows), [0], table)


def test_random_starts_are_written_or_refused(seed):
    rng = np.random.default_rng(seed)
    new, accepted, cases = mx.ones((2, 1, 2, 4)), 0, 3000
    for _ in range(cases):
        table = rng.choice((-1, 0, 1, 2, 3, 4, 2**31 - 1, -(2**31)), (2, 3)).astype(np.int32)
        starts = rng.choice((0, 1, 2, 3, 4, 5, -1, 2**31 - 1, -(2**31)), 2).astype(np.int32)
        try:
            pool = mfa.append_to_cache(mx.zeros((5, 2, 1, 4)), new, mx.array(starts), mx.array(table))
        except ValueError:
            continue
        accepted += 1
        assert pool.sum().item() == new.size
    assert cases // 50 < accepted < cases // 2
