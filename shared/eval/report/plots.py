"""Plots of the report, each drawn for a light and for a dark page; the proof and sweeps draw by the same functions."""

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

from shared.eval.report.tables import Measured, Model
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
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}
NUM_STUDENT_COLOURS = 5
WIDTH, HEIGHT = 4.4, 3.0  # inches; small, so that text stays readable on a narrow page


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One drawing: the heading above it, a caption below it, and what it shows in words.

    Args:
        draw: draws it into an empty figure.
        size: width and height in inches.
    """

    title: str
    draw: Callable[[Figure], None]
    caption: str = ""
    alt: str = ""
    size: tuple[float, float] = (WIDTH, HEIGHT)

    def svg(self, theme: str = "light", *, transparent: bool = False) -> bytes:
        """The drawing as SVG; equal data gives equal bytes."""
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE | THEMES[theme] | {"svg.hashsalt": self.title}):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure)
            figure.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None, "Creator": None})
        return buffer.getvalue()

    @property
    def images(self) -> dict[str, str]:
        """Data URIs of the drawing by theme, for a page of that theme."""
        drawings = {theme: base64.b64encode(self.svg(theme, transparent=True)).decode() for theme in THEMES}
        return {theme: f"data:image/svg+xml;base64,{drawing}" for theme, drawing in drawings.items()}


def _colour(index: int) -> str:
    """The colour of a model by its place in the report; the teacher's, the first, is never given to a student."""
    return "C0" if index == 0 else f"C{1 + (index - 1) % NUM_STUDENT_COLOURS}"


def _plain(text: str) -> str:
    """A name as text and not as matplotlib's mathematics, on one line, and not longer than a drawing can hold."""
    text = " ".join(text.split()).replace("$", r"\$")
    return text if len(text) <= 40 else f"{text[:39]}…"


def _interval(interval: Sequence[float] | None, sign: str = "") -> str:
    return f" ({interval[0]:{sign}.3f} to {interval[1]:{sign}.3f})" if interval else ""


Line = tuple[str, Sequence[tuple[float, float]], dict[str, Any]]  # label, points, style


def _draw_lines(axes: Axes, lines: Sequence[Line], legend: str, **settings: Any) -> None:
    for label, points, style in lines:
        axes.plot(*zip(*points, strict=True), label=_plain(label), **style)
    axes.set(**settings)
    axes.grid(axis="y")
    axes.legend(fontsize=8, loc=legend)  # type: ignore[call-overload]  # one of matplotlib's places


def training_plot(logs: Mapping[str, Sequence[Mapping[str, Any]]], key: str, title: str, caption: str) -> Plot | None:
    """Draw one logged loss against the step, with its held-out counterpart `eval_<key>` where there is one.

    Args:
        logs: by label of the students, in the report's order, the records of `training_log.jsonl`.
        key: the loss, in nats per token.
        title: the heading.
        caption: what the reader should know.
    """
    lines: list[Line] = []
    words = []
    for index, (label, records) in enumerate(logs.items(), 1):
        train, held_out = _series(records, key), _series(records, f"eval_{key}")
        if train:
            lines.append((label, train, {"color": _colour(index), "alpha": 0.45 if held_out else 1}))
            words.append(f"{label}: from {train[0][1]:.2f} to {train[-1][1]:.2f} in training")
        if held_out:
            lines.append((f"{label}, held out", held_out, {"color": _colour(index), "marker": "o", "markersize": 3}))
            words.append(f"{label}, held out: {held_out[-1][1]:.2f} at the end")
    if not lines:
        return None
    return Plot(
        title=title,
        caption=caption,
        alt=f"{title} by step. {'; '.join(words)}.",
        draw=lambda figure: _draw_lines(
            figure.subplots(), lines, "best", xlabel="optimizer step", ylabel="nats per token"
        ),
    )


