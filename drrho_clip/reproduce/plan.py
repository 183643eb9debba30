"""The plan of a claim: the experiments that it needs, as far as the rows that are there determine them.

A learning rate is chosen on validation pairs, so the experiments of the seeds are known only after the trials. The
engine therefore makes the plan again after each round of experiments, until no experiment is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from drrho_clip.reproduce.experiment import CHOICE_SEED, LEARNING_RATES, Experiment, Settings
from drrho_clip.reproduce.results import Row, Rows
from drrho_clip.reproduce.worlds import PICTURES, World

__all__ = ["Plan", "best_rate"]


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
        # The quick forms need drawn scenes only.
        self.worlds = [world.quick() for world in worlds if world.kind == PICTURES] if quick else list(worlds)
        self.experiments: dict[str, Experiment] = {}

    def worlds_of(self, kind: str) -> list[World]:
        """Return the worlds of a kind, `PICTURES` or `HEADS`; quick plans have no heads, so scenes take their place."""
        return [world for world in self.worlds if self.is_quick or world.kind == kind]

    def add(self, experiment: Experiment) -> None:
        """Add an experiment; the same experiment counts once."""
        self.experiments[experiment.config_hash()] = experiment

    def missing(self) -> list[Experiment]:
        """Return the experiments that have no row."""
        return [experiment for key, experiment in self.experiments.items() if key not in self.rows]

    def add_reference(self, claim: str, world: World, name: str) -> None:
        """Add the measurement of a reference model itself, with every seed."""
        recipe = self._reference(world, name)
        if recipe is not None:
            for seed in self.seeds:
                self.add(self._of_reference(claim, world, name, recipe, seed))

    def add_target(
        self, claim: str, world: World, method: str, reference: str | None = None, *, task: str = "training"
    ) -> None:
        """Add the training of the target with a method, and with the learning rate that was chosen, for every seed.

        As long as the choice is not made, the trials of the choice are added instead.
        """
        recipe = None if reference is None else self._reference(world, reference)
        if reference is not None and recipe is None:
            return
        target = {**world.target, **world.by_method.get(method, {})}

        def make(rate: float, seed: int, *, claim: str, task: str) -> Experiment:
            settings: dict[str, Any] = {"data": dict(world.data), "target": target | {"learning_rate": rate}}
            settings["reference"] = recipe
            return Experiment(claim, task, world.name, method, reference, seed, settings, self.is_quick)

        rate = self._chosen(world, lambda rate: make(rate, CHOICE_SEED, claim=LEARNING_RATES, task="training"))
        if rate is not None:
            for seed in self.seeds:
                self.add(make(rate, seed, claim=claim, task=task))

    def _reference(self, world: World, name: str) -> Settings | None:
        """Return all settings of a reference model, or None as long as the learning rate is not chosen."""
        recipe = {**world.data, **world.reference_data, **world.target, **world.references[name]}
        rate = self._chosen(
            world,
            lambda rate: self._of_reference(
                LEARNING_RATES, world, name, {**recipe, "learning_rate": rate}, CHOICE_SEED
            ),
        )
        return None if rate is None else {**recipe, "learning_rate": rate}

    def _of_reference(self, claim: str, world: World, name: str, recipe: Settings, seed: int) -> Experiment:
        settings = {"data": dict(world.data), "reference": dict(recipe)}
        return Experiment(claim, "reference", world.name, "reference", name, seed, settings, self.is_quick)

    def _chosen(self, world: World, trial: Callable[[float], Experiment]) -> float | None:
        """Add the trials of all rates; return the best rate as soon as all trials have rows."""
        trials = {rate: trial(rate) for rate in world.rates}
        for experiment in trials.values():
            self.add(experiment)
        rows = {rate: self.rows.get(experiment.config_hash()) for rate, experiment in trials.items()}
        there = {rate: row for rate, row in rows.items() if row is not None}
        return best_rate(there) if len(there) == len(trials) else None


def best_rate(trials: dict[float, Row]) -> float:
    """Return the rate with the best validation R@1; of equal rates the lower rate is taken."""
    return max(sorted(trials), key=lambda rate: trials[rate].figure("validation_r1"))
