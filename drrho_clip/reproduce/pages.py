"""One page per claim and the table of all claims, as Markdown, from the rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from drrho_clip.files.disk import write_atomic
from drrho_clip.reproduce.claim import Claim, Figure, Judgement, groups
from drrho_clip.reproduce.experiment import CHOICE_SEED, Settings
from drrho_clip.reproduce.measuring.training import TEST_FIGURES
from drrho_clip.reproduce.plan import best_rate, marked_rate
from drrho_clip.reproduce.results import Results, Row
from drrho_clip.reproduce.standing import standing_of
from drrho_clip.reproduce.statistics import Interval, mean_and_deviation
from drrho_clip.reproduce.worlds import WORLDS

__all__ = ["claim_page", "in_words", "table_of_claims", "write_pages"]

_NAMES = {"retrieval_r1": "R@1", "retrieval_r5": "R@5", "retrieval_r10": "R@10", "zero_shot_accuracy": "zero-shot"}

_GROUP = ("world", "method", "reference", "setting")


def write_pages(claims: Iterable[Claim], results: Results) -> list[Path]:
    """Write the page and the pictures of each claim that has a judgement, and the table of claims; return the files.

    The page and the pictures of a claim without a judgement are removed, because their figures do not count any more.
    """
    contents: dict[str, bytes] = {}
    judged: dict[str, tuple[Claim, Judgement]] = {}
    for claim in claims:
        standing = standing_of(claim, results)
        # A claim without a complete world has no page.
        if standing.judgement is None:
            _remove(results.folder, claim.name)
            continue
        judged[claim.name] = claim, standing.judgement
        # The names of the pictures are known only when they are drawn.
        pictures = claim.draw(standing.rows)
        page = claim_page(claim, standing.rows, standing.trials, standing.judgement, list(pictures))
        contents[f"{claim.name}.md"] = page.encode()
        contents |= {f"{name}.svg": picture for name, picture in pictures.items()}
    if judged:
        contents["README.md"] = table_of_claims(list(judged.values())).encode()
    for name, content in contents.items():
        write_atomic(results.folder / name, content)
    return [results.folder / name for name in contents]


def _remove(folder: Path, name: str) -> None:
    """Remove the page and the pictures of a claim; a picture has the name of the claim, or begins with it and a "-"."""
    for path in (folder / f"{name}.md", folder / f"{name}.svg", *folder.glob(f"{name}-*.svg")):
        path.unlink(missing_ok=True)


def table_of_claims(judged: Sequence[tuple[Claim, Judgement]]) -> str:
    """Return the page with the table of claims."""
    lines = [
        "# The claims of the paper, measured again",
        "",
        "Each claim of the Model Steering paper (arXiv 2505.06699) is measured on small models. A claim *holds* if "
        "all differences that it promises have intervals above zero over the seeds; it *does not hold* if a "
        "difference is below zero, also after Bonferroni's correction for the number of differences; otherwise it is "
        "*not shown*. A claim can hold only if all of its worlds are measured. "
        "`drrho reproduce --report` writes these pages and pictures from the rows in the files `.jsonl` of this "
        "folder, so no figure was typed in.",
        "",
        *_table(
            ("number", "claim", "verdict", "reason"),
            [
                (str(claim.number), f"[{claim.title}]({claim.name}.md)", f"**{judgement.verdict}**", judgement.sentence)
                for claim, judgement in judged
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def claim_page(
    claim: Claim, rows: Sequence[Row], trials: Sequence[Row], judgement: Judgement, pictures: Sequence[str]
) -> str:
    """Return the page of a claim.

    Parameters
    ----------
    claim : Claim
    rows : sequence of Row
        The rows of the claim that count.
    trials : sequence of Row
        The rows of the trials of learning rates.
    judgement : Judgement
    pictures : sequence of str
        Names of the pictures without ``.svg``.
    """
    # A claim may keep choices of settings among its own rows; their seeds begin at CHOICE_SEED.
    seeds = sorted({row.seed for row in rows if row.seed < CHOICE_SEED})
    worlds = list(dict.fromkeys(row.dataset for row in rows))
    lines = [f"# Claim {claim.number}: {claim.title}", "", claim.statement, ""]
    lines += [f"**Verdict: {judgement.verdict}.** {judgement.sentence}", ""]
    scale = f" --scale {rows[0].scale}" if rows[0].scale > 1 else ""
    lines += [f"    drrho reproduce {claim.name}{scale}", "", "## Measurement", "", claim.setup, ""]
    lines += [
        f"The seeds are {', '.join(map(str, seeds))}. A difference is taken seed by seed. The bootstrap interval and "
        "Student's interval have level 95 %; with five values the bootstrap interval covers the mean in about 85 % of "
        "all cases only. A claim holds if both intervals of every difference of the verdict lie above zero. It does "
        "not hold if both intervals of such a difference lie below zero, also after Bonferroni's correction. Counts "
        "of other differences above or below zero are not corrected for their number.",
        "",
        "## Figures of the verdict",
        "",
        *_figures(judgement.counted),
    ]
    if judgement.others:
        lines += ["## Other figures, which do not count for the verdict", "", *_figures(judgement.others)]
    lines += [*(f"- {note}" for note in judgement.notes), *([""] if judgement.notes else [])]
    lines += [line for name in pictures for line in (f"![The figures of this page as a picture]({name}.svg)", "")]
    names = [name for name in TEST_FIGURES if any(name in row.metrics for row in rows)]
    tables = claim.tables(rows)
    # A claim with tables of its own has the means there.
    if names and not tables:
        lines += ["## Means and standard deviations over the seeds", ""]
        heading = (*_GROUP, "seeds", *(_NAMES[name] for name in names))
        # Rows stand in the order in which the experiments ended, which differs from machine to machine.
        by_world = sorted(groups(rows).values(), key=lambda group: worlds.index(group[0].dataset))
        lines += [*_table(heading, [_means(group, names) for group in by_world]), ""]
    for table in tables:
        lines += [f"## {table.title}", "", table.sentence, "", *_table(table.heading, table.lines), ""]
    lines += _worlds(rows)
    lines += _learning_rates(rows, trials)
    lines += ["## Origin", "", _origin(rows), ""]
    return "\n".join(lines)


def _figures(figures: Sequence[Figure]) -> list[str]:
    heading = ("difference", "mean", "bootstrap interval", "Student's interval", "seeds")
    return [*_table(heading, [(figure.label, *_cells(figure.interval)) for figure in figures]), ""]


def _worlds(rows: Sequence[Row]) -> list[str]:
    """Return the section on the data and the models, or nothing if the claim has worlds of its own."""
    lines: list[tuple[str, ...]] = []
    for name in dict.fromkeys(row.dataset for row in rows if row.dataset in WORLDS):
        world = WORLDS[name].scaled(rows[0].scale)
        # A reference model has the settings of the target, apart from those named here.
        references = "; ".join(f"{model}: {_settings(own)}" for model, own in world.references.items())
        methods = dict.fromkeys(row.method for row in rows if row.dataset == name)
        single = "; ".join(
            f"{method}: {_settings(world.by_method[method])}" for method in methods if method in world.by_method
        )
        lines.append((name, world.title, _settings({**world.data, **world.target}), single, references))
    heading = (
        "world",
        "data",
        "settings of `drrho train`",
        "other settings of single methods",
        "other settings of the reference models",
    )
    sentence = "A world is a data set with noise, a target, and reference models that are trained on other pairs."
    if lines and rows[0].scale > 1:
        sentence += f" Models and batches are {rows[0].scale} times as large as those of `drrho reproduce` alone."
    return ["## Worlds", "", sentence, "", *_table(heading, lines), ""] if lines else []


def _settings(settings: Settings) -> str:
    """Return settings in a line."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items()
    )


