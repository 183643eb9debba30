"""The training methods, in one table: to add a method, add a line to `METHODS`.

An objective takes the features of a batch. It returns the loss, the gradient of the loss in closed form, and the new
inner estimates of the batch (running averages, one per sample and direction). A method is an objective together with
the defaults that the method changes: the scheme of the temperature, the schedule of gamma and others. Shapes: batch b,
feature_dim d.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from drrho_clip.selection import select_joint, select_rho
from drrho_core import (
    ContrastiveStep,
    Ranks,
    contrastive_step,
    distillation_loss,
    info_nce,
    scent_gamma,
    sharded_contrastive_step,
    sigmoid_loss,
    weighted_sum,
)
from drrho_core.checks import Array, Namespace

if TYPE_CHECKING:
    from drrho_clip.config import TrainConfig
    from drrho_clip.step import StepBatch

LOG_SCALE = "log_scale"
"""The scheme of CLIP and SigLIP: the optimiser learns log(1 / temperature) together with the parameters."""

DISTILL = "distill:"
"""The prefix of a method whose loss is the loss of another method plus the distillation loss."""


class ObjectiveResult(NamedTuple):
    """The result of an objective: the fields of `drrho_core.ContrastiveStep`, and the gradient of a bias.

    Attributes
    ----------
    loss, surrogate : array, shape ()
        Estimate of the objective, and the scalar whose gradient the next fields hold.
    image_gradient, text_gradient : array, shape (b, d)
    temperature_gradient : array, shape (), or pair of arrays, shape (b,)
    log_inner_image, log_inner_text : array, shape (b,)
        The new inner estimates; the old ones if the method keeps no estimates.
    bias_gradient : array, shape (), or None
        None if the loss has no bias.
    """

    loss: Array
    surrogate: Array
    image_gradient: Array
    text_gradient: Array
    temperature_gradient: Any
    log_inner_image: Array
    log_inner_text: Array
    bias_gradient: Array | None = None


class ObjectiveInputs(NamedTuple):
    """The arguments of an objective.

    Attributes
    ----------
    image_features, text_features : array, shape (b, d)
        Features of unit norm.
    batch : StepBatch
        The other arrays of the step.
    temperature : array, shape (), or pair of arrays, shape (b,)
        The temperature of all anchors, or one per image and one per text.
    config : TrainConfig
        The settings of the run.
    xp : namespace
        The namespace of the arrays.
    ranks : Ranks, optional
        The processes that share the batch, each of which passes the own rows. The loss and the gradients of numbers are
        then those of the whole batch, and the other results belong to the own rows.
    """

    image_features: Array
    text_features: Array
    batch: StepBatch
    temperature: Any
    config: TrainConfig
    xp: Namespace
    ranks: Ranks | None = None


Objective: TypeAlias = "Callable[[ObjectiveInputs], ObjectiveResult]"
"""The loss of a batch with gradients; see the head of this file."""


Select: TypeAlias = "Callable[[Array, Array, StepBatch, TrainConfig, Namespace], Array]"
"""``select(learner_logits, reference_logits, super_batch, config, xp)`` returns the positions of the chosen pairs."""


class Method(NamedTuple):
    """A training method, as the training loop uses it.

    Attributes
    ----------
    summary : str
        A few words about the objective, which the help shows.
    objective : callable
        See `Objective`.
    needs_reference : bool
        The method reads the features of a reference model.
    needs_reference_temperature : bool
        The method also divides the similarities of the reference model by a temperature.
    keeps_estimates : bool
        The objective updates two inner estimates per sample. Only then may the method learn one temperature per sample.
    has_radius : bool
        The objective is multiplied by the temperature and has the setting `radius`, which must then be above 0 if the
        temperature is learned.
    has_bias : bool
        The optimiser also learns the bias of the sigmoid loss.
    select : callable, optional
        See `Select`; the method trains on a part of each super-batch. Such a method keeps no estimates.
    draws_noise : bool
        The selection is random.
    defaults : mapping
        The defaults that the method changes, by the name of the setting; see `DEFAULTS`.
    settings : frozenset of str
        The settings of `OPTIONAL` that the method uses. A new run with another value of one of the rest is refused.
    """

    summary: str
    objective: Objective
    needs_reference: bool = False
    needs_reference_temperature: bool = False
    keeps_estimates: bool = True
    has_radius: bool = True
    has_bias: bool = False
    select: Select | None = None
    draws_noise: bool = False
    defaults: Mapping[str, Any] = {}
    settings: frozenset[str] = frozenset()


def _without_estimates(plain: Any, batch: StepBatch, temperature_gradient: Any, bias_gradient: Any) -> ObjectiveResult:
    """Return the result of a loss that needs no inner estimates, which therefore do not change."""
    # The surrogate, the scalar whose gradient is returned, is the loss itself.
    return ObjectiveResult(
        loss=plain.loss,
        surrogate=plain.loss,
        image_gradient=plain.image_gradient,
        text_gradient=plain.text_gradient,
        temperature_gradient=temperature_gradient,
        log_inner_image=batch.log_inner_image,
        log_inner_text=batch.log_inner_text,
        bias_gradient=bias_gradient,
    )


def _info_nce(inputs: ObjectiveInputs) -> ObjectiveResult:
    """CLIP's loss, InfoNCE: each sample is compared with all samples of the batch, and no inner estimate is used."""
    plain = info_nce(
        inputs.image_features,
        inputs.text_features,
        temperature=inputs.temperature,
        anchor_weight=inputs.batch.anchor_weight,
        pair_mask=inputs.batch.pair_mask,
        ranks=inputs.ranks,
        form=inputs.config.form,
        xp=inputs.xp,
    )
    return _without_estimates(plain, inputs.batch, plain.temperature_gradient, None)


