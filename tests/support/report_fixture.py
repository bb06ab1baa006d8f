"""Result files as the evaluation and the training write them, with figures of a realistic size."""

import hashlib
import json
import math
from pathlib import Path

from shared.cache.identity import label_identity
from shared.cache.manifest import FileEntry, Manifest, write_manifest
from shared.eval.report.report import collect, write_report

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


def build_report(eval_dir, runs, caches, out_dir, proof_file=None) -> dict:
    """What `eval report` writes, report.json as data."""
    return write_report(collect(eval_dir, runs, caches, proof_file, out_dir), out_dir)


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
        {"id": f"d{i}", "targets": 100,
         "nll_nats": 100 * (nll + (-1) ** i * 0.3 + (name == "student_kd") * 0.05 * (i % 4 - 1.5)),
         "kl_nats": 100 * (kl + (-1) ** i * 0.04 * kl), "reverse_kl_nats": 150 * kl, "top1_agreed": 100 * agreement,
         "top5_overlap": 80 * agreement}
        for i in range(60)
    ]  # fmt: skip


def facts(name: str) -> dict:
    """What a result says of a model."""
    parameters, size = SIZES[name]
    return {"path": f"students/{name}", "commit": None, "parameters": parameters, "bytes": size,
            "embedding_share": 0.2105 if name == "teacher" else 0.4857,
            "dtype": "bfloat16" if name == "teacher" else "float32"}  # fmt: skip


def origin(command: str) -> dict:
    return {"command": f"codedistill {command}", "inputs": {}, "machine": MACHINE, "versions": VERSIONS}


def write_fidelity(root: Path, name: str) -> Path:
    """What `eval fidelity` writes."""
    nll, bits, kl, agreement = FIDELITY[name]
    return write(root / "eval" / name / "fidelity.json", origin("eval fidelity --model x") | {
        "nll_nats": nll, "bits_per_byte": bits, "perplexity": math.exp(nll), "kl_to_teacher_nats": kl,
        "reverse_kl_nats": kl * 1.5, "top1_agreement": agreement, "top5_agreement": agreement * 0.8,
        "ece": 0.021 + 0.01 * nll / 4, "teacher_nll_nats": 1.411,
        "ci95": {"nll_nats": [nll - 0.08, nll + 0.08], "kl_to_teacher_nats": [kl * 0.98, kl * 1.02],
                 "top1_agreement": [agreement - 0.01, min(agreement + 0.01, 1)], "ece": None},
        "reasons": {}, "kl_kind": "partition K=64",
        "ece_bins": [{"confidence": c / 100, "accuracy": c / 100 * (1 - 0.02 * nll), "count": 900 - 9 * c}
                     for c in range(5, 90, 10)] + [{"confidence": None, "accuracy": None, "count": 0}],
        "num_targets": 60_412, "num_documents": 420, "num_cut_documents": 0, "target_bytes": 200_000,
        "definitions": {}, "model": facts(name), "teacher": None,
        "cache": {"digest": digest("held out"), "label_identity": digest("labels"), "codec": "q",
                  "teacher_nll_nats": 1.411},
        "seen_in_training": False, "device": "cpu", "seconds": 31.2, "per_document": documents(name),
    })  # fmt: skip


def timing(name: str) -> dict:
    """One model's part of latency.json."""
    prefill, speed = SPEEDS[name]
    step = 1000 / speed

    def batch(factor, tail):
        return {
            "prefill_ms": prefill, "prefill_ms_range": [prefill * 0.97, prefill * 1.08],
            "prefill_tokens_per_second": 128_000 / prefill, "decode_tokens_per_second": speed,
            "decode_tokens_per_second_range": [speed * 0.9, speed * 1.1],
            "decode_ms_p50": step * factor, "decode_ms_p95": step * tail, "peak_bytes": SIZES[name][1] + 180_000_000,
            "tokens_per_second_per_watt": None,
            "ci95": {"prefill_ms": [prefill * 0.97, prefill * 1.08], "decode_tokens_per_second": None},
            "reasons": {"tokens_per_second_per_watt": "energy is counted only on NVIDIA GPUs"},
        }  # fmt: skip

    return facts(name) | {"memory_bytes": SIZES[name][1], "batches": {"1": batch(1, 1.3), "8": batch(2.1, 2.6)}}