def _learning_rates(rows: Sequence[Row], trials: Sequence[Row]) -> list[str]:
    """Return the section on the trials of learning rates, or nothing if the claim needs none of them."""
    lines = ["## Learning rates", ""]
    lines += [
        f"They were chosen by R@1 on the validation pairs of seed {CHOICE_SEED}, from the same grid for all methods of "
        "a world. While the best rate is at an end of the grid, the grid grows there, by at most two rates. A best "
        "rate that is still at an end is marked: a better rate may lie beyond it. The rate of a method with a "
        "reference model was chosen with the reference model in this table and serves the other reference models, too.",
        "",
    ]
    # A choice without a label holds for all rows of a method and world, and that of a reference model for all targets.
    used = {(row.dataset, row.method, label) for row in rows for label in ("", row.label)}
    used |= {(row.dataset, "reference", "") for row in rows if row.reference is not None}
    chosen = [_choice(group) for key, group in groups(trials).items() if (key.dataset, key.method, key.label) in used]
    lines += [*_table((*_GROUP, "validation R@1 by rate", "chosen"), chosen), ""]
    return lines if chosen else []


def in_words(interval: Interval) -> str:
    """Return mean and bootstrap interval for a line of a terminal.

    Examples
    --------
    >>> in_words(Interval(0.1234, 0.1, 0.15, 0.04, 5, 0.001))
    '+0.123 [+0.100, +0.150], 5 seeds'
    """
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}], {interval.num} seeds"


