"""What the report says in words: the headline, how the figures came about and what they do not show."""

from collections.abc import Mapping, Sequence
from typing import Any

from shared.eval.report.tables import BENCHMARKS, LABELS, Models, compare, count, mapping, signed, solved

FULL_SIZES = {"humaneval": 164, "mbpp": 500}
LEAST_PROMPTS = 10
FREE = {"alpha"}  # what may differ between a student and its twin


def roles(models: Models) -> tuple[str | None, str | None]:
    """The student that the report is about and its twin, the one trained without soft labels; None where missing."""
    students = [name for name in models if name != "teacher"]

    def alpha(name: str) -> Any:
        return (models[name]["settings"].get("run", {}).get("config") or {}).get("alpha")

    twin = "student_ce" if "student_ce" in students else next((n for n in students if alpha(n) == 0), None)
    others = [name for name in students if name != twin]
    student = "student_kd" if "student_kd" in others else next(iter(others), twin)
    return student, None if twin == student else twin


def headline(models: Models, differences: Sequence[Mapping[str, Any]], proof: Mapping[str, Any] | None) -> list[str]:
    """Sentences made of measured figures alone; the first one is the title."""
    name, twin_name = roles(models)
    if name is None:
        return ["No student has been measured yet."]
    student, twin = models[name], models[twin_name] if twin_name else None
    label = _the(student)
    ratios, sentences, clauses = student["ratios_to_teacher"], [], []
    if ratios["parameters"]:
        clauses.append(f"is {compare(ratios['parameters'], 'smaller', 'larger')} than its teacher")
    if ratios["decode_tokens_per_second"]:
        clauses.append(f"decodes {compare(ratios['decode_tokens_per_second'], 'slower', 'faster')}")
    if clauses:
        sentences.append(f"{label} {' and '.join(clauses)}.")
    paired: list[dict[str, Any]] = next((d["rows"] for d in differences if d["student"] == name), [])
    for key, words in (("kl_to_teacher_nats", "KL to the teacher"), ("heldout_nll_nats", "held-out NLL")):
        if student[key] is None:
            continue
        owner = "Its" if sentences else f"{label}'s"
        sentence = f"{owner} {words} is {student[key]:.3f} nats per token"
        if key == "heldout_nll_nats" and models["teacher"][key] is not None:
            sentence += f", its teacher's {models['teacher'][key]:.3f}"
        if twin is not None and twin[key] is not None:
            sentence += f", its cross-entropy twin's {twin[key]:.3f}"
            row = next((row for row in paired if row["figure"].lower().startswith(words.lower())), None)
            if row and row["ci95"]:
                low, high = row["ci95"]
                sentence += f" (difference {signed(row['difference'])}, 95% interval {signed(low)} to {signed(high)})"
        sentences.append(f"{sentence}.")
    for key, benchmark in BENCHMARKS.items():
        scores = [f"{_plain(m)} {_scored(m[key])}" for m in models.values() if solved(m.get(key))]
        if scores:
            how = "pass@1" if any((m.get(key) or {}).get("sampled") for m in models.values()) else "solved, greedy"
            sentences.append(f"{benchmark} problems {how}: {', '.join(scores)}.")
    if student["acceptance_rate"] is not None:
        speedup = student["draft_speedup"]
        kept = f"{student['acceptance_rate']:.0%}"
        sentence = f"As its teacher's draft in speculative decoding, {kept} of its tokens are accepted"
        if speedup is not None:
            sentence += f" and the teacher runs at {speedup:.2f}× its speed"
        equal = mapping(student["settings"].get("draft")).get("equal_to_greedy") is True
        sentences.append(f"{sentence}{', its text unchanged' if equal else ''}.")
    sentences += _proved(proof or {})
    return sentences or [f"Nothing has been measured yet for {', '.join(n for n in models if n != 'teacher')}."]


def _proved(proof: Mapping[str, Any]) -> list[str]:
    """What the proof found of its `ghost` arm of most entries, in a sentence; none where it has no such arm."""
    arms = [arm for arm in proof.get("variants") or [] if arm.get("loss") == "ghost" and arm.get("versus_ce")]
    if not arms:
        return []
    best = max(arms, key=lambda arm: (arm.get("k") or 0, arm.get("alpha") != 1))
    found, seeds = best["versus_ce"], best["test_nll"]["seeds"]
    low, high = found["ci95"]
    says = "differs from that of cross-entropy" if found["significant"] else "shows no difference from cross-entropy"
    return [
        f"Over {len(seeds)} paired seeds, of a smaller student on fewer documents, the test NLL of {best['name']} "
        f"{says}: {signed(found['difference'])} nats per token, 95% interval {signed(low)} to {signed(high)}."
    ]


