"""Learned temperatures: their state, their update and their bounds.

    F_i = t_i (log(eps + u_i) + radius)            one anchor's part of the objective, before the mean over 2b anchors
    s_i = dF_i / dt_i = log(eps + u_i) + radius - sum_j w_ij D_ij                    `contrastive_step` returns s_i / 2b
    global (RGCL-g):          Adam on tau with the sum of all s_i / 2b, then onto [minimum, maximum]
    per sample (iSogCLR):     m_i <- (1 - beta) m_i + beta s_i,   t_i <- t_i - learning_rate m_i, then onto the bounds

Without memory s_i is the radius minus the Kullback-Leibler divergence of the anchor's weights from uniform ones: a
temperature rises while the weights are more uneven than the radius allows, and falls while they are less. Sources:
iSogCLR (arXiv 2305.11965), RGCL and RGCL-g as in FastCLIP (arXiv 2407.01445); see docs/theory/temperature.md.

The updates are pure functions of arrays and run under ``jax.jit`` and ``torch.compile``; two classes keep the state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, device_of, is_array, namespace_of
from drrho_core.estimator import check_index, scatter_rows, storage_dtype

Scalar: TypeAlias = float | Array
"""A number or an array of shape ()."""

VERSION = 1
"""Of what `state_dict` returns."""


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
        Before the step; float32 or wider.
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
        If an argument breaks these rules. Values are looked at on the host only and never under tracing.

    Notes
    -----
    Adam (arXiv 1412.6980) with bias correction and without weight decay, then a projection, as RGCL-g is trained in
    FastCLIP v3 (arXiv 2407.01445); here tau itself is the parameter, not its logarithm.

    Examples
    --------
    >>> import numpy as np
    >>> state = GlobalTemperature(0.07, like=np.zeros(1)).state
    >>> state = update_global_temperature(state, 2.5, learning_rate=0.01)  # the slope is positive: tau falls
    >>> round(float(state.temperature), 6), int(state.step)
    (0.06, 1)
    """
    arrays = {name: getattr(state, name) for name in GlobalTemperatureState._fields}
    given = {"gradient": gradient, "learning_rate": learning_rate}
    xp = _together(arrays | {name: value for name, value in given.items() if is_array(value)}, xp)
    for name, array in arrays.items():
        _validate.shape(f"state.{name}", array, (), "()")
    old = state.temperature
    gradient = _validate.parameter("gradient", gradient, lambda _: True, "be finite", xp, dtype=old.dtype)
    learning_rate = _learning_rate(learning_rate, old, xp)
    minimum, maximum = _bounds(minimum, maximum, old.dtype, xp)
    beta1, beta2 = (
        _validate.number(name, value, lambda x: 0 <= x < 1, "be in [0, 1)")
        for name, value in (("beta1", beta1), ("beta2", beta2))
    )
    gradient, rate = (_like(value, old, xp) for value in (gradient, learning_rate))
    if slow_below is not None:
        slow_below = _validate.number("slow_below", slow_below, lambda x: x > 0, "be > 0", dtype=old.dtype, xp=xp)
        rate = xp.where(old <= slow_below, rate / 3, rate)
    # A gradient whose square is too large counts as the largest whose square is not. Adam's step hardly depends on the
    # gradient's size, and the memory of it stays finite.
    limit = math.sqrt(float(xp.finfo(old.dtype).max)) * (1 - 1e-6)
    gradient = xp.clip(gradient, min=-limit, max=limit)
    step = xp.asarray(state.step + 1)
    first = xp.asarray(beta1 * state.first_moment + (1 - beta1) * gradient)
    second = xp.asarray(beta2 * state.second_moment + (1 - beta2) * gradient * gradient)
    count = xp.astype(step, old.dtype)
    # 1 - beta**count would lose three digits of float32 at the first steps.
    mean = first / -xp.expm1(count * _log(beta1))
    spread = xp.sqrt(second / -xp.expm1(count * _log(beta2)))
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
    """Take one step of iSogCLR on temperatures of their own and project them onto their bounds.

    Parameters
    ----------
    rows : TemperatureRows
        Temperatures and momenta of some anchors, both (b,), float32 or wider.
    slope : array, shape (b,)
        Derivative of every anchor's own part of the objective, s_i: 2b times what `contrastive_step` returns.
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
        If an argument breaks these rules. Values are looked at on the host only and never under tracing.

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
    arrays = {name: getattr(rows, name) for name in TemperatureRows._fields} | {"slope": slope}
    xp = _together(arrays | ({"learning_rate": learning_rate} if is_array(learning_rate) else {}), xp)
    _validate.ndim("rows.temperature", rows.temperature, 1, "(batch_size,)")
    for name in ("momentum", "slope"):
        label = name if name == "slope" else f"rows.{name}"
        _validate.shape(label, arrays[name], tuple(rows.temperature.shape), "(batch_size,)")
    _validate.floating("slope", slope, xp)
    _validate.finite("slope", slope, xp)
    old = rows.temperature
    learning_rate = _learning_rate(learning_rate, old, xp)
    minimum, maximum = _bounds(minimum, maximum, old.dtype, xp)
    beta = _validate.number("beta", beta, lambda x: 0 < x <= 1, "be in (0, 1]")
    return _move(rows, xp.astype(slope, old.dtype), 1, learning_rate, (minimum, maximum), beta, xp)


class GlobalTemperature:
    """One learned temperature for all anchors (RGCL-g), with Adam's memory and bounds of its own.

    Parameters
    ----------
    temperature : float
        Where tau starts, within the bounds.
    like : array
        Any array of the library and on the device where the state is to live.
    minimum, maximum : float
        Bounds, 0 < minimum <= maximum; the defaults are those that CLIP and FastCLIP use.
    slow_below : float, optional
        A third of the learning rate is used while tau is at or below this: FastCLIP v3 says 0.03. None: never.
    beta1, beta2 : float
        Adam's, in [0, 1).
    dtype : dtype, optional
        float32 (default, when `like` is a half type too) or wider; a floating `like` lends its own where it is wider.

    Attributes
    ----------
    state : GlobalTemperatureState
        What it holds, a pytree: `update_global_temperature` takes it where a whole training step is compiled.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.

    Notes
    -----
    See `update_global_temperature`. A fixed temperature needs no class: give `contrastive_step` the number.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import contrastive_step
    >>> images, texts, unseen = np.eye(3), np.eye(3)[[0, 2, 1]], np.full(3, -np.inf)
    >>> learned = GlobalTemperature(0.5, like=images)
    >>> step = contrastive_step(images, texts, unseen, unseen, temperature=learned.temperature, radius=1.0)
    >>> learned = learned.update(step.temperature_gradient, learning_rate=0.01)
    >>> round(float(step.temperature_gradient), 4), round(float(learned.temperature), 4)
    (0.7815, 0.49)
    """

    def __init__(
        self,
        temperature: float,
        *,
        like: Array,
        minimum: float = 0.01,
        maximum: float = 1.0,
        slow_below: float | None = None,
        beta1: float = 0.9,
        beta2: float = 0.999,
        dtype: Any = None,
    ) -> None:
        xp = namespace_of({"like": like})
        dtype = storage_dtype(like, dtype, xp)
        self._minimum, self._maximum = _bounds(minimum, maximum, dtype, xp)
        start = _start(temperature, self._minimum, self._maximum)
        self._slow_below = (
            None
            if slow_below is None
            else _validate.number("slow_below", slow_below, lambda x: x > 0, "be > 0", dtype=dtype, xp=xp)
        )
        self._betas = tuple(
            _validate.number(name, value, lambda x: 0 <= x < 1, "be in [0, 1)")
            for name, value in (("beta1", beta1), ("beta2", beta2))
        )
        self._xp = xp
        device = device_of(like)
        zero = xp.zeros((), dtype=dtype, device=device)
        self.state = GlobalTemperatureState(
            temperature=xp.full((), start, dtype=dtype, device=device),
            first_moment=zero,
            second_moment=zero,
            step=xp.zeros((), dtype=xp.int32, device=device),
        )

    def __repr__(self) -> str:
        """Show where it may go."""
        return (
            f"GlobalTemperature(minimum={self._minimum}, maximum={self._maximum}, slow_below={self._slow_below}, "
            f"dtype={self.temperature.dtype})"
        )

    @property
    def temperature(self) -> Array:
        """Temperature as it stands, of shape ()."""
        return self.state.temperature

    def update(self, gradient: Scalar, /, *, learning_rate: Scalar) -> GlobalTemperature:
        """Return the temperature after one step of Adam; this one stays as it is.

        Parameters
        ----------
        gradient : float or array of shape ()
            ``temperature_gradient`` of the loss.
        learning_rate : float or array of shape ()
            >= 0.

        Raises
        ------
        TypeError, ValueError
            If an argument breaks these rules.
        """
        other = object.__new__(GlobalTemperature)
        other.__dict__.update(self.__dict__)
        other.state = update_global_temperature(
            self.state,
            gradient,
            learning_rate=learning_rate,
            minimum=self._minimum,
            maximum=self._maximum,
            slow_below=self._slow_below,
            beta1=self._betas[0],
            beta2=self._betas[1],
            xp=self._xp,
        )
        return other

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the state by name, each of shape (), and its ``version``."""
        return _with_version(self.state._asdict(), self._xp)

    def load_state_dict(self, state: Mapping[str, Array], /) -> None:
        """Take over what `state_dict` returned; the bounds stay this one's, and hold from the next update on.

        Raises
        ------
        ValueError, TypeError
            If names, version, shapes, dtypes or values differ; nothing has been changed then.
        """
        self.state = GlobalTemperatureState(**_loaded(state, self.state._asdict(), self._xp))


