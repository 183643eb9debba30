from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_clip.errors import BadInput
from drrho_clip.processes.fingerprint import digest_of_arrays, facts_of_program, require_equal


class Threads:
    """Threads of this process in place of processes; counts the values that were gathered."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.gathered: list[list[Any]] = []
        self._values: list[Any] = [None] * size
        self._met = threading.Barrier(size, timeout=10.0)

    def of(self, rank: int) -> Any:
        threads = self

        class Own:
            def gather(self, value: Any, /) -> list[Any]:
                threads._values[rank] = value
                threads._met.wait()
                values = list(threads._values)
                if threads._met.wait() == 0:
                    threads.gathered.append(values)
                return values

        return Own()


def messages(*facts: dict[str, Any]) -> tuple[list[str], Threads]:
    """Compare the facts of some processes; return the message of each process."""
    threads = Threads(len(facts))

    def compare(rank: int) -> str:
        try:
            require_equal(threads.of(rank), facts[rank])
        except BadInput as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(compare, range(len(facts)))), threads


def test_equal_facts_cost_one_hash_of_fixed_size() -> None:
    facts = {"batch_size": 8, "config": {"method": "drrho", "dtype": "float64"}}
    received, threads = messages(facts, dict(reversed(facts.items())), facts)
    assert received == [""] * 3
    assert [[len(value) for value in values] for values in threads.gathered] == [[64, 64, 64]]


def test_all_processes_name_the_fact_and_the_processes_with_each_value() -> None:
    facts = [{"batch_size": 7 if rank == 2 else 8, "dtype": "float32"} for rank in range(4)]
    received, _ = messages(*facts)
    message = "batch_size must be the same on all processes, got 8 on ranks 0, 1 and 3, 7 on rank 2"
    assert received == [message] * 4


def test_settings_are_compared_one_by_one_and_a_missing_fact_is_named() -> None:
    received, _ = messages({"config": {"epochs": 3, "seed": 0}}, {"config": {"epochs": 4}})
    message = (
        "config.epochs must be the same on all processes, got 3 on rank 0, 4 on rank 1; "
        "config.seed must be the same on all processes, got 0 on rank 0, none on rank 1"
    )
    assert received == [message] * 2


def test_a_long_list_of_differences_is_cut() -> None:
    received, _ = messages(*[{f"fact{k}": rank for k in range(9)} for rank in range(2)])
    assert received[0].count("must be the same") == 3
    assert received[0].endswith("; 6 more differ")


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.zeros(3, np.float32)},
        {"x": np.zeros((3, 1))},
        {"y": np.zeros(3)},
        {"x": np.array([0.0, 0.0, -0.0])},
        {},
    ],
    ids=["dtype", "shape", "name", "bits", "none"],
)
def test_the_digest_of_arrays_sees_every_difference(other: dict[str, np.ndarray]) -> None:
    arrays = {"x": np.zeros(3)}
    assert digest_of_arrays(other) != digest_of_arrays(arrays)
    assert digest_of_arrays({"x": np.zeros(6)[::2]}) == digest_of_arrays(arrays)


def test_arrays_without_entries_and_without_axes_have_digests() -> None:
    assert digest_of_arrays({"x": np.zeros((0, 3))}) != digest_of_arrays({"x": np.float64(3.0)[None][0:1].reshape(())})


def test_a_changed_line_of_the_program_is_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "package_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_bytes(b"x = 1\r\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first = facts_of_program(["package_of_a_test"])
    # Ends of lines and caches are no difference.
    (folder / "__init__.py").write_bytes(b"x = 1\n")
    (folder / "cache.pyc").write_bytes(b"")
    assert facts_of_program(["package_of_a_test"]) == first
    (folder / "__init__.py").write_bytes(b"x = 2\n")
    assert facts_of_program(["package_of_a_test"])["source"] != first["source"]
    assert first["library"]["numpy"] == np.__version__
    assert "pytest" not in first["library"]
