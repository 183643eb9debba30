"""A reference model: its judgement of pairs, whether it has memorised them, and what a run takes from it."""

from __future__ import annotations

from drrho_clip.reference.judgement import Judgement, ask_reference, measure_shares, recorded_shares

__all__ = ["Judgement", "ask_reference", "measure_shares", "recorded_shares"]
