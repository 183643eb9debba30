"""Compare four objectives for a classifier of digits with 40 % wrong labels; two of them use a small reference model.

The data are the 1,797 digits that scikit-learn contains, so nothing is downloaded. A reference model is trained on 100
images with clean labels that the learner never sees. The learner trains on about 1,000 other images, of which 40 % have
a wrong label. The four objectives are functions of the same batch of losses. A chi-square ball contains all weights
whose chi-square distance from equal weights is at most a radius.

    ERM      the mean
    DRO      the worst case of the losses over a chi-square ball: a wrong label has a large loss, so it counts more
    RHO      the mean of the k largest excess losses, loss minus reference loss (RHO-LOSS, arXiv 2206.07137)
    DRRho    the worst case of the excess losses over the same ball (Model Steering, arXiv 2505.06699)

A fifth row is a control: ERM on the images of the learner and of the reference model together, so that the control has
as much data as the methods with a reference model. Every objective has one option (for ERM: weight decay). All methods
try the same number of option values and the same learning rates. The setting with the best accuracy on clean validation
images is used. Test images are used only after this choice.

Run it: ``python examples/digits_label_noise.py`` (about two minutes on one core; ``--quick``: seconds, worse figures).
It needs torch and scikit-learn (``pip install drrho-core[torch,train]``), or with ``--backend jax`` JAX instead of
torch. It writes ``results.json`` and ``picture.svg`` and prints a table; the same command writes the same files.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from drrho_clip.report import PALETTE, Canvas, css, percent, round_ticks
from drrho_clip.terminal.progress import Reporter
from drrho_core import (
    ChiSquareBall,
    CVaR,
    KLBall,
    effective_sample_size,
    excess_variance,
    select_top_excess,
)

TEST, VALIDATION, CLASSES, HIDDEN, BATCH, MOMENTUM = 500, 200, 10, 128, 128, 0.9
DECAYS, KEPT = (0.0, 1e-3, 1e-2, 3e-2), (0.25, 0.5, 0.7, 0.85)
BALLS = {
    "chi-square": tuple(ChiSquareBall(radius) for radius in (0.01, 0.1, 0.3, 1.0)),
    "kl": tuple(KLBall(radius) for radius in (0.01, 0.1, 0.5, 1.0)),
    "cvar": tuple(CVaR(alpha) for alpha in (0.9, 0.7, 0.5, 0.25)),
}
METHODS = {
    "reference": ("ERM", "reference model"),
    "ERM": ("ERM", "ERM"),
    "ERM+": ("ERM", "ERM, all images"),
    "DRO": ("DRO", "DRO"),
    "RHO": ("RHO", "RHO"),
    "DRRho": ("DRRho", "DRRho"),
}
"""The objective and the displayed name of every method."""


class Samples(NamedTuple):
    """Images (n, 64) in [0, 1], labels (n,), and for each label whether it was replaced by a wrong digit (n,)."""

    images: np.ndarray
    labels: np.ndarray
    wrong: np.ndarray


class Split(NamedTuple):
    """The parts of the data, and the rows of the data set in each part."""

    parts: dict[str, Samples]
    rows: dict[str, np.ndarray]


class Run(NamedTuple):
    """A trained model, its validation accuracy, and figures of the weights during training."""

    parameters: list[np.ndarray]
    validation: float
    wrong_weight: float
    effective: float


def split(seed: int, noise: float, clean: int) -> Split:
    """Split the digits into test (the same for every seed), validation, reference (`clean` images) and train.

    Only labels of train are made wrong, exactly the share `noise` of these labels. A wrong label is another digit,
    drawn uniformly.
    """
    images, digits = load_digits(return_X_y=True)
    shuffled = np.random.default_rng(2024).permutation(len(digits))
    rng = np.random.default_rng(seed)
    others = rng.permutation(shuffled[TEST:])
    cuts = np.split(others, [VALIDATION, VALIDATION + clean])
    rows = dict(zip(("validation", "reference", "train"), cuts, strict=True), test=shuffled[:TEST])
    parts = {}
    for name, chosen in rows.items():
        labels, wrong = digits[chosen], np.zeros(len(chosen), dtype=bool)
        if name == "train":
            wrong[rng.permutation(len(chosen))[: round(noise * len(chosen))]] = True
            labels = np.where(wrong, (labels + rng.integers(1, CLASSES, size=len(chosen))) % CLASSES, labels)
        parts[name] = Samples((images[chosen] / 16).astype(np.float32), labels, wrong)
    return Split(parts, rows)


def initial_parameters(seed: int) -> list[np.ndarray]:
    """Return the parameters of an MLP with one hidden layer, the same in every library."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(64, HIDDEN)) * math.sqrt(2 / 64)
    second = rng.normal(size=(HIDDEN, CLASSES)) * math.sqrt(1 / HIDDEN)
    return [array.astype(np.float32) for array in (first, np.zeros(HIDDEN), second, np.zeros(CLASSES))]


