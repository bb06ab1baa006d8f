"""The report's plots, each drawn twice: for a light and for a dark page."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shared.eval.report.tables import Model
from shared.eval.results import Interval, Proof


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
        images: data URIs of the SVG by theme, `light` and `dark`.
    """

    title: str
    caption: str
    alt: str
    images: Mapping[str, str]


def _plot(
    draw: Callable[[Figure], None], *, title: str, caption: str, alt: str, width: float = WIDTH, height: float = HEIGHT
) -> Plot:
    images = {}
    for name, theme in THEMES.items():
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE | theme | {"svg.hashsalt": title}):  # equal data gives equal bytes
            figure = Figure(figsize=(width, height), layout="constrained")
            draw(figure)
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        images[name] = f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Plot(title=title, caption=caption, alt=alt, images=images)


def _colour(index: int) -> str:
    """The colour of a model by its place in the report; the teacher's, the first, is never given to a student."""
    return "C0" if index == 0 else f"C{1 + (index - 1) % NUM_STUDENT_COLOURS}"


def _plain(text: str) -> str:
    """A name as text and not as matplotlib's mathematics, on one line, and not longer than a drawing can hold."""
    text = " ".join(text.split()).replace("$", r"\$")
    return text if len(text) <= 40 else f"{text[:39]}…"


def _interval(interval: Sequence[float] | None, sign: str = "") -> str:
    return f" ({interval[0]:{sign}.3f} to {interval[1]:{sign}.3f})" if interval else ""


def training_plot(logs: Mapping[str, Sequence[Mapping[str, Any]]], key: str, title: str, caption: str) -> Plot | None:
    """Draw one logged loss against the step, with its held-out counterpart `eval_<key>` where there is one.

    Args:
        logs: by label of the students, in the report's order, the records of `training_log.jsonl`.
        key: the loss, in nats per token.
        title: the heading.
        caption: what the reader should know.
    """
    lines: list[tuple[str, list[tuple[int, float]], dict[str, Any], str]] = []
    for index, (label, records) in enumerate(logs.items(), 1):
        train, held_out = _series(records, key), _series(records, f"eval_{key}")
        colour = _colour(index)
        if train:
            words = f"{label}: from {train[0][1]:.2f} to {train[-1][1]:.2f} in training"
            lines.append((label, train, {"color": colour, "alpha": 0.45 if held_out else 1}, words))
        if held_out:
            name = f"{label}, held out"
            words = f"{name}: {held_out[-1][1]:.2f} at the end"
            lines.append((name, held_out, {"color": colour, "marker": "o", "markersize": 3}, words))
    if not lines:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for label, points, style, _ in lines:
            axes.plot(*zip(*points, strict=True), label=_plain(label), **style)
        axes.set(xlabel="optimizer step", ylabel="nats per token")
        axes.grid(axis="y")
        axes.legend(fontsize=8)

    alt = f"{title} by step. {'; '.join(words for *_, words in lines)}."
    return _plot(draw, title=title, caption=caption, alt=alt)


