"""Result files as the evaluation and the training write them, with figures of a realistic size."""

import hashlib
import json
import math
from pathlib import Path

MACHINE = {
    "host": "bench", "platform": "Linux-6.1-x86_64", "processor": "Example CPU @ 2.40GHz", "cores": 2,
    "memory_bytes": 25_000_000_000, "accelerators": [], "python": "3.11.9",
}  # fmt: skip
VERSIONS = {"codedistill": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"}
SIZES = {
    "teacher": (134_515_008, 269_060_552),
    "student_kd": (5_181_312, 20_733_040),
    "student_ce": (5_181_312, 20_733_040),
}
FIDELITY = {  # NLL, bits/byte, KL, agreement
    "teacher": (1.412, 0.571, 0.0001, 1.0),
    "student_kd": (4.631, 1.873, 2.482, 0.331),
    "student_ce": (4.587, 1.855, 3.104, 0.322),
}
SPEEDS = {"teacher": (212.4, 17.3), "student_kd": (9.8, 214.6), "student_ce": (9.9, 211.2)}
PASSED = {"teacher": (12, 0.0423, 0.1235), "student_kd": (0, 0.0, 0.0229), "student_ce": (0, 0.0, 0.0229)}


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def write(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, allow_nan=False))
    return path


def documents(name: str) -> list[dict]:
    """Per-document sums that add up to the figures, with differences between documents that all models share."""
    nll, _, kl, agreement = FIDELITY[name]
    return [
        {"id": f"d{i}", "targets": 100, "labelled": 100,
         "nll_nats": 100 * (nll + (-1) ** i * 0.3 + (name == "student_kd") * 0.05 * (i % 4 - 1.5)),
         "kl_nats": 100 * (kl + (-1) ** i * 0.04 * kl), "reverse_kl_nats": 150 * kl, "top1_agreed": 100 * agreement,
         "top5_overlap": 80 * agreement}
        for i in range(60)
    ]  # fmt: skip


def write_fidelity(root: Path, name: str, *, old: bool = False) -> Path:
    """What `eval fidelity` writes; `old`: as it did before it gave intervals and calibration."""
    nll, bits, kl, agreement = FIDELITY[name]
    more = {
        "ci95": {"nll_nats": [nll - 0.08, nll + 0.08], "kl_to_teacher_nats": [kl * 0.98, kl * 1.02],
                 "top1_agreement": [agreement - 0.01, min(agreement + 0.01, 1)], "ece": None},
        "reverse_kl_nats": kl * 1.5, "top5_agreement": agreement * 0.8, "ece": 0.021 + 0.01 * nll / 4,
        "ece_bins": [{"confidence": c / 100, "accuracy": c / 100 * (1 - 0.02 * nll), "count": 900 - 9 * c}
                     for c in range(5, 90, 10)] + [{"confidence": None, "accuracy": None, "count": 0}],
        "kl_kind": "partition K=64", "per_document": documents(name),
    }  # fmt: skip
    return write(root / "eval" / name / "fidelity.json", ({} if old else more) | {
        "seen_in_training": False,
        "nll_nats": nll, "bits_per_byte": bits, "perplexity": math.exp(nll), "kl_to_teacher_nats": kl,
        "top1_agreement": agreement, "num_targets": 60_412, "num_documents": 420, "teacher_nll_nats": 1.411,
        "kind": "partition K=64", "model": dict(zip(("parameters", "bytes"), SIZES[name], strict=True)),
        "cache": {"label_identity": digest("labels"), "manifest_sha256": digest("manifest")},
        "dtype": "float32", "machine": MACHINE, "versions": VERSIONS, "seconds": 31.2, "reasons": {},
    })  # fmt: skip


def write_latency(root: Path, names=tuple(SIZES), *, old: bool = False) -> Path:
    """What `eval latency` writes; `old`: as it did before it gave percentiles and memory."""
    models = {
        name: {"parameters": SIZES[name][0], "bytes": SIZES[name][1], "prefill_ms": SPEEDS[name][0],
               "prefill_ms_range": [SPEEDS[name][0] * 0.97, SPEEDS[name][0] * 1.08],
               "decode_tokens_per_second": SPEEDS[name][1], "dtype": "bfloat16" if name == "teacher" else "float32"}
        for name in names
    }  # fmt: skip
    for name in () if old else names:
        step = 1000 / SPEEDS[name][1]
        models[name] |= {
            "ci95": {"prefill_ms": [SPEEDS[name][0] * 0.97, SPEEDS[name][0] * 1.08]},
            "embedding_share": 0.2105 if name == "teacher" else 0.4857,
            "memory_bytes": SIZES[name][1], "peak_bytes": SIZES[name][1] + 180_000_000,
            "batches": {"1": {"decode_ms_p50": step, "decode_ms_p95": step * 1.3},
                        "8": {"decode_ms_p50": step * 2.1, "decode_ms_p95": step * 2.6}},
        }  # fmt: skip
    settings = {"prompt_tokens": 128, "new_tokens": 32, "repeats": 7}
    result = {"machine": MACHINE, "versions": VERSIONS, "settings": settings, "models": models}
    return write(root / "eval" / "latency.json", result)


