"""Plots of the report, each drawn for a light and for a dark page; the proof and sweeps draw by the same functions.

The page's template has their headings and captions.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shared.cache.manifest import Manifest
from shared.eval.report.tables import FIGURES, Model, speed_key
from shared.eval.results import Proof


def _theme(ink: str, rule: str, *series: str) -> dict[str, Any]:
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return dict.fromkeys(inks, ink) | {"grid.color": rule, "axes.prop_cycle": cycler(color=series)}


# Series: the teacher's colour first, then the students'.
THEMES = {
    "light": _theme("#1a1c1f", "#dfe2e6", "#70757d", "#1f5fbf", "#b3590b", "#1c7a55", "#7d3c98", "#a8324a"),
    "dark": _theme("#e6e8eb", "#34383e", "#9aa1ab", "#7db0ff", "#f0a35e", "#6fcfa3", "#c9a0e0", "#f08ca0"),
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "codedistill", "font.size": 9, "lines.linewidth": 1.4,
    "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.titlesize": 9, "axes.titlelocation": "left", "legend.frameon": False, "grid.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6,
}  # fmt: skip
NUM_STUDENT_COLOURS = 5
WIDTH, HEIGHT = 4.4, 3.0  # inches; small, so that text stays readable on a narrow page

Line = tuple[str, Sequence[tuple[float, float]], dict[str, Any]]  # label, points, style


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One drawing."""

    draw: Callable[[Figure], None]  # into an empty figure
    alt: str = ""  # what it shows, in words
    size: tuple[float, float] = (WIDTH, HEIGHT)

    def svg(self, theme: str = "light", *, transparent: bool = False) -> bytes:
        """The drawing as SVG; equal data gives equal bytes."""
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE | THEMES[theme]):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure)
            figure.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None, "Creator": None})
        return buffer.getvalue()

    @property
    def images(self) -> dict[str, str]:
        """Data URIs of the drawing by theme, for a page of that theme."""
        drawings = {theme: base64.b64encode(self.svg(theme, transparent=True)).decode() for theme in THEMES}
        return {theme: f"data:image/svg+xml;base64,{drawing}" for theme, drawing in drawings.items()}


def report_plots(
    models: Sequence[Model], caches: Mapping[str, Manifest | None], proof: Proof | None
) -> dict[str, Plot]:
    """The report's plots for which there is data, by name; the teacher is the first model."""
    plots = {
        "fidelity": fidelity_plot(models),
        "tradeoff": tradeoff_plot(models),
        "ce": training_plot(models, "ce"),
        "kd": training_plot(models, "kd"),
        "calibration": calibration_plot(models),
        "mass": mass_plot(caches),
        "proof": proof_plot(proof) if proof else None,
    }
    return {name: plot for name, plot in plots.items() if plot}


def _colour(index: int) -> str:
    """The colour of a model by its place in the report; the teacher's, the first, is never given to a student."""
    return "C0" if index == 0 else f"C{1 + (index - 1) % NUM_STUDENT_COLOURS}"


def _plain(text: str) -> str:
    """A name as text and not as matplotlib's mathematics, on one line, and not longer than a drawing can hold."""
    text = " ".join(text.split()).replace("$", r"\$")
    return text if len(text) <= 40 else f"{text[:39]}…"


def _interval(interval: Sequence[float] | None, sign: str = "") -> str:
    return f" ({interval[0]:{sign}.3f} to {interval[1]:{sign}.3f})" if interval else ""


def _draw_lines(axes: Axes, lines: Sequence[Line], **settings: Any) -> None:
    for label, points, style in lines:
        axes.plot(*zip(*points, strict=True), label=_plain(label), **style)
    axes.set(**settings)
    axes.grid(axis="y")
    axes.legend(fontsize=8)


def _line_plot(what: str, lines: Sequence[Line], **settings: Any) -> Plot | None:
    """Lines, in words each by its first and last point; None without any."""
    if not lines:
        return None
    words = [f"{label}: from {points[0][1]:.3f} to {points[-1][1]:.3f}" for label, points, _ in lines]

    def draw(figure: Figure) -> None:
        _draw_lines(figure.subplots(), lines, **settings)

    return Plot(draw=draw, alt=f"{what}. {'; '.join(words)}.")


