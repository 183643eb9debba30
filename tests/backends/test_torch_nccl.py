"""A group of one process gives the numbers of the loss without a group: on a GPU with NCCL, else with gloo.

The CPU takes the same lines, so a change that breaks this file is seen without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from drrho_torch import ContrastiveLoss, HostEstimator, TorchRanks
from drrho_torch.processes import TorchProcesses
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from drrho_clip.processes.place import Place
from drrho_core import InnerEstimator, fused_kernels

pytestmark = pytest.mark.gpu

ON_GPU = torch.cuda.is_available() and dist.is_available() and dist.is_nccl_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

needs_kernels = pytest.mark.skipif(
    find_spec("triton") is None or not (ON_GPU or INTERPRETED),
    reason="Triton is not installed, or has no GPU and no TRITON_INTERPRET=1",
)
needs_nccl = pytest.mark.skipif(not ON_GPU, reason="NCCL needs an NVIDIA GPU")

B, N, D, R = 96, 300, 48, 32

UNITS = {torch.float32: 2.0**-17, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
"""Errors of features' gradients, relative to the largest entry: gradients and weights are rounded to half types."""

LOGARITHM = 1e-4
"""Error of losses, estimates and a temperature's gradient, which are sums in float32."""


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A group of this process."""
    options: dict[str, Any] = {}
    if ON_GPU:
        torch.cuda.set_device(DEVICE)
        # Without the device NCCL guesses, and warns at a barrier.
        options["device_id"] = DEVICE
    store = Path(tmp_path_factory.mktemp("group")) / "store"
    backend = "nccl" if ON_GPU else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1, **options)
    yield dist.group.WORLD
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def quiet_interpreter() -> Iterator[None]:
    """Let Triton's interpreter compute with NumPy as a device does, without a warning about an overflow."""
    with np.errstate(all="ignore"):
        yield


class Encoders(nn.Module):
    """Two linear encoders and the loss of their features."""

    def __init__(self, loss: ContrastiveLoss, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.image, self.text = (nn.Parameter(torch.randn(D, D, generator=generator).to(dtype)) for _ in range(2))
        self.loss = loss

    def forward(self, images: Tensor, texts: Tensor, index: Tensor, reference: Any, mask: Tensor) -> Tensor:
        unit = nn.functional.normalize
        features = unit(images @ self.image, dim=1), unit(texts @ self.text, dim=1)
        value: Tensor = self.loss(*features, index, reference_features=reference, pair_mask=mask)
        return value


def estimator_in(home: str, group: Any) -> Any:
    """Return the estimator that keeps the estimates in a home; None for the buffers of the loss."""
    if home == "host":
        return HostEstimator(N, device=DEVICE)
    if home == "split":
        return InnerEstimator(N, like=torch.zeros(1, device=DEVICE), ranks=TorchRanks(group))
    return None


def results(
    dtype: torch.dtype,
    group: Any = None,
    *,
    form: str = "reduce",
    kernels: str = "never",
    home: str = "replicated",
    wrap: Any = lambda model: model,
) -> dict[str, list[Tensor]]:
    """Return losses, gradients and estimates of two steps; the second one reads the estimates of the first one."""
    generator = torch.Generator().manual_seed(0)

    def rows(width: int) -> Tensor:
        drawn = torch.randn(B, width, generator=generator)
        return nn.functional.normalize(drawn, dim=1).to(DEVICE, dtype)

    options: dict[str, Any] = {} if group is None else {"process_group": group, "form": form}
    if (estimator := estimator_in(home, group)) is not None:
        options["estimator"] = estimator
    loss = ContrastiveLoss(N, temperature=nn.Parameter(torch.tensor(0.1)), gamma=0.7, radius=0.2, **options)
    model = Encoders(loss, dtype).to(DEVICE)
    called = wrap(model)
    kept: dict[str, list[Tensor]] = {"losses": [], "gradients": [], "estimates": []}
    mask = (torch.rand(B, B, generator=generator) > 0.2).to(DEVICE)
    for _ in range(2):
        images, texts, reference = rows(D), rows(D), (rows(R), rows(R))
        index = torch.randperm(N, generator=generator)[:B].to("cpu" if home == "host" else DEVICE)
        with fused_kernels(kernels):
            value = called(images, texts, index, reference, mask)
        value.backward()
        kept["losses"].append(value.detach())
    gradients = (model.image.grad, model.text.grad, loss.temperature.grad)
    kept["gradients"] = [gradient for gradient in gradients if gradient is not None]
    owner: Any = loss if loss.estimator is None else loss.estimator
    kept["estimates"] = [owner.log_inner_image, owner.log_inner_text]
    return kept


def assert_same(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]], dtype: torch.dtype) -> None:
    """Assert that losses, estimates and gradients are equal up to rounding."""
    for name in ("losses", "estimates"):
        for one, other in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(one.to(other.device), other, rtol=LOGARITHM, atol=LOGARITHM)
    *encoders, temperature = zip(found["gradients"], expected["gradients"], strict=True)
    for one, other in encoders:
        torch.testing.assert_close(one, other, rtol=0.0, atol=UNITS[dtype] * float(other.abs().max()))
    torch.testing.assert_close(*temperature, rtol=LOGARITHM, atol=LOGARITHM)


