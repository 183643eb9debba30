"""Checks of the arguments that all contrastive objectives share; the checked options are ready for computation."""

from __future__ import annotations

from typing import Any, NamedTuple, Required, TypeAlias, TypedDict

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, PerAnchor, Scalar, device_of, is_array
from drrho_core._routines import refuse_kernels
from drrho_core._validate import (
    BOOLEAN,
    FINITE,
    FINITE_NOT_NEGATIVE,
    LOG_STATE,
    NOT_NEGATIVE,
    POSITIVE,
    STATE,
    UNIT_INTERVAL,
    Call,
)
from drrho_core.contrastive.agreement import agreed, distinct_on_ranks
from drrho_core.contrastive.blocks import choose_kernels
from drrho_core.contrastive.ranks import FORMS, Ranks
from drrho_core.contrastive.tiles import cast, tiling, work_dtype
from drrho_core.extend import Batch, BlockSweeps

AnchorWeight: TypeAlias = Array | tuple[Array, Array] | None
"""One array (b,) for the anchors of both directions, a pair with one array per direction, or None."""

SIDES = ("image", "text")
"""The names of the anchors of the first and of the second direction."""

SHARED = "several ranks share the batch"
"""The reason why most fused kernels cannot compute a batch: they compute no blocks; see `BlockSweeps`."""

OPTION_RULES = {
    "temperature": POSITIVE,
    "gamma": UNIT_INTERVAL,
    "reference_weight": NOT_NEGATIVE,
    "radius": NOT_NEGATIVE,
    "eps": NOT_NEGATIVE,
}
"""The options of a step that are numbers, or arrays of numbers, with the rule that their values obey."""


class StepArguments(TypedDict, total=False):
    """The options of a step, not checked yet; see `contrastive_step`, and for the last two `check_step_on_ranks`."""

    temperature: Required[PerAnchor]
    gamma: PerAnchor
    reference_features: tuple[Array, Array] | None
    reference_weight: Scalar
    radius: Scalar
    eps: Scalar
    pair_mask: Array | None
    anchor_weight: AnchorWeight
    tile_size: int | None
    memory_budget: int | None
    ranks: Ranks | None
    form: str
    sample_index: Array | None
    in_range: Array | None
    wait: bool


class StepOptions(NamedTuple):
    """The checked options of a step, in the dtype of the losses; a pair holds one entry per direction."""

    batch_size: int  # number of pairs on all ranks
    work: Any  # dtype of the matrix products
    temperature: PerAnchor  # as the user passed it, in the dtype of the matrix products
    temperatures: tuple[Array, Array]  # (b,) each
    gammas: tuple[Scalar, Scalar]
    anchor_weights: tuple[Scalar, Scalar]
    reference_weight: Scalar
    radius: Scalar
    eps: Scalar
    kernels: BlockSweeps | None  # fused kernels for the blocks of a batch that ranks share
    valid: Array | None = None  # shape (): whether all row ids are valid; None: they were read, or are not used


