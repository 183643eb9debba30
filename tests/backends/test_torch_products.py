"""oneDNN's products: where they are chosen, and that nothing but rounding tells."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import array_api_compat.numpy
import array_api_compat.torch
import numpy as np
import pytest
import torch
from drrho_reference import conformance
from drrho_torch import onednn_products, products

import drrho_core
from drrho_core._routines import tile_routines

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")

UNIT = 5e-6


def chosen(dtype: torch.dtype = torch.float32) -> Any:
    return tile_routines(torch.zeros((2, 2), dtype=dtype), array_api_compat.torch)[0]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DRRHO_ONEDNN", raising=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the products that oneDNN really makes."""
    made = []
    linear = torch.nn.functional.linear

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.is_mkldnn
        made.append((a.shape[0], b.shape[0], a.shape[1]))
        return linear(a, b)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    return made


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Unit rows, already rounded to float32."""
    x = np.random.default_rng([seed, *shape]).normal(size=shape)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Where they are chosen
# ---------------------------------------------------------------------------------------------------------------------


def test_they_are_off_by_default() -> None:
    assert chosen() is operator.matmul


@needs_onednn
def test_a_block_switches_them_on_and_puts_back_what_was() -> None:
    with onednn_products():
        assert chosen() is products.product
        with onednn_products(False):
            assert chosen() is operator.matmul
        assert chosen() is products.product
    assert chosen() is operator.matmul
    with pytest.raises(KeyError), onednn_products():
        raise KeyError
    assert chosen() is operator.matmul


@needs_onednn
def test_the_environment_holds_outside_of_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, expected in (("1", products.product), ("0", operator.matmul), ("", operator.matmul)):
        monkeypatch.setenv("DRRHO_ONEDNN", setting)
        assert chosen() is expected
    with onednn_products():
        assert chosen() is products.product
    monkeypatch.setenv("DRRHO_ONEDNN", "1")
    with onednn_products(False):
        assert chosen() is operator.matmul


def test_bad_settings_are_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"^enabled must be a bool, got str$"), onednn_products("1"):  # type: ignore[arg-type]
        pass
    monkeypatch.setenv("DRRHO_ONEDNN", "yes")
    with pytest.raises(ValueError, match=r"^DRRHO_ONEDNN must be '0' or '1', got 'yes'$"):
        chosen()


def test_other_dtypes_devices_and_libraries_are_multiplied_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with onednn_products():
        assert chosen(torch.float64) is operator.matmul
        assert tile_routines(torch.zeros((2, 2), device="meta"), array_api_compat.torch)[0] is operator.matmul
        assert tile_routines(np.zeros((2, 2), dtype=np.float32), array_api_compat.numpy)[0] is operator.matmul


@pytest.mark.parametrize(("name", "value"), [("is_available", lambda: False), ("enabled", False)])
def test_a_torch_without_onednn_multiplies_as_ever(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, name, value)
    with onednn_products():
        assert chosen() is operator.matmul


def test_a_backend_may_choose_for_its_library_alone(register_routines: Any) -> None:
    def twice(a: Any, b: Any) -> Any:
        return 2 * (a @ b)

    register_routines("numpy", matmul=lambda like: twice if like.dtype == np.float32 else None)
    features = np.eye(3, dtype=np.float32)
    assert tile_routines(features, array_api_compat.numpy)[0] is twice
    assert tile_routines(features.astype(np.float64), array_api_compat.numpy)[0] is operator.matmul
    assert tile_routines(torch.eye(3), array_api_compat.torch)[0] is operator.matmul
    loss = drrho_core.info_nce(features, features, temperature=1.0).loss
    assert float(loss) == pytest.approx(np.log(1 + 2 * np.exp(-2)), rel=1e-6)  # it is what the losses multiply with


# ---------------------------------------------------------------------------------------------------------------------
# What they return
# ---------------------------------------------------------------------------------------------------------------------


@needs_onednn
@pytest.mark.parametrize(("rows", "columns", "terms"), [(256, 256, 256), (300, 257, 513)])
def test_a_product_is_the_product(calls: list[Any], rows: int, columns: int, terms: int) -> None:
    a, b = drawn(rows, terms), drawn(columns, terms, seed=1)
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    layouts = {
        "plain": lambda x: torch.asarray(x),
        "transposed": lambda x: torch.asarray(np.ascontiguousarray(x.T)).T,
        "strided": lambda x: torch.asarray(np.repeat(x, 2, axis=1))[:, ::2],
    }
    for left in layouts.values():
        for right in layouts.values():
            one, other = left(a), right(b).T
            got = products.product(one, other)
            assert got.layout is torch.strided
            assert got.dtype is torch.float32
            assert np.max(np.abs(got.numpy() - exact)) <= UNIT
            assert torch.equal(products.product(one, other), got)
            assert np.array_equal(one.numpy(), a)
    assert set(calls) == {(rows, columns, terms)}


@pytest.mark.parametrize(("rows", "columns", "terms"), [(255, 256, 256), (256, 255, 256), (256, 256, 255)])
def test_small_products_are_torchs_own(calls: list[Any], rows: int, columns: int, terms: int) -> None:
    a, b = torch.asarray(drawn(rows, terms)), torch.asarray(drawn(terms, columns))
    assert torch.equal(products.product(a, b), a @ b)
    assert not calls


def step(images: Any, texts: Any, reference: Any, mask: Any, **options: Any) -> Any:
    unseen = images[:, 0] * 0 - 1.0
    return drrho_core.contrastive_step(
        images,
        texts,
        unseen,
        unseen,
        temperature=0.5,
        gamma=0.7,
        reference_features=(reference, texts),
        pair_mask=mask,
        **options,
    )


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "one pass": lambda images, texts, reference, mask: step(images, texts, reference, mask),
    "two passes": lambda images, texts, reference, mask: step(images, texts, reference, None, tile_size=265),
    "unimodal": lambda images, texts, reference, mask: drrho_core.unimodal_contrastive_step(
        images, texts, images[:, 0] * 0 - 1.0, images[:, 0] * 0, temperature=0.5, gamma=0.7, tile_size=265
    ),
    "info_nce": lambda images, texts, *_: drrho_core.info_nce(images, texts, temperature=0.5),
    "sigmoid_loss": lambda images, texts, reference, mask: drrho_core.sigmoid_loss(
        images, texts, scale=2.0, bias=-1.0, pair_mask=mask
    ),
    "distillation_loss": lambda images, texts, reference, _: drrho_core.distillation_loss(
        images, texts, reference, texts, temperature=0.5, reference_temperature=0.4
    ),
    "hinge_margin_loss": lambda images, texts, reference, mask: drrho_core.hinge_margin_loss(
        images, texts, margin=0.5, pair_mask=mask
    ),
}


@needs_onednn
@pytest.mark.parametrize("name", FUNCTIONS)
def test_steps_are_equal_within_the_bar(calls: list[Any], name: str) -> None:
    b, d = 530, 258  # two tiles a side, or one
    arrays = [torch.asarray(drawn(b, d, seed=seed)) for seed in range(3)]
    mask = torch.asarray(np.random.default_rng(3).random((b, b)) < 0.8)
    function = FUNCTIONS[name]
    exact = function(*(array.double() for array in arrays), mask)
    before = function(*arrays, mask)
    assert not calls
    with onednn_products():
        got = function(*arrays, mask)
        again = function(*arrays, mask)
    assert len(calls) > 5
    for field, wanted in exact._asdict().items():
        value = getattr(got, field)
        assert torch.equal(value, getattr(again, field)), field
        assert value.shape == getattr(before, field).shape
        # A gradient's rows are means over the batch of differences of unit vectors.
        size = 1.0 / b if field.endswith("_gradient") and wanted.ndim == 2 else max(1.0, float(wanted.abs().max()))
        assert float((value - wanted).abs().max()) <= UNIT * size, field


@needs_onednn
@pytest.mark.parametrize("function", ["contrastive_step", "unimodal_contrastive_step", "info_nce"])
def test_the_conformance_kit_passes_with_them(monkeypatch: pytest.MonkeyPatch, calls: list[Any], function: str) -> None:
    monkeypatch.setattr(products, "SMALLEST", 1)
    with onednn_products():
        implementation = {function: getattr(drrho_core, function)}
        report = conformance.check(implementation, xp=array_api_compat.torch, dtypes=["float32"])
    assert calls
    assert report.passed, report.table()


def test_compiled_steps_are_untouched(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    monkeypatch.setattr(products, "SMALLEST", 1)
    images, texts = torch.asarray(drawn(8, 4)), torch.asarray(drawn(8, 4, seed=1))

    def loss(one: torch.Tensor, other: torch.Tensor) -> Any:
        return tuple(drrho_core.info_nce(one, other, temperature=0.5, xp=array_api_compat.torch))

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with onednn_products():
        got = compiled(images, texts)
    assert not calls
    for one, other in zip(got, loss(images, texts), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
