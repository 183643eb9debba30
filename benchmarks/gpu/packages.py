"""Find missing packages, and use wheels from a folder if packages are not installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tomllib
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (ROOT, ROOT / "backends", ROOT / "reference_impl")
"""Folders that hold our own packages."""


class Need(NamedTuple):
    """A package that a section of the measurement needs."""

    module: str
    # Name (and version) for a package index.
    package: str
    wanted_for: str
    # Those dependencies of the package that are not already installed along with the array libraries.
    brings: tuple[str, ...] = ()


NEEDS = (
    Need("array_api_compat", "array-api-compat", "everything"),
    Need("optax", "optax", "JAX", ("absl-py",)),
    Need("safetensors", "safetensors", "the demo"),
    Need("rich", "rich", "the demo", ("markdown-it-py", "mdurl", "pygments")),
    Need("tokenizers", "tokenizers", "the demo"),
    Need(
        "matplotlib",
        "matplotlib",
        "the demo",
        ("contourpy", "cycler", "fonttools", "kiwisolver", "packaging", "pillow", "pyparsing", "python-dateutil"),
    ),
    Need("jinja2", "jinja2", "the demo", ("markupsafe",)),
    Need("pytest", "pytest", "the tests", ("iniconfig", "packaging", "pluggy", "pygments")),
    Need("hypothesis", "hypothesis", "the tests", ("sortedcontainers",)),
    Need("array_api_strict", "array-api-strict", "the tests"),
    Need("mpmath", "mpmath", "the tests"),
    Need("siglip_kernel", "siglip-kernel==0.1.2", "the comparison with siglip-kernel"),
    Need("memeff", "memeff==0.3.1", "the comparison with memeff"),
)


def missing(needs: Iterable[Need] = NEEDS) -> list[Need]:
    """Return the needs whose modules are not installed."""
    return [need for need in needs if importlib.util.find_spec(need.module) is None]


def advice(absent: Sequence[Need]) -> str:
    """Return one line that names the missing packages and the command that downloads them."""
    if not absent:
        return "missing packages: none"
    packages = ", ".join(f"{need.package} ({need.wanted_for})" for need in absent)
    names = " ".join(dict.fromkeys(name for need in absent for name in (need.package, *need.brings)))
    return (
        f"missing packages: {packages}; on a machine with a network: pip download --no-deps --only-binary=:all: "
        f"--dest wheels {names}; then here: make gpu WHEELS=wheels"
    )


def unpack(wheels: Path, target: Path) -> list[str]:
    """Unpack the wheels whose modules are missing; return a line for every wheel: unpacked, or why it was left out.

    Raises
    ------
    ValueError
        If there is no such folder.
    """
    if not wheels.is_dir():
        raise ValueError(f"WHEELS must be a folder, got {wheels}")
    lines = []
    for path in sorted(wheels.glob("*.whl")):
        if not _fits(path):
            lines.append(f"{path.name}: left out, it is not for this Python")
            continue
        with zipfile.ZipFile(path) as wheel:
            modules = {
                name.partition("/")[0].removesuffix(".py")
                for name in wheel.namelist()
                if "/" in name or name.endswith(".py")
            }
            modules = {name for name in modules if not name.endswith((".dist-info", ".data"))}
            if all(importlib.util.find_spec(name) for name in modules):
                lines.append(f"{path.name}: left out, it is installed")
                continue
            wheel.extractall(target)
        lines.append(f"{path.name}: unpacked")
    return lines


def _fits(wheel: Path) -> bool:
    """Tell whether a wheel is pure Python, or compiled for this interpreter and platform."""
    if wheel.stem.endswith("-none-any"):
        return True
    try:
        from packaging.tags import sys_tags
        from packaging.utils import parse_wheel_filename
    except ImportError:
        return False
    return not parse_wheel_filename(wheel.name)[3].isdisjoint(sys_tags())


def describe_ourselves(target: Path) -> None:
    """If drrho-core is not installed, write its metadata, because the list of backends is part of the metadata."""
    try:
        importlib.metadata.distribution("drrho-core")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = target / f"drrho_core-{project['version']}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {place}" for name, place in points.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def environment(extra: Path, *, dry_run: bool) -> dict[str, str]:
    """Return the environment variables of every measuring process."""
    variables = dict(os.environ)
    old = [folder for folder in variables.get("PYTHONPATH", "").split(os.pathsep) if folder]
    variables["PYTHONPATH"] = os.pathsep.join([*map(str, SOURCES), *old, str(extra)])
    # Every step chooses its kernels itself, so the user's choice is removed.
    variables.pop("DRRHO_FUSED", None)
    # Processes of several libraries share the device, so JAX must not reserve its memory in advance.
    variables |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    # JAX refuses to start if both names of this variable are set.
    variables.pop("XLA_CLIENT_MEM_FRACTION", None)
    # A process of JAX can use code that an earlier process has compiled.
    variables |= {
        "JAX_COMPILATION_CACHE_DIR": str(extra / "jax"),
        "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    (extra / "tmp").mkdir(exist_ok=True)
    # Temporary files are in a folder that this program removes, even if a process is killed.
    variables["TMPDIR"] = str(extra / "tmp")
    variables["TF_CPP_MIN_LOG_LEVEL"] = variables.get("TF_CPP_MIN_LOG_LEVEL", "2")
    if dry_run:
        variables |= {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
        variables["CUDA_VISIBLE_DEVICES"] = ""
    else:
        variables.pop("TRITON_INTERPRET", None)
    return variables