def check_step(
    features: tuple[Array, Array],
    states: tuple[Array, Array],
    sides: tuple[str, str],
    xp: Namespace | None,
    arguments: StepArguments,
) -> tuple[Namespace, StepOptions]:
    """Check all arguments of a step and return the namespace and the options."""
    ranks = arguments.get("ranks")
    form, tile_size = arguments.get("form", FORMS[0]), arguments.get("tile_size")
    num_ranks, memory_budget = 1, arguments.get("memory_budget")
    if not (ranks is None and tile_size is None and memory_budget is None):
        num_ranks = check_how(ranks, form, tile_size, memory_budget)
    references, pair_mask = arguments.get("reference_features"), arguments.get("pair_mask")
    arrays = {f"{side}_features": x for side, x in zip(sides, features, strict=True)}
    arrays |= {f"log_inner_{side}": x for side, x in zip(sides, states, strict=True)}
    arrays |= reference_pair(references, sides)
    if pair_mask is not None:
        arrays["pair_mask"] = pair_mask
    if arguments.get("sample_index") is not None:
        arrays["sample_index"] = arguments["sample_index"]
    # These options may be numbers or arrays. Options that are arrays are checked together with the features.
    options = {name: arguments.get(name) for name in (*OPTION_RULES, "anchor_weight")}
    call = _validate.arrays(arrays, xp, options=options)
    if ranks is not None and sides == SIDES:
        refuse_kernels(SHARED, call.xp)
    batch_size, valid = check_features(call, sides, num_ranks), None
    if "sample_index" in arrays:
        check_sample_index(call, batch_size)
        if ranks is None:
            valid = distinct_on_ranks(call.arrays["sample_index"], None, call.xp, arguments.get("in_range"))
    # The batch's rows of the state: -inf is legal and means that a sample was never visited.
    for side in sides:
        call.array(f"log_inner_{side}", STATE, shape=(batch_size,), meaning="(batch_size,)", rule=LOG_STATE)

    # Matrix products are computed in the features' dtype (half types: in float32), and numbers per anchor in this dtype
    # or in the state's, whichever is wider.
    xp, work = call.xp, work_dtype(features[0], references, call.xp)
    wide = xp.result_type(work, states[0].dtype, states[1].dtype)
    rules = OPTION_RULES
    temperature = call.option(
        "temperature", arguments["temperature"], rules["temperature"], work, per_anchor=batch_size, sides=sides
    )
    gamma = call.option("gamma", arguments.get("gamma", 1.0), rules["gamma"], wide, per_anchor=batch_size, sides=sides)
    reference_weight = call.option(
        "reference_weight", arguments.get("reference_weight", 1.0), rules["reference_weight"], work
    )
    radius = call.option("radius", arguments.get("radius", 0.0), rules["radius"], wide)
    eps = call.option("eps", arguments.get("eps", 0.0), rules["eps"], wide)
    check_pair_mask(call, batch_size, num_ranks)
    kernels = None
    if ranks is not None and sides == SIDES:
        temperatures = per_anchor(temperature, features[0], work, xp)
        kernels = choose_kernels(Batch(*features, references, reference_weight, *temperatures, pair_mask), ranks, xp)
    return xp, StepOptions(
        batch_size=num_ranks * batch_size,
        work=work,
        temperature=temperature,
        temperatures=per_anchor(temperature, features[0], wide, xp),
        gammas=gamma if isinstance(gamma, tuple) else (gamma, gamma),
        anchor_weights=check_anchor_weight(call, arguments.get("anchor_weight"), batch_size, wide),
        reference_weight=reference_weight,
        radius=radius,
        eps=eps,
        kernels=kernels,
        valid=valid,
    )


def check_step_on_ranks(
    features: tuple[Array, Array],
    states: tuple[Array, Array],
    sides: tuple[str, str],
    xp: Namespace | None,
    arguments: StepArguments,
) -> tuple[Namespace, StepOptions]:
    """Return the result of `check_step` for a batch that several ranks share.

    An error of one rank is raised on all ranks, and so is an error about arguments that differ between ranks although
    they have to be the same. The arguments ``wait`` and ``in_range`` are those of `agreed` and `distinct_on_ranks`.
    """
    named = {f"{side}_features": x for side, x in zip(sides, features, strict=True)}
    named |= {f"log_inner_{side}": x for side, x in zip(sides, states, strict=True)}
    named |= {name: value for name, value in arguments.items() if name not in ("wait", "in_range")}
    ranks, sample_index, wait = arguments["ranks"], arguments.get("sample_index"), arguments.get("wait", False)
    checked = agreed(
        lambda: check_step(features, states, sides, xp, arguments),
        named,
        ranks,
        wait=wait,
        kernels=(lambda result: result[1].kernels) if sides == SIDES else None,
    )
    if sample_index is None:
        return checked
    xp, options = checked
    return xp, options._replace(valid=distinct_on_ranks(sample_index, ranks, xp, arguments.get("in_range")))


def reference_pair(references: Any, sides: tuple[str, str] = SIDES) -> dict[str, Array]:
    """Check that the reference features are a pair and return both arrays by name; for None return an empty dict."""
    if references is None:
        return {}
    if not isinstance(references, (tuple, list)) or len(references) != 2:
        pair, received = ", ".join(sides), _validate.describe(references)
        raise TypeError(f"reference_features must be a pair ({pair}) of arrays, got {received}")
    return {"reference_features[0]": references[0], "reference_features[1]": references[1]}


def check_how(ranks: Ranks | None, form: str, tile_size: int | None, memory_budget: int | None) -> int:
    """Check the settings that say how a batch is computed and shared, and return the number of ranks.

    They are checked here and not where they are used, because there a rank would raise its error alone, while other
    ranks wait for its messages.
    """
    tiling(1, 1, tile_size, memory_budget)
    if ranks is None:
        return 1
    if form not in FORMS:
        raise ValueError(f"form must be {FORMS[0]!r} or {FORMS[1]!r}, got {_validate.describe(form)}")
    return ranks.size


