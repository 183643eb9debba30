"""Options are read from dataclasses: the result has only options that the user named, and errors have one line."""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from drrho_clip.cli import COMMANDS, main
from drrho_clip.config import TrainConfig
from drrho_clip.errors import BadInput
from drrho_clip.options import FLAG, PATH, TEXT, as_typed, at_least, choice, number, parse, setting, setting_of


@dataclass(frozen=True)
class Oven:
    """Settings of an oven."""

    degrees: int = setting(180, rule=at_least(0), help="Heat in degrees.", presets={"bread": 240})
    minutes: float = setting(30.0, rule=number("> 0", lambda value: value > 0), help="Time; 100 % of it is needed.")


@dataclass(frozen=True)
class Bake:
    """Bake something.

    For example:
      kitchen bake --out cake
    """

    out: Path = setting(rule=PATH, help="Folder of the cake.")
    dry: bool = setting(False, rule=FLAG, help="Only look.")
    fan: tuple[str, ...] = setting((), rule=choice("low", "high"), several="append", shown="low", help="Fans.")
    racks: tuple[int, ...] = setting((1, 2), rule=at_least(1), several="+", help="Racks.")
    note: str | None = setting(None, rule=TEXT, help="A note.")
    settings: Mapping[str, Any] = field(default_factory=dict, metadata={"options": Oven})


@dataclass(frozen=True)
class Eat:
    """Eat it."""

    dish: str = setting(rule=TEXT, positional=True, help="Name of the dish.")


def kitchen(line: str) -> Any:
    return parse(line.split(), {"bake": Bake, "eat": Eat}, prog="kitchen", description="Cook.")


def test_only_named_options_of_a_nested_dataclass_are_returned() -> None:
    assert kitchen("bake --out a") == Bake(Path("a"))
    assert kitchen("bake --out a --minutes 5").settings == {"minutes": 5.0}
    assert kitchen("bake --out a --degrees 180").settings == {"degrees": 180}  # named, though equal to the default


def test_tuples_flags_positionals_and_both_spellings() -> None:
    command = kitchen("bake --out=a --dry --fan low --fan high --racks 3 4 5 --note x")
    assert command == Bake(Path("a"), True, ("low", "high"), (3, 4, 5), "x")
    assert kitchen("eat soup") == Eat("soup")
    arguments = ["train", "--out", "a", "--batch_size=8", "--learning-rate", "1e-2", "--data", "x_y"]
    command = parse(arguments, COMMANDS, prog="drrho", description="")
    assert command.settings == {"batch_size": 8, "learning_rate": 0.01, "data": "x_y"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bake --out a --degrees hot", "--degrees must be an integer of at least 0, got 'hot'"),
        ("bake --out a --degrees -1", "--degrees must be an integer of at least 0, got -1"),
        ("bake --out a --minutes nan", "--minutes must be > 0, got nan"),
        ("bake --out a --fan medium", "--fan must be one of low, high, got 'medium'"),
        ("bake --out a --racks 1 0", "--racks must be an integer of at least 1, got 0"),
        ("bake --out a --racks", "--racks: expected at least one argument"),
        ("bake --out", "--out: expected one argument"),
        ("bake", "the following arguments are required: --out (see kitchen bake --help)"),
        (
            "bake --out a --ou b",
            "unrecognized option --ou; did you mean --out? (see kitchen bake --help)",
        ),  # no abbreviations
        ("bake --uot a", "unrecognized option --uot; did you mean --out? (see kitchen bake --help)"),
        ("bake --colour=3", "unrecognized option --colour (see kitchen bake --help)"),
        ("bake --out a b", "unrecognized arguments: b (see kitchen bake --help)"),
        ("bake --out a --degrees 0x10", "--degrees must be an integer of at least 0, got '0x10'"),
        (
            f"bake --out a --degrees {10**30}",
            f"--degrees must be an integer of at least 0 and at most 2147483647, got {10**30}",
        ),
        ("bake --out a --minutes 1e400", "--minutes must be > 0, got inf"),
        (
            f"bake --out a --degrees {'9' * 5000}",
            f"--degrees must be an integer of at least 0, got '{'9' * 79}... (5,002 characters)",
        ),
        ("bake --out=", "--out must be a path, got ''"),
        ("bake --out a --note=", "--note must be a text that is not empty, got ''"),
        ("eat", "the following arguments are required: NAME (see kitchen eat --help)"),
        ("", "the following arguments are required: {bake,eat} (see kitchen --help)"),
        ("sleep", "command must be one of bake, eat, got 'sleep'"),
        ("baek", "command must be one of bake, eat, got 'baek'; did you mean bake?"),
    ],
)
def test_usage_errors_name_option_rule_and_value(line: str, message: str) -> None:
    with pytest.raises(BadInput) as error:
        kitchen(line)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "line",
    [
        "bake --out a",
        "bake --out 'a b' --dry --fan low --fan high --racks 3 4 --minutes 5.0",
        "bake --out a --note x --degrees 180",
        "eat soup",
    ],
)
def test_a_command_line_can_be_written_back(line: str) -> None:
    name, *_ = words = shlex.split(line)
    command = parse(words, {"bake": Bake, "eat": Eat}, prog="kitchen", description="")
    assert as_typed(f"kitchen {name}", command).split() == f"kitchen {line}".split()


def help_of(*arguments: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    return " ".join(shown.getvalue().split())


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_shows_every_option_with_the_default_and_an_example(name: str) -> None:
    shown = help_of(name)
    assert f"For example: drrho {name}" in shown
    for option in fields(COMMANDS[name]):
        if "options" not in option.metadata and not setting_of(option).positional:
            assert f"--{option.name.replace('_', '-')}" in shown


def test_help_of_train_shows_every_setting() -> None:
    shown = help_of("train").replace("- ", "-")  # argparse breaks lines at hyphens
    for option in fields(TrainConfig):
        assert f"--{option.name.replace('_', '-')} " in shown
        assert setting_of(option).help.replace("- ", "-") in shown
        if option.default not in (MISSING, None):
            # A switch that is not given is off.
            default = "off" if option.default is False else option.default
            assert f"(default: {default}" in shown
    assert "(default: 32; digits 8; a table 64)" in shown


@pytest.mark.parametrize("option", fields(TrainConfig), ids=lambda option: option.name)
def test_defaults_and_presets_obey_their_rules(option: Any) -> None:
    described = setting_of(option)
    for value in (option.default, *(described.presets or {}).values()):
        if value not in (MISSING, None):
            described.rule.check(option.name, value)
