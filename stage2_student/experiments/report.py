"""An experiment's runs and comparisons as Markdown tables, sentences and plots."""

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stage2_student.experiments.runner import Row
from stage2_student.experiments.statistics import Comparison, Paired

PANELS = {"nll_nats": "validation NLL, nats per token", "kl_to_teacher_nats": "KL to the teacher, nats per token"}
BLUE, DARK, GREY = "#2050a0", "#102850", "#808080"


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
            [row.setting, row.versus, *_difference(row.nll), f"{row.nll.p:.2g}", f"{row.p_holm:.2g}",
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
        low, high = row.nll.ci95
        verdict = f"no difference from {row.versus} shown"
        if row.nll.significant:
            verdict = f"{'lower' if row.nll.difference < 0 else 'higher'} test NLL than {row.versus}"
            verdict += "" if row.p_holm < 0.05 else " (not after Holm's correction)"
        found.append(
            f"{row.setting}: {verdict}: {row.nll.difference:+.4f} nats per target, 95 % [{low:+.4f}, {high:+.4f}]."
        )
    count = len(comparisons)
    return [
        *found,
        f"Of {count} comparisons without a true difference, 95 % intervals exclude 0 in {0.05 * count:.1f} on average; "
        "Holm's correction guards against that.",
        f"The intervals cover training again with other seeds ({num_seeds} of them), not other documents, teachers or "
        "sizes of student.",
    ]


def proof_page(result: Mapping[str, Any], comparisons: Sequence[Comparison]) -> str:
    """A proof in Markdown: what it shows, every variant and every comparison, and what it was made from."""
    settings = result["settings"]
    caches = settings["caches"]
    variants = aligned_table(
        ["variant", "learning rate", "epochs", "test NLL", "sd", "test KL", "sd"],
        [
            [variant["name"], f"{variant['learning_rate']:g}", f"{variant['epochs']}",
             *(f"{variant[key][value]:.4f}" for key in ("test_nll", "test_kl") for value in ("mean", "sd"))]
            for variant in result["variants"]
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
    seeds = ", ".join(map(str, settings["seeds"]))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join([
        "# The proof\n",
        *(f"- {sentence}" for sentence in result["summary"]),
        "\nNLL of the text and KL(teacher‖student), K+1 partition at T = 1, in nats per target of the test cache; "
        f"mean and standard deviation over seeds {seeds}.\n",
        variants,
        "Paired differences, setting − versus, with Student's 95 % intervals; bold where the interval excludes 0.\n",
        comparison_table(comparisons),
        sources,
        f"Labels `{caches['train']['label_identity'][:16]}`; {result['seconds'] / 60:.0f} minutes of training in all "
        f"on {result['machine']['processor']} ({result['machine']['cores']} cores); {versions}.\n",
    ])  # fmt: skip


def run_plot(rows: Sequence[Row]) -> bytes | None:
    """Draw NLL and KL against each swept setting, every run a point, the best of each value joined; SVG.

    None where no run has figures.
    """
    keys = _swept_keys(rows)
    scored = [row for row in rows if row.nll_nats is not None]
    if not scored:
        return None
    with _figure(width=3.4 * len(keys) + 0.6, height=5.2) as (figure, svg):
        grid = figure.subplots(len(PANELS), len(keys), squeeze=False, sharey="row")
        for axes_row, (name, label) in zip(grid, PANELS.items(), strict=True):
            axes_row[0].set_ylabel(label)
            for axes, key in zip(axes_row, keys, strict=True):
                axes.set_xlabel(key)
                points = [(row.swept[key], getattr(row, name)) for row in scored if key in row.swept]
                points = [(x, y) for x, y in points if y is not None]
                if points:
                    _draw_points(axes, points)
    return svg.getvalue()


def _draw_points(axes: Any, points: list[tuple[Any, float]]) -> None:
    is_numeric = all(isinstance(x, int | float) and not isinstance(x, bool) for x, _ in points)
    if not is_numeric:
        points = [(str(x), y) for x, y in points]
    best = {x: min(y for other, y in points if other == x) for x, _ in points}
    order = sorted(best)
    axes.plot(order, [best[x] for x in order], color=BLUE, linewidth=1)
    axes.scatter([x for x, _ in points], [y for _, y in points], color=BLUE, s=18)
    if is_numeric and min(order) > 0 and max(order) >= 10 * min(order):
        axes.set_xscale("log")


def interval_plot(figures: Mapping[str, Mapping[int, tuple[float, float]]], comparisons: Sequence[Comparison]) -> bytes:
    """Draw each setting's paired differences from the first one in NLL and KL, seed by seed and with intervals; SVG.

    Args:
        figures: NLL and KL by setting and seed; the first setting is the baseline.
        comparisons: those of the settings.
    """
    baseline = next(iter(figures))
    against = [row for row in comparisons if row.versus == baseline]
    with _figure(width=8.4, height=1.2 + 0.34 * len(against)) as (figure, svg):
        panels = figure.subplots(1, 2, sharey=True)
        for i, (axes, label) in enumerate(zip(panels, ("test NLL", "KL to the teacher"), strict=True)):
            axes.axvline(0, color=GREY, linewidth=0.8)
            for y, row in zip(range(len(against), 0, -1), against, strict=True):
                paired = (row.nll, row.kl)[i]
                axes.plot(paired.ci95, [y, y], color=BLUE, linewidth=2)
                each = [value[i] - figures[baseline][seed][i] for seed, value in figures[row.setting].items()]
                axes.plot(each, [y] * len(each), "o", color=BLUE, markersize=3, alpha=0.5)
                axes.plot([paired.difference], [y], "|", color=DARK, markersize=10, markeredgewidth=2)
            axes.set_yticks(range(len(against), 0, -1), [row.setting for row in against])
            axes.set_xlabel(f"{label} − that of {baseline}, nats per target")
    return svg.getvalue()


@contextlib.contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, io.BytesIO]]:
    """A figure, and where its SVG is written at the end; equal drawings have equal bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    svg = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "experiment", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, svg
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})


def _swept_keys(rows: Sequence[Row]) -> list[str]:
    """Every setting that the experiment's file sweeps, in its order."""
    return list(dict.fromkeys(key for row in sorted(rows, key=lambda row: -len(row.swept)) for key in row.swept))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _difference(paired: Paired) -> list[str]:
    low, high = paired.ci95
    mean = f"{paired.difference:+.4f}"
    return [f"**{mean}**" if paired.significant else mean, f"{low:+.4f} to {high:+.4f}"]
