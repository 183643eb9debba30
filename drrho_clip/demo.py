"""The demonstration: a reference model and three methods on built-in data, with a table and a report.

The comparison is fair: the three learners, one per method, share initial parameters, batch order, samples seen,
temperature, optimiser and schedule. The same three learning rates were tried with each method, and the demo uses the
rate with the best R@1 on the validation split. R@1 is the share of queries whose right partner is the first answer.
``tools/tune_learning_rates.py`` recorded these trials in ``learning_rates.json``, in the folder of this file.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from drrho_clip.config import TrainConfig
from drrho_clip.data import ArrayDataset, DataSplits
from drrho_clip.data.splits import open_splits
from drrho_clip.encode import Encoder
from drrho_clip.errors import BadInput
from drrho_clip.files.outputs import check_folder, has_checkpoint, write_json
from drrho_clip.methods import METHODS
from drrho_clip.report.data import ReportData
from drrho_clip.report.gallery import retrieval_examples
from drrho_clip.report.page import write_report
from drrho_clip.run import open_run, read_metrics
from drrho_clip.run.outcome import Outcome, load_outcome
from drrho_clip.table_defaults import preferred_architecture, preset
from drrho_clip.train import train
from drrho_core.backend import Backend, backend_names

LEARNING_RATES = (2e-3, 4e-3, 8e-3)
"""The candidates for the learning rate of every run."""

COMPARED = ("clip", "sogclr", "drrho")
"""The methods that the demo compares."""

ROLES = ("reference", *COMPARED)


def demo_configs(data: str, backend: str, *, seed: int, quick: bool, runs: Path) -> dict[str, TrainConfig]:
    """Return the settings of the four runs by name: reference, clip, sogclr, drrho.

    Parameters
    ----------
    data : {"scenes", "digits"}
        The built-in data set.
    backend : str
        Name of the array library.
    seed : int
        Seed of data, initial parameters and batch order.
    quick : bool
        Train small models for a few steps.
    runs : Path
        Folder of the runs.
    """
    base = TrainConfig(data=data, method="clip", seed=seed, data_seed=seed, backend=backend)
    base = replace(base, **preset(data))
    # The reference model is half as wide as the learners and shares no training pair with them.
    reference = replace(base, data=f"{data}:reference", width=base.width // 2, train_size=20_000)
    # With fewer scenes and more epochs than the defaults, the learners see each scene so often that they can memorise
    # the swapped captions.
    if data == "scenes":
        base = replace(base, train_size=16_000, epochs=12)
    # A quick demo has few steps, small encoders and few scenes.
    if quick:
        small: dict[str, Any] = {"train_size": 768, "epochs": 2, "batch_size": 128, "width": 8, "warmup_steps": 2}
        base, reference = replace(base, **small), replace(reference, **small)
    rates = chosen_learning_rates(data)
    configs = {"reference": replace(reference, learning_rate=rates["reference"])}
    for method in COMPARED:
        folder = str(runs / "reference") if METHODS[method].needs_reference else None
        configs[method] = replace(base, method=method, reference=folder, learning_rate=rates[method])
    return configs


def learning_rate_record() -> dict[str, Any]:
    """Return the recorded trials: validation R@1 by data set, run and learning rate."""
    record: dict[str, Any] = json.loads(files("drrho_clip").joinpath("learning_rates.json").read_text())
    return record


def chosen_learning_rates(data: str) -> dict[str, float]:
    """Return, for every run, the learning rate with the best validation R@1."""
    trials = learning_rate_record()["validation_r1"][data]
    return {role: float(max(trials[role], key=lambda rate: trials[role][rate])) for role in ROLES}


def run_demo(
    out: str | Path,
    *,
    backend: Backend,
    data: str,
    seeds: Sequence[int] = (0,),
    quick: bool = False,
    resume: bool = False,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Train the reference model and the three methods, write results.json and report.html.

    Parameters
    ----------
    out : path
        A new folder; with `resume`, the folder of an interrupted demo.
    backend : Backend
        The library that runs the training.
    data : {"scenes", "digits"}
        Rendered scenes (made for a backend with convolutions), or scikit-learn's digits (any backend).
    seeds : sequence of int
        At least one seed. All methods are compared once per seed; the pictures of the report show the first seed.
    quick : bool
        Train small models for a few steps. This shows that every part works, but not which method is best.
    resume : bool
        Continue an interrupted demo.
    quiet : bool
        Show no progress.

    Returns
    -------
    list of dict
        The rows of results.json.

    Raises
    ------
    BadInput
        If the folder cannot be written or holds files of an earlier demo and `resume` is off, or if there is no seed or
        a seed is repeated.
    """
    out = Path(out)
    if not seeds:
        raise BadInput("seeds must hold at least one seed, got none")
    if len(set(seeds)) < len(seeds):
        raise BadInput(f"seeds must not repeat a seed, got {' '.join(map(str, seeds))}")
    if not resume:
        present = [name for name in ("results.json", "report.html", "runs") if (out / name).exists()]
        if present:
            raise BadInput(
                f"out must be a folder without a demo (or say --resume), got {out} with {', '.join(present)}"
            )
    check_folder(out, "out")
    rows: list[dict[str, Any]] = []
    pictured: list[tuple[DataSplits, dict[str, Outcome]]] = []
    for seed in seeds:
        folder = out / "runs" / f"seed{seed}"
        configs = demo_configs(data, backend.name, seed=seed, quick=quick, runs=folder)
        splits = open_splits(configs["drrho"])
        outcomes = {}
        # The reference model comes first, because drrho reads its folder.
        for role, config in configs.items():
            outcomes[role] = train(
                replace(config, architecture=preferred_architecture(config.architecture, backend)),
                folder / role,
                resume=resume and has_checkpoint(folder / role),
                backend=backend,
                splits=open_splits(config) if role == "reference" else splits,
                quiet=quiet,
            )
            rows.append(outcomes[role].row | {"method": role, "dataset": data})
        # Features and pictures of the first seed are enough for the report.
        if not pictured:
            pictured.append((splits, outcomes))
    command = f"drrho demo --out {shlex.quote(str(out))} --backend {backend.name} --seeds {' '.join(map(str, seeds))}"
    report = report_data(rows, *pictured[0], data=data, command=command + (" --quick" if quick else ""), quick=quick)
    write_report(out / "report.html", report)
    write_json(out / "results.json", rows)
    return rows


