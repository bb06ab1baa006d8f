"""The data set card of a cache on the Hub."""

import io
from collections.abc import Mapping
from typing import Any

PLOT = "captured_mass.png"


def card(info: Mapping[str, Any], repo_id: str) -> str:
    """The data set card of a cache: what it is, whose, its figures, how to train from it."""
    licenses = sorted({str(source["license"]) for source in info["sources"] if source.get("license")})
    front = ["---", "tags:", "- code", "- knowledge-distillation", "- codedistill"]
    front += ["license: other", f"license_name: {' AND '.join(licenses)!r}"] if licenses else []
    teacher, statistics = info["teacher"] or {}, info["statistics"]
    rows = [
        ("documents", f"{info['num_documents']:,} in {info['num_shards']:,} shards"),
        ("tokens", f"{info['num_tokens']:,}, {statistics['targets']:,} of them targets"),
        ("entries", f"{info['num_entries']:,} (top-k {info['top_k']})"),
        ("size", f"{info['total_bytes']:,} bytes, {info['bytes_per_token']:.1f} per token for the labels"),
        ("label identity", f"`{info['label_identity']}`"),
        ("teacher", f"{teacher.get('name')}, commit {teacher.get('commit') or 'unknown'}"),
    ]
    masses = [
        f"| {T} | {mass['mean']:.4f} | {mass['p10']:.4f} | {mass['p1']:.4f} | {info['encoding_kl_mean_nats'][T]:.1e} |"
        for T, mass in statistics["captured_mass"].items()
    ]
    sources = [
        f"- {source.get('name')} ({source.get('split')}), license {source.get('license') or 'not stated'}"
        for source in info["sources"]
    ]
    return "\n".join([
        *front, "---", "",
        f"# Logits of {teacher.get('name')}", "",
        "A codedistill cache: for every token of its documents the teacher's most probable next tokens with their",
        "logits, and the exact probability mass of all others. A student trains from it without the teacher:", "",
        "```bash",
        f"codedistill student train --cache hf://datasets/{repo_id} --out runs/student",
        "```", "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows), "",
        "## Captured mass", "",
        f"![Captured mass by temperature]({PLOT})", "",
        "| T | mean | p10 | p1 | encoding KL, nats |", "|---|---|---|---|---|", *masses, "",
        "## Sources and licenses", "",
        *sources, "",
    ])  # fmt: skip


def plot(captured_mass: Mapping[str, Mapping[str, float | None]]) -> bytes:
    """Bars of the captured mass by temperature, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes, out = figure.subplots(), io.BytesIO()
    for at, key in enumerate(("mean", "p10", "p1")):
        places = [number + 0.27 * (at - 1) for number in range(len(captured_mass))]
        axes.bar(places, [mass[key] or 0 for mass in captured_mass.values()], 0.25, label=key)
    axes.set_xticks(range(len(captured_mass)), list(captured_mass))
    axes.set(xlabel="temperature", ylabel="probability mass in the rows", ylim=(0, 1))
    axes.legend(loc="lower left")
    figure.savefig(out, format="png", dpi=120, metadata={"Software": None})
    return out.getvalue()
