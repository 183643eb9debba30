"""The n-sized state of SogCLR and the rules that choose gamma, the weight of a new estimate.

The state is one logarithm per sample and direction, ``log_inner`` (n,), float32 or wider, ``-inf`` = never visited.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from drrho_core import _validate
from drrho_core._array_api import (
    Array,
    Namespace,
    device_of,
    is_array,
    namespace_of,
    supports_index_assignment,
    values_visible,
)


class InnerEstimator:
    """Both directions' logarithmic inner estimates of a data set of n samples.

    Parameters
    ----------
    num_samples : int
        n >= 1, the number of samples in the data set.
    like : array
        Any array of the library and on the device where the state is to live.
    dtype : dtype, optional
        float32 (default, when `like` is a half type too) or wider; a floating `like` lends its own where it is wider.

    Attributes
    ----------
    log_inner_image, log_inner_text : array, shape (n,)
        The state; ``-inf`` = never visited.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.

    Notes
    -----
    u_i of SogCLR (arXiv 2202.12387) as log u_i. Shapes: `index` (b,), integers in [0, n), no repeats.

    Examples
    --------
    >>> import numpy as np
    >>> estimator = InnerEstimator(4, like=np.zeros(1))
    >>> estimator = estimator.scatter(np.asarray([2, 0]), np.asarray([0.5, 1.5]), np.asarray([0.0, 1.0]))
    >>> estimator.log_inner_image.tolist()
    [1.5, -inf, 0.5, -inf]
    >>> [side.tolist() for side in estimator.gather(np.asarray([0, 1]))]
    [[1.5, -inf], [1.0, -inf]]
    """

    def __init__(self, num_samples: int, *, like: Array, dtype: Any = None) -> None:
        xp = namespace_of({"like": like})
        num_samples = _validate.integer("num_samples", num_samples, minimum=1)
        dtype = storage_dtype(like, dtype, xp)
        self._xp = xp
        self.log_inner_image = xp.full((num_samples,), -xp.inf, dtype=dtype, device=device_of(like))
        self.log_inner_text = xp.full((num_samples,), -xp.inf, dtype=dtype, device=device_of(like))

    def __getstate__(self) -> dict[str, Array]:
        """Leave the namespace out of copies: a module cannot be copied or pickled."""
        return {name: value for name, value in vars(self).items() if name != "_xp"}

    def __setstate__(self, state: dict[str, Array]) -> None:
        """Ask the arrays for their namespace again."""
        vars(self).update(state, _xp=namespace_of(state))

    def __repr__(self) -> str:
        """Show what it holds."""
        return f"InnerEstimator(num_samples={self.num_samples}, dtype={self.log_inner_image.dtype})"

    @property
    def num_samples(self) -> int:
        """Number of samples n."""
        return int(self.log_inner_image.shape[0])

    def gather(self, index: Array, /) -> tuple[Array, Array]:
        """Return the rows of a batch.

        Parameters
        ----------
        index : array of integers, shape (b,)
            `sample_index` of the batch: in [0, n), no repeats.

        Returns
        -------
        tuple of arrays, shape (b,)
            Copies of the image anchors' and the text anchors' rows.

        Raises
        ------
        TypeError, ValueError
            If `index` is no such array. Values are looked at on the host and outside tracing.
        """
        index = self._checked(index)
        take = self._xp.take
        return take(self.log_inner_image, index, axis=0), take(self.log_inner_text, index, axis=0)

    def scatter(self, index: Array, log_inner_image: Array, log_inner_text: Array, /) -> InnerEstimator:
        """Write the rows of a batch and return the estimator to use from now on.

        Parameters
        ----------
        index : array of integers, shape (b,)
            `sample_index` of the batch: in [0, n), no repeats (duplicates mean different things per library).
        log_inner_image, log_inner_text : array, shape (b,)
            Updated rows, in the state's dtype.

        Returns
        -------
        InnerEstimator
            This one, updated in place, where the library's arrays can be written to; else a new one.

        Raises
        ------
        TypeError, ValueError
            If an argument breaks these rules; nothing has been written then.
        """
        index, xp = self._checked(index), self._xp
        check_rows(log_inner_image, log_inner_text, size=index.shape[0], like=self.log_inner_image, xp=xp)
        return self._with(
            scatter_rows(self.log_inner_image, index, log_inner_image, xp=xp),
            scatter_rows(self.log_inner_text, index, log_inner_text, xp=xp),
        )

    def grow(self, num_samples: int, /) -> InnerEstimator:
        """Return an estimator of `num_samples` >= n samples: the old rows first, the new ones never visited."""
        num_samples = _validate.integer("num_samples", num_samples, minimum=self.num_samples)
        xp, old = self._xp, self.log_inner_image
        fresh = xp.full((num_samples - self.num_samples,), -xp.inf, dtype=old.dtype, device=device_of(old))
        return self._with(xp.concat([old, fresh]), xp.concat([self.log_inner_text, fresh]))

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the state by name: ``log_inner_image`` and ``log_inner_text``, each (n,)."""
        return {
            "log_inner_image": self._xp.asarray(self.log_inner_image, copy=True),
            "log_inner_text": self._xp.asarray(self.log_inner_text, copy=True),
        }

    def load_state_dict(self, state: Mapping[str, Array], /) -> None:
        """Take over what `state_dict` returned.

        Parameters
        ----------
        state : mapping
            ``log_inner_image`` and ``log_inner_text``, arrays (n,) of this library, device and dtype.

        Raises
        ------
        ValueError, TypeError
            If names, shapes, dtypes or values differ; nothing has been changed then.
        """
        names = ("log_inner_image", "log_inner_text")
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, got {type(state).__name__}")
        if set(state) != set(names):
            raise ValueError(f"state must hold {' and '.join(names)} and nothing else, got {list(state)}")
        xp = namespace_of({"the estimator": self.log_inner_image, **{name: state[name] for name in names}}, self._xp)
        _validate.detached(state, xp)
        _validate.same_device({"the estimator": self.log_inner_image, **{name: state[name] for name in names}}, xp)
        for name in names:
            _validate.shape(name, state[name], (self.num_samples,), "(num_samples,)")
            if state[name].dtype != self.log_inner_image.dtype:
                raise TypeError(f"{name} must have dtype {self.log_inner_image.dtype}, got {state[name].dtype}")
            _validate.values(name, state[name], lambda x: x < xp.inf, "be finite, or -inf for never visited", xp)
        self.log_inner_image = xp.asarray(state["log_inner_image"], copy=True)
        self.log_inner_text = xp.asarray(state["log_inner_text"], copy=True)

    def _with(self, log_inner_image: Array, log_inner_text: Array) -> InnerEstimator:
        """Return self where both arrays are the ones it holds, else a new estimator around them."""
        if log_inner_image is self.log_inner_image and log_inner_text is self.log_inner_text:
            return self
        other = object.__new__(type(self))
        other._xp, other.log_inner_image, other.log_inner_text = self._xp, log_inner_image, log_inner_text
        return other

    def _checked(self, index: Array) -> Array:
        return check_index(index, self.num_samples, like=self.log_inner_image, xp=self._xp)