def training_plot(models: Sequence[Model], key: str) -> Plot | None:
    """Draw a loss in nats per token against the step, with its held-out counterpart `eval_<key>` where there is one."""
    lines: list[Line] = []
    for index, model in enumerate(models):
        held_out = {"marker": "o", "markersize": 3}
        for name, text, style in (
            (key, model.label, {"alpha": 0.45}),
            (f"eval_{key}", f"{model.label}, held out", held_out),
        ):
            # Of a step that a resume has done again, the last counts.
            known = {r["step"]: r[name] for r in model.log if r.get(name) is not None and "step" in r}
            if known:
                lines.append((text, sorted(known.items()), {"color": _colour(index), **style}))
    return _line_plot("Loss by step", lines, xlabel="optimizer step", ylabel="nats per token")


def mass_plot(caches: Mapping[str, Manifest | None]) -> Plot | None:
    """Draw the teacher's probability mass inside the cached rows by temperature, as manifests have it."""
    lines: list[Line] = []
    for index, (name, manifest) in enumerate(caches.items(), 1):
        masses = manifest.statistics["captured_mass"] if manifest else {}
        known = sorted((float(T), mass) for T, mass in masses.items() if mass["mean"] is not None)
        for key, label, style in (("mean", name, {"marker": "o"}), ("p10", f"{name}, 10th percentile", {"ls": ":"})):
            points = [(T, mass[key]) for T, mass in known]
            if points:
                lines.append((label, points, {"color": _colour(index), "markersize": 3.5, **style}))
    return _line_plot("Captured mass from the lowest temperature to the highest", lines, ylim=(0, 1.03),
                      xlabel="temperature T", ylabel="mass inside the top-k")  # fmt: skip


def fidelity_plot(models: Sequence[Model]) -> Plot | None:
    """Draw held-out NLL and KL to the teacher as bars with their 95 % intervals."""
    titles = {"heldout_nll_nats": "NLL, nats per token", "kl_to_teacher_nats": "KL to the teacher, nats per token"}
    panels = {title: [model.cell(FIGURES[key]) for model in models] for key, title in titles.items()}
    panels = {title: cells for title, cells in panels.items() if any(cell.value is not None for cell in cells)}
    places, colours = range(len(models)), [_colour(index) for index in range(len(models))]

    def draw(figure: Figure) -> None:
        all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (title, cells) in zip(all_axes, panels.items(), strict=True):
            ends = [cell.value or 0 for cell in cells]
            errors = np.abs([np.subtract(cell.ci95 or (end, end), end) for cell, end in zip(cells, ends, strict=True)])
            bars = axes.barh(places, ends, 0.62, color=colours, xerr=errors.T, ecolor=rcParams["text.color"])
            axes.bar_label(bars, ["not measured" if cell.value is None else cell.text for cell in cells], padding=3)
            axes.set_yticks(places, [_plain(model.label) for model in models])
            axes.invert_yaxis()
            axes.set(title=title, xticks=[])
            axes.margins(x=0.18)

    words = [
        f"{model.label} {title}: {cell.text}{_interval(cell.ci95)}"
        for title, cells in panels.items()
        for model, cell in zip(models, cells, strict=True)
        if cell.value is not None
    ]
    size = (WIDTH, len(panels) * (0.55 + 0.3 * max(len(models), 3)))
    return Plot(draw=draw, alt=f"Bars. {'; '.join(words)}.", size=size) if panels else None


