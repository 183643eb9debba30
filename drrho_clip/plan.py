"""The plan of a training run: pairs, steps, parameters and memory. A plan takes no step and writes no file."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from drrho_clip.config import TrainConfig
from drrho_clip.data import Dataset, DataSplits
from drrho_clip.data.loader import CACHE_BYTES
from drrho_clip.encoders import feature_dim_in_memory
from drrho_clip.epoch_length import pairs_per_step, steps_per_epoch
from drrho_clip.errors import BadInput
from drrho_clip.memory import MemoryPart, memory_of_run, parameter_count
from drrho_clip.methods import METHODS
from drrho_clip.models import ModelSpec
from drrho_clip.terminal.printing import print_cells, say
from drrho_clip.train import described
from drrho_core.backend import Backend

__all__ = ["Plan", "plan_run", "print_plan"]

# Number of images that a plan decodes at most.
_DECODED = 8


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes
    ----------
    config : TrainConfig
        The settings.
    spec : ModelSpec
        The sizes of the encoders.
    num_pairs, num_validation, num_test : int
        Number of pairs that the run trains on, and of held-out pairs.
    steps_per_epoch : int
        Number of steps of an epoch.
    memory : tuple of MemoryPart
        The memory beyond that of the imported libraries.
    """

    config: TrainConfig
    spec: ModelSpec
    num_pairs: int
    num_validation: int
    num_test: int
    steps_per_epoch: int
    memory: tuple[MemoryPart, ...]

    @property
    def num_steps(self) -> int:
        """Number of steps of the whole run."""
        return self.steps_per_epoch * self.config.epochs


def plan_run(config: TrainConfig, backend: Backend, splits: DataSplits, *, share_left_out: float = 0.0) -> Plan:
    """Return what a run with these settings and data would do.

    Parameters
    ----------
    config : TrainConfig
        The settings.
    backend : Backend
        The array library.
    splits : DataSplits
        The opened data.
    share_left_out : float
        Share of the training pairs that the run will leave out, as far as it is known.

    Raises
    ------
    BadInput
        If the batch is larger than the data, or if the model of `model`, `init` or `reference` does not fit.
    """
    # A description of a run is not written before `Run.write`, so the name of the folder does not matter here.
    spec = described(Path(), config, splits).run.spec
    features = None
    if METHODS[config.method].needs_reference and config.reference is not None:
        features = feature_dim_in_memory(config.reference)
    num_pairs = round((1.0 - share_left_out) * len(splits.train))
    steps = steps_per_epoch(config, num_pairs)
    # Data in memory are there whole; the images of a table are kept while they are decoded, if they fit.
    in_memory = [part for part in splits if hasattr(part, "images")]
    num_images, original_bytes = sum(map(len, in_memory)), 0
    if not in_memory and config.augment is not None:
        # Random parts are cut out of the originals, which may be much larger than the squares of the model.
        original_bytes = 0 if config.workers else min(CACHE_BYTES, _bytes_of_originals(splits.train))
    elif not in_memory and len(splits.train) * spec.image_size**2 * spec.channels <= CACHE_BYTES:
        num_images = len(splits.train)
    memory = memory_of_run(
        config,
        spec,
        backend,
        num_pairs=len(splits.train),
        num_images=num_images,
        original_bytes=original_bytes,
        reference_features=features,
    )
    return Plan(config, spec, num_pairs, len(splits.validation), len(splits.test), steps, tuple(memory))


def _bytes_of_originals(dataset: Dataset) -> int:
    """Return about how much memory the decoded images of a table need, from a few of them in equal distances."""
    sizes = []
    for row in range(0, len(dataset), -(-len(dataset) // _DECODED)):
        # An unreadable image needs no memory; the run names this image.
        with contextlib.suppress(BadInput):
            sizes.append(dataset[row].image.nbytes)
    return round(len(dataset) * sum(sizes) / max(1, len(sizes)))


def print_plan(plan: Plan, *, device: str) -> None:
    """Print a plan on standard output."""
    config, spec = plan.config, plan.spec
    chosen = f", chosen from {pairs_per_step(config):,}" if config.super_batch > 1 else ""
    held_out = f"{plan.num_validation:,} for validation, {plan.num_test:,} for the test"
    say(
        f"{config.method} on {config.data}, {config.backend}, {device}, {config.dtype}",
        f"pairs: {plan.num_pairs:,} for training, {held_out}",
        f"steps: {plan.num_steps:,} in {config.epochs:,} epochs of {plan.steps_per_epoch:,}, with "
        f"{config.batch_size:,} pairs each{chosen}",
        f"parameters: {parameter_count(spec):,} ({spec.architecture}, images of {spec.image_size} x {spec.image_size}, "
        f"{spec.vocabulary_size:,} words, texts of {spec.context_length} words)",
    )
    total = sum(part.num_bytes for part in plan.memory)
    rows = [(part.name, _in_megabytes(part.num_bytes)) for part in plan.memory]
    print_cells(["memory", "MB"], [*rows, ("together, beyond the libraries", _in_megabytes(total))], left=1)


def _in_megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f}"
