"""Options of a step: micro-batches, clipping, moving average, half types and selection from a super-batch."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import array_api_strict as strict
import drrho_reference as oracle
import numpy as np
import pytest
from drrho_numpy import NumpyBackend

from drrho_clip.config import TrainConfig
from drrho_clip.data.splits import open_splits
from drrho_clip.encode import build_model
from drrho_clip.errors import BadInput
from drrho_clip.files.checkpoint import load_arrays
from drrho_clip.methods import METHODS
from drrho_clip.micro_batches import model_of_step
from drrho_clip.models import ModelSpec, initial_parameters
from drrho_clip.precision import in_precision
from drrho_clip.run import read_metrics
from drrho_clip.selection import gumbel_noise, part_of, select_rho
from drrho_clip.step import StepBatch, build_step
from drrho_clip.train import described, train
from drrho_clip.trainer import Trainer
from drrho_clip.update import check_overflows, initial_state
from drrho_core.backend import get_backend
from helpers.features import unit_rows

B = 8
SIZES: dict[str, Any] = {"image_size": 8, "channels": 3, "vocabulary_size": 9, "context_length": 5, "feature_dim": 6}
MLP = ModelSpec("mlp", **SIZES, width=4, depth=1)
CONV = ModelSpec("conv", **SIZES, width=8, depth=1, heads=2)
BACKENDS = [("numpy", MLP), ("torch", MLP), ("torch", CONV), ("jax", MLP)]


def _config(**changed: Any) -> TrainConfig:
    config = TrainConfig(
        data="digits", method="drrho", reference="runs/r", backend="numpy", batch_size=B, dtype="float64",
        temperature=0.2, learning_rate=0.01, reference_temperature=0.3,
    )  # fmt: skip
    return replace(config, **changed)


def _batch(backend: Any, spec: ModelSpec, size: int = B, seed: int = 0) -> StepBatch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 9, (size, 5)).astype(np.int32)
    texts = rng.random((size, 9)) if spec.architecture == "mlp" else tokens
    estimates = rng.normal(size=(2, size))
    return StepBatch(
        images=backend.asarray(rng.normal(size=(size, 8, 8, 3))),
        texts=backend.asarray(texts),
        log_inner_image=backend.asarray(estimates[0]),
        log_inner_text=backend.asarray(estimates[1]),
        reference_features=(backend.asarray(unit_rows(rng, size, 4)), backend.asarray(unit_rows(rng, size, 4))),
        learning_rate=0.01,
        gamma=0.7,
        temperature=None,
    )


def _stepped(name: str, spec: ModelSpec, config: TrainConfig, *, steps: int = 1, size: int = B) -> tuple[Any, Any, Any]:
    """Return the state before and after some steps on equal batches, and the last result; arrays are NumPy's."""
    backend = get_backend(name, dtype=config.dtype)
    model = model_of_step(backend, build_model(backend, spec), config)
    optimizer = backend.adamw(weight_decay=0.1)
    state = initial_state(backend, optimizer, config, initial_parameters(spec, seed=1))
    step = build_step(backend, model, optimizer, config)
    before = {key: backend.to_numpy(value) for key, value in state.parameters.items()}
    for seed in range(steps):
        result = step(state, _batch(backend, spec, size, seed))
        state = result.state
    groups = {
        group: {key: backend.to_numpy(value) for key, value in members.items()}
        for group, members in state._asdict().items()
    }
    return before, groups, result


@pytest.mark.parametrize(("name", "spec"), BACKENDS)
def test_micro_batches_equal_the_whole_batch(name: str, spec: ModelSpec) -> None:
    """Also if the last micro-batch is short, and with a reference model."""
    _, whole, expected = _stepped(name, spec, _config())
    for size in (3, 4):
        _, parts, found = _stepped(name, spec, _config(micro_batch=size))
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-12)
        for key, moment in whole["optimizer"].items():
            scale = np.max(np.abs(moment))
            np.testing.assert_allclose(parts["optimizer"][key], moment, rtol=0, atol=1e-9 * scale, err_msg=key)


