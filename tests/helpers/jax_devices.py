"""Trainings on one device and on several CPU devices, in one process or in two; prints how far they differ.

JAX counts its devices once per process, so tests start this file as a program: without arguments for one process with
four devices, with the arguments PORT and NUMBER for one of two processes with two devices each. The program prints one
JSON object: for each case the largest difference from the training on one device, relative to the largest number of
each array. The process with four devices adds what a compiled step sends and keeps, and how a checkpoint is restored;
see `helpers.jax_collectives` and `helpers.jax_checkpoints`.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from helpers.jax_checkpoints import restored
from helpers.jax_collectives import micro_batches_of, traffic_of

NUM_DEVICES, NUM_PROCESSES = 4, 2
FORMS = ("reduce", "ring")
STEPS, BATCH, SAMPLES, INPUTS, WIDTH = 20, 12, 24, 6, 4


class Case(NamedTuple):
    """One training on several devices."""

    devices: int
    way: str = "shard_map"
    form: str = "reduce"
    options: str = "all"
    tile_size: int | None = None
    dtype: str = "float64"
    micro_batches: str | None = None
    state: str | None = None
    mesh: str | None = None

    @property
    def axes(self) -> str | tuple[str, str]:
        """The axes of the mesh along which the batch lies."""
        return ("data", "fsdp") if self.mesh == "two axes" else "pairs"

    @property
    def name(self) -> str:
        return "-".join(str(part) for part in self if part is not None)


WAYS = ("shard_map", "unchecked", "pmap", "Auto", "Explicit")
CASES = (
    *(Case(4, way) for way in WAYS),
    *(Case(2, way, "ring", "reference") for way in ("shard_map", "unchecked")),
    Case(3),
    Case(2, "unchecked", micro_batches="helper"),
    Case(2, "pmap", options="reference", state="split"),
    Case(4, "Explicit", state="split", mesh="two axes"),
    Case(1, form="ring", options="reference"),
    Case(4, form="ring", options="mask", mesh="two axes"),
    *(Case(2, form=form, options="reference", tile_size=2) for form in ("reduce", "ring")),
    *(Case(devices, dtype=dtype, options="reference") for devices in (1, 4) for dtype in ("float32", "bfloat16")),
)


# A mesh of two devices has one device of each process.
PROCESS_CASES = (
    Case(2, micro_batches="checkpoint"),
    Case(4, "unchecked", "ring"),
    Case(2, "Auto", "ring", micro_batches="helper"),
)


def main(arguments: Sequence[str]) -> None:
    """Run all cases and print the differences."""
    if arguments:
        import jax

        port, number = map(int, arguments)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", NUM_PROCESSES, number, initialization_timeout=60)
    figures: dict[str, Any] = {case.name: difference(case) for case in (PROCESS_CASES if arguments else CASES)}
    if not arguments:
        figures["restored"] = restored()
        figures["micro-batches"] = micro_batches_of(NUM_DEVICES)._asdict()
        figures["traffic"] = {form: traffic_of(form, NUM_DEVICES)._asdict() for form in FORMS}
    json.dump(figures, sys.stdout)


def data(dtype: str) -> tuple[Any, Any, Any]:
    """Return the parameters, the batches of all steps, and a state in which some samples were visited."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from drrho_jax import ContrastiveState

    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(SAMPLES)[:BATCH] for _ in range(STEPS)])
    images, texts, *references = rng.normal(size=(4, SAMPLES, INPUTS))
    pair_mask = rows[:, :, None] % 7 != rows[:, None, :] % 7  # rows with equal remainders show the same image
    factors = rng.uniform(0.1, 1.0, (2, 2, SAMPLES))
    batches = {
        "rows": rows,
        "images": images[rows],
        "texts": texts[rows],
        "references": tuple(0.3 * x[rows] for x in references),
        "pair_mask": pair_mask,
        "gamma": tuple(factors[0][:, rows]),
        "anchor_weight": tuple(factors[1][:, rows]),
    }
    parameters = {
        "image": rng.normal(size=(INPUTS, WIDTH)),
        "text": rng.normal(size=(INPUTS, WIDTH)),
        "log_temperature": np.log(0.3),
        "log_temperatures": rng.normal(-1.0, 0.3, (2, SAMPLES)),
    }
    states = rng.normal(-1.0, 1.0, (2, SAMPLES))
    states[:, ::3] = -np.inf
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    parameters, batches, states = jax.tree.map(
        lambda x: jnp.asarray(x, dtype=wide if np.asarray(x).dtype == np.float64 else None),
        (parameters, batches, states),
    )
    return parameters, batches, ContrastiveState(*states)


