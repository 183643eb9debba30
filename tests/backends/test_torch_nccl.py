"""On a GPU: a group of one process on NCCL gives the numbers of the loss without a group, with and without kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from drrho_torch import ContrastiveLoss, HostEstimator, TorchRanks

from drrho_core import InnerEstimator, fused_kernels

REASON = "NCCL needs an NVIDIA GPU"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason=REASON),
    pytest.mark.skipif(not dist.is_available() or not dist.is_nccl_available(), reason="this torch has no NCCL"),
]

B, N, D, R = 96, 300, 48, 32
UNITS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A group of this process on the first GPU."""
    torch.cuda.set_device(0)
    store = tmp_path_factory.mktemp("nccl") / "store"
    dist.init_process_group("nccl", init_method=f"file://{Path(store)}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def results(dtype: Any, kernels: str, options: dict[str, Any], home: str = "replicated") -> list[torch.Tensor]:
    """Return losses, gradients and estimates of two steps; the second one reads the estimates of the first one."""
    generator = torch.Generator().manual_seed(0)

    def unit(width: int) -> torch.Tensor:
        rows = torch.randn(B, width, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(rows, dim=1).to("cuda", dtype)

    temperature = torch.nn.Parameter(torch.tensor(0.1))
    if home == "host":
        options = options | {"estimator": HostEstimator(N, device="cuda")}
    if home == "split":
        options = options | {
            "estimator": InnerEstimator(
                N, like=torch.zeros(1, device="cuda"), ranks=TorchRanks(options["process_group"])
            )
        }
    loss = ContrastiveLoss(N, temperature=temperature, gamma=0.7, radius=0.2, **options).to("cuda")
    kept = []
    mask = (torch.rand(B, B, generator=generator) > 0.2).to("cuda")
    for _ in range(2):
        images, texts = unit(D).requires_grad_(), unit(D).requires_grad_()
        references = unit(R), unit(R)
        index = torch.randperm(N, generator=generator)[:B].to("cpu" if home == "host" else "cuda")
        with fused_kernels(kernels):
            value = loss(images, texts, index, reference_features=references, pair_mask=mask)
        value.backward()
        kept += [value.detach(), images.grad, texts.grad]
    estimates = loss.log_inner_image if loss.estimator is None else loss.estimator.log_inner_image
    return [*kept, loss.temperature.grad, estimates.to("cuda")]  # type: ignore[list-item, union-attr]


@pytest.mark.parametrize("home", ["replicated", "split", "host"])
@pytest.mark.parametrize("form", ["reduce", "ring"])
@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_a_group_of_one_process_gives_the_local_loss(group: Any, dtype: Any, form: str, home: str) -> None:
    expected = results(dtype, "never", {})
    shared = results(dtype, "never", {"process_group": group, "form": form}, home)
    for one, other in zip(shared, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=UNITS[dtype], atol=1e-6)


@pytest.mark.parametrize("operation", ["all_gather", "all_sum", "all_to_all", "reduce_scatter", "shift"])
def test_the_operations_of_ranks_run_on_the_device(group: Any, operation: str) -> None:
    ranks, x = TorchRanks(group), torch.arange(6.0, device="cuda").reshape(1, 6)
    received = getattr(ranks, operation)((x, 2 * x))
    assert all(y.device == x.device for y in received)
    torch.testing.assert_close(received[0].flatten(), x.flatten())
    torch.testing.assert_close(received[1].flatten(), 2 * x.flatten())
