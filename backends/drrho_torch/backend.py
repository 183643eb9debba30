"""The backend of the harness (`drrho_clip`, the training program) for PyTorch.

`drrho_core.backend.Backend` defines what a backend must provide.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import array_api_compat.torch
import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from drrho_clip.models import MLPModel, ModelSpec
from drrho_clip.optimizer import AdamW
from drrho_clip.processes.place import Place, place_of_launcher, processes_of_machine
from drrho_core import InnerEstimator
from drrho_core.backend import Function, Home, Model, Parameters, WorkingMemory
from drrho_core.checks import Namespace
from drrho_torch.estimate_files import read_tables
from drrho_torch.estimator import HostEstimator
from drrho_torch.half import HALF_TYPES, AutocastModel
from drrho_torch.hf_models import HuggingFaceModel
from drrho_torch.models import ConvModel
from drrho_torch.processes import TorchProcesses

if TYPE_CHECKING:
    from drrho_clip.encoders import PairEncoder


def default_device() -> str:
    """Return the device that a backend uses when the user names none.

    This is the device of `torch.set_default_device`, if the user has set a device other than the CPU. Otherwise it is
    the GPU if torch can use one through CUDA or ROCm, and the CPU if not. An Apple GPU (MPS) is used only if the user
    names it, because it has no float64. Of several processes that a launcher has started, each uses the GPU of its
    number on the machine.

    Raises
    ------
    ValueError
        If there are fewer GPUs than processes on this machine.
    """
    device = torch.get_default_device()
    if device.type != "cpu" or not torch.cuda.is_available():
        return str(device)
    # The processes of a launcher take a GPU each.
    place = place_of_launcher()
    if place is None:
        return "cuda"
    # All processes of the machine refuse this, because only the first of them prints.
    started, available = processes_of_machine(), torch.cuda.device_count()
    if started > available:
        raise ValueError(
            f"device must be named, such as 'cpu', if a machine has more processes than GPUs, got {started} processes "
            f"and {available} GPUs"
        )
    return f"cuda:{place.local_rank}"


class TorchBackend:
    """PyTorch on one device; see `drrho_core.backend.Backend`.

    Parameters
    ----------
    device : str, optional
        A name such as ``"cpu"`` or ``"cuda:0"``. Default: see `default_device`.
    dtype : {"float32", "float64"}
        The dtype that floating arrays are converted to.

    Raises
    ------
    ValueError
        If torch has no such device on this machine, or `dtype` is neither ``"float32"`` nor ``"float64"``.

    Examples
    --------
    >>> backend = TorchBackend("cpu")
    >>> backend.asarray([0.5, 1.5])
    tensor([0.5000, 1.5000])
    """

    name = "torch"
    homes = ("device", "host")
    architectures: tuple[str, ...] = ("conv", "mlp", "hf", "heads")
    precisions: tuple[str, ...] = tuple(HALF_TYPES)
    preference = 2
    # Measured with benchmarks/memory.py.
    working_memory = WorkingMemory(30e6, per_array=0.7e6, update_factor=0.0, hf_fixed=75e6)
    read_tables = staticmethod(read_tables)
    xp: Namespace = array_api_compat.torch

    def __init__(self, device: str | None = None, dtype: str = "float32") -> None:
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}")
        self._dtype: torch.dtype = getattr(torch, dtype)
        device = default_device() if device is None else device
        try:
            # torch refuses to make this tensor if the device is missing or lacks the dtype. The device of the tensor
            # has a full name, such as ``"cuda:0"``, even if `device` is ``"cuda"``.
            self._device = torch.empty(0, device=device, dtype=self._dtype).device
        except (RuntimeError, AssertionError, TypeError) as error:  # a malformed name, a missing device or dtype
            reason = str(error).partition("\n")[0]
            raise ValueError(f"device must be 'cpu' or another that torch has, got {device!r}: {reason}") from error
        self.device = str(self._device)
        self.has_gpu = self._device.type not in ("cpu", "meta")
        self.dtype = dtype

    @property
    def foreign_models(self) -> Mapping[str, Callable[[str], PairEncoder]]:
        """Openers of models of other programs, by kind; see `drrho_clip.encoders.open_model`."""
        # Losses need no models of other programs, so the module is imported only here.
        from drrho_torch.open_clip_encoder import open_open_clip
        from drrho_torch.packaged_towers import open_packaged_towers

        return {
            "open_clip": functools.partial(open_open_clip, device=self._device),
            "packaged": open_packaged_towers,
        }

    def asarray(self, array: Any, /) -> Tensor:
        """Copy a host array to the device: floating arrays get the backend's dtype, all others keep their dtype."""
        # torch refuses negative strides, which a flipped view has; an array in C order has none.
        array = np.asarray(array, order="C")
        dtype = self._dtype if np.issubdtype(array.dtype, np.floating) else None
        return torch.tensor(array, dtype=dtype, device=self._device)

    def to_numpy(self, array: Tensor, /) -> np.ndarray:
        """Copy a tensor to a NumPy array on the host."""
        return array.detach().cpu().numpy().copy()

    def model(self, spec: ModelSpec, /) -> Model:
        """Build the encoders of a `ModelSpec`: MLP towers, a convolution tower and a transformer, or CLIP or SigLIP."""
        if spec.architecture == "hf":
            return HuggingFaceModel(spec)
        return MLPModel(spec, self.xp) if spec.architecture in ("mlp", "heads") else ConvModel(spec)

    def half_model(self, model: Model, precision: str, /) -> Model:
        """Return encoders that compute in a half type, one of `precisions`, by torch's autocast."""
        return AutocastModel(model, HALF_TYPES[precision], self._device.type)

    def adamw(self, *, weight_decay: float, beta1: float = 0.9, beta2: float = 0.98, epsilon: float = 1e-8) -> AdamW:
        """Build AdamW (decoupled weight decay, on parameters with two or more axes only)."""
        return TorchAdamW(self.xp, weight_decay=weight_decay, beta1=beta1, beta2=beta2, epsilon=epsilon)

    def estimator(self, home: str, num_samples: int, /, *, path: Any = None) -> Home:  # noqa: ARG002 (contract)
        """Build an inner estimator on the device, or in the host's memory with asynchronous copies."""
        if home == "device":
            return Home(InnerEstimator(num_samples, like=self.asarray(np.zeros(1))), self.asarray)
        if home == "host":
            return Home(HostEstimator(num_samples, device=self._device, dtype=self._dtype), torch.asarray)
        raise ValueError(f"home must be one of {', '.join(self.homes)} for the torch backend, got {home!r}")

    def processes(self, place: Place, /) -> TorchProcesses:
        """Join the processes that train together; see `drrho_clip.processes.protocol.Processes`."""
        return TorchProcesses(self._device, place)

    def compile(self, function: Function, /) -> Function:
        """Return the function unchanged.

        A compiled graph would break at each call into autograd, and eager torch needs no time to compile.
        """
        return function


class TorchAdamW(AdamW):
    """The AdamW of `drrho_clip.optimizer`, with torch's own kernels: parameters and state are updated in place."""

    def update(
        self, parameters: Parameters, gradients: Parameters, state: Parameters, learning_rate: Tensor | float, /
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return new parameters and new state; they share memory with the old ones, which are overwritten."""
        # torch's kernels add 1 to the counter themselves, so they get the number of completed steps.
        count = float(state["step"])
        # Weight decay applies to parameters with two or more axes only, so these parameters need a call of their own.
        for decays in (False, True):
            names = [name for name, parameter in parameters.items() if (parameter.ndim >= 2) is decays]
            adamw(
                [parameters[name] for name in names],
                [gradients[name] for name in names],
                [state[f"first_moment/{name}"] for name in names],
                [state[f"second_moment/{name}"] for name in names],
                [],
                [torch.tensor(count) for _ in names],  # torch keeps one counter per parameter, in float32
                amsgrad=False,
                beta1=self.beta1,
                beta2=self.beta2,
                lr=float(learning_rate),
                weight_decay=self.weight_decay if decays else 0.0,
                eps=self.epsilon,
                maximize=False,
            )
        return dict(parameters), {**state, "step": state["step"] + 1}
