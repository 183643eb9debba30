"""Options of the command line. A field of a dataclass holds the default, the rule and the help text of an option.

`setting` makes such a field. A `Rule` converts a word of the command line to a value and checks the value. `parse`
builds an `argparse` parser from the fields. Every usage error is a `BadInput` whose message has one line.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from drrho_clip.errors import BadInput
from drrho_clip.terminal.printing import say
from drrho_clip.terminal.safe_text import brief

__all__ = [
    "FLAG",
    "PATH",
    "TEXT",
    "Rule",
    "Setting",
    "as_typed",
    "at_least",
    "choice",
    "nearest_name",
    "number",
    "parse",
    "setting",
    "setting_of",
    "word_or",
]


class Rule(NamedTuple):
    """A rule that the value of a setting must obey.

    Attributes
    ----------
    words : str
        The rule, in words that follow "must be" in a message.
    read : callable
        Converts a word of the command line to a value; raises ValueError if the word cannot be converted.
    holds : callable
        Returns whether a value obeys the rule.
    metavar : str
        The placeholder of the value in the help.
    most : int, optional
        The upper bound of an integer; a message names the bound only if a value is above the bound.
    """

    words: str
    read: Callable[[str], Any]
    holds: Callable[[Any], bool]
    metavar: str
    most: int | None = None

    def check(self, name: str, value: Any) -> None:
        """Raise BadInput with `name`, the rule and the value if the value breaks the rule."""
        if not self.holds(value):
            raise BadInput(f"{name} {self.refusal(value)}")

    def refusal(self, value: Any) -> str:
        """Return the rule and the value in words that follow the name of the setting."""
        above = self.most is not None and isinstance(value, int) and value > self.most
        return f"must be {self.words}{f' and at most {self.most}' if above else ''}, got {brief(value)}"


def _is_text(value: Any) -> bool:
    # No path and no name can hold a zero character; an empty text mostly comes from a shell variable without a value.
    return isinstance(value, str) and value != "" and "\0" not in value


def _read_path(word: str) -> Path:
    if not word:
        raise ValueError("Path turns an empty word into the current folder")
    return Path(word)


FLAG = Rule("true or false", bool, lambda value: isinstance(value, bool), "")
PATH = Rule("a path", _read_path, lambda value: _is_text(str(value)) and isinstance(value, str | Path), "PATH")
TEXT = Rule("a text that is not empty", str, _is_text, "NAME")


def at_least(minimum: int, *, most: int = 2**31 - 1) -> Rule:
    """Return the rule that a value is an integer of at least `minimum` and at most `most`.

    Examples
    --------
    >>> at_least(2).check("batch_size", 1)
    Traceback (most recent call last):
        ...
    drrho_clip.errors.BadInput: batch_size must be an integer of at least 2, got 1
    """

    def holds(value: Any) -> bool:
        # True and False are integers to Python, but not to a user.
        return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= most

    return Rule(f"an integer of at least {minimum}", int, holds, "INT", most)


def number(words: str, holds: Callable[[float], bool]) -> Rule:
    """Return the rule that a value is a finite number for which `holds` is true; `words` describe the condition.

    Examples
    --------
    >>> rule = number("> 0 and at most 1", lambda value: 0 < value <= 1)
    >>> rule.holds(0.5), rule.holds(0.0), rule.holds(float("nan"))
    (True, False, False)
    """

    def is_number_that_holds(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        # A very large integer of a JSON file has no float.
        try:
            return math.isfinite(value) and holds(value)
        except OverflowError:
            return False

    return Rule(words, float, is_number_that_holds, "NUMBER")


def choice(*values: str) -> Rule:
    """Return the rule that a value is one of the given names."""
    return Rule(f"one of {', '.join(values)}", str, lambda value: value in values, f"{{{','.join(values)}}}")


def word_or(word: str, rule: Rule) -> Rule:
    """Return the rule that a value is a certain word or obeys another rule.

    Examples
    --------
    >>> rule = word_or("auto", number("> 0", lambda value: value > 0))
    >>> rule.read("auto"), rule.read("0.5"), rule.holds(-1.0)
    ('auto', 0.5, False)
    """

    def read(text: str) -> Any:
        return text if text == word else rule.read(text)

    def holds(value: Any) -> bool:
        return value == word if isinstance(value, str) else rule.holds(value)

    return Rule(f"{word} or {rule.words}", read, holds, f"{word}|{rule.metavar}")


@dataclass(frozen=True)
class Setting:
    """All that the command line and the checks read about a field, except the name and the default.

    Attributes
    ----------
    help : str
        One or two sentences for the help.
    rule : Rule
        The rule of the value, or of every element of a tuple.
    metavar : str, optional
        The placeholder of the value in the help; by default the placeholder of the rule.
    shown : str, optional
        The default in words, if the default is not a constant. An option with such words is never required.
    several : str, optional
        ``"+"``: the option takes several values. ``"append"``: the option may be repeated. In both cases the field is a
        tuple.
    positional : bool
        The value is given without the option's name.
    presets : mapping
        The defaults for certain kinds of data, such as digits, if they differ; see `drrho_clip.table_defaults.preset`.
    later : bool
        True for a setting that did not exist in version 0.1.0: a run of that version or earlier gets the default.
    """

    help: str
    rule: Rule
    metavar: str | None = None
    shown: str | None = None
    several: str | None = None
    positional: bool = False
    presets: Mapping[str, Any] | None = None
    later: bool = False


def setting(
    default: Any = MISSING,
    *,
    rule: Rule,
    help: str,
    default_factory: Any = MISSING,
    metavar: str | None = None,
    shown: str | None = None,
    several: str | None = None,
    positional: bool = False,
    presets: Mapping[str, Any] | None = None,
    later: bool = False,
) -> Any:
    """Return a dataclass field that carries a `Setting`; the arguments are the attributes of `Setting`."""
    # The module dataclasses only stores metadata; `setting_of` reads them.
    described = Setting(help, rule, metavar, shown, several, positional, presets, later)
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata={"setting": described})
    return field(default=default, metadata={"setting": described})


def setting_of(option: Field[Any]) -> Setting:
    """Return the `Setting` of a field."""
    described: Setting = option.metadata["setting"]
    return described


def parse(arguments: Sequence[str], commands: Mapping[str, type], *, prog: str, description: str) -> Any:
    """Parse a command line and return the chosen command.

    Parameters
    ----------
    arguments : sequence of str
        The words after the program's name.
    commands : mapping of str to dataclass
        The commands by name. The docstring of a command is the text of its help. The metadata of a field may name
        another dataclass, as in ``field(metadata={"options": Other})``. Then the command also has the options of
        `Other`, and the field gets a dictionary of those options of `Other` that the user named.
    prog, description : str
        The program's name, and the sentence that describes the program in the help.

    Raises
    ------
    BadInput
        If an option is unknown, missing or breaks its rule; the message names option, rule and value.
    """
    # If exit_on_error is False, argparse raises the errors of single options and calls `_Parser.error` for all others.
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, exit_on_error=False)
    choices = f"{{{','.join(commands)}}}"
    subparsers = parser.add_subparsers(dest="command", metavar=choices, required=True)
    for name, command in commands.items():
        text = inspect.getdoc(command) or ""
        subparser = subparsers.add_parser(
            name,
            help=text.partition("\n")[0],
            usage=" ".join([f"{prog} {name} [options]", *_positionals(command)]),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            exit_on_error=False,
        )
        for option in _all_options(command):
            _add_option(subparser, option)
    words = [_with_dashes(word) for word in arguments]
    _refuse_unknown(words, commands, prog)
    try:
        parsed, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        argument = error.argument_name
        # A message of argparse ("expected one argument") follows the option's name and a colon. The message of a rule
        # ("must be ...") needs no colon.
        colon = "" if error.message.startswith("must be ") else ":"
        raise BadInput(f"{argument}{colon} {error.message}") from None
    if unknown:
        raise BadInput(f"unrecognized arguments: {' '.join(unknown)} (see {prog} {parsed.command} --help)")
    named = vars(parsed)
    return _build(commands[named.pop("command")], named)


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean X?"`` with the known name X that is most similar, or an empty text if none is similar.

    Examples
    --------
    >>> nearest_name("--epoch", ["--epochs", "--out"])
    '; did you mean --epochs?'
    """
    # The dashes are left out, because they would make all options similar to each other.
    words = {candidate.lstrip("-"): candidate for candidate in known}
    nearest = difflib.get_close_matches(name.lstrip("-"), words, n=1)
    return f"; did you mean {words[nearest[0]]}?" if nearest else ""


