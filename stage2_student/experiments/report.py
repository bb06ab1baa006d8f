"""An experiment's runs and comparisons as Markdown tables, sentences and plots."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shared.eval.report.plots import Plot
from shared.eval.results import Comparison, PairedDifference, Proof
from stage2_student.experiments.runner import Row

PANELS = {"nll_nats": "validation NLL, nats per token", "kl_to_teacher_nats": "KL to the teacher, nats per token"}


def rank_rows(rows: Sequence[Row]) -> list[Row]:
    """Best first, by held-out NLL and then KL to the teacher; runs without figures last, in the order given."""

    def key(row: Row) -> list[float]:
        return [math.inf if value is None else value for value in (row.nll_nats, row.kl_to_teacher_nats)]

    return sorted(rows, key=key)


def run_table(rows: Sequence[Row]) -> str:
    """Every run in Markdown, aligned for a terminal too: swept settings first, figures in nats."""
    keys = _swept_keys(rows)
    return aligned_table(
        [*keys, "NLL", "KL", "parameters", "steps", "state"],
        [
            [
                *(str(row.swept.get(key, "–")) for key in keys),
                _number(row.nll_nats, ".4f"),
                _number(row.kl_to_teacher_nats, ".4f"),
                _number(row.parameters, ",d"),
                _number(row.steps, ",d"),
                row.state,
            ]
            for row in rows
        ],
    )


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Every comparison in Markdown; bold where the interval excludes 0."""
    return aligned_table(
        ["setting", "versus", "NLL", "95 %", "p", "p (Holm)", "KL", "95 %"],
        [
            [row.setting, row.versus, *_difference(row), f"{row.p:.2g}", f"{row.p_holm:.2g}",
             *_difference(row.kl)]
            for row in comparisons
        ],
    )  # fmt: skip


def aligned_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns have one width."""
    widths = [max(3, *(len(line[column]) for line in [header, *rows])) for column in range(len(header))]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in [header, ["-" * width for width in widths], *rows]
    )


def sentences(comparisons: Sequence[Comparison], num_seeds: int) -> list[str]:
    """What the comparisons show, the null results included, and what they do not show."""
    found = []
    for row in comparisons:
        low, high = row.ci95
        verdict = f"no difference from {row.versus} shown"
        if row.significant:
            verdict = f"{'lower' if row.difference < 0 else 'higher'} test NLL than {row.versus}"
            verdict += "" if row.p_holm < 0.05 else " (not after Holm's correction)"
        found.append(
            f"{row.setting}: {verdict}: {row.difference:+.4f} nats per target, 95 % [{low:+.4f}, {high:+.4f}]."
        )
    count = len(comparisons)
    return [
        *found,
        f"Of {count} comparisons without a true difference, 95 % intervals exclude 0 in {0.05 * count:.1f} on average; "
        "Holm's correction guards against that.",
        f"The intervals cover training again with other seeds ({num_seeds} of them), not other documents, teachers or "
        "sizes of student.",
    ]


def proof_page(proof: Proof) -> str:
    """A proof in Markdown: what it shows, every variant and every comparison, and what it was made from."""
    caches = proof.settings["caches"]
    variants = aligned_table(
        ["variant", "learning rate", "epochs", "test NLL", "sd", "test KL", "sd"],
        [
            [variant.name, f"{variant.learning_rate:g}", f"{variant.epochs}",
             *(f"{value:.4f}" for spread in (variant.test_nll, variant.test_kl) for value in (spread.mean, spread.sd))]
            for variant in proof.variants
        ],
    )  # fmt: skip
    sources = aligned_table(
        ["cache", "documents", "tokens", "shards (SHA-256)"],
        [
            [name, f"{cache['documents']:,}", f"{cache['tokens']:,}",
             " ".join(digest[:16] for digest in cache["shards"].values())]
            for name, cache in caches.items()
        ],
    )  # fmt: skip
    seeds = ", ".join(map(str, proof.settings["seeds"]))
    versions = ", ".join(f"{name} {version}" for name, version in proof.versions.items())
    return "\n".join([
        "# The proof\n",
        *(f"- {sentence}" for sentence in proof.summary),
        "\nNLL of the text and KL(teacher‖student), K+1 partition at T = 1, in nats per target of the test cache; "
        f"mean and standard deviation over seeds {seeds}.\n",
        variants,
        "Paired differences, setting − versus, with Student's 95 % intervals; bold where the interval excludes 0.\n",
        comparison_table(proof.comparisons),
        sources,
        f"Labels `{caches['train']['label_identity'][:16]}`; {proof.seconds / 60:.0f} minutes of training in all "
        f"on {proof.machine['processor']} ({proof.machine['cores']} cores); {versions}.\n",
    ])  # fmt: skip


def run_plot(rows: Sequence[Row]) -> Plot | None:
    """NLL and KL against each swept setting, every run a point, the best of each value joined.

    None where no run has figures.
    """
    keys = _swept_keys(rows)
    scored = [row for row in rows if row.nll_nats is not None]
    if not scored:
        return None

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(PANELS), len(keys), squeeze=False, sharey="row")
        for axes_row, (name, label) in zip(grid, PANELS.items(), strict=True):
            axes_row[0].set_ylabel(label)
            for axes, key in zip(axes_row, keys, strict=True):
                axes.set_xlabel(key)
                known = [row for row in scored if key in row.swept and getattr(row, name) is not None]
                _draw_points(axes, [(row.swept[key], getattr(row, name)) for row in known])

    return Plot(draw=draw, size=(3.4 * len(keys) + 0.6, 5.2))


def _draw_points(axes: Axes, points: list[tuple[Any, float]]) -> None:
    is_numeric = all(isinstance(x, int | float) and not isinstance(x, bool) for x, _ in points)
    if not is_numeric:
        points = [(str(x), y) for x, y in points]
    best = {x: min(y for other, y in points if other == x) for x, _ in points}
    order = sorted(best)
    axes.plot(order, [best[x] for x in order], color="C1", linewidth=1)
    axes.scatter([x for x, _ in points], [y for _, y in points], color="C1", s=18)
    if order and is_numeric and order[0] > 0 and order[-1] >= 10 * order[0]:
        axes.set_xscale("log")


def _swept_keys(rows: Sequence[Row]) -> list[str]:
    """Every setting that the experiment's file sweeps, in its order."""
    return list(dict.fromkeys(key for row in sorted(rows, key=lambda row: -len(row.swept)) for key in row.swept))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _difference(paired: PairedDifference) -> list[str]:
    low, high = paired.ci95
    mean = f"{paired.difference:+.4f}"
    return [f"**{mean}**" if paired.significant else mean, f"{low:+.4f} to {high:+.4f}"]