def encode(parameters: Any, inputs: tuple[Any, Any], dtype: str) -> tuple[Any, Any]:
    """Return the features of both sides for some rows."""
    import jax.numpy as jnp

    def features(inputs: Any, weight: Any) -> Any:
        products = jnp.tanh(inputs @ weight)
        unit = products / jnp.linalg.norm(products, axis=1, keepdims=True)
        return unit.astype(jnp.bfloat16) if dtype == "bfloat16" else unit

    return features(inputs[0], parameters["image"]), features(inputs[1], parameters["text"])


def in_parts(parameters: Any, inputs: tuple[Any, Any], dtype: str) -> tuple[Any, Any]:
    """Return the features of both sides, encoded in parts of two rows that are encoded again for the gradient."""
    import jax

    stacks = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), inputs)
    pieces = jax.lax.map(jax.checkpoint(lambda part: encode(parameters, part, dtype)), stacks)
    image, text = (x.reshape(-1, x.shape[-1]) for x in pieces)
    return image, text


def loss_and_gradient(parameters: Any, state: Any, batch: Any, *, case: Case, **sharing: Any) -> Any:
    """Return the loss of a batch, or of a device's rows of it, with the new state, and the gradient."""
    import jax
    from drrho_jax import micro_batches

    inputs = batch["images"], batch["texts"]
    loss = functools.partial(loss_of_features, state=state, batch=batch, case=case, **sharing)
    if case.micro_batches == "helper":
        encoder = functools.partial(encode, dtype=case.dtype)
        of_features = lambda image, text, parameters: loss(image, text, parameters)  # noqa: E731
        return micro_batches(encoder, parameters, inputs, of_features, size=4)
    encoder = in_parts if case.micro_batches else encode
    function = lambda parameters: loss(*encoder(parameters, inputs, case.dtype), parameters)  # noqa: E731
    return jax.value_and_grad(function, has_aux=True)(parameters)


def loss_of_features(
    image_features: Any, text_features: Any, parameters: Any, *, state: Any, batch: Any, case: Case, **sharing: Any
) -> Any:
    """Return the loss of a batch, or of a device's rows of it, and the new state."""
    import jax
    import jax.numpy as jnp
    from drrho_jax import contrastive_loss

    rows, options = batch["rows"], {}
    temperature = jnp.exp(parameters["log_temperature"])
    if case.options in ("all", "per sample"):
        sharding = jax.sharding.PartitionSpec(None, case.axes) if case.way == "Explicit" else None
        table = parameters["log_temperatures"]
        temperature = tuple(jnp.exp(table.at[:, rows].get(out_sharding=sharding)))
    if case.options in ("all", "reference"):
        options |= {"reference_features": batch["references"], "reference_weight": 0.7}
    if case.options in ("all", "mask"):
        options |= {"pair_mask": batch["pair_mask"]}
    if case.options == "all":
        options |= {"gamma": batch["gamma"], "anchor_weight": batch["anchor_weight"], "eps": 1e-3}
    return contrastive_loss(
        state,
        image_features,
        text_features,
        rows,
        temperature=temperature,
        radius=0.4,
        tile_size=case.tile_size,
        split_state=case.state == "split" and bool(sharing),
        **{"gamma": 0.7, **options},
        **sharing,
    )


def train(parameters: Any, state: Any, batches: Any, *, case: Case, axis_to_sum: Any, **sharing: Any) -> Any:
    """Take all steps in one scan; return losses and gradients of all steps, the last parameters and the last state."""
    import jax
    import optax

    optimizer = optax.adamw(0.03)

    def step(carry: Any, batch: Any) -> Any:
        parameters, memory, state = carry
        (loss, state), gradient = loss_and_gradient(parameters, state, batch, case=case, **sharing)
        if axis_to_sum is not None:
            gradient = jax.lax.psum(gradient, axis_to_sum)
        updates, memory = optimizer.update(gradient, memory, parameters)
        return (optax.apply_updates(parameters, updates), memory, state), (loss, gradient)

    (parameters, _, state), history = jax.lax.scan(step, (parameters, optimizer.init(parameters), state), batches)
    return history, parameters, state


