"""Every Python block of the README and the docs runs as it stands; so does the README's walk through the commands."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_clip.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("[a-z]*/README.md")), *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = list(dict.fromkeys(PAGES))
EXAMPLES = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "examples").glob("**/*.py"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LIBRARIES = ("torch", "jax", "optax")


def _sections() -> list[Any]:
    """Return the code of every section that has some: the blocks under one ``##`` heading belong together."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for section in re.split(r"^(?=## )", text, flags=re.MULTILINE):
            title = section.partition("\n")[0].lstrip("# ")
            code = [block for language, block in FENCE.findall(section) if language == "python"]
            # A part of an example is tested with the example. It would not run alone, so a page whose copy differs
            # from the example is noticed here.
            code = [block for block in code if not any(block in example for example in EXAMPLES)]
            if code:
                name = f"{page.relative_to(ROOT)}: {title}"
                found.append(pytest.param(name, "\n\n".join(code), id=name))
    return found


def _run(name: str, code: str) -> dict[str, Any]:
    for library in LIBRARIES:
        if re.search(rf"^(import|from) (drrho_)?{library}\b", code, re.MULTILINE):
            missing = importlib.util.find_spec(library) is None
            if missing and not os.environ.get("CI"):
                pytest.skip(f"{library} is not installed")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, name, "exec"), namespace)
    return namespace


@pytest.mark.parametrize(("name", "code"), _sections())
def test_the_code_of_a_section_runs(name: str, code: str) -> None:
    _run(name, code)


def _readme(title: str) -> dict[str, Any]:
    (code,) = [p.values[1] for p in _sections() if p.id == f"README.md: {title}"]
    return _run(title, code)


def test_the_torch_loop_of_the_readme_learns_and_remembers() -> None:
    import torch

    torch.manual_seed(0)
    names = _readme("In your own PyTorch loop")
    state = names["contrastive_loss"].state_dict()["log_inner_image"]
    assert torch.isfinite(state).all()  # ten epochs of 192 out of 200 have met every sample
    assert np.isfinite(names["loss"].item())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in names["image_encoder"].parameters())


def test_the_wrapped_data_set_of_the_readme_adds_the_row_to_tuples_and_dicts() -> None:
    import torch

    names = _readme("In your own PyTorch loop")
    rows = [{"image": torch.zeros(2), "text": torch.ones(3)} for _ in range(4)]
    batch = next(iter(torch.utils.data.DataLoader(names["Indexed"](rows), batch_size=3)))
    assert batch["sample_index"].tolist() == [0, 1, 2]
    assert batch["text"].shape == (3, 3)
    assert [len(entry) for entry in (names["Indexed"]([("image", "text")])[0], rows[0])] == [3, 2]


def test_the_jax_loop_of_the_readme_learns_and_remembers() -> None:
    names = _readme("In your own JAX loop")
    assert np.isfinite(np.asarray(names["state"].log_inner_text)).all()
    assert np.isfinite(float(names["loss"]))
    assert not np.array_equal(np.asarray(names["parameters"]["image"]), names["images"][:32, :8])


def test_the_printed_weights_are_those_that_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    names = _readme("Any loss, any array library")
    printed = capsys.readouterr().out.strip()
    assert f"# {printed}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert int(np.argmax(names["result"].weights)) == 0


@pytest.mark.slow
def test_the_walk_through_a_table_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    colours = ["red", "green", "blue", "yellow", "black"]
    rows = ["image,caption"]
    for number in range(60):
        colour = colours[number % 5]
        Image.new("RGB", (64 + number, 64), colour).save(f"{number}.png")
        rows.append(f"{number}.png,something {colour}")
    Path("pairs.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (section,) = [part for part in re.split(r"^(?=## )", text, flags=re.MULTILINE) if part.startswith("## Train on")]
    (block,) = [block for language, block in FENCE.findall(section) if language == "sh"]
    lines = block.strip().splitlines()
    assert [line.split()[:2] for line in lines] == [["drrho", "train"]] * 3
    for line in lines:
        # A reference model that is near chance is refused, so it must learn the colours.
        epochs = "20" if "--as-reference" in line else "2"
        assert main([*shlex.split(line)[1:], "--epochs", epochs, "--image-size", "16", "--width", "8"]) == 0, line
    assert sorted(run.parent.name for run in Path("runs").glob("*/results.json")) == ["cleaned", "reference", "steered"]
    (resume,) = re.findall(r"`(drrho train --resume [^`]*)`", section)
    assert main(shlex.split(resume)[1:]) == 0
