"""The plan of many ranks: the traffic is the traffic model's, sums fit, the printed figures, and bad options."""

from __future__ import annotations

from pathlib import Path

import pytest

from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.exchange.model_sizes import spec_of_size
from drrho_clip.models import ModelSpec, parameter_shapes
from drrho_clip.plan.memory import parameter_count
from drrho_clip.plan.options import PlanOptions
from drrho_clip.plan.ranks import RING_WORK, FormPlan, products_per_pair, repeated_share
from drrho_clip.plan.run import Plan, plan_of_size
from drrho_clip.plan.shared_step import StepSizes, shared_step
from drrho_clip.plan.traffic import SharedStep, received_bytes
from drrho_core.backend import get_backend

SIZED = ["train", "--method", "sogclr", "--backend", "torch", "--dry-run", "--model", "tiny", "--num-pairs", "100000"]
RANKS = ["--world-size", "4", "--bandwidth", "10"]


def planned(batch_size: int = 256, method: str = "sogclr", **options: float) -> Plan:
    config = TrainConfig(data="pairs.csv", method=method, backend="torch", model="tiny", batch_size=batch_size)
    chosen = PlanOptions.of({"world_size": 4, "bandwidth": 10.0, "num_pairs": 100_000, **options})
    return plan_of_size(config, get_backend("torch"), chosen)


def forms(plan: Plan) -> tuple[FormPlan, FormPlan]:
    assert plan.ranks is not None
    return plan.ranks.forms["reduce"], plan.ranks.forms["ring"]


def test_the_time_of_a_step_is_computing_plus_bytes_over_bandwidth_plus_latencies() -> None:
    plan = planned(latency=20.0, pairs_per_second=1000.0)
    reduce, ring = forms(plan)
    step = shared_step(plan.config, plan.spec, 4, "reduce", StepSizes())
    assert reduce.received == received_bytes(step)
    # Estimates, a digest, sizes, texts, sums, two of scalars, weights, gradients of texts and of parameters.
    assert reduce.num_exchanges == 10
    assert reduce.seconds == pytest.approx(64 / 1000 + reduce.received / 1e10 + 10 * 20e-6)
    # Ring: two hops of the sums and gradients, and two per other rank.
    assert ring.num_exchanges == 6 + 2 * 3 + 2
    assert ring.compute_seconds > reduce.compute_seconds == 64 / 1000
    # The overhead comes once per step, also in the form ring, which computes logits twice.
    for form, slow in zip(
        (reduce, ring), forms(planned(latency=20.0, pairs_per_second=1000.0, step_overhead=30.0)), strict=True
    ):
        assert slow.seconds == pytest.approx(form.seconds + 0.03)


def test_ring_repeats_no_work_of_the_sigmoid_loss_which_has_one_pass() -> None:
    reduce, ring = forms(planned(method="siglip", pairs_per_second=1000.0))
    assert ring.compute_seconds == reduce.compute_seconds == 64 / 1000
    plan = planned(method="clip", pairs_per_second=1000.0)
    reduce, ring = forms(plan)
    share = repeated_share(shared_step(plan.config, plan.spec, 4, "ring", StepSizes()), plan.spec)
    assert ring.compute_seconds == pytest.approx(reduce.compute_seconds * (1 + (RING_WORK - 1) * share))


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_the_share_of_a_step_with_distillation_has_the_products_of_both_losses(loss: str) -> None:
    spec = spec_of_size("tiny")
    step = SharedStep(num_ranks=2, num_local=8, feature_dim=32, teacher_dim=24, loss=loss)
    own, distillation, encoders = 16 * 6 * 32, 16 * (6 * 32 + 2 * 24), 6 * products_per_pair(spec)
    repeated = distillation + (own if loss == "info_nce" else 0)
    assert repeated_share(step, spec) == pytest.approx(repeated / (own + distillation + encoders))


def test_a_quarter_of_the_batch_needs_a_quarter_of_the_memory_of_pairs() -> None:
    one, four = ({part.name: part.num_bytes for part in planned(world_size=size).memory} for size in (1, 4))
    assert one["activations"] == 4 * four["activations"]
    # The own images meet the texts of all ranks.
    assert one["batch"] == 4 * four["batch"]
    for name in ("parameters", "optimiser", "gradients", "inner estimates"):
        assert one[name] == four[name]
    assert "exchange" not in one
    assert four["exchange"] == 4 * (parameter_count(spec_of_size("tiny")) + 2 * 64 * 256)


def test_ring_needs_less_memory_and_the_largest_batches_fit_exactly() -> None:
    plan = planned(world_size=8, device_memory=1.0)
    reduce, ring = forms(plan)
    assert ring.num_bytes < reduce.num_bytes
    assert plan.ranks is not None
    largest = plan.ranks.largest_batch
    assert largest["ring"] > largest["reduce"] > 256
    for form, size in largest.items():
        for batch_size, fits in ((size, True), (size + 8, False)):
            again = planned(batch_size=batch_size, world_size=8).ranks
            assert again is not None
            assert (again.forms[form].num_bytes <= 1e9) is fits


