"""Adapters that put this package's attention into other packages, one module for each.

``mlx_lm``: :func:`~mlx_mfa.integrations.mlx_lm.patch_mlx_lm`.
"""
