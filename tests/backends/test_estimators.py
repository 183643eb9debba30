"""The estimators of the backends return the rows of `InnerEstimator`, wherever they store the numbers."""

from __future__ import annotations

import math
import os
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from drrho_jax import DonatingEstimator
from drrho_numpy import MemoryMappedEstimator
from drrho_torch import HostEstimator

from drrho_core import InnerEstimator

NEVER = -math.inf
FLOATS = ["float32", "float64"]


class Kind:
    """One class of estimators, and the conversions of its arrays from and to NumPy."""

    def __init__(self, name: str, dtype: str, folder: Path) -> None:
        self.name, self.dtype, self.folder = name, dtype, folder
        self.made: list[Any] = []

    def make(self, n: int) -> Any:
        if self.name == "file":
            made: Any = MemoryMappedEstimator(self.folder / f"estimator-{len(self.made)}", n, dtype=self.dtype)
        elif self.name == "host":
            made = HostEstimator(n, device="cpu", dtype=getattr(torch, self.dtype))
        elif self.name == "host-cuda":
            made = HostEstimator(n, device="cuda", dtype=getattr(torch, self.dtype))
        else:
            made = DonatingEstimator(n, like=jnp.zeros(1, dtype=self.dtype))
        self.made.append(made)
        return made

    def index(self, values: Any) -> Any:
        values = np.asarray(values)
        return {"file": np.asarray, "jax": jnp.asarray}.get(self.name, torch.asarray)(values)

    def rows(self, values: Any) -> Any:
        values = np.asarray(values)
        values = values.astype(self.dtype) if values.dtype == np.float64 else values
        if self.name == "host-cuda":
            return torch.asarray(values, device="cuda")
        return {"file": np.asarray, "jax": jnp.asarray}.get(self.name, torch.asarray)(values)

    def numpy(self, values: Any) -> np.ndarray:
        return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)

    def everything(self, made: Any) -> list[list[float]]:
        index = self.index(np.arange(made.num_samples))
        return [self.numpy(side).tolist() for side in made.gather(index)]


@pytest.fixture(
    params=[
        pytest.param((name, dtype), id=f"{name}-{dtype}", marks=[pytest.mark.gpu] if "cuda" in name else [])
        for name in ("file", "host", "host-cuda", "jax")
        for dtype in FLOATS
    ]
)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kind]:
    name, dtype = request.param
    if name == "host-cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if name == "jax" and dtype == "float64":
        import jax

        jax.config.update("jax_enable_x64", True)
    kind = Kind(name, dtype, tmp_path)
    yield kind
    for made in kind.made:
        if hasattr(made, "close"):
            made.close()


# ---------------------------------------------------------------------------------------------------------------------
# The same protocol
# ---------------------------------------------------------------------------------------------------------------------


def test_a_long_run_equals_inner_estimator_bit_for_bit(kind: Kind) -> None:
    """Repeated visits, gathers of what was just written, growth, and numbers with odd bits."""
    rng = np.random.default_rng(0)
    ours, plain = kind.make(40), InnerEstimator(40, like=np.zeros(1), dtype=getattr(np, kind.dtype))
    odd = np.array([0.0, -0.0, NEVER, 5e-324, -1e-40, 3.4e38, -3.4e38], dtype=kind.dtype)
    for step in range(60):
        if step == 30:
            ours, plain = ours.grow(64), plain.grow(64)
        index = rng.permutation(plain.num_samples)[: rng.choice([0, 1, 7, 11])]  # JAX compiles for each length
        image, text = rng.normal(size=(2, len(index))).astype(kind.dtype)
        text[: len(odd)] = rng.permutation(odd)[: len(text)]
        ours = ours.scatter(kind.index(index), kind.rows(image), kind.rows(text))
        plain = plain.scatter(index, image, text)
        seen = rng.permutation(plain.num_samples)[:8]
        for got, expected in zip(ours.gather(kind.index(seen)), plain.gather(seen), strict=True):
            assert kind.numpy(got).tobytes() == expected.tobytes()
    assert kind.everything(ours) == kind.everything(ours)
    assert kind.everything(ours)[0] == plain.log_inner_image.tolist()


