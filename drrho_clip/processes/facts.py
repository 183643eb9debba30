"""Facts that processes compare: settings first, then data and models, then the state before a training step.

`drrho_clip.processes.fingerprint` compares the facts. Each group is compared before the processes exchange anything
that depends on it, and before the first process writes a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from drrho_clip.config import TrainConfig
from drrho_clip.data import Dataset, DataSplits
from drrho_clip.processes.fingerprint import digest_of_arrays, require_equal
from drrho_clip.processes.protocol import Processes
from drrho_clip.processes.together import together
from drrho_clip.run import Run
from drrho_clip.update import StepState
from drrho_core.backend import Backend

if TYPE_CHECKING:
    from drrho_clip.encoders import PairEncoder

__all__ = ["facts_of_data", "facts_of_settings", "facts_of_state", "require_same_model"]

_DIGITS = 16
# A machine may have an own copy of the data, whose content is compared later, and an own number of workers. Only the
# first process writes files and limits the time without progress, and an unreadable image is an error on all processes.
_MAY_DIFFER = (
    "data",
    "validation",
    "workers",
    "max_unreadable",
    "tensorboard",
    "wandb",
    "keep_last",
    "rank_timeout",
)


def facts_of_settings(config: TrainConfig, *, resume: bool) -> dict[str, Any]:
    """Return the settings that must be the same on all processes."""
    settings = {name: value for name, value in config.to_json().items() if name not in _MAY_DIFFER}
    return {"resume": resume, **settings}


def facts_of_data(run: Run, splits: DataSplits, backend: Backend) -> dict[str, Any]:
    """Return digests of the data, and the sizes of the encoders."""
    return {
        "data": {part: getattr(splits, part).fingerprint()[:_DIGITS] for part in ("train", "validation", "test")},
        "sizes": run.spec.to_json(),
        "dtype": backend.dtype,
        # The numbers of a CPU and of a GPU differ in the last digits, and the processes would drift apart.
        "is_gpu": backend.has_gpu,
    }


def require_same_model(
    processes: Processes, encoder: PairEncoder, datasets: Mapping[str, Dataset], backend: Backend
) -> None:
    """Raise AgreedError unless all processes have the same model, the same data to encode, and the same dtype."""
    # A single process need not read the data for this.
    if processes.size > 1:
        require_equal(processes, together(processes, partial(_facts_of_model, encoder, datasets, backend)))


def _facts_of_model(encoder: PairEncoder, datasets: Mapping[str, Dataset], backend: Backend) -> dict[str, Any]:
    """Return digests of a model and of the data that it encodes, and the dtype in which it computes."""
    # The name of a model may be a folder, which each machine may have in another place.
    identity = {name: value for name, value in encoder.identity().items() if name != "name"}
    data = {name: dataset.fingerprint()[:_DIGITS] for name, dataset in datasets.items()}
    return {"model": identity, **data, "backend_dtype": backend.dtype}


def facts_of_state(backend: Backend, state: StepState, *, step: int, num_pairs: int) -> dict[str, Any]:
    """Return a digest of all that the next step changes, the number of steps done, and the number of pairs used."""
    groups = state._asdict().items()
    arrays = {f"{group}/{name}": backend.to_numpy(x) for group, members in groups for name, x in members.items()}
    return {"step": step, "num_pairs": num_pairs, "parameters": digest_of_arrays(arrays)[:_DIGITS]}
