"""Measure the rule by which a reference model stops, and write docs/examples/reference_rule.md.

python -m benchmarks.own_pairs.rule [--fashion-mnist FOLDER] [--seed 0] [--out docs/examples]

A pair is *hopeless* for a model if it fits worse than random pairs. After every epoch the harness compares the share of
hopeless training pairs with that of held-out pairs, and keeps the state that may serve as a reference model. Here the
swapped captions are known, so the benchmark can tell how well the pair losses of each state separate wrong captions
from right captions, and whether the rule kept a good state. Held-out captions are swapped as often as training
captions, as in a user's own table.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from drrho_clip.config import TrainConfig
from drrho_clip.data import ArrayDataset, DataSplits, digit_splits, digits, exchange_captions, scenes
from drrho_clip.reference.memorisation import PairFeatures, pair_losses
from drrho_clip.run import describe_run
from drrho_clip.trainer import Trainer
from drrho_core.backend import get_backend

# The classes of Fashion-MNIST in the order of the labels, as its authors name them.
_CLOTHES: Final = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
# Number of training pairs that are ranked after each epoch.
_RANKED: Final = 4000


class Problem(NamedTuple):
    """Data with known swaps, and the settings that differ from the defaults."""

    title: str
    splits: DataSplits
    settings: dict[str, Any]


class Observed(Trainer):
    """A trainer that ranks the training pairs after each epoch; `areas` holds the area under the curve per epoch."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.areas: list[float] = []

    def end_of_epoch(self, epoch: int) -> None:
        """Validate as usual, then measure how well the pair losses separate wrong captions from right captions."""
        super().end_of_epoch(epoch)
        rows = np.arange(min(_RANKED, len(self.splits.train)))
        images, texts = self.encoder.batches(self.source.in_order(256, rows=rows))
        losses = pair_losses(PairFeatures(images, texts), temperature=self.run.config.temperature)
        self.areas.append(area_under_the_curve(losses, self.splits.train.is_swapped[rows]))  # type: ignore[attr-defined]


def area_under_the_curve(losses: np.ndarray, wrong: np.ndarray) -> float:
    """Return the share of pairs (wrong, right) in which the wrong caption has the larger pair loss.

    Examples
    --------
    >>> area_under_the_curve(np.asarray([3.0, 1.0, 2.0, 0.0]), np.asarray([True, False, True, False]))
    1.0
    """
    # The rank sum of Mann and Whitney; ties are too rare to matter.
    ranks = np.argsort(np.argsort(losses)) + 1
    positives = int(wrong.sum())
    surplus = float(ranks[wrong].sum()) - positives * (positives + 1) / 2
    return surplus / (positives * (len(wrong) - positives))


def noisy(data: ArrayDataset, fraction: float, seed: int) -> ArrayDataset:
    """Exchange a share of the captions of a data set at random."""
    captions, is_swapped = exchange_captions(data.own_captions, fraction, np.random.default_rng(seed))
    return ArrayDataset(data.name, data.images, captions, own_captions=data.own_captions, is_swapped=is_swapped)


def problems(seed: int, fashion_mnist: Path | None) -> list[Problem]:
    """Return the data sets; Fashion-MNIST only if its folder is given."""
    found = []
    train = noisy(scenes(6000, seed=seed, swapped_fraction=0.0), 0.3, seed)
    held_out = noisy(scenes(600, seed=seed, stream="validation", swapped_fraction=0.0), 0.3, seed + 1)
    settings = {"epochs": 24, "batch_size": 128, "width": 32}
    found.append(Problem("built-in scenes, 6,000, 30 % swapped", DataSplits(train, held_out, held_out), settings))
    parts = digit_splits(seed=seed)
    train = noisy(digits("train", seed=seed, swapped_fraction=0.0), 0.3, seed)
    held_out = noisy(parts.validation, 0.3, seed + 1)  # type: ignore[arg-type]
    settings = {"epochs": 60, "batch_size": 64, "architecture": "mlp", "image_size": 8}
    found.append(Problem("digits, 698, 30 % swapped", DataSplits(train, held_out, held_out), settings))
    if fashion_mnist is not None:
        clothes = noisy(fashion(fashion_mnist, 11_000), 0.5, seed)
        splits = DataSplits(
            *(clothes.subset(np.arange(*ends)) for ends in ((0, 10_000), (10_000, 11_000), (10_000, 11_000)))
        )
        settings = {"epochs": 16, "batch_size": 128, "image_size": 28, "learning_rate": 1e-3}
        found.append(Problem("Fashion-MNIST, 10,000, 50 % swapped", splits, settings))
    return found