def _sigmoid(inputs: ObjectiveInputs) -> ObjectiveResult:
    """SigLIP's loss: each pair of the batch is classified as positive or negative on its own, with a learned bias."""
    batch, config = inputs.batch, inputs.config
    scale = 1.0 / inputs.temperature
    bias = config.bias if batch.bias is None else batch.bias
    plain = sigmoid_loss(
        inputs.image_features,
        inputs.text_features,
        scale=scale,
        bias=bias,
        pair_mask=batch.pair_mask,
        ranks=inputs.ranks,
        form=config.form,
        xp=inputs.xp,
    )
    # The scale is 1 / temperature, so d(scale) / d(temperature) = -scale^2.
    temperature_gradient = -scale * scale * plain.scale_gradient
    return _without_estimates(plain, batch, temperature_gradient, plain.bias_gradient)


def _global_contrastive(
    inputs: ObjectiveInputs,
    *,
    steered: bool = False,
    scaled: bool = True,
    gamma_of: Callable[[ObjectiveInputs], Any] | None = None,
) -> ObjectiveResult:
    """Return the global contrastive loss, which compares each sample with all samples of the data set.

    Inner estimates stand for the samples that are not in the batch. If `steered` is True, the similarities of the
    reference model are subtracted: the loss of DRRho-CLIP. If `scaled` is False, the loss is not multiplied by the
    temperature. `gamma_of` returns gamma; by default the schedule of the run does.
    """
    batch, temperature, config, ranks = inputs.batch, inputs.temperature, inputs.config, inputs.ranks
    take = contrastive_step if ranks is None else partial(sharded_contrastive_step, ranks=ranks, form=config.form)
    step = take(
        inputs.image_features,
        inputs.text_features,
        batch.log_inner_image,
        batch.log_inner_text,
        temperature=temperature,
        gamma=batch.gamma if gamma_of is None else gamma_of(inputs),
        reference_features=batch.reference_features if steered else None,
        reference_weight=config.reference_weight,
        radius=config.radius if scaled else 0.0,
        eps=config.eps,
        anchor_weight=batch.anchor_weight,
        pair_mask=batch.pair_mask,
        xp=inputs.xp,
    )
    result = ObjectiveResult(*step)
    if scaled:
        return result
    # One temperature t holds for all anchors, so the loss is F / t, with F the loss times t. The derivative of F / t is
    # (dF/dt - F / t) / t.
    loss = step.loss / temperature
    return result._replace(
        loss=loss,
        surrogate=step.surrogate / temperature,
        image_gradient=step.image_gradient / temperature,
        text_gradient=step.text_gradient / temperature,
        temperature_gradient=(step.temperature_gradient - loss) / temperature,
    )