def report_data(
    rows: Sequence[Mapping[str, Any]],
    splits: DataSplits,
    outcomes: Mapping[str, Outcome],
    *,
    data: str,
    command: str,
    quick: bool,
) -> ReportData:
    """Gather the content of the report from finished runs."""
    # Curves and pictures come from the first seed, the table from all seeds.
    curves = {role: learning_curve(outcome) for role, outcome in outcomes.items()}
    record = learning_rate_record()["validation_r1"][data]
    trials = {role: {float(rate): float(r1) for rate, r1 in record[role].items()} for role in ROLES}
    config, reference = outcomes["drrho"].run.config, outcomes["reference"].run.config
    total = f"{config.epochs} epochs of {len(splits.train):,} pairs in batches of {config.batch_size}"
    swapped = f"{config.swapped_fraction:.0%} of the training captions are swapped among samples"
    facts = [
        ("Data", f"{data}; {swapped}; validation and test pairs are clean"),
        (
            "Shared by the three methods",
            "initial parameters, batch order, samples seen, temperature, optimiser, schedule",
        ),
        ("Samples seen", total),
        ("Temperature", f"{config.temperature:g}, fixed"),
        ("Optimiser", f"AdamW, weight decay {config.weight_decay:g}, warm-up {config.warmup_steps} steps, cosine to 0"),
        ("gamma", f"cosine from 1 to {config.gamma_min:g} (SogCLR and DRRho)"),
        (
            "The reference model saw",
            f"{outcomes['reference'].row['samples_seen']:,} samples of other training pairs with the same share of "
            f"swapped captions, plain CLIP; its encoders have width {reference.width}, the learners' {config.width}",
        ),
        ("Backend", f"{config.backend}, {config.dtype}"),
        ("Seeds", ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))),
        ("Versions", _versions()),
        ("Machine", f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"),
    ]
    pairs = "rendered scenes with captions" if data == "scenes" else "scikit-learn's handwritten digits with captions"
    note = " This is a quick run: it shows that every part works, but not which method is best." if quick else ""
    return ReportData(
        title="Steering CLIP with a reference model",
        results=rows,
        introduction=f"Four small CLIP models trained on {pairs}, {swapped}.{note}",
        curves=curves,
        gallery=retrieval_examples(splits.test, {role: outcome.encoder for role, outcome in outcomes.items()}),
        weights=swapped_caption_weights(splits, outcomes),
        weights_note=(
            "If the caption of an image was swapped away, the loss pushes the image away from its true caption. The "
            "chart shows the weight with which this happens (swapped), and the weights with which the loss pushes the "
            "image away from 255 captions of other images (clean). The average weight is 1. For both objectives the "
            "weights are computed from the same training pairs and the same features, those of the model that SogCLR "
            "trained, so the reference model is the only difference."
        ),
        learning_rates=trials,
        chosen_learning_rates=chosen_learning_rates(data),
        facts=facts,
        command=command,
    )