def background(models: Models, caches: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was done, for a reader who has never seen the project; only what the results record."""
    name, twin_name = roles(models)
    manifest = next((cache for cache in caches if "sources" in cache), None)
    sentences = []
    if manifest is not None:
        teacher = manifest["identity"]["teacher"].get("name") if "identity" in manifest else None
        data = ", ".join(str(s.get("name")) for s in manifest["sources"])
        tokens = manifest.get("num_tokens")
        sentences.append(
            f"The teacher{f', {teacher},' if teacher else ''} read a data set ({data}) once"
            + (f", {count(tokens)} tokens," if tokens else "")
            + f" and the {manifest.get('top_k', '')} most likely next tokens at every position were kept: the cache."
        )
    ours, theirs = (_run(models[n]) if n else {} for n in (name, twin_name))
    if ours:
        start = "from given weights" if ours.get("init_from") else "from random weights"
        sentences.append(
            f"A student, a smaller network that starts {start}, learnt from that cache; the teacher took no part."
        )
    if ours and theirs:
        first = ours.get("initial_weights_sha256")
        same = f" from the same first weights ({str(first)[:12]})"
        sentences.append(
            f"Its twin is the same network{same if first and first == theirs.get('initial_weights_sha256') else ''}, "
            "trained on the text of the same documents without the teacher's probabilities."
        )
    held_out = [m["settings"]["fidelity"] for m in models.values() if "fidelity" in m["settings"]]
    if held_out and all(f.get("seen_in_training") is False for f in held_out if "seen_in_training" in f):
        documents, targets = held_out[0].get("num_documents"), held_out[0].get("num_targets")
        if documents and targets:
            sentences.append(
                f"Held-out figures are over {targets:,} tokens of {documents:,} documents kept from training."
            )
    if held_out:
        sentences.append(
            "NLL is how much a text surprises a model, KL how far its probabilities are from the teacher's; both are "
            "at best 0, and worse the larger."
        )
    return sentences


def caveats(models: Models, proof: Mapping[str, Any] | None = None) -> list[str]:
    """What the figures do not show, in plain sentences."""
    teacher = models["teacher"]
    name, twin_name = roles(models)
    student, twin = (models[n] if n else None for n in (name, twin_name))
    sentences = [
        "Each student was trained once, with one seed. One seed proves nothing: a difference between two students "
        "may be chance. A claim needs several paired seeds and an interval that excludes zero"
        + (": see “Over several seeds”." if proof else ".")
    ]
    if any(m["ci95"] or m["humaneval"]["ci95"] for m in models.values()):
        sentences.append(
            "Intervals cover the choice of test documents or problems, or the repeats of one timing, and not seeds. "
            "Each is 95% by itself: of twenty, one misses."
        )
    if student and twin:
        sentences += _twin_caveats(student, twin)
    for key, benchmark in BENCHMARKS.items():
        sentences += _benchmark_caveat(models, key, benchmark)
    sentences += _fidelity_caveats(models)
    if teacher["parameters"] and teacher["parameters"] < 1e9:
        sentences.append(
            f"The teacher is small ({count(teacher['parameters'])} parameters). The run shows that the pipeline works, "
            "not what a strong teacher would give."
        )
    drafts = [mapping(m["settings"].get("draft")) for m in models.values()]
    if any(draft.get("equal_to_greedy") is False for draft in drafts):
        sentences.append(
            "Speculative decoding did not give exactly the teacher's greedy text in every precision: where it did not, "
            "the speed-up is not for equal output."
        )
    found = (mapping(draft.get("settings")).get("num_prompts") for draft in drafts)
    prompts = [number for number in found if isinstance(number, int)]
    if prompts and min(prompts) < LEAST_PROMPTS:
        sentences.append(f"Speculative decoding was tried on {min(prompts)} prompts alone: its figures are rough.")
    machines = [m["machines"]["latency"] for m in models.values() if m["machines"].get("latency")]
    places = dict.fromkeys(
        ", ".join([str(m.get("processor")), f"{m.get('cores')} cores", *(m.get("accelerators") or ["no accelerator"])])
        for m in machines
    )
    if places:
        sentences.append(
            f"Times hold for the machine they were taken on ({'; '.join(places)}). Between models timed on different "
            "machines no ratio is given."
        )
    dtypes = {m["settings"]["latency"].get("dtype") for m in models.values() if "latency" in m["settings"]}
    if len(dtypes - {None}) > 1:
        texts = [
            f"{_plain(m)} {m['settings']['latency'].get('dtype')}"
            for m in models.values()
            if "latency" in m["settings"]
        ]
        sentences.append(f"Speeds and bytes are those of the number formats the models came in: {', '.join(texts)}.")
    return sentences


def _twin_caveats(student: Mapping[str, Any], twin: Mapping[str, Any]) -> list[str]:
    """Where distillation did not help, and what else differs between the two."""
    sentences = []
    if None not in (student["heldout_nll_nats"], twin["heldout_nll_nats"]):
        nll, twins = student["heldout_nll_nats"], twin["heldout_nll_nats"]
        word = "worse than" if nll > twins else "better than" if nll < twins else "equal to"
        sentences.append(
            f"Closeness to the teacher and likelihood of the text are different things. {_the(student)}'s NLL is "
            f"{nll:.3f} nats per token, {word} its twin's {twins:.3f}."
        )
    ours, theirs = (mapping(_run(m).get("config")) for m in (student, twin))
    if ours and theirs:
        other = [key for key in ours if key not in FREE and ours[key] != theirs.get(key)]
        if other:
            texts = ", ".join(f"{key} ({ours[key]}, the twin's {theirs.get(key)})" for key in other)
            sentences.append(f"The two were not trained alike but for the teacher: they differ in {texts}.")
    return sentences


def _benchmark_caveat(models: Models, key: str, benchmark: str) -> list[str]:
    """The scores as they came out, with intervals and how far the programs got that failed."""
    scored = [m for m in models.values() if solved(m.get(key))]
    if not scored:
        return []
    texts = []
    for m in scored:
        interval = m[key]["ci95"]
        texts.append(
            f"{_plain(m)} {_scored(m[key])}"
            + (f" (95% interval {interval[0]:.1%} to {interval[1]:.1%})" if interval else "")
        )
    text = (
        f"{benchmark} is printed as it came out: {'; '.join(texts)}. The intervals cover the choice of problems only."
    )
    if any(m[key]["num_problems"] < FULL_SIZES[key] for m in scored):
        text += f" Where fewer than {FULL_SIZES[key]} problems were run, the score is not {benchmark}'s."
    if any(m[key]["pass_at_1"] == 0 for m in scored):
        text += " A score of 0 cannot rank two students."
    return [text]


def _fidelity_caveats(models: Models) -> list[str]:
    results = [m["settings"]["fidelity"] for m in models.values() if "fidelity" in m["settings"]]
    sentences = []
    for kind in sorted({str(r.get("kl_kind", r.get("kind"))) for r in results} - {"None", "dense"}):
        sentences.append(
            f"KL is measured on what the cache holds ({kind}): the cached ids and one cell for all others. It is a "
            "lower bound of the KL over the whole vocabulary."
        )
    if len({(r.get("cache") or {}).get("manifest_sha256") for r in results}) > 1:
        sentences.append(
            "The models were scored on different held-out caches: NLL, KL and agreement cannot be compared."
        )
    if any(r.get("seen_in_training") is False for r in results):
        sentences.append(
            "The held-out text was kept from the students. Whether the teacher saw it in its own training is not "
            "known; if it did, its figures are flattered."
        )
    return sentences


def _run(model: Mapping[str, Any]) -> Mapping[str, Any]:
    run: Mapping[str, Any] = model["settings"].get("run", {})
    return run


def _the(model: Mapping[str, Any]) -> str:
    return f"The {model['label'].lower()}" if model["label"] in LABELS.values() else model["label"]


def _plain(model: Mapping[str, Any]) -> str:
    label: str = model["label"]
    return label.lower() if label in LABELS.values() else label


def _scored(score: Mapping[str, Any]) -> str:
    """A score and, beside it, how many of the programs parse and run."""
    shares = (("share_parses", "parse"), ("share_runs", "run"))
    told = [f"{score[key]:.0%} {verb}" for key, verb in shares if score[key] is not None]
    return f"{solved(score)}" + (f" ({', '.join(told)})" if told else "")