def test_new_estimator_has_no_visited_sample(kind: Kind) -> None:
    made = kind.make(3)
    assert kind.everything(made) == [[NEVER] * 3] * 2
    assert made.num_samples == 3
    for side in made.gather(kind.index([1])):
        assert kind.numpy(side).dtype == kind.dtype
    assert "num_samples=3" in repr(made)
    assert kind.dtype in repr(made)


def test_scatter_is_in_place_and_gather_returns_copies(kind: Kind) -> None:
    made = kind.make(5)
    before = made.gather(kind.index([1, 4]))
    assert made.scatter(kind.index([4, 1]), kind.rows([1.0, 2.0]), kind.rows([3.0, 4.0])) is made
    assert [kind.numpy(side).tolist() for side in before] == [[NEVER, NEVER]] * 2
    assert [kind.numpy(side).tolist() for side in made.gather(kind.index([1, 4]))] == [[2, 1], [4, 3]]
    assert kind.everything(made) == [[NEVER, 2, NEVER, NEVER, 1], [NEVER, 4, NEVER, NEVER, 3]]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
def test_every_integer_dtype_can_index(kind: Kind, dtype: str) -> None:
    made = kind.make(300)
    index = kind.index(np.array([100, 2], dtype=dtype))
    made = made.scatter(index, kind.rows([-5.0, -6.0]), kind.rows([-7.0, -8.0]))
    assert [kind.numpy(side).tolist() for side in made.gather(index)] == [[-5, -6], [-7, -8]]
    assert np.count_nonzero(np.isfinite(kind.everything(made))) == 4


BAD_INDEX = [
    (
        [0, 6],
        ValueError,
        r"sample_index must hold row ids from 0 to 5 \(see docs/large-data\.md, .*\), got 6 at position 1",
    ),
    (
        [-1, 2],
        ValueError,
        r"sample_index must hold row ids from 0 to 5 \(see docs/large-data\.md, .*\), got -1 at position 0",
    ),
    ([3, 3], ValueError, "sample_index must not repeat an index within a batch, got 3 twice"),
    (
        [[0, 1]],
        ValueError,
        r"sample_index must have shape \(batch_size,\), one row id per sample of the batch, got \(1, 2\)",
    ),
    ([0.0, 1.0], TypeError, "sample_index must have an integer dtype, got .*float"),
]


@pytest.mark.parametrize(("index", "error", "message"), BAD_INDEX)
def test_a_bad_index_is_refused(kind: Kind, index: Any, error: Any, message: str) -> None:
    made = kind.make(6)
    zeros = kind.rows(np.zeros(2))
    with pytest.raises(error, match=message):
        made.gather(kind.index(index))
    with pytest.raises(error, match=message):
        made.scatter(kind.index(index), zeros, zeros)
    assert kind.everything(made) == [[NEVER] * 6] * 2