def test_micro_batches_in_jax_take_a_part_of_the_memory() -> None:
    """A compiler that merges both forward passes of a micro-batch would keep the activations of the whole batch."""
    backend = get_backend("jax", dtype="float32")
    spec = replace(MLP, width=64, depth=4)
    memory = []
    for size in (0, 128):
        config = _config(dtype="float32", micro_batch=size, batch_size=1024, method="clip", reference=None)
        model, optimizer = model_of_step(backend, build_model(backend, spec), config), backend.adamw(weight_decay=0.1)
        state = initial_state(backend, optimizer, config, initial_parameters(spec, seed=1))
        batch = _batch(backend, spec, 1024)._replace(reference_features=None)
        step: Any = build_step(backend, model, optimizer, config)
        memory.append(step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes)
    assert memory[1] < 0.4 * memory[0], memory


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_a_clipped_gradient_has_the_given_norm_and_keeps_its_direction(name: str) -> None:
    _, free, _ = _stepped(name, MLP, _config())
    gradient = {key: value * 10 for key, value in free["optimizer"].items() if key.startswith("first_moment")}
    norm = np.sqrt(sum(np.sum(value**2) for value in gradient.values()))
    for limit, factor in ((norm / 4, 0.25), (norm * 2, 1.0)):
        _, clipped, _ = _stepped(name, MLP, _config(clip_norm=float(limit)))
        for key, value in gradient.items():
            np.testing.assert_allclose(clipped["optimizer"][key] * 10, factor * value, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize(("ema", "weights"), [(0.9, (2 / 11, 3 / 12)), (0.999, (2 / 11, 3 / 12)), (0.2, (2 / 11, 0.2))])
def test_the_average_of_the_parameters_follows_them_from_the_first_step(
    name: str, ema: float, weights: tuple[float, float]
) -> None:
    """The weight of the old value is (1 + k) / (10 + k) at update k, until that is more than the setting."""
    before, first, _ = _stepped(name, MLP, _config(ema=ema))
    _, second, _ = _stepped(name, MLP, _config(ema=ema), steps=2)
    _, plain, _ = _stepped(name, MLP, _config(), steps=2)
    for key, value in before.items():
        np.testing.assert_array_equal(second["parameters"][key], plain["parameters"][key])
        average = weights[0] * value + (1 - weights[0]) * first["parameters"][key]
        average = weights[1] * average + (1 - weights[1]) * second["parameters"][key]
        np.testing.assert_allclose(second["average"][key], average, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "spec", "precision"),
    [("torch", CONV, "bf16"), ("torch", CONV, "fp16"), ("jax", MLP, "bf16")],
)
def test_half_types_round_the_encoders_and_nothing_else(name: str, spec: ModelSpec, precision: str) -> None:
    config = _config(dtype="float32")
    _, full, expected = _stepped(name, spec, config)
    _, half, found = _stepped(name, spec, replace(config, precision=precision))
    assert float(found.loss) != float(expected.loss)
    assert float(found.loss) == pytest.approx(float(expected.loss), abs=0.02)
    for group in ("parameters", "optimizer"):
        assert all(value.dtype in (np.float32, np.int32) for value in half[group].values())
    moments = [np.concatenate([np.ravel(value) for key, value in sorted(groups["optimizer"].items())
                               if key.startswith("first")]) for groups in (full, half)]  # fmt: skip
    cosine = moments[0] @ moments[1] / np.linalg.norm(moments[0]) / np.linalg.norm(moments[1])
    assert 0.98 < cosine < 1 - 1e-9
    backend = get_backend(name)
    model = in_precision(backend, build_model(backend, spec), precision)
    parameters = {key: backend.asarray(value) for key, value in initial_parameters(spec, seed=1).items()}
    features = backend.to_numpy(model.encode_images(parameters, _batch(backend, spec).images))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, atol=1e-6)