def on_devices(case: Case) -> Any:
    """Return the result of `train` on several devices."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    parameters, batches, state = data(case.dtype)
    devices, way, axes = devices_of(case.devices), case.way, case.axes
    of_state = P(axes) if case.state == "split" else P()
    if way == "pmap":
        function = functools.partial(train, case=case, axis_to_sum="pairs", axis_name="pairs", form=case.form)
        split = lambda x: x.reshape(STEPS, case.devices, -1, *x.shape[2:]).swapaxes(0, 1)  # noqa: E731
        in_parts = case.state == "split"
        if in_parts:
            state = jax.tree.map(lambda x: x.reshape(case.devices, -1), state)
        mapped = jax.pmap(
            function, axis_name="pairs", in_axes=(None, 0 if in_parts else None, 0), out_axes=0, devices=devices
        )
        history, parameters, state = mapped(parameters, state, jax.tree.map(split, batches))
        history, parameters = jax.tree.map(lambda x: x[-1], (history, parameters))
        return history, parameters, jax.tree.map(lambda x: x.ravel() if in_parts else x[-1], state)
    kind = AxisType.Explicit if way == "Explicit" else AxisType.Auto
    names = (axes,) if isinstance(axes, str) else axes
    mesh = jax.make_mesh(
        (case.devices,) if len(names) == 1 else (case.devices // 2, 2),
        names,
        axis_types=(kind,) * len(names),
        devices=devices,
    )

    def put(tree: Any, spec: P) -> Any:
        # Every process has the whole array and passes the parts of its own devices.
        sharding, hosts = NamedSharding(mesh, spec), jax.tree.map(np.asarray, tree)
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda part: x[part]), hosts)

    arguments = put(parameters, P()), put(state, of_state), put(batches, P(None, axes))
    if way in ("Auto", "Explicit"):
        function = functools.partial(train, case=case, axis_to_sum=None, mesh=mesh, axis_name=axes, form=case.form)
        with jax.set_mesh(mesh):
            return jax.jit(function, donate_argnums=(0, 1))(*arguments)
    checked = way == "shard_map"
    function = functools.partial(
        train, case=case, axis_to_sum=None if checked else axes, axis_name=axes, form=case.form
    )
    specs, results = (P(), of_state, P(None, axes)), (P(), P(), of_state)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=results, check_vma=checked)
    return jax.jit(mapped, donate_argnums=(0, 1))(*arguments)


def devices_of(number: int) -> list[Any]:
    """Return so many devices, equally many of each process."""
    import jax

    num_processes = jax.process_count()
    by_process = {process: [d for d in jax.devices() if d.process_index == process] for process in range(num_processes)}
    return [device for devices in by_process.values() for device in devices[: number // num_processes]]


@functools.cache
def on_one_device(options: str) -> Any:
    """Return the result of `train` on one device, in float64."""
    import jax

    function = functools.partial(train, case=Case(1, options=options), axis_to_sum=None)
    parameters, batches, state = data("float64")
    return jax.jit(function)(parameters, state, batches)


def difference(case: Case) -> float:
    """Return the largest difference from one device in float64, relative to the largest number of each array."""
    import jax
    import numpy as np

    worst = 0.0
    pairs = zip(*map(jax.tree.leaves, (on_devices(case), on_one_device(case.options))), strict=True)
    for one, other in pairs:
        mine, theirs = np.asarray(one, dtype=np.float64), np.asarray(other)
        finite = np.isfinite(theirs)
        if not np.array_equal(np.isfinite(mine), finite):
            return float("inf")
        size = float(np.max(np.abs(theirs[finite]), initial=1e-300))
        worst = max(worst, float(np.max(np.abs(mine - theirs)[finite], initial=0.0)) / max(size, 1e-3))
    return worst


if __name__ == "__main__":
    num_devices = NUM_DEVICES // NUM_PROCESSES if sys.argv[1:] else NUM_DEVICES
    # The time goes into compilation, so the compiler optimises nothing.
    flags = f"--xla_force_host_platform_device_count={num_devices} --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    os.environ["JAX_PLATFORMS"], os.environ["JAX_ENABLE_X64"] = "cpu", "1"
    main(sys.argv[1:])
