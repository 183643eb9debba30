"""The training harness: data, training step, training loop, evaluation, checkpoints, report and command line.

All computations on a device go through a backend, an adapter with the interface `drrho_core.backend.Backend` for one
array library (see `drrho_core.backend`). The harness itself imports no array library but NumPy.
"""

# Nothing is imported here, so that the command line can show the help without loading NumPy.
from __future__ import annotations
