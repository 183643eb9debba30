"""The two searches of the solvers: a binary search over sorted losses, and Newton's method within a bracket.

Both take a fixed number of steps and select instead of branching, so that they can be traced and never wait for a
device. In eager code on the host, steps that would change nothing are skipped (`repeat`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from drrho_core._array_api import Array, Namespace
from drrho_core._routines import repeat
from drrho_core.ambiguity.rounding import parameter_rounding
from drrho_core.ambiguity.slices import Slices, cut, first_entries
from drrho_core.extend import Carry

IsActive = Callable[[Slices, Array], Array]
"""``is_active(ordered, loss)``, (..., 1) to bool: true for all losses from the largest down to the searched one."""


def run_length() -> int:
    """Return the number of neighbours among sorted losses that a thinned loss stands for."""
    return 4


def thinned(ordered: Slices, xp: Namespace) -> Slices:
    """Return the means of runs of sorted losses: a problem with a quarter of the losses and nearly the same answer."""
    *rows, n = ordered.losses.shape
    run = run_length()
    losses = xp.mean(xp.reshape(ordered.losses[..., : n - n % run], (*rows, n // run, run)), axis=-1)
    number = xp.clip(ordered.number // run, min=1)
    return Slices(losses, first_entries(number, losses, xp), number, xp.astype(number, losses.dtype), losses[..., :1])


def last_active(ordered: Slices, is_active: IsActive, xp: Namespace) -> Array:
    """Return the position of the last sorted loss that is active, (..., 1), by a binary search."""
    n = ordered.losses.shape[-1]
    low, high = xp.zeros_like(ordered.number), ordered.number - 1
    steps, step, probe = (n - 1).bit_length(), xp.full_like(low, n), (low + high + 1) // 2
    # Of many losses a thinned copy is searched first, recursively. The search in the full slice then starts at that
    # position and doubles its step until the bracket is closed: about 6 passes over all losses instead of 20.
    if len(cut(ordered, xp)) > 1:
        guess = run_length() * last_active(thinned(ordered, xp), is_active, xp) + run_length() - 1
        steps, step, probe = 2 * steps + 1, xp.full_like(low, run_length() // 2), xp.minimum(guess, high)

    def narrow(bracket: Carry) -> Carry:
        # The loss at `low` is active, that after `high` is not.
        low, high, step, probe = bracket
        active = is_active(ordered, xp.take_along_axis(ordered.losses, probe, axis=-1))
        low, high = xp.where(active, probe, low), xp.where(active, high, xp.maximum(probe - 1, low))
        middle = (low + high + 1) // 2
        probe = xp.where(active, xp.minimum(low + step, middle), xp.maximum(high + 1 - step, middle))
        return low, high, xp.minimum(2 * step, xp.full_like(step, n)), probe

    bracket = (low, high, step, probe)
    return repeat(steps, narrow, bracket, xp, finished=lambda bracket: bracket[0] >= bracket[1])[0]


def smallest_active(ordered: Slices, is_active: IsActive, xp: Namespace) -> Array:
    """Return the smallest active loss, (..., 1). The largest loss is always active."""
    position = last_active(ordered, lambda part, loss: (loss == part.top) | is_active(part, loss), xp)
    return xp.take_along_axis(ordered.losses, position, axis=-1)


def newton_steps() -> int:
    """Return the number of steps of `find_root`.

    Of ten thousand problems, with losses from 1e-100 to 1e100, the hardest took 14 (float32: 16).
    """
    return 18


def find_root(
    surplus: Callable[[Array], tuple[Array, Array]],
    low: Array,
    high: Array,
    at_low: Array,
    growth: float,
    xp: Namespace,
) -> Array:
    """Return the position at which a divergence equals that of the ball, by Newton's method within a bracket.

    Parameters
    ----------
    surplus : callable
        ``surplus(position)`` returns the divergence minus that of the ball, which falls as the position grows, and
        minus its derivative.
    low, high : array, shape (..., 1)
        Bracket of the position.
    at_low : array, shape (..., 1)
        The surplus at `low`, positive.
    growth : float
        Growth of the ball: its divergence is ``log(1 + growth)``.
    xp : namespace
        The arrays' namespace.

    Notes
    -----
    Newton's method works on ``log(divergence) - log(largest divergence - divergence)``, which is nearly linear in the
    position at both ends. A bisection takes its place when a step leaves the bracket, is not half as long as the
    previous one, or starts where the divergence has reached an end. A step at the noise floor is always taken.
    """
    small = math.sqrt(float(xp.finfo(low.dtype).eps))
    target = math.log1p(growth)
    at_low = xp.clip(at_low, min=parameter_rounding())

    def improve(carry: Carry) -> Carry:
        position, low, high, last = carry
        value, slope = surplus(position)
        low, high = xp.where(value > 0, position, low), xp.where(value > 0, high, position)
        # With h = divergence: gained = h / target - 1 and lost = (h - target) / (h_max - target), clipped at the ends.
        gained = xp.clip(value / target, min=small - 1)
        lost = xp.clip(value / at_low, max=1 - small)
        # The Newton step on log(1 + gained) - log(1 - lost), whose root is that of the surplus.
        rate = slope / (target * (1 + gained)) + slope / (at_low * (1 - lost))
        step = (xp.log1p(gained) - xp.log1p(-lost)) / xp.clip(rate, min=1e-9)
        newton = position + step
        length, middle = xp.abs(step), (low + high) / 2
        # Take the Newton step where it is safe or where it has converged, and bisect elsewhere.
        moving = (gained > small - 1) & (lost < 1 - small) & (newton > low) & (newton < high) & (length < last / 2)
        settled = (length < small) & (xp.abs(gained) < small) & (xp.abs(lost) < small)
        taken = moving | settled
        return xp.where(taken, newton, middle), low, high, xp.where(taken, length, middle - low)

    high = high + 1  # the bound may be the root itself, and a step may end just beyond it
    # Convergence is quadratic: after a step of this length the next one would be lost in rounding.
    still = max(small / 1000, 8 * small**2)
    start = ((low + high) / 2, low, high, high - low)
    return repeat(newton_steps(), improve, start, xp, finished=lambda carry: carry[3] <= still)[0]
