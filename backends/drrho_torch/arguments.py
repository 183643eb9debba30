"""Arguments of the torch functions: their checks, and their form under torch.compile."""

from __future__ import annotations

import os
from typing import Any

import array_api_compat.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from drrho_core import checks
from drrho_torch.closed_form import detached

_XP = array_api_compat.torch


def check_tensor(name: str, value: Any) -> None:
    """Check that an argument is a tensor, before the core compares it with the other arguments.

    Raises
    ------
    TypeError
        If the value is not a tensor. The message names this argument, even if other arguments are wrong as well.
    """
    if not isinstance(value, Tensor):
        kind = type(value)
        full = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        raise TypeError(f"{name} must be a torch tensor (torch.as_tensor), got {full}")
    # A DTensor holds a part of a tensor whose other parts lie on other processes. Only DTensors have this method.
    if hasattr(value, "full_tensor"):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor; inside the forward pass of a module that FSDP2 shards "
            "parameters are plain, to_local() returns the own rows, and full_tensor() gathers all of them"
        )


def check_batch(image_features: Any, text_features: Any, sample_index: Any) -> None:
    """Check the features and the index of a call.

    Raises
    ------
    TypeError, ValueError
        If an argument is no tensor, or if shapes or dtypes do not fit.
    """
    check_tensor("image_features", image_features)
    check_tensor("text_features", text_features)
    check_tensor("sample_index", sample_index)
    if sample_index.ndim != 1:
        raise ValueError(
            "sample_index must have shape (batch_size,), one row id per sample of the batch, "
            f"got {tuple(sample_index.shape)}"
        )
    if not _XP.isdtype(sample_index.dtype, "integral"):
        raise TypeError(f"sample_index must have an integer dtype, got {sample_index.dtype}")
    checks.ndim("image_features", image_features, 2, "(batch_size, feature_dim)")
    # If the features have different numbers of rows, the core reports this with a clearer message.
    if text_features.shape[:1] == image_features.shape[:1]:
        checks.shape("sample_index", sample_index, (image_features.shape[0],), "(batch_size,)")


def check_world_size(*, gathered: bool) -> None:
    """Check that no negatives are missing if no process group is given.

    Then there must be no other process, or the caller must have gathered all batches.

    Raises
    ------
    RuntimeError
        If there are several processes and the batches are not gathered.
    """
    if gathered or not dist.is_available():
        return
    world_size = 1
    if dist.is_initialized():
        world_size = dist.get_world_size()
    # Before init_process_group the name group.WORLD is None, so a loss may have been built without a group by mistake.
    elif not torch.compiler.is_compiling() and dist.is_torchelastic_launched():
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise RuntimeError(
            "world size must be 1 if ContrastiveLoss has no process group, because negatives of other ranks would be "
            "missing (build it after init_process_group with process_group=torch.distributed.group.WORLD, or gather "
            f"the batches and pass gathered=True), got {world_size}"
        )


def number_or_tensor(temperature: Any) -> Any:
    """Return a temperature after checking that it is a number, a plain tensor or a pair; (1,) becomes a scalar.

    Raises
    ------
    TypeError
        If the temperature is an array of another library, or a tensor that is split among processes.
    """
    # The core would use attributes of the array that only tensors have, and the error would not name the argument.
    # A number comes first, because the compiler cannot ask a traced number for the attributes of an array.
    if isinstance(temperature, int | float):
        return temperature
    if checks.is_array(temperature) and not isinstance(temperature, Tensor):
        raise TypeError(
            "temperature must be a number or a torch tensor (torch.as_tensor), "
            f"got {type(temperature).__module__}.{type(temperature).__name__}"
        )
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature)
        # FSDP2 shards the first axis of each parameter, so it refuses a parameter of shape ().
        if temperature.shape == (1,):
            return temperature.reshape(())
    return temperature


def module_temperature(temperature: Any) -> float | Tensor:
    """Check the temperature that a module is built with; return a float or a tensor that the module may keep.

    Raises
    ------
    TypeError, ValueError
        If the temperature is neither a number nor a scalar tensor > 0, or if it was computed from another tensor.
    """
    checked: float | Tensor = checks.parameter(
        "temperature", detached(number_or_tensor(temperature)), checks.POSITIVE, _XP
    )
    if not isinstance(temperature, Tensor):
        return checked
    # The first backward pass frees the graph that leads to a computed tensor, so the second step would fail.
    if temperature.grad_fn is not None:
        raise ValueError(
            "temperature must be a number, a Parameter or a tensor without history, got one that was computed; pass "
            "such a tensor with each call"
        )
    # load_state_dict writes to this tensor, which torch forbids if the tensor was made under inference_mode.
    if temperature.is_inference() and not isinstance(temperature, nn.Parameter):
        with torch.inference_mode(False):
            return temperature.clone()
    return temperature


def traced_number(value: Any, like: Tensor) -> Any:
    """Return a number as a tensor on the device of `like` if code is being traced; return other values unchanged."""
    # With ``dynamic=True`` a number is a symbol without a value, which the checks of the core cannot read.
    if torch.compiler.is_compiling() and not isinstance(value, (Tensor, tuple, list)):
        return torch.full((), value, dtype=torch.float64, device=like.device)
    return value


def is_pair(value: Any) -> bool:
    """Tell whether a value is a pair: one member for the image anchors, one for the text anchors."""
    return isinstance(value, (tuple, list)) and len(value) == 2


def two_arguments(value: Any) -> tuple[Any, Any]:
    """Return the members of a pair, or any other value and None: an autograd Function ignores tensors in a tuple."""
    return (value[0], value[1]) if is_pair(value) else (value, None)
