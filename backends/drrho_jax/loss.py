"""The contrastive loss and the DRRho risk as differentiable JAX functions.

The core returns values together with closed-form gradients. Here a `jax.custom_vjp` ties the two: differentiation
never enters the core, it multiplies the gradient that is there already by the incoming cotangent.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from drrho_core import _checks, risk
from drrho_core._arrays import namespace_of
from drrho_core.ambiguity import AmbiguitySet
from drrho_core.contrastive import contrastive_step
from drrho_core.estimator import check_index

Tree = TypeVar("Tree")
Array: TypeAlias = jax.Array
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
        Two arrays of shape (num_samples,) that hold ``-inf``.

    Raises
    ------
    TypeError
        If `num_samples` is no integer, or `dtype` is narrower than float32 or not available.
    ValueError
        If `num_samples` is below 1.

    Examples
    --------
    >>> init_state(3).log_inner_image.tolist()
    [-inf, -inf, -inf]
    """
    size = _checks.integer("num_samples", num_samples, minimum=1)
    wanted = jnp.dtype(dtype)
    if wanted not in (jnp.float32, jnp.float64) or jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise TypeError(f"dtype must be float32, or float64 where jax_enable_x64 is on, got {wanted}")
    unseen = jnp.full((size,), -jnp.inf, dtype=wanted)
    return ContrastiveState(unseen, unseen)


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
    tile_size: int | None = None,
    memory_budget: int | None = None,
) -> tuple[Array, ContrastiveState]:
    """Return the global contrastive loss of a batch, differentiable, and the updated state.

    Made for ``jax.value_and_grad(loss_function, has_aux=True)``, with or without `jax.jit`.

    Parameters
    ----------
    state : ContrastiveState
        What `init_state` or the previous step returned.
    image_features, text_features : array, shape (b, d)
        Features of the batch, unit norm (not enforced), b >= 2. Row i of both is a positive pair.
    sample_index : array of int, shape (b,)
        Stable row of every pair in the data set, in [0, num_samples), without repeats. Under `jax.jit` values cannot be
        looked at: an index out of range then makes the loss nan, a repeated one keeps one of its updates.
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
    tile_size, memory_budget : int, optional
        How it is computed, never what; see `drrho_core.contrastive_step`.

    Returns
    -------
    loss : array, shape ()
        Estimate of the objective with the updated inner estimates.
    state : ContrastiveState
        To be given to the next step. It carries no gradient.

    Raises
    ------
    TypeError
        If an argument is no JAX array or has a wrong dtype.
    ValueError
        If shapes or devices do not fit, or, outside tracing on the host, values break the rules above.
    NotImplementedError
        If it is differentiated twice.

    Notes
    -----
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
    _check_state(state)
    constant = ContrastiveState(*_constants(tuple(state)))
    num_samples = constant.log_inner_image.shape[0]
    check_index(sample_index, num_samples, like=constant.log_inner_image, xp=jnp)
    namespace_of({"image_features": image_features, "text_features": text_features}, jnp)
    _checks.ndim("image_features", image_features, 2, "(batch_size, feature_dim)")
    _checks.shape("sample_index", sample_index, (image_features.shape[0],), "(batch_size,)")
    images, texts, references = _wide((image_features, text_features, reference_features))
    # Under tracing nobody can look at the index. What is out of range reads nan, so that the loss shows it; negative
    # ones would count from the end.
    index = sample_index.astype(jnp.promote_types(sample_index.dtype, jnp.int32))
    rows = jnp.where(index < 0, num_samples, index)
    log_inner_image, log_inner_text = (side.at[rows].get(mode="fill", fill_value=jnp.nan) for side in constant)
    with jax.default_matmul_precision("float32"):
        step = contrastive_step(
            *_constants((images, texts)),
            log_inner_image,
            log_inner_text,
            temperature=_constants(temperature),
            gamma=_constants(gamma),
            reference_features=_constants(references),
            reference_weight=_constants(reference_weight),
            radius=_constants(radius),
            eps=_constants(eps),
            pair_mask=pair_mask,
            tile_size=tile_size,
            memory_budget=memory_budget,
            xp=jnp,
        )
    inputs = (images, texts, temperature)
    gradients = (step.image_gradient, step.text_gradient, step.temperature_gradient)
    new_state = ContrastiveState(
        constant.log_inner_image.at[rows].set(step.log_inner_image, mode="drop"),
        constant.log_inner_text.at[rows].set(step.log_inner_text, mode="drop"),
    )
    return _with_gradient(step.loss, *_matched(inputs, gradients)), new_state


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
        The learner's losses, real floating, any unit.
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
    DRRho (arXiv 2505.06699).

    Examples
    --------
    >>> from drrho_core import CVaR
    >>> loss, reference_loss = jnp.asarray([3.0, 2.0, 1.0]), jnp.asarray([2.9, 0.5, 0.5])
    >>> risk, gradient = jax.value_and_grad(drrho_risk)(loss, reference_loss, CVaR(0.5))  # one sample and a half
    >>> round(float(risk), 4), [round(weight, 4) for weight in gradient.tolist()]
    (1.1667, [0.0, 0.6667, 0.3333])
    """
    worst = risk.drrho_risk(
        *_constants((loss, reference_loss)),
        ambiguity_set,
        reference_weight=_constants(reference_weight),
        axis=axis,
        where=where,
        xp=jnp,
    )
    return jnp.squeeze(_with_gradient(jnp.expand_dims(worst.risk, axis), [loss], [worst.weights]), axis)


