"""Which modules cannot be looked through for examples, because what they are written in is not installed."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["drrho_torch/fused.py"]
