"""The model of a command: a run with settings and data of its own, or another model, which has neither."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from drrho_clip.commands.common import build_backend
from drrho_clip.config import TrainConfig
from drrho_clip.errors import BadInput
from drrho_clip.options import TEXT, setting
from drrho_core.backend import Backend, default_backend

if TYPE_CHECKING:
    from drrho_clip.encoders import PairEncoder
    from drrho_clip.processes.place import Place
    from drrho_clip.run import Run

__all__ = ["MODEL_HELP", "CommandModel", "backend_option", "find_model"]

MODEL_HELP = "Folder of a run, or another model: hf:DIR, open_clip:NAME or features:CACHE; --data is then required."


def backend_option() -> Any:
    """Return the field of the option ``--backend``."""
    return setting(None, rule=TEXT, shown="the run's own, else the preferred library", help="Array library.")


@dataclass(frozen=True)
class CommandModel:
    """A model that is found, but not in memory yet.

    Attributes
    ----------
    word : str
        The model as the user names it.
    run : Run or None
        The run; None for another model.
    config : TrainConfig
        The settings of the run. For another model these are default settings, which matter for the data only.
    backend_name, device : str or None
        The user's wishes.
    place : Place or None
        The place of this process among all processes, if there are several.
    """

    word: str
    run: Run | None
    config: TrainConfig
    backend_name: str | None
    device: str | None
    place: Place | None = None

    @cached_property
    def backend(self) -> Backend:
        """The backend, by default that of the run; every backend reads the checkpoints of all others."""
        return build_backend(self.backend_name or self.config.backend, self.device, self.config.dtype, self.place)

    def encoder(self, *, state: str = "best") -> PairEncoder:
        """Load the model, a run in the given state."""
        from drrho_clip.encoders import open_model

        return open_model(self.word, backend=self.backend, state=state, run=self.run)


def find_model(
    word: str,
    data: str | None,
    *,
    backend: str | None,
    device: str | None,
    allow_unfinished: bool = False,
    max_unreadable: float | None = None,
    place: Place | None = None,
) -> CommandModel:
    """Return the model that the user names.

    Raises
    ------
    BadInput
        If there is no such model, if a run is unfinished, or if a model without data of its own gets none.
    """
    from drrho_clip.encoders import check_model_name, is_run
    from drrho_clip.run.resume import open_finished_run

    # Only a run brings settings and data with it.
    check_model_name(word, "model")
    if is_run(word):
        run = open_finished_run(word, "run", allow_unfinished=allow_unfinished)
        if max_unreadable is not None:
            # The limit does not change the content of the data.
            run = replace(run, config=replace(run.config, max_unreadable=max_unreadable))
        return CommandModel(word, run, run.config, backend, device, place)
    if data is None:
        raise BadInput(f"data must be named for a model that is no run, got none beside {word}")
    config = TrainConfig(data, method="clip", backend=backend or default_backend())
    if max_unreadable is not None:
        config = replace(config, max_unreadable=max_unreadable)
    return CommandModel(word, None, config, backend, device, place)
