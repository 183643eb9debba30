"""Settings of a run from a file: YAML, or the config.json of another run.

A YAML file holds one mapping from names of `TrainConfig` to values. A value is read and checked as the command line
reads and checks a word, so a mistake gives the same message in both places. ``null`` leaves a setting at the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from drrho_clip.config import TrainConfig
from drrho_clip.errors import BadInput, MissingExtra
from drrho_clip.files.json_files import read_json
from drrho_clip.options import FLAG, Setting, nearest_name, setting_of
from drrho_clip.terminal.safe_text import brief

__all__ = ["PRESETS", "read_preset", "read_settings"]

PRESETS = ("CC3M", "CC12M", "DFN-192M")
"""Names of the presets: the settings of published runs, in the folder ``presets`` with the sources."""

_LARGEST = 2**20
_FLAGS = {"true": True, "false": False}


def read_settings(path: Path) -> dict[str, Any]:
    r"""Return the settings that a file names, checked one by one.

    Parameters
    ----------
    path : Path
        A YAML file, or a file whose name ends in ``.json``: the config.json of a run, or an object of settings.

    Returns
    -------
    dict
        Values of fields of `TrainConfig`, by name. The file may name as few settings as it likes.

    Raises
    ------
    BadInput
        If the file cannot be read, names an unknown setting or a setting twice, or breaks the rule of a setting.
    MissingExtra
        If the file is YAML and PyYAML is not installed.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "run.yaml"
    ...     _ = file.write_text("data: digits\nmethod: clip\nlearning-rate: 1e-3\n")
    ...     read_settings(file)
    {'data': 'digits', 'method': 'clip', 'learning_rate': 0.001}
    """
    if path.suffix == ".json":
        document = read_json(path, "settings")
        # The settings of a run stand beside the encoders and the tokenizer.
        values = document.get("config", document) if isinstance(document, Mapping) else document
    else:
        values = _read_yaml(path)
    if not isinstance(values, Mapping):
        raise BadInput(f"{path} must hold names and values of settings, got {_kind(values)}")
    described = {option.name: setting_of(option) for option in fields(TrainConfig)}
    settings: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in described:
            raise BadInput(f"{path}: unknown setting {brief(key)}{nearest_name(name, described)}")
        if name in settings:
            raise BadInput(f"{path} must name {name} once, got it twice")
        if value is not None:
            settings[name] = _checked(f"{path}: {name}", value, described[name])
    return settings


def read_preset(name: str) -> dict[str, Any]:
    """Return the settings of a preset, one of `PRESETS`.

    Raises
    ------
    MissingExtra
        If PyYAML is not installed.

    Examples
    --------
    >>> read_preset("DFN-192M")["batch_size"]
    5120
    """
    return read_settings(Path(__file__).parent / "presets" / f"{name}.yaml")


def _kind(value: Any) -> str:
    """Return the kind of a value in words; a few aliases of YAML make a list whose text would fill the memory."""
    kinds = {list: "a list", dict: "a mapping", type(None): "nothing"}
    return kinds.get(type(value)) or brief(value)


def _checked(name: str, value: Any, described: Setting) -> Any:
    """Return the value of a setting, read like a word of the command line if it is a text."""
    rule = described.rule
    if isinstance(value, list | dict):
        raise BadInput(f"{name} must be {rule.words}, got {_kind(value)}")
    if isinstance(value, str):
        try:
            value = _FLAGS[value] if rule is FLAG else rule.read(value)
        except (ValueError, KeyError):
            raise BadInput(f"{name} {rule.refusal(value)}") from None
    rule.check(name, value)
    return value


def _read_yaml(path: Path) -> Any:
    """Return the content of a YAML file, in which every value is None, a text, a list or a mapping."""
    try:
        import yaml
    except ImportError as error:
        raise MissingExtra("reading YAML", "PyYAML") from error

    class Loader(yaml.BaseLoader):  # type: ignore[misc]
        """A loader of texts: PyYAML itself would read 1e-3 as a text, and the text "no" as False."""

        def construct_scalar(self, node: yaml.ScalarNode) -> str | None:
            # A text in quotes stays a text.
            empty = node.style is None and node.value in ("", "~", "null", "Null", "NULL")
            return None if empty else super().construct_scalar(node)

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [self.construct_scalar(key) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise BadInput(f"{path} must name {twice} once, got it twice")
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    # A pipe or a device could be read for ever.
    if not path.is_file():
        raise BadInput(f"{path} must be a file of settings, got {'no plain file' if path.exists() else 'no such file'}")
    if path.stat().st_size > _LARGEST:
        raise BadInput(f"{path} must be a file of at most {_LARGEST:,} bytes, got {path.stat().st_size:,}")
    try:
        return yaml.load(path.read_bytes().decode("utf-8-sig"), Loader)
    except BadInput:
        raise
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" on line {error.problem_mark.line + 1}"
        raise BadInput(f"{path} must be YAML, got an error{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} must be YAML, got: {brief(str(error))}") from None
