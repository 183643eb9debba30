"""Models of other programs: read as the start of a run, and written from a run."""

from __future__ import annotations
