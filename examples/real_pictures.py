"""Compare drrho, sogclr, clip and the reference model on real pictures that install as packages.

    python examples/real_pictures.py [--data openclipart|openmoji|stamps|fashion-mnist ...] [--root DIR ...] [--seeds 3]
                                     [--out DIR]

The pictures are OpenClipart's drawings with their own titles (natural noise), OpenMoji's emoji, the stamps of Tux
Paint, and Fashion-MNIST with 30 % of the training captions swapped. Two frozen towers turn pictures and captions into
features: EfficientNet-Lite0, which has learnt the labels of ImageNet, and the sentence encoder MiniLM. The methods
train small heads over these features. If a package is missing, the command says how to install it, and goes on
without it.

The same command gives the same figures. Finished features and runs in the folder OUT are not computed again. OUT gets
``real_pictures.json`` and the page ``real_pictures.md``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pictures.experiment import SETTINGS, prepare, run_seed
from pictures.page import page, table
from pictures.sources import CLASSES, FASHION_TEST, SOURCES

from drrho_clip.encoders import PairEncoder
from drrho_clip.errors import BadInput
from drrho_clip.reproduce.packaged.packages import RESVG, Missing

# Sides of the pictures for the image tower, in pixels: smaller for the larger data sets, so that a CPU is enough.
SIDES = {"openclipart": 112, "fashion-mnist": 96}
SIDE = 160


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def packaged_towers(side: int) -> PairEncoder:
    """Open the towers of the Python packages; raise Missing if a package is not installed."""
    # The module of the towers imports torch, which takes seconds.
    from drrho_torch.packaged_towers import open_packaged_towers

    return open_packaged_towers(str(side))


def main(
    words: Sequence[str] | None = None,
    *,
    open_towers: Callable[[int], PairEncoder] = packaged_towers,
    settings: Mapping[str, Any] = SETTINGS,
) -> int:
    """Run the comparison; missing packages are no error. `open_towers` takes the side of the images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=[*SOURCES], default=[*SOURCES], help="data sets; default: all")
    parser.add_argument("--root", type=Path, nargs="+", default=[Path("/")], help="folders with installed packages")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, at least 2")
    parser.add_argument("--out", type=Path, default=Path("build/real_pictures"), help="folder of features and results")
    options = parser.parse_args(words)
    if options.seeds < 2:
        parser.error(f"--seeds must be at least 2, got {options.seeds}: an interval needs two differences")
    rows: list[dict[str, Any]] = []
    data: dict[str, Any] = {}
    for name in options.data:
        try:
            own = _run(name, options.root, options.seeds, options.out, open_towers, settings)
        except Missing as missing:
            print(f"{name} is left out: {missing}")
            continue
        except BadInput as error:
            parser.exit(2, f"{error}\n")
        rows += own.pop("rows")
        data[name] = own
    if not rows:
        print("no data set could be used; install the packages above and run the command again")
        return 0
    results = {
        "command": _command(options),
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "versions": _versions(),
        "seeds": options.seeds,
        "settings": dict(settings),
        "data": data,
        "rows": rows,
    }
    (options.out / "real_pictures.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.out / "real_pictures.md").write_text(page(results), encoding="utf-8")
    print(table(results))
    print(f"{options.out / 'real_pictures.md'} has the differences with their intervals")
    return 0


def _run(
    name: str,
    roots: Sequence[Path],
    seeds: int,
    out: Path,
    open_towers: Callable[[int], PairEncoder],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Read, encode and train one data set; raise Missing if a package is not installed."""
    source = SOURCES[name]
    # A missing package is reported before the first picture is drawn.
    for package in source.packages:
        package.folder(roots)
    towers = open_towers(SIDES.get(name, SIDE))
    folder = out / name
    say(f"{name}: reading the pictures")
    pairs = source.pairs(roots, folder / "pictures")
    say(f"{name}: encoding {len(pairs):,} pairs")
    data = prepare(name, pairs, towers, folder, after_rows=_progress(name, len(pairs)))
    photographs = name == "fashion-mnist"
    num_test = min(FASHION_TEST, sum(pair.path.name.startswith("t10k") for pair in pairs)) if photographs else None
    rows = []
    for seed in range(seeds):
        rows += run_seed(
            data,
            seed,
            folder / f"seed{seed}",
            swapped_fraction=source.swapped,
            num_test=num_test,
            classes=CLASSES if photographs else (),
            settings=settings,
            after_run=say,
        )
    return {
        "title": source.title,
        "pairs": len(pairs),
        "captions": len({pair.caption for pair in pairs}),
        "concepts": len({pair.concept for pair in pairs}),
        "side": SIDES.get(name, SIDE),
        "rows": rows,
    }


def _progress(name: str, total: int) -> Callable[[int], None]:
    """Return a function that prints how many rows are encoded, about ten times in all."""
    printed = [0]

    def show(done: int) -> None:
        if done * 10 // total > printed[0]:
            printed[0] = done * 10 // total
            say(f"{name}: {done:,} of {total:,} pairs are encoded")

    return show


def _command(options: argparse.Namespace) -> str:
    """Return the command without the folders, which differ between computers."""
    words = ["python", "examples/real_pictures.py", "--data", *options.data, "--seeds", str(options.seeds)]
    return shlex.join(words)


def _versions() -> dict[str, str]:
    """Return the versions of the Python packages that the figures depend on."""
    from drrho_torch.packaged_towers import EFFICIENTNET, MINILM

    versions = {}
    for name in ("torch", "transformers", "numpy", EFFICIENTNET, MINILM, RESVG):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


if __name__ == "__main__":
    sys.exit(main())
