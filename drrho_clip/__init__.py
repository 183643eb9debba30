"""The training harness: data, step, loop, evaluation, checkpoints, report and command line.

It receives a backend and a model as arguments and imports no array framework but NumPy.
"""

# Nothing is imported here, so that the command line can show the help without loading NumPy.
from __future__ import annotations
