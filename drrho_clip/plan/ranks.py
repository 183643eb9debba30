"""The plan of a run with many ranks, processes that train together: memory, traffic and time of each rank.

W ranks share each batch of B pairs, b = B / W each. The time of a step is

    b / v + t                    v: pairs per second that one rank trains alone, with batches of B pairs; t: time of a
                                 step beside this speed, which W does not divide, such as that of the update and of the
                                 selection from a super-batch
    + received bytes / c         c: bandwidth, the bytes per second that a rank receives
    + exchanges * l              l: latency, the time of an exchange of a few bytes among all ranks

`drrho_clip.plan.traffic` lists the exchanges. In the form ring the contrastive loss, InfoNCE and the distillation loss
compute their logits twice; `RING_WORK` is the measured factor. The sigmoid loss has one pass in both forms, so the
factor does not hold for it. The share of a loss in the work of a step follows from the numbers of multiplications. The
encoders have 6 per weight, token (or position of an image) and pair. A loss has 6 d + 2 r for each own image with each
text of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from drrho_clip.config import TrainConfig
from drrho_clip.errors import BadInput
from drrho_clip.models import ModelSpec, parameter_shapes
from drrho_clip.plan.exchanges import Message, received_by_purpose
from drrho_clip.plan.memory import DataSizes, MemoryPart, memory_of_run
from drrho_clip.plan.options import PlanOptions
from drrho_clip.plan.shared_step import StepSizes, shared_step
from drrho_clip.plan.traffic import SharedStep, messages, received_bytes
from drrho_clip.terminal.printing import print_cells, say
from drrho_core.backend import Backend
from drrho_core.contrastive.ranks import FORMS

__all__ = ["RING_WORK", "FormPlan", "RanksPlan", "plan_ranks", "print_ranks"]

RING_WORK: Final = 1.4
"""Time of a loss with two passes in the form ring, divided by the time in the form reduce; see benchmarks/many_devices.

