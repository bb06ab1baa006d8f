"""What the Makefile would run, by `make --dry-run` in a folder of empty files."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
PROFILE = "artifacts/starcoder2"
DISTILL = ".venv/bin/codedistill"
DEMO_TEACHER = "artifacts/teachers/SmolLM2-135M-Instruct"


@pytest.fixture
def folder(tmp_path):
    """An installed clone in which nothing is made yet."""
    shutil.copy(MAKEFILE, tmp_path)
    for seconds, name in enumerate(["pyproject.toml", "constraints.txt", ".venv/installed"]):
        touch(tmp_path / name)
        os.utime(tmp_path / name, (1e9 + seconds, 1e9 + seconds))
    return tmp_path


@pytest.fixture
def trained(folder):
    """The same with three finished runs and one that is not."""
    for name in ("cool", "student_kd", "student_ce"):
        touch(folder / PROFILE / "students" / name / "model.safetensors")
    touch(folder / PROFILE / "students" / "killed" / "checkpoint-1" / "model.safetensors")
    return folder


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def make(folder, *arguments):
    """The product's commands that make would run, continued lines joined."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "TEACHER", "SET", "RUN")}
    command = ["make", "--dry-run", "PROFILE=starcoder2", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\\n", " ").splitlines()
    commands = [" ".join(line.split()) for line in lines if f"{DISTILL} " in line]
    return [command.replace(f"{DISTILL} ", "", 1) for command in commands]


def test_all_runs_every_step_in_order(folder):
    verbs = [" ".join(command.split()[:2]) for command in make(folder, "all")]
    trial, builds = ["WANDB_MODE=disabled eval"] * 2, ["teacher build"] * 2
    teacher = [*trial, *builds, "eval fidelity", "eval humaneval", "eval exercises", "eval latency", "cache attach"]
    students = (
        ["student train"] * 2
        + ["eval fidelity", "eval humaneval", "eval exercises"] * 2
        + ["eval latency", "eval report"]
    )
    assert verbs == teacher + students
    demo = make(folder, "all", "PROFILE=demo")
    assert demo[0] == f"teacher fetch-demo --out {DEMO_TEACHER}"
    assert [" ".join(command.split()[:2]) for command in demo[1:]] == verbs


def test_the_caches_take_the_teacher_and_data_that_are_named(folder):
    profile = "--config stage1_teacher/configs/starcoder2.toml --teacher x/y"
    commands = make(folder, "cache", "TEACHER=x/y", "DATASET=a.jsonl", "VALIDATION_DATASET=b.jsonl", "ART=out",
                    "HUMANEVAL=--limit 9")  # fmt: skip
    trial, timing = "WANDB_MODE=disabled eval", "--prompt-tokens 8 --new-tokens 1 --repeats 1"
    assert commands == [
        f"{trial} humaneval --model x/y --limit 9 --limit 1 --max-new-tokens 8 --out out/trial/humaneval",
        f"{trial} latency --model teacher=x/y {timing} --out out/trial/latency.json",
        f"teacher build {profile} --dataset a.jsonl --split train --out out/cache-train",
        f"teacher build {profile} --dataset b.jsonl --split validation --out out/cache-validation",
        "eval fidelity --model x/y --cache out/cache-validation --out out/eval/teacher/fidelity.json",
        "eval humaneval --model x/y --cache out/cache-train --out out/eval/teacher/humaneval --limit 9",
        "eval exercises --model x/y --cache out/cache-train --out out/eval/teacher/exercises",
        "eval latency --model teacher=x/y --cache out/cache-train --out out/eval/teacher/latency.json",
        "cache attach out/cache-train --teacher-eval out/eval/teacher",
    ]


def test_a_teacher_whose_cache_is_finished_is_not_tried_again(folder):
    touch(folder / PROFILE / "cache-train" / "manifest.json")
    assert make(folder, "cache")[0].startswith("teacher build ")
    assert make(folder, "cache", "ART=elsewhere")[0].startswith("WANDB_MODE=disabled eval humaneval ")


def test_the_baseline_is_the_distilled_student_with_alpha_0(folder):
    train = (
        f"student train --cache {PROFILE}/cache-train --validation {PROFILE}/cache-validation "
        "--config stage2_student/configs/starcoder2.toml"
    )
    assert make(folder, "student", "SET=seed=1 alpha=0.5") == [
        f"{train} --out {PROFILE}/students/student_kd --set seed=1 --set alpha=0.5",
        f"{train} --out {PROFILE}/students/student_ce --set seed=1 --set alpha=0.5 --set alpha=0",
    ]
    (warm,) = make(folder, "student", "RUN=warm", "SET=temperature=2")
    assert warm == f"{train} --out {PROFILE}/students/warm --set temperature=2"


def test_all_finished_runs_are_measured_and_reported(trained):
    touch(trained / PROFILE / "cache-train/teacher_eval/humaneval/problems.jsonl")
    runs = {name: f"{PROFILE}/students/{name}" for name in ("student_kd", "student_ce", "cool")}
    problems = f"--problems {PROFILE}/cache-train/teacher_eval/humaneval/problems.jsonl"
    expected = []
    for name, run in runs.items():
        out = f"--out {PROFILE}/eval/{name}"
        expected += [
            f"eval fidelity --model {run} --cache {PROFILE}/cache-validation {out}/fidelity.json",
            f"eval humaneval --model {run} {out}/humaneval {problems} --limit 20",
            f"eval exercises --model {run} {out}/exercises",
        ]
    expected += [
        f"eval latency --model teacher=bigcode/starcoder2-3b --cache {PROFILE}/cache-train "
        + "".join(f"--model {name}={run} " for name, run in runs.items())
        + f"--out {PROFILE}/eval/latency.json",
        f"eval report --eval {PROFILE}/eval "
        + "".join(f"--student {name}={run} " for name, run in runs.items())
        + f"--cache {PROFILE}/cache-train --cache {PROFILE}/cache-validation --out {PROFILE}/report",
    ]
    assert make(trained, "eval", "report", "HUMANEVAL=--limit 20") == expected


def test_on_a_machine_with_copied_caches_nothing_names_the_teacher(trained):
    commands = make(trained, "student", "eval", "report", "CACHE=caches")
    assert len(commands) == 2 + 3 * 3 + 2
    assert not [command for command in commands if "starcoder2-3b" in command]
    without_cache = ("eval humaneval", "eval exercises", "eval latency")
    assert all("--cache caches/cache-" in command for command in commands if not command.startswith(without_cache))


def test_one_cache_alone_is_enough_to_train(folder):
    touch(folder / "mine" / "manifest.json")
    kd, _ = make(folder, "student", "CACHE=mine")
    assert "--cache mine " in kd and "--validation" not in kd
    touch(folder / "cache-validation" / "manifest.json")
    assert "--cache mine --validation ./cache-validation " in make(folder, "student", "CACHE=mine")[0]


def test_the_demos_report_shows_the_proof_where_there_is_one(folder):
    touch(folder / "artifacts/proof/proof.json")
    assert "--proof" not in make(folder, "report")[-1]
    assert (
        "--proof artifacts/proof/proof.json --out artifacts/demo/report" in make(folder, "report", "PROFILE=demo")[-1]
    )


def test_students_draft_for_their_teacher(trained):
    commands = make(trained, "draft", "TEACHER=teachers/mine", "DRAFT=--limit 2")
    assert commands == [
        f"eval draft --teacher teachers/mine --cache {PROFILE}/cache-train --student {PROFILE}/students/{name} "
        f"--out {PROFILE}/eval/{name}/draft.json --limit 2"
        for name in ("student_kd", "student_ce", "cool")
    ]


def test_the_proof_has_caches_of_its_own_of_three_splits(folder):
    fetch, *builds, proof = make(folder, "proof")
    assert fetch == f"teacher fetch-demo --out {DEMO_TEACHER}"
    assert builds == [
        f"teacher build --config stage1_teacher/configs/demo.toml --teacher {DEMO_TEACHER} --split {split} "
        f"--limit-docs {documents} --out artifacts/proof/cache-{split}"
        for split, documents in (("train", 200), ("validation", 40), ("test", 100))
    ]
    assert proof == (
        f"student proof --config stage2_student/configs/proof.toml --jobs 2 --teacher {DEMO_TEACHER} "
        "--out artifacts/proof --cache artifacts/proof/cache-train --validation artifacts/proof/cache-validation "
        "--test artifacts/proof/cache-test"
    )


def test_an_unknown_profile_is_refused(folder):
    done = subprocess.run(["make", "cache", "PROFILE=bogus"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert 'PROFILE must be demo, starcoder2 or auto, not "bogus"' in done.stderr
