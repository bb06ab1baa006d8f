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


def write_fidelity(root: Path, name: str) -> Path:
    nll, bits, kl, agreement = FIDELITY[name]
    return write(root / "eval" / name / "fidelity.json", {
        "seen_in_training": False,
        "nll_nats": nll, "bits_per_byte": bits, "perplexity": math.exp(nll), "kl_to_teacher_nats": kl,
        "top1_agreement": agreement, "num_targets": 60_412, "num_documents": 420, "teacher_nll_nats": 1.411,
        "kind": "partition K=64", "model": dict(zip(("parameters", "bytes"), SIZES[name], strict=True)),
        "cache": {"label_identity": digest("labels"), "manifest_sha256": digest("manifest")},
        "dtype": "float32", "machine": MACHINE, "versions": VERSIONS, "seconds": 31.2, "reasons": {},
    })  # fmt: skip


def write_latency(root: Path, names=tuple(SIZES)) -> Path:
    models = {
        name: {"parameters": SIZES[name][0], "bytes": SIZES[name][1], "prefill_ms": SPEEDS[name][0],
               "decode_tokens_per_second": SPEEDS[name][1]}
        for name in names
    }  # fmt: skip
    result = {"machine": MACHINE, "versions": VERSIONS, "prompt_tokens": 128, "repeats": 7, "models": models}
    return write(root / "eval" / "latency.json", result)


def write_humaneval(root: Path, name: str) -> Path:
    passed, low, high = PASSED[name]
    return write(root / "eval" / name / "humaneval" / "result.json", {
        "pass_at_1": passed / 164, "num_problems": 164, "ci95": [low, high], "max_new_tokens": 128, "batch_size": 8,
        "machine": MACHINE, "versions": VERSIONS,
    })  # fmt: skip


def write_run(root: Path, name: str) -> Path:
    alpha, floor = (0.7, 3.9) if name == "student_kd" else (0.0, 3.7)
    run = root / "students" / name
    write(run / "run.json", {
        "config": {"preset": "tiny", "alpha": alpha, "temperature": 1.0, "seed": 0, "max_steps": 300},
        "caches": [{"label_identity": digest("labels"), "weight": None}], "machine": MACHINE, "versions": VERSIONS,
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
        "sources": [{"name": "stdlib", "split": name.removeprefix("cache-"), "revision": "3.11.9", "licence": "PSF-2.0",
                     "digest": digest(name), "num_documents": 420}],
        "codec": "f16", "filter": "gzip", "temperatures": [0.5, 1.0, 1.5, 2.0], "top_k": 64, "num_tokens": 71_020,
        "statistics": {"captured_mass": {t: {"mean": m, "p1": m * 0.4, "p10": m * 0.8} for t, m in means.items()}},
        "files": {"shard-00000.h5": {"bytes": 1, "sha256": digest("shard")}},
    })  # fmt: skip
    return root / name


def write_everything(root: Path) -> dict:
    """Write every result; return `build_report`'s arguments."""
    for name in SIZES:
        write_fidelity(root, name)
        write_humaneval(root, name)
    write_latency(root)
    return {
        "eval_dir": root / "eval",
        "runs": {name: write_run(root, name) for name in ("student_kd", "student_ce")},
        "caches": [write_cache(root, "cache-train"), write_cache(root, "cache-validation")],
        "out_dir": root / "report",
    }
