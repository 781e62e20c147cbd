"""Block masks: which tiles of queries and keys block-sparse attention computes."""

from __future__ import annotations

from ._ext import BlockMask

__all__ = ["BlockMask"]
