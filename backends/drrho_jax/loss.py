"""The contrastive loss as a differentiable JAX function with an explicit state.

The core (`drrho_core`) returns the loss together with closed-form gradients; `drrho_jax.gradient` combines the two, so
that JAX never differentiates the core.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from drrho_core import checks
from drrho_core.contrastive.options import OPTION_RULES
from drrho_core.contrastive.step import wide_contrastive_step
from drrho_core.state.table import check_index
from drrho_jax.arguments import (
    as_constants,
    as_jax_array,
    as_jax_index,
    as_jax_option,
    check_placement,
    on_auto_axes,
)
from drrho_jax.gradient import with_gradient
from drrho_jax.over_mesh import AnyMesh, check_mesh, over_mesh
from drrho_jax.ranks import AxisName, AxisRanks, axis_names, check_divided, ranks_of
from drrho_jax.state_rows import SplitState, WholeState

Array: TypeAlias = jax.Array | np.ndarray
Scalar: TypeAlias = float | Array
PerAnchor: TypeAlias = Scalar | tuple[Array, Array]


class ContrastiveState(NamedTuple):
    """The inner estimates of all samples: a pytree that the training loop passes from step to step.

    Every sample is an image anchor and a text anchor. In each batch, g is the mean over an anchor's negatives of an
    exponential that compares the negative with the positive. The inner estimate of the anchor is the moving average of
    g over the batches that contain its sample.

    Attributes
    ----------
    log_inner_image, log_inner_text : array, shape (num_samples,)
        Logarithms of the estimates of every image anchor and every text anchor; ``-inf`` = never visited.
    """

    log_inner_image: Array
    log_inner_text: Array


def init_state(num_samples: int, *, dtype: Any = jnp.float32) -> ContrastiveState:
    """Return the state before the first step: every sample counts as never visited.

    Parameters
    ----------
    num_samples : int
        Size of the data set, at least 1. Every sample index is smaller than this number.
    dtype : dtype
        float32, or float64 if JAX's 64-bit types are on.

    Returns
    -------
    ContrastiveState
        Two arrays of shape (num_samples,) that hold ``-inf``. The arrays share no memory, so the state can be donated.

    Raises
    ------
    TypeError
        If `num_samples` is no integer, or `dtype` is neither float32 nor float64, or is float64 without JAX's 64-bit
        types.
    ValueError
        If `num_samples` is below 1, or does not fit into JAX's widest integer type.

    Examples
    --------
    >>> init_state(3).log_inner_image.tolist()
    [-inf, -inf, -inf]
    """
    size = checks.integer("num_samples", num_samples, minimum=1)
    # Without 64-bit types an index has 32 bits, and a row above 2^31 could not be addressed.
    widest = jax.dtypes.canonicalize_dtype(jnp.int64)
    if size > int(np.iinfo(widest).max):
        raise ValueError(f"num_samples must fit into {widest}, the type of the widest index, got {num_samples}")
    requested = jnp.dtype(dtype)
    if requested not in (jnp.float32, jnp.float64) or jax.dtypes.canonicalize_dtype(requested) != requested:
        raise TypeError(f"dtype must be float32, or float64 if jax_enable_x64 is on, got {requested}")
    # Each field gets an array of its own, because JAX refuses to donate the same buffer twice.
    image, text = (jnp.full((size,), -jnp.inf, dtype=requested) for _ in range(2))
    return ContrastiveState(image, text)


def contrastive_loss(
    state: ContrastiveState,
    image_features: Array,
    text_features: Array,
    sample_index: Array,
    *,
    temperature: PerAnchor,
    gamma: PerAnchor = 1.0,
    eps: Scalar = 0.0,
    reference_features: tuple[Array, Array] | None = None,
    reference_weight: Scalar = 1.0,
    radius: Scalar = 0.0,
    pair_mask: Array | None = None,
    anchor_weight: Array | tuple[Array, Array] | None = None,
    tile_size: int | None = None,
    memory_budget: int | None = None,
    axis_name: AxisName | None = None,
    mesh: AnyMesh | None = None,
    form: str = "reduce",
    split_state: bool = False,
) -> tuple[Array, ContrastiveState]:
    """Return the global contrastive loss of a batch, differentiable, and the updated state.

    Call this function inside ``jax.value_and_grad(loss_function, has_aux=True)``, with or without `jax.jit`. Every
    array may be a NumPy array, which is converted as `jax.numpy.asarray` converts it. Options mean the same as in
    `drrho_core.contrastive_step`.

    Parameters
    ----------
    state : ContrastiveState
        The result of `init_state` or of the previous step. A jitted step may overwrite the state instead of copying it:
        ``jax.jit(step, donate_argnums=...)``. The two fields must then be two different arrays.
    image_features, text_features : array, shape (b, d)
        Features of the batch, as in `drrho_core.contrastive_step`; b >= 2.
    sample_index : array of int, shape (b,)
        Stable row of every pair in the data set, in [0, num_samples), without repeats.
    temperature : float, array of shape () or pair of arrays of shape (b,)
        Temperature tau > 0, global or one per image anchor and one per text anchor.
    gamma : float, array of shape () or pair of arrays of shape (b,)
        Weight of the batch's own estimate, in (0, 1], as in `drrho_core.contrastive_step`.
    eps, reference_weight, radius : float or array of shape ()
        Each >= 0, as in `drrho_core.contrastive_step`.
    reference_features : pair of arrays, shape (b, r), optional
        Features of the frozen reference model, as in `drrho_core.contrastive_step`. They get no gradient.
    pair_mask : array of bool, shape (b, b), optional
        As in `drrho_core.contrastive_step`.
    anchor_weight : array of shape (b,) or pair of such arrays, optional
        Factors >= 0, as in `drrho_core.contrastive_step`. They get no gradient.
    tile_size, memory_budget : int, optional
        As in `drrho_core.contrastive_step`; they affect speed and memory only, not the result.
    axis_name : str or tuple of str, optional
        Inside `jax.shard_map` or `jax.pmap`: the mapped axis along which the batch is divided. Arrays of the batch are
        those of the own device, `pair_mask` has the shape (b, number of devices * b), and the state is the same on all
        devices. ``()`` says that every device has the whole batch.
    mesh : Mesh, optional
        Outside of `jax.shard_map`: the batch is divided along the axis `axis_name` of this mesh.
    form : {"reduce", "ring"}
        How devices share the batch, as in `drrho_core.sharded_contrastive_step`.
    split_state : bool, default: False
        True: the rows of the state are divided among the devices, along the axis `axis_name`. Inside of `shard_map` the
        state has the spec ``PartitionSpec(axis_name)``, and W devices hold n / W consecutive rows each. The index of a
        pair is still the row in the whole state, and a batch may hold any rows.

    Returns
    -------
    loss : array, shape ()
        Estimate of the objective with the updated inner estimates.
    state : ContrastiveState
        The state for the next step. No gradient flows through it.

    Raises
    ------
    TypeError
        If an argument is no array of JAX or NumPy or has a wrong dtype.
    ValueError
        If shapes or devices do not fit, or, outside of tracing and on the host, values break the rules above. Also if
        the call is inside of `jax.shard_map` or `jax.pmap` without `axis_name`: each device would see the negatives of
        one shard only. `jax.vmap` over whole problems is allowed, and so is a batch that is sharded under `jax.jit`.
    NotImplementedError
        If the loss is differentiated twice.

    Notes
    -----
    Values cannot be checked under `jax.jit`. An index out of range then makes the loss nan. If an index is repeated,
    one of its updates is kept. A temperature, gamma, reference_weight, radius or eps outside of its domain makes the
    loss, the gradients and the batch's rows of the state nan.

    The gradients with respect to the features and the temperature are those of SogCLR with a reference model (arXiv
    2202.12387, 2505.06699), computed in closed form. They are also the gradients of the result `surrogate` of
    `drrho_core.contrastive_step`. All other arguments are constants for JAX. Forward mode (`jax.jvp`, `jax.jacfwd`)
    and reverse mode (`jax.grad`, `jax.vjp`) both use these gradients. Matrix products are computed in full float32,
    also on accelerators that by default round the factors to fewer bits.

    If a batch is sharded over a mesh under `jax.jit`, with automatic or explicit axes, the result is the loss of the
    whole batch, not of one shard. With `axis_name` loss and state are those of the whole batch, too. Inside of
    `shard_map` JAX sums the gradients of parameters over devices. In `pmap`, and with ``check_vma=False``,
    differentiate inside of the mapped function, and sum the gradients with `jax.lax.psum`, not with `pmean`.

    Examples
    --------
    >>> images, texts = jnp.eye(3), jnp.eye(3)[jnp.asarray([0, 2, 1])]  # two captions are swapped
    >>> def loss_function(images, state):
    ...     return contrastive_loss(state, images, texts, jnp.arange(3), temperature=0.5)
    >>> step = jax.jit(jax.value_and_grad(loss_function, has_aux=True))
    >>> (loss, state), gradient = step(images, init_state(3))
    >>> round(float(loss), 4), gradient.shape
    (0.1446, (3, 3))
    >>> [round(x, 4) for x in state.log_inner_image.tolist()]
    [-2.0, 1.4338, 1.4338]
    """
    ranks = None
    state = _check_state(state)
    if mesh is None:
        ranks = ranks_of(axis_name)
    else:
        divided = {"image_features": image_features} | ({"state.log_inner_image": state[0]} if split_state else {})
        check_mesh(mesh, axis_name, divided)
    if split_state and ranks is None and mesh is None:
        raise ValueError("split_state must be False without axis_name, got True")
    num_samples = int(state.log_inner_image.shape[0]) * (ranks.size if split_state and ranks is not None else 1)
    # NumPy arrays are copied to the device of the features, or of the state if the features are NumPy arrays too.
    # With a mesh they are not bound to a device, so that JAX can divide them among the devices.
    like: Any = image_features if isinstance(image_features, jax.Array) else state.log_inner_image
    like = like if mesh is None else None
    images = as_jax_array("image_features", image_features, like)
    texts = as_jax_array("text_features", text_features, like)
    checks.namespace_of({"image_features": images, "text_features": texts}, jnp)
    checks.ndim("image_features", images, 2, "(batch_size, feature_dim)")
    if checks.is_array(sample_index):
        checks.ndim("sample_index", sample_index, 1, "(batch_size,)")
    index = as_jax_index(sample_index, num_samples, like)
    if ranks is not None:
        check_divided(axis_name, (images, texts, index))
    options = {
        "temperature": temperature, "gamma": gamma, "reference_features": reference_features,
        "reference_weight": reference_weight, "radius": radius, "eps": eps, "pair_mask": pair_mask,
        "anchor_weight": anchor_weight,
    }  # fmt: skip
    options = {name: as_jax_option(name, value, like) for name, value in options.items()}
    inputs = (images, texts, options["temperature"])

    # The step gets constants and returns constants, so JAX differentiates nothing inside of it.
    nan_if_outside = _nan_if_outside(options)
    if ranks is not None and nan_if_outside is not None:
        (nan_if_outside,) = ranks.all_sum((nan_if_outside,))  # nan on all devices if it is nan on one
    compute = functools.partial(
        _step,
        num_samples=num_samples,
        split_state=split_state,
        tile_size=tile_size,
        memory_budget=memory_budget,
        form=form,
    )
    arguments = as_constants((state, images, texts, index, options, nan_if_outside))
    # Each gradient is sharded like the input that it belongs to; the loss lies on every device.
    inputs_or_none = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else None, inputs)
    if mesh is None:
        check_placement(arguments)
        shared = functools.partial(compute, ranks)
        loss, gradients, new_state = on_auto_axes(shared, (None, inputs_or_none, state), *arguments)
    else:
        loss, gradients, new_state = over_mesh(
            compute, mesh, axis_names(axis_name), inputs_or_none, *arguments, split_state=split_state
        )
    # From here on JAX differentiates: the loss, as a function of the inputs, has these gradients.
    loss = with_gradient(loss, *_matched(inputs, gradients))
    # The factor is 1 or nan; by the chain rule it multiplies every gradient as well.
    return loss if nan_if_outside is None else loss * (1 + nan_if_outside).astype(loss.dtype), new_state


def _step(
    ranks: AxisRanks | None,
    state: Any,
    images: Any,
    texts: Any,
    sample_index: Any,
    options: dict[str, Any],
    nan_if_outside: Any,
    *,
    num_samples: int,
    split_state: bool,
    tile_size: int | None,
    memory_budget: int | None,
    form: str,
) -> tuple[Any, tuple[Any, Any, Any], ContrastiveState]:
    """Return the loss, the gradients of images, texts and temperature, and the new state, all as constants."""
    check_index(sample_index, num_samples, like=state.log_inner_image, xp=jnp)
    checks.shape("sample_index", sample_index, (images.shape[0],), "(batch_size,)")
    rows: SplitState | WholeState
    if split_state and ranks is not None:
        rows = SplitState(state, sample_index, ranks)
    else:
        rows = WholeState(state, sample_index, ranks)
    log_inner_image, log_inner_text = rows.read()
    sharing: Any = {} if ranks is None else {"ranks": ranks, "form": form}
    # Accelerators would round the factors of a product, and 1 / tau would multiply the rounding error.
    with jax.default_matmul_precision("float32"):
        step = wide_contrastive_step(
            images,
            texts,
            log_inner_image,
            log_inner_text,
            **options,
            tile_size=tile_size,
            memory_budget=memory_budget,
            xp=jnp,
            **sharing,
        )
    # Add 0 to the new rows of the state, or nan if an option was outside of its domain.
    rows_image, rows_text = (
        new if nan_if_outside is None else new + nan_if_outside.astype(new.dtype)
        for new in (step.log_inner_image, step.log_inner_text)
    )
    temperature_gradient = step.temperature_gradient
    if ranks is not None and not ranks.tracks_variation and not isinstance(temperature_gradient, tuple):
        # The user sums the gradients of all devices, so each device returns an equal part.
        temperature_gradient = temperature_gradient / ranks.size
    gradients = (step.image_gradient, step.text_gradient, temperature_gradient)
    return step.loss, gradients, ContrastiveState(*rows.written(rows_image, rows_text))


def _check_state(state: ContrastiveState) -> ContrastiveState:
    """Check the state's types and shapes; return it with JAX arrays in its fields."""
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"state must be a ContrastiveState, got {checks.describe(state)}")
    sides = []
    for name, side in (("state.log_inner_image", state[0]), ("state.log_inner_text", state[1])):
        if not checks.is_array(side):
            raise TypeError(f"{name} must be an array, got {checks.describe(side)}")
        checks.ndim(name, side, 1, "(num_samples,)")
        array = as_jax_array(name, side)
        checks.state_dtype(name, array, jnp)
        sides.append(array)
    checks.shape("state.log_inner_text", sides[1], sides[0].shape, "(num_samples,)")
    return ContrastiveState(*sides)


