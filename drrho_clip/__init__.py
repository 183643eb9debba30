"""The training harness: data, training step, training loop, evaluation, checkpoints, report and command line.

The harness computes through a backend, which makes one array library (NumPy, torch, JAX or CuPy) available under the
interface `drrho_core.backend.Backend`. The harness itself imports no array library but NumPy.
"""

# Nothing is imported here, so that the command line can show the help without loading NumPy.
from __future__ import annotations
