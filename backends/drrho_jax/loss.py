"""The contrastive loss and the DRRho risk as differentiable JAX functions.

The core returns values together with closed-form gradients; `drrho_jax.gradient` ties the two, so that differentiation
never enters the core.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from drrho_core import _validate, risk
from drrho_core._array_api import is_array, namespace_of
from drrho_core._validate import NOT_NEGATIVE, POSITIVE, UNIT_INTERVAL
from drrho_core.ambiguity import AmbiguitySet
from drrho_core.contrastive.step import wide_contrastive_step
from drrho_core.state.table import check_index
from drrho_jax.arguments import check_placement, check_unmapped, on_auto_axes, taken, taken_index, taken_option
from drrho_jax.gradient import with_gradient

Tree = TypeVar("Tree")
Array: TypeAlias = jax.Array | np.ndarray
Scalar: TypeAlias = float | Array
PerAnchor: TypeAlias = Scalar | tuple[Array, Array]


class ContrastiveState(NamedTuple):
    """The inner estimates of all samples, a pytree to carry through the training loop.

    Attributes
    ----------
    log_inner_image, log_inner_text : array, shape (num_samples,)
        Logarithms of the estimates of every image anchor and every text anchor; ``-inf`` = never visited.
    """

    log_inner_image: Array
    log_inner_text: Array


def init_state(num_samples: int, *, dtype: Any = jnp.float32) -> ContrastiveState:
    """Return the state in which no sample was visited.

    Parameters
    ----------
    num_samples : int
        Size of the data set, at least 1; `contrastive_loss` takes sample indices below it.
    dtype : dtype
        float32, or float64 where JAX's 64-bit types are on.

    Returns
    -------
    ContrastiveState
        Two arrays of shape (num_samples,) that hold ``-inf``, each with a buffer of its own: the state can be donated.

    Raises
    ------
    TypeError
        If `num_samples` is no integer, or `dtype` is narrower than float32 or not available.
    ValueError
        If `num_samples` is below 1, or larger than an index can count to.

    Examples
    --------
    >>> init_state(3).log_inner_image.tolist()
    [-inf, -inf, -inf]
    """
    size = _validate.integer("num_samples", num_samples, minimum=1)
    widest = jax.dtypes.canonicalize_dtype(jnp.int64)
    if size > int(np.iinfo(widest).max):
        raise ValueError(f"num_samples must fit into {widest}, the type of the widest index, got {num_samples}")
    wanted = jnp.dtype(dtype)
    if wanted not in (jnp.float32, jnp.float64) or jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise TypeError(f"dtype must be float32, or float64 where jax_enable_x64 is on, got {wanted}")
    # Two calls: one array in both fields would be one buffer, which cannot be donated twice.
    image, text = (jnp.full((size,), -jnp.inf, dtype=wanted) for _ in range(2))
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
) -> tuple[Array, ContrastiveState]:
    """Return the global contrastive loss of a batch, differentiable, and the updated state.

    Made for ``jax.value_and_grad(loss_function, has_aux=True)``, with or without `jax.jit`. NumPy arrays are taken
    wherever JAX's are, and converted as `jax.numpy.asarray` converts them.

    Parameters
    ----------
    state : ContrastiveState
        The result of `init_state` or of the previous step. A jitted step may overwrite it instead of copying it:
        ``jax.jit(step, donate_argnums=...)``. Its two fields must not be one and the same array then.
    image_features, text_features : array, shape (b, d)
        Features of the batch, unit norm (not enforced), b >= 2. Row i of both is a positive pair.
    sample_index : array of int, shape (b,)
        Stable row of every pair in the data set, in [0, num_samples), without repeats. Under `jax.jit` values cannot be
        looked at: an index out of range then makes the loss nan, a repeated one keeps one of its updates. The same
        goes for options: a temperature, gamma, reference_weight, radius or eps outside its domain makes the loss, its
        gradients and the batch's rows of the state nan.
    temperature : float, array of shape () or pair of arrays of shape (b,)
        Temperature tau > 0, global or one per image anchor and one per text anchor.
    gamma : float, array of shape () or pair of arrays of shape (b,)
        Weight of the batch's own estimate, in (0, 1]; 1 has no memory: the mini-batch loss.
    eps : float or array of shape ()
        Added to the inner estimate, >= 0.
    reference_features : pair of arrays, shape (b, r), optional
        Image and text features of the frozen reference model; r may differ from d. None: SogCLR / FastCLIP.
    reference_weight : float or array of shape ()
        lambda >= 0: 0 ignores the reference model, 1 is DRRho.
    radius : float or array of shape ()
        Size of the ambiguity set, >= 0; it matters only where temperatures are learned.
    pair_mask : array of bool, shape (b, b), optional
        Entry (i, j) False: text j is not a negative of image i, nor image i one of text j.
    anchor_weight : array of shape (b,) or pair of such arrays, optional
        Factor on each anchor's part of loss and gradients, >= 0, as in `drrho_core.contrastive_step`: a constant.
    tile_size, memory_budget : int, optional
        They affect speed and memory only, not the result, as in `drrho_core.contrastive_step`.

    Returns
    -------
    loss : array, shape ()
        Estimate of the objective with the updated inner estimates.
    state : ContrastiveState
        The state for the next step. It carries no gradient.

    Raises
    ------
    TypeError
        If an argument is no array of JAX or NumPy or has a wrong dtype.
    ValueError
        If shapes or devices do not fit, or, outside tracing on the host, values break the rules above. Also inside
        `jax.shard_map` and `jax.pmap`, because each device would see the negatives of its own shard only. `jax.vmap`
        over whole problems is fine, and so is a batch that is sharded over a mesh under `jax.jit`.
    NotImplementedError
        If it is differentiated twice.

    Notes
    -----
    Forward mode (`jax.jvp`, `jax.jacfwd`) and reverse mode (`jax.grad`, `jax.vjp`) both use one closed-form gradient.
    Under `jax.jit` a batch that is sharded over a mesh, with automatic or explicit axes, has the loss of the whole
    batch.
    The gradient of features and temperature is the closed form of SogCLR with a reference model (arXiv 2202.12387,
    2505.06699), the gradient of `drrho_core.contrastive_step`'s surrogate; every other argument is a constant. The
    products run in full float32 also where the accelerator would round their factors.

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
    check_unmapped()
    state = _check_state(state)
    num_samples = int(state.log_inner_image.shape[0])
    like = image_features if isinstance(image_features, jax.Array) else state.log_inner_image
    images, texts = taken("image_features", image_features, like), taken("text_features", text_features, like)
    namespace_of({"image_features": images, "text_features": texts}, jnp)
    _validate.ndim("image_features", images, 2, "(batch_size, feature_dim)")
    if is_array(sample_index):
        _validate.ndim("sample_index", sample_index, 1, "(batch_size,)")
    index = taken_index(sample_index, num_samples, like)
    options = {
        "temperature": temperature, "gamma": gamma, "reference_features": reference_features,
        "reference_weight": reference_weight, "radius": radius, "eps": eps, "pair_mask": pair_mask,
        "anchor_weight": anchor_weight,
    }  # fmt: skip
    options = {name: taken_option(name, value, like) for name, value in options.items()}
    inputs = (images, texts, options["temperature"])

    nan_if_outside = _nan_if_outside(options)
    compute = functools.partial(_step, tile_size=tile_size, memory_budget=memory_budget)
    arguments = _constants((state, images, texts, index, options, nan_if_outside))
    check_placement(arguments)
    # Each gradient lies on the devices as its input does; the loss lies on all of them.
    outputs_like = (None, jax.tree.map(lambda x: x if isinstance(x, jax.Array) else None, inputs), state)
    loss, gradients, new_state = on_auto_axes(compute, outputs_like, *arguments)
    loss = with_gradient(loss, *_matched(inputs, gradients))
    # The factor is 1 or nan, and so it is for each gradient.
    return loss if nan_if_outside is None else loss * (1 + nan_if_outside).astype(loss.dtype), new_state