def write_humaneval(root: Path, name: str, *, old: bool = False) -> Path:
    """What `eval humaneval` writes; `old`: as it did before it kept shares and verdicts."""
    passed, low, high = PASSED[name]
    parses = 164 if name == "teacher" else 141
    folder = root / "eval" / name / "humaneval"
    more = {
        "benchmark": "HumanEval", "problems_sha256": digest("problems"), "model": f"students/{name}",
        "pass_at_k": {"1": passed / 164}, "pass_at_k_ci95": {"1": [low, high]}, "share_parses": parses / 164,
        "share_runs": parses / 164, "share_some_assert": passed / 164, "num_passed": passed,
        "verdicts": {"failed": 164 - passed} | ({"passed": passed} if passed else {}),
        "settings": {"decoding": "greedy", "samples": 1, "max_new_tokens": 128, "timeout_seconds": 3.0},
    }  # fmt: skip
    if not old:
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {"task_id": f"HumanEval/{i}", "sample": 0, "parses": i < parses, "loaded": i < parses,
             "verdict": "passed" if i < passed else "failed"}
            for i in range(164)
        ]  # fmt: skip
        (folder / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write(folder / "result.json", ({} if old else more) | {
        "pass_at_1": passed / 164, "num_problems": 164, "ci95": [low, high], "machine": MACHINE, "versions": VERSIONS,
    })  # fmt: skip


def write_draft(root: Path, name: str) -> Path:
    return write(root / "eval" / name / "draft.json", {
        "ci95": {"acceptance_rate": [0.39, 0.43], "speedup": None},
        "acceptance_rate": 0.412, "mean_accepted_length": 1.87, "speedup": 1.31, "equal_to_greedy": True,
        "machine": MACHINE, "versions": VERSIONS,
    })  # fmt: skip


def write_proof(root: Path) -> Path:
    """What `student proof` writes, with a plain, a better and a worse arm."""

    def arm(name, loss, nll, difference, half):
        low, high = (0, 0) if difference is None else (difference - half, difference + half)
        return {
            "name": name, "loss": loss, "k": None if loss == "ce" else 64, "learning_rate": 1.2e-3, "epochs": 2,
            "test_nll": {"mean": nll, "sd": 0.011, "seeds": [nll - 0.01, nll, nll + 0.01, nll, nll]},
            "test_kl": {"mean": nll - 2, "sd": 0.014, "seeds": [nll - 2] * 5},
            "versus_ce": difference and {
                "difference": difference, "ci95": [low, high], "significant": low > 0 or high < 0,
                "p_holm": 0.002 if low > 0 or high < 0 else 0.31,
                "kl": {"difference": 2 * difference, "ci95": [2 * low, 2 * high]},
            },
        }  # fmt: skip

    return write(root / "proof" / "proof.json", {
        "variants": [arm("cross-entropy", "ce", 5.331, None, 0), arm("ghost K=64", "ghost", 5.082, -0.249, 0.021),
                 arm("label smoothing", "ce", 5.342, 0.011, 0.018),
                 arm("truncated K=64", "truncated", 5.404, 0.073, 0.03)],
        "summary": ["Over five paired seeds, ghost K=64 has a test NLL 0.249 nats per token below cross-entropy."],
        "settings": {"seeds": 5},
    })  # fmt: skip


def write_run(root: Path, name: str) -> Path:
    alpha, floor = (0.7, 3.9) if name == "student_kd" else (0.0, 3.7)
    run = root / "students" / name
    write(run / "run.json", {
        "config": {"preset": "tiny", "alpha": alpha, "temperature": 1.0, "seed": 0, "max_steps": 300},
        "initial_weights_sha256": digest("first weights"),
        "caches": [
            {"label_identity": digest("labels"), "weight": None, "shards": {"shard-00000.h5": digest("cache-train")}}
        ],
        "validation": {"shards": {"shard-00000.h5": digest("cache-validation")}},
        "machine": MACHINE, "versions": VERSIONS,
        "metrics": {"ce": floor + 0.3},
    })  # fmt: skip
    records = []
    for step in range(10, 301, 10):
        decay, wobble = math.exp(-step / 70), 0.06 * math.sin(step * 1.7 + alpha)
        records.append({
            "step": step, "loss": 5.0, "lr": 1e-3, "ce": floor + 6.4 * decay + wobble,
            "kd": (2.2 if alpha else 2.9) + 6.0 * decay + wobble,
        })  # fmt: skip
        if step % 50 == 0:
            records.append(
                {"step": step, "eval_ce": floor + 0.5 + 6.4 * decay, "eval_kd": 2.5 + (not alpha) * 0.6 + 6 * decay}
            )
    (run / "training_log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def write_cache(root: Path, name: str) -> Path:
    means = {"0.5": 0.999, "1.0": 0.972, "1.5": 0.861, "2.0": 0.612}
    write(root / name / "manifest.json", {
        "format": "codedistill-cache", "version": 1, "label_identity": digest("labels"),
        "identity": {"teacher": {"weights": digest("weights")}, "tokenizer": digest("tokenizer")},
        "sources": [{"name": "stdlib", "split": name.removeprefix("cache-"), "revision": "3.11.9", "license": "PSF-2.0",
                     "digest": digest(name), "num_documents": 420}],
        "codec": "f16", "filter": "gzip", "temperatures": [0.5, 1.0, 1.5, 2.0], "top_k": 64, "num_tokens": 71_020,
        "statistics": {"captured_mass": {t: {"mean": m, "p1": m * 0.4, "p10": m * 0.8} for t, m in means.items()}},
        "files": {"shard-00000.h5": {"bytes": 1, "sha256": digest(name)}},
    })  # fmt: skip
    return root / name


def write_everything(root: Path, *, old: bool = False) -> dict:
    """Write every result, or the `old` ones with the keys they had at first; return `build_report`'s arguments."""
    for name in SIZES:
        write_fidelity(root, name, old=old)
        write_humaneval(root, name, old=old)
    write_latency(root, old=old)
    if not old:
        write_draft(root, "student_kd")
    return {
        "eval_dir": root / "eval",
        "runs": {name: write_run(root, name) for name in ("student_kd", "student_ce")},
        "caches": [write_cache(root, "cache-train"), write_cache(root, "cache-validation")],
        "out_dir": root / "report",
        "proof_file": None if old else write_proof(root),
    }
