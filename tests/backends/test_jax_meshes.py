"""drrho_jax on two devices: mapped axes are refused by name, sharded batches have the loss of the whole batch.

JAX counts its devices once per process, so each test is a program of its own with two CPU devices.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("jax")

BEGIN = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from drrho_jax import contrastive_loss, init_state

rng = np.random.default_rng(0)
images, texts, references, more = rng.normal(size=(4, 8, 4))
index = np.asarray([5, 0, 19, 2, 7, 11, 3, 8])

def loss(images, texts, index, temperature=0.3, references=None, state=None):
    state = init_state(20, dtype=jnp.float64) if state is None else state
    options = {"temperature": temperature, "reference_features": references, "gamma": 0.7}
    return contrastive_loss(state, images, texts, index, **options)

def refusal(call, *arguments):
    try:
        call(*arguments)
    except ValueError as error:
        return str(error)
    return "not refused"
"""


def run(program: str) -> str:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", BEGIN + program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_mapped_axes_are_refused_by_name() -> None:
    output = run("""
mesh = jax.make_mesh((2,), ("pairs",), axis_types=(AxisType.Auto,))
one = jax.make_mesh((1,), ("single",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
both = jax.make_mesh((2, 1), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
batch = (images, texts, index)
split = (images.reshape(2, 4, 4), texts.reshape(2, 4, 4), index.reshape(2, 4))

def mapped(function, mesh, spec):
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=P())

def mean(*batch):
    return jax.lax.pmean(loss(*batch)[0], "pairs")

print(refusal(mapped(mean, mesh, P("pairs")), *batch))
print(refusal(jax.jit(mapped(mean, mesh, P("pairs"))), *batch))
print(refusal(mapped(jax.grad(mean), mesh, P("pairs")), *batch))
print(refusal(mapped(lambda *b: loss(*b)[0], one, P()), *batch))
print(refusal(mapped(lambda *b: loss(*b)[0], both, P(("rows", "columns"))), *batch))
print(refusal(jax.pmap(mean, axis_name="pairs"), *split))
""").splitlines()
    names = [
        line.split("got None and the mapped axis ")[-1] for line in output if line.startswith("axis_name must name")
    ]
    assert names == ["'pairs'", "'pairs'", "'pairs'", "'single'", "'rows', 'columns'", "'pairs'"]
    assert "without it each device would see the negatives of its own shard only" in output[0]


