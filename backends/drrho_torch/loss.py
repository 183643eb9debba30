"""The contrastive loss as a torch module, and the DRRho risk, both differentiable through their closed-form gradients.

The core returns values together with closed-form gradients. Here a `torch.autograd.Function` ties the two: autograd
never enters the core, it multiplies the gradient that is there already by the incoming one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import array_api_compat.torch
import torch
from torch import Tensor, nn

from drrho_core import _checks, risk
from drrho_core._arrays import namespace_of
from drrho_core.ambiguity import AmbiguitySet
from drrho_core.contrastive import contrastive_step
from drrho_core.estimator import check_index

_XP = array_api_compat.torch


class ContrastiveLoss(nn.Module):
    """The global contrastive loss with a reference model (DRRho-CLIP, SogCLR, FastCLIP) for a torch training loop.

    The module keeps the inner estimates of all samples, two numbers each, so it must see a stable `sample_index`.

    Parameters
    ----------
    num_samples : int
        Size of the data set, at least 1; indices are below it.
    temperature : float or tensor of shape ()
        Temperature tau > 0. A number is constant. A tensor gets its gradient where it asks for one: a `Parameter` is
        registered as this module's parameter, another tensor as its buffer; both are in ``state_dict()``.
    gamma : float
        Weight of the batch's own estimate, in (0, 1]; 1 has no memory: the mini-batch loss. An attribute that may be
        set between steps, see `drrho_core.cosine_gamma`. It is the caller's schedule, so not in ``state_dict()``.
    eps : float
        Added to the inner estimate, >= 0. Part of the objective, not a guard: the log domain needs none.
    reference_weight : float
        lambda >= 0: 0 ignores the reference model, 1 is DRRho; may exceed 1.
    radius : float
        Size of the ambiguity set, >= 0; it matters only where the temperature is learned.
    tile_size, memory_budget : int, optional
        How it is computed, never what; see `drrho_core.contrastive_step`.

    Attributes
    ----------
    log_inner_image, log_inner_text : tensor, shape (num_samples,)
        Buffers: logarithms of the inner estimates; ``-inf`` = never visited. float32; ``double()`` makes them float64.
        ``half()``, ``bfloat16()``, ``to(torch.float16)`` and autocast leave them, and the temperature, as they are.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.

    Notes
    -----
    The gradient of features and temperature is the closed form of SogCLR with a reference model (arXiv 2202.12387,
    2505.06699), the gradient of `drrho_core.contrastive_step`'s surrogate; the reference features are constants. Half
    features are computed with in float32; the incoming gradient (a loss scale) meets the result before it is rounded.

    The state changes in ``train()`` with gradients enabled, once per call: under activation checkpointing keep this
    module outside of the part that runs twice. Batches of several processes are not gathered yet: a world size above 1
    is an error.

    Examples
    --------
    >>> images, texts = torch.eye(3).requires_grad_(), torch.eye(3)[[0, 2, 1]]  # two captions are swapped
    >>> loss_function = ContrastiveLoss(10, temperature=0.5, gamma=0.9)
    >>> loss = loss_function(images, texts, torch.tensor([4, 0, 7]))
    >>> loss.backward()
    >>> round(loss.item(), 4), images.grad.shape
    (0.1446, torch.Size([3, 3]))
    >>> round(loss_function.log_inner_image[4].item(), 4)
    -2.0
    """

    log_inner_image: Tensor
    log_inner_text: Tensor
    temperature: float | Tensor

    def __init__(
        self,
        num_samples: int,
        *,
        temperature: float | Tensor,
        gamma: float,
        eps: float = 0.0,
        reference_weight: float = 1.0,
        radius: float = 0.0,
        tile_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        num_samples = _checks.integer("num_samples", num_samples, minimum=1)
        checked = _checks.parameter("temperature", _detached(temperature), lambda x: x > 0, "be > 0", _XP)
        self._gamma_tensor = torch.ones((), dtype=torch.float64)
        self.gamma = gamma
        self.eps = _checks.number("eps", eps, lambda x: x >= 0, "be >= 0")
        self.reference_weight = _checks.number("reference_weight", reference_weight, lambda x: x >= 0, "be >= 0")
        self.radius = _checks.number("radius", radius, lambda x: x >= 0, "be >= 0")
        self.tile_size = None if tile_size is None else _checks.integer("tile_size", tile_size, minimum=1)
        self.memory_budget = (
            None if memory_budget is None else _checks.integer("memory_budget", memory_budget, minimum=0)
        )
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature if isinstance(temperature, Tensor) else checked
        for name in ("log_inner_image", "log_inner_text"):
            self.register_buffer(name, torch.full((num_samples,), -torch.inf, dtype=torch.float32))

    @property
    def num_samples(self) -> int:
        """Size of the data set."""
        return int(self.log_inner_image.shape[0])

    @property
    def gamma(self) -> float:
        """Weight of the batch's own estimate, in (0, 1]."""
        return self._gamma

    @gamma.setter
    def gamma(self, value: float) -> None:
        self._gamma = _checks.number("gamma", value, lambda x: 0 < x <= 1, "be in (0, 1]")
        self._gamma_tensor.fill_(self._gamma)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        sample_index: Tensor,
        *,
        reference_features: tuple[Tensor, Tensor] | None = None,
        pair_mask: Tensor | None = None,
        temperature: float | Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the loss of a batch, differentiable in features and temperature, and update the estimates.

        Parameters
        ----------
        image_features, text_features : tensor, shape (b, d)
            Features of the batch, unit norm (not enforced), b >= 2. Row i of both is a positive pair.
        sample_index : tensor of integers, shape (b,)
            Stable row of every pair in the data set, in [0, num_samples), without repeats.
        reference_features : pair of tensors, shape (b, r), optional
            Image and text features of the frozen reference model; r may differ from d. None: SogCLR / FastCLIP.
        pair_mask : tensor of bool, shape (b, b), optional
            Entry (i, j) False: text j is not a negative of image i, nor image i one of text j.
        temperature : float, tensor of shape () or pair of tensors of shape (b,), optional
            In place of the module's, > 0: one per image anchor and one per text anchor, say the rows of `sample_index`
            in tables that are learned. Tensors get their gradients; they carry the 1/2b of the mean over anchors.

        Returns
        -------
        tensor, shape ()
            Estimate of the objective with the updated inner estimates, whether those are kept or not.

        Raises
        ------
        TypeError, ValueError
            If an argument breaks these rules. Values are looked at on the host only and not under ``torch.compile``.
        RuntimeError
            If the world size is above 1; in ``backward()``, if it is differentiated twice.
        """
        _check_world_size()
        check_index(sample_index, self.num_samples, like=self.log_inner_image, xp=_XP)
        namespace_of({"image_features": image_features, "text_features": text_features}, _XP)
        _checks.ndim("image_features", image_features, 2, "(batch_size, feature_dim)")
        _checks.shape("sample_index", sample_index, (image_features.shape[0],), "(batch_size,)")
        rows = sample_index.to(torch.int64)
        tau = self.temperature if temperature is None else temperature
        # A product in half precision is no use below a temperature of 0.1, so autocast stays outside.
        with torch.autocast(self.log_inner_image.device.type, enabled=False):
            images, texts, references = _wide(image_features, text_features, reference_features)
            with torch.no_grad():
                step = contrastive_step(
                    images.detach(),
                    texts.detach(),
                    self.log_inner_image[rows],
                    self.log_inner_text[rows],
                    temperature=_detached(tau),
                    # As a tensor gamma is no constant of the compiled graph: a schedule compiles nothing again.
                    gamma=self._gamma_tensor if torch.compiler.is_compiling() else self._gamma,
                    reference_features=references,
                    reference_weight=self.reference_weight,
                    radius=self.radius,
                    eps=self.eps,
                    pair_mask=pair_mask,
                    tile_size=self.tile_size,
                    memory_budget=self.memory_budget,
                    xp=_XP,
                )
            inputs, gradients = [images, texts], [step.image_gradient, step.text_gradient]
            if isinstance(tau, (tuple, list)):
                inputs += tau
                gradients += step.temperature_gradient
            elif isinstance(tau, Tensor):
                inputs.append(tau)
                gradients.append(step.temperature_gradient)
            loss = _with_gradients(step.loss, inputs, gradients)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.log_inner_image[rows] = step.log_inner_image
                self.log_inner_text[rows] = step.log_inner_text
        return loss

    def extra_repr(self) -> str:
        """Show the settings."""
        temperature = self.temperature
        shown = temperature if isinstance(temperature, float) else f"<{type(temperature).__name__}>"
        return (
            f"{self.num_samples}, temperature={shown}, gamma={self.gamma}, eps={self.eps}, "
            f"reference_weight={self.reference_weight}, radius={self.radius}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert as every module does, but never to a type below float32, not even on the way."""

        def keep_wide(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            narrow = not converted.is_floating_point() or torch.finfo(converted.dtype).bits < 32
            return tensor.to(converted.device) if narrow and converted.dtype != tensor.dtype else converted

        return super()._apply(keep_wide, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Refuse estimates of another data set or type before the first of them is copied."""
        for name in ("log_inner_image", "log_inner_text"):
            key = f"{prefix}{name}"
            if key in state_dict:
                incoming = state_dict[key]
                namespace_of({key: incoming}, _XP)
                _checks.state_dtype(key, incoming, _XP)
                _checks.shape(key, incoming, (self.num_samples,), "(num_samples,)")
        super()._load_from_state_dict(state_dict, prefix, *rest)


def drrho_risk(
    loss: Tensor,
    reference_loss: Tensor,
    ambiguity_set: AmbiguitySet,
    /,
    *,
    reference_weight: float | Tensor = 1.0,
    axis: int = -1,
    where: Tensor | None = None,
) -> Tensor:
    """Return the DRRho risk, differentiable in `loss`.

    Parameters
    ----------
    loss : tensor, shape (..., n, ...)
        The learner's losses, real floating, any unit.
    reference_loss : tensor, the same shape
        The frozen reference model's losses on the same samples, in the same dtype: constants.
    ambiguity_set : AmbiguitySet
        The weights that the adversary may choose, such as ``drrho_core.CVaR(0.1)``.
    reference_weight : float or tensor of shape ()
        lambda >= 0: 0 is plain distributionally robust optimisation, 1 is DRRho.
    axis : int
        The axis of the n samples.
    where : tensor of bool, optional
        Marks the samples that count, broadcast to the losses' shape; neither loss of the others is read, and their
        gradient is 0.

    Returns
    -------
    tensor
        The risk: the shape of `loss` without `axis`; a scalar for one axis.

    Raises
    ------
    TypeError, ValueError
        As `drrho_core.drrho_risk` does.
    RuntimeError
        In ``backward()``, if it is differentiated twice.

    Notes
    -----
    The gradient is the vector of worst-case weights (Danskin's theorem), so no solver is differentiated through.
    DRRho (arXiv 2505.06699).

    Examples
    --------
    >>> from drrho_core import CVaR
    >>> loss = torch.tensor([3.0, 2.0, 1.0], requires_grad=True)
    >>> value = drrho_risk(loss, torch.tensor([2.9, 0.5, 0.5]), CVaR(0.5))  # the worst half: one sample and a half
    >>> value.backward()
    >>> round(value.item(), 4), [round(weight, 4) for weight in loss.grad.tolist()]
    (1.1667, [0.0, 0.6667, 0.3333])
    """
    namespace_of({"loss": loss}, _XP)
    with torch.autocast(loss.device.type, enabled=False), torch.no_grad():
        worst = risk.drrho_risk(
            loss.detach(),
            _detached(reference_loss),
            ambiguity_set,
            reference_weight=_detached(reference_weight),
            axis=axis,
            where=where,
            xp=_XP,
        )
    return _with_gradients(worst.risk.unsqueeze(axis), [loss], [worst.weights]).squeeze(axis)


def _check_world_size() -> None:
    """Refuse to see the negatives of one process only."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world_size = torch.distributed.get_world_size()
        if world_size > 1:
            raise RuntimeError(
                "world size must be 1, because ContrastiveLoss does not gather the batches of other processes yet, "
                f"got {world_size}"
            )


def _detached(value: Any) -> Any:
    """Cut a tensor, or the members of a pair, loose from autograd; numbers stay as they are."""
    if isinstance(value, (tuple, list)):
        return tuple(member.detach() if isinstance(member, Tensor) else member for member in value)
    return value.detach() if isinstance(value, Tensor) else value


def _wide(image_features: Tensor, text_features: Tensor, references: Any) -> tuple[Tensor, Tensor, Any]:
    """Turn half features into float32, so that the loss scale meets a gradient not yet rounded to half.

    Features that do not share one dtype are left alone: the core says what is wrong with them. References are cut
    loose from autograd: the reference model is frozen.
    """
    features = [image_features, text_features]
    pair = isinstance(references, (tuple, list))
    if pair:
        references = tuple(_detached(array) for array in references)
    everything = [*features, *(references if pair else ())]
    if image_features.dtype in (torch.float16, torch.bfloat16) and all(
        isinstance(array, Tensor) and array.dtype == image_features.dtype for array in everything
    ):
        features = [array.to(torch.float32) for array in features]
        references = tuple(array.to(torch.float32) for array in references) if pair else references
    return features[0], features[1], references


def _with_gradients(value: Tensor, inputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Return `value`, of which autograd says that its gradients with respect to `inputs` are `gradients`."""
    distinct: list[Tensor] = []
    for x in inputs:
        # torch.compile loses the gradient of a tensor that a Function receives twice.
        distinct.append(x.view_as(x) if any(x is other for other in distinct) else x)
    result: Tensor = _WithGradients.apply(value, *distinct, *gradients)  # type: ignore[no-untyped-call]
    return result


class _WithGradients(torch.autograd.Function):
    """The identity on its first argument; n inputs follow, then n gradients that broadcast with it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        count = len(tensors) // 2
        outgoing = [incoming[0] * gradient for gradient in tensors[count:]]
        if torch.is_grad_enabled():  # create_graph=True
            outgoing = [_Once.apply(*pair) for pair in zip(outgoing, tensors, strict=False)]  # type: ignore[no-untyped-call]
        return None, *outgoing, *[None] * count


class _Once(torch.autograd.Function):
    """The identity on a gradient that depends on its input in truth, so its derivative must not be taken for 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor) -> Tensor:
        del ctx, x
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> Any:
        del ctx, incoming
        raise RuntimeError(
            "the contrastive loss and the DRRho risk must be differentiated once only, because their gradient is a "
            "closed form, got a second derivative"
        )