def test_an_overflow_in_fp16_leaves_the_update_out_and_halves_the_scale() -> None:
    config = _config(dtype="float32", precision="fp16")
    backend = get_backend("torch")
    model = in_precision(backend, build_model(backend, CONV), "fp16")
    optimizer = backend.adamw(weight_decay=0.1)
    state = initial_state(backend, optimizer, config, initial_parameters(CONV, seed=1))
    # The gradient of the features times 2^30 is beyond the range of fp16.
    state = state._replace(loss_scale=state.loss_scale | {"scale": backend.asarray(np.asarray(2.0**30))})
    step = build_step(backend, model, optimizer, config)
    before = {key: backend.to_numpy(value) for key, value in (dict(state.parameters) | dict(state.optimizer)).items()}
    result = step(state, _batch(backend, CONV))
    assert float(result.state.loss_scale["scale"]) == 2.0**29
    after = dict(result.state.parameters) | dict(result.state.optimizer)
    for key, value in before.items():
        np.testing.assert_array_equal(backend.to_numpy(after[key]), value)
    # The loss scale does not change the result while nothing overflows.
    results = []
    for scale in (2.0**8, 2.0**12):
        state = initial_state(backend, optimizer, config, initial_parameters(CONV, seed=1))
        state = state._replace(loss_scale=state.loss_scale | {"scale": backend.asarray(np.asarray(scale))})
        results.append(step(state, _batch(backend, CONV)).state)
    assert float(results[0].optimizer["step"]) == 1
    for key in results[0].parameters:
        one, other = (backend.to_numpy(state.optimizer[f"first_moment/{key}"]) for state in results)
        np.testing.assert_allclose(one, other, rtol=0.05, atol=2e-3 * np.abs(one).max())


def test_a_library_without_the_precision_says_so() -> None:
    backend = get_backend("numpy")
    with pytest.raises(BadInput, match="precision must be one of float32 for the backend numpy, got 'bf16'"):
        in_precision(backend, build_model(backend, MLP), "bf16")
    with pytest.raises(BadInput, match="precision must be float32 if dtype is float64, got 'bf16'"):
        _config(precision="bf16")


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("method", ["rho", "jest", "jest-topk"])
def test_a_step_trains_on_the_pairs_that_the_oracle_selects(method: str, name: str) -> None:
    config = _config(method=method, batch_size=4, super_batch=3, jest_chunks=2)
    backend = get_backend(name, dtype="float64")
    model, optimizer = build_model(backend, MLP), backend.adamw(weight_decay=0.1)
    state = initial_state(backend, optimizer, config, initial_parameters(MLP, seed=1))
    # Two images have several captions.
    mask = np.ones((12, 12), dtype=bool)
    mask[:5, :5] = mask[5:10, 5:10] = False
    batch = _batch(backend, MLP, 12)._replace(pair_mask=backend.asarray(mask))
    noise = gumbel_noise(config, 7)
    assert noise.shape == (2, 12)
    if method == "jest":
        batch = batch._replace(gumbel=backend.asarray(noise))
    images, texts = (
        backend.to_numpy(features)
        for features in (
            model.encode_images(state.parameters, batch.images),
            model.encode_texts(state.parameters, batch.texts),
        )
    )
    assert batch.reference_features is not None
    reference = [backend.to_numpy(side) for side in batch.reference_features]
    learner_logits, reference_logits = images @ texts.T / 0.2, reference[0] @ reference[1].T / 0.3
    if method == "rho":
        index = oracle.select_top_excess(_pair_losses(learner_logits, mask), _pair_losses(reference_logits, mask), k=4)
    else:
        index = _jest(learner_logits, reference_logits, mask, noise if method == "jest" else np.zeros((2, 12)))
    index = np.asarray(index)
    result = build_step(backend, model, optimizer, config)(state, batch)
    expected = oracle.info_nce(images[index], texts[index], temperature=0.2, pair_mask=mask[np.ix_(index, index)])
    assert float(result.loss) == pytest.approx(expected.loss, rel=1e-10)
    assert result.log_inner_image.shape == (12,)


def test_rho_selects_on_the_device_of_the_logits() -> None:
    device = strict.Device("device1")
    logits = np.random.default_rng(0).normal(size=(2, 6, 6))
    mask = np.ones((6, 6), dtype=bool)
    mask[:2, :2] = False
    learner, reference, pair_mask = (strict.asarray(array, device=device) for array in (*logits, mask))
    batch = _batch(get_backend("numpy", dtype="float64"), MLP, 6)._replace(pair_mask=pair_mask)
    index = select_rho(learner, reference, batch, _config(method="rho", batch_size=2, super_batch=3), strict)
    assert index.device == device