class PerSampleTemperature:
    """One learned temperature per sample and direction (RGCL, iSogCLR), with momenta and bounds of their own.

    Parameters
    ----------
    num_samples : int
        n >= 1, the number of samples in the data set.
    temperature : float
        Where all of them start, within the bounds.
    like : array
        Any array of the library and on the device where the state is to live.
    minimum, maximum : float
        Bounds, 0 < minimum <= maximum.
    beta : float
        Weight of the new slope in its moving average, in (0, 1]; 1 has no memory.
    dtype : dtype, optional
        float32 (default, when `like` is a half type too) or wider; a floating `like` lends its own where it is wider.

    Attributes
    ----------
    temperature_image, temperature_text : array, shape (n,)
        The temperatures of every image anchor and every text anchor.
    momentum_image, momentum_text : array, shape (n,)
        Moving averages of their slopes, from 0.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.

    Notes
    -----
    See `update_temperature_rows`. Shapes: `index` (b,), integers in [0, n), no repeats. Rows that a batch does not
    visit stay as they are, momentum included.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import contrastive_step
    >>> images, texts, unseen = np.eye(3), np.eye(3)[[0, 2, 1]], np.full(3, -np.inf)
    >>> learned, index = PerSampleTemperature(10, 0.5, like=images), np.asarray([4, 0, 7])
    >>> step = contrastive_step(images, texts, unseen, unseen, temperature=learned.gather(index), radius=0.2)
    >>> learned = learned.update(index, step.temperature_gradient, learning_rate=0.1)
    >>> learned.temperature_image[[4, 0, 7, 9]].round(4).tolist()  # an aligned pair, two swapped ones, one not visited
    [0.482, 0.5115, 0.5115, 0.5]
    """

    def __init__(
        self,
        num_samples: int,
        temperature: float,
        *,
        like: Array,
        minimum: float = 0.01,
        maximum: float = 1.0,
        beta: float = 0.9,
        dtype: Any = None,
    ) -> None:
        xp = namespace_of({"like": like})
        num_samples = _validate.integer("num_samples", num_samples, minimum=1)
        dtype = storage_dtype(like, dtype, xp)
        self._minimum, self._maximum = _bounds(minimum, maximum, dtype, xp)
        self._start = _start(temperature, self._minimum, self._maximum)
        self._beta = _validate.number("beta", beta, lambda x: 0 < x <= 1, "be in (0, 1]")
        self._xp = xp
        for name in _ROWS:
            setattr(self, name, self._fresh(name, num_samples, dtype, device_of(like)))

    temperature_image: Array
    temperature_text: Array
    momentum_image: Array
    momentum_text: Array

    def __repr__(self) -> str:
        """Show what it holds."""
        return (
            f"PerSampleTemperature(num_samples={self.num_samples}, minimum={self._minimum}, maximum={self._maximum}, "
            f"beta={self._beta}, dtype={self.temperature_image.dtype})"
        )

    @property
    def num_samples(self) -> int:
        """Number of samples n."""
        return int(self.temperature_image.shape[0])

    def gather(self, index: Array, /) -> tuple[Array, Array]:
        """Return the temperatures of a batch, as `contrastive_step` takes them.

        Parameters
        ----------
        index : array of integers, shape (b,)
            `sample_index` of the batch: in [0, n), no repeats.

        Returns
        -------
        tuple of arrays, shape (b,)
            Copies of the image anchors' and the text anchors' temperatures.

        Raises
        ------
        TypeError, ValueError
            If `index` is no such array. Values are looked at on the host and outside tracing.
        """
        index = check_index(index, self.num_samples, like=self.temperature_image, xp=self._xp)
        take = self._xp.take
        return take(self.temperature_image, index, axis=0), take(self.temperature_text, index, axis=0)

    def update(self, index: Array, gradient: tuple[Array, Array], /, *, learning_rate: Scalar) -> PerSampleTemperature:
        """Move the temperatures of a batch and return what to use from now on.

        Parameters
        ----------
        index : array of integers, shape (b,)
            `sample_index` of the batch: in [0, n), no repeats (duplicates mean different things per library).
        gradient : pair of arrays, shape (b,)
            ``temperature_gradient`` as `contrastive_step` returns it. It carries 1/2b of the mean over anchors, which
            is taken out again: how far a sample's temperature moves does not depend on the batch size.
        learning_rate : float or array of shape ()
            >= 0, in units of temperature per unit of slope, per visit.

        Returns
        -------
        PerSampleTemperature
            This one, updated in place, where the library's arrays can be written to; else a new one.

        Raises
        ------
        TypeError, ValueError
            If an argument breaks these rules; nothing has been written then.
        """
        xp = self._xp
        index = check_index(index, self.num_samples, like=self.temperature_image, xp=xp)
        batch_size = int(index.shape[0])
        if not isinstance(gradient, (tuple, list)) or len(gradient) != 2:
            raise TypeError(f"gradient must be a pair (image, text) of arrays, got {_validate.describe(gradient)}")
        labels = {f"gradient[{side}]": array for side, array in enumerate(gradient)}
        arrays = {"the state": self.temperature_image} | labels
        _together(arrays | ({"learning_rate": learning_rate} if is_array(learning_rate) else {}), xp)
        for name, array in labels.items():
            _validate.floating(name, array, xp)
            _validate.shape(name, array, (batch_size,), "(batch_size,)")
            _validate.finite(name, array, xp)
        learning_rate = _learning_rate(learning_rate, self.temperature_image, xp)
        new: dict[str, Array] = {}
        for side, array in zip(("image", "text"), gradient, strict=True):
            names = f"temperature_{side}", f"momentum_{side}"
            rows = TemperatureRows(*(xp.take(getattr(self, name), index, axis=0) for name in names))
            bounds = self._minimum, self._maximum
            gradient_rows = xp.astype(array, rows.temperature.dtype)
            moved = _move(rows, gradient_rows, 2 * batch_size, learning_rate, bounds, self._beta, xp)
            new |= zip(names, moved, strict=True)
        written = {name: scatter_rows(getattr(self, name), index, new[name], xp=xp) for name in _ROWS}
        return self if all(written[name] is getattr(self, name) for name in _ROWS) else self._with(written)

    def grow(self, num_samples: int, /) -> PerSampleTemperature:
        """Return one of `num_samples` >= n samples: the old rows first, the new ones where all of them started."""
        num_samples = _validate.integer("num_samples", num_samples, minimum=self.num_samples)
        more, old = num_samples - self.num_samples, self.temperature_image
        return self._with({
            name: self._xp.concat([getattr(self, name), self._fresh(name, more, old.dtype, device_of(old))])
            for name in _ROWS
        })  # fmt: skip

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the state by name, each (n,), and its ``version`` of shape ()."""
        return _with_version({name: getattr(self, name) for name in _ROWS}, self._xp)

    def load_state_dict(self, state: Mapping[str, Array], /) -> None:
        """Take over what `state_dict` returned; the bounds stay this one's, and hold from the next update on.

        Raises
        ------
        ValueError, TypeError
            If names, version, shapes, dtypes or values differ; nothing has been changed then.
        """
        loaded = _loaded(state, {name: getattr(self, name) for name in _ROWS}, self._xp)
        for name, array in loaded.items():
            setattr(self, name, array)

    def _fresh(self, name: str, count: int, dtype: Any, device: Any) -> Array:
        value = self._start if name.startswith("temperature") else 0.0
        return self._xp.full((count,), value, dtype=dtype, device=device)

    def _with(self, rows: Mapping[str, Array]) -> PerSampleTemperature:
        other = object.__new__(PerSampleTemperature)
        other.__dict__.update(self.__dict__ | dict(rows))
        return other


_ROWS = ("temperature_image", "temperature_text", "momentum_image", "momentum_text")


def _move(
    rows: TemperatureRows,
    slope: Array,
    factor: float,
    learning_rate: Scalar,
    bounds: tuple[float, float],
    beta: float,
    xp: Namespace,
) -> TemperatureRows:
    """Move rows by slopes that are `factor` times what is given; momenta too large for their dtype stop at its end."""
    old = rows.temperature
    limit = float(xp.finfo(old.dtype).max)
    momentum = xp.clip((1 - beta) * rows.momentum + (beta * factor) * slope, min=-limit, max=limit)
    return TemperatureRows(_project(old - _like(learning_rate, old, xp) * momentum, *bounds, xp), momentum)


def _project(temperature: Array, minimum: float, maximum: float, xp: Namespace) -> Array:
    """Return the nearest temperatures within the bounds; a nan stays one."""
    return xp.asarray(xp.clip(temperature, min=minimum, max=maximum))  # NumPy makes scalars of arrays without axes


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _like(value: Any, array: Array, xp: Namespace) -> Array:
    """Return a scalar as an array of a dtype, on its device."""
    if is_array(value):
        return xp.astype(value, array.dtype)
    return xp.asarray(value, dtype=array.dtype, device=device_of(array))


def _together(arrays: dict[str, Array], xp: Namespace | None) -> Namespace:
    """Check that arrays fit together and that the first, the state, is wide; return their namespace."""
    xp = namespace_of(arrays, xp)
    _validate.detached(arrays, xp)
    _validate.same_device(arrays, xp)
    name, state = next(iter(arrays.items()))
    _validate.state_dtype(name, state, xp)
    return xp


def _learning_rate(value: Any, like: Array, xp: Namespace) -> Any:
    checked = _validate.parameter("learning_rate", value, lambda x: x >= 0, "be >= 0", xp, dtype=like.dtype)
    return _validate.within(checked, lambda x: x >= 0, xp)


def _bounds(minimum: Any, maximum: Any, dtype: Any, xp: Namespace) -> tuple[float, float]:
    low = _validate.number("minimum", minimum, lambda x: x > 0, "be > 0", dtype=dtype, xp=xp)
    rule = f"be at least minimum ({low})"
    return low, _validate.number("maximum", maximum, lambda x: x >= low, rule, dtype=dtype, xp=xp)


def _start(temperature: Any, minimum: float, maximum: float) -> float:
    inside = f"be in [minimum, maximum] = [{minimum}, {maximum}]"
    return _validate.number("temperature", temperature, lambda x: minimum <= x <= maximum, inside)


def _with_version(state: Mapping[str, Array], xp: Namespace) -> dict[str, Array]:
    some = next(iter(state.values()))
    version = xp.asarray(VERSION, dtype=xp.int32, device=device_of(some))
    return {"version": version, **{name: xp.asarray(array, copy=True) for name, array in state.items()}}


def _loaded(state: Mapping[str, Array], mine: Mapping[str, Array], xp: Namespace) -> dict[str, Array]:
    """Check a saved state against the one it replaces and return copies of its arrays."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping, got {type(state).__name__}")
    if set(state) != {"version", *mine}:
        raise ValueError(f"state must hold version, {', '.join(mine)} and nothing else, got {list(state)}")
    namespace_of({"the temperature": next(iter(mine.values())), **state}, xp)
    _validate.detached(state, xp)
    _validate.same_device({"the temperature": next(iter(mine.values())), **state}, xp)
    _validate.shape("version", state["version"], (), "()")
    if int(state["version"]) != VERSION:
        raise ValueError(f"version must be {VERSION}, got {int(state['version'])}")
    for name, array in mine.items():
        _validate.shape(name, state[name], tuple(array.shape), "(num_samples,)" if array.ndim else "()")
        if state[name].dtype != array.dtype:
            raise TypeError(f"{name} must have dtype {array.dtype}, got {state[name].dtype}")
        if name.startswith("temperature"):
            _validate.values(name, state[name], lambda x: xp.isfinite(x) & (x > 0), "be finite and > 0", xp)
        elif name in ("step", "second_moment"):
            _validate.values(name, state[name], lambda x: x >= 0, "be >= 0", xp)
        else:
            _validate.finite(name, state[name], xp)
    return {name: xp.asarray(state[name], copy=True) for name in mine}