def _series(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) where the key was logged; of a step logged again after a resume, the last."""
    return sorted({r["step"]: r[key] for r in records if r.get(key) is not None and "step" in r}.items())


def mass_plot(caches: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Plot | None:
    """Draw the teacher's probability mass inside the cached rows by temperature.

    Args:
        caches: by the cache's name, {temperature: {"mean", "p1", "p10"}}, shares in [0, 1].
    """
    if not caches:
        return None
    points = {
        name: sorted((float(T), mass) for T, mass in masses.items() if mass["mean"] is not None)
        for name, masses in caches.items()
    }

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, (name, row) in enumerate(points.items(), 1):
            x, colour = [T for T, _ in row], _colour(index)
            axes.plot(x, [m["mean"] for _, m in row], color=colour, marker="o", markersize=3.5, label=_plain(name))
            axes.plot(x, [m["p10"] for _, m in row], color=colour, linestyle=":",
                      label=f"{_plain(name)}, 10th percentile")  # fmt: skip
            axes.set_xticks(x)
        axes.set(xlabel="temperature T", ylabel="mass inside the top-k", ylim=(0, 1.03))
        axes.grid(axis="y")
        axes.legend(fontsize=8, loc="lower left")

    words = [f"{name}: " + ", ".join(f"{m['mean']:.3f} at T={T:g}" for T, m in row) for name, row in points.items()]
    return _plot(
        draw,
        title="Teacher mass captured by the cache",
        caption="Mean over tokens of the probability that the cached ids hold; the rest is one tail value.",
        alt=f"Captured mass by temperature. {'; '.join(words)}.",
    )


def fidelity_plot(models: Sequence[Model]) -> Plot | None:
    """Draw held-out NLL and KL to the teacher as bars with their 95 % intervals."""
    panels = {"heldout_nll_nats": "NLL, nats per token", "kl_to_teacher_nats": "KL to the teacher, nats per token"}
    panels = {key: name for key, name in panels.items() if any(model.value(key) is not None for model in models)}
    if not panels:
        return None

    def draw(figure: Figure) -> None:
        for axes, (key, name) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
            for row, model in enumerate(models):
                _bar(axes, row, model.value(key), model.interval(key))
            axes.set_yticks(range(len(models)), [_plain(model.label) for model in models])
            axes.invert_yaxis()
            axes.set_title(name)
            axes.margins(x=0.18)
            axes.set_xlim(left=0)
            axes.tick_params(axis="y", length=0)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)

    words = [
        f"{model.label} {name}: {value:.3f}{_interval(model.interval(key))}"
        for key, name in panels.items()
        for model in models
        if (value := model.value(key)) is not None
    ]
    return _plot(
        draw,
        title="Held-out NLL and KL to the teacher",
        caption="Lower is better in both: NLL against the text, KL against the teacher's distribution. "
        "Lines: 95% intervals over documents, where known.",
        alt=f"Bars. {'; '.join(words)}.",
        height=len(panels) * (0.55 + 0.3 * max(len(models), 3)),
    )


def _bar(axes: Axes, row: int, value: float | None, interval: Interval | None) -> None:
    end = value or 0
    axes.barh(row, end, color=_colour(row), height=0.62)
    if interval:
        axes.plot(interval, (row, row), color=rcParams["text.color"], linewidth=1)
        end = max(end, interval[1])
    text = "not measured" if value is None else f"{value:.3f}"
    axes.annotate(text, (end, row), (3, 0), textcoords="offset points", va="center")


def tradeoff_plot(models: Sequence[Model]) -> Plot | None:
    """Draw speed against quality, with the size as the disc's area, of the models timed on the teacher's machine."""
    keys = ("decode_tokens_per_second", "heldout_nll_nats", "parameters")
    home = models[0].latency.machine if models[0].latency else None
    found = [
        (index, model.label, *values)
        for index, model in enumerate(models)
        if model.latency and model.latency.machine == home
        and None not in (values := [model.value(key) for key in keys])
    ]  # fmt: skip
    points: list[tuple[int, str, float, float, float]] = [tuple(point) for point in found]  # type: ignore[misc]
    if len(points) < 2:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        largest = max(parameters for *_, parameters in points)
        for index, label, speed, nll, parameters in points:
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
        for _, label, speed, nll, parameters in points
    ]
    return _plot(
        draw,
        title="Size, speed and quality",
        caption="A disc's area is the number of parameters. All speeds are from one machine.",
        alt=f"Scatter plot. {'; '.join(words)}.",
    )


def calibration_plot(models: Sequence[Model]) -> Plot | None:
    """Draw how often the most likely id is right against how sure the model is of it."""
    curves = [
        (index, model.label, [
            (b.confidence, b.accuracy, b.count) for b in model.fidelity.ece_bins
            if b.confidence is not None and b.accuracy is not None
        ])
        for index, model in enumerate(models)
        if model.fidelity and model.value("ece") is not None
    ]  # fmt: skip
    if not curves:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot((0, 1), (0, 1), color=rcParams["text.color"], linestyle=":", linewidth=0.8)
        for index, label, bins in curves:
            x, y, counts = zip(*bins, strict=True)
            axes.plot(x, y, color=_colour(index), label=_plain(label))
            axes.scatter(x, y, s=[4 + 60 * n / sum(counts) for n in counts], color=_colour(index), linewidths=0)
        axes.set(xlabel="probability of the most likely token", ylabel="share that is the text's token",
                 xlim=(0, 1), ylim=(0, 1))  # fmt: skip
        axes.grid()
        axes.legend(fontsize=8, loc="upper left")

    words = []
    for _, label, bins in curves:
        total = sum(n for *_, n in bins)
        sure, right = (sum(b[part] * b[2] for b in bins) / total for part in (0, 1))
        words.append(f"{label}: on average {sure:.0%} sure, {right:.0%} right")
    return _plot(
        draw,
        title="Calibration on held-out text",
        caption="On the dotted line a model is as often right as it is sure; below it, it is too sure. "
        "A dot's size is its share of tokens.",
        alt=f"Reliability curves. {'; '.join(words)}.",
    )


def proof_plot(proof: Proof) -> Plot | None:
    """Draw each variant's difference from cross-entropy on the test set with its paired interval over seeds."""
    known = [(variant.name, variant.versus_ce) for variant in proof.variants if variant.versus_ce]
    if not known:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=rcParams["text.color"], linewidth=0.8)
        for row, (_, versus) in enumerate(known):
            colour = "C1" if versus.significant else "C0"
            axes.plot(versus.ci95, (row, row), color=colour)
            axes.plot(versus.difference, row, color=colour, marker="o", markersize=4)
        axes.set_yticks(range(len(known)), [_plain(name) for name, _ in known])
        axes.invert_yaxis()
        axes.margins(y=0.12)
        axes.set(xlabel="test NLL minus cross-entropy's, nats per token (left is better)")
        axes.grid(axis="x")

    words = [f"{name}: {versus.difference:+.3f}{_interval(versus.ci95, '+')}" for name, versus in known]
    return _plot(
        draw,
        title="Against cross-entropy, over paired seeds",
        caption="Dots: mean over seeds; lines: 95% paired t-interval. Grey where the interval holds 0.",
        alt=f"Differences to cross-entropy. {'; '.join(words)}.",
        width=1.2 * WIDTH,
        height=0.9 + 0.28 * len(known),
    )
