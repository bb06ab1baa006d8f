"""The set-up the project is for: StarCoder2 from the Hub on one machine, students on another, from the cache alone."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from shared.cache.reader import Cache
from shared.cache.verify import verify_cache
from shared.files import read_json
from tests.support.eval_models import NO_DRAFT, unknown_figures
from tests.support.hub_contents import TEACHER

# Command lines from standard input, one after the other: a machine's commands share the start of one process.
PROGRAM = """
import json, sys
from shared.cli import codedistill
for arguments in json.load(sys.stdin):
    codedistill.main(arguments, standalone_mode=False)
"""
# The student's machine: no teacher code, and whoever opens a connection fails.
STUDENT_PROGRAM = "import sys; sys.modules['stage1_teacher'] = None; " + PROGRAM
QUIET = {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "2"}
NAMESPACE = ["unshare", "--net", "--map-root-user"]


def run(environment, commands, program=PROGRAM, prefix=()):
    lines = json.dumps([[str(argument) for argument in command] for command in commands])
    done = subprocess.run(
        [*prefix, sys.executable, "-c", program],
        env={**environment, **QUIET},
        input=lines,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def caches(hub, tmp_path_factory):
    """What `make cache PROFILE=starcoder2` leaves, on a small scale."""
    folder = tmp_path_factory.mktemp("large-gpu")
    environment = hub.environment(folder / "home")
    profile = ["--config", "stage1_teacher/configs/starcoder2.toml", "--teacher", TEACHER, "--limit-docs", 24]
    results, train, validation = folder / "eval" / "teacher", folder / "cache-train", folder / "cache-validation"
    commands = [
        ("teacher", "build", *profile, "--split", "train", "--out", train),
        ("teacher", "build", *profile, "--split", "validation", "--out", validation),
        ("eval", "fidelity", "--model", TEACHER, "--cache", validation, "--out", results / "fidelity.json"),
        ("eval", "humaneval", "--model", TEACHER, "--out", results / "humaneval", "--limit", 3, "--max-new-tokens", 4),
        ("eval", "exercises", "--model", TEACHER, "--out", results / "exercises", "--limit", 3, "--max-new-tokens", 4),
        ("eval", "latency", "--model", f"teacher={TEACHER}", "--out", results / "latency.json",
         "--prompt-tokens", 8, "--new-tokens", 2),
        ("cache", "attach", train, "--teacher-eval", results),
    ]  # fmt: skip
    print(run(environment, commands))
    return folder


def test_the_teacher_s_results_are_part_of_the_cache(caches):
    train = caches / "cache-train"
    assert verify_cache(train) == []
    listed = [name for name in Cache(train).manifest.files if name.startswith("teacher_eval/")]
    assert sorted(listed) == [
        *(f"teacher_eval/exercises/{name}" for name in ("completions.jsonl", "problems.jsonl", "result.json")),
        "teacher_eval/exercises/verdicts.jsonl",
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
    model, results = tmp_path / "runs" / "kd", tmp_path / "eval"
    problems = train / "teacher_eval" / "humaneval" / "problems.jsonl"
    commands = [
        ("student", "train", "--cache", train, "--validation", validation, "--preset", "tiny", "--out", model,
         "--set", "max_steps=2"),
        ("eval", "fidelity", "--model", model, "--cache", validation, "--out", results / "kd" / "fidelity.json"),
        ("eval", "humaneval", "--model", model, "--out", results / "kd" / "humaneval", "--problems", problems,
         "--max-new-tokens", 4),
        ("eval", "exercises", "--model", model, "--out", results / "kd" / "exercises", "--limit", 3,
         "--max-new-tokens", 4),
        ("eval", "latency", "--model", f"kd={model}", "--prompt-tokens", 8, "--new-tokens", 2,
         "--out", results / "latency.json"),
        ("eval", "report", "--eval", results, "--student", f"kd={model}", "--cache", train, "--cache", validation,
         "--out", tmp_path / "report"),
        ("student", "export", model, "--out", tmp_path / "exported"),
    ]  # fmt: skip
    said = run(environment, commands, STUDENT_PROGRAM, NAMESPACE if namespaces else ())
    assert "memory, about:" in said
    models = read_json(tmp_path / "report" / "report.json")["models"]
    assert list(models) == ["teacher", "kd"]
    assert models["teacher"]["heldout_nll_nats"] == read_json(train / "teacher_eval" / "fidelity.json")["nll_nats"]
    assert models["teacher"]["humaneval"]["num_problems"] == models["kd"]["humaneval"]["num_problems"] == 3
    assert models["teacher"]["exercises"]["num_problems"] == models["kd"]["exercises"]["num_problems"] == 3
    timed = read_json(train / "teacher_eval" / "latency.json")["models"]["teacher"]
    assert models["teacher"]["prefill_ms"] == timed["batches"]["1"]["prefill_ms"]
    assert all(unknown_figures(figures) == NO_DRAFT for figures in models.values())  # no teacher to draft for

    card = (tmp_path / "exported" / "README.md").read_text()
    for words in ("bigcode-openrail-m", "CC-BY-4.0", Cache(train).label_identity, TEACHER, "mbpp"):
        assert words in card
    (source,) = Cache(train).manifest.sources
    for words in (
        source["revision"],
        source["attribution"],
        Cache(train).manifest.identity["teacher"]["attribution"],
    ):
        assert words in card