def _group(row: Row) -> tuple[str, ...]:
    return row.dataset, row.method, row.reference or "none", row.label


def _cells(interval: Interval) -> tuple[str, ...]:
    student = f"{interval.mean - interval.half:+.3f} to {interval.mean + interval.half:+.3f}"
    return f"{interval.mean:+.3f}", f"{interval.low:+.3f} to {interval.high:+.3f}", student, str(interval.num)


def _means(rows: Sequence[Row], names: Sequence[str]) -> tuple[str, ...]:
    cells = []
    for name in names:
        # A world without classes has no accuracy.
        if not all(name in row.metrics for row in rows):
            cells.append("")
            continue
        mean, deviation = mean_and_deviation([row.figure(name) for row in rows])
        cells.append(f"{mean:.3f} ± {deviation:.3f}")
    return (*_group(rows[0]), str(len(rows)), *cells)


def _choice(rows: Sequence[Row]) -> tuple[str, ...]:
    trials = {_rate_of(row): row for row in rows}
    tried = ", ".join(f"{rate:g}: {trials[rate].figure('validation_r1'):.3f}" for rate in sorted(trials))
    return *_group(rows[0]), tried, marked_rate(best_rate(trials), trials)


def _rate_of(row: Row) -> float:
    """Return the learning rate that a trial tries."""
    group = "reference" if row.method == "reference" else "target"
    return float(row.settings[group]["learning_rate"])


def _origin(rows: Sequence[Row]) -> str:
    # Rows of several commands may come from different machines, versions and commits.
    machines = "; ".join(dict.fromkeys(row.machine for row in rows))
    versions = dict.fromkeys(", ".join(f"{name} {number}" for name, number in row.versions.items()) for row in rows)
    commits = ", ".join(dict.fromkeys(f"`{row.commit[:12]}`" for row in rows))
    minutes = sum(row.seconds for row in rows) / 60
    return (
        f"The {len(rows)} rows took {minutes:.1f} minutes of training in all, on: {machines}. Versions: "
        f"{'; '.join(versions)}. Commits: {commits}."
    )


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; a column without any text is left out."""
    # Most claims have no changes of settings, and many worlds have no classes.
    used = [place for place in range(len(heading)) if any(row[place] for row in rows)]
    lines = [[line[place] for place in used] for line in (heading, ["---"] * len(heading), *rows)]
    return [f"| {' | '.join(line)} |" for line in lines]
