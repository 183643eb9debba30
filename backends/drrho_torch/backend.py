"""PyTorch behind the contract of `drrho_core.backend`."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch
import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from drrho_clip.models import MLPModel, ModelSpec
from drrho_clip.optimizer import AdamW
from drrho_core._array_api import Namespace
from drrho_core.backend import Function, Model, Parameters
from drrho_torch.models import ConvModel


class TorchBackend:
    """PyTorch on one device; see `drrho_core.backend.Backend`.

    Parameters
    ----------
    device : str, optional
        Such as ``"cpu"`` or ``"cuda:0"``; torch's default device when left out.
    dtype : {"float32", "float64"}
        What floating arrays become.

    Raises
    ------
    ValueError
        If torch has no such device here, or the dtype is another one.

    Examples
    --------
    >>> backend = TorchBackend("cpu")
    >>> backend.asarray([0.5, 1.5])
    tensor([0.5000, 1.5000])
    """

    name = "torch"
    architectures: tuple[str, ...] = ("conv", "mlp")
    preference = 2
    xp: Namespace = array_api_compat.torch

    def __init__(self, device: str | None = None, dtype: str = "float32") -> None:
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}")
        self._dtype: torch.dtype = getattr(torch, dtype)
        try:
            self._device = torch.empty(0, device=device, dtype=self._dtype).device
        except (RuntimeError, AssertionError, TypeError) as error:  # bad words, no such device, no such dtype there
            reason = str(error).partition("\n")[0]
            raise ValueError(f"device must be 'cpu' or another that torch has, got {device!r}: {reason}") from error
        self.device = str(self._device)
        self.has_gpu = self._device.type not in ("cpu", "meta")
        self.dtype = dtype

    def asarray(self, array: Any, /) -> Tensor:
        """Copy a host array here: floating ones to the backend's dtype, the others as they are."""
        array = np.asarray(array, order="C")  # torch refuses the negative strides of a flipped view
        dtype = self._dtype if np.issubdtype(array.dtype, np.floating) else None
        return torch.tensor(array, dtype=dtype, device=self._device)

    def to_numpy(self, array: Tensor, /) -> np.ndarray:
        """Copy a tensor to a NumPy array on the host."""
        return array.detach().cpu().numpy().copy()

    def model(self, spec: ModelSpec, /) -> Model:
        """Build the encoders, MLP towers or convolution and transformer."""
        return MLPModel(spec, self.xp) if spec.architecture == "mlp" else ConvModel(spec)

    def adamw(self, *, weight_decay: float, beta1: float = 0.9, beta2: float = 0.98, epsilon: float = 1e-8) -> AdamW:
        """Build AdamW (decoupled weight decay, on parameters with two or more axes only)."""
        return TorchAdamW(self.xp, weight_decay=weight_decay, beta1=beta1, beta2=beta2, epsilon=epsilon)

    def compile(self, function: Function, /) -> Function:
        """Return the function: its graph would break at every call into autograd, and eager torch starts at once."""
        return function


class TorchAdamW(AdamW):
    """The same AdamW through torch's own kernels: parameters and state are updated in place."""

    def update(
        self, parameters: Parameters, gradients: Parameters, state: Parameters, learning_rate: Tensor | float, /
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return new parameters and new state; the old ones are overwritten."""
        count = float(state["step"])
        for decays in (False, True):
            names = [name for name, parameter in parameters.items() if (parameter.ndim >= 2) is decays]
            adamw(
                [parameters[name] for name in names],
                [gradients[name] for name in names],
                [state[f"first_moment/{name}"] for name in names],
                [state[f"second_moment/{name}"] for name in names],
                [],
                [torch.tensor(count) for _ in names],  # torch counts for each parameter, in float32, from the last step
                amsgrad=False,
                beta1=self.beta1,
                beta2=self.beta2,
                lr=float(learning_rate),
                weight_decay=self.weight_decay if decays else 0.0,
                eps=self.epsilon,
                maximize=False,
            )
        return dict(parameters), {**state, "step": state["step"] + 1}