It is the time of the contrastive loss of a rank.
"""


@dataclass(frozen=True)
class FormPlan:
    """The plan of a rank if the ranks share their batches in one form.

    Attributes
    ----------
    memory : tuple of MemoryPart
        The parts of the memory of a rank.
    exchanges : tuple of Message
        The exchanges of a step.
    received : float
        Bytes that a rank receives in a step.
    message_seconds, compute_seconds : float
        Time of the exchanges of a step and of its computations; the latter is 0 if the speed is unknown.
    """

    memory: tuple[MemoryPart, ...]
    exchanges: tuple[Message, ...]
    received: float
    message_seconds: float
    compute_seconds: float

    @property
    def num_bytes(self) -> int:
        """The memory of a rank."""
        return sum(part.num_bytes for part in self.memory)

    @property
    def num_exchanges(self) -> int:
        """Number of exchanges of a step."""
        return sum(message.times for message in self.exchanges)

    @property
    def seconds(self) -> float:
        """Time of a step; without a known speed the time of the exchanges alone."""
        return self.message_seconds + self.compute_seconds


@dataclass(frozen=True)
class RanksPlan:
    """The plan of a run with many ranks.

    Attributes
    ----------
    options : PlanOptions
        Number of ranks, bandwidth, latency and speed.
    num_local : int
        The own pairs of a rank.
    form : {"reduce", "ring"}
        The form of the settings.
    forms : dict of str to FormPlan
        The plan of each form.
    steps_per_epoch : int
        Number of steps of an epoch.
    largest_batch : dict of str to int
        The largest global batch that fits into the memory of a device, by form; empty if that memory is unknown.
    """

    options: PlanOptions
    num_local: int
    form: str
    forms: dict[str, FormPlan]
    steps_per_epoch: int
    largest_batch: dict[str, int]


def plan_ranks(
    config: TrainConfig,
    spec: ModelSpec,
    backend: Backend,
    options: PlanOptions,
    *,
    sizes: DataSizes,
    step_sizes: StepSizes,
    steps_per_epoch: int,
) -> RanksPlan:
    """Return the plan of each rank in both forms.

    Parameters
    ----------
    config : TrainConfig
        The settings; `batch_size` is the batch of all ranks.
    spec, backend
        The sizes of the encoders, and the array library.
    options : PlanOptions
        The ranks and the network.
    sizes : DataSizes
        The sizes of the data.
    step_sizes : StepSizes
        The sizes of a step that depend on the data and on the reference model.
    steps_per_epoch : int
        Number of steps of an epoch.

    Raises
    ------
    BadInput
        If the number of ranks does not divide the batch.
    """
    num_ranks = options.world_size or 1
    if config.batch_size % num_ranks:
        raise BadInput(
            f"batch_size must be a multiple of world_size ({num_ranks}), because each process takes as many pairs, "
            f"got {config.batch_size}"
        )

    def memory_of(batch_size: int, form: str) -> list[MemoryPart]:
        resized = replace(config, batch_size=batch_size)
        return memory_of_run(resized, spec, backend, **sizes._asdict(), num_ranks=num_ranks, form=form)

    forms = {}
    for form in FORMS:
        step = shared_step(config, spec, num_ranks, form, step_sizes, on_host="cpu" in backend.device)
        exchanges = tuple(messages(step)) if num_ranks > 1 else ()
        received = received_bytes(step)
        seconds = received / (1e9 * (options.bandwidth or math.inf)) + 1e-6 * options.latency * sum(
            message.times for message in exchanges
        )
        compute = 0.0 if options.pairs_per_second is None else step.num_local / options.pairs_per_second
        if form == "ring" and num_ranks > 1:
            compute *= 1.0 + (RING_WORK - 1.0) * repeated_share(step, spec)
        compute += 1e-3 * options.step_overhead
        memory = tuple(memory_of(config.batch_size, form))
        forms[form] = FormPlan(memory, exchanges, received, seconds, compute)
    largest = {}
    if options.device_memory is not None:
        limit = 1e9 * options.device_memory
        for form in FORMS:

            def fits(num_local: int, form: str = form) -> bool:
                return sum(part.num_bytes for part in memory_of(num_local * num_ranks, form)) <= limit

            largest[form] = num_ranks * _largest(fits)
    return RanksPlan(options, config.batch_size // num_ranks, config.form, forms, steps_per_epoch, largest)


def repeated_share(step: SharedStep, spec: ModelSpec) -> float:
    """Return the share of the losses with two passes in the multiplications of a rank's step.

    The form ring computes the logits of these losses twice. A step with distillation has a second loss.

    Examples
    --------
    >>> spec = ModelSpec("mlp", image_size=8, channels=1, vocabulary_size=20, context_length=6, width=16, depth=1)
    >>> round(repeated_share(SharedStep(num_ranks=2, num_local=64, feature_dim=64), spec), 3)
    0.376
    """
    own = 6 * step.feature_dim + 2 * step.reference_dim
    distillation = 6 * step.feature_dim + 2 * step.teacher_dim if step.teacher_dim else 0
    repeated = distillation + (0 if step.loss == "sigmoid" else own)
    # Each own image meets the texts of all ranks.
    num_texts = step.num_local * step.num_ranks
    return repeated * num_texts / ((own + distillation) * num_texts + 6 * products_per_pair(spec))


def products_per_pair(spec: ModelSpec) -> int:
    """Return the number of products of a weight and a number in the encoders, for one pair and without a gradient.

    Attention scores are left out: they are a few per cent at usual lengths.
    """
    count, side = 0, spec.image_size
    for name, shape in parameter_shapes(spec).items():
        # Biases and norms have one axis; rows of tables are looked up.
        if len(shape) < 2 or "token" in name or "position" in name:
            continue
        positions = 1
        if spec.architecture == "hf" and ".embeddings." in name:
            positions = spec.hf_sizes.grid**2
        elif spec.architecture == "hf" and "layers" in name:
            positions = spec.context_length if name.startswith("text") else spec.hf_sizes.grid**2 + 1
        elif name.startswith("image/conv"):
            side = (side + 1) // 2
            positions = side**2
        elif name.startswith("text/block"):
            positions = spec.context_length
        count += positions * math.prod(shape)
    return count


def _largest(fits: Callable[[int], bool]) -> int:
    """Return the largest number of own pairs, at least 2, that fits into a memory; 0 if none does."""
    if not fits(2):
        return 0
    enough, much = 2, 4
    while fits(much):
        enough, much = much, 2 * much
    while much - enough > 1:
        middle = (enough + much) // 2
        enough, much = (middle, much) if fits(middle) else (enough, middle)
    return enough


def print_ranks(plan: RanksPlan) -> None:
    """Print the plan of many ranks on standard output."""
    options = plan.options
    say(
        f"processes: {options.world_size:,} with {plan.num_local:,} pairs of each batch; {options.bandwidth:g} GB/s, "
        f"{options.latency:g} microseconds per exchange"
    )
    rows = [
        ("memory, MB", *(f"{form.num_bytes / 1e6:,.1f}" for form in plan.forms.values())),
        *_received_rows(plan),
        ("exchanges", *(str(form.num_exchanges) for form in plan.forms.values())),
        ("exchanges, ms", *(_in_milliseconds(form.message_seconds) for form in plan.forms.values())),
    ]
    if options.pairs_per_second is not None:
        epochs = [plan.steps_per_epoch * form.seconds / 3600 for form in plan.forms.values()]
        rows += [
            ("computing, ms", *(_in_milliseconds(form.compute_seconds) for form in plan.forms.values())),
            ("a step, ms", *(_in_milliseconds(form.seconds) for form in plan.forms.values())),
            ("an epoch, hours", *(f"{hours:,.2f}" for hours in epochs)),
        ]
    if plan.largest_batch:
        rows.append(("largest batch that fits", *(f"{size:,}" for size in plan.largest_batch.values())))
    print_cells(["each process, in a step", *plan.forms], rows, left=1)
    say(verdict(plan))


def verdict(plan: RanksPlan) -> str:
    """Return the sentence that says which form to take."""
    reduce, ring = (plan.forms[form] for form in FORMS)
    saved, later = reduce.num_bytes - ring.num_bytes, ring.seconds - reduce.seconds
    compared = f"ring takes {_in_milliseconds(abs(later))} ms {'longer' if later >= 0 else 'less'} per step than reduce"
    if saved <= 0:
        return f"{compared} and saves no memory: take {'reduce' if later >= 0 else 'ring'}"
    compared += f" and needs {saved / 1e6:,.1f} MB less"
    if later < 0:
        return f"{compared}: take ring"
    if not plan.largest_batch:
        return f"{compared}: take ring only if a device has no room for reduce"
    room = 1e9 * (plan.options.device_memory or 0.0)
    sizes = [form.num_bytes <= room for form in (reduce, ring)]
    if sizes[0]:
        limit = plan.largest_batch["reduce"]
        return f"{compared}: take reduce, which fits up to a batch of {limit:,} pairs"
    return f"{compared}: take ring, because reduce does not fit" if sizes[1] else f"{compared}; neither form fits"


def _received_rows(plan: RanksPlan) -> list[tuple[str, ...]]:
    """Return the rows of the received bytes, by purpose and together."""
    num_ranks = plan.options.world_size or 1
    by_form = [received_by_purpose(form.exchanges, num_ranks) for form in plan.forms.values()]
    purposes = list(dict.fromkeys(purpose for received in by_form for purpose in received))
    rows = [
        (f"received, MB: {name}", *(_in_megabytes(received.get(name, 0.0)) for received in by_form))
        for name in purposes
    ]
    return [*rows, ("received, MB: together", *(_in_megabytes(form.received) for form in plan.forms.values()))]


def _in_megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.3f}"


def _in_milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}"
