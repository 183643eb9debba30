"""The generic problems: exact gradients, objectives that are those of drrho_core, and a choice among trials."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from drrho_clip.reproduce.claims import CLAIMS
from drrho_clip.reproduce.experiment import CHOICE_SEED, Experiment
from drrho_clip.reproduce.generic.measuring import ALL, REFERENCE, measure_generic, samples_of, train_networks
from drrho_clip.reproduce.generic.network import Network, gradients, losses, start
from drrho_clip.reproduce.generic.objectives import ERM, OBJECTIVES, SETS
from drrho_clip.reproduce.generic.problems import PROBLEMS, draw
from drrho_clip.reproduce.grid import chosen_trial
from drrho_clip.reproduce.plan import Plan
from drrho_core import CVaR, select_top_excess, worst_case

DATA = {"num_samples": 12, "pool": 8, "noise": 0.25}
MODEL = {"hidden": 5, "classes": 6, "steps": 6, "batch": 4, "decay": 0.1, "num_samples": 6}


def wide(network: Network) -> Network:
    return Network(*(values.astype(np.float64) for values in network))


def test_gradients_are_the_slopes_of_the_weighted_losses_of_each_model() -> None:
    rng = np.random.default_rng(0)
    network = wide(start([np.random.default_rng(seed) for seed in range(2)], inputs=3, hidden=4, classes=3))
    inputs, labels = rng.normal(size=(2, 5, 3)), rng.integers(0, 3, size=(2, 5))
    weights = rng.uniform(0.1, 1.0, size=(2, 5))
    slopes = gradients(network, inputs, labels, weights)
    step = 1e-6
    for name, values in network._asdict().items():
        for place in np.ndindex(values.shape):
            ends = []
            for sign in (1, -1):
                moved = values.copy()
                moved[place] += sign * step
                ends.append(np.sum(weights * losses(network._replace(**{name: moved}), inputs, labels)))
            assert slopes._asdict()[name][place] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-7), name


def test_the_loss_is_the_cross_entropy_also_for_large_logits() -> None:
    network = wide(start([np.random.default_rng(1)], inputs=3, hidden=4, classes=3))
    inputs = 1e3 * np.random.default_rng(2).normal(size=(1, 6, 3))
    labels = np.asarray([[0, 1, 2, 0, 1, 2]])
    hidden = np.maximum(inputs @ network.first + network.first_bias, 0)
    expected = -log_softmax(hidden @ network.second + network.second_bias, axis=2)[0, range(6), labels[0]]
    np.testing.assert_allclose(losses(network, inputs, labels)[0], expected)


def test_objectives_are_those_of_the_core() -> None:
    rng = np.random.default_rng(3)
    loss, reference = rng.uniform(0, 3, size=(2, 2, 10))
    for name, objective in OBJECTIVES.items():
        for option in objective.options:
            weights = objective.weights(loss, reference, option)
            np.testing.assert_allclose(weights.sum(axis=1), 1.0, err_msg=name)
            # Objectives without a reference model do not depend on its losses.
            again = objective.weights(loss, reference[::-1], option)
            assert np.array_equal(weights, again) is not objective.steered or name == ERM, name
    kept = OBJECTIVES["rho"].weights(loss, reference, 0.3)
    for row in range(2):
        assert set(np.flatnonzero(kept[row])) == set(select_top_excess(loss[row], reference[row], k=3).tolist())
    cvar = OBJECTIVES["drrho-cvar"].weights(loss, reference, 0.3)
    np.testing.assert_allclose(cvar, worst_case(loss - reference, CVaR(0.3)).weights)
    assert set(SETS) == {"cvar", "kl", "chi-square", "capped-kl"}


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_only_training_samples_have_noise_and_exactly_this_share(name: str) -> None:
    clean, noisy = (
        draw(name, {**DATA, "num_samples": 40, "noise": noise}, np.random.default_rng(5)) for noise in (0.0, 0.25)
    )
    # The tokens of a text are one longer text with its context, so the share of wrong labels may differ by the context.
    changed = np.count_nonzero(clean.target.labels != noisy.target.labels)
    assert changed == 10 if name != "language" else 8 <= changed <= 11
    assert {len(part.labels) for part in (clean.target, noisy.target)} == {40}
    assert np.array_equal(clean.target.inputs, noisy.target.inputs) is (name != "language")
    assert set(np.unique(noisy.target.labels)) <= set(range(PROBLEMS[name].classes))
    if name == "language":
        # Each context holds the two tokens before: the first token of a context was the second of the one before.
        codes = noisy.target.inputs.reshape(40, 2, -1).argmax(axis=2)
        np.testing.assert_array_equal(codes[1:, 0], codes[:-1, 1])
        np.testing.assert_array_equal(codes[1:, 1], noisy.target.labels[:-1])


def test_the_language_can_be_learned_and_its_held_out_text_is_of_the_same_language() -> None:
    parts = draw("language", {"num_samples": 4_000, "pool": 4, "noise": 0.0}, np.random.default_rng(6))
    model = {"hidden": 32, "classes": 20, "steps": 300, "batch": 64}
    network = train_networks(ERM, [(0.01, 0.0)], [parts.target], model, seed=(0, 1))
    held_out = losses(network, parts.test.inputs[None], parts.test.labels[None]).mean()
    counts = np.bincount(parts.target.labels, minlength=20) + 1
    assert held_out < 0.8 * -np.log(counts / counts.sum())[parts.test.labels].mean()


def test_trials_and_draws_that_are_trained_together_do_not_touch_each_other() -> None:
    draws = [draw("clusters", DATA, np.random.default_rng(seed)) for seed in range(2)]
    samples = samples_of("drrho-kl", draws, MODEL)
    references = np.random.default_rng(7).uniform(0, 2, size=(2, 12)).astype(np.float32)
    trials = [(0.01, 1.0), (0.03, 1.0)]
    together = train_networks("drrho-kl", trials, samples, MODEL, seed=(3, 4), references=references)
    for trial, rate in enumerate((0.01, 0.03)):
        alone = train_networks("drrho-kl", [(rate, 1.0)], samples, MODEL, seed=(3, 4), references=references)
        for one, many in zip(alone, together, strict=True):
            np.testing.assert_allclose(one, many[2 * trial : 2 * trial + 2], rtol=1e-5, atol=1e-6)
    # The first draw alone.
    first = train_networks("drrho-kl", trials[:1], samples[:1], MODEL, seed=(3, 4), references=references[:1])
    np.testing.assert_allclose(first.first[0], together.first[0], rtol=1e-5, atol=1e-6)


def test_the_reference_model_sees_none_of_the_samples_of_the_target() -> None:
    draws = [draw("clusters", DATA, np.random.default_rng(0))]
    target, reference, both = (samples_of(method, draws, MODEL)[0] for method in (ERM, REFERENCE, ALL))
    assert (len(target.labels), len(reference.labels), len(both.labels)) == (12, 6, 18)
    assert not {row.tobytes() for row in reference.inputs} & {row.tobytes() for row in target.inputs}


def test_a_choice_gives_a_figure_per_trial_and_the_same_experiment_the_same_figures(tmp_path: Path) -> None:
    steering = {"model": MODEL, "trials": [[0.01, 0.0]]}
    settings = {"data": DATA, "repeats": 2, "model": MODEL, "steering": steering, "trials": [[0.01, 0.6], [0.03, 0.3]]}
    choice = Experiment("generic", "generic", "clusters-both", "drrho-cvar", "weak", CHOICE_SEED, settings, quick=True)
    (tried,) = measure_generic(choice, tmp_path).metrics.values()
    assert isinstance(tried, list)
    assert len(tried) == 2
    single = replace(choice, seed=0, settings={**settings, "trials": [[0.01, 0.6]]})
    first, again = (measure_generic(single, tmp_path).metrics for _ in range(2))
    assert first == again
    assert set(first) == {"accuracy", "loss"}
    # Other samples give other figures, and so does a reference model that matters.
    assert first != measure_generic(replace(single, seed=1), tmp_path).metrics
    other = {**steering, "trials": [[0.1, 4.0]]}
    assert first != measure_generic(replace(single, settings={**single.settings, "steering": other}), tmp_path).metrics


def test_without_scikit_learn_the_other_problems_go_on_and_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan({}, [], seeds=(0, 1), quick=False)
    CLAIMS["generic"].experiments(plan)
    assert {experiment.dataset.split("-")[0] for experiment in plan.missing()} == set(PROBLEMS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plan = Plan({}, [], seeds=(0, 1), quick=False)
    CLAIMS["generic"].experiments(plan)
    assert {experiment.dataset.split("-")[0] for experiment in plan.missing()} == {"clusters", "language"}
    assert CLAIMS["generic"].missing() == ["the problem digits needs scikit-learn: pip install 'drrho-core[train]'"]


def test_the_first_round_has_only_choices(tmp_path: Path) -> None:
    plan = Plan({}, [], seeds=(0, 1), quick=True)
    CLAIMS["generic"].experiments(plan)
    assert {experiment.seed for experiment in plan.missing()} == {CHOICE_SEED}
    experiment = plan.missing()[0]
    trials = experiment.settings["trials"]
    assert chosen_trial(plan, experiment, trials) is None