def losses(parameters: Sequence[np.ndarray], samples: Samples) -> np.ndarray:
    """Return the cross-entropy of every sample (n,)."""
    scores = logits(parameters, samples.images)
    scores = scores - np.max(scores, axis=1, keepdims=True)
    return np.log(np.sum(np.exp(scores), axis=1)) - scores[np.arange(len(scores)), samples.labels]


def logits(parameters: Sequence[np.ndarray], images: np.ndarray) -> np.ndarray:
    """Return the logits (n, 10) of the MLP."""
    first, first_bias, second, second_bias = parameters
    return np.maximum(images @ first + first_bias, 0) @ second + second_bias


def accuracy(parameters: Sequence[np.ndarray], samples: Samples) -> float:
    """Return the share of the images whose predicted digit is their label."""
    return float(np.mean(np.argmax(logits(parameters, samples.images), axis=1) == samples.labels))


def torch_learner(objective: str, knob: Any, start: Sequence[np.ndarray], rate: float) -> tuple[Any, Any]:
    """Return ``step(images, labels, reference_loss) -> weights`` and ``read() -> parameters`` of a torch model."""
    import torch
    from drrho_torch import drrho_risk
    from torch.nn import functional

    torch.set_num_threads(1)  # the products are tiny
    parameters = [torch.tensor(array, requires_grad=True) for array in start]
    decay = knob if objective == "ERM" else 0.0
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM, weight_decay=decay)

    def step(*batch: np.ndarray) -> np.ndarray:
        images, labels, reference_loss = map(torch.from_numpy, batch)
        first, first_bias, second, second_bias = parameters
        scores = torch.relu(images @ first + first_bias) @ second + second_bias
        loss = functional.cross_entropy(scores, labels, reduction="none")
        loss.retain_grad()
        if objective == "RHO":
            risk = loss[select_top_excess(loss.detach(), reference_loss, k=round(knob * len(loss)))].mean()
        elif objective == "ERM":
            risk = loss.mean()
        else:
            risk = drrho_risk(loss, reference_loss, knob, reference_weight=1.0 if objective == "DRRho" else 0.0)
        optimizer.zero_grad()
        risk.backward()
        optimizer.step()
        return loss.grad.numpy()  # the derivative of the risk with respect to a sample's loss is the sample's weight

    return step, lambda: [parameter.detach().numpy().copy() for parameter in parameters]


def jax_learner(objective: str, knob: Any, start: Sequence[np.ndarray], rate: float) -> tuple[Any, Any]:
    """Return ``step`` and ``read`` as `torch_learner` does, for a JAX model."""
    compiled = _jax_step(objective, knob)
    state = [list(start), [np.zeros_like(array) for array in start]]

    def step(*batch: np.ndarray) -> np.ndarray:
        *state[:], weights = compiled(*state, rate, *batch)
        return np.asarray(weights)

    return step, lambda: [np.asarray(parameter) for parameter in state[0]]


@lru_cache
def _jax_step(objective: str, knob: Any) -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp
    from drrho_jax import drrho_risk

    def losses_of(parameters: Any, images: Any, labels: Any) -> Any:
        first, first_bias, second, second_bias = parameters
        scores = jax.nn.relu(images @ first + first_bias) @ second + second_bias
        return -jnp.take_along_axis(jax.nn.log_softmax(scores), labels[:, None], axis=1)[:, 0]

    def risk(loss: Any, reference_loss: Any) -> Any:
        if objective == "RHO":
            constant = jax.lax.stop_gradient(loss)
            return loss[select_top_excess(constant, reference_loss, k=round(knob * len(loss)))].mean()
        if objective == "ERM":
            return loss.mean()
        return drrho_risk(loss, reference_loss, knob, reference_weight=1.0 if objective == "DRRho" else 0.0)

    @jax.jit
    def step(parameters: Any, speeds: Any, rate: Any, images: Any, labels: Any, reference_loss: Any) -> Any:
        loss, pull_back = jax.vjp(lambda p: losses_of(p, images, labels), parameters)
        weights = jax.grad(risk)(loss, reference_loss)
        (gradients,) = pull_back(weights)
        decay = knob if objective == "ERM" else 0.0
        speeds = [MOMENTUM * v + g + decay * p for v, g, p in zip(speeds, gradients, parameters, strict=True)]
        return [p - rate * v for p, v in zip(parameters, speeds, strict=True)], speeds, weights

    return step


