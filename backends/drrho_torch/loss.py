"""The contrastive loss as a torch module, and the DRRho risk, both differentiable through their closed-form gradients.

The core returns values together with closed-form gradients; `drrho_torch.functions` ties the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import array_api_compat.torch
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import guard_scalar

from drrho_core import _validate
from drrho_core._array_api import is_array, namespace_of
from drrho_core.ambiguity import AmbiguitySet
from drrho_torch.accumulation import RepeatedRows
from drrho_torch.estimator import Table
from drrho_torch.functions import (
    Job,
    Risk,
    RiskJob,
    Step,
    detached,
    differentiable,
    evaluate,
    evaluate_eagerly,
    evaluate_risk,
    with_gradients,
)

_XP = array_api_compat.torch


class ContrastiveLoss(nn.Module):
    """The global contrastive loss with a reference model (DRRho-CLIP, SogCLR, FastCLIP) for a torch training loop.

    The module keeps the inner estimates of all samples, two numbers each, so it must see a stable `sample_index`.

    Parameters
    ----------
    num_samples : int
        Size of the data set, at least 1; indices are below it.
    temperature : float or tensor of shape ()
        Temperature tau > 0. A number is constant. A tensor gets its gradient if it asks for one: a `Parameter` is
        registered as this module's parameter, another tensor as its buffer; both are in ``state_dict()``. A tensor that
        was computed from a parameter has to come with each call, because its history ends with the first backward pass.
    gamma : float, default: 1.0
        Weight of the batch's own estimate, in (0, 1]; 1 has no memory: the mini-batch loss. An attribute that may be
        set between steps, see `drrho_core.cosine_gamma`. It is the caller's schedule, so not in ``state_dict()``.
    eps : float
        Added to the inner estimate, >= 0. Part of the objective, not a numerical safeguard.
    reference_weight : float
        lambda >= 0: 0 ignores the reference model, 1 is DRRho; may exceed 1.
    radius : float
        Size of the ambiguity set, >= 0; it matters only where the temperature is learned.
    tile_size, memory_budget : int, optional
        Affect speed and memory only, not the result; see `drrho_core.contrastive_step`.
    estimator : object, optional
        Where the inner estimates are kept. None: in buffers of this module. Otherwise an estimator of `num_samples`
        samples: `drrho_core.InnerEstimator` (device), `drrho_torch.HostEstimator` (host), or one that keeps NumPy
        arrays, such as ``drrho_numpy.MemoryMappedEstimator`` (file). It stays in its place if the module moves, its
        state is part of ``state_dict()``, and `torch.compile` cannot trace it.

    Attributes
    ----------
    log_inner_image, log_inner_text : tensor, shape (num_samples,)
        Buffers: logarithms of the inner estimates; ``-inf`` = never visited. float32; ``double()`` makes them float64.
        ``half()``, ``bfloat16()``, ``to(torch.float16)`` and autocast leave them, and the temperature, as they are.
        None if an estimator object keeps the estimates.

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
    module outside of the part that runs twice. A second training call with the same rows averages them again, so an
    accumulation loop must call the loss once per batch, see `drrho_torch.micro_batches`; a call in eager mode with the
    rows of the call before, if no parameter has changed in between and gamma is below 1, warns once.

    In ``eval()`` the loss is the batch's own: gamma is 1 and no sample counts as visited before. The state is neither
    read nor written, so `sample_index` may number samples that are not in the table, such as those of a validation set.

    `torch.func.grad`, `vjp` and `jacrev` update the state as eager calls do. Under `torch.func.vmap` the module has to
    be in ``eval()``, or its buffers have to be mapped (`torch.func.functional_call` with one state per batch). Batches
    of several processes are not gathered yet: a world size above 1 is an error.

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
        gamma: float = 1.0,
        eps: float = 0.0,
        reference_weight: float = 1.0,
        radius: float = 0.0,
        tile_size: int | None = None,
        memory_budget: int | None = None,
        estimator: Any = None,
    ) -> None:
        super().__init__()
        num_samples = _validate.integer("num_samples", num_samples, minimum=1)
        temperature = _checked_temperature(temperature)
        # A buffer made under inference_mode could not be written to outside of it.
        with torch.inference_mode(False):
            self._gamma_tensor = torch.ones((), dtype=torch.float64)
        self.gamma = gamma
        self.eps = _validate.number("eps", eps, lambda x: x >= 0, "be >= 0")
        self.reference_weight = _validate.number("reference_weight", reference_weight, lambda x: x >= 0, "be >= 0")
        self.radius = _validate.number("radius", radius, lambda x: x >= 0, "be >= 0")
        self.tile_size = None if tile_size is None else _validate.integer("tile_size", tile_size, minimum=1)
        self.memory_budget = (
            None if memory_budget is None else _validate.integer("memory_budget", memory_budget, minimum=0)
        )
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature
        self._table = None if estimator is None else Table(estimator)
        if self._table is not None and self._table.num_samples != num_samples:
            raise ValueError(
                f"estimator must hold num_samples = {num_samples} samples, got one of {self._table.num_samples}"
            )
        self._repeated = RepeatedRows()
        with torch.inference_mode(False):
            for name in Table.NAMES:
                fresh = torch.full((num_samples,), -torch.inf, dtype=torch.float32) if estimator is None else None
                self.register_buffer(name, fresh)

    @property
    def num_samples(self) -> int:
        """Size of the data set."""
        return int(self.log_inner_image.shape[0]) if self._table is None else self._table.num_samples

    @property
    def estimator(self) -> Any:
        """The estimator object that keeps the estimates; None if they are in buffers."""
        return None if self._table is None else self._table.estimator

    def grow(self, num_samples: int, /) -> Self:
        """Make room for `num_samples` >= the present number and return this module.

        The old estimates stay in the first rows; the new samples were never visited.

        Parameters
        ----------
        num_samples : int
            The new size of the data set.

        Raises
        ------
        TypeError, ValueError
            If `num_samples` is not such a number.

        Examples
        --------
        >>> loss_function = ContrastiveLoss(3, temperature=0.5).grow(5)
        >>> loss_function.num_samples, loss_function.log_inner_text.tolist()
        (5, [-inf, -inf, -inf, -inf, -inf])
        """
        num_samples = _validate.integer("num_samples", num_samples, minimum=self.num_samples)
        if self._table is not None:
            self._table.grow(num_samples)
            return self
        with torch.inference_mode(False), torch.no_grad():
            for name in Table.NAMES:
                old = getattr(self, name)
                setattr(self, name, torch.cat([old, old.new_full((num_samples - old.shape[0],), -torch.inf)]))
        return self

    @property
    def gamma(self) -> float:
        """Weight of the batch's own estimate, in (0, 1]."""
        return self._gamma

    @gamma.setter
    def gamma(self, value: float) -> None:
        self._gamma = _validate.number("gamma", value, lambda x: 0 < x <= 1, "be in (0, 1]")
        self._gamma_tensor.fill_(self._gamma)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        sample_index: Tensor,
        *,
        reference_features: tuple[Tensor, Tensor] | None = None,
        pair_mask: Tensor | None = None,
        anchor_weight: Tensor | tuple[Tensor, Tensor] | None = None,
        temperature: float | Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the loss of a batch, differentiable in features and temperature, and update the estimates.

        Parameters
        ----------
        image_features, text_features : tensor, shape (b, d)
            Features of the batch, unit norm (not enforced), b >= 2. Row i of both is a positive pair.
        sample_index : tensor of integers, shape (b,)
            Stable row of every pair in the data set, in [0, num_samples), without repeats. In ``eval()`` its values are
            not used.
        reference_features : pair of tensors, shape (b, r), optional
            Image and text features of the frozen reference model; r may differ from d, and so may the floating type.
            None: SogCLR / FastCLIP.
        pair_mask : tensor of bool, shape (b, b), optional
            Entry (i, j) False: text j is not a negative of image i, nor image i one of text j.
        anchor_weight : tensor of shape (b,) or pair of tensors of shape (b,), optional
            Factors >= 0 on the anchors' parts of loss and gradients: one per pair, or one per image anchor and one per
            text anchor. They are constants, and the estimates are updated as without them.
        temperature : float, tensor of shape () or pair of tensors of shape (b,), optional
            In place of the module's, > 0: one per image anchor and one per text anchor, say the rows of `sample_index`
            in tables that are learned. Tensors get their gradients; they carry the 1/2b of the mean over anchors.

        Returns
        -------
        tensor, shape ()
            Estimate of the objective with the updated inner estimates, whether those are kept or not. In ``eval()``
            the batch's own loss, as if gamma were 1.

        Raises
        ------
        TypeError, ValueError
            If an argument breaks these rules. Values are looked at on the host only and not under ``torch.compile``; if
            an index that nobody has looked at is out of range, loss and gradients are nan and no estimate changes.
        RuntimeError
            If the world size is above 1; under `torch.func.vmap`, if the state would have to change and is not mapped;
            in ``backward()``, if it is differentiated twice.

        Warns
        -----
        UserWarning
            Once, if the rows of the training call before are averaged again, see the notes of the class.
        """
        _check_world_size()
        _check_tensor("image_features", image_features)
        _check_tensor("text_features", text_features)
        _check_tensor("sample_index", sample_index)
        if sample_index.ndim != 1:
            raise ValueError(
                "sample_index must have shape (batch_size,), one row id per sample of the batch, "
                f"got {tuple(sample_index.shape)}"
            )
        if not _XP.isdtype(sample_index.dtype, "integral"):
            raise TypeError(f"sample_index must have an integer dtype, got {sample_index.dtype}")
        _validate.ndim("image_features", image_features, 2, "(batch_size, feature_dim)")
        if text_features.shape[:1] == image_features.shape[:1]:  # otherwise one of the features is wrong
            _validate.shape("sample_index", sample_index, (image_features.shape[0],), "(batch_size,)")
        tau = self.temperature if temperature is None else _plain_temperature(temperature)
        traced = torch.compiler.is_compiling()
        job = Job(
            training=self.training,
            update=self.training and torch.is_grad_enabled(),
            # As a tensor gamma is no constant of the compiled graph: a schedule compiles nothing again.
            gamma=1.0 if not self.training else self._gamma_tensor if traced else self._gamma,
            eps=_number(self.eps, image_features),
            reference_weight=_number(self.reference_weight, image_features),
            radius=_number(self.radius, image_features),
            tile_size=self.tile_size,
            memory_budget=self.memory_budget,
            table=self._table,
            repeated=None if traced or self._gamma == 1.0 else self._repeated,
            pairs=tuple(_is_pair(value) for value in (reference_features, anchor_weight, tau)),
        )
        # A product in half precision is no use below a temperature of 0.1, so autocast stays outside.
        with torch.autocast(image_features.device.type, enabled=False):
            arguments = (
                image_features,
                text_features,
                sample_index,
                self.log_inner_image,
                self.log_inner_text,
                pair_mask,
                *_slots(reference_features),
                *_slots(anchor_weight),
                *_slots(_number(tau, image_features)),
            )
            loss: Tensor
            if traced:
                with torch.no_grad():
                    value, *gradients = (evaluate if self._table is None else evaluate_eagerly)(job, *arguments)
                inputs = [x for x in differentiable(arguments) if isinstance(x, Tensor)]
                loss = with_gradients(value, inputs, gradients)
            else:
                loss = Step.apply(job, *arguments)[0]  # type: ignore[no-untyped-call]
        return loss

    def extra_repr(self) -> str:
        """Show the settings."""
        temperature = self.temperature
        shown = temperature if isinstance(temperature, float) else f"<{type(temperature).__name__}>"
        return (
            f"{self.num_samples}, temperature={shown}, gamma={self.gamma}, eps={self.eps}, "
            f"reference_weight={self.reference_weight}, radius={self.radius}"
            f"{'' if self._table is None else f', estimator={self.estimator!r}'}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert as every module does, but never to a type below float32, not even on the way."""

        def keep_wide(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            narrow = not converted.is_floating_point() or torch.finfo(converted.dtype).bits < 32
            return tensor.to(converted.device) if narrow and converted.dtype != tensor.dtype else converted

        return super()._apply(keep_wide, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Write the estimates of an estimator object under the names that buffers would have."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._table is not None:
            destination.update(self._table.state_dict(prefix))

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuse estimates of another data set or type before the first of them is copied."""
        for name in Table.NAMES:
            key = f"{prefix}{name}"
            if key in state_dict:
                incoming = state_dict[key]
                namespace_of({key: incoming}, _XP)
                _validate.state_dtype(key, incoming, _XP)
                _validate.shape(key, incoming, (self.num_samples,), "(num_samples,)")
        keys: dict[str, str] = {}
        if self._table is not None:
            keys = self._table.keys(prefix, state_dict)
            if keys:
                self._table.load_state_dict({name: state_dict[key] for key, name in keys.items()})
            elif strict:
                missing_keys += self._table.state_dict(prefix)
        mine = {key: value for key, value in state_dict.items() if key not in keys}
        super()._load_from_state_dict(mine, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


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
    _check_tensor("loss", loss)
    job = RiskJob(_specialised(ambiguity_set), axis)
    with torch.autocast(loss.device.type, enabled=False):
        weight = _number(reference_weight, loss)
        value: Tensor
        if not torch.compiler.is_compiling():
            value = Risk.apply(job, loss, reference_loss, weight, where)[0]  # type: ignore[no-untyped-call]
            return value
        with torch.no_grad():
            value, weights = evaluate_risk(job, loss, reference_loss, weight, where)
        return with_gradients(value.unsqueeze(axis), [loss], [weights]).squeeze(axis)


def _check_world_size() -> None:
    """Refuse to see the negatives of one process only."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world_size = torch.distributed.get_world_size()
        if world_size > 1:
            raise RuntimeError(
                "world size must be 1, because ContrastiveLoss does not gather the batches of other processes yet, "
                f"got {world_size}"
            )


def _check_tensor(name: str, value: Any) -> None:
    """Blame an argument that is no tensor itself, whatever the others are."""
    if not isinstance(value, Tensor):
        kind = type(value)
        full = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        raise TypeError(f"{name} must be a torch tensor (torch.as_tensor), got {full}")


def _plain_temperature(temperature: Any) -> Any:
    """Refuse arrays of other libraries, which the core would ask for torch's attributes."""
    if is_array(temperature) and not isinstance(temperature, Tensor):
        raise TypeError(
            "temperature must be a number or a torch tensor (torch.as_tensor), "
            f"got {type(temperature).__module__}.{type(temperature).__name__}"
        )
    return temperature


def _checked_temperature(temperature: Any) -> float | Tensor:
    """Check the temperature that a module is built with; numbers come back as floats."""
    checked: float | Tensor = _validate.parameter(
        "temperature", detached(_plain_temperature(temperature)), lambda x: x > 0, "be > 0", _XP
    )
    if not isinstance(temperature, Tensor):
        return checked
    if temperature.grad_fn is not None:
        raise ValueError(
            "temperature must be a number, a Parameter or a tensor without history, got one that was computed; pass it "
            "with each call"
        )
    if temperature.is_inference() and not isinstance(temperature, nn.Parameter):
        with torch.inference_mode(False):
            return temperature.clone()
    return temperature


def _number(value: Any, like: Tensor) -> Any:
    """Turn a number into a tensor where it is traced: with ``dynamic=True`` it is no constant, and the core asks it."""
    if torch.compiler.is_compiling() and not isinstance(value, (Tensor, tuple, list)):
        return torch.full((), value, dtype=torch.float64, device=like.device)
    return value


def _specialised(ambiguity_set: AmbiguitySet) -> AmbiguitySet:
    """Make the numbers of a set constants where it is traced, also with ``dynamic=True``."""
    fields = getattr(ambiguity_set, "__dataclass_fields__", None)
    if fields is None or not torch.compiler.is_compiling():
        return ambiguity_set
    return type(ambiguity_set)(*[guard_scalar(getattr(ambiguity_set, name)) for name in fields])


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def _slots(value: Any) -> tuple[Any, Any]:
    """Spread a pair, or a value that is no pair, over two arguments of a Function, which sees no tensor in a tuple."""
    return (value[0], value[1]) if _is_pair(value) else (value, None)
