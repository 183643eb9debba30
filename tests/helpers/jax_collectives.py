"""The traffic and the memory of a compiled step of several devices, read from the compiler's text and its plan."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

ROWS, WIDTH, REFERENCE_WIDTH = 128, 16, 8
"""Own pairs of each device, and the widths of the features of the learner and of the reference model."""

# An instruction of the compiled program: its result, which may be a tuple, and its operation.
_INSTRUCTION = re.compile(
    r"= (?P<result>\(.*?\)|\S+) (?P<operation>all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\("
)
_ARRAY = re.compile(r"(?P<kind>[a-z]+)(?P<bits>\d+)\[(?P<shape>[\d,]*)\]")


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
        times = others if "/while/body/" in line else 1
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
