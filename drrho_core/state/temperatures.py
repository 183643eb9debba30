"""Temperatures of a training run behind one interface: fixed, learned for all anchors, or learned per sample.

`Temperature` is the interface. A training loop asks `for_batch` before a step and `after_batch` once the step has
returned the temperature's gradient, and need not know which of the three it holds; `make_temperature` builds one by
name. The mathematics of the updates is in `drrho_core.state.temperature_updates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, Scalar, device_of, namespace_of
from drrho_core._validate import BELOW_ONE, FINITE, FINITE_POSITIVE, NOT_NEGATIVE, POSITIVE, UNIT_INTERVAL, Rule
from drrho_core.state.table import ArrayTable, Column, check_saved, checked_index, storage_dtype
from drrho_core.state.temperature_updates import (
    GlobalTemperatureState,
    TemperatureRows,
    check_bounds,
    move,
    update_global_temperature,
)

VERSION = 1
"""Version of the mapping that `state_dict` returns."""


class Temperature(Protocol):
    """The temperature of a training run."""

    @property
    def learned(self) -> bool:
        """Whether steps change the temperature."""
        ...

    def for_batch(self, index: Array, /) -> Any:
        """Return the `temperature` argument of `contrastive_step` for a batch with this `sample_index`."""
        ...

    def after_batch(self, index: Array, gradient: Any, /, *, learning_rate: Scalar) -> Temperature:
        """Return the temperature to use after a step that returned this ``temperature_gradient``."""
        ...

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the state by name; a fixed temperature has none."""
        ...

    def load_state_dict(self, state: Mapping[str, Array], /) -> None:
        """Replace the state by one that `state_dict` returned."""
        ...