def _gamma_per_sample(inputs: ObjectiveInputs) -> Any:
    """SCENT's gamma, one per sample and direction: it is small if the old estimate is small."""
    return tuple(
        scent_gamma(log_inner, log_alpha=inputs.config.log_alpha, xp=inputs.xp)
        for log_inner in (inputs.batch.log_inner_image, inputs.batch.log_inner_text)
    )


def _distilled(inputs: ObjectiveInputs, *, objective: Objective) -> ObjectiveResult:
    """Return the loss of another method plus MobileCLIP's distillation loss, which has a weight."""
    batch, temperature, config = inputs.batch, inputs.temperature, inputs.config
    own = objective(inputs)
    # With one temperature per sample the softmax over a batch has no temperature of its own; it keeps the start value.
    shared = not isinstance(temperature, tuple)
    assert batch.reference_features is not None
    teacher = distillation_loss(
        inputs.image_features,
        inputs.text_features,
        *batch.reference_features,
        temperature=temperature if shared else config.temperature,
        reference_temperature=config.reference_temperature,
        ranks=inputs.ranks,
        form=config.form,
        xp=inputs.xp,
    )
    weight = config.distillation_weight
    total = weighted_sum((1.0, ContrastiveStep(*own[:-1])), (weight, teacher), xp=inputs.xp)
    temperature_gradient = own.temperature_gradient
    if shared:
        temperature_gradient = temperature_gradient + weight * teacher.temperature_gradient
    return own._replace(
        loss=total.loss,
        surrogate=own.surrogate + weight * teacher.loss,
        image_gradient=total.image_gradient,
        text_gradient=total.text_gradient,
        temperature_gradient=temperature_gradient,
    )


DEFAULTS: dict[str, Any] = {
    "temperature": 0.07,
    "temperature_scheme": "fixed",
    "temperature_learning_rate": 1e-4,
    "temperature_min": 0.01,
    "temperature_slow_below": None,
    "radius": 0.0,
    "gamma_min": 0.5,
    "gamma_schedule": "epoch",
    "gamma_share": 1.0,
    "super_batch": 1,
    "bias": -10.0,
}
"""The defaults that a method may change, with the values for all other methods."""

_GAMMA = frozenset({"gamma_min", "gamma_schedule", "gamma_share"})
_GLOBAL = _GAMMA | {"anchor_weights", "eps"}
_DISTILLS = frozenset({"distillation_weight", "reference_temperature"})
_SELECTION = frozenset({"super_batch", "jest_chunks", "reference_temperature"})

OPTIONAL = _GLOBAL | _DISTILLS | _SELECTION | {"reference_weight", "log_alpha", "bias"}
"""The settings that belong to some methods only, beyond those with a rule of their own in `setting_rules`."""

_FASTCLIP: dict[str, Any] = {"gamma_min": 0.2, "gamma_share": 0.5}

