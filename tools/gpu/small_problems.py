"""Small problems through every kernel, forward and backward, for compute-sanitizer."""

import itertools

import mlx.core as mx
import mlx_mfa as mfa


def main() -> None:
    dtypes, head_dims = (
        (mx.bfloat16, mx.float16, mx.float32),
        ((64, 64), (128, 128), (120, 80), (33, 192), (256, 256), (576, 512)),
    )
    for dtype, (D, Dv) in itertools.product(dtypes, head_dims):
        for Nq, Nk, options in (
            (37, 70, {"causal": True}),
            (1, 700, {}),
            (66, 130, {"window_size": (20, 3), "softcap": 4.0, "dropout_p": 0.25, "dropout_seed": 3}),
        ):
            B, Hq, Hkv = 2, 4, 2
            q, k, v = (mx.random.normal(s).astype(dtype) for s in ((B, Hq, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv)))
            bias = mx.random.normal((1, Hq, 1, Nk))
            slopes, sinks = mx.array([0.1, 0.2, 0.3, 0.4]), mx.array([0.0, 1.0, -1.0, 0.5])
            mask = mx.random.uniform(shape=(B, 1, Nq, Nk)) < 0.7
            lengths = mx.array([Nk, Nk // 2], dtype=mx.int32)

            def loss(q, k, v, bias, slopes, sinks, mask=mask, lengths=lengths, options=options):
                out = mfa.flash_attention(
                    q, k, v, attn_bias=bias, alibi_slopes=slopes, sinks=sinks, mask=mask, kv_lengths=lengths,
                    backend="mfa", **options,
                )  # fmt: skip
                return out.astype(mx.float32).sum()

            mx.eval(mx.value_and_grad(loss, argnums=tuple(range(6)))(q, k, v, bias, slopes, sinks))

            def plain(q, k, v, options=options):
                return mfa.flash_attention(q, k, v, causal=options.get("causal", False), backend="mfa").sum()

            mx.eval(mx.value_and_grad(plain, argnums=(0, 1, 2))(q, k, v))


if __name__ == "__main__":
    main()
