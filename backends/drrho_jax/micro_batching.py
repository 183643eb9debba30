"""Encoders in micro-batches, one loss over the whole batch: GradCache (arXiv 2101.06983) with `jax.vjp`.

Shapes: b samples in the batch, `size` samples in a micro-batch, features (b, d).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from drrho_core import checks
from drrho_jax.arguments import as_jax_array
from drrho_jax.loops import varied, varying_axes

Tree: TypeAlias = Any
"""A pytree of arrays, that is nested tuples, lists and dictionaries of arrays."""

Features: TypeAlias = tuple[jax.Array, jax.Array]


def micro_batches(
    encode: Callable[[Tree, Tree], Features],
    parameters: Tree,
    inputs: Tree,
    loss: Callable[..., tuple[jax.Array, Any]],
    /,
    *,
    size: int,
) -> tuple[tuple[jax.Array, Any], Tree]:
    """Return loss, state and gradient of a whole batch, with the activations of `size` samples in memory at a time.

    The result is that of ``jax.value_and_grad(..., has_aux=True)`` over encoders and loss: every sample is compared
    with all negatives of the batch. Each sample is encoded twice, once for its features and once for the gradient.

    Parameters
    ----------
    encode : callable
        ``encode(parameters, micro_batch)`` returns image and text features, (rows, d) each. It is a pure function, and
        no row of its results depends on another row (no batch normalisation).
    parameters : pytree of floating arrays
        The parameters of the encoders and, if they are learned, those of the loss.
    inputs : pytree of arrays
        The batch; every array has b rows. A micro-batch is a pytree of the same structure with `size` rows.
    loss : callable
        ``loss(image_features, text_features)`` returns loss and state as `contrastive_loss` does. If `loss` has a third
        positional parameter without a default, `loss` is called as ``loss(image_features, text_features, parameters)``.
        The gradient then includes the parameters that the loss itself uses, such as a learned temperature. Every other
        value that the loss uses is a constant.
    size : int
        Samples per micro-batch, at least 1; the last micro-batch may be smaller.

    Returns
    -------
    (loss, state) : tuple
        The results of `loss`.
    gradient : pytree
        The gradient of the loss with respect to `parameters`, with the same structure and dtypes. The gradients of
        micro-batches are summed in float32 or wider.

    Raises
    ------
    TypeError
        If the parameters are not floating arrays, `inputs` holds no arrays, `encode` does not return a pair of arrays,
        or `loss` does not return a pair of a scalar and a state.
    ValueError
        If the arrays of `inputs` have different numbers of rows, `size` is below 1, or the features of a micro-batch do
        not have one row per sample.

    Notes
    -----
    Put random keys into `inputs`: then both passes encode a sample with the same key, and dropout is the same. Give
    each sample a key, ``inputs = (images, tokens, jax.random.split(key, b))``, and let `encode` use the keys with
    `jax.vmap`; then the result does not depend on `size`. If a layer takes one key per call, `encode` can use the key
    of the first row, ``keys[0]``, for the micro-batch. A key from outside of `inputs` draws the same noise for every
    micro-batch.

    Inside `jax.shard_map` with ``check_vma=True``, `inputs` holds the rows of the device, and the gradient is summed
    over the devices once, after the last micro-batch. For this `encode` gets parameters that vary along the mapped axes
    of the batch, although all devices hold the same numbers.

    The function works eagerly and inside `jax.jit`. The gradient is the closed form of `contrastive_loss`, so results
    cannot be differentiated again.

    Examples
    --------
    >>> from drrho_jax import contrastive_loss, init_state
    >>> def encode(parameters, micro_batch):
    ...     images, texts = micro_batch
    ...     return images @ parameters["image"], texts @ parameters["text"]
    >>> def loss(image_features, text_features, parameters):
    ...     temperature = jnp.exp(parameters["log_temperature"])  # the temperature is learned
    ...     state, index = init_state(4), jnp.arange(4)
    ...     return contrastive_loss(state, image_features, text_features, index, temperature=temperature)
    >>> parameters = {"image": jnp.eye(4), "text": jnp.eye(4), "log_temperature": jnp.log(0.5)}
    >>> inputs = (jnp.eye(4), jnp.roll(jnp.eye(4), 1, axis=0))
    >>> (value, state), gradient = micro_batches(encode, parameters, inputs, loss, size=2)
    >>> round(float(value), 4), gradient["image"].shape, gradient["log_temperature"].shape
    (0.5705, (4, 4), ())
    """
    size = checks.integer("size", size, minimum=1)
    _check_parameters(parameters)
    inputs, batch_size = _rows(inputs)
    # A loop with one compiled body encodes the full micro-batches; the last, smaller one follows the loop.
    whole, rest = divmod(batch_size, size)

    def parts(tree: Tree) -> tuple[Tree, Tree]:
        """Split rows into a stack of full micro-batches, (whole, size, ...), and the rows that are left."""
        stack = jax.tree.map(lambda x: x[: whole * size].reshape(whole, size, *x.shape[1:]), tree)
        return stack, jax.tree.map(lambda x: x[whole * size :], tree)

    def checked_encode(parameters: Tree, micro_batch: Tree) -> Features:
        return _checked_features(encode(parameters, micro_batch), len(jax.tree.leaves(micro_batch)[0]))

    # Pass 1: features of all samples. `lax.map` is a loop, so the activations of a micro-batch are freed at the end of
    # each iteration.
    stacked_inputs, left_inputs = parts(inputs)
    pieces = []
    if whole:
        stacked = jax.lax.map(lambda micro_batch: checked_encode(parameters, micro_batch), stacked_inputs)
        pieces.append(tuple(side.reshape(whole * size, *side.shape[2:]) for side in stacked))
    if rest:
        pieces.append(checked_encode(parameters, left_inputs))
    features = tuple(jnp.concatenate(sides) if len(sides) > 1 else sides[0] for sides in zip(*pieces, strict=True))

    # Compute the loss L of the whole batch and the gradient dL/dE with respect to the features E. `direct` holds the
    # gradient of the parameters that the loss itself uses.
    arguments = (*features, parameters) if _takes_parameters(loss) else features
    value, pullback, state = jax.vjp(lambda *arguments: _checked_loss(loss(*arguments)), *arguments, has_aux=True)
    image_gradient, text_gradient, *direct = pullback(jnp.ones_like(value))

    # Inside `jax.shard_map` JAX sums the gradient of a parameter that is the same on all devices, once for each use of
    # the parameter. If the parameter counts as varying, the sum can wait until all micro-batches are done.
    of_devices = varied(parameters, varying_axes(features[0]) & varying_axes(features[1]))

    # Pass 2: encode each micro-batch again and apply the chain rule, dL/dE times dE/dparameters.
    def add(total: Tree, part: tuple[Tree, Features]) -> Tree:
        micro_batch, cotangents = part
        _, pullback = jax.vjp(lambda parameters: checked_encode(parameters, micro_batch), of_devices)
        (gradient,) = pullback(cotangents)
        return jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, gradient)

    total = jax.tree.map(_zeros_for_sum, of_devices)
    stacked_gradients, left_gradients = parts((image_gradient, text_gradient))
    if whole:
        total, _ = jax.lax.scan(lambda sums, part: (add(sums, part), None), total, (stacked_inputs, stacked_gradients))
    if rest:
        total = add(total, (left_inputs, left_gradients))
    total = _summed_over_devices(total, parameters)
    if direct:
        total = jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, direct[0])
    gradient = jax.tree.map(lambda x, parameter: x.astype(jnp.result_type(parameter)), total, parameters)
    return (value, state), gradient


def _zeros_for_sum(parameter: Any) -> jax.Array:
    """Return the start of a sum of gradients of a parameter; the zeros vary along the same axes as the parameter."""
    # Sums over many micro-batches are kept in float32, because half types would lose the small terms.
    dtype = jnp.promote_types(jnp.result_type(parameter), jnp.float32)
    zeros: jax.Array = varied(jnp.zeros_like(parameter, dtype=dtype), varying_axes(parameter))
    return zeros


def _summed_over_devices(gradient: Tree, parameters: Tree) -> Tree:
    """Return the gradient, summed along the axes along which the gradient varies and the parameter does not."""
    leaves, structure = jax.tree.flatten(gradient)
    axes = [
        tuple(sorted(varying_axes(x) - varying_axes(parameter)))
        for x, parameter in zip(leaves, jax.tree.leaves(parameters), strict=True)
    ]
    # All arrays that are summed along the same axes are one message. Several processes must send in the same order.
    for names in sorted(set(axes) - {()}):
        places = [place for place, own in enumerate(axes) if own == names]
        sums = jax.lax.psum([leaves[place] for place in places], names)  # type: ignore[no-untyped-call]
        for place, x in zip(places, sums, strict=True):
            leaves[place] = x
    return jax.tree.unflatten(structure, leaves)


def _check_parameters(parameters: Tree) -> None:
    """Check that every parameter has a floating dtype: integers have no gradient."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            received = checks.describe(leaf)
            raise TypeError(f"parameters{jax.tree_util.keystr(path)} must have a real floating dtype, got {received}")