LEARNERS = {"torch": torch_learner, "jax": jax_learner}


def train(
    learner: Callable[..., tuple[Any, Any]],
    objective: str,
    knob: Any,
    rate: float,
    samples: Samples,
    reference_loss: np.ndarray,
    validation: Samples,
    *,
    seed: int,
    epochs: int,
) -> Run:
    """Train one model. All methods of a seed have the same initial parameters and the same order of images."""
    size = min(BATCH, len(samples.labels) // 4)
    step, read = learner(objective, knob, initial_parameters(seed), rate)
    rng, weights, wrong = np.random.default_rng(seed), [], []
    for _ in range(epochs):
        order = rng.permutation(len(samples.labels))
        for batch in order[: len(order) // size * size].reshape(-1, size):
            weights.append(step(samples.images[batch], samples.labels[batch], reference_loss[batch]))
            wrong.append(samples.wrong[batch])
    wrong_weight = float(np.mean(np.sum(weights, axis=1, where=np.asarray(wrong))))
    effective = float(np.mean(effective_sample_size(np.asarray(weights)))) / size
    parameters = read()
    return Run(parameters, accuracy(parameters, validation), wrong_weight, effective)


def choose(validations: dict[tuple[float, Any], list[float]]) -> tuple[float, Any]:
    """Return the trial with the best mean validation accuracy over the seeds; on a tie, the first."""
    return max(validations, key=lambda trial: math.fsum(validations[trial]))


def experiment(
    *, backend: str, ball: str, noise: float, clean: int, seeds: int, epochs: int, rates: Sequence[float], knobs: int
) -> dict[str, Any]:
    """Run every trial of every method with every seed, choose by validation accuracy, then test the chosen models."""
    splits = [split(seed, noise, clean) for seed in range(seeds)]
    grids = {"ERM": DECAYS, "DRO": BALLS[ball], "RHO": KEPT, "DRRho": BALLS[ball]}
    grids = {name: grid[1 : 1 + knobs] if knobs < len(grid) else grid for name, grid in grids.items()}
    references: list[list[np.ndarray]] = []
    trials, results = [], []
    total = seeds * len(rates) * sum(len(grids[objective]) for objective, _ in METHODS.values())
    with Reporter("training", total) as reporter:
        for method, (objective, name) in METHODS.items():
            runs: dict[tuple[float, Any], list[Run]] = {}
            for trial in [(rate, knob) for rate in rates for knob in grids[objective]]:
                runs[trial] = []
                for seed, (parts, _) in enumerate(splits):
                    samples, reference_loss = material(method, parts, references[seed] if references else None)
                    runs[trial].append(
                        train(
                            LEARNERS[backend],
                            objective,
                            trial[1],
                            trial[0],
                            samples,
                            reference_loss,
                            parts["validation"],
                            seed=seed if method != "reference" else 1000 + seed,
                            epochs=epochs,
                        )
                    )
                    reporter.advance(name)
            best = choose({trial: [run.validation for run in tried] for trial, tried in runs.items()})
            if method == "reference":
                references = [run.parameters for run in runs[best]]
            trials += [
                {
                    "method": method,
                    "learning_rate": trial[0],
                    "knob": str(trial[1]),
                    "validation_accuracy": math.fsum(run.validation for run in tried) / seeds,
                    "chosen": trial == best,
                }
                for trial, tried in runs.items()
            ]
            for seed, (run, (parts, _)) in enumerate(zip(runs[best], splits, strict=True)):
                results.append({"method": method, "seed": seed, "metrics": measure(run, parts, references[seed])})
    return {"trials": trials, "results": results, "summary": summary(results)}


def material(method: str, parts: dict[str, Samples], reference: list[np.ndarray] | None) -> tuple[Samples, np.ndarray]:
    """Return a method's training data and the reference model's losses on them (zeros for the reference model)."""
    samples = parts["reference"] if method == "reference" else parts["train"]
    if method == "ERM+":
        arrays_of_parts = zip(parts["train"], parts["reference"], strict=True)
        samples = Samples(*(np.concatenate(arrays) for arrays in arrays_of_parts))
    reference_loss = np.zeros(len(samples.labels)) if reference is None else losses(reference, samples)
    return samples, reference_loss.astype(np.float32)


def measure(run: Run, parts: dict[str, Samples], reference: list[np.ndarray]) -> dict[str, float]:
    """Return a run's figures: accuracies, losses on right and wrong labels, and variances on the training images."""
    noisy = parts["train"]
    believed = np.argmax(logits(run.parameters, noisy.images), axis=1) == noisy.labels
    loss, reference_loss = (losses(parameters, noisy).astype(np.float64) for parameters in (run.parameters, reference))
    figures = {
        "test_accuracy": accuracy(run.parameters, parts["test"]),
        "validation_accuracy": run.validation,
        "wrong_label_weight": run.wrong_weight,
        "effective_sample_share": run.effective,
        "loss_variance": float(excess_variance(loss, reference_loss, reference_weight=0.0).over_pairs),
        "excess_loss_variance": float(excess_variance(loss, reference_loss).over_pairs),
    }
    for group, members in (("right", ~noisy.wrong), ("wrong", noisy.wrong)):
        if np.any(members):  # with --noise 0 no label is wrong
            figures[f"{group}_labels_believed"] = float(np.mean(believed[members]))
            figures[f"{group}_labels_loss"] = float(np.mean(loss[members]))
            figures[f"{group}_labels_reference_loss"] = float(np.mean(reference_loss[members]))
    return figures


def summary(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return mean and standard deviation over the seeds, for every figure and for DRRho's lead in each seed."""
    summaries = {}
    for method in METHODS:
        rows = [row["metrics"] for row in results if row["method"] == method]
        figures = {name: [row[name] for row in rows] for name in rows[0]}
        figures["drrho_lead"] = leads(results, method)
        summaries[method] = {
            name: {"mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=1))}
            for name, values in figures.items()
        }
    return summaries


def leads(results: Sequence[dict[str, Any]], method: str) -> list[float]:
    """Return DRRho's test accuracy minus a method's test accuracy, for each seed."""
    tested = {name: [row["metrics"]["test_accuracy"] for row in results if row["method"] == name] for name in METHODS}
    return [steered - other for steered, other in zip(tested["DRRho"], tested[method], strict=True)]


def spread(figure: dict[str, float]) -> str:
    """Format mean and standard deviation in per cent."""
    return f"{100 * figure['mean']:.1f} ± {100 * figure['deviation']:.1f}"


def table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the summary as rows of text; the first row is the header."""
    heads = ("", "test accuracy", "DRRho's lead", "ahead in", "weight on wrong labels", "samples", "option, rate")
    rows = [heads]
    for method, (_, name) in METHODS.items():
        figures = report["summary"][method]
        (kept,) = [trial for trial in report["trials"] if trial["method"] == method and trial["chosen"]]
        wins = [pair > 0 for pair in leads(report["results"], method)]
        rows.append(
            (
                name,
                f"{spread(figures['test_accuracy'])} %",
                "" if method == "DRRho" else spread(figures["drrho_lead"]),
                "" if method == "DRRho" else f"{sum(wins)} of {len(wins)}",
                "" if method == "reference" else f"{spread(figures['wrong_label_weight'])} %",
                f"{100 * figures['effective_sample_share']['mean']:.0f} %",
                f"{kept['knob']}, {kept['learning_rate']:g}",
            )
        )
    return rows


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Format rows as a table of plain text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


COLOURS = {"reference": "reference", "ERM": "clip", "ERM+": "clip", "DRO": "other-0", "RHO": "sogclr", "DRRho": "drrho"}
"""Names of colours in the palette of the report; the palette has variants for light and for dark pages."""


def picture(report: dict[str, Any], noise: float) -> str:
    """Draw test accuracy and the weight on wrong labels as an SVG file, with the colours and fonts of the report."""
    learners = [method for method in METHODS if method != "reference"]
    lowest = min(row["metrics"]["test_accuracy"] for row in report["results"])
    low = max(0.0, math.floor(20 * lowest) / 20)
    middle = 78 + 34 * len(METHODS)
    seeds = len({row["seed"] for row in report["results"]})
    description = "; ".join(
        f"{METHODS[method][1]} {percent(report['summary'][method]['test_accuracy']['mean'])} correct, "
        f"{percent(report['summary'][method]['wrong_label_weight']['mean'])} of the weight on wrong labels"
        for method in METHODS
    )
    with Canvas(middle + 54 + 34 * len(learners)) as canvas:
        panel(canvas, report, "test_accuracy", list(METHODS), "test accuracy", (low, 1.0), 0)
        name = "share of the weight on images with a wrong label"
        panel(canvas, report, "wrong_label_weight", learners, name, (0.0, 1.0), middle, mark=noise)
        chart = canvas.chart("digits", "Digits with wrong labels", f"{description}.")
    return chart.as_file(
        heading=f"Digits, {100 * noise:g} % of the training labels wrong",
        note=f"dots: {seeds} seeds; bars and figures: their means; dashed: equal weights",
    )


def panel(
    canvas: Canvas,
    report: dict[str, Any],
    figure: str,
    methods: Sequence[str],
    name: str,
    span: tuple[float, float],
    top: float,
    mark: float | None = None,
) -> None:
    """Draw one row per method: a dot per seed, the mean as an upright bar and as a number."""
    left, right, step = 130.0, 408.0, 34.0
    rows = top + 28
    axes = canvas.axes(left, right, rows, rows + step * len(methods), grid="x", axis="none")
    axes.set(xlim=span, ylim=(len(methods), 0), yticks=[])
    ticks = round_ticks(*span)
    axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    canvas.text(0, top + 14, name, color=PALETTE["soft"])
    if mark is not None:
        axes.plot([mark, mark], [0, len(methods)], color=PALETTE["ink"], linewidth=1.5, linestyle=(0, (4, 3)))
    for row, method in enumerate(methods):
        middle, colour = row + 0.5, PALETTE[COLOURS[method]]
        values = [row["metrics"][figure] for row in report["results"] if row["method"] == method]
        mean = math.fsum(values) / len(values)
        axes.plot(span, (middle, middle), color=PALETTE["rule"], linewidth=1)
        upright = (middle - 9 / step, middle + 9 / step)
        axes.plot((mean, mean), upright, color=colour, linewidth=4, solid_capstyle="round", zorder=3)
        dots = {"s": 81, "color": colour, "edgecolor": PALETTE["card"], "linewidth": 1.5, "zorder": 4}
        axes.scatter(values, [middle] * len(values), gid=css("dot", COLOURS[method]), **dots)
        canvas.text(0, rows + step * middle + 5, METHODS[method][1], strong=method == "DRRho")
        canvas.text(right + 14, rows + step * middle + 5, percent(mean), strong=method == "DRRho")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison with the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=sorted(LEARNERS), default="torch")
    parser.add_argument("--ball", choices=list(BALLS), default="chi-square", help="ambiguity set of DRO and DRRho")
    parser.add_argument("--noise", type=float, default=0.4, help="share of wrong training labels, 0 to 0.8")
    parser.add_argument(
        "--clean", type=int, default=100, help="number of clean images for the reference model, 20 to 500"
    )
    parser.add_argument("--seeds", type=int, help="number of repetitions, 2 to 50 (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/digits_label_noise"), help="folder for the files")
    parser.add_argument("--quick", action="store_true", help="two seeds, few trials, few epochs")
    options = parser.parse_args(arguments)
    if not 0 <= options.noise <= 0.8:
        parser.error(f"--noise must be from 0 to 0.8, got {options.noise:g}")
    if not 20 <= options.clean <= 500:
        parser.error(f"--clean must be from 20 to 500, got {options.clean}")

    if options.seeds is not None and not 2 <= options.seeds <= 50:
        parser.error(f"--seeds must be from 2 to 50, got {options.seeds}")
    if importlib.util.find_spec(options.backend) is None:
        parser.error(f"--backend {options.backend} needs this library: pip install 'drrho-core[{options.backend}]'")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder to write to, got {options.out}: {error.strerror}")

    size: dict[str, Any] = {"seeds": 5, "epochs": 30, "rates": (0.01, 0.03, 0.1, 0.3), "knobs": 4}
    if options.quick:
        size = {"seeds": 2, "epochs": 10, "rates": (0.06,), "knobs": 2}
    if options.seeds is not None:
        size["seeds"] = options.seeds
    settings = {"backend": options.backend, "ball": options.ball, "noise": options.noise, "clean": options.clean}
    report = {"settings": settings | size, **experiment(**settings, **size)}
    (options.out / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (options.out / "picture.svg").write_text(picture(report, options.noise), encoding="utf-8")
    print(aligned(table(report)))
    print(f"written: {options.out / 'results.json'}, {options.out / 'picture.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
