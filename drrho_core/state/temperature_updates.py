"""Updates of learned temperatures: pure functions of arrays, which run under ``jax.jit`` and ``torch.compile``.

    F_i = t_i (log(eps + u_i) + radius)            the term of anchor i; the objective is the mean over all 2b anchors
    s_i = dF_i / dt_i = log(eps + u_i) + radius - sum_j w_ij D_ij                    `contrastive_step` returns s_i / 2b
    global (RGCL-g):          Adam on tau with the sum of all s_i / 2b, then projected onto [minimum, maximum]
    per sample (iSogCLR):     m_i <- (1 - beta) m_i + beta s_i,   t_i <- t_i - learning_rate m_i, then projected

t_i is the temperature of anchor i, u_i the inner estimate of anchor i (a moving average of the mean over j of
exp(D_ij)), and w_ij the weight of negative j of anchor i. An excess similarity is the learner's similarity minus
reference_weight times the reference model's similarity. D_ij is the excess similarity of negative j minus that of the
positive, divided by t_i. tau is a temperature that all anchors share.

With gamma = 1 and eps = 0, the slope s_i is the radius minus the Kullback-Leibler divergence of the anchor's weights
from uniform weights. So a temperature rises while this divergence is larger than the radius, and falls while it is
smaller. Sources: iSogCLR (arXiv 2305.11965), RGCL and RGCL-g as in FastCLIP (arXiv 2407.01445); see
docs/theory/temperature.md.
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
    """One temperature and the state of Adam, its optimiser; all arrays have shape ().

    Attributes
    ----------
    temperature : array
        tau.
    first_moment, second_moment : array
        Moving averages of the gradient and of its square, which start at 0.
    step : array of int32
        Number of updates.
    """

    temperature: Array
    first_moment: Array
    second_moment: Array
    step: Array


class TemperatureRows(NamedTuple):
    """Temperatures of some anchors, and the moving averages of the anchors' slopes; both arrays have the shape (b,).

    Attributes
    ----------
    temperature : array
        The temperature t_i of every anchor.
    momentum : array
        Moving average of the slope s_i, which starts at 0.
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
        ``temperature_gradient`` of `contrastive_step` or of another loss. If its square overflows in the dtype of the
        state (in float32 above 1.8e19 in size), it is limited to the largest number whose square is finite.
    learning_rate : float or array of shape ()
        Number >= 0. Adam moves tau by about this number per step, for a gradient of any size.
    minimum, maximum : float
        Bounds, 0 < minimum <= maximum.
    slow_below : float, optional
        While tau is at or below this number, a third of the learning rate is used; FastCLIP v3 uses 0.03. None: never.
    beta1, beta2 : float
        Weights of the old averages in the two moving averages, in [0, 1).
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    GlobalTemperatureState
        The state after the step, in the dtypes of the old state.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks the rules above. Values are checked only on the host and outside tracing.

    Notes
    -----
    The step is that of Adam (arXiv 1412.6980) with bias correction and without weight decay. A projection onto the
    bounds follows. FastCLIP v3 (arXiv 2407.01445) trains RGCL-g in this way. The parameter of Adam is tau itself, not
    the logarithm of tau.

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
    # The gradient is limited so that its square, and thereby the moving averages, stay finite. This hardly changes
    # Adam's step, which is nearly independent of the size of the gradient.
    limit = math.sqrt(float(xp.finfo(old.dtype).max)) * (1 - 1e-6)
    gradient = xp.clip(gradient, min=-limit, max=limit)
    # Adam keeps moving averages of the gradient and of its square.
    step = xp.asarray(state.step + 1)
    first = xp.asarray(beta1 * state.first_moment + (1 - beta1) * gradient)
    second = xp.asarray(beta2 * state.second_moment + (1 - beta2) * gradient * gradient)
    count = xp.astype(step, old.dtype)
    # These averages start at 0, so Adam divides them by 1 - beta**count. In the first steps the subtraction would lose
    # three digits in float32; expm1 computes the difference without this loss.
    mean = first / -xp.expm1(count * _log(beta1))
    spread = xp.sqrt(second / -xp.expm1(count * _log(beta2)))
    # Take the step, then project onto the bounds.
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
        The slopes s_i, which are 2b times the ``temperature_gradient`` of `contrastive_step`.
    learning_rate : float or array of shape ()
        Number >= 0. A temperature changes by this number times the moving average of its slope.
    minimum, maximum : float
        Bounds, 0 < minimum <= maximum.
    beta : float
        Weight of the new slope in the moving average, in (0, 1]; with 1 older slopes are ignored.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    TemperatureRows
        The rows after the step, in the dtypes of the old rows.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks the rules above. Values are checked only on the host and outside tracing.

    Notes
    -----
    The step of iSogCLR (arXiv 2305.11965) is ``m <- (1 - beta) m + beta s``, ``t <- t - learning_rate m``, and then the
    projection of t onto the bounds.

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
    """Take one step of iSogCLR with checked arguments; the slopes s are `factor` times `slope`."""
    old = rows.temperature
    limit = float(xp.finfo(old.dtype).max)
    # m <- (1 - beta) m + beta s; a sum that overflows becomes the largest number, not inf.
    momentum = xp.clip((1 - beta) * rows.momentum + (beta * factor) * slope, min=-limit, max=limit)
    return TemperatureRows(_project(old - _like(learning_rate, old, xp) * momentum, *bounds, xp), momentum)


def _project(temperature: Array, minimum: float, maximum: float, xp: Namespace) -> Array:
    """Return the nearest temperatures within the bounds; nan stays nan."""
    return xp.asarray(xp.clip(temperature, min=minimum, max=maximum))  # NumPy turns an array of shape () into a scalar


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _like(value: Any, array: Array, xp: Namespace) -> Array:
    """Return a scalar as an array with the dtype and on the device of `array`."""
    if is_array(value):
        return xp.astype(value, array.dtype)
    return xp.asarray(value, dtype=array.dtype, device=device_of(array))


def check_bounds(minimum: Any, maximum: Any, dtype: Any, xp: Namespace) -> tuple[float, float]:
    """Check that 0 < minimum <= maximum and that a dtype can hold both, and return them as floats."""
    low = _validate.number("minimum", minimum, POSITIVE, dtype=dtype, xp=xp)
    above = Rule(f"be at least minimum ({low})", low=low, includes_low=True)
    return low, _validate.number("maximum", maximum, above, dtype=dtype, xp=xp)


def check_start(temperature: Any, minimum: float, maximum: float) -> float:
    """Check that the first temperature lies within the bounds."""
    words = f"be in [minimum, maximum] = [{minimum}, {maximum}]"
    return _validate.number("temperature", temperature, Rule(words, minimum, maximum, True, True))
