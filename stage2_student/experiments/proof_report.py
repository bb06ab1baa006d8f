"""The proof on one page: a table, the sentences and a plot."""

import io
from collections.abc import Mapping, Sequence
from typing import Any


def page(result: Mapping[str, Any]) -> str:
    """Markdown: what was found, every arm and every comparison, and what it was made from."""
    settings = result["settings"]
    caches = settings["caches"]
    words = [
        "# The proof",
        "",
        *(f"- {sentence}" for sentence in result["summary"]),
        "",
        "NLL of the text and KL(teacher‖student), K+1 partition at T = 1, in nats per target of the test cache; "
        f"mean and standard deviation over seeds {', '.join(map(str, settings['seeds']))}.",
        "",
        *_table(
            ["arm", "learning rate", "epochs", "test NLL", "sd", "test KL", "sd"],
            [
                [arm["name"], f"{arm['learning_rate']:g}", f"{arm['epochs']}",
                 f"{arm['test_nll']['mean']:.4f}", f"{arm['test_nll']['sd']:.4f}",
                 f"{arm['test_kl']['mean']:.4f}", f"{arm['test_kl']['sd']:.4f}"]
                for arm in result["arms"]
            ],
        ),
        "",
        "Paired differences, arm − other, with Student's 95 % intervals; bold where the interval excludes 0.",
        "",
        *_table(
            ["arm", "other", "NLL", "95 %", "p", "p (Holm)", "KL", "95 %"],
            [
                [row["arm"], row["versus"], *_difference(row), f"{row['p']:.2g}", f"{row['p_holm']:.2g}",
                 *_difference(row["kl"])]
                for row in result["comparisons"]
            ],
        ),
        "",
        "| cache | documents | tokens | shards (SHA-256) |",
        "|---|---|---|---|",
        *(
            f"| {name} | {cache['documents']:,} | {cache['tokens']:,} | "
            f"{' '.join(digest[:16] for digest in cache['shards'].values())} |"
            for name, cache in caches.items()
        ),
        "",
        f"Labels `{caches['train']['label_identity'][:16]}`; {result['seconds'] / 60:.0f} minutes of training in all "
        f"on {result['machine']['processor']} ({result['machine']['cores']} cores); "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + ".",
        "",
    ]  # fmt: skip
    return "\n".join(words)


def plot(result: Mapping[str, Any]) -> bytes:
    """Draw each arm's paired differences from the first arm in NLL and KL, seed by seed and with intervals; SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    baseline, *arms = result["arms"]
    at = range(len(arms), 0, -1)
    with matplotlib.rc_context({"svg.hashsalt": "proof", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(8.4, 1.2 + 0.34 * len(arms)), layout="constrained")
        for axes, (key, label) in zip(
            figure.subplots(1, 2, sharey=True),
            {"test_nll": "test NLL", "test_kl": "KL to the teacher"}.items(),
            strict=True,
        ):
            axes.axvline(0, color="#808080", linewidth=0.8)
            for y, arm in zip(at, arms, strict=True):
                row = arm["versus_ce"] if key == "test_nll" else arm["versus_ce"]["kl"]
                low, high = row["ci95"]
                axes.plot([low, high], [y, y], color="#2050a0", linewidth=2)
                each = [ours - theirs for ours, theirs in zip(arm[key]["seeds"], baseline[key]["seeds"], strict=True)]
                axes.plot(each, [y] * len(each), "o", color="#2050a0", markersize=3, alpha=0.5)
                axes.plot([row["difference"]], [y], "|", color="#102850", markersize=10, markeredgewidth=2)
            axes.set_yticks(list(at), [arm["name"] for arm in arms])
            axes.set_xlabel(f"{label} − that of {baseline['name']}, nats per target")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _difference(row: Mapping[str, Any]) -> list[str]:
    low, high = row["ci95"]
    mean = f"{row['difference']:+.4f}"
    return [f"**{mean}**" if row["significant"] else mean, f"{low:+.4f} to {high:+.4f}"]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
