"""Training: a run is started, continued, or only read because it is finished. A run can be stopped at any step.

`train` opens the data and the folder; `drrho_clip.trainer` has the loop over batches, one for every backend and method.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drrho_clip.config import AUTO, TrainConfig
from drrho_clip.data import DataSplits
from drrho_clip.data.caption_check import print_caption_warnings
from drrho_clip.data.splits import open_splits
from drrho_clip.encoders import check_model_name, is_run, open_model
from drrho_clip.evaluate import evaluate
from drrho_clip.exchange.chosen_model import check_model, choose_model
from drrho_clip.exchange.estimates import read_estimates
from drrho_clip.exchange.start_values import with_start_values
from drrho_clip.files.disk import write_atomic
from drrho_clip.files.outputs import check_folder
from drrho_clip.learning_rate_trials import best_trial, print_trials, save_trials, try_learning_rates
from drrho_clip.measure.held_out import check_held_out, save_known_images
from drrho_clip.methods import METHODS
from drrho_clip.processes.encoding import shared_encoder
from drrho_clip.processes.facts import facts_of_data, facts_of_settings, facts_of_state
from drrho_clip.processes.fingerprint import require_equal
from drrho_clip.processes.opening import opened_processes
from drrho_clip.processes.protocol import Processes
from drrho_clip.processes.together import agreed_figures, of_first, together, together_with_values, written_by_first
from drrho_clip.reference.guidance import keep_guidance, print_guidance
from drrho_clip.run import (
    Run,
    describe_run,
    open_run,
    read_metrics,
    refuse_existing,
    remove_torn_files,
    remove_unused_estimates,
)
from drrho_clip.run.data import data_are_there, describe_data, open_run_data, require_same_data, tables_of, with_places
from drrho_clip.run.outcome import Outcome, load_outcome
from drrho_clip.run.resume import continued, open_finished_run, parameters_to_start_from
from drrho_clip.run.writer import only_writer
from drrho_clip.setting_rules import check_used
from drrho_clip.trainer import Trainer
from drrho_core.backend import Backend, get_backend


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    backend: Backend | None = None,
    device: str | None = None,
    splits: DataSplits | None = None,
    quiet: bool = False,
    stop_after: int | None = None,
    allow_unfinished: bool = False,
    processes: Processes | None = None,
) -> Outcome:
    """Train a model and evaluate it.

    If a launcher has started several processes, all of them call this function with the same arguments. They share each
    batch, and the first process writes the run. After an error of any of them this function raises nothing: it prints a
    line and ends the process, because the other processes cannot go on; see `drrho_clip.processes.watch`.

    Parameters
    ----------
    config : TrainConfig
        The settings.
    out : path
        Folder of the run. A folder that holds a run is refused unless `resume` is True.
    resume : bool
        Continue the run in `out` from the last checkpoint. The settings of that run must equal `config`, with three
        exceptions: a finished run may get more epochs, a table may have moved, and the settings of
        `drrho_clip.run.resume.MAY_DIFFER`, such as the number of workers, may have other values. A finished run without
        more epochs does not change.
    backend : Backend, optional
        The library that runs the training; built from ``config.backend``, ``config.dtype`` and `device` by default.
    device : str, optional
        The device, by the name that the array library gives it.
    splits : DataSplits, optional
        The opened data; by default `train` opens the data that the settings name.
    quiet : bool
        Show no progress.
    stop_after : int, optional
        Number of steps, counted from the start of the run, after which training stops with a checkpoint. A later call
        with `resume` continues.
    allow_unfinished : bool
        Accept a reference run, or a run to start from, that is not finished.
    processes : Processes, optional
        The processes that train together; by default those of the launcher, or this process alone.

    Returns
    -------
    Outcome
        The run, the model and the row of results.json.

    Raises
    ------
    BadInput
        If an argument or a file cannot be used; no file has been overwritten then.
    MissingExtra
        If a library that the data need is not installed.
    """
    if backend is None:
        backend = get_backend(config.backend, device=device, dtype=config.dtype)
    folder = Path(out)
    with contextlib.ExitStack() as stack:
        if processes is None:
            facts = facts_of_settings(config, resume=resume)
            opened = opened_processes(backend, facts=facts, rank_timeout=config.rank_timeout)
            processes = stack.enter_context(opened)
        quiet = quiet or not processes.is_first
        if resume:
            return _resume(folder, config, backend, splits, processes, quiet=quiet, stop_after=stop_after)
        written_by_first(processes, partial(refuse_existing, folder))
        begun = together(processes, partial(_begun, folder, config, backend, splits, allow_unfinished=allow_unfinished))
        return _start(begun, backend, processes, quiet=quiet, stop_after=stop_after)


class Begun(NamedTuple):
    """A new run that is not written yet, with all that was read for it.

    `reference` and `source` are the runs of the settings `reference` and `init`; `estimates` are those of the setting
    `init_estimates`.
    """

    run: Run
    splits: DataSplits
    reference: Run | None
    source: Run | None
    start: Mapping[str, np.ndarray] | None
    estimates: Mapping[str, np.ndarray] | None


def _begun(
    folder: Path, config: TrainConfig, backend: Backend, splits: DataSplits | None, *, allow_unfinished: bool
) -> Begun:
    """Check the settings, and read the data and the files that they name; nothing is written."""
    check_used(config)
    check_other_runs(config, allow_unfinished=allow_unfinished)
    check_model(config, backend)
    config = with_start_values(config)
    splits = open_splits(config) if splits is None else splits
    run, source, start = described(folder, config, splits)
    reference = open_run(config.reference) if config.reference is not None and is_run(config.reference) else None
    if METHODS[config.method].needs_reference_temperature and config.reference_temperature is None:
        # The settings of the run hold the number, so that a resumed run does not need the reference model.
        assert config.reference is not None
        model = open_model(config.reference, backend=backend, name="reference", state="reference")
        run = replace(run, config=replace(run.config, reference_temperature=model.temperature))
    estimates = None
    if config.init_estimates is not None:
        estimates = read_estimates(config.init_estimates, splits.train, config, backend)
    return Begun(run, splits, reference, source, start, estimates)


def _start(begun: Begun, backend: Backend, processes: Processes, *, quiet: bool, stop_after: int | None) -> Outcome:
    """Write the files of a new run, and train."""
    run, splits, reference, source, start, estimates = begun
    folder = run.folder
    require_equal(processes, together(processes, partial(facts_of_data, run, splits, backend)))
    written_by_first(processes, partial(check_held_out, splits, reference=reference, init=source, quiet=quiet))
    trials = []
    if run.config.learning_rate == AUTO:
        trials = try_learning_rates(run, backend, splits, start=start, processes=processes)
        run = replace(run, config=replace(run.config, learning_rate=best_trial(trials).learning_rate))
        if not quiet:
            print_trials(trials)

    def write() -> None:
        # Another process may have started a run in the meantime.
        refuse_existing(folder)
        remove_torn_files(folder)
        run.write()
        save_known_images(run, splits, reference=reference, init=source)
        if trials:
            save_trials(run, trials)

    # Building the trainer reads all files, so every mistake in them is reported before anything is written.
    trainer = Trainer(run, backend, splits, start=start, processes=processes)
    with contextlib.closing(trainer), _first_writes(processes, folder):
        _require_same_state(trainer)
        written_by_first(processes, write)
        if estimates is not None:
            # The first use of the estimator makes a file or takes memory, and each of these may fail on one machine.
            together(processes, lambda: trainer.estimator.load_state_dict(estimates))
        trainer.save()
        tokenizer = None if reference is None else reference.tokenizer
        if not quiet:
            print_caption_warnings(run.tokenizer, splits, tokenizer)
        return _finish(trainer, quiet=quiet, stop_after=stop_after)


def _require_same_state(trainer: Trainer) -> None:
    """Raise BadInput on all processes unless they begin with the same state."""
    # One process need not read its parameters for this.
    if trainer.processes.size > 1:
        read = partial(facts_of_state, trainer.backend, trainer.state, step=trainer.done, num_pairs=trainer.num_pairs)
        require_equal(trainer.processes, together(trainer.processes, read))


@contextlib.contextmanager
def _first_writes(processes: Processes, folder: Path) -> Iterator[None]:
    """Let the first process hold the lock of a run's folder, which is made if it is missing."""
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(only_writer(folder))

        written_by_first(processes, lock)
        yield