def learning_curve(outcome: Outcome) -> list[dict[str, float | None]]:
    """Return the points of one run's curves from its metrics.jsonl."""
    return [
        {
            "samples_seen": record["samples_seen"],
            "loss": record.get("loss"),
            "surrogate": record.get("surrogate"),
            "validation_r1": record.get("validation_retrieval_r1"),
        }
        for record in read_metrics(outcome.run.metrics)
    ]


def swapped_caption_weights(
    splits: DataSplits, outcomes: Mapping[str, Outcome], *, num_images: int = 512, num_others: int = 255, seed: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """Measure how strongly SogCLR and DRRho push an image away from its true caption after a swap.

    An anchor i is an image with a swapped caption, so the training pair (i, i) is wrong. The negatives here are the
    true caption of the image, which belongs to another sample now, and `num_others` captions of other images. S_ij is
    the similarity of image i and caption j in the model that SogCLR trained, R_ij is their similarity in the reference
    model, lambda is the reference weight and tau the temperature. Negative j has the weight
    ``w_ij = exp(D_ij) / mean_j exp(D_ij)`` with ``D_ij = (Z_ij - Z_ii) / tau``, so the mean of the weights is 1. The
    two methods differ in Z only: ``Z = S`` for sogclr and ``Z = S - lambda R`` for drrho.

    Returns
    -------
    dict
        For each method the weights of two groups: "clean" (captions of other images) and "swapped" (the true caption).
    """
    data = splits.train
    if not isinstance(data, ArrayDataset) or not data.is_swapped.any():
        return {}
    # The negatives of an anchor are the true caption of the image, then captions of random pairs.
    rng = np.random.default_rng([seed, 1])
    anchors = rng.permutation(np.flatnonzero(data.is_swapped))[:num_images]
    others = rng.integers(0, len(data), size=(anchors.size, min(num_others, len(data))))
    own_captions = [data.own_captions[row] for row in anchors.tolist()]
    config = outcomes["drrho"].run.config
    similarity = _against(outcomes["sogclr"].encoder, data, anchors, others, own_captions)
    reference = _against(outcomes["reference"].encoder, data, anchors, others, own_captions)
    weights = {}
    for method, z in (("sogclr", similarity), ("drrho", similarity - config.reference_weight * reference)):
        # Z_ii cancels between numerator and mean; the maximum is subtracted so that exp cannot overflow.
        w = np.exp((z - z.max(axis=1, keepdims=True)) / config.temperature)
        w /= w.mean(axis=1, keepdims=True)
        weights[method] = {"clean": w[:, 1:].ravel(), "swapped": w[:, 0]}
    return weights


def _against(
    encoder: Encoder, data: ArrayDataset, anchors: np.ndarray, others: np.ndarray, own_captions: Sequence[str]
) -> np.ndarray:
    """Return the similarities of m anchors with their true captions (column 0) and with the other captions."""
    images, texts = encoder.pairs(data)
    own = encoder.texts(list(own_captions))
    anchor = images[anchors].astype(np.float64)
    first = np.sum(anchor * own, axis=1, keepdims=True)
    rest = np.einsum("id,ijd->ij", anchor, texts[others].astype(np.float64))
    return np.concatenate([first, rest], axis=1)


def _versions() -> str:
    """Return the versions of this library and of the array libraries that are installed."""
    # A library whose distribution does not have the name of the backend is left out.
    versions = []
    for package in ("drrho-core", *backend_names()):
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return ", ".join(versions)


def load_outcomes(folder: Path, backend: Backend) -> dict[str, Outcome]:
    """Open the four finished runs of a seed, to write a new report without training."""
    return {role: load_outcome(open_run(folder / role), backend) for role in ROLES}