def _check_state(state: ContrastiveState) -> None:
    """Check the state's shapes; the core checks the dtypes of its rows."""
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"state must be a ContrastiveState, got {_checks.describe(state)}")
    for name, side in (("log_inner_image", state[0]), ("log_inner_text", state[1])):
        namespace_of({f"state.{name}": side}, jnp)
        _checks.ndim(f"state.{name}", side, 1, "(num_samples,)")
    _checks.shape("state.log_inner_text", state[1], state[0].shape, "(num_samples,)")


def _constants(tree: Tree) -> Tree:
    """Cut every array loose from differentiation; numbers and None stay as they are."""
    result: Tree = jax.tree.map(lambda x: jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x, tree)
    return result


def _wide(features: Tree) -> Tree:
    """Turn half features into float32, so that the cotangent (the loss scale) meets a gradient not yet rounded.

    Features that do not share one dtype are left alone: the core says what is wrong with them.
    """
    dtypes = {getattr(array, "dtype", None) for array in jax.tree.leaves(features)}
    if dtypes <= {jnp.dtype(jnp.float16)} or dtypes <= {jnp.dtype(jnp.bfloat16)}:
        result: Tree = jax.tree.map(lambda array: array.astype(jnp.float32), features)
        return result
    return features


def _matched(inputs: Any, gradients: Any) -> tuple[list[Array], list[Array]]:
    """Return the inputs that are arrays, in the dtype of their gradients, and those gradients."""
    pairs = [
        (x.astype(gradient.dtype), gradient)
        for x, gradient in zip(jax.tree.leaves(inputs), jax.tree.leaves(gradients), strict=True)
        if isinstance(x, jax.Array)
    ]
    return [x for x, _ in pairs], [gradient for _, gradient in pairs]


@jax.custom_vjp
def _with_gradient(value: Array, inputs: list[Array], gradients: list[Array]) -> Array:
    """Return `value`, of which differentiation says that its gradients with respect to `inputs` are `gradients`."""
    del inputs, gradients
    return value


def _forward(value: Array, inputs: list[Array], gradients: list[Array]) -> tuple[Array, list[Array]]:
    return value, _differentiable_once(gradients, inputs)


def _backward(gradients: list[Array], cotangent: Array) -> tuple[None, list[Array], None]:
    return None, [cotangent * gradient for gradient in gradients], None


_with_gradient.defvjp(_forward, _backward)


@jax.custom_jvp
def _differentiable_once(gradients: list[Array], inputs: list[Array]) -> list[Array]:
    """Return `gradients`: they are constants here, though not in truth, so their derivative must not be taken for 0."""
    del inputs
    return gradients


@_differentiable_once.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise NotImplementedError(
        "the contrastive loss and the DRRho risk must be differentiated once only, because their gradient is a closed "
        "form, got a second derivative"
    )