def _rows(inputs: Tree) -> tuple[Tree, int]:
    """Return the inputs as JAX arrays, and the number of rows, after checking that all arrays have the same number."""
    leaves = jax.tree_util.tree_leaves_with_path(inputs)
    if not leaves:
        raise TypeError("inputs must hold at least one array, got none")
    first, rows, arrays = "", 0, []
    for path, leaf in leaves:
        name = f"inputs{jax.tree_util.keystr(path)}"
        if not checks.is_array(leaf) or leaf.ndim == 0:
            raise TypeError(f"{name} must be an array with one row per sample, got {checks.describe(leaf)}")
        if not first:
            first, rows = name, int(leaf.shape[0])
        elif leaf.shape[0] != rows:
            raise ValueError(f"{name} must have as many rows as {first} ({rows}), got {leaf.shape[0]}")
        arrays.append(as_jax_array(name, leaf))
    if rows == 0:
        raise ValueError(f"{first} must have at least one row, got shape {tuple(arrays[0].shape)}")
    return jax.tree.unflatten(jax.tree.structure(inputs), arrays), rows


def _checked_features(features: Any, rows: int) -> Features:
    """Return the result of `encode` after checking that it is a pair of arrays with one row per sample."""
    if not isinstance(features, (tuple, list)) or len(features) != 2 or not all(map(checks.is_array, features)):
        raise TypeError(f"encode must return a pair (image, text) of arrays, got {checks.describe(features)}")
    for side in features:
        if side.ndim == 0 or side.shape[0] != rows:
            raise ValueError(f"encode must return one row per sample ({rows}), got shape {tuple(side.shape)}")
    return features[0], features[1]


def _checked_loss(result: Any) -> tuple[jax.Array, Any]:
    """Return the result of `loss` after checking that it is a pair of a scalar and a state."""
    if not isinstance(result, (tuple, list)) or len(result) != 2 or getattr(result[0], "shape", None) != ():
        raise TypeError(f"loss must return a pair (scalar loss, state), got {checks.describe(result)}")
    return result[0], result[1]


def _takes_parameters(loss: Callable[..., Any]) -> bool:
    """Tell whether `loss` has a third positional parameter without a default."""
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):
        # The parameters of a builtin are unknown.
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in signature.parameters.values() if p.kind in kinds and p.default is inspect.Parameter.empty]
    return len(required) == 3
