"""Ways to train on processes of torch.distributed (gloo); every way has to give the numbers of one process.

All cases train the same two linear encoders on the same batches, whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from drrho_torch import ContrastiveLoss, TorchRanks, micro_batches
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from drrho_core import InnerEstimator
from helpers import problems
from helpers.ranks import own_rows

TOTAL, SAMPLES = 12, 36
"""Pairs of a batch, which 2, 3 and 4 processes can share, and samples of the data set."""

BACKEND = "aot_eager"
"""The compiler's backend: traced and differentiated as usual, but no code is generated, which would take long."""

WIDTH = {"images": 4, "features": 5, "references": 3}


@dataclass(frozen=True)
class Case:
    """One way to train; the defaults are a loop without a wrapper."""

    wrapper: str = "plain"  # plain, ddp, fsdp, hsdp
    sums: bool = False  # the wrapper sums gradients instead of averaging them
    group: str = "world"  # world, mesh, flattened, submesh, gathered
    form: str = "reduce"
    extras: bool = False  # reference features, a mask, anchor weights, radius, eps, reference weight
    temperature: str = "learned"  # learned, float, buffer, frozen, per sample
    micro: str = ""  # "", helper, helper with one micro-batch, by hand
    unused: bool = False  # DDP looks for parameters that the forward pass does not use
    inside: bool = False  # the loss is a part of the wrapped module, although it is called outside of the wrapper
    split: bool = False  # the estimates are split among the processes
    autocast: bool = False
    compiled: bool = False
    steps: int = 20

    @property
    def outside(self) -> bool:
        """Tell whether the loss is called outside of the wrapped module."""
        return bool(self.micro) or self.autocast or self.sums or self.group == "gathered"

    @property
    def alone(self) -> Case:
        """The same training on one process."""
        return replace(
            self,
            wrapper="plain",
            sums=False,
            group="world",
            form="reduce",
            micro="",
            unused=False,
            inside=False,
            split=False,
            compiled=False,
        )


CASES: dict[int, dict[str, Case]] = {
    2: {
        **{
            f"{wrapper} {form}{' extras' if extras else ''}": Case(wrapper, form=form, extras=extras)
            for wrapper in ("plain", "ddp", "fsdp")
            for form in ("reduce", "ring")
            for extras in (False, True)
        },
        **{
            f"ddp, temperature {kind}": Case("ddp", group="mesh", extras=True, temperature=kind, steps=5)
            for kind in ("float", "buffer", "frozen", "per sample")
        },
        "fsdp, temperature float": Case("fsdp", temperature="float", steps=5),
        "fsdp, temperature per sample": Case("fsdp", temperature="per sample", extras=True, form="ring", steps=5),
        **{
            f"{wrapper}, micro-batches {micro}": Case(wrapper, micro=micro, extras=True, steps=5)
            for wrapper in ("ddp", "fsdp")
            for micro in ("helper", "by hand")
        },
        **{
            f"ddp, micro-batches {micro}, temperature inside": Case(
                "ddp", micro=micro, unused=unused, inside=True, extras=True, steps=5
            )
            # Without the option a loop of one's own would not average the gradients: DDP waits for the temperature's.
            for micro, unused in (("helper", False), ("by hand", True))
        },
        **{
            f"ddp that finds unused parameters, {micro}, temperature inside": Case(
                "ddp", micro=micro, unused=True, inside=True, extras=True, steps=5
            )
            for micro in ("helper", "helper with one micro-batch")
        },
        "plain, gradient_scale 1": Case(sums=True, extras=True, steps=5),
        "ddp that sums": Case("ddp", sums=True, extras=True, steps=5),
        "fsdp that sums": Case("fsdp", sums=True, extras=True, steps=5),
        "ddp, split": Case("ddp", split=True, extras=True),
        "fsdp, split, ring": Case("fsdp", split=True, form="ring", group="mesh"),
        "ddp, gathered": Case("ddp", group="gathered", extras=True, steps=5),
        "ddp, autocast": Case("ddp", autocast=True, extras=True, steps=3),
        "fsdp, autocast": Case("fsdp", autocast=True, extras=True, form="ring", steps=3),
        "ddp, compiled": Case("ddp", compiled=True, extras=True),
        "ddp, compiled, split, ring": Case("ddp", compiled=True, extras=True, split=True, form="ring", steps=5),
        "fsdp, compiled": Case("fsdp", compiled=True, extras=True, steps=5),
    },
    3: {
        "plain reduce": Case(extras=True),
        "ddp ring": Case("ddp", form="ring", extras=True),
        "fsdp reduce": Case("fsdp", extras=True),
        "ddp, split": Case("ddp", split=True, extras=True),
    },
    4: {
        "plain ring": Case(form="ring", extras=True),
        "ddp reduce": Case("ddp", extras=True),
        "fsdp reduce": Case("fsdp", group="mesh", extras=True),
        "hsdp reduce": Case("hsdp", group="flattened", extras=True),
        "hsdp ring": Case("hsdp", form="ring", steps=5),
        "ddp, split": Case("ddp", split=True, extras=True),
        "ddp in a sub-mesh": Case("ddp", group="submesh", extras=True, steps=5),
        "hsdp, micro-batches helper": Case("hsdp", micro="helper", extras=True, steps=5),
    },
}
"""The cases of each launch by the number of processes."""


