"""open_clip's training loop with DRRho's loss: few changed lines, the right gradient, several processes, resumption."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_core import contrastive_step, cosine_gamma, recommended_gamma_min
from helpers.examples import EXAMPLES, changed_lines, load

torch = pytest.importorskip("torch")

SHAPES = ("open_clip_3", "open_clip_4")
PAIRS = 64


def arguments(folder: Path, *extra: object) -> list[str]:
    paths = ["--train-data", folder / "pairs.npz", "--checkpoint", folder / "checkpoint.pt"]
    return [str(word) for word in (*paths, *extra)]


@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_than_ten_lines_change_and_the_page_tells_their_number(shape: str) -> None:
    number = changed_lines(f"loops/{shape}_before.py", f"loops/{shape}.py")
    assert number < 10
    page = (EXAMPLES.parent / "docs" / "your-loop.md").read_text(encoding="utf-8")
    assert f"[`{shape}.py`](../examples/loops/{shape}.py) differs in {number} lines" in page


@pytest.mark.parametrize(
    ("shape", "extra"),
    [
        ("open_clip_3", ()),
        ("open_clip_3", ("--accum-freq", 2, "--batch-size", 32, "--precision", "amp_bf16")),
        ("open_clip_4", ("--precision", "amp", "--grad-clip-norm", 1.0)),
        ("open_clip_4", ("--accum-freq", 2, "--batch-size", 32)),
    ],
)
def test_training_lowers_the_loss_by_a_quarter(
    shape: str, extra: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = load(f"loops/{shape}.py", monkeypatch)["main"](arguments(tmp_path, *extra))
    assert np.mean(history[-8:]) < 0.75 * history[0]
    state = torch.load(tmp_path / "checkpoint.pt")["loss"]
    # Eight epochs have met all 512 pairs.
    assert all(torch.isfinite(state[f"contrastive_loss.log_inner_{side}"]).all() for side in ("image", "text"))


def rows_after_one_step(loop: dict[str, Any], folder: Path, accum_freq: int) -> tuple[Any, Any, float]:
    """Take a step on all pairs, from known estimates, at learning rate 0; return model, loss and gamma."""
    kit = loop["open_clip"]
    loop["write_pairs"](folder / "pairs.npz", PAIRS)
    words = ("--opt", "sgd", "--lr", 0, "--accum-freq", accum_freq, "--batch-size", PAIRS // accum_freq)
    args = kit.parse_args(arguments(folder, *words))
    torch.manual_seed(0)
    model, optimizer, scaler, scheduler = kit.create_parts(args, kit.CLIP(output_dict="train_step" in loop))
    dataset = loop["PairDataset"](args.train_data)
    contrastive_loss = loop["ContrastiveLoss"](PAIRS, temperature=0.07, radius=2.0)
    loss = loop["OpenClipLoss"](contrastive_loss, reference=tuple(np.load(f"{args.train_data}.npy")), num_epochs=10)
    contrastive_loss.log_inner_image.copy_(torch.linspace(-3.0, 1.0, PAIRS))
    contrastive_loss.log_inner_text.copy_(torch.linspace(0.0, -4.0, PAIRS))
    rest = (kit.DataInfo(dataset, args), 5, optimizer, scaler, scheduler, args)
    if "train_step" in loop:
        loop["train_one_epoch"](kit.CLIPTask(model, loss=loss), *rest)
    else:
        loop["train_one_epoch"](model, rest[0], loss, *rest[1:])
    return model, loss, cosine_gamma(5, num_epochs=10, gamma_min=recommended_gamma_min(10))


@pytest.mark.parametrize("accum_freq", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_and_estimates_of_a_batch_are_those_of_contrastive_step(
    shape: str, accum_freq: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = load(f"loops/{shape}.py", monkeypatch)
    model, loss, gamma = rows_after_one_step(loop, tmp_path, accum_freq)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    columns = np.load(tmp_path / "pairs.npz")
    output = model(*(torch.from_numpy(columns[name]) for name in ("images", "captions")))
    images, texts, scale = output.values() if isinstance(output, dict) else output
    step = contrastive_step(
        *(side.detach().double().numpy() for side in (images, texts)),
        *(np.linspace(*ends, PAIRS) for ends in ((-3.0, 1.0), (0.0, -4.0))),
        temperature=1 / scale.item(),
        gamma=gamma,
        radius=2.0,
        reference_features=tuple(np.load(tmp_path / "pairs.npz.npy").astype(float)),
    )
    model.zero_grad()
    upstream = [torch.from_numpy(x).float() for x in (step.image_gradient, step.text_gradient)]
    surrogate = (images * upstream[0]).sum() + (texts * upstream[1]).sum() + float(step.temperature_gradient) / scale
    surrogate.backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert float((gradient - parameter.grad).abs().max()) <= 1e-5 * float(parameter.grad.abs().max())
    estimates = loss.contrastive_loss
    for got, expected in (
        (estimates.log_inner_image, step.log_inner_image),
        (estimates.log_inner_text, step.log_inner_text),
    ):
        np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_resumed_run_continues_from_the_saved_estimates(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = load(f"loops/{shape}.py", monkeypatch)["main"]
    main(arguments(tmp_path, "--epochs", 1))
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    for name, table in checkpoint["loss"].items():
        if "log_inner" in name:
            table.fill_(200.0)
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    # In a run of eight epochs gamma is below 1 from the second epoch on, so the saved estimates still count at the end.
    main(arguments(tmp_path, "--epochs", 8, "--resume"))
    resumed = torch.load(tmp_path / "checkpoint.pt")["loss"]
    assert float(resumed["contrastive_loss.log_inner_image"].min()) > 100.0


# One start of two processes serves both shapes.
RUN_BOTH = """
import runpy, sys, torch
for shape in ("open_clip_3", "open_clip_4"):
    folder = f"{sys.argv[1]}/{shape}"
    words = ["--train-data", f"{folder}/pairs.npz", "--checkpoint", f"{folder}/two.pt", "--dist-url", f"file://{folder}/store"]
    runpy.run_path(f"{sys.argv[2]}/{shape}.py")["main"](words + sys.argv[3:])
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = [str(word) for word in ("--epochs", 3, "--opt", "sgd", "--lr", 1.0)]
    for shape in SHAPES:
        loop = load(f"loops/{shape}.py", monkeypatch)
        (tmp_path / shape).mkdir()
        loop["write_pairs"](tmp_path / shape / "pairs.npz", PAIRS)
        loop["main"](arguments(tmp_path / shape, *common, "--batch-size", PAIRS))
    rest = [*common, "--batch-size", str(PAIRS // 4), "--accum-freq", "2"]
    folder = EXAMPLES / "loops"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RUN_BOTH, str(tmp_path), str(folder), *rest],
            env={**environment, "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    for shape in SHAPES:
        one, two = (torch.load(tmp_path / shape / name) for name in ("checkpoint.pt", "two.pt"))
        for part in ("state_dict", "loss"):
            assert one[part].keys() == two[part].keys()
            for name, expected in one[part].items():
                torch.testing.assert_close(two[part][name], expected, rtol=1e-4, atol=1e-5)
        assert math.isfinite(float(two["state_dict"]["logit_scale"]))