@pytest.mark.parametrize(
    ("image", "text", "error", "message"),
    [
        (np.zeros(3), np.zeros(2), ValueError, r"log_inner_image must have shape \(batch_size,\) = \(2,\), got \(3,\)"),
        (np.zeros(2), np.zeros(2, dtype="f2"), TypeError, "log_inner_text must have the state's dtype .*float"),
        (np.array([0, np.nan]), np.zeros(2), ValueError, "log_inner_image must be finite, .*, got nan at position 1"),
        (np.zeros(2), np.array([np.inf, 0]), ValueError, "log_inner_text must be finite, .*, got inf at position 0"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_and_nothing_is_written(
    kind: Kind, image: Any, text: Any, error: Any, message: str
) -> None:
    if "finite" in message and kind.name == "host-cuda":
        pytest.skip("values are looked at on the host only")
    made = kind.make(4)
    with pytest.raises(error, match=message):
        made.scatter(kind.index([0, 2]), kind.rows(image), kind.rows(text))
    assert kind.everything(made) == [[NEVER] * 4] * 2


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, "num_samples must be at least 1, got 0"),
        (2.0, TypeError, r"num_samples must be an integer, got 2\.0"),
    ],
)
def test_number_of_samples_must_be_a_positive_integer(kind: Kind, n: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        kind.make(n)
    with pytest.raises(ValueError, match="num_samples must be at least 3, got 2"):
        kind.make(3).grow(2)


def test_the_state_of_inner_estimator_can_be_loaded(kind: Kind) -> None:
    made = kind.make(5)
    image, text = np.array([NEVER, 1, 2, 3, 4]), np.array([0, 1, NEVER, 3, -4.0])
    on_host = (lambda x: torch.asarray(x.astype(kind.dtype))) if kind.name == "host-cuda" else kind.rows
    made.load_state_dict({"log_inner_image": on_host(image), "log_inner_text": on_host(text)})
    assert kind.everything(made) == [image.tolist(), text.tolist()]
    made = made.scatter(kind.index([1]), kind.rows([7.0]), kind.rows([8.0]))
    assert kind.everything(made)[0] == [NEVER, 7, 2, 3, 4]
    assert image.tolist() == [NEVER, 1, 2, 3, 4]
    before = kind.everything(made)
    good = on_host(np.zeros(5))
    for bad, error, message in (
        ({"log_inner_image": good}, ValueError, r"state must hold .*log_inner_image.*, got \['log_inner_image'\]"),
        ({"log_inner_image": good, "log_inner_text": good[:4]}, ValueError, r"log_inner_text .* = \(5,\), got \(4,\)"),
        ({"log_inner_image": good, "log_inner_text": good + math.inf}, ValueError, "log_inner_text must be finite"),
        ({"log_inner_image": good > 0, "log_inner_text": good}, TypeError, "log_inner_image must have .*dtype .*bool"),
        ({"log_inner_image": [0.0] * 5, "log_inner_text": good}, TypeError, "log_inner_image must be an array"),
        (None, TypeError, "state must be a mapping, got NoneType"),
    ):
        with pytest.raises(error, match=message):
            made.load_state_dict(bad)
    assert kind.everything(made) == before


def test_load_state_dict_restores_the_state(kind: Kind) -> None:
    made = kind.make(4).scatter(kind.index([2, 0]), kind.rows([1.0, -2.0]), kind.rows([3.0, 0.0]))
    state = made.snapshot(kind.folder / "snapshot") if kind.name == "file" else made.state_dict()
    before = kind.everything(made)
    made.scatter(kind.index([0, 3]), kind.rows([5.0, 6.0]), kind.rows([7.0, 8.0]))
    assert kind.everything(made) != before
    for _ in range(2):
        made.load_state_dict(state)
        assert kind.everything(made) == before
        made.scatter(kind.index([1]), kind.rows([5.0]), kind.rows([7.0]))


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


def test_a_file_of_a_billion_samples_stays_sparse(tmp_path: Path) -> None:
    """Samples that were never visited take space neither on the disk nor in memory."""
    n = 1_000_000_000
    path = tmp_path / "estimator"
    rng = np.random.default_rng(1)
    index = np.append(np.unique(rng.integers(0, n - 1, 40)), n - 1)
    index = rng.permutation(index)
    image, text = rng.normal(size=(2, len(index))).astype("float32")
    tracemalloc.start()
    with MemoryMappedEstimator(path, n) as made:
        made.prefetch(index)
        assert [side.tolist() for side in made.gather(index)] == [[NEVER] * len(index)] * 2
        made.scatter(index, image, text)
        state = made.snapshot(tmp_path / "snapshot")
        made.scatter(index[:1], image[:1] + 1, text[:1])
        made.load_state_dict(state)
    with MemoryMappedEstimator(path) as made:
        assert made.num_samples == n
        assert [side.tolist() for side in made.gather(index)] == [image.tolist(), text.tolist()]
        assert made.grow(2 * n).gather(np.asarray([index[0], 2 * n - 1]))[1].tolist() == [text[0], NEVER]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
    for one, size in ((path, 16e9), (tmp_path / "snapshot", 8e9)):
        assert os.stat(one).st_size == size + 4096
        assert os.stat(one).st_blocks * 512 < 1e6


def test_an_existing_file_is_opened_with_its_state(tmp_path: Path) -> None:
    path = tmp_path / "estimator"
    with MemoryMappedEstimator(str(path), 3, dtype=np.float64) as made:
        made.scatter(np.asarray([1]), np.asarray([0.1]), np.asarray([0.0]))
        state = made.state_dict()
        made.load_state_dict(state)  # its own: nothing to do
    assert state == {"path": str(path), "version": 1, "num_samples": 3, "dtype": "float64"}
    with MemoryMappedEstimator(path, 3, dtype="float64") as made:
        assert [side.tolist() for side in made.gather(np.asarray([1, 0]))] == [[0.1, NEVER], [0.0, NEVER]]
    assert os.listdir(tmp_path) == ["estimator"]


def test_files_of_another_format_or_size_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "estimator"
    with pytest.raises(
        ValueError, match=r"num_samples must be given, because .*estimator does not exist yet, got None"
    ):
        MemoryMappedEstimator(path)
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got float16"):
        MemoryMappedEstimator(path, 3, dtype="float16")
    assert not path.exists()
    MemoryMappedEstimator(path, 3).close()
    whole = path.read_bytes()
    for arguments, message in (
        ({"num_samples": 4}, "num_samples must be 3, as in .*estimator, got 4"),
        ({"dtype": np.float64}, "dtype must be float32, as in .*estimator, got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            MemoryMappedEstimator(path, **arguments)  # type: ignore[arg-type]
    for content, message in (
        (b"", "must be a file of MemoryMappedEstimator, got one that starts with b''"),
        (b"loss,text\n" * 9, "must be a file of MemoryMappedEstimator, got one that starts with b'loss,text"),
        (whole[:16] + struct.pack("<I", 2) + whole[20:], "must have version 1, got 2"),
        (whole[:20] + struct.pack("<I", 2) + whole[24:], "must have a header of float32 or float64 samples, got b"),
        (whole[:-1], "must have 4120 bytes for 3 samples, got 4119"),
        (whole + whole[-8:], r"for 3 samples \(after an interrupted grow\(\): truncate it to that size\), got 4128"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            MemoryMappedEstimator(path)
        assert path.read_bytes() == content


def test_a_file_is_open_in_one_estimator_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "estimator"
    with (
        MemoryMappedEstimator(path, 3) as made,
        pytest.raises(ValueError, match="must be open in one estimator at a time, got a file that is open already"),
    ):
        MemoryMappedEstimator(path)
    made.close()
    index, row = np.asarray([0]), np.zeros(1, dtype="f4")
    for use in (
        lambda: made.gather(index),
        lambda: made.scatter(index, row, row),
        lambda: made.grow(5),
        lambda: made.state_dict(),
        lambda: made.snapshot(tmp_path / "copy"),
        lambda: made.load_state_dict({}),
        lambda: made.prefetch(index),
    ):
        with pytest.raises(ValueError, match=r"the estimator must be open, got one whose file .*estimator was closed"):
            use()
    with MemoryMappedEstimator(path) as made:
        assert made.gather(np.arange(3))[0].tolist() == [NEVER] * 3


def test_a_state_that_does_not_fit_leaves_the_file_alone(tmp_path: Path) -> None:
    index, row = np.asarray([1]), np.ones(1, dtype="f4")
    with MemoryMappedEstimator(tmp_path / "other", 4) as other:
        four = other.state_dict()
    with MemoryMappedEstimator(tmp_path / "estimator", 3) as made:
        made.scatter(index, row, row)
        good = made.snapshot(tmp_path / "snapshot")
        with pytest.raises(ValueError, match=r"path must be another file than the estimator's, got .*estimator"):
            made.snapshot(made.path)
        for state, message in (
            (four, "num_samples of the state must be 3, got 4"),
            ({**good, "version": 0}, "version of the state must be 1, got 0"),
            ({**good, "dtype": "float64"}, "dtype of the state must be float32, got float64"),
            ({**good, "path": str(tmp_path / "nothing")}, "path of the state must be a file, got .*nothing"),
            (
                {**good, "path": four["path"]},
                "other must have num_samples=3 and dtype=float32, got num_samples=4 and dtype=float32",
            ),
            ({**good, "gamma": 1}, "state must hold path, version, num_samples, dtype, or log_inner_image .*gamma"),
        ):
            with pytest.raises(ValueError, match=message):
                made.load_state_dict(state)
        (tmp_path / "snapshot").write_bytes((tmp_path / "snapshot").read_bytes()[:-4])  # an interrupted copy
        with pytest.raises(ValueError, match="snapshot must have 4120 bytes for 3 samples, got 4116"):
            made.load_state_dict(good)
        assert made.gather(np.arange(3))[0].tolist() == [NEVER, 1, NEVER]
    assert sorted(os.listdir(tmp_path)) == ["estimator", "other", "snapshot"]


def test_a_copy_appears_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in the middle leaves neither half a copy nor half a state."""
    index, row = np.asarray([1]), np.ones(1, dtype="f4")
    with MemoryMappedEstimator(tmp_path / "estimator", 3) as made:
        good = made.scatter(index, row, row).snapshot(tmp_path / "snapshot")
        made.scatter(index, row + 1, row)

        def fail(*_: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(os, "fsync", fail)  # the last call before a copy takes its name
        with pytest.raises(OSError, match="no space left"):
            made.snapshot(tmp_path / "second")
        with pytest.raises(OSError, match="no space left"):
            made.load_state_dict(good)
        assert made.gather(index)[0].tolist() == [2]
    assert sorted(os.listdir(tmp_path)) == ["estimator", "snapshot"]


def test_a_copy_stays_sparse_without_seek_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, row = np.asarray([1, 9_999_999]), np.ones(2, dtype="f4")
    with MemoryMappedEstimator(tmp_path / "estimator", 10_000_000) as made:
        made.scatter(index, row, row)
        monkeypatch.delattr(os, "SEEK_DATA", raising=False)
        state = made.snapshot(tmp_path / "snapshot")
        made.scatter(index, row + 1, row)
        made.load_state_dict(state)
        assert [side.tolist() for side in made.gather(index)] == [[1, 1]] * 2
    assert os.stat(tmp_path / "snapshot").st_blocks * 512 <= 2 * (1 << 22) + 65536


def test_both_numbers_of_a_sample_share_a_page(tmp_path: Path) -> None:
    """After a power failure a sample has two old numbers or two new ones: its bytes never straddle two sectors."""
    with MemoryMappedEstimator(tmp_path / "estimator", 3) as made:
        made.scatter(np.asarray([1]), np.asarray([1.5], dtype="f4"), np.asarray([-2.0], dtype="f4"))
    stored = np.fromfile(tmp_path / "estimator", dtype="<u4", offset=4096).reshape(3, 2)
    assert stored[[0, 2]].tolist() == [[0, 0]] * 2
    assert (stored[1] ^ np.float32(-np.inf).view("u4")).view("f4").tolist() == [1.5, -2.0]


# ---------------------------------------------------------------------------------------------------------------------
# The host, and donation
# ---------------------------------------------------------------------------------------------------------------------


def test_host_estimator_has_the_state_of_inner_estimator() -> None:
    made, plain = HostEstimator(4, device="cpu"), InnerEstimator(4, like=torch.zeros(1))
    index, image, text = torch.tensor([2, 0]), torch.tensor([0.5, 1.5]), torch.tensor([0.0, 1.0])
    made, plain = made.scatter(index, image, text), plain.scatter(index, image, text)  # type: ignore[assignment]
    for name, value in plain.state_dict().items():
        assert torch.equal(getattr(made, name), value)
        assert torch.equal(made.state_dict()[name], value)
    other = InnerEstimator(4, like=torch.zeros(1))
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.log_inner_text, plain.log_inner_text)
    assert made.device == torch.device("cpu")


def test_host_estimator_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="device must be 'cpu' or another that torch has, got 'abacus'"):
        HostEstimator(3, device="abacus")
    with pytest.raises(TypeError, match=r"dtype must be float32 or wider, got torch\.float16"):
        HostEstimator(3, device="cpu", dtype=torch.float16)
    made = HostEstimator(3, device="cpu")
    asks = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="log_inner_text must not require gradients"):
        made.scatter(torch.tensor([0]), torch.ones(1), asks)
    with pytest.raises(TypeError, match="sample_index must be an array, got list"):
        made.gather([0])  # type: ignore[arg-type]


def test_donation_writes_in_place() -> None:
    made = DonatingEstimator(1000, like=jnp.zeros(1))
    state = made.state_dict()
    taken = made.log_inner_image
    place = taken.unsafe_buffer_pointer()
    made.scatter(jnp.asarray([1]), jnp.asarray([2.0]), jnp.asarray([3.0]))
    assert made.log_inner_image.unsafe_buffer_pointer() == place
    assert taken.is_deleted()
    assert float(state["log_inner_image"][1]) == NEVER
    grown = made.grow(1001)
    assert type(grown) is DonatingEstimator
    assert grown.gather(jnp.asarray([1, 1000]))[1].tolist() == [3, NEVER]
