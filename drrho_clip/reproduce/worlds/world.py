"""The description of a world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from drrho_clip.reproduce.experiment import Settings

__all__ = ["World"]


@dataclass(frozen=True)
class World:
    """A data set with the settings of the models that are trained on it.

    All settings are names and values of `drrho_clip.config.TrainConfig`. The seed of an experiment is the seed of the
    data too, so each seed has other training, validation and test pairs.

    Parameters
    ----------
    name, title : str
        The name in the rows, and a few words for the pages.
    data : mapping
        Settings of the data.
    target : mapping
        Settings of the model that is steered, with every method.
    references : mapping
        Settings of the reference models, by the name of the reference model. They are added to those of `target`.
    rates : sequence of float
        The grid of learning rates, the same for every method and reference model.
    by_method : mapping
        Settings that one method needs besides, by the name of the method.
    reference_data : mapping
        Settings of the data on which the reference models are trained; they are added to `data`.
    largest : mapping
        Largest values of numbers in the quick form, by the name of the setting.
    """

    name: str
    title: str
    data: Settings
    target: Settings
    references: Mapping[str, Settings]
    rates: tuple[float, ...]
    by_method: Mapping[str, Settings] = field(default_factory=dict)
    reference_data: Settings = field(default_factory=dict)
    largest: Settings = field(default_factory=dict)

    def places(self) -> Settings:
        """Return the settings that name files of this machine, which are no part of the hash."""
        return {}

    def missing(self) -> str | None:
        """Return a line that says how to install the data, or None if the data are there."""
        return None

    def quick(self) -> World:
        """Return a small form of this world with one learning rate: every part works, and no figure has a meaning."""
        return replace(
            self,
            data=self.small(self.data),
            target=self.small(self.target),
            references={name: self.small(settings) for name, settings in self.references.items()},
            by_method={name: self.small(settings) for name, settings in self.by_method.items()},
            rates=self.rates[:1],
        )

    def small(self, settings: Settings) -> Settings:
        """Return settings in which no number is larger than in the quick form.

        Examples
        --------
        >>> world = World("tiny", "a world", {}, {}, {}, (0.1,), largest={"epochs": 1})
        >>> world.small({"epochs": 8, "temperature": 0.07})
        {'epochs': 1, 'temperature': 0.07}
        """
        return {
            name: min(value, self.largest[name]) if name in self.largest else value for name, value in settings.items()
        }
