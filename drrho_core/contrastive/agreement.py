"""Ranks that share a batch check together that their arguments fit, before any of them computes or changes anything.

A rank whose arguments are wrong must not raise its error alone, because the other ranks would wait for its messages. So
each rank describes its arguments, the *facts*, in a text. The ranks exchange a fixed-size digest of the texts. If all
digests are equal, nothing else is sent. Otherwise the ranks exchange the texts, and every rank raises the same error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, device_of, has_values, is_array, namespace_of, values_visible
from drrho_core._routines import block_kernels
from drrho_core.contrastive.ranks import Ranks
from drrho_core.extend import BlockSweeps

T = TypeVar("T")

LOCAL = frozenset({"tile_size", "memory_budget", "ranks", "xp"})
"""Arguments that may differ between ranks, because they do not change what the ranks exchange."""

LENGTH_BYTES = 4
"""The digest is followed by the length of the text, in so many bytes."""


def agreed(
    check: Callable[[], T],
    arguments: Mapping[str, Any],
    ranks: Ranks | None,
    like: Array | None = None,
    *,
    wait: bool = False,
    kernels: Callable[[T], BlockSweeps | None] | None = None,
) -> T:
    """Return ``check()``, or raise on all ranks the error of a rank, or an error about arguments that differ.

    Parameters
    ----------
    check : callable
        Checks the own arguments and raises an error if they are wrong.
    arguments : mapping
        The arguments by name; if `like` is None, the first one is an array (b, ...) with a row per own pair.
    ranks : Ranks, optional
        None if nobody shares the batch.
    like : array, optional
        An array on the device from which messages are sent, if the first argument may be no array.
    wait : bool, default: False
        True: the arguments are compared on a device, too, although the host has to wait for it.
    kernels : callable, optional
        ``kernels(result)`` returns the fused kernels that take the batch, given the result of `check`. If
        omitted, the call uses no kernels, and the kernels of the ranks are not compared.

    Notes
    -----
    Without `wait` nothing is compared on a device whose values the host cannot read at no cost; under tracing nothing
    is ever compared. There `check` alone is called, so ranks with different sizes or options hang or compute wrong
    numbers.
    """
    if ranks is None or ranks.size == 1:
        return check()
    has_rows, like = like is None, _message_like(arguments) if like is None else like
    xp = namespace_of({next(iter(arguments), "like"): like})
    # Checkpoints and first calls can afford to wait for a device; a step cannot.
    if not (has_values(like, xp) if wait else values_visible(like, xp)):
        return check()
    error: Exception | None = None
    try:
        result = check()
    except Exception as caught:  # of any kind, because the other ranks would wait for this rank's messages
        error = caught
    facts = {"error": "" if error is None else f"{type(error).__name__}: {error}"}
    if has_rows:
        facts |= {"batch_size": str(like.shape[0]) if like.ndim else "none"}
    facts |= {name: _fact(value, wait) for name, value in arguments.items() if name not in LOCAL}
    if kernels is not None:
        facts["fused_kernels"] = block_kernels(xp)
    # Kernels may decline a batch on some devices only. If values are read, the core's own passes exchange the sizes of
    # the features and scale Z accordingly, which kernels do not. If no values are read, Z is not scaled, and a rank
    # with kernels and a rank without kernels exchange the same messages. So GPUs of several generations can work
    # together.
    if kernels is not None and error is None and values_visible(like, xp) and kernels(result) is None:
        facts["fused_kernels"] = "none"
    compare_on_ranks(facts, ranks, like, xp)
    if error is not None:
        raise error
    return result


def _message_like(arguments: Mapping[str, Any]) -> Any:
    """Return the first argument that is an array with rows; without one, the first argument.

    An argument that is no array is an error, which this rank has to tell the others in a message.
    """
    members = (x for value in arguments.values() for x in (value if isinstance(value, (tuple, list)) else (value,)))
    return next((x for x in members if is_array(x) and x.ndim), next(iter(arguments.values())))


def compare_on_ranks(facts: Mapping[str, str], ranks: Ranks, like: Array, xp: Namespace) -> None:
    """Raise the same ValueError on all ranks if a fact is not the same on all ranks.

    Parameters
    ----------
    facts : mapping of str to str
        The facts by name; ``error`` is the own error, or empty.
    ranks : Ranks
        The ranks that share the batch.
    like : array
        An array on the device from which messages are sent.
    xp : namespace
        The namespace of `like`.
    """
    text = json.dumps(facts, sort_keys=False).encode()
    # A digest of fixed size comes first: messages of different sizes would end some libraries of collectives.
    length = len(text).to_bytes(LENGTH_BYTES, "little")
    digests = _gathered(hashlib.sha256(text).digest() + length, ranks, like, xp)
    if bool(xp.all(digests == digests[:1, :])):
        return
    longest = max(int.from_bytes(_bytes(row)[-LENGTH_BYTES:], "little") for row in _rows(digests))
    texts = _gathered(text.ljust(longest), ranks, like, xp)
    every = [json.loads(_bytes(row)) for row in _rows(texts)]
    raise ValueError(_difference(every))


def distinct_on_ranks(
    sample_index: Array, ranks: Ranks | None, xp: Namespace, in_range: Array | None = None
) -> Array | None:
    """Raise the same ValueError on all ranks if a row id of the global batch occurs twice, if values can be read.

    Otherwise return an array of shape (), the same on all ranks: True if no id occurs twice and all ids are in range.
    The result is None if the values were read.

    Parameters
    ----------
    sample_index : array of integers, shape (b,)
        The row ids of the own pairs, the same number on each rank.
    ranks : Ranks, optional
        The ranks that share the batch; None: `sample_index` holds the row ids of the whole batch.
    xp : namespace
        The namespace of `sample_index`.
    in_range : array of bool, shape (b,), optional
        Which of the own ids are in range, if their values cannot be read. None: all of them.
    """
    # One flag for all own ids is enough.
    message = (sample_index,) if in_range is None else (sample_index, xp.reshape(xp.all(in_range), (1,)))
    gathered, *flags = tuple(x[None, :] for x in message) if ranks is None else ranks.all_gather(message)
    if in_range is None and values_visible(sample_index, xp):
        refuse_repeats(gathered, xp)
        return None
    # After sorting, an id that occurs twice is equal to its successor.
    ordered = xp.sort(xp.reshape(gathered, (-1,)))
    valid = xp.all(ordered[1:] != ordered[:-1])
    return valid & xp.all(flags[0]) if flags else valid


def refuse_repeats(gathered: Array, xp: Namespace) -> None:
    """Raise a ValueError if a row id occurs twice among those of all ranks, (W, b); values have to be readable."""
    flat, local = xp.reshape(gathered, (-1,)), int(gathered.shape[1])
    order = xp.argsort(flat)
    ordered = xp.take(flat, order, axis=0)
    repeated = ordered[1:] == ordered[:-1]
    if not bool(xp.any(repeated)):
        return
    place = int(xp.argmax(xp.astype(repeated, xp.int8)))
    first, second = sorted(int(order[n]) // local for n in (place, place + 1))
    message = f"sample_index must not repeat an index within a batch, got {int(ordered[place])}"
    if gathered.shape[0] == 1:
        raise ValueError(f"{message} twice")
    where = f"twice on rank {first}" if first == second else f"on rank {first} and on rank {second}"
    raise ValueError(f"{message} {where} (torch's DistributedSampler repeats samples unless drop_last=True)")


def _fact(value: Any, wait: bool) -> str:
    """Describe an argument as far as it has to be the same on all ranks; with `wait` read a number on a device, too."""
    if isinstance(value, (tuple, list)):
        return ", ".join(_fact(member, wait) for member in value)
    if not is_array(value):
        return _validate.describe(value)
    dtype = str(value.dtype).rpartition(".")[2]
    if value.ndim == 0:
        xp = namespace_of({"value": value})
        readable = has_values(value, xp) if wait else values_visible(value, xp)
        return f"{float(value)} ({dtype})" if readable else dtype
    return f"shape {tuple(value.shape)} and dtype {dtype}"


def _difference(every: list[dict[str, str]]) -> str:
    """Return the message about the first fact that differs, given the facts of all ranks."""
    # An error of a rank comes first, because it usually explains the other differences.
    errors = [(rank, facts["error"]) for rank, facts in enumerate(every) if facts.get("error")]
    if errors:
        rank, error = errors[0]
        return f"rank {rank} refuses its arguments: {error.partition(': ')[2]}"
    names = list(dict.fromkeys(name for facts in every for name in facts))
    name = next(name for name in names if len({facts.get(name) for facts in every}) > 1)
    by_value: dict[str, list[int]] = {}
    for rank, facts in enumerate(every):
        by_value.setdefault(facts.get(name, "nothing"), []).append(rank)
    received = " and ".join(f"{value} on {_ranks(ranks)}" for value, ranks in by_value.items())
    return f"{name} must be the same on all ranks, got {received}"


def _ranks(ranks: list[int]) -> str:
    """Return ``rank 3`` or ``ranks 0, 1, 2, ...`` for a message."""
    shown = ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _gathered(text: bytes, ranks: Ranks, like: Array, xp: Namespace) -> Array:
    """Return the bytes of all ranks, (W, length) uint8; all ranks pass as many bytes."""
    message = xp.asarray(list(text), dtype=xp.uint8, device=device_of(like))
    (gathered,) = ranks.all_gather((message,))
    return gathered


def _rows(gathered: Array) -> list[Array]:
    """Return the rows of an array of bytes."""
    return [gathered[rank, :] for rank in range(gathered.shape[0])]


def _bytes(row: Array) -> bytes:
    """Return an array of bytes as a Python object."""
    return bytes(int(row[place]) for place in range(row.shape[0]))
