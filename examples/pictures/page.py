"""The table of the results, the paired differences with their intervals, and the page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from scipy.stats import t as student

COMPARED: Final = (("drrho", "reference"), ("drrho", "clip"), ("drrho", "sogclr"), ("sogclr", "clip"))
COLUMNS: Final = {
    "validation_r1": "validation R@1",
    "r1": "test R@1",
    "image_to_text": "image to text",
    "text_to_image": "text to image",
    "zero_shot": "zero-shot",
}


class Difference(NamedTuple):
    """Mean difference of two methods over the seeds, and half the width of the 95 % interval."""

    first: str
    second: str
    mean: float
    half: float

    @property
    def is_real(self) -> bool:
        """Return True if the interval excludes zero."""
        return abs(self.mean) > self.half


def difference(first: Mapping[int, float], second: Mapping[int, float], names: tuple[str, str]) -> Difference:
    """Compare two methods seed by seed, with Student's interval of the mean difference."""
    values = [first[seed] - second[seed] for seed in sorted(first)]
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Difference(*names, statistics.fmean(values), float(student.ppf(0.975, len(values) - 1)) * error)


def differences(results: Mapping[str, Any], data: str, column: str = "r1") -> list[Difference]:
    """Return the compared differences of a data set."""

    def of(method: str) -> dict[int, float]:
        return {row["seed"]: row["metrics"][column] for row in _rows(results, data, method)}

    return [difference(of(first), of(second), (first, second)) for first, second in COMPARED]


def sentence(compared: Difference, title: str) -> str:
    """Say whether the seeds show a difference.

    Examples
    --------
    >>> sentence(Difference("drrho", "clip", 0.02, 0.01), "Pictures")
    'Pictures: drrho is above clip by 0.0200 ± 0.0100; the interval excludes zero, so these seeds show a difference.'
    """
    side = "above" if compared.mean >= 0 else "below"
    verdict = (
        "the interval excludes zero, so these seeds show a difference"
        if compared.is_real
        else "the interval contains zero, so these seeds do not show a difference"
    )
    return (
        f"{title}: {compared.first} is {side} {compared.second} by {abs(compared.mean):.4f} ± {compared.half:.4f}; "
        f"{verdict}."
    )


def table(results: Mapping[str, Any]) -> str:
    """Return the table of means and standard deviations over the seeds."""
    lines = [f"| data | method | {' | '.join(COLUMNS.values())} |", "|---|---|" + "---|" * len(COLUMNS)]
    for data, about in results["data"].items():
        for method in dict.fromkeys(row["method"] for row in results["rows"]):
            metrics = [row["metrics"] for row in _rows(results, data, method)]
            cells = [_cell([row[column] for row in metrics if column in row]) for column in COLUMNS]
            lines.append(f"| {about['title']} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(results: Mapping[str, Any]) -> str:
    """Return the page with sizes, table, differences and sentences."""
    sentences: list[str] = []
    for data, about in results["data"].items():
        sentences += [f"- {sentence(compared, about['title'])}" for compared in differences(results, data)]
        if "zero_shot" in _rows(results, data, "clip")[0]["metrics"]:
            title = f"{about['title']}, zero-shot"
            sentences += [f"- {sentence(compared, title)}" for compared in differences(results, data, "zero_shot")]
    versions = results["versions"]
    lines = [
        "# Real pictures: which differences are real?",
        "",
        "The command below writes this page and `real_pictures.json`, from which every figure of the page is derived.",
        "The code is [`examples/real_pictures.py`](../../examples/real_pictures.py) with the readers in",
        "[`drrho_clip/reproduce/packaged`](../../drrho_clip/reproduce/packaged). `--root DIR` names the folder below",
        "which the packages of the pictures are installed; a missing package is reported with the line that installs",
        "it.",
        "",
        "```sh",
        results["command"],
        "```",
        "",
        "Two frozen towers turn a picture and a caption into features: EfficientNet-Lite0 and the sentence encoder",
        "MiniLM. **The towers have seen labels**: the first has learnt the classes of ImageNet, the second pairs of",
        "sentences. Each method trains only heads over these features, one hidden layer for each side. Epochs, batch",
        "and learning rate are the defaults of `drrho train` for a table of this size; no setting was tuned for a",
        "method. The reference model is trained on the same pairs by README's recipe: clip for a third of the epochs,",
        "stopped before it learns wrong captions by heart. drrho is steered by this reference model. So clip, sogclr",
        "and drrho see as many samples each, and drrho rests on those of the reference model besides.",
        "",
        "## The data",
        "",
        "A *concept* is a group of pairs with equal titles, equal lists of keywords or equal pictures. The pairs of a",
        "concept are in one part, because near duplicates abound. A seed draws the parts, the swapped captions, the",
        "parameters and the batches. Test captions are never swapped; those of OpenClipart are as noisy as all titles.",
        "",
        "| data | pairs | captions | concepts | training / validation / test pairs, seed 0 | side in pixels | epochs |",
        "|---|---|---|---|---|---|---|",
    ]
    for data, about in results["data"].items():
        first = _rows(results, data, "clip")[0]
        sizes = first["pairs"]
        parts = " / ".join(f"{sizes[part]:,}" for part in ("train", "validation", "test"))
        lines.append(
            f"| {about['title']} | {about['pairs']:,} | {about['captions']:,} | {about['concepts']:,} | {parts} | "
            f"{about['side']} | {first['epochs']} of {first['batch_size']} pairs per step |"
        )
    lines += [
        "",
        f"All trainings together took {sum(row['seconds'] for row in results['rows']) / 60:.0f} minutes of steps",
        f"({results['machine']}; other programs ran at the same time); the towers ran once before. Versions:",
        ", ".join(f"{name} {number}" for name, number in versions.items()) + ".",
        "",
        "## Results",
        "",
        f"Mean ± standard deviation over {results['seeds']} seeds. R@1 is measured in galleries of 200 pictures, or of",
        "all pictures if there are fewer; the test R@1 is the mean of the two directions beside it. An equal caption",
        "of another picture counts as right.",
        "",
        table(results),
        "",
        "## Differences",
        "",
        "A difference is taken seed by seed, in test R@1 (and in zero-shot accuracy where there are classes), with",
        f"Student's 95 % interval over {results['seeds']} seeds. The seeds share most of their pictures, so the",
        "interval is about other divisions and other starts with these pictures, not about other pictures. With few",
        f"seeds an interval is wide, and of {len(sentences)} intervals a few may exclude zero by chance.",
        "",
        *sentences,
    ]
    return "\n".join(lines) + "\n"


def _rows(results: Mapping[str, Any], data: str, method: str) -> list[Any]:
    return [row for row in results["rows"] if (row["data"], row["method"]) == (data, method)]


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
