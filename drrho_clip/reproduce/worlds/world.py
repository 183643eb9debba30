"""The description of a world."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from drrho_clip.config import TrainConfig
from drrho_clip.data import DataSplits
from drrho_clip.data.splits import open_splits
from drrho_clip.reproduce.experiment import Settings

if TYPE_CHECKING:
    from drrho_clip.encoders import PairEncoder

__all__ = ["HEADS", "PICTURES", "SCENES_LARGEST", "TABLES", "World", "fastclip_radius", "scaled_worlds"]

PICTURES, HEADS, TABLES = "pictures", "heads", "tables"
"""The kinds of worlds."""

SCENES_LARGEST: Final[Settings] = {
    "width": 4,
    "feature_dim": 8,
    "epochs": 1,
    "batch_size": 64,
    "warmup_steps": 1,
    "train_size": 320,
}
"""The largest sizes of drawn scenes in the quick form, see `World`."""


def fastclip_radius(batch_size: int) -> float:
    """Return the radius of FastCLIP (v3) for a batch size.

    The paper has a radius of 6.5 for batches of 1,024, which is 94 % of the largest divergence log(1,023). The radius
    is the same share of the largest divergence.

    Examples
    --------
    >>> fastclip_radius(1024), fastclip_radius(128)
    (6.5, 4.54)
    """
    return round(6.5 / math.log(1023) * math.log(batch_size - 1), 2)


@dataclass(frozen=True)
class World:
    """A data set with the settings of the models that are trained on it.

    All settings are names and values of `drrho_clip.config.TrainConfig`. The seed of an experiment is the seed of the
    data too. Where the models see drawn scenes, each seed draws other pairs. Every other world has one pool of pairs,
    which each seed divides anew: a validation pair of seed 100, with which learning rates are chosen, may be a training
    or test pair of another seed. In worlds of heads all seeds share the towers and the draw of the wrong captions, too.

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
        The grid of learning rates, in ascending order. The choice of every method and reference model begins with it.
    by_method : mapping
        Settings that one method needs besides, by the name of the method.
    reference_data : mapping
        Settings of the data on which the reference models are trained; they are added to `data`.
    kind : str
        `PICTURES` if encoders of pictures are trained, which takes minutes, and `HEADS` if small heads are trained over
        the features of frozen towers, which takes seconds. `TABLES` are worlds of both kinds whose held-out validation
        captions are as noisy as the training captions, as in the table of a user.
    scale : int
        How many times as large models and batches are as they were described; see `scaled`.
    longer : str
        The setting that gives larger batches as many steps: `train_size` if pairs are drawn, and `epochs` if there is
        one pool of pairs.
    largest_scale : int or None
        The largest scale with which the smallest training set of a claim still has a batch; None for drawn pairs.
    largest : mapping
        Largest values of numbers in the quick form, by the name of the setting; a world without them has no quick form.
    """

    name: str
    title: str
    data: Settings
    target: Settings
    references: Mapping[str, Settings]
    rates: tuple[float, ...]
    by_method: Mapping[str, Settings] = field(default_factory=dict)
    reference_data: Settings = field(default_factory=dict)
    kind: str = PICTURES
    scale: int = 1
    longer: str = "train_size"
    largest_scale: int | None = None
    largest: Settings = field(default_factory=dict)

    def prepare(self, runs: Path, roots: Sequence[Path], *, quiet: bool = False) -> None:
        """Make the files that all runs share, in the folder of the runs.

        Parameters
        ----------
        runs : Path
            The folder of the runs.
        roots : sequence of Path
            Folders below which packages of pictures are installed.
        quiet : bool
            Show no progress.

        Raises
        ------
        Missing
            If a package is not installed; the message says how to install it.
        """

    def is_prepared(self, runs: Path) -> bool:  # noqa: ARG002 (as `places`)
        """Return whether `prepare` has no more than a moment's work to do."""
        return True

    def places(self, runs: Path) -> Settings:  # noqa: ARG002 (worlds with files of their own need the folder)
        """Return the settings that name files of this machine, which are no part of the hash."""
        return {}

    def open(self, config: TrainConfig, runs: Path) -> DataSplits:  # noqa: ARG002 (as `places`)
        """Return the training, validation and test pairs of a run."""
        return open_splits(config)

    def more_figures(
        self,
        encoder: PairEncoder,  # noqa: ARG002 (as `places`)
        splits: DataSplits,  # noqa: ARG002
        runs: Path,  # noqa: ARG002
    ) -> Mapping[str, float]:
        """Return figures of the test pairs that `drrho_clip.evaluate.evaluate` does not know."""
        return {}

    def scaled(self, scale: int) -> World:
        """Return this world with larger models and batches and with about as many steps.

        Width, size of the features, batches, and training pairs or epochs are `scale` times as large. The radius of
        FastCLIP stays the same share of the largest divergence. `WORLDS` and the functions of this class that open data
        do not depend on the scale.

        Examples
        --------
        >>> target = {"width": 16, "batch_size": 128, "epochs": 8}
        >>> world = World("pool", "a pool of pairs", {"train_size": 2000}, target, {}, (0.1,), longer="epochs")
        >>> world.scaled(2).data, world.scaled(2).target
        ({'train_size': 2000}, {'width': 32, 'batch_size': 256, 'epochs': 16})
        """
        grows = {"width", "feature_dim", "batch_size", self.longer}

        def larger(settings: Settings) -> Settings:
            values = {name: value * scale if name in grows else value for name, value in settings.items()}
            if "radius" in values:
                values["radius"] = fastclip_radius(scale * self.target["batch_size"])
            return values

        return replace(
            self,
            data=larger(self.data),
            target=larger(self.target),
            references={name: larger(settings) for name, settings in self.references.items()},
            by_method={name: larger(settings) for name, settings in self.by_method.items()},
            scale=scale * self.scale,
        )

    def quick(self) -> World:
        """Return a small form of this world with one learning rate: every part works, and no figure has a meaning."""
        # One rate is enough to show that the choice of a rate works.
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


def scaled_worlds(worlds: Iterable[World], scale: int) -> list[World]:
    """Return worlds with larger models and batches; a world whose data are too few for such batches is left out.

    Examples
    --------
    >>> drawn = World("drawn", "drawn pairs", {"train_size": 500}, {"width": 16}, {}, (0.1,))
    >>> pool = replace(drawn, name="pool", longer="epochs", largest_scale=4)
    >>> [(world.name, world.target["width"]) for world in scaled_worlds([drawn, pool], 8)]
    [('drawn', 128)]
    """
    return [world.scaled(scale) for world in worlds if world.largest_scale is None or scale <= world.largest_scale]
