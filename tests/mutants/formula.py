"""Mistakes of the formula: each mistake makes a number wrong, and the tests that it names must fail.

The pieces of code are patterns: a name with two leading underscores matches any expression, see `syntax.py`.
"""

from __future__ import annotations

from typing import NamedTuple


class Mistake(NamedTuple):
    """One mistake: a piece of a function of the core (`find`), its replacement (`put`), and tests that must fail."""

    module: str
    """The module's name below ``drrho_core``."""
    inside: str
    find: str
    put: str
    mistake: str
    tests: str
    """The start of the ids of these tests below ``tests/core``: a file's name or the id of a single test."""


NUMERICS = (
    Mistake(
        "numerics", "log_sum_exp",
        "xp.max(__x, axis=axis, keepdims=True)", "0.0 * xp.max(__x, axis=axis, keepdims=True)",
        "log sum exp without the shift by the largest entry", "test_numerics.py",
    ),
    Mistake(
        "numerics", "log_sum_exp",
        "__log + xp.squeeze(peak, axis=axis)", "__log",
        "the shift by the largest entry is not undone", "test_numerics.py",
    ),
    Mistake(
        "numerics", "log_add_constant",
        "xp.logaddexp(__x, log(__c, xp=xp))", "__x + __c",
        "eps outside the logarithm", "test_numerics.py",
    ),
    Mistake(
        "numerics", "log_add_constant",
        "xp.logaddexp(__x, log(__c, xp=xp))", "xp.logaddexp(__x, __c)",
        "eps taken for its logarithm", "test_numerics.py",
    ),
    Mistake(
        "numerics", "log_moving_average",
        "xp.where(log_old == -xp.inf, log_new, __mixed)", "__mixed",
        "a first visit does not take g itself", "test_numerics.py",
    ),
    Mistake(
        "numerics", "log_moving_average",
        "log_old == -xp.inf", "log_old == 0.0",
        "log u = 0, a legal value, counts as never visited", "test_numerics.py",
    ),
    Mistake(
        "numerics", "_log_gammas",
        "(__keep if gamma < 1 else -math.inf, math.log(gamma))",
        "(math.log(gamma), __keep if gamma < 1 else -math.inf)",
        "gamma and 1 - gamma exchanged", "test_numerics.py",
    ),
    Mistake(
        "numerics", "log_share_of_new",
        "xp.where(__unseen, __zero, log_old - log_new)", "xp.where(__unseen, __zero, log_new - log_old)",
        "u / g instead of g / u in the sum of an anchor's weights", "test_numerics.py",
    ),
)  # fmt: skip