def tradeoff_plot(models: Sequence[Model]) -> Plot | None:
    """Draw speed against quality, with the size as the disc's area, of the models timed on the teacher's machine."""
    keys = (speed_key(models), "heldout_nll_nats", "parameters")
    home = models[0].latency.machine if models[0].latency else None
    points: list[tuple[int, str, list[float]]] = []
    for index, model in enumerate(models):
        values = [value for key in keys if (value := model.value(key)) is not None]
        if model.latency and model.latency.machine == home and len(values) == len(keys):
            points.append((index, model.label, values))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        largest = max(parameters for *_, (_, _, parameters) in points)
        for index, label, (speed, nll, parameters) in points:
            text, area = _plain(f"{label}, {parameters / 1e6:,.1f} M"), max(1500 * parameters / largest, 20)
            axes.scatter(speed, nll, s=area, color=_colour(index), alpha=0.8, linewidths=0)
            axes.plot([], [], "o", color=_colour(index), markersize=5, label=text)
        axes.margins(x=0.15, y=0.25)
        axes.set(xlabel="decoded tokens per second (right is faster)", ylabel="held-out NLL (lower is better)")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid()
        figure.legend(loc="outside upper center", fontsize=8, ncols=2)

    words = [
        f"{label}: {speed:,.1f} tokens per second, NLL {nll:.3f}, {parameters:,} parameters"
        for _, label, (speed, nll, parameters) in points
    ]
    return Plot(draw=draw, alt=f"Scatter plot. {'; '.join(words)}.") if len(points) > 1 else None


def calibration_plot(models: Sequence[Model]) -> Plot | None:
    """Draw how often the most likely id is right against how sure the model is of it."""
    lines: list[Line] = []
    counts: list[list[int]] = []
    words = []
    for index, model in enumerate(models):
        bins = model.fidelity.ece_bins if model.fidelity and model.value("ece") is not None else []
        points = [(b.confidence, b.accuracy) for b in bins if b.confidence is not None and b.accuracy is not None]
        if points:
            lines.append((model.label, points, {"color": _colour(index)}))
            counts.append([b.count for b in bins if b.count])
            sure, right = np.average(points, axis=0, weights=counts[-1])
            words.append(f"{model.label}: on average {sure:.0%} sure, {right:.0%} right")

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot((0, 1), (0, 1), color=rcParams["text.color"], linestyle=":", linewidth=0.8)
        _draw_lines(axes, lines, xlim=(0, 1), ylim=(0, 1), xlabel="probability of the most likely token",
                    ylabel="share that is the text's token")  # fmt: skip
        for (_, points, style), weights in zip(lines, counts, strict=True):
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=[4 + 60 * n / sum(weights) for n in weights], **style)

    return Plot(draw=draw, alt=f"Reliability curves. {'; '.join(words)}.") if lines else None


def proof_plot(proof: Proof) -> Plot | None:
    """Draw each variant's paired differences from the first one in test NLL and KL, seed by seed and with intervals."""
    baseline = proof.variants[0]
    rows = [(variant, variant.versus_ce) for variant in proof.variants if variant.versus_ce]

    def draw(figure: Figure) -> None:
        panels = {"test_nll": "test NLL", "test_kl": "KL to the teacher"}
        for axes, (key, label) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
            axes.axvline(0, color=rcParams["text.color"], linewidth=0.8)
            for row, (variant, versus) in enumerate(rows):
                paired = versus if key == "test_nll" else versus.kl
                colour = "C1" if paired.significant else "C0"
                axes.plot(paired.ci95, (row, row), color=colour)
                seeds = np.subtract(getattr(variant, key).seeds, getattr(baseline, key).seeds)
                axes.plot(seeds, [row] * len(seeds), "o", color=colour, markersize=3, alpha=0.5)
                axes.plot(paired.difference, row, "|", color=colour, markersize=9, markeredgewidth=2)
            axes.set_xlabel(f"{label} − that of {_plain(baseline.name)}, nats per token")
            axes.grid(axis="x")
            axes.margins(y=0.12)
        axes.set_yticks(range(len(rows)), [_plain(variant.name) for variant, _ in rows])
        axes.invert_yaxis()

    words = [f"{variant.name}: {versus.difference:+.3f}{_interval(versus.ci95, '+')}" for variant, versus in rows]
    alt = f"Differences of the test NLL to cross-entropy. {'; '.join(words)}."
    return Plot(draw=draw, alt=alt, size=(8.4, 1.2 + 0.34 * len(rows))) if rows else None
