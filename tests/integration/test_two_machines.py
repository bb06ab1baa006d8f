"""The set-up the project is for: StarCoder2 from the Hub on one machine, students on another, from the cache alone."""

import os
import shutil
import subprocess
import sys

import pytest
from hub_contents import TEACHER

from shared.cache.reader import Cache
from shared.cache.verify import verify_cache
from shared.runtime import read_json

PROGRAM = "from shared.cli import main; main()"
# The student's machine: no teacher code, and whoever opens a connection fails.
STUDENT_PROGRAM = "import sys; sys.modules['stage1_teacher'] = None; " + PROGRAM
QUIET = {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "2"}
NAMESPACE = ["unshare", "--net", "--map-root-user"]


def run(environment, *arguments, program=PROGRAM, prefix=()):
    command = [*prefix, sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env={**environment, **QUIET}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def caches(hub, tmp_path_factory):
    """What `make cache PROFILE=starcoder2` leaves, on a small scale."""
    folder = tmp_path_factory.mktemp("large-gpu")
    environment = hub.environment(folder / "home")
    profile = ["--config", "stage1_teacher/configs/starcoder2.toml"]
    for split in ("train", "validation"):
        options = ["--teacher", TEACHER, "--split", split, "--limit-docs", 24, "--out", folder / f"cache-{split}"]
        run(environment, "teacher", "build", *profile, *options)
    results = folder / "eval" / "teacher"
    validation = folder / "cache-validation"
    run(environment, "eval", "fidelity", "--model", TEACHER, "--cache", validation, "--out", results / "fidelity.json")
    run(environment, "eval", "humaneval", "--model", TEACHER, "--out", results / "humaneval", "--limit", 3,
        "--max-new-tokens", 4)  # fmt: skip
    run(environment, "eval", "latency", "--model", f"teacher={TEACHER}", "--out", results / "latency.json",
        "--prompt-tokens", 8, "--new-tokens", 2)  # fmt: skip
    print(run(environment, "cache", "attach", folder / "cache-train", "--teacher-eval", results))
    return folder


def test_the_teacher_s_results_are_part_of_the_cache(caches):
    train = caches / "cache-train"
    assert verify_cache(train) == []
    listed = [name for name in Cache(train).manifest["files"] if name.startswith("teacher_eval/")]
    assert sorted(listed) == [
        "teacher_eval/fidelity.json",
        "teacher_eval/humaneval/completions.jsonl",
        "teacher_eval/humaneval/problems.jsonl",
        "teacher_eval/humaneval/result.json",
        "teacher_eval/humaneval/verdicts.jsonl",
        "teacher_eval/latency.json",
    ]
    assert Cache(train).label_identity == Cache(caches / "cache-validation").label_identity
    fidelity = read_json(train / "teacher_eval" / "fidelity.json")
    assert fidelity["top1_agreement"] == 1.0
    assert fidelity["nll_nats"] == pytest.approx(fidelity["teacher_nll_nats"], abs=1e-6)
    with (train / "teacher_eval" / "latency.json").open("a") as file:
        file.write(" ")
    try:
        assert any("teacher_eval/latency.json" in problem for problem in verify_cache(train))
    finally:
        text = (train / "teacher_eval" / "latency.json").read_text()
        (train / "teacher_eval" / "latency.json").write_text(text[:-1])


def test_a_student_needs_the_cache_alone(caches, tmp_path):
    for name in ("cache-train", "cache-validation"):
        shutil.copytree(caches / name, tmp_path / name)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment["HF_HOME"] = str(tmp_path / "empty")
    train, validation = tmp_path / "cache-train", tmp_path / "cache-validation"
    # Where the system allows no namespaces, the closed proxy below stands in for the missing network.
    namespaces = subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
    environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    options = {"program": STUDENT_PROGRAM, "prefix": NAMESPACE if namespaces else ()}
    model, results = tmp_path / "runs" / "kd", tmp_path / "eval"
    said = run(environment, "student", "train", "--cache", train, "--validation", validation, "--preset", "tiny",
               "--out", model, "--set", "max_steps=2", **options)  # fmt: skip
    assert "memory, about:" in said
    run(environment, "eval", "fidelity", "--model", model, "--cache", validation,
        "--out", results / "kd" / "fidelity.json", **options)  # fmt: skip
    problems = train / "teacher_eval" / "humaneval" / "problems.jsonl"
    run(environment, "eval", "humaneval", "--model", model, "--out", results / "kd" / "humaneval",
        "--problems", problems, "--max-new-tokens", 4, **options)  # fmt: skip
    run(environment, "eval", "latency", "--model", f"kd={model}", "--prompt-tokens", 8, "--new-tokens", 2,
        "--out", results / "latency.json", **options)  # fmt: skip
    run(environment, "eval", "report", "--eval", results, "--student", f"kd={model}", "--cache", train,
        "--cache", validation, "--out", tmp_path / "report", **options)  # fmt: skip
    models = read_json(tmp_path / "report" / "report.json")["models"]
    assert list(models) == ["teacher", "kd"]
    assert models["teacher"]["heldout_nll_nats"] == read_json(train / "teacher_eval" / "fidelity.json")["nll_nats"]
    assert models["teacher"]["humaneval"]["num_problems"] == models["kd"]["humaneval"]["num_problems"] == 3
    timed = read_json(train / "teacher_eval" / "latency.json")["models"]["teacher"]
    assert models["teacher"]["prefill_ms"] == timed["prefill_ms"]
    assert not any(figures["reasons"] for figures in models.values())

    run(environment, "student", "export", model, "--out", tmp_path / "exported", **options)
    card = (tmp_path / "exported" / "README.md").read_text()
    for words in ("bigcode-openrail-m", "CC-BY-4.0", Cache(train).label_identity, TEACHER, "mbpp"):
        assert words in card
    (source,) = Cache(train).manifest["sources"]
    for words in (
        source["revision"],
        source["attribution"],
        Cache(train).manifest["identity"]["teacher"]["attribution"],
    ):
        assert words in card