def storage_dtype(like: Array, dtype: Any, xp: Namespace) -> Any:
    """Return the dtype that state is kept in: what was asked for, else that of `like`, float32 at least."""
    if dtype is None:
        wide = xp.isdtype(like.dtype, "real floating") and xp.finfo(like.dtype).bits > 32
        return like.dtype if wide else xp.float32
    if not xp.isdtype(dtype, "real floating") or xp.finfo(dtype).bits < 32:
        raise TypeError(f"dtype must be float32 or wider, got {dtype}")
    return dtype


def check_index(index: Array, num_samples: int, /, *, like: Array, xp: Namespace) -> Array:
    """Check a batch's `sample_index`: integers (b,) in [0, num_samples), no repeats, where `like` lives.

    Returns
    -------
    array of int32 or int64, shape (b,)
        The index in a dtype that every library can index with and that can count any sample.

    Raises
    ------
    TypeError, ValueError
        If not. Values are looked at on the host and outside tracing.
    """
    xp = namespace_of({"sample_index": index, "the state": like}, xp)
    if index.ndim != 1:
        raise ValueError(
            f"sample_index must have shape (batch_size,), one row id per sample of the batch, got {tuple(index.shape)}"
        )
    if not xp.isdtype(index.dtype, "integral"):
        raise TypeError(f"sample_index must have an integer dtype, got {index.dtype}")
    _validate.same_device({"the state": like, "sample_index": index}, xp)
    if index.dtype not in (xp.int32, xp.int64):
        index = xp.astype(index, xp.__array_namespace_info__().default_dtypes()["indexing"])
    rule = f"hold row ids from 0 to {num_samples - 1} (see docs/large-data.md, 'How to number your samples')"
    _validate.values("sample_index", index, lambda i: (i >= 0) & (i < num_samples), rule, xp)
    if values_visible(index, xp) and index.shape[0] > 1:
        ordered = xp.sort(index)
        repeated = ordered[1:] == ordered[:-1]
        if bool(xp.any(repeated)):
            first = int(ordered[int(xp.argmax(xp.astype(repeated, xp.int8)))])
            raise ValueError(f"sample_index must not repeat an index within a batch, got {first} twice")
    return index


