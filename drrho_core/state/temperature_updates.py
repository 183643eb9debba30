"""Updates of learned temperatures: pure functions of arrays, which run under ``jax.jit`` and ``torch.compile``.

    F_i = t_i (log(eps + u_i) + radius)            one anchor's part of the objective, before the mean over 2b anchors
    s_i = dF_i / dt_i = log(eps + u_i) + radius - sum_j w_ij D_ij                    `contrastive_step` returns s_i / 2b
    global (RGCL-g):          Adam on tau with the sum of all s_i / 2b, then onto [minimum, maximum]
    per sample (iSogCLR):     m_i <- (1 - beta) m_i + beta s_i,   t_i <- t_i - learning_rate m_i, then onto the bounds

Without memory s_i is the radius minus the Kullback-Leibler divergence of the anchor's weights from uniform ones: a
temperature rises while the weights are more uneven than the radius allows, and falls while they are less. Sources:
iSogCLR (arXiv 2305.11965), RGCL and RGCL-g as in FastCLIP (arXiv 2407.01445); see docs/theory/temperature.md.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, Scalar, device_of, is_array
from drrho_core._validate import BELOW_ONE, FINITE, NOT_NEGATIVE, POSITIVE, STATE, UNIT_INTERVAL, Rule

OWNER = "the temperature"
"""The name of a temperature's state in messages."""

VERSION = 1
"""Version of the mapping that `state_dict` of a learned temperature returns."""


class GlobalTemperatureState(NamedTuple):
    """One temperature and Adam's memory of it; all of shape ().

    Attributes
    ----------
    temperature : array
        tau.
    first_moment, second_moment : array
        Moving averages of the gradient and of its square, from 0.
    step : array of int32
        Number of updates.
    """

    temperature: Array
    first_moment: Array
    second_moment: Array
    step: Array


class TemperatureRows(NamedTuple):
    """Temperatures of some anchors and the moving averages of their slopes; both of the same shape (b,).

    Attributes
    ----------
    temperature : array
        tau of every anchor.
    momentum : array
        Moving average of s_i, from 0.
    """

    temperature: Array
    momentum: Array


def update_global_temperature(
    state: GlobalTemperatureState,
    gradient: Scalar,
    /,
    *,
    learning_rate: Scalar,
    minimum: float = 0.01,
    maximum: float = 1.0,
    slow_below: float | None = None,
    beta1: float = 0.9,
    beta2: float = 0.999,
    xp: Namespace | None = None,
) -> GlobalTemperatureState:
    """Take one step of Adam on a global temperature and project it onto its bounds.

    Parameters
    ----------
    state : GlobalTemperatureState
        The state before the step; float32 or wider.
    gradient : float or array of shape ()
        ``temperature_gradient`` of `contrastive_step` or of another loss. One whose square is too large for the state
        (in float32 above 1.8e19 in size) counts as the largest whose square is not.
    learning_rate : float or array of shape ()
        >= 0. Adam moves tau by about this much per step, whatever the size of the gradient.
    minimum, maximum : float
        Bounds, 0 < minimum <= maximum.
    slow_below : float, optional
        A third of the learning rate is used while tau is at or below this: FastCLIP v3 says 0.03. None: never.
    beta1, beta2 : float
        Weights of the past in both moving averages, in [0, 1).
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    GlobalTemperatureState
        After the step, in the dtypes of the old one.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules. Values are read on the host only and never under tracing.

    Notes
    -----
    Adam (arXiv 1412.6980) with bias correction and without weight decay, then a projection, as RGCL-g is trained in
    FastCLIP v3 (arXiv 2407.01445); here tau itself is the parameter, not its logarithm.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import GlobalTemperature
    >>> state = GlobalTemperature(0.07, like=np.zeros(1)).state
    >>> state = update_global_temperature(state, 2.5, learning_rate=0.01)  # the slope is positive: tau falls
    >>> round(float(state.temperature), 6), int(state.step)
    (0.06, 1)
    """
    given = {"gradient": gradient, "learning_rate": learning_rate}
    call = _validate.arrays(state._asdict(), xp, options=given)
    call.array("temperature", STATE)
    xp, old = call.xp, state.temperature
    for name, array in state._asdict().items():
        _validate.shape(f"state.{name}", array, (), "()")
    gradient = call.option("gradient", gradient, FINITE, old.dtype)
    learning_rate = call.option("learning_rate", learning_rate, NOT_NEGATIVE, old.dtype)
    minimum, maximum = check_bounds(minimum, maximum, old.dtype, xp)
    beta1, beta2 = _validate.number("beta1", beta1, BELOW_ONE), _validate.number("beta2", beta2, BELOW_ONE)
    gradient, rate = (_like(value, old, xp) for value in (gradient, learning_rate))
    if slow_below is not None:
        slow_below = _validate.number("slow_below", slow_below, POSITIVE, dtype=old.dtype, xp=xp)
        rate = xp.where(old <= slow_below, rate / 3, rate)
    # A gradient whose square overflows counts as the largest whose square does not. Adam's step hardly depends on the
    # size of the gradient, and the moving averages stay finite.
    limit = math.sqrt(float(xp.finfo(old.dtype).max)) * (1 - 1e-6)
    gradient = xp.clip(gradient, min=-limit, max=limit)
    # Adam: moving averages of the gradient and of its square ...
    step = xp.asarray(state.step + 1)
    first = xp.asarray(beta1 * state.first_moment + (1 - beta1) * gradient)
    second = xp.asarray(beta2 * state.second_moment + (1 - beta2) * gradient * gradient)
    count = xp.astype(step, old.dtype)
    # ... divided by 1 - beta**count, because they start at 0. As a difference of two numbers this divisor would lose
    # three digits of float32 at the first steps; expm1 keeps them.
    mean = first / -xp.expm1(count * _log(beta1))
    spread = xp.sqrt(second / -xp.expm1(count * _log(beta2)))
    # The step, then the projection onto the bounds.
    new = _project(old - rate * (mean / (spread + 1e-8)), minimum, maximum, xp)
    return GlobalTemperatureState(new, first, second, step)