def _refuse_unknown(words: Sequence[str], commands: Mapping[str, type], prog: str) -> None:
    """Raise BadInput if the command or an option has no known name; the message has the nearest name."""
    # argparse would first ask for required options, even if the user has only misspelt such an option.
    if not words or words[0].startswith("-"):
        return
    command = commands.get(words[0])
    if command is None:
        nearest = nearest_name(words[0], commands)
        raise BadInput(f"command must be one of {', '.join(commands)}, got {brief(words[0])}{nearest}")
    known = [*map(_flag, _all_options(command)), "--help"]
    for word in words[1:]:
        if word == "--":
            return
        name = word.partition("=")[0]
        if name.startswith("--") and name not in known:
            nearest = nearest_name(name, known)
            raise BadInput(f"unrecognized option {name}{nearest} (see {prog} {words[0]} --help)")


class _Parser(argparse.ArgumentParser):
    """argparse's parser, except that an error is raised as BadInput instead of printed with the usage."""

    def print_help(self, file: Any = None) -> None:
        """Print the help; argparse itself would hide that the reader of a pipe has gone or that a disk is full."""
        say(*self.format_help().splitlines(), stream=file)

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (see {self.prog} --help)")


def _with_dashes(word: str) -> str:
    """Return ``--batch-size=8`` for ``--batch_size=8``: both spellings name the option, as in version 0.1."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def _all_options(command: type) -> list[Field[Any]]:
    """Return the fields of a command, with the fields of a nested dataclass in place of the field that holds them."""
    # The user sees no difference between the options of a nested dataclass and the command's own options.
    options: list[Field[Any]] = []
    for option in fields(command):
        nested = option.metadata.get("options")
        options += [option] if nested is None else fields(nested)
    return options


def _positionals(command: type) -> list[str]:
    """Return the placeholders of the values that are given without the option's name."""
    described = [setting_of(option) for option in _all_options(command)]
    return [option.metavar or option.rule.metavar for option in described if option.positional]