RISKS = (
    Mistake(
        "ambiguity.sorted", "solve_cvar",
        "above + rest * tied", "above + tied",
        "CVaR: the losses tied at the quantile take full weights", "test_ambiguity_answers.py",
    ),
    Mistake(
        "ambiguity.sorted", "solve_cvar",
        "xp.where(beyond > 0, nearest, nearest - 1)", "nearest - 1",
        "CVaR: floor(k) instead of ceil(k) at the boundary sample", "test_ambiguity_answers.py",
    ),
    Mistake(
        "ambiguity.sorted", "solve_kl_penalty",
        "xp.full_like(slices.top, t)", "xp.full_like(slices.top, 1 / t)",
        "KL: the inverse of the temperature", "test_ambiguity_answers.py",
    ),
    Mistake(
        "ambiguity.sorted", "solve_kl_penalty",
        "t * log_mean * unit", "log_mean * unit",
        "KL: the risk without the factor t", "test_ambiguity_answers.py",
    ),
    Mistake(
        "ambiguity.slices", "Slices.shifted",
        "self.losses - self.top", "self.losses",
        "losses are not shifted by the largest of them", "test_ambiguity_answers.py",
    ),
    Mistake(
        "ambiguity.sorted", "solve_capped_kl_penalty",
        "nu + height", "nu",
        "capped KL: the risk without the excess of the capped losses", "test_ambiguity_answers.py",
    ),
    Mistake(
        "ambiguity.sorted", "solve_capped_kl_penalty",
        "left / total / share", "1 / total",
        "capped KL: the free losses share 1, not the part that the capped losses leave", "test_ambiguity_answers.py",
    ),
    Mistake(
        "ambiguity.sorted", "solve_chi_square_penalty",
        "squares / (2 * size)", "squares / size",
        "chi-square: the divergence without its 1/2", "test_ambiguity_answers.py",
    ),
    Mistake(
        "ambiguity.sorted", "solve_chi_square_penalty",
        "((size - number) * s - depth) / number", "((size - number) * s - depth) / size",
        "chi-square: the lift divided by n, not by the number of active losses", "test_ambiguity_answers.py",
    ),
    Mistake(
        "ambiguity.sorted", "solve_chi_square_ball",
        "masked(__w, active, xp) / number", "masked(__w, active, xp) / size",
        "chi-square: weights that were clipped are not renormalised", "test_ambiguity_answers.py",
    ),
    Mistake(
        "ambiguity.sorted", "solve_chi_square_ball",
        "-span * (1 - mean + __x)", "-span * (1 - mean - __x)",
        "chi-square: the sign of (c + mu) (n - m) / n in the dual variable nu", "test_ambiguity_answers.py",
    ),
    Mistake(
        "ambiguity.sets", "ChiSquareBall.solve",
        "2 * self.radius", "self.radius",
        "chi-square: the radius of phi without its 1/2", "test_ambiguity_answers.py",
    ),
    Mistake(
        "ambiguity.sets", "CressieReadBall.solve",
        "order * (order - 1) * self.radius", "order * order * self.radius",
        "Cressie-Read: k k instead of k (k - 1)", "test_ambiguity_answers.py",
    ),
    Mistake(
        "ambiguity.balls", "solve_ball",
        "ball.room(ties, slices.size)", "ball.room(xp.ones_like(ties), slices.size)",
        "a ball is saturated by one largest loss although several are tied", "test_ambiguity_answers.py",
    ),
    Mistake(
        "ambiguity.searched", "solve_kl_ball",
        "s * log_mean * unit", "excess",
        "KL ball: the risk instead of the dual variable nu", "test_ambiguity_answers.py",
    ),
    Mistake(
        "ambiguity.searched", "solve_cressie_read_ball",
        "b * log_one_plus(change, mean, xp)", "log_one_plus(change, mean, xp)",
        "Cressie-Read: a power is missing in the divergence", "test_ambiguity_answers.py",
    ),
    Mistake(
        "ambiguity.slices", "uniform",
        "1 / slices.size", "1 / slices.losses.shape[-1]",
        "n counts entries under the mask", "test_ambiguity_answers.py",
    ),
    Mistake(
        "risk", "difference",
        "loss - weight * reference_loss", "loss + weight * reference_loss",
        "the reference model's loss is added", "test_risk.py",
    ),
    Mistake(
        "risk", "moving_average_kl",
        "(x - top) / tau", "(x - top) * tau",
        "a division by the temperature becomes a product", "test_moving_average.py",
    ),
    Mistake(
        "risk", "_log_mean_exp",
        "__sum - xp.log(number)", "__sum",
        "a sum instead of the mean", "test_moving_average.py",
    ),
)  # fmt: skip

STATE = (
    Mistake(
        "state.temperature_updates", "move",
        "old - __step * momentum", "old + __step * momentum",
        "a temperature moves along the gradient, not against it", "test_temperature.py",
    ),
    Mistake(
        "state.temperature_updates", "update_global_temperature",
        "first / -xp.expm1(__x)", "first",
        "Adam without the correction of the first steps", "test_temperature.py",
    ),
    Mistake(
        "state.gamma", "cosine_gamma",
        "1.0 + math.cos(__x)", "1.0 - math.cos(__x)",
        "gamma rises from the smallest value to 1", "test_estimator.py",
    ),
    Mistake(
        "state.gamma", "scent_gamma",
        "xp.where(unseen, xp.ones_like(sigmoid), __gamma)", "__gamma",
        "SCENT: a first visit keeps a part of the old estimate", "test_estimator.py",
    ),
    Mistake(
        "state.gamma", "scent_gamma",
        "xp.where(x >= 0, xp.ones_like(small), small)", "xp.where(x >= 0, small, xp.ones_like(small))",
        "SCENT: 1 - gamma instead of gamma", "test_estimator.py",
    ),
    Mistake(
        "state.table", "scatter_rows",
        "xp.take(xp.take(rows, order, axis=0), place, axis=0)", "xp.take(rows, place, axis=0)",
        "rows are written in the order of the batch, not of the sorted index", "test_estimator.py",
    ),
)  # fmt: skip

