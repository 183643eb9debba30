"""The contrastive loss as a torch module, differentiable through its closed-form gradient.

The module checks arguments and owns the state, the inner estimates; `drrho_torch.step_function` computes one call. The
core (`drrho_core`) computes loss and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import array_api_compat.torch
import torch
from torch import Tensor, nn

from drrho_core import checks
from drrho_core.contrastive.ranks import FORMS
from drrho_torch import opaque_step
from drrho_torch.accumulation import RepeatedRows
from drrho_torch.adapter import EstimatorAdapter
from drrho_torch.arguments import (
    is_pair,
    module_temperature,
    number_or_tensor,
    traced_number,
    two_arguments,
)
from drrho_torch.call_checks import check_call, check_call_together
from drrho_torch.closed_form import with_gradients
from drrho_torch.ranks import TorchRanks
from drrho_torch.step_function import Step, StepSettings, differentiable, evaluate

_XP = array_api_compat.torch


class ContrastiveLoss(nn.Module):
    """The global contrastive loss with a reference model (DRRho-CLIP, SogCLR, FastCLIP) for a torch training loop.

    The module keeps two inner estimates per sample of the data set: moving averages over the batches that contain the
    sample, one for the image and one for the text. So every sample needs a stable row id, see `sample_index` of
    `forward`. Options mean the same as in `drrho_core.contrastive_step`.

    Parameters
    ----------
    num_samples : int
        Size of the data set, at least 1. Every sample index is smaller than this number.
    temperature : float or tensor of shape () or (1,)
        Temperature tau > 0. A number is constant. A tensor that requires a gradient gets one. A `Parameter` is
        registered as a parameter of this module, any other tensor as a buffer; both are in ``state_dict()``. FSDP2
        shards a parameter of shape (1,), but not of shape (). Pass a tensor that was computed from a parameter to each
        call instead, because the first backward pass frees the graph that leads to it.
    gamma : float, default: 1.0
        Weight of the batch's own estimate, in (0, 1], as in `drrho_core.contrastive_step`. The attribute may be set
        between steps, see `drrho_core.cosine_gamma`. The schedule belongs to the caller, so ``state_dict()`` does not
        contain gamma.
    eps, reference_weight, radius : float
        Each >= 0, as in `drrho_core.contrastive_step`.
    tile_size, memory_budget : int, optional
        As in `drrho_core.contrastive_step`; they affect speed and memory only, not the result.
    estimator : object, optional
        The estimator object of `num_samples` samples that keeps the inner estimates: `drrho_core.InnerEstimator`
        (device), `drrho_torch.HostEstimator` (host), or one that keeps NumPy arrays, such as
        ``drrho_numpy.MemoryMappedEstimator`` (file). The object does not move when the module moves; the object's
        state is part of ``state_dict()``. With a `process_group` the rows may be split among the same processes,
        ``InnerEstimator(..., ranks=TorchRanks(process_group))``. None: buffers of this module keep the estimates.
    process_group : ProcessGroup or DeviceMesh, optional
        The processes that share each batch, such as ``torch.distributed.group.WORLD``. Each process calls the loss with
        its own pairs, the same number on each, and every pair of every process is a negative of every anchor. The loss
        is that of the whole batch, and every process keeps the estimates of all samples, unless the rows of `estimator`
        are split. None: one process.
    form : {"reduce", "ring"}
        How the processes share the pairs, see `drrho_core.sharded_contrastive_step`.
    gradient_scale : float, optional
        Factor of the features' gradients. None: the number of processes of the group, because DDP and FSDP average
        gradients. 1 for a wrapper that sums gradients. Gradients of temperatures have the factor 1. The gradient of a
        global temperature is the same on each process, so a wrapper that sums must not contain this temperature. The
        gradient of a temperature per anchor is that of the own anchors: sum it over processes. A wrapper that averages
        divides it by W, the number of processes, so multiply it by W.

    Attributes
    ----------
    log_inner_image, log_inner_text : tensor, shape (num_samples,)
        Buffers: logarithms of the inner estimates; ``-inf`` = never visited. They are float32; ``double()`` makes
        them float64. ``half()``, ``bfloat16()``, ``to(torch.float16)`` and autocast change neither them nor the
        temperature. None if an estimator object keeps the estimates.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.

    Notes
    -----
    The gradient of features and temperature is the closed form of SogCLR with a reference model (arXiv 2202.12387,
    2505.06699), that is the gradient of `surrogate`, a result of `drrho_core.contrastive_step`. The reference features
    are constants. Features in half precision are cast to float32. The incoming gradient, such as a loss scale,
    multiplies the float32 gradient before the product is rounded to half precision.

    The state changes once per call in ``train()`` with gradients enabled. Activation checkpointing runs a part of the
    forward pass twice; keep this module outside of that part. A second training call with the same rows updates the
    estimates of these rows again, so a loop that accumulates gradients must call the loss once per batch, see
    `drrho_torch.micro_batches`, or pass ``update=False`` to all calls but one. In eager mode a call with the rows of
    the previous call warns once if no parameter has changed in between and gamma is below 1.

    In ``eval()`` the loss depends on the batch only: gamma is 1 and every sample counts as never visited. The state is
    neither read nor written, so `sample_index` may number samples that are not in the table, such as those of a
    validation set. With a `process_group` every process has to call the loss in ``eval()`` too, with equally many
    pairs; the batch is that of all processes.

    With a `process_group` the processes compare their arguments, so an error of one process is an error on all of them:
    on the CPU before each step, on a GPU in the first call only, and under ``torch.compile`` as in eager mode. See
    docs/many-devices.md, "A rank that fails".

    `torch.func.grad`, `vjp` and `jacrev` update the state as eager calls do. Under `torch.func.vmap` the module has to
    be in ``eval()``, or its buffers have to be mapped (`torch.func.functional_call` with one state per batch). A world
    size above 1 is an error unless the module has a `process_group`, or the caller has gathered the batches and says
    `gathered=True`.

    Examples
    --------
    >>> images, texts = torch.eye(3).requires_grad_(), torch.eye(3)[[0, 2, 1]]  # two captions are swapped
    >>> contrastive_loss = ContrastiveLoss(10, temperature=0.5, gamma=0.9)
    >>> loss = contrastive_loss(images, texts, torch.tensor([4, 0, 7]))
    >>> loss.backward()
    >>> round(loss.item(), 4), images.grad.shape
    (0.1446, torch.Size([3, 3]))
    >>> round(contrastive_loss.log_inner_image[4].item(), 4)
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
        process_group: Any = None,
        form: str = "reduce",
        gradient_scale: float | None = None,
    ) -> None:
        super().__init__()
        num_samples = checks.integer("num_samples", num_samples, minimum=1)
        temperature = module_temperature(temperature)
        # A tensor made under inference_mode could not be written to outside of that mode.
        with torch.inference_mode(False):
            self._gamma_tensor = torch.ones((), dtype=torch.float64)
        self.gamma = gamma
        self.eps = checks.number("eps", eps, checks.NOT_NEGATIVE)
        self.reference_weight = checks.number("reference_weight", reference_weight, checks.NOT_NEGATIVE)
        self.radius = checks.number("radius", radius, checks.NOT_NEGATIVE)
        self.tile_size = None if tile_size is None else checks.integer("tile_size", tile_size, minimum=1)
        self.memory_budget = (
            None if memory_budget is None else checks.integer("memory_budget", memory_budget, minimum=0)
        )
        # nn.Module registers a Parameter by itself. Any other tensor has to be a buffer to move with the module.
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature
        self._table = None if estimator is None else EstimatorAdapter(estimator)
        if self._table is not None and self._table.num_samples != num_samples:
            raise ValueError(
                f"estimator must hold num_samples = {num_samples} samples, got one of {self._table.num_samples}"
            )
        self._repeated = RepeatedRows()
        self._ranks = None if process_group is None else TorchRanks(process_group)
        self._compared = False  # whether the processes have compared their settings in a call
        # torch.compile does not look into a step with an estimator object or several processes. The step finds this
        # module by a name, and a number that each step with an object changes keeps the order of these steps.
        self._is_opaque, self._name = bool(self._table or self._ranks), opaque_step.register(self._settings)
        with torch.inference_mode(False):
            self._order = torch.zeros((), dtype=torch.float32 if self._table is None else self._table.dtype)
        if form not in FORMS:
            raise ValueError(f"form must be {FORMS[0]!r} or {FORMS[1]!r}, got {form!r}")
        self._form = form
        num_ranks = 1 if self._ranks is None else self._ranks.size
        if self._table is not None and self._table.num_ranks > 1:
            self._check_owners(self._table)
        self.gradient_scale = (
            float(num_ranks)
            if gradient_scale is None
            else checks.number("gradient_scale", gradient_scale, checks.POSITIVE)
        )
        # With an estimator object the buffers are None: both kinds of module then have the same attributes.
        with torch.inference_mode(False):
            for name in EstimatorAdapter.NAMES:
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

    @property
    def process_group(self) -> Any:
        """The process group that shares each batch; None: one process."""
        return None if self._ranks is None else self._ranks.group

    def grow(self, num_samples: int, /) -> Self:
        """Make room for `num_samples` samples and return this module.

        The old estimates stay in the first rows; the new samples count as never visited.

        Parameters
        ----------
        num_samples : int
            The new size of the data set, at least the present one.

        Raises
        ------
        TypeError, ValueError
            If `num_samples` is no integer or smaller than the present size.

        Examples
        --------
        >>> contrastive_loss = ContrastiveLoss(3, temperature=0.5).grow(5)
        >>> contrastive_loss.num_samples, contrastive_loss.log_inner_text.tolist()
        (5, [-inf, -inf, -inf, -inf, -inf])
        """
        # Ranks that share a table check the number together, in the table.
        if self._table is None or self._table.num_ranks == 1:
            num_samples = checks.integer("num_samples", num_samples, minimum=self.num_samples)
        if self._table is not None:
            self._table.grow(num_samples)
            return self
        with torch.inference_mode(False), torch.no_grad():
            for name in EstimatorAdapter.NAMES:
                old = getattr(self, name)
                unseen = old.new_full((num_samples - old.shape[0],), -torch.inf)
                setattr(self, name, torch.cat([old, unseen]))
        return self

    @property
    def gamma(self) -> float:
        """Weight of the batch's own estimate, in (0, 1]."""
        return self._gamma

    @gamma.setter
    def gamma(self, value: float) -> None:
        self._gamma = checks.number("gamma", value, checks.UNIT_INTERVAL)
        # torch.compile reads gamma from this tensor, see `forward`.
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
        gathered: bool = False,
        update: bool = True,
    ) -> Tensor:
        """Return the loss of a batch, differentiable in features and temperature, and update the estimates.

        Parameters
        ----------
        image_features, text_features : tensor, shape (b, d)
            Features of the batch, as in `drrho_core.contrastive_step`; b >= 2, or with a process group W b >= 2.
        sample_index : tensor of integers, shape (b,)
            Stable row of every pair in the data set, in [0, num_samples), without repeats. In ``eval()`` the values
            are not used.
        reference_features : pair of tensors, shape (b, r), optional
            Features of the frozen reference model, as in `drrho_core.contrastive_step`. They get no gradient.
        pair_mask : tensor of bool, shape (b, b), optional
            As in `drrho_core.contrastive_step`. With a process group: the rows of the own images, (b, W b).
        anchor_weight : tensor of shape (b,) or pair of tensors of shape (b,), optional
            Factors >= 0, as in `drrho_core.contrastive_step`. They get no gradient.
        temperature : float, tensor of shape () or (1,) or pair of tensors of shape (b,), optional
            Replaces the module's temperature in this call, > 0. A pair holds one temperature per image anchor and one
            per text anchor, such as the rows of `sample_index` in learned tables. The gradient of a tensor includes
            the factor 1/(2b) of the mean over the 2b anchors.
        gathered : bool, default: False
            True says that all arguments already hold the batches of all processes, in the same order on every process.
            Then every process computes the same loss and keeps the same estimates. Needed if the world size is above 1
            and the module has no `process_group`; refused if it has one. The gradient of a process's rows is the
            gradient of the loss of the whole batch; a wrapper that averages gradients over W processes divides the
            gradient by W.
        update : bool, default: True
            False: the call computes loss and gradients from the updated estimates but does not store the estimates. A
            loop that calls the loss several times for the same batch stores them in one of the calls only.

        Returns
        -------
        tensor, shape ()
            The objective, estimated with the updated inner estimates, even if the update is not stored. In
            ``eval()`` the estimate uses this batch only, as if gamma were 1.

        Raises
        ------
        TypeError, ValueError
            If an argument breaks these rules. Values are checked on the host only and not under ``torch.compile``. If
            an index that was not checked is out of range or occurs twice, loss and gradients are nan, and no estimate
            changes, with and without a process group.
        RuntimeError
            If the world size is above 1, the module has no `process_group` and the batch is not `gathered`; under
            `torch.func.vmap`, if the state has to change and is not mapped; in ``backward()``, if the loss is
            differentiated twice.

        Warns
        -----
        UserWarning
            Once, if a training call repeats the rows of the previous training call, see the notes of the class.
        """
        if temperature is None:
            temperature = self.temperature
        pairs = tuple(is_pair(value) for value in (reference_features, anchor_weight, temperature))
        traced, store = torch.compiler.is_compiling(), update and self.training and torch.is_grad_enabled()
        settings = None if traced else self._settings(self.training, store, self._gamma, pairs)
        batch, given = (image_features, text_features, sample_index), (reference_features, anchor_weight, temperature)
        if settings is None or settings.ranks is None:
            check_call(self._ranks, batch, given, gathered)
        else:
            check_call_together(settings.ranks, batch, given, gathered, self.log_inner_image, settings.waits)
        # Autocast would round the products to half precision, and 1 / tau would multiply the rounding error.
        with torch.autocast(image_features.device.type, enabled=False):
            tau = traced_number(number_or_tensor(temperature), image_features)
            options = (
                pair_mask,
                *two_arguments(reference_features),
                *two_arguments(anchor_weight),
                *two_arguments(tau),
            )
            buffers = (self.log_inner_image, self.log_inner_text)
            loss: Tensor
            if settings is not None:
                loss = Step.apply(settings, *batch, *buffers, *options)[0]  # type: ignore[no-untyped-call]
                return loss
            # torch.compile traces the core as plain operations, which the compiler can fuse. A small Function then
            # connects the loss with its gradients. The compiler calls a step with an estimator object or with several
            # processes as a whole, without looking inside.
            with torch.no_grad():
                if not self._is_opaque:
                    settings = self._traced_settings(store, pairs, image_features)
                    value, *gradients = evaluate(settings, *batch, *buffers, *options)
                else:
                    state = buffers if self._table is None else (self._order,)
                    value, *gradients = opaque_step.step(
                        state,
                        *batch,
                        options[:-2],
                        options[-2:],
                        self._gamma_tensor,
                        self._name,
                        self.training,
                        store,
                        pairs,
                    )
            learned = [x for x in differentiable((*batch, *buffers, *options)) if isinstance(x, Tensor)]
            return with_gradients(value, learned, gradients[: len(learned)])

    def _check_owners(self, table: EstimatorAdapter) -> None:
        """Check that the ranks among which rows are split are the processes that share each batch."""
        rule = (
            "estimator must hold all rows (InnerEstimator without ranks), or rows that are split among the processes "
            "of process_group, got one whose rows are split among"
        )
        if self._ranks is None or table.num_ranks != self._ranks.size:
            raise ValueError(f"{rule} {table.num_ranks} ranks")
        # A process may belong to several groups of the same size, such as those of the two axes of a mesh.
        if isinstance(table.ranks, TorchRanks) and table.ranks.processes != self._ranks.processes:
            raise ValueError(
                f"{rule} processes {list(table.ranks.processes)} for a group of processes {list(self._ranks.processes)}"
            )

    def _settings(self, training: bool, update: bool, gamma: float, pairs: tuple[bool, ...]) -> StepSettings:
        """Return the settings of a call that runs without tracing."""
        if self._ranks is not None:
            self._ranks.check_alive()
        # The first call compares the arguments of all processes, even if it has to wait for a device.
        wait, self._compared = not self._compared and self._ranks is not None, True
        return StepSettings(
            training=training,
            update=update,
            gamma=gamma if training else 1.0,
            eps=self.eps,
            reference_weight=self.reference_weight,
            radius=self.radius,
            tile_size=self.tile_size,
            memory_budget=self.memory_budget,
            table=self._table,
            # With gamma = 1 a repeated call writes the same estimates again, which does no harm.
            repeated=None if gamma == 1.0 else self._repeated,
            pairs=pairs,
            ranks=self._ranks,
            form=self._form,
            gradient_scale=self.gradient_scale,
            wait=wait,
        )

    def _traced_settings(self, update: bool, pairs: tuple[bool, ...], like: Tensor) -> StepSettings:
        """Return the settings of a call that torch.compile traces: numbers are tensors, which may change."""
        return StepSettings(
            training=self.training,
            update=update,
            # A number is a constant of a compiled graph: each new gamma would compile the graph again.
            gamma=self._gamma_tensor if self.training else 1.0,
            eps=traced_number(self.eps, like),
            reference_weight=traced_number(self.reference_weight, like),
            radius=traced_number(self.radius, like),
            tile_size=self.tile_size,
            memory_budget=self.memory_budget,
            table=None,
            repeated=None,
            pairs=pairs,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy of this module a name of its own under torch.compile."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._name = opaque_step.register(self._settings)

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
        """Convert the module as `torch.nn.Module` does, but keep the state in float32 or wider.

        Half precision would lose updates: an update smaller than half a unit in the last place changes nothing.
        """

        def keep_wide(tensor: Tensor) -> Tensor:
            # The device is taken from the converted tensor, the values from the tensor before the conversion.
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
        """Load the state, after checking all estimates: an error leaves the module as it was."""
        given = {key: state_dict[key] for name in EstimatorAdapter.NAMES if (key := f"{prefix}{name}") in state_dict}

        def check() -> None:
            for key, incoming in given.items():
                checks.namespace_of({key: incoming}, _XP)
                checks.state_dtype(key, incoming, _XP)
                # An estimator whose rows are split among ranks takes its own rows, and checks them itself.
                if self._table is None or self._table.num_ranks == 1:
                    checks.shape(key, incoming, (self.num_samples,), "(num_samples,)")

        # The estimator object loads the entries that it wrote; nn.Module loads all other entries.
        keys: dict[str, str] = {}
        if self._table is None:
            check()
        else:
            keys = self._table.keys(prefix, state_dict)
            self._table.together(check, {"the keys of the estimator": ", ".join(sorted(keys))})
            if keys:
                self._table.load_state_dict({name: state_dict[key] for key, name in keys.items()})
            elif strict:
                missing_keys += self._table.state_dict(prefix)
        rest = {key: value for key, value in state_dict.items() if key not in keys}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
