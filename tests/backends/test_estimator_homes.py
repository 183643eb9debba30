"""A training run's inner estimates by the name of their home, for every backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_core import InnerEstimator
from drrho_core.backend import get_backend
from drrho_core.state import HOMES, RunEstimator, make_estimator

N = 9
NEVER = -np.inf


class Maker:
    """Builds estimators in one home for one backend, and closes them."""

    def __init__(self, backend: str, home: str, folder: Path) -> None:
        self.backend, self.home, self.folder = get_backend(backend), home, folder
        self.made: list[RunEstimator] = []

    def __call__(self, home: str | None = None) -> RunEstimator:
        home = self.home if home is None else home
        path = self.folder / f"estimator-{len(self.made)}" if home == "file" else None
        self.made.append(make_estimator(home, N, backend=self.backend, path=path))
        return self.made[-1]


@pytest.fixture(params=[(backend, home) for backend in ("numpy", "torch", "jax") for home in HOMES], ids="-".join)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Maker]:
    maker = Maker(*request.param, tmp_path)
    yield maker
    for made in maker.made:
        made.close()


def train(estimator: RunEstimator, backend: Any, seed: int = 0) -> InnerEstimator:
    """Write ten batches into an estimator, and into a plain one, which is returned."""
    plain = InnerEstimator(N, like=np.zeros(1), dtype=np.float32)
    rng = np.random.default_rng(seed)
    for _ in range(10):
        index = rng.permutation(N)[:4]
        image, text = rng.normal(size=(2, 4)).astype("float32")
        estimator.scatter(index, backend.asarray(image), backend.asarray(text))
        plain = plain.scatter(index, image, text)
    return plain


def test_every_home_returns_the_rows_of_inner_estimator(make: Maker) -> None:
    made = make()
    assert made.num_samples == N
    fresh = made.gather(np.asarray([3, 0]))
    assert [make.backend.to_numpy(side).tolist() for side in fresh] == [[NEVER] * 2] * 2
    plain = train(made, make.backend)
    index = np.asarray([8, 2, 5])
    for row, expected in zip(made.gather(index), plain.gather(index), strict=True):
        assert type(row) is type(make.backend.asarray(np.zeros(1)))
        assert make.backend.to_numpy(row).tobytes() == expected.tobytes()


@pytest.mark.parametrize("other", HOMES)
def test_a_saved_state_continues_in_another_home(make: Maker, other: str) -> None:
    made = make()
    plain = train(made, make.backend)
    state = made.state_dict()
    assert {name: array.tobytes() for name, array in state.items()} == {
        name: array.tobytes() for name, array in plain.state_dict().items()
    }
    continued = make(other)
    continued.load_state_dict(state)
    expected = train(continued, make.backend, seed=1)
    assert expected.num_samples == N
    made_again = make()
    made_again.load_state_dict(state)
    train(made_again, make.backend, seed=1)
    for name, array in continued.state_dict().items():
        assert array.tobytes() == made_again.state_dict()[name].tobytes()


def test_a_saved_state_is_a_copy(make: Maker) -> None:
    made = make()
    plain = train(made, make.backend)
    state = made.state_dict()
    train(made, make.backend, seed=1)
    assert state["log_inner_image"].tolist() == plain.log_inner_image.tolist()


def test_a_bad_index_is_refused(make: Maker) -> None:
    made = make()
    with pytest.raises(ValueError, match=r"sample_index must hold row ids from 0 to 8 .*, got 9 at position 1"):
        made.gather(np.asarray([0, 9]))
    with pytest.raises(ValueError, match="sample_index must not repeat an index within a batch, got 3 twice"):
        made.scatter(np.asarray([3, 3]), *(make.backend.asarray(np.zeros(2)) for _ in range(2)))
    assert np.all(made.state_dict()["log_inner_text"] == NEVER)


def test_unknown_homes_and_wrong_paths_are_refused(tmp_path: Path) -> None:
    backend = get_backend("numpy")
    for home, path, message in (
        ("attic", None, r"home must be one of device, host, file, split, got 'attic'"),
        ("file", None, r"path must be given for the home 'file', got None"),
        ("host", tmp_path / "x", r"path must be None for the home 'host', got .*x"),
    ):
        with pytest.raises(ValueError, match=message):
            make_estimator(home, N, backend=backend, path=path)
    for name in ("numpy", "torch", "jax"):
        with pytest.raises(ValueError, match=rf"home must be one of device.* for the {name} backend, got 'attic'"):
            get_backend(name).estimator("attic", N)


def test_a_file_is_free_after_close(tmp_path: Path) -> None:
    """A run that has ended can be resumed in the same process: the file of its estimator is not locked any more."""
    backend, path = get_backend("numpy"), tmp_path / "estimator"
    first = make_estimator("file", N, backend=backend, path=path)
    train(first, backend)
    state = first.state_dict()
    with pytest.raises(ValueError, match="must be open in one estimator at a time, got a file that is open already"):
        make_estimator("file", N, backend=backend, path=path)
    first.close()
    again = make_estimator("file", N, backend=backend, path=path)
    assert again.state_dict()["log_inner_text"].tobytes() == state["log_inner_text"].tobytes()
    again.close()
