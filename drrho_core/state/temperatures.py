"""Temperatures of a training run behind one interface: fixed, learned for all anchors, or learned per sample.

`Temperature` is the interface. A training loop calls `for_batch` before a step. The step returns the gradient of the
temperature, and the loop passes this gradient to `after_batch`. So the loop is the same for all three kinds of
temperature. `make_temperature` builds a temperature by the name of its kind. The formulas of the updates are in
`drrho_core.state.temperature_updates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

from drrho_core import _validate
from drrho_core._array_api import Array, Scalar, device_of, namespace_of
from drrho_core._validate import BELOW_ONE, FINITE, FINITE_POSITIVE, NOT_NEGATIVE, POSITIVE
from drrho_core.contrastive.ranks import Ranks
from drrho_core.state.sample_temperatures import PerSampleTemperature
from drrho_core.state.table import check_saved, storage_dtype, with_version
from drrho_core.state.temperature_updates import (
    OWNER,
    VERSION,
    GlobalTemperatureState,
    check_bounds,
    check_start,
    update_global_temperature,
)


class Temperature(Protocol):
    """The temperature of a training run."""

    @property
    def learned(self) -> bool:
        """Return True if steps change the temperature."""
        ...

    def for_batch(self, index: Array, /) -> Any:
        """Return the `temperature` argument of `contrastive_step` for a batch with this `sample_index`."""
        ...

    def after_batch(self, index: Array, gradient: Any, /, *, learning_rate: Scalar) -> Temperature:
        """Return the temperature to use after a step that returned this ``temperature_gradient``."""
        ...

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the state by name; a fixed temperature has no state."""
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
        If the temperature is no number above 0.

    Examples
    --------
    >>> FixedTemperature(0.07).for_batch(None)
    0.07
    """

    learned = False

    def __init__(self, temperature: float) -> None:
        self.temperature = _validate.number("temperature", temperature, POSITIVE)

    def for_batch(self, index: Array, /) -> float:  # noqa: ARG002 (the interface requires it)
        """Return the temperature, which is the same for every batch."""
        return self.temperature

    def after_batch(self, index: Array, gradient: Any, /, *, learning_rate: Scalar) -> Self:  # noqa: ARG002
        """Return this temperature."""
        return self

    def state_dict(self) -> dict[str, Array]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Array], /) -> None:
        """Check that a state is empty."""
        # A state with entries comes from a run with a learned temperature; loading it here is probably a mistake.
        if state:
            raise ValueError(f"state must be empty for a fixed temperature, got {list(state)}")


class GlobalTemperature:
    """One learned temperature for all anchors (RGCL-g), with its bounds and the state of Adam, its optimiser.

    Parameters
    ----------
    temperature : float
        The first tau, within the bounds.
    like : array
        Any array of the library that the state is to use, on the device that is to store the state.
    minimum, maximum : float
        Bounds, 0 < minimum <= maximum; the defaults are those that CLIP and FastCLIP use.
    slow_below : float, optional
        While tau is at or below this number, a third of the learning rate is used; FastCLIP v3 uses 0.03. None: never.
    beta1, beta2 : float
        Weights of the old averages in Adam's moving averages, in [0, 1).
    dtype : dtype, optional
        float32 or wider. Default: the dtype of `like` if this is a floating dtype wider than float32, else float32.

    Attributes
    ----------
    state : GlobalTemperatureState
        The temperature and the state of Adam, a pytree for JAX. In a compiled training step pass this state to
        `update_global_temperature`.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.

    Notes
    -----
    See `update_global_temperature`. If the temperature is fixed, your own loop can pass the number to
    `contrastive_step`; `FixedTemperature` is for loops that use the interface `Temperature`.

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
        # The bounds are checked in the dtype of the state, which differs from that of `like` if `like` has a half type.
        xp = namespace_of({"like": like})
        dtype = storage_dtype(like, dtype, xp)
        self._minimum, self._maximum = check_bounds(minimum, maximum, dtype, xp)
        start = check_start(temperature, self._minimum, self._maximum)
        self._slow_below = (
            None if slow_below is None else _validate.number("slow_below", slow_below, POSITIVE, dtype=dtype, xp=xp)
        )
        self._betas = (_validate.number("beta1", beta1, BELOW_ONE), _validate.number("beta2", beta2, BELOW_ONE))
        self._xp = xp
        # Adam starts with moments of 0 after 0 steps. All four numbers are stored on the device.
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
        """Return a new object with the temperature after one step of Adam; this object does not change.

        Parameters
        ----------
        gradient : float or array of shape ()
            ``temperature_gradient`` of the loss.
        learning_rate : float or array of shape ()
            Number >= 0.

        Raises
        ------
        TypeError, ValueError
            If an argument breaks these rules.
        """
        # The copy is made without the constructor, because all its numbers have been checked already.
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

    def for_batch(self, index: Array, /) -> Array:  # noqa: ARG002 (the interface requires it)
        """Return the temperature, which is the same for every batch."""
        return self.temperature

    def after_batch(
        self,
        index: Array,  # noqa: ARG002 (the interface requires it)
        gradient: Scalar,
        /,
        *,
        learning_rate: Scalar,
    ) -> GlobalTemperature:
        """Return the temperature after one step, as `update` does; a global temperature needs no index."""
        return self.update(gradient, learning_rate=learning_rate)

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the state by name, each of shape (), and its ``version``."""
        return with_version(self.state._asdict(), VERSION, self._xp)

    def load_state_dict(self, state: Mapping[str, Array], /) -> None:
        """Replace the state by one that `state_dict` returned; the bounds of this object apply to the next update.

        Raises
        ------
        ValueError, TypeError
            If names, version, shapes, dtypes or values do not fit this object; then nothing has been changed.
        """
        # Every array is checked before the first one is replaced.
        xp = self._xp
        saved = check_saved(state, self.state._asdict(), GLOBAL_RULES, owner=OWNER, version=VERSION, xp=xp)
        self.state = GlobalTemperatureState(**{name: xp.asarray(array, copy=True) for name, array in saved.items()})


def make_temperature(
    scheme: str,
    temperature: float,
    /,
    *,
    num_samples: int,
    like: Array,
    minimum: float = 0.01,
    maximum: float = 1.0,
    slow_below: float | None = None,
    ranks: Ranks | None = None,
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
    slow_below : float, optional
        As in `GlobalTemperature`; the other schemes ignore this number.
    ranks : Ranks, optional
        As in `PerSampleTemperature`; the other schemes have nothing to divide.

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
    # Only a temperature per sample needs the size of the data set; the other two schemes do not.
    if scheme == "fixed":
        return FixedTemperature(temperature)
    if scheme == "global":
        return GlobalTemperature(temperature, like=like, minimum=minimum, maximum=maximum, slow_below=slow_below)
    if scheme == "per_sample":
        return PerSampleTemperature(num_samples, temperature, like=like, minimum=minimum, maximum=maximum, ranks=ranks)
    raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")


SCHEMES = ("fixed", "global", "per_sample")
"""The names of the schemes in the settings of a training run."""

GLOBAL_RULES = {
    "temperature": FINITE_POSITIVE,
    "first_moment": FINITE,
    "second_moment": NOT_NEGATIVE,
    "step": NOT_NEGATIVE,
}
"""The rules that the numbers of a saved global temperature have to obey."""