def write_latency(root: Path, names=tuple(SIZES), *, machine=MACHINE) -> Path:
    """What `eval latency` writes; of one model, into its own folder."""
    settings = {
        "batch_sizes": [1, 8], "prompt_tokens": 128, "new_tokens": 32, "repeats": 7, "warmup_rounds": 1, "threads": 2,
        "device": "cpu", "peak_bytes": "", "energy": None, "load_average_before": 0.1,
    }  # fmt: skip
    folder = root / "eval" / names[0] if len(names) == 1 else root / "eval"
    return write(folder / "latency.json", origin("eval latency --model x=y") | {
        "machine": machine, "settings": settings, "models": {name: timing(name) for name in names}, "seconds": 9.1,
    })  # fmt: skip


def write_benchmark(folder: Path, rows: list[dict], **changes) -> Path:
    """result.json, verdicts.jsonl and completions.jsonl of a benchmark, from verdict lines of equally many samples."""
    passed = [row["verdict"] == "passed" for row in rows]
    tasks = list(dict.fromkeys(row["task_id"] for row in rows))
    pass_at_1 = sum(passed) / len(rows)
    solved = {row["task_id"] for row, ok in zip(rows, passed, strict=True) if ok}
    result = origin("eval humaneval --model x") | {
        "benchmark": "HumanEval", "about": {}, "model": "x", "commit": None, "problems_sha256": digest("problems"),
        "pass_at_1": pass_at_1, "ci95": [0.0, 1.0], "pass_at_k": {"1": pass_at_1}, "pass_at_k_ci95": {"1": [0.0, 1.0]},
        "pass_at_k_bounds": None, "not_judged": {},
        "share_parses": sum(row["parses"] for row in rows) / len(rows),
        "share_runs": sum(row["loaded"] for row in rows) / len(rows), "share_some_assert": pass_at_1,
        "num_problems": len(tasks), "num_samples": len(rows), "num_passed": len(solved),
        "verdicts": {name: count for name in ("failed", "passed")
                     if (count := sum(row["verdict"] == name for row in rows))},
        "reasons": {}, "settings": {"decoding": "greedy", "samples": 1, "max_new_tokens": 128, "timeout_seconds": 3.0},
        "num_refused": 0, "refused": {}, "finish_reasons": {}, "num_new_tokens": 9, "files": {},
        "generation_seconds": 1.0, "scoring_seconds": 1.0,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"task_id": row["task_id"], "sample": row["sample"], "prompt": f"def f(x):  # {row['task_id']}",
         "completion": f"    return x  # {row['verdict']}"}
        for row in rows
    ]  # fmt: skip
    for name, content in (("verdicts", rows), ("completions", lines)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    return write(folder / "result.json", result | changes)


def verdict(task: str, *, passed: bool, parses: bool = True, sample: int = 0) -> dict:
    """A line of verdicts.jsonl."""
    return {"task_id": task, "sample": sample, "parses": parses, "verdict": "passed" if passed else "failed",
            "loaded": parses, "asserts_passed": int(passed)}  # fmt: skip


def write_humaneval(root: Path, name: str, **changes) -> Path:
    """What `eval humaneval` writes."""
    passed, low, high = PASSED[name]
    parses = 164 if name == "teacher" else 141
    rows = [verdict(f"HumanEval/{i}", passed=i < passed, parses=i < parses) for i in range(164)]
    interval = {"ci95": [low, high], "pass_at_k_ci95": {"1": [low, high]}}
    return write_benchmark(root / "eval" / name / "humaneval", rows, **interval | changes)


def write_draft(root: Path, name: str, **changes) -> Path:
    """What `eval draft` writes."""
    same = {"num_prompts": 20, "num_equal": 20, "first_differences": []}
    return write(root / "eval" / name / "draft.json", origin("eval draft") | {
        "acceptance_rate": 0.412, "mean_accepted_length": 1.87, "tokens_per_pass": 2.87, "speedup": 1.31,
        "ci95": {"acceptance_rate": [0.39, 0.43], "speedup": None}, "speedup_range": [1.2, 1.4],
        "equal_to_greedy": True, "equality": {"float32": same}, "definitions": {}, "teacher": facts("teacher"),
        "student": facts(name), "settings": {"num_prompts": 20}, "per_prompt": [],
    } | changes)  # fmt: skip


def write_proof(root: Path) -> Path:
    """What `student proof` writes, with a plain, a better and a worse variant."""

    def paired(difference, half):
        low, high = difference - half, difference + half
        found = low > 0 or high < 0
        return {"difference": difference, "ci95": [low, high], "p": 0.001 if found else 0.2, "significant": found}

    def variant(name, loss, nll, difference, half):
        return {
            "name": name, "loss": loss, "k": None if loss == "ce" else 64, "alpha": 0.7, "temperature": 1.0,
            "label_smoothing": 0.0, "learning_rate": 1.2e-3, "epochs": 2, "epochs_by_seed": [2] * 5,
            "test_nll": {"mean": nll, "sd": 0.011, "seeds": [nll - 0.01, nll, nll + 0.01, nll, nll]},
            "test_kl": {"mean": nll - 2, "sd": 0.014, "seeds": [nll - 2] * 5},
            "versus_ce": difference and paired(difference, half) | {
                "setting": name, "versus": "cross-entropy", "kl": paired(2 * difference, 2 * half),
                "p_holm": 0.002 if paired(difference, half)["significant"] else 0.31,
            },
        }  # fmt: skip

    return write(root / "proof" / "proof.json", origin("student proof --out proof") | {
        "format": "codedistill-proof", "version": 1,
        "variants": [variant("cross-entropy", "ce", 5.331, None, 0),
                     variant("ghost K=64", "ghost", 5.082, -0.249, 0.021),
                     variant("label smoothing", "ce", 5.342, 0.011, 0.018),
                     variant("truncated K=64", "truncated", 5.404, 0.073, 0.03)],
        "comparisons": [],
        "summary": ["Over five paired seeds, ghost K=64 has a test NLL 0.249 nats per token below cross-entropy."],
        "settings": {"seeds": [1, 2, 3, 4, 5]}, "search": [], "runs": [], "seconds": 60.0,
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
        "command": f"codedistill student train --out {run}", "machine": MACHINE, "versions": VERSIONS,
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
    """A finished cache's manifest, sealed; its files are not there."""
    means = {"0.5": 0.999, "1": 0.972, "1.5": 0.861, "2": 0.612}
    identity = {"teacher": {"name": "made/teacher", "weights_digest": digest("weights"),
                            "config_digest": digest("config")},
                "tokenizer": {"digest": digest("tokenizer")}, "labels": {"top_k": 64}}  # fmt: skip
    source = {"name": "stdlib", "split": name.removeprefix("cache-"), "revision": "3.11.9", "license": "PSF-2.0",
              "digest": digest(name), "num_documents": 420}  # fmt: skip
    statistics = {"captured_mass": {t: {"mean": m, "p1": m * 0.4, "p10": m * 0.8} for t, m in means.items()},
                  "codec_kl_nats": {t: {"mean": 0.0, "max": 0.0} for t in means}}  # fmt: skip
    (root / name).mkdir(parents=True, exist_ok=True)
    write_manifest(root / name, Manifest(
        label_identity=label_identity(identity), identity=identity, sources=[source], codec="f16", filter="gzip",
        temperatures=[0.5, 1.0, 1.5, 2.0], top_k=64, tokenizer_size=300, head_width=300, documents_per_shard=[420],
        num_documents=420, num_tokens=71_020, num_entries=71_020 * 64, statistics=statistics,
        files={"shard-00000.h5": FileEntry(1, digest(name))},
    ))  # fmt: skip
    return root / name


def write_everything(root: Path) -> dict:
    """Write every result; return `build_report`'s arguments."""
    for name in SIZES:
        write_fidelity(root, name)
        write_humaneval(root, name)
    write_latency(root)
    write_draft(root, "student_kd")
    return {
        "eval_dir": root / "eval",
        "runs": {name: write_run(root, name) for name in ("student_kd", "student_ce")},
        "caches": [write_cache(root, "cache-train"), write_cache(root, "cache-validation")],
        "out_dir": root / "report",
        "proof_file": write_proof(root),
    }
