"""What the torch backend has beyond the contract: autograd inside, torch's own AdamW, and a model that learns."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from drrho_torch import TorchBackend  # noqa: E402
from drrho_torch.backend import default_device  # noqa: E402
from drrho_torch.models import ConvModel  # noqa: E402

from drrho_clip.models import ModelSpec, initial_parameters  # noqa: E402
from drrho_clip.optimizer import AdamW  # noqa: E402
from drrho_core.backend import Parameters  # noqa: E402

SPEC = ModelSpec(
    "conv", image_size=8, channels=3, vocabulary_size=12, context_length=5, feature_dim=16, width=8, depth=1, heads=2
)
BACKEND = TorchBackend("cpu", "float64")


def batch(b: int, seed: int = 0) -> tuple[Parameters, torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(seed)
    parameters = {name: BACKEND.asarray(values) for name, values in initial_parameters(SPEC, seed=seed).items()}
    images = BACKEND.asarray(generator.uniform(-1, 1, (b, 8, 8, 3)))
    texts = BACKEND.asarray(generator.integers(1, 12, (b, 5)).astype(np.int32))
    return parameters, images, texts


def test_pullback_is_autograd_of_the_same_forward_pass() -> None:
    parameters, images, texts = batch(6)
    model = ConvModel(SPEC)
    image_features, _, pullback = model.encode(parameters, images, texts)
    upstream = torch.randn((2, *image_features.shape), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = pullback(upstream[0], upstream[1])

    leaves = {name: parameter.clone().requires_grad_() for name, parameter in parameters.items()}
    value = (model._images(leaves, images) * upstream[0]).sum() + (model._texts(leaves, texts) * upstream[1]).sum()
    value.backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(gradients[name], leaf.grad, rtol=1e-13, atol=1e-14)


def test_one_side_is_a_gradient_of_its_own() -> None:
    parameters, images, texts = batch(6)
    image_features, text_features, pullback = ConvModel(SPEC).encode(parameters, images, texts)
    gradients = pullback(torch.zeros_like(image_features), torch.randn_like(text_features))
    assert all(bool((gradient == 0).all()) == name.startswith("image/") for name, gradient in gradients.items())


def test_the_graph_dies_with_its_pullback() -> None:
    parameters, images, texts = batch(6)
    image_features, _, pullback = ConvModel(SPEC).encode(parameters, images, texts)
    held = [weakref.ref(cell.cell_contents[0]) for cell in pullback.__closure__ if type(cell.cell_contents) is tuple]
    assert held[0]().requires_grad
    del pullback
    assert held[0]() is None  # at once: no cycle keeps a batch of activations until the collector comes
    assert not image_features.requires_grad
    assert not any(parameter.requires_grad for parameter in parameters.values())


def test_parameters_that_ask_for_autograd_get_none() -> None:
    parameters, images, texts = batch(4)
    parameters = {name: parameter.requires_grad_() for name, parameter in parameters.items()}
    model = ConvModel(SPEC)
    image_features, text_features, pullback = model.encode(parameters, images, texts)
    everything = [image_features, text_features, *pullback(image_features, text_features).values()]
    everything += [model.encode_images(parameters, images), model.encode_texts(parameters, texts)]
    assert not any(array.requires_grad for array in everything)


def test_no_grad_outside_does_not_matter() -> None:
    parameters, images, texts = batch(4)
    with torch.no_grad():
        image_features, text_features, pullback = ConvModel(SPEC).encode(parameters, images, texts)
        gradients = pullback(torch.randn_like(image_features), torch.randn_like(text_features))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())


def test_images_of_one_grey_and_unknown_words_still_have_a_direction() -> None:
    parameters, images, texts = batch(3)
    image_features, text_features, pullback = ConvModel(SPEC).encode(
        parameters, torch.zeros_like(images), torch.ones_like(texts)
    )
    assert torch.allclose(image_features.norm(dim=1), torch.ones(3, dtype=torch.float64))
    gradients = pullback(torch.randn_like(image_features), torch.randn_like(text_features))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^architecture must be 'conv' for ConvModel, got 'mlp'$"):
        ConvModel(ModelSpec("mlp", image_size=8, channels=3, vocabulary_size=12, context_length=5))


def test_torchs_adamw_is_ours() -> None:
    ours = AdamW(BACKEND.xp, weight_decay=0.2, beta1=0.7, beta2=0.9, epsilon=1e-6)
    torchs = BACKEND.adamw(weight_decay=0.2, beta1=0.7, beta2=0.9, epsilon=1e-6)
    assert type(torchs) is not AdamW
    runs = []
    for optimizer in (ours, torchs):
        parameters, *_ = batch(1)
        state = optimizer.init(parameters)
        generator = torch.Generator().manual_seed(5)
        for step in range(10):
            gradients = {
                name: torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
                for name, parameter in parameters.items()
            }
            parameters, state = optimizer.update(parameters, gradients, state, 0.1 / (1 + step))
        runs.append({**parameters, **state})
    assert set(runs[0]) == set(runs[1])
    for name, value in runs[0].items():
        assert runs[1][name].dtype == value.dtype
        torch.testing.assert_close(runs[1][name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", ["cuda:99", 99, "abacus"])
def test_a_device_that_torch_lacks_is_one_line(device: object) -> None:
    rule = "device must be 'cpu' or another that torch has"
    with pytest.raises(ValueError, match=f"^{rule}, got {device!r}: ") as error:
        TorchBackend(device)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("gpu", "set_by_user", "expected"),
    [(False, "cpu", "cpu"), (True, "cpu", "cuda"), (True, "meta", "meta"), (False, "meta", "meta")],
)
def test_the_default_device_is_the_gpu_unless_the_user_has_set_another(
    gpu: bool, set_by_user: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    # An Apple GPU is never chosen silently.
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with torch.device(set_by_user):
        assert default_device() == expected
        if expected != "cuda":
            backend = TorchBackend()
            assert (backend.device, backend.has_gpu) == (expected, False)


def test_a_gpu_that_does_not_work_is_one_line_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU that works")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"^device must be 'cpu' or another that torch has, got 'cuda': ") as error:
        TorchBackend()
    assert "\n" not in str(error.value)
    assert TorchBackend("cpu").device == "cpu"


def test_the_pair_learns_to_match() -> None:
    """Twelve colours and their names: after a hundred steps of InfoNCE every image finds its text."""
    backend = TorchBackend("cpu", "float32")
    generator = np.random.default_rng(0)
    colours = generator.uniform(-1, 1, (11, 1, 1, 3))
    labels = np.arange(44) % 11
    images = backend.asarray(colours[labels] + 0.1 * generator.standard_normal((44, 8, 8, 3)))
    texts = np.zeros((44, 5), dtype=np.int32)
    texts[:, 0] = labels + 1
    texts_there = backend.asarray(texts)
    target = backend.asarray((labels[:, None] == labels) / 4.0)
    model, optimizer = backend.model(SPEC), backend.adamw(weight_decay=0.1)
    parameters: Parameters = {
        name: backend.asarray(values) for name, values in initial_parameters(SPEC, seed=0).items()
    }
    state = optimizer.init(parameters)
    for _ in range(100):
        image_features, text_features, pullback = model.encode(parameters, images, texts_there)
        # cross-entropy over texts of equal captions: its gradient is softmax - target
        error = (torch.softmax(image_features @ text_features.T / 0.1, dim=1) - target) / (0.1 * 44)
        gradients = pullback(error @ text_features, error.T @ image_features)
        parameters, state = optimizer.update(parameters, gradients, state, 3e-3)
    similarity = model.encode_images(parameters, images) @ model.encode_texts(parameters, texts_there[:11]).T
    found = backend.to_numpy(torch.argmax(similarity, dim=1))
    assert np.array_equal(found, labels)


def test_each_process_of_a_launcher_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1"}
    for name, value in (launched | {"LOCAL_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert default_device() == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"device must be named, .* got 2 processes and 1 GPUs"):
        default_device()
