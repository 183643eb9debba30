"""The vectors can be read and used with the standard library alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import drrho_reference
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "read_vectors.py"

# -I: no environment, no user site; -S: no site-packages, so that nothing that was installed can be imported.
ISOLATED = """
import runpy, sys
sys.argv = sys.argv[1:]
code = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    code = stop.code
loaded = {name.split(".")[0] for name in sys.modules}
print("third party:", sorted(loaded - set(sys.stdlib_module_names) - {"__main__"}), file=sys.stderr)
sys.exit(code)
"""


def read(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", "-c", ISOLATED, str(EXAMPLE), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    for name, content in drrho_reference.vectors.files(library_version="0.1.0").items():
        (folder / name).write_bytes(content)
    return folder


def test_plain_python_reads_the_vectors_and_agrees(written: Path) -> None:
    run = read(written)
    assert run.returncode == 0, run.stderr
    assert run.stderr == "third party: []\n"
    lines = run.stdout.splitlines()
    assert lines[0] == "drrho-core 0.1.0, format 1.2"
    index = json.loads((written / "vectors.json").read_text())
    steps = sum(case["function"] == "contrastive_step" for case in index["cases"])
    penalties = sum(
        case["function"] == "worst_case" and case["arguments"][1]["ambiguity_set"] == "KLPenalty"
        for case in index["cases"]
    )
    assert lines[-1] == f"{3 * steps + 2 * penalties} of {3 * steps + 2 * penalties} fields are right"
    assert steps > 30
    assert penalties == 6
    assert not any(line.endswith("WRONG") for line in lines)


@pytest.mark.parametrize(("file", "case"), [("contrastive_step", "gamma"), ("worst_case", "KLPenalty")])
def test_a_changed_number_is_noticed(written: Path, tmp_path: Path, file: str, case: str) -> None:
    folder = tmp_path / "vectors"
    shutil.copytree(written, folder)
    path = folder / f"{file}.safetensors"
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = f"{case}/float64/expected/{'loss' if file == 'contrastive_step' else 'risk'}"
    content[8 + length + header[name]["data_offsets"][0] + 4] ^= 0xFF  # some digits of the first number
    path.write_bytes(content)
    run = read(folder)
    assert run.returncode == 1
    wrong = [line for line in run.stdout.splitlines() if line.endswith("WRONG")]
    assert len(wrong) == 1
    assert case in wrong[0]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node, which no package brings along")
def test_another_language_reads_the_vectors_and_agrees(written: Path, tmp_path: Path) -> None:
    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        command = ["node", str(EXAMPLE.with_suffix(".mjs")), str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    right = run(written)
    assert right.returncode == 0, right.stderr
    assert right.stdout.splitlines()[-1] == "8 of 8 fields are right"
    index = json.loads((written / "vectors.json").read_text())
    for case in index["cases"]:
        if case["id"] == "excess_loss/weighted_difference/float32":
            case["options"]["reference_weight"] = {"value": 0.7501}
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    (tmp_path / "vectors.json").write_text(json.dumps(index))
    changed = run(tmp_path)
    assert changed.returncode == 1
    assert changed.stdout.count("WRONG") == 1


def test_another_format_is_refused(written: Path, tmp_path: Path) -> None:
    index = json.loads((written / "vectors.json").read_text())
    (tmp_path / "vectors.json").write_text(json.dumps(index | {"format_version": "2.0"}))
    run = read(tmp_path)
    assert run.returncode == 1
    assert "format_version must be 1.x, got drrho-vectors 2.0" in run.stderr
