"""The state of processes that split rows among them, in the form in which torch.distributed.checkpoint (DCP) saves it.

DCP writes a plain tensor once, because it takes the tensor for a copy that all processes hold. A DTensor tells DCP
which part of a whole tensor a process holds; then each process writes the own part, and other numbers of processes can
read the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from drrho_torch.loss import ContrastiveLoss
from drrho_torch.ranks import TorchRanks


class ShardedState:
    """The state of a loss or of a table whose rows may be split among processes, for torch.distributed.checkpoint.

    Pass the object as an entry of the state that ``torch.distributed.checkpoint.save`` or ``load`` takes. After `load`
    the loss or the table holds the rows of the checkpoint, which any number of processes may have written.

    Parameters
    ----------
    owner : ContrastiveLoss, InnerEstimator, HostEstimator or PerSampleTemperature
        The loss, or the table. A loss is saved with the temperature. Rows that are not split are plain tensors.

    Raises
    ------
    TypeError
        If `owner` has no state, or if its rows are split among ranks that are no processes of torch.distributed.

    Notes
    -----
    The checkpoint holds one tensor (n,) per column, under the names that ``state_dict()`` of one process has. All
    processes call `save` and `load` together. DCP splits n rows as the table does: ceil(n / W) for each of the W
    processes, the last ones have fewer or none.

    Examples
    --------
    >>> import torch
    >>> from drrho_core import InnerEstimator
    >>> estimator = InnerEstimator(3, like=torch.zeros(1)).scatter(torch.tensor([1]), torch.ones(1), torch.zeros(1))
    >>> state = {"estimator": ShardedState(estimator)}  # dcp.save(state, checkpoint_id=folder) saves this
    >>> state["estimator"].state_dict()["log_inner_image"]  # a DTensor if processes share the estimator
    tensor([-inf, 1., -inf])
    """

    def __init__(self, owner: Any) -> None:
        holder = owner.estimator if isinstance(owner, ContrastiveLoss) else owner
        table: Any = getattr(holder, "table", None)
        if not isinstance(owner, ContrastiveLoss) and table is None:
            raise TypeError(
                f"owner must be a ContrastiveLoss, an estimator or a PerSampleTemperature, got {type(owner).__name__}"
            )
        ranks = getattr(table, "ranks", None)
        if ranks is not None and not isinstance(ranks, TorchRanks):
            raise TypeError(
                "owner must have rows that are split among processes of torch.distributed (TorchRanks), got "
                f"{type(ranks).__name__}"
            )
        self._owner = owner
        self._rows_key = "estimator.rows" if isinstance(owner, ContrastiveLoss) else "rows"
        self._columns = () if ranks is None else tuple(column.name for column in table.columns)
        self._group = None if ranks is None else ranks.group

    def state_dict(self) -> dict[str, Any]:
        """Return the state; columns that are split are DTensors (n,) that hold the own rows."""
        state = dict(self._owner.state_dict())
        if self._group is None:
            return state
        # This import takes half a second, and few programs need it.
        from torch.distributed.tensor import DTensor, Shard

        num_samples = int(state.pop(self._rows_key)[2])
        for name in self._columns:
            own: Tensor = state[name]
            mesh = DeviceMesh.from_group(self._group, own.device.type)
            state[name] = DTensor.from_local(own, mesh, [Shard(0)], shape=torch.Size([num_samples]), stride=(1,))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the state of the loss or the table by one that `state_dict` returned."""
        state = {name: value.to_local() if hasattr(value, "to_local") else value for name, value in state.items()}
        if self._group is not None:
            # Other processes may have written these rows, so the range of the own rows is the present one.
            state[self._rows_key] = self._owner.state_dict()[self._rows_key]
        self._owner.load_state_dict(state)