class Model(nn.Module):
    """Two linear encoders, a temperature, and the loss, which a wrapper may wrap together."""

    def __init__(self, case: Case, loss: ContrastiveLoss, num_ranks: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        dtype = torch.float32 if case.autocast else torch.float64
        self.image, self.text = (
            nn.Parameter(
                torch.randn(WIDTH["images"], WIDTH["features"], dtype=torch.float64, generator=generator).to(dtype)
            )
            for _ in range(2)
        )
        if case.temperature == "per sample":
            self.tables = nn.ParameterList(torch.linspace(low, 0.6, SAMPLES, dtype=torch.float64) for low in (0.2, 0.4))
        if case.inside or not case.outside:
            self.loss = loss
        self._case, self._num_ranks = case, num_ranks

    def forward(self, images: Tensor, texts: Tensor, rows: Tensor | None = None, **options: Any) -> Any:
        """Return the features of both encoders, or the loss if the module contains the loss."""
        features = tuple(
            nn.functional.normalize(x @ weight, dim=1) for x, weight in ((images, self.image), (texts, self.text))
        )
        if self._case.autocast:
            features = tuple(x.bfloat16() for x in features)
        if rows is None:
            return features
        if self._case.temperature == "per sample":
            # A wrapper averages, and the gradient of these temperatures has to be summed.
            factor = self._num_ranks
            options["temperature"] = tuple(factor * x[rows] + (1 - factor) * x[rows].detach() for x in self.tables)
        return self.loss(*features, rows, **options)


def train(case: Case, rank: int = 0, num_ranks: int = 1, group: Any = None, mesh: Any = None) -> dict[str, np.ndarray]:
    """Train on the own rows of batches that do not depend on the number of ranks; return what has to be equal."""
    shared = num_ranks > 1
    gathered = case.group == "gathered" and shared
    loss = make_loss(case, group if shared and not gathered else None, num_ranks)
    model = Model(case, loss, num_ranks)
    inner: nn.Module = model
    if case.compiled and shared:
        # The model is compiled before it is wrapped, because the compiler cannot look into the wrappers.
        inner = torch.compile(model, fullgraph=True, backend=BACKEND)  # type: ignore[assignment]
    wrapped = wrap(inner, case, mesh) if shared else model
    parameters = [x for x in {*model.parameters(), *loss.parameters()} if x.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    losses = []
    for step in range(case.steps):
        *inputs, rows, options = batch(case, step, rank, num_ranks)
        optimizer.zero_grad()
        if case.micro and shared:
            value = in_micro_batches(case, wrapped, inputs, lambda *x, r=rows, o=options: loss(*x, r, **o))
        elif gathered:
            *inputs, all_rows, all_options = batch(case, step, 0, 1)
            own = wrapped(*(own_rows(x, rank, num_ranks) for x in inputs))
            value = loss(*(whole(x, rank, num_ranks) for x in own), all_rows, gathered=True, **all_options)
            value.backward()
        elif case.outside:
            with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
                features = wrapped(*inputs)
                value = loss(*features, rows, **options)
            value.backward()
        else:
            value = wrapped(*inputs, rows, **options)
            value.backward()
        if shared and case.wrapper == "plain":
            reduce_by_hand(model, loss, group)
        optimizer.step()
        losses.append(value.item())
    return results(case, model, loss, losses)


def make_loss(case: Case, group: Any, num_ranks: int) -> ContrastiveLoss:
    """Build the loss of a case."""
    value = torch.tensor([0.3] if case.temperature in ("learned", "frozen") else 0.3, dtype=torch.float64)
    temperature: Any = 0.3
    if case.temperature in ("learned", "frozen"):
        temperature = nn.Parameter(value, requires_grad=case.temperature == "learned")
    elif case.temperature == "buffer":
        temperature = value
    options: dict[str, Any] = {}
    if case.split and group is not None:
        ranks = TorchRanks(group)
        options["estimator"] = InnerEstimator(SAMPLES, like=torch.zeros(1, dtype=torch.float64), ranks=ranks)
    if case.extras:
        options |= {"radius": 0.3, "eps": 0.01, "reference_weight": 0.7}
    if group is not None:
        options |= {"process_group": group, "form": case.form, "gradient_scale": 1.0 if case.sums else None}
    loss = ContrastiveLoss(SAMPLES, temperature=temperature, gamma=0.6, **options)
    return loss.double()


def wrap(model: nn.Module, case: Case, mesh: Any) -> Any:
    """Wrap a model as the case says."""
    if case.wrapper == "ddp":
        wrapped = DistributedDataParallel(model, process_group=mesh.get_group(), find_unused_parameters=case.unused)
        if case.sums:
            # DDP compares annotations with its own types, and here they are texts.
            wrapped.register_comm_hook(mesh.get_group(), lambda group, bucket: summed_bucket(group, bucket))
        return wrapped
    if case.wrapper in ("fsdp", "hsdp"):
        sharded: Any = fully_shard(model, mesh=mesh)
        if case.sums:
            sharded.set_gradient_divide_factor(1.0)
        return sharded
    return model


def summed_bucket(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients; the usual hook of DDP averages."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def batch(case: Case, step: int, rank: int, num_ranks: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Return the own images, texts and rows of a batch, and the own rows of the options."""
    p = problems.draw(
        step,
        b=TOTAL,
        d=WIDTH["images"],
        r=WIDTH["references"] if case.extras else None,
        mask="empty" if case.extras else None,
    )
    generator = np.random.default_rng(step)
    arrays: dict[str, Any] = {"rows": generator.permutation(SAMPLES)[:TOTAL]}
    arrays |= {"images": p.image_features, "texts": p.text_features}
    if case.extras:
        arrays |= {"reference_features": p.reference_features, "pair_mask": p.pair_mask}
        arrays["anchor_weight"] = generator.uniform(0.5, 2.0, TOTAL)
    own = {name: own_rows(tensors(x), rank, num_ranks) for name, x in arrays.items()}
    images, texts = own.pop("images"), own.pop("texts")
    if case.autocast:
        images, texts = images.float(), texts.float()
    return images, texts, own.pop("rows"), own


def tensors(value: Any) -> Any:
    """Return an array, or each array of a pair, as a tensor."""
    return tuple(map(tensors, value)) if isinstance(value, tuple) else torch.from_numpy(value)


def in_micro_batches(
    case: Case, wrapped: Any, inputs: list[Tensor], loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Compute loss and gradients with two rows at a time in the encoders, or with all rows at once."""
    if case.micro != "by hand":
        size = 2 if case.micro == "helper" else len(inputs[0])
        return micro_batches(wrapped, tuple(inputs), loss, size=size, model=wrapped)
    parts = [slice(start, start + 2) for start in range(0, len(inputs[0]), 2)]
    with torch.no_grad():
        sides = zip(*(wrapped(*(x[part] for x in inputs)) for part in parts), strict=True)
    features = [torch.cat(side).requires_grad_() for side in sides]
    value = loss(*features)
    value.backward()
    for part in parts:
        last = part is parts[-1]
        with ExitStack() as stack:
            if case.wrapper == "ddp":
                stack.enter_context(nullcontext() if last else wrapped.no_sync())
            else:
                wrapped.set_requires_gradient_sync(last)
            again = wrapped(*(x[part] for x in inputs))
            torch.autograd.backward(again, [x.grad[part] for x in features])  # type: ignore[index]
    return value.detach()


def whole(own: Tensor, rank: int, num_ranks: int) -> Tensor:
    """Return the rows of all ranks; the own ones keep their graph, with W times their gradient for a mean over W."""
    own = num_ranks * own + (1 - num_ranks) * own.detach()
    parts = [torch.empty_like(own) for _ in range(num_ranks)]
    dist.all_gather(parts, own.detach())
    return torch.cat([own if place == rank else part for place, part in enumerate(parts)])


def reduce_by_hand(model: Model, loss: ContrastiveLoss, group: Any) -> None:
    """Do without a wrapper what a wrapper does: average the gradients of encoders, or sum them if their scale is 1."""
    ranks = TorchRanks(group)
    for parameter in (model.image, model.text):
        (total,) = ranks.all_sum((parameter.grad,))
        parameter.grad = total / loss.gradient_scale


def results(case: Case, model: Model, loss: ContrastiveLoss, losses: list[float]) -> dict[str, np.ndarray]:
    """Return losses, weights, the gradients of the last step, and estimates as whole arrays."""

    def plain(x: Any) -> np.ndarray:
        whole = x.full_tensor() if hasattr(x, "full_tensor") else x
        return whole.detach().double().numpy().copy()

    found = {"loss": np.asarray(losses)}
    for name, parameter in {**dict(model.named_parameters()), **dict(loss.named_parameters())}.items():
        name = name.removeprefix("loss.")
        found[name] = plain(parameter)
        if parameter.grad is not None:
            found[f"gradient of {name}"] = plain(parameter.grad)
    estimates = [loss.log_inner_image, loss.log_inner_text]
    if case.split and loss.process_group is not None:
        ranks = TorchRanks(loss.process_group)
        # A new loss takes the rows of this process from the state of the old one.
        again = InnerEstimator(SAMPLES, like=torch.zeros(1, dtype=torch.float64), ranks=ranks)
        ContrastiveLoss(SAMPLES, temperature=0.3, estimator=again, process_group=loss.process_group).load_state_dict(
            {key: value for key, value in loss.state_dict().items() if key != "temperature"}
        )
        estimates = [x.flatten() for x in ranks.all_gather((again.log_inner_image, again.log_inner_text))]
    return found | {"log_inner_image": plain(estimates[0]), "log_inner_text": plain(estimates[1])}


def all_cases(world_size: int) -> dict[str, dict[str, np.ndarray]]:
    """Run the cases of one launch on this process."""
    rank = dist.get_rank()
    flat = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
    square = flat
    if world_size == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    done = {}
    for name, case in CASES[world_size].items():
        mesh = square if case.wrapper == "hsdp" else flat
        if case.group == "submesh":
            # The processes of a row of the mesh train together, and the rows know nothing of each other.
            mesh = square["shard"]
            done[name] = train(case, mesh.get_local_rank(), 2, mesh, mesh)
            continue
        groups = {"mesh": flat, "world": dist.group.WORLD, "gathered": None}
        group = square._flatten("all") if case.group == "flattened" else groups[case.group]
        done[name] = train(case, rank, world_size, group, mesh)
    return done
