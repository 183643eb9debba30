"""How the report looks: a method's name and colour everywhere the same, how numbers are written, the style sheet."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from importlib import resources

LABELS = {"reference": "Reference model", "clip": "CLIP", "sogclr": "SogCLR", "drrho": "DRRho-CLIP"}
"""Names in the reader's order; other methods follow in the order in which they come and keep their own name."""

# The baselines are cool and the method of the page is warm. They differ in lightness as well as in hue, so they stay
# apart for colour-blind readers and in print; every line and bar is named where it stands anyway.
_LIGHT = {"reference": "#787d85", "clip": "#3794cf", "sogclr": "#0b4f8a", "drrho": "#d4580a"}
_DARK = {"reference": "#9aa1aa", "clip": "#9cd6f7", "sogclr": "#4088d8", "drrho": "#ff8f45"}
_OTHERS = ("#8a5fbf", "#2f8f5b", "#b3416f", "#8a7a1f")
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

UNKNOWN = "\N{EN DASH}"
"""What stands where a figure is not known."""

_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff￾￿]")


def escape(text: object) -> str:
    """Make any text safe inside an element or a quoted attribute of HTML and of XML."""
    return html.escape(_NOT_TEXT.sub("�", str(text)), quote=True)


def ordered(methods: Iterable[str]) -> list[str]:
    """Return each method once, the known ones first and in the reader's order."""
    found = list(dict.fromkeys(methods))
    return [method for method in LABELS if method in found] + [method for method in found if method not in LABELS]


def label(method: str) -> str:
    """Return a method's name for readers; not escaped."""
    return LABELS.get(method, method)


def css_class(method: str) -> str:
    """Return the class that gives an element its method's colour as ``var(--c)``."""
    # A method that the palette does not know gets a colour by its name, so that it is the same in every chart.
    return method if method in LABELS else f"other-{sum(method.encode()) % len(_OTHERS)}"


def percent(share: float) -> str:
    """Write a share in [0, 1] as a percentage with one decimal; a dash where it is not known."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%" if math.isfinite(share) else UNKNOWN


def tenths(share: float) -> str:
    """Write a share in [0, 1] in per cent without the sign, for a column whose head has it."""
    return f"{100 * share:.1f}" if math.isfinite(share) else UNKNOWN


def number(value: float) -> str:
    """Write a number as short as three significant digits allow: for an axis."""
    return _three_digits(value, ".3g")


def figures(value: float) -> str:
    """Write a number with three significant digits, zeros too: for a column or a sentence."""
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
    """Return the style rules that set the colours for light and dark pages, and each method's ``--c``."""

    def variables(ink: dict[str, str], methods: dict[str, str]) -> str:
        named = {**ink, **methods, **{f"other-{i}": colour for i, colour in enumerate(_OTHERS)}}
        return "".join(f"--{name}:{colour};" for name, colour in named.items())

    light, dark = variables(_INK["light"], _LIGHT), variables(_INK["dark"], _DARK)
    classes = [*LABELS, *(f"other-{i}" for i in range(len(_OTHERS)))]
    return "\n".join(
        [
            f":root{{color-scheme:light dark;{light}}}",
            f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}",
            *(f".{name}{{--c:var(--{name})}}" for name in classes),
        ]
    )


def style_sheet(name: str) -> str:
    """Return one of the style sheets that lie beside this module: "chart" or "page"."""
    return (resources.files("drrho_clip.report") / f"{name}.css").read_text(encoding="utf-8")
