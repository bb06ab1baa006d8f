"""The report's plots, as inline SVG whose colours and fonts the page decides."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# What matplotlib draws → the page's CSS variable, so that one drawing serves light, dark and print.
INK, GRID = "#101010", "#e0e0e0"
SERIES = ("#707070", "#2050a0", "#b06010", "#207050", "#803080", "#a02040")  # the teacher first
CSS_COLOURS = {INK: "var(--ink)", GRID: "var(--rule)"} | {c: f"var(--series-{i})" for i, c in enumerate(SERIES)}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}
WIDTH, HEIGHT = 4.4, 3.0  # inches; small, so that text stays readable on a narrow page


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One drawing: the heading above it, a caption below it, and what it shows in words for those who cannot see it."""

    title: str
    caption: str
    alt: str
    svg: str


def training_plot(logs: Mapping[str, Sequence[Mapping[str, Any]]], key: str, title: str, caption: str) -> Plot | None:
    """Draw one logged loss against the step, with its held-out counterpart `eval_<key>` where there is one.

    Args:
        logs: by the run's label, in the order of colours after the teacher's, the records of `training_log.jsonl`.
        key: the loss, in nats per token.
        title: the heading.
        caption: what the reader should know.
    """
    words = []
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        for colour, (label, records) in zip(_cycle(1, len(logs)), logs.items(), strict=True):
            train, held_out = _series(records, key), _series(records, f"eval_{key}")
            if train:
                axes.plot(*zip(*train, strict=True), color=colour, label=label, alpha=0.45 if held_out else 1)
                words.append(f"{label}: from {train[0][1]:.2f} to {train[-1][1]:.2f} in training")
            if held_out:
                name = f"{label}, held out"
                axes.plot(*zip(*held_out, strict=True), color=colour, label=name, marker="o", markersize=3)
                words.append(f"{name}: {held_out[-1][1]:.2f} at the end")
        if not words:
            return None
        axes.set(xlabel="optimizer step", ylabel="nats per token")
        axes.grid(axis="y")
        axes.legend(fontsize=8)
        return Plot(title=title, caption=caption, alt=f"{title} by step. {'; '.join(words)}.", svg=_svg(figure, key))


def mass_plot(caches: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Plot | None:
    """Draw the teacher's probability mass inside the cached rows by temperature.

    Args:
        caches: by the cache's name, {temperature: {"mean", "p1", "p10"}}, shares in [0, 1].
    """
    if not caches:
        return None
    words = []
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        for colour, (name, masses) in zip(_cycle(1, len(caches)), caches.items(), strict=True):
            points = sorted(
                (float(temperature), mass) for temperature, mass in masses.items() if mass["mean"] is not None
            )
            x = [temperature for temperature, _ in points]
            axes.plot(x, [m["mean"] for _, m in points], color=colour, marker="o", markersize=3.5, label=name)
            axes.plot(x, [m["p10"] for _, m in points], color=colour, linestyle=":", label=f"{name}, 10th percentile")
            words.append(f"{name}: " + ", ".join(f"{m['mean']:.3f} at T={t:g}" for t, m in points))
        axes.set(xlabel="temperature T", ylabel="mass inside the top-k", ylim=(0, 1.03), xticks=x)
        axes.grid(axis="y")
        axes.legend(fontsize=8, loc="lower left")
        return Plot(
            title="Teacher mass captured by the cache",
            caption="Mean over tokens of the probability that the cached ids hold; the rest is one tail value.",
            alt=f"Captured mass by temperature. {'; '.join(words)}.",
            svg=_svg(figure, "mass"),
        )


def fidelity_plot(models: Mapping[str, tuple[float | None, float | None]]) -> Plot | None:
    """Draw held-out NLL and KL to the teacher as bars.

    Args:
        models: by label, teacher first: (NLL, KL), nats per token, None where not measured.
    """
    panels = [("NLL, nats per token", 0), ("KL to the teacher, nats per token", 1)]
    panels = [(name, i) for name, i in panels if any(values[i] is not None for values in models.values())]
    if not panels:
        return None
    words = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        for axes, (name, i) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            for row, (colour, (label, values)) in enumerate(zip(_cycle(0, len(models)), models.items(), strict=True)):
                value = values[i]
                axes.barh(row, value or 0, color=colour, height=0.62)
                text = "not measured" if value is None else f"{value:.3f}"
                axes.annotate(text, (value or 0, row), (3, 0), textcoords="offset points", va="center")
                words += [] if value is None else [f"{label} {name}: {value:.3f}"]
            axes.set_yticks(range(len(models)), list(models))
            axes.invert_yaxis()
            axes.set_title(name)
            axes.margins(x=0.18)
            axes.set_xlim(left=0)
            axes.tick_params(axis="y", length=0)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
        return Plot(
            title="Held-out NLL and KL to the teacher",
            caption="Lower is better in both: NLL against the text, KL against the teacher's cached distribution.",
            alt=f"Bars. {'; '.join(words)}.",
            svg=_svg(figure, "fidelity"),
        )


def tradeoff_plot(models: Mapping[str, tuple[float, float, int]]) -> Plot | None:
    """Draw speed against quality, with the size as the disc's area.

    Args:
        models: by label, teacher first, measured on one machine: (decode tokens per second, NLL in nats, parameters).
    """
    if len(models) < 2:
        return None
    words = []
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        largest = max(parameters for _, _, parameters in models.values())
        by_nll = sorted(models, key=lambda label: models[label][1])
        for colour, (label, (speed, nll, parameters)) in zip(_cycle(0, len(models)), models.items(), strict=True):
            area = max(1500 * parameters / largest, 20)
            axes.scatter(speed, nll, s=area, color=colour, alpha=0.8, linewidths=0)
            below = by_nll.index(label) % 2 == 0
            offset = (area**0.5 / 2 + 3) * (-1 if below else 1)
            axes.annotate(f"{label}, {parameters / 1e6:,.1f} M", (speed, nll), (0, offset), textcoords="offset points",
                          ha="center", va="top" if below else "bottom", fontsize=8)  # fmt: skip
            words.append(f"{label}: {speed:,.1f} tokens per second, NLL {nll:.3f}, {parameters:,} parameters")
        axes.set(xlabel="decoded tokens per second (right is faster)", ylabel="held-out NLL (lower is better)")
        axes.margins(x=0.3, y=0.35)
        axes.set_xticks([tick for tick in axes.get_xticks() if tick >= 0])
        axes.grid()
        return Plot(
            title="Size, speed and quality",
            caption="A disc's area is the number of parameters. All speeds are from one machine.",
            alt=f"Scatter plot. {'; '.join(words)}.",
            svg=_svg(figure, "tradeoff"),
        )


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    return figure, figure.subplots()


def _cycle(first: int, count: int) -> list[str]:
    """The colours of `count` series; the teacher's is first and never given to a student."""
    return [
        SERIES[i] if i < len(SERIES) else SERIES[1 + (i - 1) % (len(SERIES) - 1)] for i in range(first, first + count)
    ]


def _series(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) where the key was logged; of a step logged again after a resume, the last."""
    return sorted({r["step"]: r[key] for r in records if r.get(key) is not None and "step" in r}.items())


def _svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element: ids unique in the page, page colours, page font, scaled by its viewBox."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", svg).replace("xlink:href", "href")
    for colour, variable in CSS_COLOURS.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\s*\n\s*", "\n", svg)
