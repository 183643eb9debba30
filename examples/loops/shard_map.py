"""A JAX loop on all devices; a checkpoint is continued by any number of devices that divides BATCH.

python shard_map.py pairs.npz checkpoint.npz 16
"""

from __future__ import annotations

import os
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from drrho_jax import contrastive_loss, init_state
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from pairs import SIDE, VOCABULARY

BATCH, WIDTH = 64, 32  # BATCH counts the pairs of all devices

mesh = jax.make_mesh((jax.device_count(),), ("pairs",), axis_types=(AxisType.Auto,))
optimizer = optax.adamw(3e-3)


def encode(params, images, captions):
    """Return both features, of unit norm."""
    towers = images.reshape(len(images), -1) @ params["image"], params["tokens"][captions].sum(1)
    return [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in towers]


def loss_function(params, estimates, batch):
    """Return the loss of the pairs of all devices; `batch` holds those of one device."""
    features = encode(params, batch["images"], batch["captions"])
    options = {"temperature": jnp.exp(params["log_temperature"]), "gamma": 0.9, "radius": 2.0}
    options |= {"reference_features": batch["reference"], "axis_name": "pairs"}
    return contrastive_loss(estimates, *features, batch["rows"], **options)


@partial(jax.jit, donate_argnums=0)
@partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("pairs")), out_specs=P())
def train_step(carry, batch):
    """Return the new carry and the loss; every device gets the carry and its part of the batch."""
    params, memory, estimates = carry
    # `shard_map` sums the gradients of the parameters over devices.
    (loss, estimates), gradient = jax.value_and_grad(loss_function, has_aux=True)(params, estimates, batch)
    updates, memory = optimizer.update(gradient, memory, params)
    return (optax.apply_updates(params, updates), memory, estimates), loss


def start(num_pairs):
    """Return the state of training before the first step."""
    keys = jax.random.split(jax.random.key(0))
    params = {
        "image": 0.05 * jax.random.normal(keys[0], (3 * SIDE * SIDE, WIDTH)),
        "tokens": 0.1 * jax.random.normal(keys[1], (VOCABULARY, WIDTH)),
        "log_temperature": jnp.log(0.07),
    }
    return params, optimizer.init(params), init_state(num_pairs)


def main(path, checkpoint, num_steps):
    """Train until `num_steps` steps are done, from `checkpoint` if the file exists; return the losses."""
    data = dict(np.load(path))
    n = len(data["images"])
    data |= {"rows": np.arange(n), "reference": tuple(np.load(f"{path}.npy"))}
    carry, step, history = start(n), 0, []
    if os.path.exists(checkpoint):
        *leaves, step = np.load(checkpoint).values()
        carry, step = jax.tree.unflatten(jax.tree.structure(carry), leaves), int(step)
    while step < num_steps:
        # The global batch depends on the number of the step alone; `shard_map` divides the rows among the devices.
        epoch, place = divmod(step, n // BATCH)
        rows = np.random.default_rng(epoch).permutation(n)[BATCH * place : BATCH * (place + 1)]
        carry, loss = train_step(carry, jax.tree.map(partial(np.take, indices=rows, axis=0), data))
        history.append(float(loss))
        step += 1
    np.savez(f"{checkpoint}.partial.npz", *jax.tree.leaves(carry), num_steps)
    os.replace(f"{checkpoint}.partial.npz", checkpoint)
    return history


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
