"""The two searches of the solvers: a binary search over sorted losses, and Newton's method within a bracket.

Both searches take a fixed number of steps and select values with ``where`` instead of branching on them. Therefore a
compiler can trace the searches, and they never wait for a device. In eager code on the host, `repeat` skips the steps
that would change nothing.
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
"""``is_active(ordered, loss)`` takes sorted slices and one loss per slice, and returns the mask of active losses.

`loss` and the mask have shape (..., 1). Depending on the solver, an active loss is a loss with a positive weight, or a
loss whose weight is at the ceiling, the largest weight that the set allows. The active losses of a slice are its
largest losses. In descending order they come first, and the search finds the last active loss.
"""


def run_length() -> int:
    """Return the number of neighbouring sorted losses that `thinned` replaces by their mean."""
    return 4


def thinned(ordered: Slices, xp: Namespace) -> Slices:
    """Return slices with a quarter of the losses and nearly the same solution.

    Each loss is the mean of a run of neighbouring sorted losses.
    """
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
    # If there are many losses, a thinned copy of them is searched first, recursively. The search among all losses then
    # starts near the position that the first search has found, and doubles its step until the last active loss lies
    # within the step. This takes about 6 passes over all losses instead of 20.
    if len(cut(ordered, xp)) > 1:
        guess = run_length() * last_active(thinned(ordered, xp), is_active, xp) + run_length() - 1
        steps, step, probe = 2 * steps + 1, xp.full_like(low, run_length() // 2), xp.minimum(guess, high)

    def narrow(bracket: Carry) -> Carry:
        # The loss at `low` is active, and the loss after `high` is not.
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

    In a test of ten thousand problems with losses from 1e-100 to 1e100, the hardest problem took 14 steps in float64
    and 16 in float32.
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
    """Return the position at which the surplus is 0, by Newton's method within a bracket.

    The surplus is the divergence of the weights minus the bound, the divergence that the ball allows. The position is
    the logarithm of the scale of the weights, or another number on which the weights depend.

    Parameters
    ----------
    surplus : callable
        ``surplus(position)`` returns two arrays: the surplus, which falls as the position grows, and the derivative of
        the surplus times -1.
    low, high : array, shape (..., 1)
        Bracket of the position.
    at_low : array, shape (..., 1)
        The surplus at `low`, which is positive.
    growth : float
        The growth of the ball. The bound is ``log(1 + growth)``.
    xp : namespace
        The arrays' namespace.

    Notes
    -----
    Newton's method works on ``log(divergence) - log(largest divergence - divergence)``, which is nearly linear in the
    position at both ends of the bracket. Here the largest divergence is that of the whole bracket, the divergence at
    `low`. In three cases the bracket is halved instead: if the Newton step leaves the bracket, if the step is not
    shorter than half of the previous step, or if the divergence at the start of the step is nearly 0 or nearly the
    largest. A Newton step is always taken if both the step and the relative surplus are below the square root of the
    rounding error.
    """
    small = math.sqrt(float(xp.finfo(low.dtype).eps))
    target = math.log1p(growth)
    at_low = xp.clip(at_low, min=parameter_rounding())

    def improve(carry: Carry) -> Carry:
        position, low, high, last = carry
        value, slope = surplus(position)
        low, high = xp.where(value > 0, position, low), xp.where(value > 0, high, position)
        # With h the divergence, h_max its largest value and `target` the bound: gained = h / target - 1 and
        # lost = (h - target) / (h_max - target). Both are clipped, so that the logarithms below stay finite.
        gained = xp.clip(value / target, min=small - 1)
        lost = xp.clip(value / at_low, max=1 - small)
        # The Newton step for log(1 + gained) - log(1 - lost), which has the same root as the surplus.
        rate = slope / (target * (1 + gained)) + slope / (at_low * (1 - lost))
        step = (xp.log1p(gained) - xp.log1p(-lost)) / xp.clip(rate, min=1e-9)
        newton = position + step
        length, middle = xp.abs(step), (low + high) / 2
        # Take the Newton step if it is safe (`moving`) or has converged (`settled`), and halve the bracket otherwise.
        moving = (gained > small - 1) & (lost < 1 - small) & (newton > low) & (newton < high) & (length < last / 2)
        settled = (length < small) & (xp.abs(gained) < small) & (xp.abs(lost) < small)
        taken = moving | settled
        return xp.where(taken, newton, middle), low, high, xp.where(taken, length, middle - low)

    high = high + 1  # the root may be `high` itself, and a step may end just beyond the root
    # Convergence is quadratic: after a step of this length the next step would be smaller than a rounding error.
    still = max(small / 1000, 8 * small**2)
    start = ((low + high) / 2, low, high, high - low)
    return repeat(newton_steps(), improve, start, xp, finished=lambda carry: carry[3] <= still)[0]