def _step(
    state: Any,
    images: Any,
    texts: Any,
    sample_index: Any,
    options: dict[str, Any],
    nan_if_outside: Any,
    *,
    tile_size: int | None,
    memory_budget: int | None,
) -> tuple[Any, tuple[Any, Any, Any], ContrastiveState]:
    """Return the loss, the gradients of images, texts and temperature, and the new state: all of them constants."""
    num_samples = state.log_inner_image.shape[0]
    check_index(sample_index, num_samples, like=state.log_inner_image, xp=jnp)
    _validate.shape("sample_index", sample_index, (images.shape[0],), "(batch_size,)")
    # Under tracing nobody can look at the index. An index out of range reads nan, so that the loss shows it; negative
    # ones would count from the end.
    index = sample_index.astype(jnp.promote_types(sample_index.dtype, jnp.int32))
    rows = jnp.where(index < 0, num_samples, index)
    log_inner_image, log_inner_text = (side.at[rows].get(mode="fill", fill_value=jnp.nan) for side in state)
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
        )
    rows_image, rows_text = (
        new if nan_if_outside is None else new + nan_if_outside.astype(new.dtype)
        for new in (step.log_inner_image, step.log_inner_text)
    )
    gradients = (step.image_gradient, step.text_gradient, step.temperature_gradient)
    new_state = ContrastiveState(
        state.log_inner_image.at[rows].set(rows_image, mode="drop"),
        state.log_inner_text.at[rows].set(rows_text, mode="drop"),
    )
    return step.loss, gradients, new_state