def test_a_step_of_one_rank_exchanges_nothing() -> None:
    for form in forms(planned(world_size=1)):
        assert (form.received, form.num_exchanges, form.message_seconds) == (0.0, 0, 0.0)


@pytest.mark.parametrize(("name", "fraction"), [("ViT-B-32", 0.97), ("ViT-B-16", 0.95)])
def test_multiplications_of_published_models(name: str, fraction: float) -> None:
    # Published multiplications of forward passes, in 1e9: open_clip's model profile counts attention scores as well.
    published = {"ViT-B-32": 7.39, "ViT-B-16": 20.57}[name]
    assert fraction < products_per_pair(spec_of_size(name)) / 1e9 / published <= 1.0


def test_a_perceptron_multiplies_each_weight_once_per_pair() -> None:
    spec = ModelSpec("mlp", image_size=8, channels=1, vocabulary_size=20, context_length=6, width=16, depth=1)
    assert products_per_pair(spec) == sum(a * b for a, b in (s for s in parameter_shapes(spec).values() if len(s) == 2))
    conv = ModelSpec("conv", image_size=16, channels=3, vocabulary_size=20, context_length=6, width=8)
    assert products_per_pair(conv) > 8 * 8 * 9 * 3 * 8 + 4 * 4 * 9 * 8 * 16 + 2 * 2 * 9 * 16 * 32


def test_the_command_prints_both_forms_and_a_verdict(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [*SIZED, *RANKS, "--batch-size", "256", "--pairs-per-second", "500", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "processes: 4 with 64 pairs of each batch; 10 GB/s, 50 microseconds per exchange" in printed
    lines = {line.strip().split("  ")[0]: line.split()[-2:] for line in printed.splitlines() if line.strip()}
    assert lines["each process, in a step"] == ["reduce", "ring"]
    assert float(lines["computing, ms"][0]) == 128.0
    assert float(lines["received, MB: gradients of parameters"][0]) == pytest.approx(
        1.5 * 4e-6 * parameter_count(spec_of_size("tiny")), abs=1e-3
    )
    # Four processes hold as much for the two texts of a ring as for the texts of all.
    assert "and saves no memory: take reduce" in printed
    words[words.index("--world-size") + 1] = "8"
    assert main(words) == 0
    assert "take ring only if a device has no room for reduce" in capsys.readouterr().out
    assert main([*words, "--device-memory", "40"]) == 0
    assert "take reduce, which fits up to a batch of" in capsys.readouterr().out
    assert main([*words, "--device-memory", "0.001"]) == 0
    assert capsys.readouterr().out.strip().endswith("neither form fits")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world-size", "0", "--bandwidth", "1"], "--world-size must be an integer of at least 1, got 0"),
        (["--world-size", "2", "--bandwidth", "0"], "--bandwidth must be > 0, got 0.0"),
        (["--world-size", "2", "--bandwidth", "nan"], "--bandwidth must be > 0, got nan"),
        (["--world-size", "2", "--bandwidth", "fast"], "--bandwidth must be > 0, got 'fast'"),
        (["--world-size", "2"], "bandwidth must be given with world_size, in gigabytes per second, got none"),
        (["--bandwidth", "2"], "bandwidth must be left out without world_size, got 2.0"),
        (["--latency", "2"], "latency must be left out without world_size, got 2.0"),
        ([*RANKS, "--latency", "-1"], "--latency must be >= 0, got -1.0"),
        ([*RANKS, "--step-overhead", "3"], "step_overhead must be left out without pairs_per_second, got 3.0"),
        ([*RANKS, "--step-overhead", "nan"], "--step-overhead must be >= 0, got nan"),
        ([*RANKS, "--pairs-per-second", "0"], "--pairs-per-second must be > 0, got 0.0"),
        (
            [*RANKS, "--batch-size", "254"],
            "batch_size must be a multiple of world_size (4), because each process takes",
        ),
        ([*RANKS, "--data", "pairs.csv"], "data must be left out with num_pairs, got pairs.csv"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*SIZED, *words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"drrho: {message}"), error
    assert error.count("\n") == 1


def test_options_of_a_plan_are_refused_without_a_dry_run_and_models_of_unknown_size_with_num_pairs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["train", "--data", "digits", "--method", "clip", "--out", str(tmp_path / "run")]
    assert main([*words, *RANKS]) == 2
    assert "world_size must be left out without dry_run, got 4" in capsys.readouterr().err
    unsized = [word for word in SIZED if word not in ("--model", "tiny")]
    assert main([*unsized, "--out", str(tmp_path / "run")]) == 2
    assert "model must be one of tiny, small, ViT-S-16, ViT-B-32, ViT-B-16 or a file" in capsys.readouterr().err