def _nan_if_outside(options: dict[str, Any]) -> Any:
    """Return 0, or nan if an array among the options holds a value outside of its domain; None if there is no array.

    Under tracing no error can be raised. Numbers are left out, because the core checks them even under tracing.
    """
    is_inside = [
        jnp.all(rule.holds(jax.lax.stop_gradient(x)))
        for name, rule in OPTION_RULES.items()
        for x in jax.tree.leaves(options[name])
        if isinstance(x, jax.Array)
    ]
    return jnp.where(functools.reduce(jnp.logical_and, is_inside), 0.0, jnp.nan) if is_inside else None


def _matched(inputs: Any, gradients: Any) -> tuple[list[Array], list[Array]]:
    """Return the inputs that are arrays, in the dtype of their gradients, and their gradients."""
    # Inputs of a half type (float16, bfloat16) are cast to float32, and JAX differentiates this cast. So the float32
    # gradient is multiplied by the incoming gradient (for example a loss scale) first, and the product is then rounded
    # to the half type.
    pairs = [
        (x.astype(gradient.dtype), gradient)
        for x, gradient in zip(jax.tree.leaves(inputs), jax.tree.leaves(gradients), strict=True)
        if isinstance(x, jax.Array)
    ]
    return [x for x, _ in pairs], [gradient for _, gradient in pairs]