def _add_option(parser: argparse.ArgumentParser, option: Field[Any]) -> None:
    """Add a field to the parser. If the user does not name the option, the parsed result has no entry for it."""
    described = setting_of(option)
    rule = described.rule
    words = _default_in_words(option)
    default = "(required)" if words is None else f"(default: {words})"
    # argparse reads % as the start of a format, and %% as the character %.
    text = f"{described.help} {default}".replace("%", "%%")
    # With SUPPRESS the result has no entry for an option that the user did not name; a preset can then set the value.
    arguments: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
    if rule is FLAG:
        parser.add_argument(_flag(option), action="store_true", **arguments)
        return
    arguments |= {"type": _converter(rule), "metavar": described.metavar or rule.metavar}
    if described.several is not None:
        arguments |= {"action": "append"} if described.several == "append" else {"nargs": described.several}
    if described.positional:
        parser.add_argument(option.name, **arguments)
    else:
        parser.add_argument(_flag(option), required=words is None, **arguments)


def _converter(rule: Rule) -> Callable[[str], Any]:
    """Return the function with which argparse converts and checks a word."""

    def convert(word: str) -> Any:
        # argparse turns an ArgumentTypeError into an error that names the option.
        try:
            value = rule.read(word)
        except ValueError:
            raise argparse.ArgumentTypeError(rule.refusal(word)) from None
        if not rule.holds(value):
            raise argparse.ArgumentTypeError(rule.refusal(value))
        return value

    return convert


def _default_in_words(option: Field[Any]) -> str | None:
    """Return the default as the help shows it, or None if the option is required."""
    described = setting_of(option)
    if described.shown is not None:
        return described.shown
    if option.default is MISSING:
        return None
    if described.rule is FLAG:
        return "off"
    if option.default is None:
        return "none"
    values = option.default if isinstance(option.default, tuple) else (option.default,)
    presets = [f"{data} {value}" for data, value in (described.presets or {}).items()]
    return "; ".join([" ".join(map(str, values)), *presets])


def _flag(option: Field[Any]) -> str:
    return "--" + option.name.replace("_", "-")


def _build(command: type, named: dict[str, Any]) -> Any:
    """Build the command from the options that the user named."""
    values: dict[str, Any] = {}
    for option in fields(command):
        nested = option.metadata.get("options")
        if nested is not None:
            values[option.name] = {inner.name: named[inner.name] for inner in fields(nested) if inner.name in named}
        elif option.name in named:
            value = named[option.name]
            values[option.name] = tuple(value) if isinstance(value, list) else value
    return command(**values)


def as_typed(words: str, command: Any) -> str:
    """Return a command line that `parse` turns into the given command.

    Parameters
    ----------
    words : str
        The command's name, such as ``"drrho bench"``.
    command : dataclass
        The command.
    """
    named: dict[str, Any] = {}
    for option in fields(command):
        value = getattr(command, option.name)
        # Values that equal the default are left out. A nested dictionary is copied: it holds only named options.
        if "options" in option.metadata:
            named |= value
        elif value is not None and value != option.default:
            named[option.name] = value
    line = words.split()
    # The options have the order of the fields; the options of a nested dataclass take the position of the field.
    for option in _all_options(type(command)):
        if option.name not in named:
            continue
        described, value = setting_of(option), named[option.name]
        values = [str(element) for element in value] if described.several else [str(value)]
        if described.rule is FLAG:
            line.append(_flag(option))
        elif described.positional:
            line += values
        elif described.several == "append":
            line += [word for element in values for word in (_flag(option), element)]
        else:
            line += [_flag(option), *values]
    return shlex.join(line)
