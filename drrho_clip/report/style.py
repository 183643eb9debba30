"""The look of the report: the names and colours of the methods, the form of numbers, and the style sheets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from importlib import resources

LABELS = {"reference": "Reference model", "clip": "CLIP", "sogclr": "SogCLR", "drrho": "DRRho-CLIP"}
"""Names of the known methods, in the order of the page; any other method comes after them, under its own name."""

# The colour of DRRho is warm, the colours of the other methods are cool. All differ in lightness as well as in hue, so
# that colour-blind readers and readers of grey prints can distinguish them. Lines and bars also have names beside them.
_LIGHT = {"reference": "#787d85", "clip": "#3794cf", "sogclr": "#0b4f8a", "drrho": "#d4580a"}
_DARK = {"reference": "#9aa1aa", "clip": "#9cd6f7", "sogclr": "#4088d8", "drrho": "#ff8f45"}
_OTHERS = {"other-0": "#8a5fbf", "other-1": "#2f8f5b", "other-2": "#b3416f", "other-3": "#8a7a1f"}
_INK = {
    "light": {
        "page": "#fcfbf9",
        "card": "#ffffff",
        "ink": "#1d2126",
        "soft": "#5b626b",
        "rule": "#e2dfd9",
        "hit": "#1a7f4b",
    },
    "dark": {
        "page": "#14171b",
        "card": "#1b1f24",
        "ink": "#eceef0",
        "soft": "#a5adb6",
        "rule": "#333941",
        "hit": "#4fcf8e",
    },
}

PALETTE = {**_INK["light"], **_LIGHT, **_OTHERS}
"""Every colour of a light page by the name of its CSS variable. No two colours are equal."""

UNKNOWN = "\N{EN DASH}"
"""Written in place of a figure that is not known."""

# Control characters, surrogates and noncharacters, which XML cannot contain, and the controls of writing direction:
# an override that is not closed would reverse the text after it, and a closing one would end the page's own isolation.
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def clean(text: object) -> str:
    """Return a text in which U+FFFD replaces every character that could break a page; nothing is escaped.

    These characters are control characters except tab and line breaks, surrogates, noncharacters, and the embeddings,
    overrides and isolates of bidirectional text.
    """
    return _NOT_TEXT.sub("\ufffd", str(text))


def ordered(methods: Iterable[str]) -> list[str]:
    """Return each method once: first the methods of `LABELS`, in that order, then all others in the given order."""
    given = list(dict.fromkeys(methods))
    return [method for method in LABELS if method in given] + [method for method in given if method not in LABELS]


def label(method: str) -> str:
    """Return a method's name for readers, without escaping it for HTML."""
    return LABELS.get(method, method)


def css_class(method: str) -> str:
    """Return the class that gives an element its method's colour as ``var(--c)``."""
    # The colour of a method that is not in `LABELS` depends only on the name, so it is the same in every chart.
    return method if method in LABELS else f"other-{sum(method.encode(errors='replace')) % len(_OTHERS)}"


def percent(share: float) -> str:
    """Write a share in [0, 1] as a percentage with one decimal; write a dash if the share is not finite."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%" if math.isfinite(share) else UNKNOWN


def tenths(share: float) -> str:
    """Write a share in [0, 1] in per cent without the sign, for a column whose heading has "%"."""
    return f"{100 * share:.1f}" if math.isfinite(share) else UNKNOWN


def number(value: float) -> str:
    """Write a number for an axis: up to three significant digits, no zeros at the end."""
    return _three_digits(value, ".3g")


def figures(value: float) -> str:
    """Write a number for a column or a sentence: three significant digits, including zeros at the end."""
    return _three_digits(value, "#.3g").removesuffix(".")


def _three_digits(value: float, form: str) -> str:
    if not math.isfinite(value):
        return UNKNOWN
    size = abs(value)
    if size >= 1000:
        text = f"{value:,.0f}" if size < 1e6 else f"{value:.1e}"
    else:
        text = f"{value:.1e}" if 0 < size < 1e-3 else f"{value:{form}}"
    return text.replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e").replace("-", "\N{MINUS SIGN}")


def colours() -> str:
    """Return the style rules that set the colours for light and dark pages, and the colour ``--c`` of each method."""

    def variables(palette: dict[str, str]) -> str:
        return "".join(f"--{name}:{colour};" for name, colour in palette.items())

    light, dark = variables(PALETTE), variables({**_INK["dark"], **_DARK})
    return "\n".join(
        [
            f":root{{color-scheme:light dark;{light}}}",
            f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}",
            *(f".{name}{{--c:var(--{name})}}" for name in [*LABELS, *_OTHERS]),
        ]
    )


def style_sheet(name: str) -> str:
    """Return a style sheet of the folder templates, such as "chart" for chart.css."""
    return (resources.files("drrho_clip.report") / "templates" / f"{name}.css").read_text(encoding="utf-8")
