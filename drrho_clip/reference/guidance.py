"""The results of a reference model that a run uses: features for the method drrho, and a choice of the training pairs.

Both are computed once before training and written into the folder of the run. A resumed run reads them from there, so
it needs no reference model and continues bit for bit. The features of a cache stay in the cache: the run records which
cache it is, and a resumed run opens that cache again.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from drrho_clip.config import TrainConfig
from drrho_clip.data import DataSplits
from drrho_clip.encoders import cache_folder
from drrho_clip.errors import BadInput
from drrho_clip.features.reading import ReferenceFeatures
from drrho_clip.features.rows import ArrayRows, CacheRows, FeatureRows
from drrho_clip.files.json_files import read_json
from drrho_clip.files.outputs import write_json
from drrho_clip.methods import METHODS
from drrho_clip.processes.protocol import Processes
from drrho_clip.processes.together import of_first, together
from drrho_clip.reference.judgement import Judgement, ask_reference
from drrho_clip.reference.pair_choice import PairChoice, choose_pairs, load_pair_choice, save_pair_choice
from drrho_clip.run import Run, load_reference_features, save_reference_features
from drrho_clip.run.data import place_of
from drrho_clip.terminal.printing import say
from drrho_core.backend import Backend

__all__ = ["Guidance", "keep_guidance", "open_guidance", "print_guidance"]


class Guidance(NamedTuple):
    """The results of a reference model that a run uses.

    Attributes
    ----------
    features : FeatureRows, or None
        Image features and text features of all training pairs, for a method that needs them.
    choice : PairChoice or None
        The training pairs that the run uses; None: all pairs, with equal weights.
    judgement : Judgement or None
        The reference model's judgement of the pairs; None if the run has no reference model, or if features and choice
        were read from the folder of the run.
    """

    features: FeatureRows | None = None
    choice: PairChoice | None = None
    judgement: Judgement | None = None


def open_guidance(run: Run, backend: Backend, splits: DataSplits, processes: Processes | None = None) -> Guidance:
    """Return what a run takes from a reference model: read from the folder of the run if it is there, else computed.

    No file is written. If several processes train together, all of them call this function and get the same result.

    Raises
    ------
    BadInput
        If the reference model or a file cannot be used, or if `choose_pairs` refuses the reference model.
    """
    config = run.config
    if config.reference is None:
        return Guidance()
    needs_features, chooses = _needs(config)
    # The first process decides, because it alone writes files.
    if of_first(processes, partial(_is_kept, run)):
        return together(processes, partial(_kept_guidance, run, splits))
    model = together(processes, partial(place_of, run, "reference"))
    needs_swapped = config.anchor_weights == "posterior"
    judgement = ask_reference(model, backend, splits, processes, needs_losses=chooses, needs_swapped=needs_swapped)
    choice = together(processes, partial(choose_pairs, config, judgement))
    if choice is not None and processes is not None and processes.size > 1:
        # Rounding may differ between machines, so the choice of the first process holds for all.
        rows, weights = choice.rows, choice.anchor_weight
        choice = PairChoice(
            processes.gather_arrays(rows)[0],
            None if weights is None else processes.gather_arrays(weights)[0],
            choice.swapped_share,
        )
    return Guidance(judgement.features if needs_features else None, choice, judgement)


def _needs(config: TrainConfig) -> tuple[bool, bool]:
    """Return whether a run needs features of the reference model, and whether it needs a choice of pairs."""
    chooses = config.drop_suspects is not None or config.anchor_weights is not None
    return METHODS[config.method].needs_reference, chooses


def _is_kept(run: Run) -> bool:
    """Return whether the folder of a run has all that the run takes from the reference model."""
    needs_features, chooses = _needs(run.config)
    features_are_there = run.reference_features.exists() or run.reference_cache.exists() or not needs_features
    return features_are_there and (run.pair_choice.exists() or not chooses)


def _kept_guidance(run: Run, splits: DataSplits) -> Guidance:
    """Read what the folder of a run has."""
    needs_features, chooses = _needs(run.config)
    return Guidance(
        _kept_features(run, splits) if needs_features else None,
        load_pair_choice(run.pair_choice, run.fingerprint) if chooses else None,
    )


def keep_guidance(run: Run, guidance: Guidance) -> None:
    """Write features and choice into the folder of the run, unless they are there."""
    features = guidance.features
    if isinstance(features, CacheRows) and not run.reference_cache.exists():
        manifest = features.features.manifest
        described = {"dtype": manifest.dtype, "content": manifest.content_digest()}
        write_json(run.reference_cache, {"model": dict(manifest.model), "data": dict(manifest.data), **described})
    if isinstance(features, ArrayRows) and not run.reference_features.exists():
        save_reference_features(run.reference_features, features.image, features.text, {"data": run.fingerprint})
    if guidance.choice is not None and not run.pair_choice.exists():
        save_pair_choice(run.pair_choice, guidance.choice, run.fingerprint)


def _kept_features(run: Run, splits: DataSplits) -> FeatureRows:
    """Return the features that the run has used so far; raise BadInput if the cache is no longer the same."""
    if not run.reference_cache.exists():
        return ArrayRows(*load_reference_features(run.reference_features, {"data": run.fingerprint}))
    place = place_of(run, "reference")
    folder = cache_folder(place)
    if folder is None:
        raise BadInput(f"reference must be the cache with which {run.folder} was started, got {place}, which is none")
    # A cache of another model in the same folder would change the loss in the middle of the run.
    features = ReferenceFeatures(folder)
    manifest = features.manifest
    recorded = read_json(run.reference_cache, "the description of a cache")
    try:
        # Earlier versions recorded neither the dtype nor the content.
        like = replace(manifest.like(recorded["model"], recorded["data"]), dtype=recorded.get("dtype", manifest.dtype))
        difference = manifest.difference(like)
        # The same model gives slightly other features on another device, and the run would not continue bit for bit.
        if difference is None and recorded.get("content", manifest.content_digest()) != manifest.content_digest():
            difference = f"other features: {manifest.model.get('name')} has encoded the data again"
    except (KeyError, TypeError, AttributeError):
        raise BadInput(f"{run.reference_cache} must describe a cache, got a damaged description") from None
    if difference is not None:
        started = f"the cache with which {run.folder} was started"
        raise BadInput(f"reference must be {started}, got {folder} with {difference}")
    return CacheRows(features, features.rows_of(splits.train))


def print_guidance(guidance: Guidance, num_pairs: int) -> None:
    """Print what the reference model says about `num_pairs` training pairs, and how many are left out or wrong."""
    # Progress and remarks go to standard error, so that results on standard output stay clean.
    if guidance.judgement is not None:
        say(guidance.judgement.summary(), stream=sys.stderr)
    if isinstance(guidance.features, CacheRows) and guidance.features.num_unreadable:
        say(
            f"warning: the images of {guidance.features.num_unreadable:,} of {num_pairs:,} training pairs could not be "
            f"read for {guidance.features.features.folder}; training replaces pairs whose images it cannot read either",
            stream=sys.stderr,
        )
    if guidance.choice is not None and len(guidance.choice.rows) < num_pairs:
        dropped = num_pairs - len(guidance.choice.rows)
        say(f"left out: {dropped:,} of {num_pairs:,} training pairs", stream=sys.stderr)
    if guidance.choice is not None and guidance.choice.swapped_share is not None:
        say(f"estimate: {guidance.choice.swapped_share:.0%} of the training captions are wrong", stream=sys.stderr)