def fashion(folder: Path, size: int) -> ArrayDataset:
    """Read the first images of Fashion-MNIST; the caption names the class."""
    with gzip.open(folder / "train-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(16 + size * 784), dtype=np.uint8, offset=16).reshape(size, 28, 28, 1)
    with gzip.open(folder / "train-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(8 + size), dtype=np.uint8, offset=8)
    return ArrayDataset("fashion-mnist", pixels, [f"a photo of a {_CLOTHES[label]}" for label in labels])


def measure(problem: Problem, seed: int) -> dict[str, Any]:
    """Train without a reference model, and return the figures of each epoch and the epoch that the rule kept."""
    config = TrainConfig(data="scenes", method="clip", backend="torch", seed=seed, **problem.settings)
    backend = get_backend("torch")
    with tempfile.TemporaryDirectory() as folder:
        run = describe_run(Path(folder), config, problem.splits.train)
        run.write()
        trainer = Observed(run, backend, problem.splits)
        trainer.fit()
        lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
        kept = trainer.kept["reference"]["epoch"]
    epochs = []
    for epoch, area in enumerate(trainer.areas):
        figures = {name: value for line in lines if line.get("epoch") == epoch for name, value in line.items()}
        epochs.append(
            {
                "validation_r1": round(figures["validation_retrieval_r1"], 4),
                "hopeless_train": round(figures["hopeless_train"], 4),
                "hopeless_validation": round(figures["hopeless_validation"], 4),
                "area_under_the_curve": round(area, 4),
            }
        )
    return {"title": problem.title, "settings": problem.settings, "kept_epoch": kept, "epochs": epochs}


def write_page(folder: Path, seed: int, results: list[dict[str, Any]]) -> None:
    """Write the figures, and a page with one row per data set."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"seed": seed, "data": results}, indent=1)
    (folder / "reference_rule.json").write_text(text + "\n", encoding="utf-8")
    lines = [
        "# When a reference model stops: the rule on three data sets",
        "",
        "The command `python -m benchmarks.own_pairs.rule --fashion-mnist FOLDER` writes this page; the figures of",
        "every epoch are in [`reference_rule.json`](reference_rule.json). A model is trained by `clip` on pairs of",
        "which a known share has swapped captions, in the training pairs and in the held-out pairs. The *area* is",
        "the share of pairs of a wrong and a right training caption in which the wrong caption has the larger pair",
        "loss: 1 is a perfect ranking, and 0.5 is chance. The rule does not know which captions are swapped. It",
        "keeps the epoch with the best R@1 on the noisy held-out pairs among the epochs in which the share of",
        "hopeless training pairs is at least half of the share of hopeless held-out pairs; see [How to",
        "choose](../how-to-choose.md#a-reference-model-of-your-own).",
        "",
        "| data | epochs | epoch of the rule | area there | best area (epoch) | area at best R@1 (epoch) | last area |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        areas = [epoch["area_under_the_curve"] for epoch in result["epochs"]]
        best_r1 = int(np.argmax([epoch["validation_r1"] for epoch in result["epochs"]]))
        best, kept = int(np.argmax(areas)), result["kept_epoch"]
        lines.append(
            f"| {result['title']} | {len(areas)} | {kept + 1} | {areas[kept]:.3f} | {areas[best]:.3f} ({best + 1}) | "
            f"{areas[best_r1]:.3f} ({best_r1 + 1}) | {areas[-1]:.3f} |"
        )
    (folder / "reference_rule.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line, measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion-mnist", type=Path, help="folder with the files of Debian's dataset-fashion-mnist")
    parser.add_argument("--seed", type=int, default=0, help="seed of swaps and parameters")
    parser.add_argument("--out", type=Path, default=Path("docs/examples"), help="folder of the page and its figures")
    options = parser.parse_args()
    results = [measure(problem, options.seed) for problem in problems(options.seed, options.fashion_mnist)]
    write_page(options.out, options.seed, results)
    print((options.out / "reference_rule.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