def test_wrong_axes_and_meshes_are_refused() -> None:
    output = run("""
mesh = jax.make_mesh((2,), ("pairs",), axis_types=(AxisType.Auto,))
state = init_state(20, dtype=jnp.float64)

def shared(rows=8, **options):
    return contrastive_loss(state, images[:rows], texts[:rows], index[:rows], temperature=0.3, **options)[0]

def mapped(**options):
    return jax.shard_map(lambda x: x + shared(**options), mesh=mesh, in_specs=P(), out_specs=P())(0.0)

print(refusal(lambda: shared(axis_name="pairs")))
print(refusal(lambda: shared(axis_name="rows", mesh=mesh)))
print(refusal(lambda: shared(mesh=mesh)))
print(refusal(lambda: shared(rows=7, axis_name="pairs", mesh=mesh)))
print(refusal(lambda: shared(form="star", axis_name="pairs", mesh=mesh)))
print(refusal(lambda: mapped(axis_name="pairs", mesh=mesh)))
print(refusal(lambda: mapped(axis_name="rows")))

short = jax.tree.map(lambda x: x[:19], state)
print(refusal(lambda: contrastive_loss(state, images, texts, index, temperature=0.3, split_state=True)))
print(refusal(lambda: contrastive_loss(short, images, texts, index % 19, temperature=0.3, split_state=True,
                                       axis_name="pairs", mesh=mesh)))

both = jax.make_mesh((1, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

def divided(axis_name, divided_along):
    def own(*batch):
        return contrastive_loss(state, *batch, temperature=0.3, axis_name=axis_name)[0]

    return jax.shard_map(own, mesh=both, in_specs=P(divided_along), out_specs=P())(images, texts, index)

def alone(x):
    return contrastive_loss(state, x, jnp.asarray(texts[:8]), index[:8], temperature=0.3, axis_name=())[0]

def gathered(x):
    return jax.lax.pmean(alone(jax.lax.all_gather(x, "pairs", tiled=True)), "pairs")

print(refusal(lambda: divided("data", ("data", "fsdp"))))

# Without jit JAX would compile each operation for itself.
@jax.jit
def on_one_device(x):
    return shared(), jax.grad(alone)(x)

@jax.jit
def on_two_devices(x):
    losses = {
        "both axes": divided(("data", "fsdp"), ("data", "fsdp")),
        "every device of fsdp has the whole batch": divided("data", "data"),
        "every device has the whole batch": mapped(axis_name=()),
    }
    return losses, jax.grad(jax.shard_map(gathered, mesh=mesh, in_specs=P("pairs"), out_specs=P()))(x)

features = jnp.asarray(images[:8])
expected, expected_gradient = on_one_device(features)
losses, gradient = on_two_devices(features)
for case, loss in losses.items():
    np.testing.assert_allclose(loss, expected, rtol=1e-13, err_msg=case)
np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12, atol=1e-15)
""").splitlines()
    starts = (
        "axis_name must be a mapped axis",
        "axis_name must name axes of the mesh ('pairs'), got 'rows'",
        "axis_name must name axes of the mesh ('pairs'), got no axis_name",
        "image_features must have a multiple of 2 rows",
        "form must be 'reduce' or 'ring'",
        "mesh must be None inside jax.shard_map and jax.pmap",
        "axis_name must be a mapped axis",
        "split_state must be False without axis_name, got True",
        "state.log_inner_image must have a multiple of 2 rows",
        "axis_name must name all axes along which the batch is divided",
    )
    assert len(output) == len(starts)
    assert [line[: len(start)] for line, start in zip(output, starts, strict=True)] == list(starts)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_sharded_batch_under_jit_has_the_loss_of_the_whole_batch(kind: str) -> None:
    run(f"""
mesh = jax.make_mesh((2,), ("pairs",), axis_types=(AxisType.{kind},))
per_anchor = tuple(rng.uniform(0.2, 0.6, (2, 8)))
state = jax.tree.map(lambda x: x.at[:6].set(0.3), init_state(20, dtype=jnp.float64))
step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 3), has_aux=True))
for temperature, spec, state_spec in ((jnp.asarray(0.3), P(), P()), (per_anchor, P("pairs"), P("pairs"))):
    arguments = (images, texts, index, temperature, (references, more), state)
    specs = (P("pairs"), P("pairs"), P("pairs"), spec, P("pairs"), state_spec)
    put = lambda x, spec: jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec)), x)
    expected = step(*arguments)
    sharded = [put(x, spec) for x, spec in zip(arguments, specs)]
    result = step(*sharded)
    with jax.set_mesh(mesh):
        inside = step(*[put(x, spec) for x, spec in zip(arguments, specs)])
    for other in (result, inside):
        for mine, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-15)
    assert len(result[1][0].sharding.device_set) == 2
    if {kind!r} == "Explicit":
        assert jax.typeof(result[1][0]).sharding.spec == P("pairs", None)
        derivative = jax.jit(lambda x, t: jax.jvp(lambda x: loss(x, *sharded[1:])[0], (x,), (t,))[1])
        np.testing.assert_allclose(derivative(sharded[0], sharded[1]), np.sum(expected[1][0] * texts), rtol=1e-12)
""")


def test_arrays_on_several_devices_ask_for_jit() -> None:
    output = run("""
for kind in (AxisType.Explicit, AxisType.Auto):
    mesh = jax.make_mesh((2,), ("pairs",), axis_types=(kind,))
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    print(refusal(loss, put(images, P("pairs")), put(texts, P("pairs")), put(index, P()), 0.3))
state = put(init_state(20, dtype=jnp.float64), P())
value = loss(*(put(x, P()) for x in (images, texts, index)), 0.3, None, state)[0]
np.testing.assert_allclose(value, loss(images, texts, index)[0], rtol=1e-13)
""")
    refused = "contrastive_loss must be called under jax.jit if its arrays lie on several devices"
    assert [line.startswith(refused) for line in output.splitlines()] == [True, True]