def check_rows(log_inner_image: Array, log_inner_text: Array, /, *, size: int, like: Array, xp: Namespace) -> None:
    """Check a batch's updated rows: (size,) each, of the dtype, library and device of `like`, finite or -inf.

    Raises
    ------
    TypeError, ValueError
        If not. Values are looked at on the host and outside tracing.
    """
    for name, rows in (("log_inner_image", log_inner_image), ("log_inner_text", log_inner_text)):
        namespace_of({"the state": like, name: rows}, xp)
        _validate.detached({name: rows}, xp)
        _validate.same_device({"the state": like, name: rows}, xp)
        _validate.shape(name, rows, (size,), "(batch_size,)")
        if rows.dtype != like.dtype:
            raise TypeError(f"{name} must have the state's dtype {like.dtype}, got {rows.dtype}")
        _validate.values(name, rows, lambda x: x < xp.inf, "be finite, or -inf for never visited", xp)


def scatter_rows(state: Array, index: Array, rows: Array, /, *, xp: Namespace) -> Array:
    """Return `state` (n,) with ``state[index] = rows``: the same array where it can be written to, else a new one.

    The standard has no assignment by integer arrays. Where the library has none either, every sample looks itself up in
    the sorted batch: O((n + b) log b), in the standard's operations.
    """
    if supports_index_assignment(state, xp):
        state[index] = rows
        return state
    if hasattr(state, "at"):
        return state.at[index].set(rows)
    if index.shape[0] == 0:
        return state
    order = xp.argsort(index)
    ordered = xp.take(index, order, axis=0)
    samples = xp.arange(state.shape[0], dtype=index.dtype, device=device_of(state))
    place = xp.clip(xp.searchsorted(ordered, samples), max=index.shape[0] - 1)
    hit = xp.take(ordered, place, axis=0) == samples
    return xp.where(hit, xp.take(xp.take(rows, order, axis=0), place, axis=0), state)


def cosine_gamma(epoch: float, /, *, num_epochs: float, gamma_min: float) -> float:
    """Return FastCLIP's cosine schedule of gamma: 1 at the start, `gamma_min` from `num_epochs` on.

    Parameters
    ----------
    epoch : float
        Epochs done, >= 0; fractions are welcome.
    num_epochs : float
        E > 0, where the minimum is reached.
    gamma_min : float
        The last value, in (0, 1].

    Returns
    -------
    float
        ``gamma_min + (1 - gamma_min) (1 + cos(pi min(epoch, E) / E)) / 2``, in [gamma_min, 1].

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.

    Notes
    -----
    Cosine schedule of the inner learning rate, FastCLIP (arXiv 2407.01445).

    Examples
    --------
    >>> [round(cosine_gamma(epoch, num_epochs=4, gamma_min=0.2), 3) for epoch in (0, 1, 2, 4, 9)]
    [1.0, 0.883, 0.6, 0.2, 0.2]
    """
    epoch = _validate.static_number("epoch", epoch, lambda x: x >= 0, "be >= 0")
    num_epochs = _validate.static_number("num_epochs", num_epochs, lambda x: x > 0, "be > 0")
    gamma_min = _validate.static_number("gamma_min", gamma_min, lambda x: 0 < x <= 1, "be in (0, 1]")
    done = min(epoch, num_epochs) / num_epochs
    return gamma_min + (1.0 - gamma_min) * (1.0 + math.cos(math.pi * done)) / 2.0


