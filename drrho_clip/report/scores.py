"""The chart of the scores of a data set: a histogram that shows which captions are probably wrong."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.patches import Patch
from numpy.typing import NDArray

from drrho_clip.report.canvas import WIDTH, Canvas, Chart, css
from drrho_clip.report.charts import round_ticks, tick_names
from drrho_clip.report.style import PALETTE, number

__all__ = ["score_histogram"]

_INK, _SOFT, _DOUBT = PALETTE["ink"], PALETTE["soft"], PALETTE["drrho"]
_BINS = 44


def score_histogram(
    scores: NDArray[np.float64], /, *, doubtful: NDArray[np.bool_] | None, key: str, title: str, x_name: str
) -> Chart:
    """Draw how many captions have which score, and the threshold from which a caption is probably wrong.

    Parameters
    ----------
    scores : float array (n,)
        Finite scores, n >= 1; the larger, the worse the caption fits.
    doubtful : bool array (n,) or None
        The captions that are probably wrong; none of them has a lower score than another caption. None if no rule says
        which captions are wrong.
    key, title : str
        As in `Chart`.
    x_name : str
        The name of the horizontal axis.
    """
    top, bottom, left, right, height = 62, 254, 56, 466, 300
    threshold = float(scores[doubtful].min()) if doubtful is not None and doubtful.any() else None
    names = ("all captions", "") if doubtful is None else ("all others", "probably wrong")
    doubtful = np.zeros(scores.size, dtype=np.bool_) if doubtful is None else doubtful
    edges = _edges(scores, threshold)
    low, high = float(edges[0]), float(edges[-1])
    inside = np.clip(scores, low, high)
    counts = [np.histogram(inside[part], edges)[0] for part in (~doubtful, doubtful)]
    highest = 1.08 * max(1, *(int(count.max()) for count in counts))
    with Canvas(height) as canvas:
        axes = canvas.axes(left, right, top, bottom, grid="y")
        axes.set(xlim=(low, high), ylim=(0, highest))
        ticks, heights = round_ticks(low, high), [tick for tick in round_ticks(0, highest, most=5) if tick % 1 == 0]
        axes.set_xticks(ticks, tick_names(ticks))
        axes.set_yticks(heights, tick_names(heights))
        canvas.text(0, 14, "captions", color=_SOFT)
        canvas.text(right, bottom + 40, x_name, color=_SOFT, ha="right")
        keys = []
        styles = ((_INK, 0.16, 0.75, 1.5, ("first",)), (_DOUBT, 0.38, 1.0, 2.0, ("second", "drrho")))
        for name, count, (colour, fill, line, width, kind) in zip(names, counts, styles, strict=True):
            face, edge = (colour, fill), (colour, line)
            if name:
                text = f"{name}: {int(count.sum()):,}"
                keys.append(Patch(facecolor=face, edgecolor=edge, linewidth=width, label=text))
            # The bars of one side end at the threshold, so that no line at height 0 runs along the other side.
            filled = np.flatnonzero(count)
            if filled.size:
                first, last = int(filled[0]), int(filled[-1]) + 1
                axes.stairs(
                    count[first:last], edges[first : last + 1], fill=True, facecolor=face, edgecolor=edge,
                    linewidth=width, joinstyle="round", zorder=2, gid=css(*kind),
                )  # fmt: skip
        if threshold is not None:
            place = min(max(threshold, low), high)
            axes.plot(
                [place, place], [0, highest * (1 + 10 / (bottom - top))], color=_DOUBT, linewidth=1.5, zorder=3,
                linestyle=(0, (4, 3)), dash_capstyle="butt", gid=css("threshold"),
            )  # fmt: skip
        key_row = canvas.figure.legend(
            handles=keys, ncols=2, loc="upper left", bbox_to_anchor=(left / WIDTH, 1 - 26 / height), frameon=False,
            borderpad=0, borderaxespad=0, handlelength=0.9, handleheight=0.9, handletextpad=0.55, columnspacing=3.5,
            labelcolor=_INK,
        )  # fmt: skip
        for text_of_key, strong in zip(key_row.get_texts(), (False, True), strict=False):
            text_of_key.set(gid=css("strong") if strong else None, weight="bold" if strong else "normal")
        description = f"{scores.size:,} captions with scores from {number(float(scores.min()))} to "
        description += f"{number(float(scores.max()))}"
        if threshold is not None:
            description += f"; {int(doubtful.sum()):,} have at least {number(threshold)} and are probably wrong"
        return canvas.chart(key, title, f"{description}.")


def _edges(scores: NDArray[np.float64], threshold: float | None) -> NDArray[np.float64]:
    """Return the edges of the bins; the threshold is an edge, so that each bin lies on one side of the threshold."""
    # A few extreme scores would make all other bars narrow, so they are counted in the outer bins.
    low, high = (float(value) for value in np.quantile(scores, [0.002, 0.998]))
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    width = (high - low) / _BINS or max(abs(high), 1.0) / _BINS
    start = low if threshold is None else threshold - width * math.ceil((threshold - low) / width)
    # One more bin on the right holds the largest scores, also those that equal the threshold.
    return np.asarray(start + width * np.arange(math.ceil((high - start) / width) + 2), dtype=np.float64)
