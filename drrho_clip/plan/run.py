"""The plan of a training run: pairs, steps, parameters and memory. A plan takes no step and writes no file."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from drrho_clip.config import TrainConfig
from drrho_clip.data import Dataset, DataSplits
from drrho_clip.data.loader import CACHE_BYTES
from drrho_clip.data.pair_masks import has_siblings
from drrho_clip.encoders import feature_dim_in_memory
from drrho_clip.encoders.naming import cache_folder
from drrho_clip.epoch_length import pairs_per_step, steps_per_epoch
from drrho_clip.errors import BadInput
from drrho_clip.exchange.model_sizes import spec_of_size
from drrho_clip.features.reading import ReferenceFeatures
from drrho_clip.methods import METHODS
from drrho_clip.models import ModelSpec
from drrho_clip.plan.memory import DataSizes, MemoryPart, memory_of_run, parameter_count
from drrho_clip.plan.options import PlanOptions
from drrho_clip.plan.ranks import RanksPlan, plan_ranks, print_ranks
from drrho_clip.plan.shared_step import StepSizes
from drrho_clip.terminal.printing import print_cells, say
from drrho_clip.train import described
from drrho_core.backend import Backend

__all__ = ["Plan", "plan_of_size", "plan_run", "print_plan"]

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
        The memory of a process beyond that of the imported libraries.
    ranks : RanksPlan or None
        The plan of several processes that train together.
    """

    config: TrainConfig
    spec: ModelSpec
    num_pairs: int
    num_validation: int
    num_test: int
    steps_per_epoch: int
    memory: tuple[MemoryPart, ...]
    ranks: RanksPlan | None = None

    @property
    def num_steps(self) -> int:
        """Number of steps of the whole run."""
        return self.steps_per_epoch * self.config.epochs


def plan_run(
    config: TrainConfig,
    backend: Backend,
    splits: DataSplits,
    *,
    share_left_out: float = 0.0,
    options: PlanOptions | None = None,
) -> Plan:
    """Return the plan of a run with these settings and data.

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
    options : PlanOptions, optional
        The processes that train together; by default one process.

    Raises
    ------
    BadInput
        If the batch is larger than the data, or if the model of `model`, `init` or `reference` does not fit, or if the
        number of processes does not divide the batch.
    """
    # A description of a run is not written before `Run.write`, so the name of the folder does not matter here.
    spec = described(Path(), config, splits).run.spec
    num_pairs = round((1.0 - share_left_out) * len(splits.train))
    # Data in memory are there whole; the images of a table are kept while they are decoded, if they fit.
    in_memory = [part for part in splits if hasattr(part, "images")]
    num_images, original_bytes = sum(map(len, in_memory)), 0
    if not in_memory and config.augment is not None:
        # Random parts are cut out of the originals, which may be much larger than the squares of the model.
        original_bytes = 0 if config.workers else min(CACHE_BYTES, _bytes_of_originals(splits.train))
    elif not in_memory and len(splits.train) * spec.image_size**2 * spec.channels <= CACHE_BYTES:
        num_images = len(splits.train)
    held_out = len(splits.validation), len(splits.test)
    sizes = DataSizes(len(splits.train), num_images, original_bytes, _reference_in_memory(config))
    # Only ranks send masks; without ranks the plan need not compare images.
    masked = options is not None and options.world_size is not None and has_siblings(splits.train.image_ids)
    return _plan(config, spec, backend, sizes, num_pairs, held_out, options, masked=masked)


def plan_of_size(config: TrainConfig, backend: Backend, options: PlanOptions) -> Plan:
    """Return the plan of a run with `num_pairs` training pairs that do not exist yet.

    The images stay in files, no pair is held out, and the vocabulary is the largest of the model.

    Raises
    ------
    BadInput
        If the setting `model` names no model of known size, if the batch is larger than the number of pairs, or if the
        number of processes does not divide the batch.
    """
    assert options.num_pairs is not None
    spec = spec_of_size(config.model)
    sizes = DataSizes(options.num_pairs, 0, 0, _reference_in_memory(config))
    return _plan(config, spec, backend, sizes, options.num_pairs, (0, 0), options)


def _plan(
    config: TrainConfig,
    spec: ModelSpec,
    backend: Backend,
    sizes: DataSizes,
    num_pairs: int,
    held_out: tuple[int, int],
    options: PlanOptions | None,
    *,
    masked: bool = False,
) -> Plan:
    """Return the plan of a run whose sizes are known."""
    steps = steps_per_epoch(config, num_pairs)
    if options is None or options.world_size is None:
        memory = memory_of_run(config, spec, backend, **sizes._asdict())
        return Plan(config, spec, num_pairs, *held_out, steps, tuple(memory))
    step_sizes = StepSizes(_reference_dims(config), masked)
    ranks = plan_ranks(config, spec, backend, options, sizes=sizes, step_sizes=step_sizes, steps_per_epoch=steps)
    return Plan(config, spec, num_pairs, *held_out, steps, ranks.forms[ranks.form].memory, ranks)


def _reference_in_memory(config: TrainConfig) -> int | None:
    """Return how many numbers of the reference model a run keeps in memory per image and text."""
    if not METHODS[config.method].needs_reference or config.reference is None:
        return None
    return feature_dim_in_memory(config.reference)


def _reference_dims(config: TrainConfig) -> tuple[int, int]:
    """Return the sizes of the reference model's features of an image and of a text; 0 and 0 if the step uses none."""
    if not METHODS[config.method].needs_reference or config.reference is None:
        return 0, 0
    folder = cache_folder(config.reference)
    if folder is not None:
        image, text = ReferenceFeatures(folder, verify=False).manifest.feature_dims
        return image, text
    size = feature_dim_in_memory(config.reference) or 0
    return size, size


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
    data = config.data if plan.num_validation else "pairs that do not exist yet"
    chosen = f", chosen from {pairs_per_step(config):,}" if config.super_batch > 1 else ""
    held_out = f"{plan.num_validation:,} for validation, {plan.num_test:,} for the test"
    say(
        f"{config.method} on {data}, {config.backend}, {device}, {config.dtype}",
        f"pairs: {plan.num_pairs:,} for training, {held_out}",
        f"steps: {plan.num_steps:,} in {config.epochs:,} epochs of {plan.steps_per_epoch:,}, with "
        f"{config.batch_size:,} pairs each{chosen}",
        f"parameters: {parameter_count(spec):,} ({spec.architecture}, images of {spec.image_size} x {spec.image_size}, "
        f"{spec.vocabulary_size:,} words, texts of {spec.context_length} words)",
    )
    total = sum(part.num_bytes for part in plan.memory)
    rows = [(part.name, _in_megabytes(part.num_bytes)) for part in plan.memory]
    print_cells(["memory", "MB"], [*rows, ("together, beyond the libraries", _in_megabytes(total))], left=1)
    if plan.ranks is not None:
        print_ranks(plan.ranks)


def _in_megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f}"