def recommended_gamma_min(num_epochs: float, /) -> float:
    """Return the rule of the DRRho-CLIP code for the last gamma: ``min(1, 4.177 E^-0.7265)``.

    Parameters
    ----------
    num_epochs : float
        E > 0, the number of epochs of the run.

    Raises
    ------
    TypeError, ValueError
        If `num_epochs` is not such a number.

    Notes
    -----
    From the code released with DRRho-CLIP (arXiv 2505.06699): up to seven epochs it asks for no memory at all.

    Examples
    --------
    >>> recommended_gamma_min(7), round(recommended_gamma_min(30), 3)
    (1.0, 0.353)
    """
    num_epochs = _validate.static_number("num_epochs", num_epochs, lambda x: x > 0, "be > 0")
    return min(1.0, 4.177 * math.pow(num_epochs, -0.7265))


def scent_gamma(
    log_inner: Array,
    /,
    *,
    log_alpha: float | Array,
    gamma_floor: float | Array = 1e-3,
    xp: Namespace | None = None,
) -> Array:
    """Return SCENT's gamma, one per sample: ``max(gamma_floor, sigmoid(log_alpha + log_inner))``.

    Parameters
    ----------
    log_inner : array, shape (b,)
        The OLD logarithmic inner estimates; ``-inf`` = never visited, where gamma is 1.
    log_alpha : float or array of shape ()
        Logarithm of the step size alpha; about 10 for CLIP.
    gamma_floor : float or array of shape ()
        Smallest gamma, in (0, 1]; without one an estimate far too small would give weights without bound.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    array, shape (b,)
        gamma in [gamma_floor, 1], in the dtype of `log_inner`.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.

    Notes
    -----
    SCENT (arXiv 2602.02877): the proximal step in nu = log u under the Bregman divergence of exp(-nu) is the moving
    average of u with this gamma.

    Examples
    --------
    >>> import numpy as np
    >>> np.round(scent_gamma(np.asarray([-np.inf, -10.0, 0.0, -20.0]), log_alpha=10.0), 4).tolist()
    [1.0, 0.5, 1.0, 0.001]
    """
    arrays = {"log_inner": log_inner, "log_alpha": log_alpha, "gamma_floor": gamma_floor}
    arrays = {name: value for name, value in arrays.items() if name == "log_inner" or is_array(value)}
    xp = namespace_of(arrays, xp)
    _validate.detached(arrays, xp)
    _validate.same_device(arrays, xp)
    _validate.state_dtype("log_inner", log_inner, xp)
    _validate.values("log_inner", log_inner, lambda x: x < xp.inf, "be finite, or -inf for never visited", xp)
    dtype = log_inner.dtype
    log_alpha = _scalar("log_alpha", log_alpha, lambda _: True, "be finite", dtype, xp)
    gamma_floor = _scalar("gamma_floor", gamma_floor, lambda x: (x > 0) & (x <= 1), "be in (0, 1]", dtype, xp)
    unseen = (log_inner == -xp.inf) & (gamma_floor == gamma_floor)  # not where it is nan
    # Halves, because the sum may be too large; beyond 2000 its exponential is 0 or infinite in every dtype.
    half = 0.5 * log_alpha + 0.5 * xp.where(unseen, xp.zeros_like(log_inner), log_inner)
    x = 2.0 * xp.clip(half, min=-1e3, max=1e3)
    # The exponential of -|x| never overflows, whichever side of 0 x is on.
    small = xp.exp(-xp.abs(x))
    sigmoid = xp.where(x >= 0, xp.ones_like(small), small) / (1.0 + small)
    return xp.where(unseen, xp.ones_like(sigmoid), xp.maximum(sigmoid, gamma_floor + xp.zeros_like(sigmoid)))


def _scalar(name: str, value: Any, holds: Callable[[Any], Any], rule: str, dtype: Any, xp: Namespace) -> Any:
    """Check a parameter and give an array the dtype; numbers stay numbers, which promote nothing."""
    value = _validate.within(_validate.parameter(name, value, holds, rule, xp, dtype=dtype), holds, xp)
    return value if isinstance(value, float) else xp.astype(value, dtype)
