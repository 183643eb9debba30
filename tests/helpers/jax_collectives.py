"""The traffic and the memory of a compiled step of several devices, read from the compiler's text and its plan."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

ROWS, WIDTH, REFERENCE_WIDTH = 128, 16, 8
"""Own pairs of each device, and the widths of the features of the learner and of the reference model."""

# An instruction of the compiled program: its result, which may be a tuple, and its operation.
_INSTRUCTION = re.compile(
    r"= (?P<result>\(.*?\)|\S+) (?P<operation>all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\("
)
_LOOP = "/while/body/"
_ARRAY = re.compile(r"(?P<kind>[a-z]+)(?P<bits>\d+)\[(?P<shape>[\d,]*)\]")


MICRO_BATCHES = 4
"""The number of micro-batches of a device in the step of `micro_batches_of`."""


class Traffic(NamedTuple):
    """Bytes that a device receives in a step, and the compiler's plan of the temporary memory of a device.

    The bytes of arrays with one row per pair stand apart from those of all other arrays.
    """

    of_pairs: float
    of_others: float
    memory: int


def traffic_of(form: str, num_devices: int) -> Traffic:
    """Compile a step with a reference model and a temperature per anchor, and return what it sends and keeps."""
    import jax
    import jax.numpy as jnp
    from drrho_jax import contrastive_loss, init_state
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((num_devices,), ("pairs",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_devices])

    def loss(features: Any, references: Any, temperatures: Any, state: Any, rows: Any) -> Any:
        options = {"gamma": 0.9, "axis_name": "pairs", "form": form, "reference_features": references}
        return contrastive_loss(state, *features, rows, temperature=temperatures, **options)

    def step(features: Any, references: Any, temperatures: Any, state: Any, rows: Any) -> Any:
        # Without the gradient of the temperatures the compiler drops a part of the last hop of the ring.
        differentiate = jax.value_and_grad(loss, argnums=(0, 2), has_aux=True)
        return differentiate(features, references, temperatures, state, rows)

    num_pairs = num_devices * ROWS
    features, references = (
        (jnp.zeros((num_pairs, width), dtype=jnp.float32),) * 2 for width in (WIDTH, REFERENCE_WIDTH)
    )
    temperatures = (jnp.ones(num_pairs, dtype=jnp.float32),) * 2
    rows, state = jnp.arange(num_pairs), init_state(num_pairs, dtype=jnp.float32)
    by_rows = P("pairs")
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(by_rows, by_rows, by_rows, P(), by_rows),
        out_specs=((P(), P()), by_rows),
    )
    compiled = jax.jit(mapped).lower(features, references, temperatures, state, rows).compile()
    return Traffic(*received(compiled.as_text(), num_devices), compiled.memory_analysis().temp_size_in_bytes)


class MicroBatches(NamedTuple):
    """A step in micro-batches beside the step of the whole batch.

    `of_gradient` and `of_whole_gradient` count the bytes of all-reduces of arrays with the shape of a parameter, in a
    step in micro-batches and in a step of the whole batch; `expected` is the size of the parameters. `difference` is
    the largest difference of the results, relative to the largest number of each array.
    """

    of_gradient: float
    of_whole_gradient: float
    expected: int
    difference: float


def micro_batches_of(num_devices: int) -> MicroBatches:
    """Compile a step in micro-batches inside of `jax.shard_map`, where JAX sums over the devices."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from drrho_jax import contrastive_loss, init_state, micro_batches
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((num_devices,), ("pairs",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_devices])
    rng, num_pairs, inputs, width = np.random.default_rng(0), num_devices * 8, 6, 4

    def encode(parameters: Any, batch: Any) -> Any:
        return tuple(jnp.tanh(x @ parameters[side]) for x, side in zip(batch, ("image", "text"), strict=True))

    def loss(image: Any, text: Any, parameters: Any, rows: Any) -> Any:
        options = {"temperature": jnp.exp(parameters["log_temperature"]), "gamma": 0.7, "axis_name": "pairs"}
        return contrastive_loss(init_state(num_pairs, dtype=jnp.float64), image, text, rows, **options)

    def in_parts(parameters: Any, batch: Any, rows: Any) -> Any:
        own = lambda image, text, parameters: loss(image, text, parameters, rows)  # noqa: E731
        return micro_batches(encode, parameters, batch, own, size=8 // MICRO_BATCHES)

    def whole(parameters: Any, batch: Any, rows: Any) -> Any:
        own = lambda parameters: loss(*encode(parameters, batch), parameters, rows)  # noqa: E731
        return jax.value_and_grad(own, has_aux=True)(parameters)

    parameters = {"image": rng.normal(size=(inputs, width)), "text": rng.normal(size=(inputs, width))}
    arguments = {**parameters, "log_temperature": np.log(0.3)}, tuple(rng.normal(size=(2, num_pairs, inputs)))
    sums, results = [], []
    for step in (in_parts, whole):
        mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("pairs"), P("pairs")), out_specs=P())
        compiled = jax.jit(mapped).lower(*arguments, np.arange(num_pairs)).compile()
        sums.append(summed(compiled.as_text(), (inputs, width), MICRO_BATCHES))
        results.append(compiled(*arguments, np.arange(num_pairs)))
    pairs = zip(*map(jax.tree.leaves, results), strict=True)
    difference = max(float(np.max(np.abs(x - y)) / np.max(np.abs(y))) for x, y in pairs)
    return MicroBatches(*sums, sum(x.nbytes for x in parameters.values()), difference)


def summed(program: str, shape: tuple[int, ...], turns: int) -> float:
    """Return the bytes of the arrays of a shape that a device sums with the others; a loop has so many turns."""
    total = 0.0
    words = ",".join(map(str, shape))
    for line in program.splitlines():
        instruction = _INSTRUCTION.search(line)
        if instruction is None or instruction["operation"] != "all-reduce":
            continue
        sizes = [int(x["bits"]) / 8 for x in _ARRAY.finditer(instruction["result"]) if x["shape"] == words]
        total += sum(sizes) * math.prod(shape) * (turns if _LOOP in line else 1)
    return total


def received(program: str, num_devices: int) -> tuple[float, float]:
    """Return the bytes that a device receives in arrays with a row per pair, and in all other arrays."""
    of_pairs = of_others = 0.0
    others = num_devices - 1
    # The bytes that a device receives, divided by those of the result of the operation.
    shares = {
        "all-gather": others / num_devices,
        "all-reduce": 2 * others / num_devices,
        "all-to-all": others / num_devices,
        "reduce-scatter": others,
        "collective-permute": 1,
    }
    for line in program.splitlines():
        instruction = _INSTRUCTION.search(line)
        if instruction is None:
            continue
        # The only loop with exchanges is that over the hops of the ring.
        times = others if _LOOP in line else 1
        for array in _ARRAY.finditer(instruction["result"]):
            shape = [int(length) for length in array["shape"].split(",") if length]
            size = int(array["bits"]) / 8 * times * shares[instruction["operation"]]
            for length in shape:
                size *= length
            if ROWS in shape:
                of_pairs += size
            else:
                of_others += size
    return of_pairs, of_others
