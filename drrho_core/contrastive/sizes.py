"""The sizes of features, found once for all matrices of a step and for all ranks that share a batch.

Sums over negatives can be merged only if the matrices of similarities that they come from are scaled alike. The factors
of a matrix depend on the sizes of the features, see `drrho_core.contrastive.scaling`. So a step with several matrices,
or on several ranks, finds the largest sizes first and passes them to all matrices.
"""

from __future__ import annotations

from typing import Any

from drrho_core._array_api import Array, Namespace, PerAnchor, Scalar, all_visible, device_of
from drrho_core.contrastive.ranks import Ranks, largest_on_ranks
from drrho_core.contrastive.scaling import feature_sizes
from drrho_core.contrastive.tiles import cast, work_dtype


def common_sizes(
    features: tuple[Array, Array],
    references: tuple[Array, Array] | None,
    reference_weight: Scalar,
    temperature: PerAnchor,
    xp: Namespace,
    *,
    ranks: Ranks | None = None,
    same_sides: bool = False,
) -> list[Any] | None:
    """Return the `feature_sizes` that all matrices of a step share.

    If there are `ranks`, the sizes are those of all ranks together. If `same_sides` is True, the features of each side
    can be rows and columns of a matrix, so both sides get the larger size.
    """
    dtype = work_dtype(features[0], references, xp)
    first, second = cast(features, dtype, xp)
    references = cast(references, dtype, xp)
    temperatures = temperature if isinstance(temperature, tuple) else (temperature,)
    inputs = (first, second, *(references or ()), reference_weight, *temperatures)
    visible = all_visible((x for x in inputs if not isinstance(x, float)), xp)
    sizes = feature_sizes(first, second, references, visible, xp)
    if sizes is None:
        return None
    if same_sides:
        pairs = [sizes[place : place + 2] for place in range(0, len(sizes), 2)]
        sizes = [size for pair in pairs for size in [max(pair) if visible else xp.maximum(*pair)] * 2]
    if ranks is None:
        return sizes
    # A message is an array, so numbers become one.
    if visible:
        local = xp.asarray(sizes, dtype=dtype, device=device_of(first))
    else:
        local = xp.stack([xp.astype(size, dtype) for size in sizes])
    largest = largest_on_ranks(ranks, local, xp)
    return [float(largest[n]) if visible else largest[n] for n in range(len(sizes))]