STEP = "test_contrastive.py"
ENGINE = (
    Mistake(
        "contrastive.anchors", "update",
        "log_sum - log_count", "log_sum",
        "a sum over the negatives instead of their mean", STEP,
    ),
    Mistake(
        "contrastive.anchors", "update",
        "log_add_constant(log_u, eps, xp=xp)", "log_u",
        "eps is left out of log(eps + u)", STEP,
    ),
    Mistake(
        "contrastive.anchors", "update",
        "xp.astype(log_u, log_inner.dtype)", "xp.astype(log_value, log_inner.dtype)",
        "eps in the state", STEP,
    ),
    Mistake(
        "contrastive.anchors", "update",
        "xp.astype(log_u, log_inner.dtype)", "xp.astype(log_g, log_inner.dtype)",
        "the state takes the batch's own estimate, not the moving average", STEP,
    ),
    Mistake(
        "contrastive.anchors", "update",
        "log_eps - log_u", "log_eps + log_u",
        "1 + eps u instead of 1 + eps / u in the sum of an anchor's weights", STEP,
    ),
    Mistake(
        "contrastive.anchors", "evaluate",
        "side.log_value + options.radius", "side.log_value",
        "the radius is left out", STEP,
    ),
    Mistake(
        "contrastive.anchors", "evaluate",
        "1.0 / (2.0 * options.batch_size)", "1.0 / options.batch_size",
        "the two directions are added, not averaged", STEP,
    ),
    Mistake(
        "contrastive.anchors", "evaluate",
        "value - weight * __mean", "-weight * __mean",
        "the temperature's gradient without its logarithm", STEP,
    ),
    Mistake(
        "contrastive.anchors", "evaluate",
        "value - weight * __mean", "value + weight * __mean",
        "the temperature's gradient with the sign of sum w D exchanged", STEP,
    ),
    Mistake(
        "contrastive.passes", "sum_negatives",
        "tiles.batch_size - 1", "tiles.batch_size",
        "a mean over b, not over b - 1 negatives", STEP,
    ),
    Mistake(
        "contrastive.tiles", "Tiles.counts",
        "__i[:, None] != __i[None, :]", "__i[:, None] == __i[:, None]",
        "the positive is kept among the negatives", STEP,
    ),
    Mistake(
        "contrastive.tiles", "Tiles.counts",
        "self.mask[i][:, self.spans[j]]", "self.mask[j][:, self.spans[i]].T",
        "the pair mask is transposed", STEP,
    ),
    Mistake(
        "contrastive.tiles", "Tiles.__init__",
        "-reference_weight * scaling.left", "reference_weight * scaling.left",
        "the reference model's similarities are added", STEP,
    ),
    Mistake(
        "contrastive.tiles", "Tiles.pull.visit",
        "self.matmul(v.T, self.images[i])", "self.matmul(v, self.images[i])",
        "V instead of its transpose in the gradient of the texts", STEP,
    ),
    Mistake(
        "contrastive.passes", "pull_back.weigh",
        "weights.of_cold_tile(1, tile)", "weights.of_cold_tile(0, tile).T",
        "w' is w transposed, not the weights of the text anchors", STEP,
    ),
    Mistake(
        "contrastive.passes", "merge",
        "total + total * ratio", "total + ratio",
        "the smaller of two tiles' sums is not in units of the larger", "test_tiles.py",
    ),
    Mistake(
        "contrastive.gradient", "wide_gradient",
        "pull[rows, :] -= __positive", "pull[rows, :] += __positive",
        "the positive's term has the wrong sign", STEP,
    ),
    Mistake(
        "contrastive.step", "wide_contrastive_step",
        "wide_gradient(pulls.text_pull, c, features[0], __xp, __unit)",
        "wide_gradient(pulls.text_pull, c, features[1], __xp, __unit)",
        "a text's positive is the text itself", STEP,
    ),
    Mistake(
        "contrastive.step", "wide_contrastive_step",
        "update(first.log_sum_text, first.count_text, log_inner_text, options.gammas[1], options.eps, xp)",
        "update(first.log_sum_text, first.count_text, log_inner_text, options.gammas[0], options.eps, xp)",
        "the text anchors use the image anchors' gamma", STEP,
    ),
    Mistake(
        "contrastive.two_views", "unimodal_contrastive_step",
        "gradient(pulls[1], c, view1_features, __xp, __unit)",
        "gradient(pulls[1], c, view2_features, __xp, __unit)",
        "two views: an anchor is its own positive", "test_unimodal.py",
    ),
)  # fmt: skip

LOSSES = (
    Mistake(
        "losses.info_nce", "info_nce",
        "log_add_constant(log_sum, 1.0, xp=xp)", "log_sum",
        "InfoNCE: the positive is missing in the denominator", "test_loss",
    ),
    Mistake(
        "losses.info_nce", "info_nce",
        "Batch(__image, __text, None, 1.0, __t, __u, pair_mask)", "Batch(__image, __text, None, 1.0, __t, __u, None)",
        "InfoNCE: masked pairs stay in the denominator", "test_loss",
    ),
    Mistake(
        "losses.sigmoid", "_weigh",
        "xp.where(positives, -logits, logits)", "xp.where(positives, logits, -logits)",
        "SigLIP: the labels are exchanged", "test_loss",
    ),
    Mistake(
        "losses.hinge", "hinge_margin_loss",
        "__z - along(axis, own[block]) + margin", "__z - along(axis, own[block]) - margin",
        "hinge: the sign of the margin", "test_loss",
    ),
    Mistake(
        "losses.distillation", "distillation_loss",
        "own.weight - target.weight", "own.weight + target.weight",
        "distillation: the reference model's weights do not cancel", "test_loss",
    ),
    Mistake(
        "selection", "select_jest",
        "chunk < k % num_chunks", "chunk <= k % num_chunks",
        "JEST: one chunk is too large", "test_selection.py",
    ),
)  # fmt: skip

