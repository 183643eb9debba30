"""The packages that hold pictures and frozen models: the places of the files, and the commands that install them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "FASHION_MNIST",
    "OPENCLIPART_PNG",
    "OPENCLIPART_SVG",
    "OPENMOJI",
    "RESVG",
    "STAMPS",
    "Missing",
    "Package",
    "module_folder",
]


class Missing(Exception):
    """A package is not installed; the message says how to install it."""


@dataclass(frozen=True)
class Package:
    """A package of pictures.

    Parameters
    ----------
    name : str
        Name of the package.
    install : str
        The command that installs it.
    places : sequence of str
        Folders, relative to a root, in which the package may have its files.
    """

    name: str
    install: str
    places: Sequence[str]

    def folder(self, roots: Sequence[Path]) -> Path:
        """Return the folder of the files below the first root that has it; raise Missing if no root has it."""
        for root in roots:
            for place in self.places:
                if (root / place).is_dir():
                    return root / place
        raise Missing(
            f"{self.name} is not installed below {' or '.join(map(str, roots))} (none of {', '.join(self.places)}); "
            f"install it with: {self.install}"
        )


def _debian(name: str, place: str) -> Package:
    return Package(name, f"apt-get install {name}, or apt-get download {name} && dpkg -x {name}_*.deb ROOT", (place,))


OPENCLIPART_PNG = _debian("openclipart-png", "usr/share/openclipart/png")
OPENCLIPART_SVG = _debian("openclipart-svg", "usr/share/openclipart/svg")
STAMPS = _debian("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps")
FASHION_MNIST = _debian("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist")
OPENMOJI = Package(
    "openmoji",
    "npm install openmoji (below ROOT, or with -g)",
    ("node_modules/openmoji", "usr/lib/node_modules/openmoji", "usr/local/lib/node_modules/openmoji"),
)
RESVG = "resvg-py"
"""The Python package that draws SVG files."""


def module_folder(distribution: str) -> Path:
    """Return the folder of an installed Python package, without importing it; raise Missing if there is none."""
    spec = importlib.util.find_spec(distribution.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise Missing(f"{distribution} is not installed; install it with: pip install --no-deps {distribution}")
    return Path(spec.origin).parent