def _jest(learner: np.ndarray, reference: np.ndarray, mask: np.ndarray, noise: np.ndarray) -> list[int]:
    """Return the choice of JEST, two pairs at a time; a caption of the same image has no part in a sum."""
    chosen: list[int] = []
    for chunk in noise:
        scores = {}
        for i in sorted(set(range(len(mask))) - set(chosen)):
            scores[i] = reference[i, i] - learner[i, i] + chunk[i]
            others = [j for j in chosen if mask[i, j]]
            for logits, sign in ((learner, 0.5), (reference, -0.5)):
                for side in (logits[i, others], logits[others, i]):
                    scores[i] += sign * np.log(np.sum(np.exp(side))) if others else 0.0
        chosen += sorted(scores, key=scores.__getitem__, reverse=True)[:2]
    return chosen


def _pair_losses(logits: np.ndarray, mask: np.ndarray) -> list[float]:
    """Return the mean of the cross-entropies of each pair, entry by entry."""
    losses = []
    for i in range(len(logits)):
        row = [logits[i, j] for j in range(len(logits)) if mask[i, j] or i == j]
        column = [logits[j, i] for j in range(len(logits)) if mask[j, i] or i == j]
        losses.append(0.5 * sum(np.log(np.sum(np.exp(side))) for side in (row, column)) - logits[i, i])
    return losses


def test_a_part_of_a_batch_takes_all_that_belongs_to_its_pairs() -> None:
    backend = get_backend("numpy", dtype="float64")
    batch = _batch(backend, MLP)._replace(anchor_weight=np.arange(8.0), pair_mask=np.arange(64).reshape(8, 8) % 3 == 0)
    index = np.asarray([5, 0, 2])
    part = part_of(batch, index, np)
    np.testing.assert_array_equal(part.images, batch.images[index])
    np.testing.assert_array_equal(part.anchor_weight, [5.0, 0.0, 2.0])
    np.testing.assert_array_equal(part.pair_mask, batch.pair_mask[np.ix_(index, index)])
    assert batch.reference_features is not None
    assert part.reference_features is not None
    np.testing.assert_array_equal(part.reference_features[1], batch.reference_features[1][index])


def test_noise_depends_on_the_step_and_the_seed_only() -> None:
    config = _config(method="jest", super_batch=2)
    np.testing.assert_array_equal(gumbel_noise(config, 3), gumbel_noise(config, 3))
    assert not np.array_equal(gumbel_noise(config, 3), gumbel_noise(config, 4))
    assert not np.array_equal(gumbel_noise(config, 3), gumbel_noise(replace(config, seed=1), 3))


@pytest.mark.parametrize("method", ["clip", "drrho"])
def test_a_super_batch_belongs_to_methods_that_select(method: str) -> None:
    with pytest.raises(BadInput, match=f"super_batch must be 1 for method {method}, got 2"):
        _config(method=method, super_batch=2, reference="runs/r" if method == "drrho" else None)
    with pytest.raises(BadInput, match="super_batch must be at least 2 for method jest, got 1"):
        _config(method="jest", super_batch=1)
    assert METHODS["jest"].defaults["super_batch"] == 5


SMALL: dict[str, Any] = {"epochs": 2, "batch_size": 64, "width": 4, "feature_dim": 8, "depth": 1, "warmup_steps": 1,
                         "image_size": 8, "architecture": "mlp", "checkpoint_every": 100, "log_every": 1}  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step") / "reference"
    train(TrainConfig(data="digits:reference", method="clip", backend="numpy", **SMALL), folder, quiet=True)
    return folder


