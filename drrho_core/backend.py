"""The contract of a backend: the few operations that the Array API lacks, and how a backend is found.

A backend serves one array library. It moves arrays, runs the encoders forward, turns a gradient with respect to
features into a gradient with respect to parameters, updates parameters, and compiles a step if the library can. All
other code is the same for all libraries. ``backends/README.md`` says how to add a backend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from drrho_core._array_api import Array, Namespace
from drrho_core.lending import BackendWithEncoders

Parameters: TypeAlias = Mapping[str, Array]
"""Parameters, gradients or optimiser state: a flat mapping from names to arrays, as a checkpoint stores it."""

Pullback: TypeAlias = Callable[[Array, Array], Parameters]
"""A pullback takes gradients with respect to image and text features, and returns gradients of the parameters."""

Function = TypeVar("Function", bound=Callable[..., Any])


class Model(Protocol):
    """A pair of encoders, as pure functions of their parameters. Features have unit norm, shape (b, feature_dim)."""

    def encode(self, parameters: Parameters, images: Array, texts: Array, /) -> tuple[Array, Array, Pullback]:
        """Return image features and text features, both detached from autograd, and the pullback of this call."""
        ...

    def encode_images(self, parameters: Parameters, images: Array, /) -> Array:
        """Return only the image features, and keep nothing for a gradient."""
        ...

    def encode_texts(self, parameters: Parameters, texts: Array, /) -> Array:
        """Return only the text features, and keep nothing for a gradient."""
        ...


class Optimizer(Protocol):
    """An optimiser whose whole state is the flat mapping that its methods return."""

    def init(self, parameters: Parameters, /) -> Parameters:
        """Return the state before the first update."""
        ...

    def update(
        self, parameters: Parameters, gradients: Parameters, state: Parameters, learning_rate: Array | float, /
    ) -> tuple[Parameters, Parameters]:
        """Return new parameters and a new state. The old arrays may have been overwritten."""
        ...


class Home(NamedTuple):
    """Result of `Backend.estimator`: an inner estimator, and a function that converts NumPy arrays for the estimator.

    An inner estimator stores moving averages, one row per sample. The *home* of the estimator is the place of these
    numbers: the device's memory, the host's memory, or a file. The function converts a NumPy array to the kind of array
    that the estimator's methods take.
    """

    estimator: Any  # a drrho_core.state.inner.EstimatorOfRows
    from_numpy: Callable[[Any], Array]


class WorkingMemory(NamedTuple):
    """Memory that an array library adds to a training run on the CPU, beyond the arrays of the run.

    Attributes
    ----------
    fixed : float
        Bytes that the library takes at the first step, for threads, kernels and buffers.
    per_array : float
        Bytes per array of parameters, such as those of a compiled program.
    activation_factor : float
        Memory of activations and temporary arrays, as a multiple of the numbers that a backward pass needs.
    update_factor : float
        Memory of an update by the optimiser, as a multiple of the parameters.
    hf_fixed : float
        Bytes that encoders of Hugging Face take at the first step beyond `fixed`.
    """

    fixed: float = 22e6
    per_array: float = 0.0
    activation_factor: float = 1.0
    update_factor: float = 5.0
    hf_fixed: float = 0.0


class Backend(Protocol):
    """One array library on one device, in one floating dtype (``float32`` or ``float64``).

    Attributes
    ----------
    name : str
        The name of the entry point. The library's import package, and the extra that installs the library, have the
        same name.
    architectures : tuple of str
        Architectures that `model` can build, the preferred architecture first.
    preference : int
        If the user names no backend, the installed backend with the highest preference is used.
    xp : namespace
        The library's Array API namespace.
    device : str
        The device of all arrays, in the library's own words.
    has_gpu : bool
        True if `device` is a GPU.
    dtype : str
        The floating dtype, ``"float32"`` or ``"float64"``.
    homes : tuple of str
        The homes of inner estimators that this backend itself provides: ``"device"``, ``"host"`` or ``"file"`` (see
        `drrho_core.state.make_estimator`).

    Notes
    -----
    A backend may have one more attribute, `foreign_models`: for each kind of model of another program a function that
    takes the name of a model and returns a `drrho_clip.encoders.PairEncoder`.
    """

    name: str
    architectures: tuple[str, ...]
    preference: int
    xp: Namespace
    device: str
    has_gpu: bool
    dtype: str
    homes: tuple[str, ...]

    def asarray(self, array: Any, /) -> Array:
        """Move a host array to the device. Floating arrays get the backend's dtype, all others keep their dtype."""
        ...

    def to_numpy(self, array: Array, /) -> Any:
        """Copy an array to a NumPy array on the host."""
        ...

    def model(self, spec: Any, /) -> Model:
        """Build the encoders that a `drrho_clip.models.ModelSpec` describes.

        Raise a ValueError if the architecture is not in `architectures`.
        """
        ...

    def adamw(
        self, *, weight_decay: float, beta1: float = 0.9, beta2: float = 0.98, epsilon: float = 1e-8
    ) -> Optimizer:
        """Build AdamW (decoupled weight decay, on parameters with two or more axes only)."""
        ...

    def estimator(self, home: str, num_samples: int, /, *, path: Any = None) -> Home:
        """Build an inner estimator whose numbers are stored in `home`, one of `homes`.

        For the home ``"file"``, `path` is the path of the file.
        """
        ...

    def compile(self, function: Function, /) -> Function:
        """Return a compiled pure function of arrays, or the function itself if the library cannot compile."""
        ...