def check_other_runs(config: TrainConfig, *, allow_unfinished: bool = False) -> None:
    """Raise BadInput unless the runs that the settings name, if any, can be opened and are finished or allowed."""
    if config.reference is not None:
        check_model_name(config.reference, "reference")
    # The reference model may be another model than a run; then the first use of the model checks the model.
    reference = config.reference if config.reference is not None and is_run(config.reference) else None
    for name, folder in (("reference", reference), ("init", config.init)):
        if folder is not None:
            open_finished_run(folder, name, allow_unfinished=allow_unfinished)


class Described(NamedTuple):
    """A new run that is not written yet, the run of the setting `init`, and the parameters to start from, if any."""

    run: Run
    source: Run | None
    start: Mapping[str, np.ndarray] | None


def described(folder: Path, config: TrainConfig, splits: DataSplits) -> Described:
    """Describe a new run with settings and data: encoders, tokenizer and parameters; no file is written.

    Raises
    ------
    BadInput
        If the model of the settings `model` or `init` cannot be used.
    """
    source = None if config.init is None else open_run(config.init)
    chosen = choose_model(config, splits.train)
    start = None if chosen is None else chosen.start
    given: dict[str, Any] = {} if chosen is None else {"tokenizer": chosen.tokenizer, "spec": chosen.spec}
    if source is not None:
        # A run that starts from a Hugging Face model of another run has the encoders of that run.
        given = {"tokenizer": source.tokenizer, "spec": source.spec if source.spec.hf_config else None}
    run = describe_run(folder, config, splits.train, **given)
    run = describe_data(run, splits)
    if source is not None:
        start = parameters_to_start_from(source, run.spec)
    return Described(run, source, start)