@pytest.mark.parametrize(
    ("backend", "method", "options"),
    [
        ("torch", "jest", {"precision": "bf16", "super_batch": 2}),
        ("torch", "distill:siglip", {"precision": "fp16"}),
        ("jax", "siglip", {"precision": "bf16"}),
        ("numpy", "rho", {"super_batch": 2, "augment": "crop-flip"}),
        ("numpy", "fastclip-v3", {"gamma_schedule": "step"}),
        ("numpy", "scent", {}),
    ],
)
def test_a_run_resumes_bit_by_bit_in_the_middle_of_an_epoch(
    backend: str, method: str, options: dict[str, Any], reference: Path, tmp_path: Path
) -> None:
    """With clipping, a moving average and micro-batches; the loss scale of fp16 is part of the checkpoint."""
    # JAX would compile every micro-batch, which takes long; the test of micro-batches compiles a single step.
    needs = METHODS[method].needs_reference
    config = TrainConfig(
        data="digits", method=method, backend=backend, reference=str(reference) if needs else None,
        clip_norm=0.5, ema=0.9, micro_batch=0 if backend == "jax" else 24, **SMALL, **options,
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    row = train(config, whole, quiet=True).row
    for stop in (3, 7):
        train(config, parts, quiet=True, resume=stop > 3, stop_after=stop)
    assert train(config, parts, quiet=True, resume=True).row["metrics"] == row["metrics"]
    expected, found = (load_arrays(run / "checkpoint.safetensors", "checkpoint")[0] for run in (whole, parts))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert array.tobytes() == found[name].tobytes(), name
    assert any(name.startswith("trained/") for name in expected)
    assert ("loss_scale/scale" in expected) == (config.precision == "fp16")


class _CountingBackend(NumpyBackend):
    """NumPy, whose encoders note how many samples they get at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def model(self, spec: ModelSpec, /) -> Any:
        model, rows = super().model(spec), self.rows

        class Counting:
            def encode(self, parameters: Any, images: Any, texts: Any) -> Any:
                rows.append(len(images))
                return model.encode(parameters, images, texts)

            def encode_images(self, parameters: Any, images: Any) -> Any:
                rows.append(len(images))
                return model.encode_images(parameters, images)

            def encode_texts(self, parameters: Any, texts: Any) -> Any:
                rows.append(len(texts))
                return model.encode_texts(parameters, texts)

        return Counting()


def test_no_part_of_a_run_encodes_more_than_a_micro_batch(tmp_path: Path) -> None:
    """Steps, the check before a checkpoint, validation and the evaluation at the end."""
    backend = _CountingBackend()
    config = TrainConfig(data="digits", method="clip", backend="numpy", micro_batch=24, **{**SMALL, "epochs": 1})
    train(config, tmp_path / "run", backend=backend, quiet=True)
    assert max(backend.rows) == 24


def test_a_run_with_a_moving_average_stops_once_the_parameters_are_too_large(tmp_path: Path) -> None:
    """The average, which is evaluated, may still be finite then."""
    config = TrainConfig(data="digits", method="clip", backend="numpy", ema=0.9, **SMALL)
    backend, splits = get_backend("numpy"), open_splits(config)
    with contextlib.closing(Trainer(described(tmp_path, config, splits).run, backend, splits)) as trainer:
        huge = {name: np.full_like(value, 1e38) for name, value in trainer.state.parameters.items()}
        trainer.state = trainer.state._replace(parameters=huge)
        with pytest.raises(BadInput, match="the loss must stay finite"):
            trainer.fit(quiet=True, stop_after=1)


class _OverflowingBackend(NumpyBackend):
    """NumPy, whose encoders stand for encoders in fp16 with good features and an infinite gradient."""

    precisions = ("fp16",)

    def half_model(self, model: Any, precision: str) -> Any:
        class Overflowing:
            encode_images, encode_texts = model.encode_images, model.encode_texts

            def encode(self, parameters: Any, images: Any, texts: Any) -> Any:
                image, text, _ = model.encode(parameters, images, texts)
                return image, text, lambda *_: {name: np.full_like(x, np.inf) for name, x in parameters.items()}

        assert precision == "fp16"
        return Overflowing()


def test_overflows_in_a_row_give_a_warning_whatever_the_loss_scale_is() -> None:
    """A run with many good updates has doubled the scale, which is then still above 1 after 20 overflows."""
    backend = get_backend("numpy")
    state = {"scale": np.asarray(8.0), "updates": np.asarray(-20.0)}
    assert "the last 20 steps" in (check_overflows(state, backend) or "")
    assert check_overflows({**state, "updates": np.asarray(-21.0)}, backend) is None


def test_a_run_that_always_overflows_in_fp16_warns_and_then_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**SMALL, "epochs": 5}
    config = TrainConfig(data="digits", method="clip", backend="numpy", precision="fp16", **options)
    with pytest.raises(BadInput, match=r"precision must be bf16 or float32 .* overflowed in fp16 at the last 40 steps"):
        train(config, tmp_path / "run", backend=_OverflowingBackend(), quiet=True)
    assert capsys.readouterr().err.count("the last 20 steps, which changed no parameter; the run stops after 40") == 1
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    scales = [record["loss_scale"] for record in records if "loss_scale" in record]
    assert scales == [max(2.0**15 / 2**step, 1.0) for step in range(39)]