def drrho_risk(
    loss: Array,
    reference_loss: Array,
    ambiguity_set: AmbiguitySet,
    /,
    *,
    reference_weight: Scalar = 1.0,
    axis: int = -1,
    where: Array | None = None,
) -> Array:
    """Return the DRRho risk, differentiable in `loss`.

    Parameters
    ----------
    loss : array, shape (..., n, ...)
        The learner's losses, real floating, any unit. NumPy arrays are taken, too.
    reference_loss : array, the same shape
        The frozen reference model's losses on the same samples, in the same dtype: constants.
    ambiguity_set : AmbiguitySet
        The weights that the adversary may choose, such as ``drrho_core.CVaR(0.1)``.
    reference_weight : float or array of shape ()
        lambda >= 0: 0 is plain distributionally robust optimisation, 1 is DRRho.
    axis : int
        The axis of the n samples.
    where : array of bool, optional
        Marks the samples that count, broadcast to the losses' shape; neither loss of the others is read, and their
        gradient is 0.

    Returns
    -------
    array
        The risk: the shape of `loss` without `axis`; a scalar for one axis.

    Raises
    ------
    TypeError, ValueError
        As `drrho_core.drrho_risk` does.
    NotImplementedError
        If it is differentiated twice.

    Notes
    -----
    The gradient is the vector of worst-case weights (Danskin's theorem), so no solver is differentiated through.
    Forward and reverse mode both work, as in `contrastive_loss`. DRRho (arXiv 2505.06699).

    Examples
    --------
    >>> from drrho_core import CVaR
    >>> loss, reference_loss = jnp.asarray([3.0, 2.0, 1.0]), jnp.asarray([2.9, 0.5, 0.5])
    >>> risk, gradient = jax.value_and_grad(drrho_risk)(loss, reference_loss, CVaR(0.5))  # one sample and a half
    >>> round(float(risk), 4), [round(weight, 4) for weight in gradient.tolist()]
    (1.1667, [0.0, 0.6667, 0.3333])
    """
    like = loss if isinstance(loss, jax.Array) else reference_loss
    loss, reference_loss = taken("loss", loss, like), taken("reference_loss", reference_loss, like)
    where = taken("where", where, like)
    worst = risk.drrho_risk(
        *_constants((loss, reference_loss)),
        ambiguity_set,
        reference_weight=_constants(taken_option("reference_weight", reference_weight, like)),
        axis=axis,
        where=where,
        xp=jnp,
    )
    return jnp.squeeze(with_gradient(jnp.expand_dims(worst.risk, axis), [loss], [worst.weights]), axis)


def _check_state(state: ContrastiveState) -> ContrastiveState:
    """Check the state's types and shapes; return it with JAX arrays in its fields."""
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"state must be a ContrastiveState, got {_validate.describe(state)}")
    sides = []
    for name, side in (("state.log_inner_image", state[0]), ("state.log_inner_text", state[1])):
        if not is_array(side):
            raise TypeError(f"{name} must be an array, got {_validate.describe(side)}")
        _validate.ndim(name, side, 1, "(num_samples,)")
        array = taken(name, side)
        _validate.state_dtype(name, array, jnp)
        sides.append(array)
    _validate.shape("state.log_inner_text", sides[1], sides[0].shape, "(num_samples,)")
    return ContrastiveState(*sides)


def _constants(tree: Tree) -> Tree:
    """Cut every array loose from differentiation; numbers and None stay as they are."""
    result: Tree = jax.tree.map(lambda x: jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x, tree)
    return result


def _nan_if_outside(options: dict[str, Any]) -> Any:
    """Return 0, or nan if an array holds a value outside its domain, for an error cannot be raised under tracing.

    None if there are only numbers, which the core checks everywhere.
    """
    domains = {
        "temperature": POSITIVE, "gamma": UNIT_INTERVAL, "reference_weight": NOT_NEGATIVE,
        "radius": NOT_NEGATIVE, "eps": NOT_NEGATIVE,
    }  # fmt: skip
    inside = [
        jnp.all(rule.holds(jax.lax.stop_gradient(x)))
        for name, rule in domains.items()
        for x in jax.tree.leaves(options[name])
        if isinstance(x, jax.Array)
    ]
    return jnp.where(functools.reduce(jnp.logical_and, inside), 0.0, jnp.nan) if inside else None


def _matched(inputs: Any, gradients: Any) -> tuple[list[Array], list[Array]]:
    """Return the inputs that are arrays, in the dtype of their gradients, and those gradients."""
    pairs = [
        (x.astype(gradient.dtype), gradient)
        for x, gradient in zip(jax.tree.leaves(inputs), jax.tree.leaves(gradients), strict=True)
        if isinstance(x, jax.Array)
    ]
    return [x for x, _ in pairs], [gradient for _, gradient in pairs]
