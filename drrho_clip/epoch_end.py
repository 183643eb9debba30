"""The end of an epoch: validation, the states that a run keeps, and the decision to stop the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from drrho_clip.data import BatchSource, DataSplits
from drrho_clip.data.row_source import RowSource
from drrho_clip.encode import Encoder
from drrho_clip.evaluate import evaluate
from drrho_clip.processes.encoding import features_of_rows, shared_encoder
from drrho_clip.processes.protocol import Processes
from drrho_clip.processes.together import agreed_figures
from drrho_clip.reference import measure_shares
from drrho_clip.reference.memorisation import Shares, serves_better
from drrho_clip.run import Run

__all__ = ["EpochEnd", "Findings"]


@dataclass
class Findings:
    """The results of the end of an epoch, on which the trainer acts.

    Attributes
    ----------
    lines : list of mapping
        Figures for lines of metrics.jsonl.
    states : dict
        For each state to keep, by name: the figures that explain the choice.
    notes : dict
        Texts for the progress bar.
    stops : bool
        The training is over.
    """

    lines: list[Mapping[str, float]] = field(default_factory=list)
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    stops: bool = False


class EpochEnd:
    """Judges the state of a run after each epoch.

    Parameters
    ----------
    run : Run
        The run.
    splits : DataSplits
        The data.
    train, validation : BatchSource or RowSource
        The training pairs and the validation pairs, as the model reads them.
    used_rows : ndarray of int64
        The training rows that the run uses.
    processes : Processes
        The processes that train together; all of them judge at the same time and come to the same findings.
    """

    def __init__(
        self,
        run: Run,
        splits: DataSplits,
        train: BatchSource | RowSource,
        validation: BatchSource | RowSource,
        used_rows: npt.NDArray[np.int64],
        processes: Processes,
    ) -> None:
        self._run, self._splits, self._used_rows = run, splits, used_rows
        self._train, self._validation = train, validation
        self._processes = processes

    def judge(
        self,
        epoch: int,
        encoder: Encoder,
        temperature: float,
        kept: Mapping[str, Mapping[str, Any]],
        *,
        first_epoch: int,
    ) -> Findings:
        """Measure the state of an epoch and compare it with the kept states.

        Parameters
        ----------
        epoch : int
            Number of the epoch, from 0.
        encoder : Encoder
            The model with the parameters of the state.
        temperature : float
            The temperature of the state.
        kept : mapping
            The figures of the states that are kept so far, by name.
        first_epoch : int
            Number of epochs after which the run was last finished, if it has got more epochs since; else 0.
        """
        config = self._run.config
        shared = shared_encoder(encoder, self._processes)
        metrics = agreed_figures(evaluate(shared, self._splits.validation, zero_shot=False), self._processes)
        findings = Findings(lines=[{f"validation_{name}": value for name, value in metrics.items()}])
        r1 = metrics["retrieval_r1"]
        best: Mapping[str, Any] | None = kept.get("best")
        if best is None or r1 > best["retrieval_r1"]:
            best = findings.states["best"] = {"epoch": epoch, "retrieval_r1": r1}
        if config.reference is None:
            self._judge_as_reference(findings, epoch, r1, encoder, temperature, kept.get("reference"))
        # After a continuation with more epochs the patience begins anew.
        waited = epoch - max(best["epoch"], first_epoch - 1)
        findings.stops = findings.stops or 0 < config.patience <= waited
        findings.notes["validation"] = (
            f"validation R@1 {r1:.3f} (best {best['retrieval_r1']:.3f}, epoch {best['epoch'] + 1})"
        )
        return findings

    def _judge_as_reference(
        self,
        findings: Findings,
        epoch: int,
        r1: float,
        encoder: Encoder,
        temperature: float,
        kept: Mapping[str, Any] | None,
    ) -> None:
        """Add the shares of hopeless pairs, and keep the state if it is the best reference model so far, or stop.

        Every run without a reference model may become the reference model of another run. A run with the setting
        `as_reference` stops if more training cannot give a better reference model; see the module
        `drrho_clip.reference.memorisation`.
        """
        shares = measure_shares(
            partial(features_of_rows, encoder, processes=self._processes),
            self._train,
            self._validation,
            temperature=temperature,
            used_rows=self._used_rows,
        )
        # The shares decide about the state to keep and the end of the run, so all processes take those of the first.
        shares = Shares(**agreed_figures(shares._asdict(), self._processes))
        figures = {"hopeless_train": shares.train, "hopeless_validation": shares.validation}
        findings.lines.append(figures)
        if serves_better(r1, shares, None if kept is None else kept["retrieval_r1"]):
            findings.states["reference"] = {"epoch": epoch, "retrieval_r1": r1, **figures}
        findings.stops = self._run.config.as_reference and shares.past_hope
        findings.notes["hopeless"] = f"hopeless {shares.train:.0%} of training, {shares.validation:.0%} of validation"
