"""What the Makefile would do, by `make --dry-run` in a folder of empty files."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
PROFILE = "artifacts/starcoder2"
BUILD = ".venv/bin/codedistill teacher build"
TRAIN = ".venv/bin/codedistill student train"


@pytest.fixture
def made(tmp_path):
    """A folder in which both caches, the teacher's results and three students are made, in that order."""
    shutil.copy(MAKEFILE, tmp_path)
    names = ["pyproject.toml", "constraints.txt", ".venv/.installed", f"{PROFILE}/cache-validation/manifest.json"]
    names += [f"{PROFILE}/eval/teacher/{name}.json" for name in ("fidelity", "humaneval/result", "latency")]
    names += [f"{PROFILE}/cache-train/{name}" for name in ("manifest.json", "teacher_eval/latency.json")]
    names += [f"{PROFILE}/students/{name}/model.safetensors" for name in ("student_kd", "student_ce", "cool")]
    for seconds, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 + seconds, 1e9 + seconds))
    return tmp_path


def make(folder, *arguments):
    """The commands that make would run, with continued lines joined and its own messages left out."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "TEACHER", "SET", "RUN")}
    command = ["make", "--dry-run", "PROFILE=starcoder2", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.startswith(".venv")]


def test_what_is_made_is_not_made_again(made):
    assert make(made, "cache", "student") == []


def test_a_named_teacher_data_set_or_setting_is_held_against_what_is_there(made):
    """The commands themselves then find it up to date, or refuse; make alone would keep silent."""
    profile = "--config stage1_teacher/configs/starcoder2.toml"
    assert make(made, "cache", "TEACHER=x/y") == [
        f"{BUILD} {profile} --teacher x/y --split {split} --out {PROFILE}/cache-{split}"
        for split in ("train", "validation")
    ]
    (validation,) = make(made, "cache", "VALIDATION_DATASET=held.jsonl")
    assert "--dataset held.jsonl --split validation" in validation
    kd, ce = make(made, "student", "SET=seed=1 alpha=0.5")
    assert kd.endswith(f"--out {PROFILE}/students/student_kd --set seed=1 --set alpha=0.5")
    assert ce.endswith(f"--out {PROFILE}/students/student_ce --set seed=1 --set alpha=0.5 --set alpha=0")


def test_a_run_of_its_own_name_stands_beside_the_others_in_the_report(made):
    (warm,) = make(made, "student", "RUN=warm", "SET=temperature=2")
    assert warm.startswith(TRAIN)
    assert warm.endswith(f"--out {PROFILE}/students/warm --set temperature=2")
    commands = make(made, "report", "HUMANEVAL=--limit 20")
    runs = {name: f"{PROFILE}/students/{name}" for name in ("student_kd", "student_ce", "cool")}
    assert commands[-1] == (
        f".venv/bin/codedistill eval report --eval {PROFILE}/eval "
        + "".join(f"--student {name}={run} " for name, run in runs.items())
        + f"--cache {PROFILE}/cache-train --cache {PROFILE}/cache-validation --out {PROFILE}/report"
    )
    for name, run in runs.items():
        assert f".venv/bin/codedistill eval fidelity --model {run} --cache {PROFILE}/cache-validation " \
            f"--out {PROFILE}/eval/{name}/fidelity.json" in commands  # fmt: skip
        assert f".venv/bin/codedistill eval humaneval --model {run} --out {PROFILE}/eval/{name}/humaneval " \
            "--limit 20" in commands  # fmt: skip


def test_the_demos_report_shows_the_proof_where_there_is_one(made):
    proof = made / "artifacts/proof/proof.json"
    proof.parent.mkdir()
    proof.touch()
    assert "--proof" not in make(made, "report")[-1]
    shutil.copytree(made / PROFILE, made / "artifacts/demo")
    (report,) = [line for line in make(made, "report", "PROFILE=demo") if " eval report " in line]
    assert "--proof artifacts/proof/proof.json --out artifacts/demo/report" in report


def test_students_draft_for_their_teacher_only_where_it_is_at_hand(made):
    assert not any(" eval draft " in command for command in make(made, "eval"))
    teacher = made / "teachers" / "mine"
    teacher.mkdir(parents=True)
    (teacher / "config.json").touch()
    commands = make(made, "eval", "TEACHER=teachers/mine", "DRAFT=--limit 2")
    for name in ("student_kd", "student_ce", "cool"):
        assert f".venv/bin/codedistill eval draft --teacher teachers/mine --cache {PROFILE}/cache-train " \
            f"--student {PROFILE}/students/{name} --out {PROFILE}/eval/{name}/draft.json --limit 2" \
            in commands  # fmt: skip
    away = make(made, "eval", "TEACHER=teachers/mine", f"CACHE={PROFILE}")
    assert not any(" eval draft " in command for command in away)


def test_the_proof_has_caches_of_its_own_of_three_splits(made):
    *builds, proof = [line for line in make(made, "proof") if "fetch-demo" not in line]
    teacher = "artifacts/teachers/SmolLM2-135M-Instruct"
    assert builds == [
        f"{BUILD} --config stage1_teacher/configs/demo.toml --teacher {teacher} --split {split} "
        f"--limit-docs {documents} --out artifacts/proof/cache-{split}"
        for split, documents in (("train", 200), ("validation", 40), ("test", 100))
    ]
    assert proof == (
        f".venv/bin/codedistill student proof --config stage2_student/configs/proof.toml --jobs 2 --teacher {teacher} "
        "--out artifacts/proof --cache artifacts/proof/cache-train --validation artifacts/proof/cache-validation "
        "--test artifacts/proof/cache-test"
    )
