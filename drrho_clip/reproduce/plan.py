"""The plan of a claim: the experiments that it needs, as far as the rows that are there determine them.

A learning rate is chosen on validation pairs, so the experiments of the seeds are known only after the trials. The
engine therefore makes the plan again after each round of experiments, until no experiment is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from drrho_clip.methods import METHODS
from drrho_clip.reproduce.experiment import CHOICE_SEED, LEARNING_RATES, Experiment, Settings
from drrho_clip.reproduce.results import Row, Rows
from drrho_clip.reproduce.worlds import HEADS, World

__all__ = ["Plan", "Reference", "best_rate", "marked_rate", "next_rate"]

# A grid of learning rates grows by at most this many rates at each end.
_MOST_STEPS: Final = 2


@dataclass(frozen=True)
class Reference:
    """A reference model of a claim: a reference model of the world with some other settings.

    Parameters
    ----------
    name : str
        The name in the rows.
    base : str
        The reference model of the world.
    settings : mapping
        The settings that differ, those of the training data included.
    choose : bool
        The model gets a learning rate of its own; otherwise it has that of the base, unless `settings` has a rate.
    """

    name: str
    base: str
    settings: Settings = field(default_factory=dict)
    choose: bool = False


class Plan:
    """Experiments by hash, which the claims add.

    Parameters
    ----------
    rows : mapping
        The rows that are there, by hash.
    worlds : sequence of World
        The worlds whose data are there.
    seeds : sequence of int
        The seeds of the claims.
    quick : bool
        The experiments are the small forms.
    """

    def __init__(self, rows: Rows, worlds: Sequence[World], *, seeds: Sequence[int], quick: bool) -> None:
        self.rows, self.seeds, self.is_quick = rows, tuple(seeds), quick
        # Only worlds for which nothing has to be installed have a quick form.
        self.worlds = [world.quick() for world in worlds if world.largest] if quick else list(worlds)
        self.experiments: dict[str, Experiment] = {}
        # The rate of each choice by the hash of its first trial; None as long as trials are missing.
        self._choices: dict[str, float | None] = {}

    def worlds_of(self, kind: str) -> list[World]:
        """Return the worlds of a kind, `PICTURES` or `HEADS`.

        Quick plans have no heads, which need features that take minutes; the first world takes their place.
        """
        if self.is_quick and kind == HEADS:
            return self.worlds[:1]
        return [world for world in self.worlds if world.kind == kind]

    def add(self, experiment: Experiment) -> None:
        """Add an experiment; the same experiment counts once."""
        # Several claims may need the same trial of a learning rate.
        self.experiments[experiment.config_hash()] = experiment

    def missing(self) -> list[Experiment]:
        """Return the experiments that have no row."""
        return [experiment for key, experiment in self.experiments.items() if key not in self.rows]

    def finished(self) -> list[Row]:
        """Return the rows of the experiments; rows of other plans, such as a former one, are left out."""
        return [self.rows[key] for key in self.experiments if key in self.rows]

    def add_reference(self, claim: str, world: World, reference: str | Reference) -> None:
        """Add the measurement of a reference model itself, with every seed."""
        model = _model(reference)
        recipe = self._recipe(world, model)
        if recipe is not None:
            for seed in self.seeds:
                self.add(self._of_reference(claim, world, model.name, recipe, seed))

    def add_target(
        self,
        claim: str,
        world: World,
        method: str,
        reference: str | Reference | None = None,
        *,
        task: str = "training",
        label: str = "",
        settings: Settings | None = None,
        data: Settings | None = None,
        choose: bool = False,
    ) -> None:
        """Add the training of the target with a method, and with the learning rate that was chosen, for every seed.

        The rate is chosen once per method and world, with the settings of the world and, if the method needs a
        reference model, with the first reference model of the world. As long as the choice is not made, the trials of
        the choice are added instead.

        Parameters
        ----------
        claim : str
            Name of the claim.
        world : World
        method : str
            A method of `drrho train`.
        reference : str or Reference, optional
            A reference model of the world, by its name, or a reference model of the claim.
        task : str
            A key of `drrho_clip.reproduce.tasks.TASKS`.
        label : str
            The name of `settings` and `data` in the rows; different settings need different labels.
        settings, data : mapping, optional
            Settings of the target and of the data that differ from those of the world.
        choose : bool
            The rate is chosen with this reference model, these settings and these data.
        """
        model = None if reference is None else _model(reference)
        target = _Target(task, method, model, label, settings or {}, data or {})
        if model is not None and self._recipe(world, model) is None:
            return
        # The settings of a claim do not change the choice, unless the claim asks for a choice of its own.
        rate = self._rate_of_target(world, target if choose else _Target("training", method, _first(world, method)))
        if rate is not None:
            for seed in self.seeds:
                self.add(self._of_target(claim, world, target, seed, rate))

    def _rate_of_target(self, world: World, target: _Target) -> float | None:
        """Return the learning rate of a target, or None as long as it is not chosen."""
        if target.reference is not None and self._recipe(world, target.reference) is None:
            return None
        # Other tasks measure more than a training, which the choice of a rate does not need.
        trained = replace(target, task="training")
        return self._chosen(world, lambda rate: self._of_target(LEARNING_RATES, world, trained, CHOICE_SEED, rate))

    def _of_target(self, claim: str, world: World, target: _Target, seed: int, rate: float) -> Experiment:
        method, reference = target.method, target.reference
        # Settings of the method come before those of the world, and settings of the claim before both.
        own = {**world.target, **world.by_method.get(method, {}), **self._sized(world, target.settings)}
        settings: dict[str, Any] = {
            "data": {**world.data, **self._sized(world, target.data)},
            "target": own | {"learning_rate": rate},
            "reference": None if reference is None else self._recipe(world, reference),
        }
        name = None if reference is None else reference.name
        label = target.label
        return Experiment(
            claim, target.task, world.name, method, name, seed, settings, self.is_quick, label, scale=world.scale
        )

    def _recipe(self, world: World, reference: Reference) -> Settings | None:
        """Return all settings of a reference model, or None as long as the learning rate is not chosen."""
        common = {**world.data, **world.reference_data, **world.target, **world.references[reference.base]}
        recipe = {**common, **self._sized(world, reference.settings)}
        if "learning_rate" in recipe:
            return recipe
        # Without a choice of its own, the model has the rate of the base, whose trials all claims share.
        name, tried = (reference.name, recipe) if reference.choose else (reference.base, common)
        rate = self._chosen(
            world,
            lambda rate: self._of_reference(LEARNING_RATES, world, name, {**tried, "learning_rate": rate}, CHOICE_SEED),
        )
        return None if rate is None else {**recipe, "learning_rate": rate}

    def _of_reference(self, claim: str, world: World, name: str, recipe: Settings, seed: int) -> Experiment:
        settings = {"data": dict(world.data), "reference": dict(recipe)}
        return Experiment(
            claim, "reference", world.name, "reference", name, seed, settings, self.is_quick, scale=world.scale
        )

    def _chosen(self, world: World, trial: Callable[[float], Experiment]) -> float | None:
        """Add the trials of a learning rate; return the best rate as soon as all trials have rows.

        While the best rate is at an end of the grid, the grid grows there; see `next_rate`.
        """
        # Many experiments share a choice.
        key = trial(world.rates[0]).config_hash()
        if key not in self._choices:
            self._choices[key] = self._new_choice(world, trial)
        return self._choices[key]

    def _new_choice(self, world: World, trial: Callable[[float], Experiment]) -> float | None:
        rates, there = list(world.rates), dict[float, Row]()
        while True:
            # The trials have rows of their own, so that a reader can check the choice.
            for rate in rates:
                if rate not in there:
                    experiment = trial(rate)
                    self.add(experiment)
                    row = self.rows.get(experiment.config_hash())
                    if row is not None:
                        there[rate] = row
            if len(there) < len(rates):
                return None
            best = best_rate(there)
            further = next_rate(best, rates, world.rates)
            if further is None:
                return best
            rates.append(further)

    def _sized(self, world: World, settings: Settings) -> Settings:
        """Return settings of a claim, in the quick form with no larger sizes than those of the world."""
        return world.small(settings) if self.is_quick else settings


@dataclass(frozen=True)
class _Target:
    """A target: the task that trains it, and the parts of the settings that the world does not determine."""

    task: str
    method: str
    reference: Reference | None
    label: str = ""
    settings: Settings = field(default_factory=dict)
    data: Settings = field(default_factory=dict)


def _model(reference: str | Reference) -> Reference:
    return Reference(reference, reference) if isinstance(reference, str) else reference


def _first(world: World, method: str) -> Reference | None:
    """Return the reference model of the shared choice of a rate: the first of the world, if the method needs one."""
    return _model(next(iter(world.references))) if METHODS[method].needs_reference else None


def best_rate(trials: Mapping[float, Row]) -> float:
    """Return the rate with the best validation R@1; of equal rates the lower rate is taken.

    A rate with which the training diverged is taken only if it diverged with every rate.
    """
    # A diverged trial has zeros, which an untrained model could have as well.
    sound = {rate: row for rate, row in trials.items() if not row.diverged}
    return max(sorted(sound), key=lambda rate: sound[rate].figure("validation_r1")) if sound else min(trials)


def next_rate(best: float, rates: Sequence[float], grid: Sequence[float]) -> float | None:
    """Return the rate that is tried next, or None if the choice is made.

    A best rate at an end of the grid may have a better rate beyond it. So the grid grows there by its own factor, for
    every method in the same way, until the best rate has a neighbour on each side or two rates were added at this end.

    Parameters
    ----------
    best : float
        The best of the rates that were tried.
    rates : sequence of float
        The rates that were tried.
    grid : sequence of float
        The grid from which the choice began, in ascending order with the same factor between neighbours.

    Examples
    --------
    >>> next_rate(0.001, [0.001, 0.002, 0.004], [0.001, 0.002, 0.004])
    0.0005
    >>> next_rate(0.002, [0.001, 0.002, 0.004], [0.001, 0.002, 0.004])
    >>> next_rate(0.016, [0.001, 0.002, 0.004, 0.008, 0.016], [0.001, 0.002, 0.004])
    """
    # The quick form has a single rate, which shows that the choice works.
    if len(grid) < 2:
        return None
    factor = grid[1] / grid[0]
    if best == min(rates) and sum(rate < grid[0] for rate in rates) < _MOST_STEPS:
        further = best / factor
    elif best == max(rates) and sum(rate > grid[-1] for rate in rates) < _MOST_STEPS:
        further = best * factor
    else:
        return None
    # Rates stand in hashes, so rounding errors must not make two rates of one.
    return float(f"{further:.3g}")


def marked_rate(rate: float, tried: Collection[float]) -> str:
    """Return a rate in words, with a mark if it is the lowest or the highest of several rates that were tried.

    Examples
    --------
    >>> marked_rate(0.01, [0.001, 0.01]), marked_rate(0.01, [0.001, 0.01, 0.1]), marked_rate(0.01, [0.01])
    ('0.01 (end)', '0.01', '0.01')
    """
    # A better rate may lie beyond the end.
    return f"{rate:g} (end)" if len(tried) > 1 and rate in (min(tried), max(tried)) else f"{rate:g}"