def _series(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) where the key was logged; of a step logged again after a resume, the last."""
    return sorted({r["step"]: r[key] for r in records if r.get(key) is not None and "step" in r}.items())


def mass_plot(caches: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Plot | None:
    """Draw the teacher's probability mass inside the cached rows by temperature.

    Args:
        caches: by the cache's name, {temperature: {"mean", "p1", "p10"}}, shares in [0, 1].
    """
    lines: list[Line] = []
    words, ticks = [], set()
    for index, (name, masses) in enumerate(caches.items(), 1):
        known = sorted((float(T), mass) for T, mass in masses.items() if mass["mean"] is not None)
        means, tenths = ([(T, mass[key]) for T, mass in known] for key in ("mean", "p10"))
        lines.append((name, means, {"color": _colour(index), "marker": "o", "markersize": 3.5}))
        lines.append((f"{name}, 10th percentile", tenths, {"color": _colour(index), "linestyle": ":"}))
        words.append(f"{name}: " + ", ".join(f"{mean:.3f} at T={T:g}" for T, mean in means))
        ticks |= {T for T, _ in known}
    if not ticks:
        return None
    return Plot(
        title="Teacher mass captured by the cache",
        caption="Mean over tokens of the probability that the cached ids hold; the rest is one tail value.",
        alt=f"Captured mass by temperature. {'; '.join(words)}.",
        draw=lambda figure: _draw_lines(
            figure.subplots(), lines, "lower left", xticks=sorted(ticks), ylim=(0, 1.03),
            xlabel="temperature T", ylabel="mass inside the top-k",
        ),
    )  # fmt: skip


def fidelity_plot(models: Sequence[Model]) -> Plot | None:
    """Draw held-out NLL and KL to the teacher as bars with their 95 % intervals."""
    panels = {"heldout_nll_nats": "NLL, nats per token", "kl_to_teacher_nats": "KL to the teacher, nats per token"}
    figures = {name: [model.measured(key) for model in models] for key, name in panels.items()}
    figures = {name: measured for name, measured in figures.items() if any(m.value is not None for m in measured)}
    if not figures:
        return None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(figures), 1, squeeze=False)[:, 0]
        for axes, (name, measured) in zip(panels, figures.items(), strict=True):
            for row, each in enumerate(measured):
                _bar(axes, row, each)
            axes.set_yticks(range(len(models)), [_plain(model.label) for model in models])
            axes.invert_yaxis()
            axes.set_title(name)
            axes.margins(x=0.18)
            axes.set_xlim(left=0)
            axes.tick_params(axis="y", length=0)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)

    words = [
        f"{model.label} {name}: {each.value:.3f}{_interval(each.ci95)}"
        for name, measured in figures.items()
        for model, each in zip(models, measured, strict=True)
        if each.value is not None
    ]
    return Plot(
        title="Held-out NLL and KL to the teacher",
        caption="Lower is better in both: NLL against the text, KL against the teacher's distribution. "
        "Lines: 95% intervals over documents, where known.",
        alt=f"Bars. {'; '.join(words)}.",
        draw=draw,
        size=(WIDTH, len(figures) * (0.55 + 0.3 * max(len(models), 3))),
    )


def _bar(axes: Axes, row: int, measured: Measured) -> None:
    end = measured.value or 0
    axes.barh(row, end, color=_colour(row), height=0.62)
    if measured.ci95:
        axes.plot(measured.ci95, (row, row), color=rcParams["text.color"], linewidth=1)
        end = max(end, measured.ci95[1])
    text = "not measured" if measured.value is None else f"{measured.value:.3f}"
    axes.annotate(text, (end, row), (3, 0), textcoords="offset points", va="center")


def tradeoff_plot(models: Sequence[Model]) -> Plot | None:
    """Draw speed against quality, with the size as the disc's area, of the models timed on the teacher's machine."""
    keys = ("decode_tokens_per_second", "heldout_nll_nats", "parameters")
    home = models[0].latency.machine if models[0].latency else None
    points: list[tuple[int, str, list[float]]] = []
    for index, model in enumerate(models):
        values = [value for key in keys if (value := model.value(key)) is not None]
        if model.latency and model.latency.machine == home and len(values) == len(keys):
            points.append((index, model.label, values))
    if len(points) < 2:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        largest = max(parameters for *_, (_, _, parameters) in points)
        for index, label, (speed, nll, parameters) in points:
            area, colour = max(1500 * parameters / largest, 20), _colour(index)
            axes.scatter(speed, nll, s=area, color=colour, alpha=0.8, linewidths=0)
            axes.plot([], [], color=colour, marker="o", linestyle="", markersize=5,
                      label=_plain(f"{label}, {parameters / 1e6:,.1f} M"))  # fmt: skip
        axes.set(xlabel="decoded tokens per second (right is faster)", ylabel="held-out NLL (lower is better)")
        axes.margins(x=0.15, y=0.25)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid()
        figure.legend(loc="outside upper center", fontsize=8, ncols=2)

    words = [
        f"{label}: {speed:,.1f} tokens per second, NLL {nll:.3f}, {parameters:,} parameters"
        for _, label, (speed, nll, parameters) in points
    ]
    return Plot(
        title="Size, speed and quality",
        caption="A disc's area is the number of parameters. All speeds are from one machine.",
        alt=f"Scatter plot. {'; '.join(words)}.",
        draw=draw,
    )


def calibration_plot(models: Sequence[Model]) -> Plot | None:
    """Draw how often the most likely id is right against how sure the model is of it."""
    curves: list[tuple[Line, list[int]]] = []
    words = []
    for index, model in enumerate(models):
        if model.fidelity is None or model.value("ece") is None:
            continue
        bins = [(b.confidence, b.accuracy, b.count) for b in model.fidelity.ece_bins
                if b.confidence is not None and b.accuracy is not None]  # fmt: skip
        counts = [count for *_, count in bins]
        points = [(sure, right) for sure, right, _ in bins]
        curves.append(((model.label, points, {"color": _colour(index)}), counts))
        sure, right = (float(np.average([point[i] for point in points], weights=counts)) for i in (0, 1))
        words.append(f"{model.label}: on average {sure:.0%} sure, {right:.0%} right")
    if not curves:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot((0, 1), (0, 1), color=rcParams["text.color"], linestyle=":", linewidth=0.8)
        for (_, points, style), counts in curves:
            sizes = [4 + 60 * count / sum(counts) for count in counts]
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=sizes, linewidths=0, **style)
        axes.grid(axis="x")
        _draw_lines(axes, [line for line, _ in curves], "upper left", xlim=(0, 1), ylim=(0, 1),
                    xlabel="probability of the most likely token", ylabel="share that is the text's token")  # fmt: skip

    return Plot(
        title="Calibration on held-out text",
        caption="On the dotted line a model is as often right as it is sure; below it, it is too sure. "
        "A dot's size is its share of tokens.",
        alt=f"Reliability curves. {'; '.join(words)}.",
        draw=draw,
    )


def proof_plot(proof: Proof) -> Plot | None:
    """Draw each variant's paired differences from the first one in test NLL and KL, seed by seed and with intervals."""
    baseline, *_ = proof.variants
    rows = [(variant, variant.versus_ce) for variant in proof.variants if variant.versus_ce]
    if not rows:
        return None

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
    return Plot(
        title="Against cross-entropy, over paired seeds",
        caption="Left is better. Marks: mean over seeds; dots: each seed; lines: 95% paired t-intervals, grey if they "
        "hold 0.",
        alt=f"Differences of the test NLL to cross-entropy. {'; '.join(words)}.",
        draw=draw,
        size=(8.4, 1.2 + 0.34 * len(rows)),
    )
