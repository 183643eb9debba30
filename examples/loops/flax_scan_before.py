"""A loop in flax and optax with `jax.lax.scan` and a mesh, before the change."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from pairs import VOCABULARY, write_pairs

BATCH, WIDTH = 64, 32


class CLIP(nn.Module):
    """Two small towers and a learned scale of the logits."""

    @nn.compact
    def __call__(self, images, captions):
        """Return both features, of unit norm, and the scale."""
        towers = images.reshape(len(images), -1), nn.Embed(VOCABULARY, WIDTH)(captions).sum(1)
        features = [nn.Dense(WIDTH)(nn.gelu(nn.Dense(WIDTH)(x))) for x in towers]
        image_features, text_features = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in features)
        log_scale = self.param("log_scale", nn.initializers.constant(2.6593), ())
        return image_features, text_features, jnp.exp(log_scale)


model, optimizer = CLIP(), optax.adamw(3e-3)
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def clip_loss(image_features, text_features, scale):
    """Return CLIP's loss."""
    logits = scale * image_features @ text_features.T
    labels = jnp.arange(len(logits))
    losses = [optax.softmax_cross_entropy_with_integer_labels(x, labels) for x in (logits, logits.T)]
    return (losses[0].mean() + losses[1].mean()) / 2


def loss_function(params, batch):
    """Return the loss of a batch."""
    image_features, text_features, scale = model.apply(params, batch["images"], batch["captions"])
    return clip_loss(image_features, text_features, scale)


@partial(jax.jit, donate_argnums=0)
def train_epoch(carry, data, order):
    """Take a step for each row of `order` (steps, BATCH); return the new carry and the loss of each step."""

    def step(carry, rows):
        params, memory = carry
        batch = jax.tree.map(lambda column: column[rows], data)
        batch = jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec("data")))
        loss, gradient = jax.value_and_grad(loss_function)(params, batch)
        updates, memory = optimizer.update(gradient, memory, params)
        return (optax.apply_updates(params, updates), memory), loss

    return jax.lax.scan(step, carry, order)


def start(path):
    """Return the data and the state of training before the first step."""
    data = dict(np.load(path))
    params = model.init(jax.random.key(0), data["images"][:2], data["captions"][:2])
    carry = (params, optimizer.init(params))
    return data, carry


def main(path, epochs=8):
    """Train and save; return the loss of each step and the last state."""
    data, carry = start(path)
    rng, history = np.random.default_rng(0), []
    for epoch in range(epochs):
        order = rng.permutation(len(data["images"]))
        carry, losses = train_epoch(carry, data, order[: len(order) // BATCH * BATCH].reshape(-1, BATCH))
        history += losses.tolist()
        print(f"epoch {epoch}: loss {history[-1]:.4f}")
    with open(f"{path}.msgpack", "wb") as file:
        file.write(flax.serialization.to_bytes(carry))
    return history, carry


if __name__ == "__main__":
    write_pairs("pairs.npz")
    main("pairs.npz")