def check_features(call: Call, sides: tuple[str, str] = SIDES, num_ranks: int = 1) -> int:
    """Check the features by the rules that hold for all contrastive objectives, and return the batch size.

    If several ranks share the batch, this is the number of the own pairs, which may be 1.
    """
    first, second = f"{sides[0]}_features", f"{sides[1]}_features"
    # The second array of features has to have the shape of the first.
    meaning = "(batch_size, feature_dim)"
    features = call.array(first, axes=2, meaning=meaning)
    batch_size = int(features.shape[0])
    if num_ranks > 1 and batch_size == 0:
        raise ValueError(f"{first} must hold at least 1 pair on each rank, got 0")
    if batch_size * num_ranks < 2:
        raise ValueError(f"{first} must hold at least 2 pairs, because one pair has no negatives, got {batch_size}")
    call.values(first, features, FINITE)
    call.array(second, axes=2, shape=tuple(features.shape), meaning=meaning, rule=FINITE)
    call.same_dtype(first, second)
    if "reference_features[0]" in call.arrays:
        # The reference features may have another width than the learner's, but both arrays have the same width.
        shape: tuple[int, ...] = (batch_size, *call.arrays["reference_features[0]"].shape[1:])
        for name in ("reference_features[0]", "reference_features[1]"):
            call.array(name, axes=2, shape=shape, meaning="(batch_size, reference_dim)", rule=FINITE)
        call.same_dtype("reference_features[0]", "reference_features[1]")
    return batch_size


def check_pair_mask(call: Call, batch_size: int, num_ranks: int = 1) -> None:
    """Check the mask of negatives, if there is one; a rank has the rows of its own images only."""
    if "pair_mask" in call.arrays:
        shape = (batch_size, num_ranks * batch_size)
        columns = "batch_size" if num_ranks == 1 else "number of ranks * batch_size"
        call.array("pair_mask", BOOLEAN, shape=shape, meaning=f"(batch_size, {columns})")


def check_sample_index(call: Call, batch_size: int) -> None:
    """Check the form of the row ids of the own pairs; a table of estimates checks their range."""
    index = call.arrays["sample_index"]
    if not call.xp.isdtype(index.dtype, "integral"):
        raise TypeError(f"sample_index must have an integer dtype, got {index.dtype}")
    _validate.shape("sample_index", index, (batch_size,), "(batch_size,)")


def check_anchor_weight(call: Call, anchor_weight: Any, batch_size: int, dtype: Any) -> tuple[Scalar, Scalar]:
    """Check the factors on the anchors, cast them to `dtype` and return both directions' factors; None means 1.0."""
    if anchor_weight is None:
        return 1.0, 1.0
    is_pair = isinstance(anchor_weight, (tuple, list))
    weights = tuple(anchor_weight) if is_pair else (anchor_weight,)
    if is_pair and len(weights) != 2:
        raise ValueError(f"anchor_weight must be an array or a pair of arrays, got {len(weights)} entries")
    checked = []
    for position, weight in enumerate(weights):
        name = f"anchor_weight[{position}]" if is_pair else "anchor_weight"
        if not is_array(weight):
            raise TypeError(f"{name} must be an array of shape (batch_size,), got {_validate.describe(weight)}")
        call.array(name, shape=(batch_size,), meaning="(batch_size,)")
        # If the values cannot be read, no error is raised, and an entry outside the domain becomes nan.
        _validate.parameter_values(name, weight, FINITE_NOT_NEGATIVE, dtype, call.xp)
        checked.append(_validate.within(cast(weight, dtype, call.xp), NOT_NEGATIVE, call.xp))
    return checked[0], checked[-1]


def per_anchor(value: PerAnchor, like: Array, dtype: Any, xp: Namespace) -> tuple[Array, Array]:
    """Turn a scalar, or a pair of arrays, into one array (b,) for the image anchors and one for the text anchors."""
    if isinstance(value, tuple):
        return xp.astype(value[0], dtype), xp.astype(value[1], dtype)
    # A scalar is copied to all anchors, so that kernels and the state's update handle one form only.
    shape = (like.shape[0],)
    if isinstance(value, float):
        spread = xp.full(shape, value, dtype=dtype, device=device_of(like))
    else:
        spread = xp.broadcast_to(xp.astype(value, dtype), shape)
    return spread, spread
