"""Processes of jax.distributed that train one model together; see `drrho_clip.processes.protocol.Processes`.

A mesh holds all devices of all processes. The training step runs inside of `jax.shard_map` over this mesh, and each
device is a rank: it gets a part of its process's rows of the batch, and the whole state. Between the steps every
process has ordinary arrays on one device of its own, with which it can do all else, such as encode pairs. For a step
these arrays become *global* arrays, which lie on the devices of all processes.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from drrho_clip.errors import BadInput
from drrho_clip.processes.meeting import MEETING_SECONDS, meet
from drrho_clip.processes.messages import arrays_of_all, values_of_all
from drrho_clip.processes.place import Place
from drrho_clip.step import StepBatch, StepResult, is_by_rows
from drrho_core.backend import Function
from drrho_jax.products import in_full_precision
from drrho_jax.ranks import AxisRanks

AXIS = "pairs"
"""The mapped axis along which the devices share the pairs of a batch."""

_global_array: Any = jax.make_array_from_process_local_data  # JAX gives no type hints for this function
# Seconds after which JAX takes a silent process for dead, and seconds that a process waits for others at the end.
_HEARTBEAT, _SHUTDOWN = 30, 10
# Lengths of messages are rounded up to powers of two, because JAX compiles a program for each length.
_SHORTEST = 256


def join(place: Place) -> None:
    """Connect this process with the others; JAX requires that this happens before it is asked for devices.

    Raises
    ------
    BadInput
        If the place has no address of process 0, or if a process does not come.
    """
    if place.size == 1:
        return
    if place.address is None:
        raise BadInput(
            f"coordinator, processes and process must be given for {place.size} processes with the jax backend, which "
            "does not use the address of the launcher, got none"
        )
    # JAX would end this process without a message if another one did not come.
    meet(place)
    # Devices of the CPU exchange arrays by gloo; other devices have libraries of their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # type: ignore[no-untyped-call]
    jax.distributed.initialize(
        place.address,
        num_processes=place.size,
        process_id=place.rank,
        initialization_timeout=int(MEETING_SECONDS),
        heartbeat_timeout_seconds=_HEARTBEAT,
        shutdown_timeout_seconds=_SHUTDOWN,
    )


class JaxProcesses:
    """The processes that `join` has connected, or one process with several devices.

    Parameters
    ----------
    device : jax.Device
        The device on which this process has its arrays between the steps.
    place : Place
        The place of this process among all processes.

    Attributes
    ----------
    device : tuple of (str, None)
        The name of the own device; JAX tells no identity of a GPU.
    num_devices : int
        Number of devices that share a batch.

    Raises
    ------
    RuntimeError
        If `join` has not connected as many processes as the place says.
    """

    def __init__(self, device: jax.Device, place: Place) -> None:
        # Without this check every process would exchange arrays with nobody, and train alone.
        if jax.process_count() != place.size:
            raise RuntimeError(f"join must connect {place.size} processes first, got {jax.process_count()}")
        self.rank, self.size = place.rank, place.size
        self.is_first = place.rank == 0
        self.device = str(device), None
        # In the order of the processes, so that the rows of a process are consecutive in the batch.
        devices = sorted(jax.devices(device.platform), key=lambda each: (each.process_index, each.id))
        mesh = Mesh(np.asarray(devices), (AXIS,))
        self._mesh, self.num_devices = mesh, len(devices)
        self._row_spec, self._whole_spec = PartitionSpec(AXIS), PartitionSpec()  # type: ignore[no-untyped-call]
        self._rows, self._whole = NamedSharding(mesh, self._row_spec), NamedSharding(mesh, self._whole_spec)
        self.ranks = AxisRanks(AXIS)
        self.exchanges_between_steps = False  # the axis exists inside of `jax.shard_map` only
        # The own part of each replicated result of the last step, with the global array, which the next step takes.
        self._device = device
        self._last: dict[int, tuple[jax.Array, jax.Array]] = {}
        self._replicate: Any = jax.jit(lambda arrays: arrays, out_shardings=self._whole)
        if self.size > 1:
            # At the first exchange the library gloo prints a line about its connections, which no user needs.
            with _closed_output():
                self.barrier()

    def gather(self, value: Any, /) -> list[Any]:
        """Return the value of every process, in the order of the ranks."""
        return values_of_all(value, self._exchanged)

    def gather_arrays(self, array: npt.NDArray[Any], /) -> list[npt.NDArray[Any]]:
        """Return the NumPy array of every process; the arrays may differ in shape and dtype."""
        return arrays_of_all(array, self._exchanged)

    def all_rows(self, arrays: tuple[jax.Array, ...], /) -> tuple[jax.Array, ...]:
        """Return the rows of all processes, in the order of the ranks, on the own device."""
        return tuple(map(self._copy_on_device, self._replicate(arrays)))

    def compile(self, step: Function, /) -> Function:
        """Return the training step, compiled for all devices of all processes."""
        rows, whole = self._row_spec, self._whole_spec

        def mapped(state: Any, batch: StepBatch) -> Any:
            fields = batch._asdict().items()
            specs: dict[str, Any] = {name: rows if is_by_rows(name, x) else whole for name, x in fields}
            # Only the gradient of a temperature per sample is a pair, and then the temperature is.
            results: Any = dict.fromkeys(StepResult._fields, whole)
            results |= dict.fromkeys(("log_inner_image", "log_inner_text"), rows)
            results["temperature_gradient"] = specs["temperature"]
            # The step itself adds up the gradients of all ranks, so JAX must not do it, as it does with `check_vma`.
            over_devices = jax.shard_map(
                in_full_precision(step),
                mesh=self._mesh,
                in_specs=(whole, batch._replace(**specs)),
                out_specs=StepResult(**results),
                check_vma=False,
            )
            return over_devices(state, batch)

        compiled = jax.jit(mapped)

        def call(state: Any, batch: StepBatch) -> StepResult:
            rows = {name: self._placed(x, by_rows=is_by_rows(name, x)) for name, x in batch._asdict().items()}
            result: StepResult = compiled(self._placed(state, by_rows=False), batch._replace(**rows))
            self._last = {}
            # Rows stay in global arrays, which `all_rows` takes.
            own = {name: x for name, x in result._asdict().items() if not is_by_rows(name, x)}
            return result._replace(**jax.tree.map(self._own, own))

        shared: Any = call
        return shared  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Wait until every process has called this method."""
        self.gather(None)

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            jax.distributed.shutdown()  # type: ignore[no-untyped-call]

    def _placed(self, tree: Any, *, by_rows: bool) -> Any:
        """Return the arrays of a pytree as global arrays; numbers stay numbers."""

        def place(x: Any) -> Any:
            if not isinstance(x, jax.Array):
                return x
            own, whole = self._last.get(id(x), (None, None))
            if own is x:
                return whole
            return _global_array(self._rows if by_rows else self._whole, x)

        return jax.tree.map(place, tree)

    def _own(self, whole: jax.Array) -> jax.Array:
        """Return the part of a replicated array that lies on the own device, and remember the array."""
        own = self._copy_on_device(whole)
        self._last[id(own)] = own, whole
        return own

    def _copy_on_device(self, whole: jax.Array) -> jax.Array:
        """Return the copy of a replicated array that lies on the own device."""
        copies: dict[Any, jax.Array] = {shard.device: shard.data for shard in whole.addressable_shards}
        return copies[self._device]

    def _exchanged(self, message: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
        """Return the bytes of every process; all messages have the same length."""
        length = max(_SHORTEST, 1 << (message.size - 1).bit_length())
        padded = np.zeros(length, dtype=np.uint8)
        padded[: message.size] = message
        received = multihost_utils.process_allgather(padded)
        return [row[: message.size] for row in np.asarray(received)]


@contextlib.contextmanager
def _closed_output() -> Iterator[None]:
    """Drop what libraries in other languages print on standard output."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