def _resume(
    folder: Path,
    config: TrainConfig,
    backend: Backend,
    splits: DataSplits | None,
    processes: Processes,
    *,
    quiet: bool,
    stop_after: int | None,
) -> Outcome:
    """Continue the run in a folder, or return the results of a finished run."""
    stored, run = together(processes, lambda: (open_run(folder), continued(folder, config)))
    extended = run.earlier_ends != stored.earlier_ends
    moved = {name: value for name, value in tables_of(config).items() if value != tables_of(run.config)[name]}
    # Only some machines may have moved their data, and all processes have to go the same way.
    progress, moved_anywhere = together_with_values(processes, lambda: (run.progress(), bool(moved)))
    over = progress.finished and not extended
    if over and not any(moved_anywhere):
        together(processes, partial(_check_finished, run, splits))
        return together(processes, partial(load_outcome, run, backend))
    written_by_first(processes, partial(check_folder, folder, "out"))
    with _first_writes(processes, folder):
        splits = together(processes, partial(_opened_again, run, splits, moved))
        require_equal(processes, together(processes, partial(facts_of_data, run, splits, backend)))
        run = with_places(run, moved)
        if over:
            written_by_first(processes, run.write)
            return together(processes, partial(load_outcome, run, backend))
        # A resumed run no longer needs the folder of the reference model.
        written_by_first(processes, partial(check_held_out, splits, quiet=quiet))
        with contextlib.closing(Trainer(run, backend, splits, processes=processes)) as trainer:
            written_by_first(processes, partial(remove_torn_files, folder))
            trainer.load()
            _require_same_state(trainer)

            def write() -> None:
                if moved or run.config != stored.config:
                    run.write()
                if extended:
                    # From here on the run is unfinished again.
                    run.results.unlink(missing_ok=True)
                # A run of an earlier version, or a run that was killed at the start, gets the file now.
                if not run.training_images.exists():
                    save_known_images(run, splits)
                remove_unused_estimates(run, processes.size)

            written_by_first(processes, write)
            if extended:
                trainer.save()
            return _finish(trainer, quiet=quiet, stop_after=stop_after)


def _opened_again(run: Run, splits: DataSplits | None, moved: Mapping[str, str | None]) -> DataSplits:
    """Return the data of a run to resume, whose content has been checked."""
    if splits is None:
        return open_run_data(run, **moved)
    require_same_data(run, splits)
    return splits


def _check_finished(run: Run, splits: DataSplits | None) -> None:
    """Raise BadInput if files or data of a finished run are damaged; data that are no longer there are not needed."""
    run.load_parameters("last")
    read_metrics(run.metrics)
    if splits is not None:
        require_same_data(run, splits)
    elif data_are_there(run):
        open_run_data(run)


def _finish(trainer: Trainer, *, quiet: bool, stop_after: int | None) -> Outcome:
    """Train to the end or to `stop_after`, measure the best state, and write the results of a finished run."""
    run, config, processes = trainer.run, trainer.run.config, trainer.processes
    written_by_first(processes, partial(keep_guidance, run, trainer.guidance))
    if not quiet:
        print_guidance(trainer.guidance, len(trainer.splits.train))
    trainer.fit(quiet=quiet, stop_after=stop_after)
    # The best state is measured, because validation may fall again before the last step.
    state = of_first(processes, partial(run.chosen_state, "best"))
    encoder = together(processes, partial(trainer.encoder_of, state))
    row = {
        "method": config.method,
        "dataset": config.data,
        "seed": config.seed,
        "metrics": agreed_figures(evaluate(shared_encoder(encoder, processes), trainer.splits.test), processes),
        "state": state,
        "step": trainer.kept[state]["step"] if state in trainer.kept else trainer.done,
        "num_training_pairs": trainer.num_pairs,
        "samples_seen": trainer.done * config.batch_size,
        "seconds": round(trainer.seconds, 3),
    }
    if trainer.finished:
        text = json.dumps([row], indent=1) + "\n"
        written_by_first(processes, partial(write_atomic, run.results, text.encode()))
    return Outcome(run, encoder, row)