GROUP = "drrho.backends"


def backend_names() -> list[str]:
    """Return the names of all registered backends, whether their libraries are installed or not."""
    return sorted(point.name for point in entry_points(group=GROUP))


def default_backend() -> str:
    """Return the name of the backend that is used when the user names none.

    This is the installed backend with the highest `Backend.preference`. If several have the highest preference, the
    alphabetically first name is returned.
    """
    # The preference is an attribute of the class, so every installed backend is imported here, but none is built.
    preferences = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        # A backend whose library is missing cannot be imported, so it is skipped.
        with contextlib.suppress(ImportError):
            preferences[point.name] = int(getattr(point.load(), "preference", 0))
    return max(preferences, key=preferences.__getitem__)


def get_backend(name: str, *, device: str | None = None, dtype: str = "float32") -> Backend:
    """Build a backend by name.

    Parameters
    ----------
    name : str
        A name of the entry-point group ``drrho.backends``, such as ``"torch"``; or two names, such as
        ``"cupy+torch"``: the first backend computes the loss and the updates, the second lends the encoders that the
        first lacks (see `drrho_core.lending`).
    device : str, optional
        The device in the library's own words, such as ``"cuda:0"``. If left out, the backend chooses: a GPU if the
        library can use one, otherwise the CPU.
    dtype : str
        ``"float32"`` or ``"float64"``.

    Raises
    ------
    ValueError
        If no backend has this name, or `dtype` is neither ``"float32"`` nor ``"float64"``.
    ImportError
        If the backend's library is not installed; the message says which extra to install.

    Examples
    --------
    >>> get_backend("numpy", dtype="float64").dtype
    'float64'
    """
    own, plus, lender = name.partition("+")
    if plus:
        first = get_backend(own, device=device, dtype=dtype)
        return BackendWithEncoders(first, get_backend(lender, device=first.device, dtype=dtype))
    # Entry points are read from installed metadata; no library is imported before `load`.
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name not in points:
        raise ValueError(f"backend must be one of {', '.join(sorted(points))}, got {name!r}")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}")
    try:
        build = points[name].load()
    except ModuleNotFoundError as error:
        # If the missing module belongs to this project, the installation is defective and no extra would help.
        if error.name is not None and error.name.partition(".")[0].startswith("drrho"):
            raise
        raise ImportError(
            f"the {name} backend needs {error.name}, which is not installed: pip install 'drrho-core[{name}]'"
        ) from error
    backend: Backend = build(device=device, dtype=dtype)
    return backend