RANKS = (
    Mistake(
        "contrastive.sharded_passes", "Blocks.owner",
        "self.ranks.rank + k", "self.ranks.rank - k",
        "ranks: blocks are numbered against the direction of the ring", "test_ranks.py",
    ),
    Mistake(
        "contrastive.thread_ranks", "ThreadRanks.shift",
        "self._rank + 1", "self._rank - 1",
        "ranks: the ring turns in the wrong direction", "test_ranks.py",
    ),
    Mistake(
        "contrastive.sharded_passes", "by_rank",
        "rank - ranks.rank", "rank + ranks.rank",
        "ranks: sums of texts go to the wrong rank", "test_ranks.py",
    ),
    Mistake(
        "contrastive.sharded_passes", "RingSweeps.sum_negatives",
        "at_home = ranks.shift(at_home)", "at_home = at_home",
        "ring: the sums of texts do not make the last hop", "test_ranks.py",
    ),
    Mistake(
        "contrastive.sharded_passes", "Blocks.counted",
        "self.ranks.size * self.num_local - 1", "self.num_local - 1",
        "ranks: a mean over own negatives", "test_ranks.py",
    ),
    Mistake(
        "contrastive.sharded_passes", "ReducedSweeps.pull_back",
        "weight_text * part_of_sum(part, text, rate, xp=xp)", "weight_text",
        "ranks: each rank gets the whole weight of an anchor", "test_ranks.py",
    ),
    Mistake(
        "contrastive.sharded_passes", "ReducedSweeps.sum_negatives",
        "blocks.counted(merged(to_images, rates[0], xp))", "blocks.counted(to_images[0])",
        "ranks: the sum over other ranks is missing", "test_ranks.py",
    ),
    Mistake(
        "contrastive.anchors", "evaluate",
        "summed_over_ranks(ranks, (loss, surrogate, gradient), xp)", "(loss, surrogate, gradient)",
        "ranks: the loss of the own pairs only", "test_ranks.py",
    ),
    Mistake(
        "contrastive.anchors", "normalised",
        "largest_on_ranks(ranks, unit, xp)", "unit",
        "ranks: weights are divided by the largest one of the own rank", "test_ranks.py",
    ),
    Mistake(
        "contrastive.sizes", "common_sizes",
        "largest_on_ranks(ranks, local, xp)", "local",
        "ranks: huge features are scaled by the own rank alone",
        "test_ranks_losses.py::test_features_that_are_huge",
    ),
    Mistake(
        "contrastive.view_passes", "ViewPasses.__init__",
        "common_sizes(__v, __r, __w, __t, xp, ranks=ranks, same_sides=True)",
        "common_sizes(__v, __r, __w, __t, xp, ranks=ranks, same_sides=False)",
        "two views: each view is scaled by the size of its own features",
        "test_ranks_views.py::test_a_view_of_huge_features",
    ),
    Mistake(
        "contrastive.sharded_views", "ReducedViews.table",
        "self.tiles(__features, __references, __t, self.ranks.size, paired=False)",
        "self.tiles(__features, __references, __t, self.ranks.size, paired=True)",
        "two views: a sample of another rank is left out", "test_ranks_views.py",
    ),
    Mistake(
        "contrastive.sharded_views", "ReducedViews.from_all_ranks",
        "weight * part_of_sum(part, self.whole, self.rate, xp=xp)", "weight",
        "two views: each rank gets the whole weight of an anchor", "test_ranks_views.py",
    ),
    Mistake(
        "contrastive.sharded_views", "RingViews.pull_all",
        "peak[k - 1, ...]", "peak[k - 2, ...]",
        "two views: the sums of another hop of the ring", "test_ranks_views.py",
    ),
    Mistake(
        "losses.distillation", "_passes_over_ranks",
        "(*features, *_needed(p[1]), *_needed(q[1]))", "(*features, *_needed(p[0]), *_needed(q[0]))",
        "distillation over ranks: the softmaxes of images travel with the texts", "test_ranks_losses.py",
    ),
    Mistake(
        "state.sharded_table", "ShardedTable._places",
        "self.ranks.rank * self._length", "(self.num_ranks - 1 - self.ranks.rank) * self._length",
        "split rows: a rank answers for the rows of another rank", "test_sharded_state.py",
    ),
)  # fmt: skip

GROUPS: dict[str, tuple[Mistake, ...]] = {
    "risks": NUMERICS + RISKS + STATE,
    "engine": ENGINE + LOSSES,
    "ranks": RANKS,
}
MISTAKES: tuple[Mistake, ...] = sum(GROUPS.values(), ())