def update_temperature_rows(
    rows: TemperatureRows,
    slope: Array,
    /,
    *,
    learning_rate: Scalar,
    minimum: float = 0.01,
    maximum: float = 1.0,
    beta: float = 0.9,
    xp: Namespace | None = None,
) -> TemperatureRows:
    """Take one step of iSogCLR on temperatures per anchor and project them onto their bounds.

    Parameters
    ----------
    rows : TemperatureRows
        Temperatures and momenta of some anchors, both (b,), float32 or wider.
    slope : array, shape (b,)
        Derivative of every anchor's own part of the objective, s_i: 2b times the gradient of `contrastive_step`.
    learning_rate : float or array of shape ()
        >= 0, in units of temperature: an anchor moves by this times the moving average of its slope.
    minimum, maximum : float
        Bounds, 0 < minimum <= maximum.
    beta : float
        Weight of the new slope in the moving average, in (0, 1]; 1 has no memory.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    TemperatureRows
        After the step, in the dtypes of the old ones.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules. Values are read on the host only and never under tracing.

    Notes
    -----
    ``m <- (1 - beta) m + beta s``, ``t <- t - learning_rate m``, then the projection: iSogCLR (arXiv 2305.11965).

    Examples
    --------
    >>> import numpy as np
    >>> rows = TemperatureRows(np.asarray([0.07, 0.07]), np.zeros(2))
    >>> rows = update_temperature_rows(rows, np.asarray([2.0, -50.0]), learning_rate=0.02, maximum=0.5)
    >>> rows.temperature.round(6).tolist(), rows.momentum.round(6).tolist()
    ([0.034, 0.5], [1.8, -45.0])
    """
    call = _validate.arrays(rows._asdict() | {"slope": slope}, xp, options={"learning_rate": learning_rate})
    call.array("temperature", STATE)
    old = rows.temperature
    _validate.ndim("rows.temperature", old, 1, "(batch_size,)")
    _validate.shape("rows.momentum", rows.momentum, tuple(old.shape), "(batch_size,)")
    call.array("slope", shape=tuple(old.shape), meaning="(batch_size,)", rule=FINITE)
    xp = call.xp
    learning_rate = call.option("learning_rate", learning_rate, NOT_NEGATIVE, old.dtype)
    bounds = check_bounds(minimum, maximum, old.dtype, xp)
    beta = _validate.number("beta", beta, UNIT_INTERVAL)
    return move(rows, xp.astype(slope, old.dtype), 1, learning_rate, bounds, beta, xp)


def move(
    rows: TemperatureRows,
    slope: Array,
    factor: float,
    learning_rate: Scalar,
    bounds: tuple[float, float],
    beta: float,
    xp: Namespace,
) -> TemperatureRows:
    """Move rows by slopes that are `factor` times `slope`; a momentum too large for its dtype becomes the largest."""
    old = rows.temperature
    limit = float(xp.finfo(old.dtype).max)
    # m <- (1 - beta) m + beta s; a sum that overflows becomes the largest number, not inf.
    momentum = xp.clip((1 - beta) * rows.momentum + (beta * factor) * slope, min=-limit, max=limit)
    return TemperatureRows(_project(old - _like(learning_rate, old, xp) * momentum, *bounds, xp), momentum)


def _project(temperature: Array, minimum: float, maximum: float, xp: Namespace) -> Array:
    """Return the nearest temperatures within the bounds; a nan stays one."""
    return xp.asarray(xp.clip(temperature, min=minimum, max=maximum))  # NumPy makes scalars of arrays without axes


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _like(value: Any, array: Array, xp: Namespace) -> Array:
    """Return a scalar as an array with the dtype and on the device of `array`."""
    if is_array(value):
        return xp.astype(value, array.dtype)
    return xp.asarray(value, dtype=array.dtype, device=device_of(array))


def check_bounds(minimum: Any, maximum: Any, dtype: Any, xp: Namespace) -> tuple[float, float]:
    """Check 0 < minimum <= maximum, numbers that a dtype holds."""
    low = _validate.number("minimum", minimum, POSITIVE, dtype=dtype, xp=xp)
    above = Rule(f"be at least minimum ({low})", low=low, includes_low=True)
    return low, _validate.number("maximum", maximum, above, dtype=dtype, xp=xp)


def check_start(temperature: Any, minimum: float, maximum: float) -> float:
    """Check that the first temperature lies within the bounds."""
    words = f"be in [minimum, maximum] = [{minimum}, {maximum}]"
    return _validate.number("temperature", temperature, Rule(words, minimum, maximum, True, True))