class FixedTemperature:
    """A temperature that no step changes.

    Parameters
    ----------
    temperature : float
        tau > 0.

    Raises
    ------
    TypeError, ValueError
        If the temperature is no such number.

    Examples
    --------
    >>> FixedTemperature(0.07).for_batch(None)
    0.07
    """

    learned = False

    def __init__(self, temperature: float) -> None:
        self.temperature = _validate.number("temperature", temperature, POSITIVE)

    def for_batch(self, index: Array, /) -> float:  # noqa: ARG002 (the interface's)
        """Return the temperature, whatever the batch."""
        return self.temperature

    def after_batch(self, index: Array, gradient: Any, /, *, learning_rate: Scalar) -> Self:  # noqa: ARG002
        """Return this temperature."""
        return self

    def state_dict(self) -> dict[str, Array]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Array], /) -> None:
        """Check that a state is empty."""
        if state:
            raise ValueError(f"state must be empty for a fixed temperature, got {list(state)}")


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

    learned = True

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
        self._minimum, self._maximum = check_bounds(minimum, maximum, dtype, xp)
        start = _check_start(temperature, self._minimum, self._maximum)
        self._slow_below = (
            None if slow_below is None else _validate.number("slow_below", slow_below, POSITIVE, dtype=dtype, xp=xp)
        )
        self._betas = (_validate.number("beta1", beta1, BELOW_ONE), _validate.number("beta2", beta2, BELOW_ONE))
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
        """Show bounds and dtype."""
        return (
            f"GlobalTemperature(minimum={self._minimum}, maximum={self._maximum}, slow_below={self._slow_below}, "
            f"dtype={self.temperature.dtype})"
        )

    @property
    def temperature(self) -> Array:
        """The current temperature, of shape ()."""
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

    def for_batch(self, index: Array, /) -> Array:  # noqa: ARG002 (the interface's)
        """Return the temperature, whatever the batch."""
        return self.temperature

    def after_batch(
        self,
        index: Array,  # noqa: ARG002 (the interface's)
        gradient: Scalar,
        /,
        *,
        learning_rate: Scalar,
    ) -> GlobalTemperature:
        """Return the temperature after one step, as `update` does; a global temperature needs no index."""
        return self.update(gradient, learning_rate=learning_rate)

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the state by name, each of shape (), and its ``version``."""
        return _with_version(self.state._asdict(), self._xp)

    def load_state_dict(self, state: Mapping[str, Array], /) -> None:
        """Replace the state by one that `state_dict` returned. The bounds stay, and hold from the next update on.

        Raises
        ------
        ValueError, TypeError
            If names, version, shapes, dtypes or values differ; nothing has been changed then.
        """
        xp = self._xp
        saved = check_saved(state, self.state._asdict(), GLOBAL_RULES, owner=OWNER, version=VERSION, xp=xp)
        self.state = GlobalTemperatureState(**{name: xp.asarray(array, copy=True) for name, array in saved.items()})


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

    learned = True

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
        self._minimum, self._maximum = check_bounds(minimum, maximum, storage_dtype(like, dtype, xp), xp)
        self._beta = _validate.number("beta", beta, UNIT_INTERVAL)
        start = _check_start(temperature, self._minimum, self._maximum)
        columns = (
            Column("temperature_image", start, FINITE_POSITIVE),
            Column("temperature_text", start, FINITE_POSITIVE),
            Column("momentum_image", 0.0, FINITE),
            Column("momentum_text", 0.0, FINITE),
        )
        self.table = ArrayTable(columns, num_samples, like=like, dtype=dtype, owner=OWNER)

    def __repr__(self) -> str:
        """Show size, bounds and dtype."""
        return (
            f"PerSampleTemperature(num_samples={self.num_samples}, minimum={self._minimum}, maximum={self._maximum}, "
            f"beta={self._beta}, dtype={self.temperature_image.dtype})"
        )

    @property
    def num_samples(self) -> int:
        """Number of samples n."""
        return self.table.num_samples

    @property
    def temperature_image(self) -> Array:
        """The temperatures of the image anchors, (n,)."""
        return self.table.arrays()["temperature_image"]

    @property
    def temperature_text(self) -> Array:
        """The temperatures of the text anchors, (n,)."""
        return self.table.arrays()["temperature_text"]

    @property
    def momentum_image(self) -> Array:
        """The moving averages of the image anchors' slopes, (n,)."""
        return self.table.arrays()["momentum_image"]

    @property
    def momentum_text(self) -> Array:
        """The moving averages of the text anchors' slopes, (n,)."""
        return self.table.arrays()["momentum_text"]

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
        image, text, *_ = self.table.gather(index)
        return image, text

    def for_batch(self, index: Array, /) -> tuple[Array, Array]:
        """Return the temperatures of a batch, as `gather` does."""
        return self.gather(index)

    def after_batch(
        self, index: Array, gradient: tuple[Array, Array], /, *, learning_rate: Scalar
    ) -> PerSampleTemperature:
        """Return the temperatures after one step, as `update` does."""
        return self.update(index, gradient, learning_rate=learning_rate)

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
        table, xp = self.table, self.table.xp
        if not isinstance(gradient, (tuple, list)) or len(gradient) != 2:
            table.checked(index)
            raise TypeError(f"gradient must be a pair (image, text) of arrays, got {_validate.describe(gradient)}")
        given = {"the state": table.index_like, "sample_index": index}
        given |= {f"gradient[{side}]": array for side, array in enumerate(gradient)}
        call = _validate.arrays(given, xp, options={"learning_rate": learning_rate})
        index = checked_index(call, self.num_samples)
        batch_size, dtype = int(index.shape[0]), table.index_like.dtype
        slopes = [
            xp.astype(call.array(f"gradient[{side}]", shape=(batch_size,), meaning="(batch_size,)", rule=FINITE), dtype)
            for side in (0, 1)
        ]
        rate = call.option("learning_rate", learning_rate, NOT_NEGATIVE, dtype)
        # A slope is 2b times the gradient: the mean over all 2b anchors is taken out again.
        bounds, rows = (self._minimum, self._maximum), table.read(index)
        image = move(TemperatureRows(rows[0], rows[2]), slopes[0], 2 * batch_size, rate, bounds, self._beta, xp)
        text = move(TemperatureRows(rows[1], rows[3]), slopes[1], 2 * batch_size, rate, bounds, self._beta, xp)
        moved = (image.temperature, text.temperature, image.momentum, text.momentum)
        names = [column.name for column in table.columns]
        return self._around(table.write(index, dict(zip(names, moved, strict=True))))

    def grow(self, num_samples: int, /) -> PerSampleTemperature:
        """Return temperatures of `num_samples` >= n samples: the old rows first, then rows with the first value."""
        return self._around(self.table.grow(num_samples))

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the state by name, each (n,), and its ``version`` of shape ()."""
        return _with_version(self.table.arrays(), self.table.xp)

    def load_state_dict(self, state: Mapping[str, Array], /) -> None:
        """Replace the state by one that `state_dict` returned. The bounds stay, and hold from the next update on.

        Raises
        ------
        ValueError, TypeError
            If names, version, shapes, dtypes or values differ; nothing has been changed then.
        """
        table = self.table
        table.replace(check_saved(state, table.arrays(), table.rules(), owner=OWNER, version=VERSION, xp=table.xp))

    def _around(self, table: ArrayTable) -> PerSampleTemperature:
        """Return self if the table is the one it holds, else new temperatures around it."""
        if table is self.table:
            return self
        other = object.__new__(PerSampleTemperature)
        vars(other).update(vars(self), table=table)
        return other


def make_temperature(
    scheme: str, temperature: float, /, *, num_samples: int, like: Array, minimum: float = 0.01, maximum: float = 1.0
) -> Temperature:
    """Build the temperature of a training run by the name of its scheme.

    Parameters
    ----------
    scheme : str
        One of `SCHEMES`: ``"fixed"``, ``"global"`` or ``"per_sample"``.
    temperature : float
        The first value.
    num_samples, like, minimum, maximum
        As in `PerSampleTemperature`; a fixed temperature needs none of them.

    Raises
    ------
    TypeError, ValueError
        If there is no such scheme, or a parameter breaks the rules of the scheme.

    Examples
    --------
    >>> import numpy as np
    >>> make_temperature("global", 0.07, num_samples=10, like=np.zeros(1)).learned
    True
    """
    if scheme == "fixed":
        return FixedTemperature(temperature)
    if scheme == "global":
        return GlobalTemperature(temperature, like=like, minimum=minimum, maximum=maximum)
    if scheme == "per_sample":
        return PerSampleTemperature(num_samples, temperature, like=like, minimum=minimum, maximum=maximum)
    raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")


SCHEMES = ("fixed", "global", "per_sample")
"""The schemes by the names that a training run's settings use."""

OWNER = "the temperature"
"""The name of a temperature's state in messages."""

GLOBAL_RULES = {
    "temperature": FINITE_POSITIVE,
    "first_moment": FINITE,
    "second_moment": NOT_NEGATIVE,
    "step": NOT_NEGATIVE,
}
"""The rules of a saved global temperature."""


def _check_start(temperature: Any, minimum: float, maximum: float) -> float:
    """Check that the first temperature lies within the bounds."""
    words = f"be in [minimum, maximum] = [{minimum}, {maximum}]"
    return _validate.number("temperature", temperature, Rule(words, minimum, maximum, True, True))


def _with_version(state: Mapping[str, Array], xp: Namespace) -> dict[str, Array]:
    """Return copies of the state, and the version, on the device of the state."""
    device = device_of(next(iter(state.values())))
    version = xp.asarray(VERSION, dtype=xp.int32, device=device)
    return {"version": version, **{name: xp.asarray(array, copy=True) for name, array in state.items()}}
