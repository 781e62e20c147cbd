"""The module in which the package that this one replaces has its block-sparse names."""

from __future__ import annotations

import os

from .sparse import sparse_attention_dispatch, sparse_attention_nax

__all__ = ["decide_auto_version", "sparse_attention_dispatch", "sparse_attention_nax"]


def decide_auto_version(N: int, S: int, D: int) -> str:
    """The version of the replaced kernel that its package would choose. Here it has no effect: there is one kernel.

    Args:
        N, S, D (int): Queries, keys, head dimension.

    Returns:
        str: The environment variable ``MFA_LCSA_KERNEL_VERSION`` if that is ``"v1"`` or ``"v2"``; else ``"v2"`` from
        ``N * S * D = 2**31`` on and ``"v1"`` below.
    """
    version = os.environ.get("MFA_LCSA_KERNEL_VERSION")
    if version in ("v1", "v2"):
        return version
    return "v2" if N * S * D >= 2**31 else "v1"
