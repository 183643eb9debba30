"""The encoders of one backend under the loss and the updates of another backend, by DLPack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_clip.config import TrainConfig
from drrho_clip.models import ModelSpec, initial_parameters
from drrho_clip.train import train
from drrho_core.backend import get_backend

SPEC = ModelSpec("conv", image_size=8, channels=3, vocabulary_size=9, context_length=4, feature_dim=6, width=4)


def _encoded(name: str, device: str) -> tuple[np.ndarray, ...]:
    """Return features and gradients of one batch."""
    backend = get_backend(name, device=device, dtype="float64")
    model = backend.model(SPEC)
    parameters = {key: backend.asarray(array) for key, array in initial_parameters(SPEC, seed=0).items()}
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((5, 8, 8, 3)), rng.integers(1, 9, (5, 4)).astype(np.int32)
    upstream = [backend.asarray(rng.standard_normal((5, 6))) for _ in range(2)]
    image, text, pullback = model.encode(parameters, backend.asarray(images), backend.asarray(texts))
    gradients = pullback(*upstream)
    assert list(gradients) == list(parameters)
    alone = (
        model.encode_images(parameters, backend.asarray(images)),
        model.encode_texts(parameters, backend.asarray(texts)),
    )
    # All results are arrays of the first backend, so the core accepts them.
    arrays = [image, text, *alone, *gradients.values()]
    assert {type(array) for array in arrays} == {type(parameters["text/tokens"])}
    return tuple(backend.to_numpy(array) for array in arrays)


@pytest.mark.parametrize(
    ("pair", "device"),
    [("numpy+torch", "cpu"), pytest.param("cupy+torch", "cuda:0", marks=[pytest.mark.gpu])],
)
def test_lent_encoders_have_the_features_and_gradients_of_the_lender(pair: str, device: str) -> None:
    if device != "cpu":
        pytest.importorskip("cupy")
    for lent, own in zip(_encoded(pair, device), _encoded("torch", device), strict=True):
        np.testing.assert_allclose(lent, own, rtol=1e-12, atol=1e-14)


def test_run_with_lent_encoders_equals_a_run_of_the_lender(tmp_path: Path) -> None:
    parameters = []
    for name in ("torch", "numpy+torch"):
        settings: dict[str, Any] = {"data": "digits", "method": "sogclr", "backend": name, "dtype": "float64"}
        settings |= {"architecture": "conv", "image_size": 8, "width": 2, "feature_dim": 4, "batch_size": 64}
        outcome = train(TrainConfig(**settings, epochs=1), tmp_path / name, device="cpu", quiet=True, stop_after=4)
        parameters.append(outcome.run.load_parameters("last"))
    for name, array in parameters[0].items():
        np.testing.assert_allclose(parameters[1][name], array, rtol=1e-8, atol=1e-10, err_msg=name)


def test_backend_keeps_its_own_encoders() -> None:
    backend = get_backend("numpy+torch", device="cpu")
    assert backend.architectures == ("conv", "mlp", "hf", "heads")
    own = ModelSpec("mlp", image_size=2, channels=1, vocabulary_size=5, context_length=3)
    assert type(backend.model(own)) is type(get_backend("numpy").model(own))


@pytest.mark.parametrize("name", ["numpy+", "+torch", "numpy+abacus"])
def test_pair_with_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^backend must be one of "):
        get_backend(name)