# The help lists the methods in this order.
METHODS: dict[str, Method] = {
    "clip": Method(
        "InfoNCE of the batch",
        _info_nce,
        keeps_estimates=False,
        has_radius=False,
        settings=frozenset({"anchor_weights"}),
    ),
    "sogclr": Method("global contrastive loss", _global_contrastive, settings=_GLOBAL),
    "drrho": Method(
        "global contrastive loss steered by a reference model",
        partial(_global_contrastive, steered=True),
        needs_reference=True,
        settings=_GLOBAL | {"reference_weight"},
    ),
    "siglip": Method(
        "sigmoid loss of the batch, with a learned temperature and a learned bias",
        _sigmoid,
        keeps_estimates=False,
        has_radius=False,
        has_bias=True,
        # SigLIP starts with a scale of 10 and has no bound on the scale.
        defaults={"temperature": 0.1, "temperature_scheme": LOG_SCALE, "temperature_min": 1e-4},
        settings=frozenset({"bias"}),
    ),
    # The four versions of FastCLIP (arXiv 2407.01445), with the numbers of the authors' runs on CC3M.
    "fastclip-v0": Method(
        "global contrastive loss, not multiplied by the temperature, which is learned",
        partial(_global_contrastive, scaled=False),
        has_radius=False,
        defaults=_FASTCLIP | {"temperature_scheme": LOG_SCALE},
        settings=_GLOBAL,
    ),
    "fastclip-v1": Method(
        "global contrastive loss with a fixed temperature", _global_contrastive, defaults=_FASTCLIP, settings=_GLOBAL
    ),
    "fastclip-v2": Method(
        "robust global contrastive loss with one learned temperature per sample (RGCL)",
        _global_contrastive,
        # The rate is ours: the authors divide their step by a moving average of squares, iSogCLR's step does not.
        defaults=_FASTCLIP
        | {"temperature_scheme": "per_sample", "temperature": 0.03, "radius": 7.0, "temperature_learning_rate": 1e-3},
        settings=_GLOBAL,
    ),
    "fastclip-v3": Method(
        "robust global contrastive loss with one learned temperature (RGCL-g)",
        _global_contrastive,
        defaults=_FASTCLIP
        | {
            "temperature_scheme": "global",
            "radius": 6.5,
            "temperature_learning_rate": 2e-4,
            "temperature_slow_below": 0.03,
        },
        settings=_GLOBAL,
    ),
    "scent": Method(
        "global contrastive loss with a gamma per sample",
        partial(_global_contrastive, gamma_of=_gamma_per_sample),
        settings=(_GLOBAL - _GAMMA) | {"log_alpha"},
    ),
}

# RHO-LOSS (arXiv 2206.07137) keeps a tenth of each super-batch, JEST (arXiv 2406.17711) a fifth.
_SELECTS = METHODS["clip"]._replace(
    needs_reference=True, needs_reference_temperature=True, settings=METHODS["clip"].settings | _SELECTION
)
METHODS |= {
    "rho": _SELECTS._replace(
        summary="InfoNCE of the pairs with the largest excess loss",
        select=select_rho,
        defaults={"super_batch": 10},
        settings=_SELECTS.settings - {"jest_chunks"},
    ),
    "jest": _SELECTS._replace(
        summary="InfoNCE of a part of a super-batch that is drawn jointly",
        select=select_joint,
        draws_noise=True,
        defaults={"super_batch": 5},
    ),
    "jest-topk": _SELECTS._replace(
        summary="like jest, but with the best pairs instead of random pairs",
        select=select_joint,
        defaults={"super_batch": 5},
    ),
}

METHODS |= {
    f"{DISTILL}{name}": method._replace(
        summary=f"{name} plus distillation",
        objective=partial(_distilled, objective=method.objective),
        needs_reference=True,
        needs_reference_temperature=True,
        # The distillation loss has no weights of anchors, so a weight would count in a part of the loss only.
        settings=(method.settings | _DISTILLS) - {"anchor_weights"},
    )
    for name, method in METHODS.items()
}


BASIC = tuple(name for name in METHODS if not name.startswith(DISTILL))
"""The names of the methods without distillation."""
