"""The optimiser AdamW, written with the Array API; its state is a flat mapping from names to arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from drrho_core.backend import Parameters
from drrho_core.checks import BELOW_ONE, NOT_NEGATIVE, POSITIVE, Array, Namespace, device_of, number


class AdamW:
    """Adam with decoupled weight decay; see `drrho_core.backend.Optimizer`.

    With gradient g of parameter p at update k = 1, 2, ... and learning rate lr:

    1. ``m = beta1 m + (1 - beta1) g`` and ``v = beta2 v + (1 - beta2) g**2``; both start as zeros
    2. ``p = p (1 - lr weight_decay)``, only if p has two or more axes, so biases and the scales of norms do not decay
    3. ``p = p - lr * (m / (1 - beta1**k)) / (sqrt(v / (1 - beta2**k)) + epsilon)``

    The state holds k as ``step`` (int32) and m, v as ``first_moment/NAME``, ``second_moment/NAME``. Every backend uses
    these names, so that every backend can read the checkpoints of all backends.

    Parameters
    ----------
    xp : namespace
        The namespace of all arrays.
    weight_decay : float
        At least 0.
    beta1, beta2 : float
        Weights of the old values in the moments m and v, in [0, 1).
    epsilon : float
        Greater than 0.

    Raises
    ------
    ValueError
        If a number is out of its range.

    References
    ----------
    Loshchilov and Hutter, decoupled weight decay regularization, arXiv 1711.05101.

    Examples
    --------
    >>> import numpy as np
    >>> optimizer = AdamW(np, weight_decay=0.0)
    >>> parameters = {"bias": np.asarray([1.0, 1.0])}
    >>> state = optimizer.init(parameters)
    >>> parameters, state = optimizer.update(parameters, {"bias": np.asarray([0.5, -3.0])}, state, 0.1)
    >>> parameters["bias"].round(6), int(state["step"])
    (array([0.9, 1.1]), 1)
    """

    def __init__(
        self,
        xp: Namespace,
        *,
        weight_decay: float,
        beta1: float = 0.9,
        beta2: float = 0.98,
        epsilon: float = 1e-8,
    ) -> None:
        self.xp = xp
        self.weight_decay = number("weight_decay", weight_decay, NOT_NEGATIVE)
        self.beta1 = number("beta1", beta1, BELOW_ONE)
        self.beta2 = number("beta2", beta2, BELOW_ONE)
        self.epsilon = number("epsilon", epsilon, POSITIVE)

    def init(self, parameters: Parameters, /) -> dict[str, Array]:
        """Return the state before the first update."""
        xp = self.xp
        device = device_of(next(iter(parameters.values())))
        return {
            "step": xp.zeros((), dtype=xp.int32, device=device),
            **{f"first_moment/{name}": xp.zeros_like(parameter) for name, parameter in parameters.items()},
            **{f"second_moment/{name}": xp.zeros_like(parameter) for name, parameter in parameters.items()},
        }

    def update(
        self,
        parameters: Parameters,
        gradients: Parameters,
        state: Mapping[str, Array],
        learning_rate: Array | float,
        /,
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return new parameters and new state."""
        xp = self.xp
        # Arithmetic on a 0-d NumPy array gives a scalar, but checkpoints need arrays: hence asarray here and below.
        step = xp.asarray(state["step"] + 1)
        new_parameters = {}
        new_state = {"step": step}
        corrections: dict[Any, tuple[Array, Array]] = {}  # one pair per dtype, for all parameters of that dtype
        for name, p in parameters.items():
            # 1. Both moments: moving averages of the gradient and of its square.
            g = gradients[name]
            m = self.beta1 * state[f"first_moment/{name}"] + (1 - self.beta1) * g
            v = self.beta2 * state[f"second_moment/{name}"] + (1 - self.beta2) * g * g
            new_state[f"first_moment/{name}"], new_state[f"second_moment/{name}"] = xp.asarray(m), xp.asarray(v)
            # Averages that start from zeros are too small; dividing by 1 - beta^k corrects them.
            if p.dtype not in corrections:
                k = xp.astype(step, p.dtype)
                corrections[p.dtype] = _one_minus_power(self.beta1, k, xp), _one_minus_power(self.beta2, k, xp)
            m_hat, v_hat = m / corrections[p.dtype][0], v / corrections[p.dtype][1]
            # 2. Decoupled weight decay.
            if p.ndim >= 2:
                p = p * (1 - learning_rate * self.weight_decay)
            # 3. The step of Adam.
            new_parameters[name] = xp.asarray(p - learning_rate * m_hat / (xp.sqrt(v_hat) + self.epsilon))
        return new_parameters, new_state


def _one_minus_power(beta: float, k: Array, xp: Namespace) -> Array:
    """Return ``1 - beta**k``; computed as written, the difference would lose three digits in float32 at k = 1."""
    return -xp.expm1(k * (math.log(beta) if beta > 0 else -math.inf))
