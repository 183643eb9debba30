"""The options of a dry run that describe many ranks: processes that train together, the network, and their speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from drrho_clip.errors import BadInput
from drrho_clip.options import at_least, number, setting, setting_of

__all__ = ["PlanOptions"]

_POSITIVE = number("> 0", lambda value: value > 0)


@dataclass(frozen=True)
class PlanOptions:
    """The options of ``drrho train --dry-run`` for many ranks.

    Raises
    ------
    BadInput
        If a value breaks the rule of its option, or if `world_size` and `bandwidth` are not given together.

    Examples
    --------
    >>> PlanOptions.of({"world_size": 4, "bandwidth": 25.0}).latency
    50.0
    """

    world_size: int | None = setting(
        None,
        rule=at_least(1),
        help="With --dry-run: number of processes that train together; the plan has memory, traffic and time of each.",
    )
    bandwidth: float | None = setting(
        None,
        rule=_POSITIVE,
        metavar="GB/S",
        help="With --world-size: gigabytes (1e9 bytes) per second that a process receives while it sends as many.",
    )
    latency: float = setting(
        50.0,
        rule=number(">= 0", lambda value: value >= 0),
        metavar="MICROSECONDS",
        help="With --world-size: microseconds that an exchange of a few bytes takes among all processes.",
    )
    pairs_per_second: float | None = setting(
        None,
        rule=_POSITIVE,
        metavar="NUMBER",
        help="With --world-size: pairs per second that one process trains alone; the plan then has the time of a step.",
    )
    step_overhead: float = setting(
        0.0,
        rule=number(">= 0", lambda value: value >= 0),
        metavar="MILLISECONDS",
        help="With --pairs-per-second: milliseconds of a step beside that speed, which no number of processes divides, "
        "such as those of the update and of the selection in rho, jest and jest-topk.",
    )
    device_memory: float | None = setting(
        None,
        rule=_POSITIVE,
        metavar="GB",
        help="With --world-size: memory of a device, in gigabytes (1e9 bytes); the plan then has the largest batch.",
    )
    num_pairs: int | None = setting(
        None,
        rule=at_least(2, most=2**48),
        metavar="INT",
        help="With --dry-run and a --model of known size: plan for this number of training pairs, without --data.",
    )

    @classmethod
    def of(cls, named: Mapping[str, Any]) -> PlanOptions:
        """Return the options that the user has named, checked."""
        options = cls(**named)
        for option in fields(cls):
            value = getattr(options, option.name)
            if value is not None:
                setting_of(option).rule.check(option.name, value)
        if options.world_size is not None and options.bandwidth is None:
            raise BadInput("bandwidth must be given with world_size, in gigabytes per second, got none")
        if options.world_size is None:
            for name in ("bandwidth", "latency", "pairs_per_second", "step_overhead", "device_memory"):
                if name in named:
                    raise BadInput(f"{name} must be left out without world_size, got {named[name]}")
        if options.pairs_per_second is None and "step_overhead" in named:
            raise BadInput(f"step_overhead must be left out without pairs_per_second, got {named['step_overhead']}")
        return options