@pytest.mark.parametrize("home", ["replicated", "split", "host"])
@pytest.mark.parametrize("form", ["reduce", "ring"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_group_of_one_process_gives_the_local_loss(group: Any, dtype: Any, form: str, home: str) -> None:
    assert_same(results(dtype, group, form=form, home=home), results(dtype), dtype)


@needs_kernels
@pytest.mark.parametrize("home", ["replicated", "split"])
@pytest.mark.parametrize("form", ["reduce", "ring"])
@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_kernels_in_a_group_give_the_local_loss(group: Any, dtype: Any, form: str, home: str) -> None:
    assert_same(results(dtype, group, form=form, home=home, kernels="always"), results(dtype), dtype)


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools")
@pytest.mark.parametrize("kernels", ["never", pytest.param("always", marks=needs_kernels)])
@pytest.mark.parametrize(("form", "home"), [("reduce", "replicated"), ("ring", "split")])
def test_a_compiled_loss_of_a_group_gives_the_local_loss(group: Any, form: str, home: str, kernels: str) -> None:
    def wrap(model: Encoders) -> Any:
        return torch.compile(model, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")

    dtype = torch.float32
    assert_same(results(dtype, group, form=form, home=home, kernels=kernels, wrap=wrap), results(dtype), dtype)
    torch.compiler.reset()


# On the CPU, DDP keeps the group of gloo alive after its end; docs/many-devices.md says what follows.
@needs_nccl
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools")
@pytest.mark.parametrize("kernels", ["never", pytest.param("always", marks=needs_kernels)])
@pytest.mark.parametrize("compiled", [False, True])
def test_ddp_gives_the_local_loss(group: Any, compiled: bool, kernels: str) -> None:
    def wrap(model: Encoders) -> Any:
        inner: Any = torch.compile(model, fullgraph=True) if compiled else model
        return DistributedDataParallel(inner, device_ids=[0])

    dtype = torch.bfloat16
    assert_same(results(dtype, group, kernels=kernels, wrap=wrap), results(dtype), dtype)
    torch.compiler.reset()


@pytest.mark.parametrize("operation", ["all_gather", "all_sum", "all_to_all", "reduce_scatter", "shift"])
def test_the_operations_of_ranks_run_on_the_device(group: Any, operation: str) -> None:
    ranks, x = TorchRanks(group), torch.arange(6.0, device=DEVICE).reshape(1, 6)
    received = getattr(ranks, operation)((x, 2 * x))
    assert all(y.device == x.device for y in received)
    torch.testing.assert_close(received[0].flatten(), x.flatten())
    torch.testing.assert_close(received[1].flatten(), 2 * x.flatten())


def test_tensors_of_several_dtypes_travel_in_one_message(group: Any) -> None:
    sent = tuple(
        torch.arange(5, device=DEVICE).to(dtype)
        for dtype in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32)
    )
    for x, (received,) in zip(sent, TorchRanks(group).all_gather(sent), strict=True):
        assert received.dtype == x.dtype
        torch.testing.assert_close(received, x)


def test_the_harness_exchanges_arrays_of_the_device_and_of_the_host(group: Any) -> None:
    processes = TorchProcesses(DEVICE, Place(0, 1, 0, None))
    assert processes.gather({"step": 3}) == [{"step": 3}]
    (array,) = processes.gather_arrays(np.arange(3.0))
    np.testing.assert_array_equal(array, np.arange(3.0))
    (rows,) = processes.all_rows((torch.arange(4.0, device=DEVICE),))
    assert rows.device == DEVICE
    assert rows.tolist() == [0.0, 1.0, 2.0, 3.0]
