"""A divided state in a checkpoint of Orbax, restored by other numbers of devices."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

NUM_SAVING, NUM_SAMPLES = 4, 24
RESTORING = (4, 2, 1)
"""Numbers of devices that restore what `NUM_SAVING` devices have saved."""


def restored() -> dict[str, tuple[bool, int]]:
    """Return for each number of devices whether all bits are equal, and the number of rows of a device."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from drrho_jax import ContrastiveState, contrastive_loss, init_state
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    def sharding(num_devices: int) -> NamedSharding:
        devices = jax.devices()[:num_devices]
        return NamedSharding(jax.make_mesh((num_devices,), ("pairs",), (AxisType.Auto,), devices=devices), P("pairs"))

    # A step that visits every other sample leaves finite numbers and minus infinity in the state.
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(2, NUM_SAMPLES // 2, 3))
    index = rng.permutation(NUM_SAMPLES)[: NUM_SAMPLES // 2]
    by_rows = sharding(NUM_SAVING)
    state = jax.device_put(init_state(NUM_SAMPLES), by_rows)
    options = {"temperature": 0.5, "gamma": 0.9, "mesh": by_rows.mesh, "axis_name": "pairs", "split_state": True}
    _, state = jax.jit(functools.partial(contrastive_loss, **options))(state, images, texts, index)
    outcome = {}
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "state", state)
        checkpointer.wait_until_finished()
        for number in RESTORING:
            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(number)) for x in state]
            found = checkpointer.restore(Path(folder) / "state", ContrastiveState(*shapes))
            equal = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(found, state, strict=True))
            assert np.isfinite(np.asarray(found.log_inner_image)).sum() == NUM_SAMPLES // 2
            outcome[str(number)] = equal, found.log_inner_image.addressable_shards[0].data.shape[0]
    return outcome
