"""The folder of a run, and all that belongs to one run: data, states, the right to write, the result."""

from __future__ import annotations

from drrho_clip.run.folder import (
    Run,
    RunProgress,
    describe_run,
    files_of_run,
    is_name_in_run,
    load_reference_features,
    open_run,
    part,
    read_metrics,
    refuse_existing,
    refuse_run,
    remove_torn_files,
    remove_unused_estimates,
    save_reference_features,
)

__all__ = [
    "Run",
    "RunProgress",
    "describe_run",
    "files_of_run",
    "is_name_in_run",
    "load_reference_features",
    "open_run",
    "part",
    "read_metrics",
    "refuse_existing",
    "refuse_run",
    "remove_torn_files",
    "remove_unused_estimates",
    "save_reference_features",
]
