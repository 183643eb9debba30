"""Lists the modules whose examples pytest cannot collect, because a library that they import is not installed."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["drrho_torch/fused.py", "drrho_torch/fused_kernels.py"]
