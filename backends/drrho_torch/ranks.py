"""Processes of torch.distributed as ranks that share a batch; see `drrho_core.Ranks`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# This module must be imported before a group is made: its functions have the group of the moment as a default argument,
# and the first optimiser imports it. Such a group would outlive `destroy_process_group`, and so would the threads of
# gloo; and Python aborts if it ends while one of them is at work.
if dist.is_available():
    import torch.distributed.nn

Arrays: TypeAlias = tuple[Tensor, ...]
"""The tensors of one message."""

# torch 2.13 has new names for these collectives and warns about the old names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


class TorchRanks:
    """The operations by which the processes of a group exchange tensors, each as one collective of torch.distributed.

    Autograd does not see these collectives. They are called where no gradient is recorded, in the forward pass of a
    Function with a closed-form gradient.

    Parameters
    ----------
    process_group : ProcessGroup or DeviceMesh
        The processes that share each batch; a mesh has one dimension. Every process of the group has to call every
        operation.

    Attributes
    ----------
    rank, size : int
        Number of this process in the group, and number of processes.
    processes : tuple of int
        The numbers of the group's processes among all processes, in the order of the group.

    Raises
    ------
    TypeError, ValueError
        If `process_group` is neither, or if the mesh has several dimensions.
    """

    def __init__(self, process_group: Any) -> None:
        if isinstance(process_group, DeviceMesh):
            if process_group.ndim != 1:
                raise ValueError(
                    "process_group must be a mesh of one dimension, such as mesh['dp'] or a flattened mesh, "
                    f"got one of {process_group.ndim} dimensions"
                )
            # A mesh has no group on a process outside of the mesh.
            is_member = process_group.get_coordinate() is not None
            process_group = process_group.get_group() if is_member else dist.GroupMember.NON_GROUP_MEMBER
        # `new_group` returns this object on each process outside of the new group.
        if process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"process_group must contain this process, got a group without global rank {dist.get_rank()}; build "
                "the loss on the processes of the group only"
            )
        if not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be a process group or a DeviceMesh, such as torch.distributed.group.WORLD after "
                f"init_process_group, got {type(process_group).__name__}"
            )
        self.group = process_group
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.processes = tuple(dist.get_process_group_ranks(process_group))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return this object: a copy of a module shares the process group, which cannot be copied."""
        return self

    def __reduce__(self) -> Any:
        """Refuse to be pickled.

        Raises
        ------
        TypeError
            Always, because a process group exists in a running program only.
        """
        raise TypeError(
            "an object with a process_group cannot be pickled, because the group exists in this program only; save "
            "state_dict() and load it into an object that is built with the process_group of the other program"
        )

    def check_alive(self) -> None:
        """Check that the group still exists.

        Raises
        ------
        RuntimeError
            If the group was destroyed.
        """
        # After a destruction torch has no entry for the group, and a collective would fail or wait for other processes.
        try:
            dist.get_backend(self.group)
        except ValueError as error:
            raise RuntimeError(
                "process_group must exist as long as the loss is called, got a group that was destroyed; call "
                "init_process_group and build the loss again with the new group"
            ) from error

    def all_gather(self, arrays: Arrays, /) -> Arrays:
        """Return each tensor of all ranks, in a new first axis."""
        message = _packed(arrays, 1)
        received = message.new_empty((self.size, message.shape[1]))
        _all_gather(received, message, group=self.group)
        return _unpacked(received, [x.shape for x in arrays], [x.dtype for x in arrays])

    def all_sum(self, arrays: Arrays, /) -> Arrays:
        """Return the sum of each tensor over all ranks; the tensors share one dtype."""
        message = torch.cat([x.reshape(-1) for x in arrays])
        dist.all_reduce(message, group=self.group)
        parts = torch.split(message, [x.numel() for x in arrays])
        return tuple(part.reshape(x.shape) for part, x in zip(parts, arrays, strict=True))

    def all_to_all(self, arrays: Arrays, /) -> Arrays:
        """Send entry k of each tensor to rank k; entry k of the result came from rank k."""
        message = _packed(arrays, self.size)
        received = torch.empty_like(message)
        dist.all_to_all_single(received, message, group=self.group)
        return _unpacked(received, [x.shape[1:] for x in arrays], [x.dtype for x in arrays])

    def reduce_scatter(self, arrays: Arrays, /) -> Arrays:
        """Return the sum over all ranks of the entry `rank` of each tensor; the tensors share one dtype."""
        message = torch.cat([x.reshape(self.size, -1) for x in arrays], dim=1)
        if message.device.type == "cpu":
            # gloo sums all entries on all ranks, which takes twice the bytes and up to five times as long.
            exchanged = torch.empty_like(message)
            dist.all_to_all_single(exchanged, message, group=self.group)
            received = exchanged.sum(dim=0)
        else:
            received = message.new_empty(message.shape[1])
            _reduce_scatter(received, message.reshape(-1), group=self.group)
        parts = torch.split(received, [x[0].numel() for x in arrays])
        return tuple(part.reshape(x.shape[1:]) for part, x in zip(parts, arrays, strict=True))

    def shift(self, arrays: Arrays, /) -> Arrays:
        """Send the tensors to rank - 1 and return those of rank + 1."""
        message = _packed(arrays, 1)
        received = torch.empty_like(message)
        # On gloo a pair of isend and irecv takes several times as long for few bytes, and a rank cannot send to itself.
        taken, given = [0] * self.size, [0] * self.size
        taken[(self.rank + 1) % self.size] = given[(self.rank - 1) % self.size] = message.shape[1]
        dist.all_to_all_single(received[0], message[0], taken, given, group=self.group)
        entries = _unpacked(received, [x.shape for x in arrays], [x.dtype for x in arrays])
        return tuple(x[0] for x in entries)

    def repeat(self, count: int, body: Callable[[Any, Arrays], Arrays], carry: Arrays, /) -> Arrays:
        """Apply ``carry = body(k, carry)`` for k = 1, ..., count and return the carry."""
        for k in range(1, count + 1):
            carry = body(k, carry)
        return carry


def _packed(arrays: Arrays, rows: int) -> Tensor:
    """Return tensors as one message of bytes, (rows, bytes); the first axis of each tensor is cut into the rows."""
    # Bytes, because the tensors may have several dtypes, and because gloo does not know every dtype.
    parts = [x.detach().contiguous().reshape(rows, -1).view(torch.uint8) for x in arrays]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _unpacked(message: Tensor, shapes: list[torch.Size], dtypes: list[torch.dtype]) -> Arrays:
    """Return the tensors of a message (rows, bytes), each (rows, ...)."""
    arrays, start = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        stop = start + shape.numel() * dtype.itemsize
        # The copy is aligned in memory, as every dtype needs it. It has one axis, because torch refuses to view an
        # empty matrix of bytes as another dtype.
        part = message[:, start:stop].clone(memory_format=torch.contiguous_format).reshape(-1)
        arrays.append(part.view(dtype).reshape(message.shape[0], *shape))
        start = stop
    return tuple(arrays)
