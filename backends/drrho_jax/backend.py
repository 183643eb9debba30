"""The backend of the harness (`drrho_clip`, the training program) for JAX.

`drrho_core.backend.Backend` defines what a backend must provide.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from drrho_clip.models import MLPModel, ModelSpec
from drrho_clip.optimizer import AdamW
from drrho_clip.processes.place import Place
from drrho_core.backend import Function, Home, Model, Parameters, WorkingMemory
from drrho_jax.estimator import DonatingEstimator
from drrho_jax.half import Bfloat16Model
from drrho_jax.hf_models import HuggingFaceModel
from drrho_jax.models import ConvModel
from drrho_jax.parts import ModelInParts
from drrho_jax.processes import JaxProcesses, join
from drrho_jax.products import in_full_precision


class JaxBackend:
    """JAX on one device; see `drrho_core.backend.Backend`.

    Only a training step can use more devices: those of all processes that train together; see `JaxProcesses`.

    Parameters
    ----------
    device : str, optional
        Platform and number, such as ``"gpu:1"`` or ``"cpu"``. Default: the first device of this process.
    dtype : {"float32", "float64"}
        The dtype that floating arrays are converted to. ``"float64"`` switches JAX's 64-bit types on for the whole
        process, because JAX has one setting per process.

    Raises
    ------
    ValueError
        If JAX has no such device on this machine, or `dtype` is neither ``"float32"`` nor ``"float64"``.

    Examples
    --------
    >>> backend = JaxBackend(device="cpu")
    >>> backend.asarray([0.5, 1.5]).dtype
    dtype('float32')
    """

    name = "jax"
    homes = ("device",)
    architectures: tuple[str, ...] = ("conv", "mlp", "hf", "heads")
    precisions: tuple[str, ...] = ("bf16",)
    preference = 0
    # Measured with benchmarks/memory.py.
    working_memory = WorkingMemory(210e6, per_array=6.7e6, activation_factor=1.9, update_factor=3.0)
    xp = jnp

    def __init__(self, device: str | None = None, dtype: str = "float32") -> None:
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}")
        self._device = _find_device(device)
        platform = self._device.platform
        own = jax.local_devices(backend=platform)
        self.device, self.num_devices = f"{platform}:{own.index(self._device)}", len(own)
        self.has_gpu = platform == "gpu"
        self.dtype = dtype
        if dtype == "float64":
            jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]

    def asarray(self, array: Any, /) -> jax.Array:
        """Copy a host array to the device: floating arrays get the backend's dtype, all others keep their dtype.

        Without JAX's 64-bit types (``dtype="float32"``) integers become 32-bit integers.
        """
        # The array is copied even on the CPU: JAX could otherwise share memory with an array that the caller changes.
        host = np.asarray(array)
        dtype = self.dtype if np.issubdtype(host.dtype, np.floating) else None
        return jnp.array(host, dtype=dtype, copy=True, device=self._device)

    def to_numpy(self, array: jax.Array, /) -> np.ndarray:
        """Copy an array to a NumPy array on the host."""
        return np.array(array)

    def model(self, spec: ModelSpec, /) -> Model:
        """Build the encoders of a `ModelSpec`: MLP towers, a convolution tower and a transformer, or CLIP or SigLIP."""
        if spec.architecture == "hf":
            return HuggingFaceModel(spec)
        if spec.architecture in ("mlp", "heads"):
            return MLPModel(spec, jnp)
        return ConvModel(spec)

    def half_model(self, model: Model, precision: str, /) -> Model:  # noqa: ARG002 (there is one half type)
        """Return encoders that compute in bfloat16."""
        return Bfloat16Model(model)

    def model_in_parts(self, model: Model, size: int, /) -> Model:
        """Return encoders that take a batch in parts of `size` samples."""
        return ModelInParts(model, size)

    def adamw(
        self, *, weight_decay: float, beta1: float = 0.9, beta2: float = 0.98, epsilon: float = 1e-8
    ) -> OptaxAdamW:
        """Build AdamW (decoupled weight decay, on parameters with two or more axes only)."""
        return OptaxAdamW(jnp, weight_decay=weight_decay, beta1=beta1, beta2=beta2, epsilon=epsilon)

    def estimator(self, home: str, num_samples: int, /, *, path: Any = None) -> Home:  # noqa: ARG002 (contract)
        """Build an inner estimator on the device, the only place where this backend keeps estimates."""
        if home not in self.homes:
            raise ValueError(f"home must be one of {', '.join(self.homes)} for the jax backend, got {home!r}")
        return Home(DonatingEstimator(num_samples, like=self.asarray(np.zeros(1))), self.asarray)

    @staticmethod
    def connect(place: Place, /) -> None:
        """Connect this process with the others, before a backend is built; see `drrho_clip.processes.opening`."""
        join(place)

    def processes(self, place: Place, /) -> JaxProcesses:
        """Return the processes that train together; see `drrho_clip.processes.protocol.Processes`."""
        return JaxProcesses(self._device, place)

    def compile(self, function: Function, /) -> Function:
        """Compile a pure function of arrays with `jax.jit`, with products in full precision."""
        compiled: Any = jax.jit(in_full_precision(function))
        return compiled  # type: ignore[no-any-return]


class OptaxAdamW(AdamW):
    """The AdamW of `drrho_clip.optimizer`, implemented with `optax.adamw`.

    The state is a flat mapping with the same names in every backend, so every backend can load a checkpoint.
    """

    def update(
        self, parameters: Parameters, gradients: Parameters, state: Parameters, learning_rate: Any, /
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Return new parameters and new state."""
        values = dict(parameters)
        # The transformation is rebuilt in each call, because the learning rate may be a traced array. Rebuilding loses
        # nothing, because the moments and the counter are in `state`.
        transform = optax.adamw(
            learning_rate,
            b1=self.beta1,
            b2=self.beta2,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            mask={name: value.ndim >= 2 for name, value in values.items()},
        )
        # optax.adamw is a chain of transformations. The first one, Adam, holds the moments and the counter.
        _, *stateless = transform.init(values)
        change, (adam, *_) = transform.update(dict(gradients), (_nested(state, values), *stateless), values)
        new = optax.apply_updates(values, change)
        return {name: new[name] for name in values}, _flat(adam, values)


def _nested(state: Parameters, names: Iterable[str]) -> optax.ScaleByAdamState:
    """Build optax's state from the flat state that every backend shares."""
    first, second = ({name: state[f"{kind}_moment/{name}"] for name in names} for kind in ("first", "second"))
    return optax.ScaleByAdamState(count=state["step"], mu=first, nu=second)


def _flat(state: optax.ScaleByAdamState, names: Iterable[str]) -> dict[str, jax.Array]:
    """Build the flat state from optax's state."""
    return {
        "step": state.count,
        **{f"first_moment/{name}": state.mu[name] for name in names},
        **{f"second_moment/{name}": state.nu[name] for name in names},
    }


def _find_device(name: str | None) -> jax.Device:
    """Return the device with the name ``"platform:number"``, or ``"platform"`` for number 0."""
    if name is None:
        return jax.local_devices()[0]
    platform, _, number = name.partition(":")
    try:
        # Devices of other processes are none of this process's.
        devices = jax.local_devices(backend=platform)
    # JAX raises an error for a platform that is unknown or absent.
    except RuntimeError:
        devices = []
    if not (number or "0").isdecimal() or int(number or "0") >= len(devices):
        known = ", ".join(f"{device.platform}:{number}" for number, device in enumerate(jax.local_devices()))
        raise ValueError(f"device must be one of JAX's ({known}), got {name!r}")
    return devices[int(number or "0")]
