"""Readers of the kinds of data at rest, and `open_data`, which chooses the reader."""

from __future__ import annotations

from drrho_clip.data.sources.dispatch import KINDS, exists, open_data, read_source, read_together

__all__ = ["KINDS", "exists", "open_data", "read_source", "read_together"]
