"""A flax loop with scan and a mesh and DRRho's loss: few changed lines, the right gradient, four devices as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_core import contrastive_step
from helpers.examples import EXAMPLES, changed_lines, load

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

PAIRS = 256


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    names = load("loops/flax_scan.py", monkeypatch)
    names["write_pairs"](tmp_path / "pairs.npz", PAIRS)
    return names


def test_fewer_than_ten_lines_change_and_the_page_tells_their_number() -> None:
    number = changed_lines("loops/flax_scan_before.py", "loops/flax_scan.py")
    assert number < 10
    page = (EXAMPLES.parent / "docs" / "your-loop.md").read_text(encoding="utf-8")
    assert f"[`flax_scan.py`](../examples/loops/flax_scan.py) differs in {number} lines" in page


# Four devices share every batch. The numbers of the pairs are in the file; the results are written beside it.
ON_FOUR_DEVICES = """
import runpy, sys, numpy as np
names = runpy.run_path(sys.argv[1])
assert names["mesh"].shape == {"data": 4}
history, (params, memory, estimates) = names["main"](sys.argv[2], epochs=6)
np.savez(sys.argv[3], history=history, image=estimates.log_inner_image, text=estimates.log_inner_text)
"""


@pytest.mark.slow
def test_training_on_four_devices_lowers_the_loss_by_a_tenth_as_on_one(example: dict[str, Any], tmp_path: Path) -> None:
    history, (_, _, estimates) = example["main"](str(tmp_path / "pairs.npz"), epochs=6)
    assert np.mean(history[-4:]) < 0.9 * history[0]
    assert (tmp_path / "pairs.npz.msgpack").stat().st_size > 8 * PAIRS
    folder = EXAMPLES / "loops"
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
    }
    words = [str(folder / "flax_scan.py"), str(tmp_path / "pairs.npz"), str(tmp_path / "four.npz")]
    command = [sys.executable, "-W", "error", "-c", ON_FOUR_DEVICES, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    four = np.load(tmp_path / "four.npz")
    # The devices sum in another order, and 24 steps of AdamW enlarge the rounding errors.
    np.testing.assert_allclose(four["history"], history, rtol=1e-3)
    np.testing.assert_allclose(four["image"], np.asarray(estimates.log_inner_image), atol=0.05)
    np.testing.assert_allclose(four["text"], np.asarray(estimates.log_inner_text), atol=0.05)


def test_gradient_and_estimates_of_a_batch_are_those_of_contrastive_step(
    example: dict[str, Any], tmp_path: Path
) -> None:
    data, (params, _, estimates) = example["start"](tmp_path / "pairs.npz")
    rows = np.random.default_rng(1).permutation(PAIRS)[:16]
    old = [np.linspace(*ends, PAIRS) for ends in ((-3.0, 1.0), (0.0, -4.0))]
    estimates = type(estimates)(*(np.asarray(table, np.float32) for table in old))
    batch = jax.tree.map(lambda column: column[rows], data)
    (loss, state), gradient = jax.value_and_grad(example["loss_function"], has_aux=True)(params, batch, estimates)

    def features(params: Any) -> Any:
        image, text, scale = example["model"].apply(params, batch["images"], batch["captions"])
        return image, text, 1 / scale

    (image, text, tau), pull_back = jax.vjp(features, params)
    step = contrastive_step(
        *(np.asarray(side, float) for side in (image, text)),
        *(table[rows] for table in old),
        temperature=float(tau),
        gamma=0.9,
        radius=2.0,
        reference_features=tuple(side.astype(float) for side in batch["reference"]),
    )
    slopes = (step.image_gradient, step.text_gradient, step.temperature_gradient)
    # Another test of the process may have switched on float64, the dtype of the temperature then.
    dtypes = (side.dtype for side in (image, text, jax.numpy.asarray(tau)))
    (expected,) = pull_back(tuple(np.asarray(slope, dtype) for slope, dtype in zip(slopes, dtypes, strict=True)))
    assert float(loss) == pytest.approx(float(step.loss), abs=1e-5)
    np.testing.assert_allclose(state.log_inner_text[rows], step.log_inner_text, atol=1e-5)
    for got, slope in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        assert float(abs(got - slope).max()) <= 1e-5 * float(abs(slope).max())
