"""Every command in README.md is run here or by `.ci/run`, or stands in a section that says what it needs.

Those of the cache tools, of sweeps and of comparing are parsed here, and run by the tests of the tools.
"""

import json
import os
import re
import shlex
import subprocess
import time

import click
import pytest
from click.testing import CliRunner

from shared.cache.reader import Cache
from shared.cli import codedistill
from shared.files import read_json
from tests.support.hub_contents import mbpp_row, starcoder2
from tests.support.readme import README, REPOSITORY, SECTIONS, commands_of

RUN_HERE = ("Step by step", "Bring your own teacher and data")
# What these do is tested under tests/shared, tests/stage1_teacher and tests/stage2_student.
PARSED_HERE = ("Cache tools", "Sweeps", "Compare and trace")
RUN_BY_CI = ("all", "check", "test")  # `make check` runs `make test`


def parse(words):
    """Hold a command's options to be known and well-formed, as click does before it runs anything."""
    context = click.Context(codedistill, info_name=words[0])
    command, rest = codedistill, words[1:]
    while isinstance(command, click.Group):
        name, command, rest = command.resolve_command(context, rest)
        if not isinstance(command, click.Group):
            command.make_context(name, rest, parent=context)


def dry_run(words):
    """Have make say what it would do; variables must be among those that the Makefile's head explains."""
    head = (REPOSITORY / "Makefile").read_text().partition("\n\n")[0]
    for variable in (word.partition("=")[0] for word in words if "=" in word):
        assert re.search(rf"\b{variable}\b", head), f"the Makefile's head does not explain {variable}"
    environment = {key: value for key, value in os.environ.items() if key != "MAKEFLAGS"}
    command = ["make", "--dry-run", *words[1:]]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("section", [title for title in SECTIONS if commands_of(title)])
def test_every_command_is_accounted_for(section):
    needs = re.search(r"^Needs: ", SECTIONS[section], re.MULTILINE)
    for words in commands_of(section):
        if section in RUN_HERE:
            assert words[0] == "codedistill"  # and the tests below run it
            continue
        if section in PARSED_HERE:
            parse(words)
            continue
        if words[0] == "make":
            dry_run(words)
            assert needs or words[1] in RUN_BY_CI
        else:
            assert needs, words
            assert words[0] in ("codedistill", "rsync", "srun", "trap", "wait")
            if words[0] == "srun":
                module, *rest = words[words.index("-m") + 1 : words.index("&")]
                words = ["codedistill", {"stage1_teacher": "teacher", "stage2_student": "student"}[module], *rest]
            if words[0] == "codedistill":
                parse(words)


def test_every_block_is_checked_and_so_is_every_make_command_in_the_text():
    assert README.count("```bash") == sum(text.count("```bash") for text in SECTIONS.values())
    assert set(re.findall(r"^```(.*)$", README, re.MULTILINE)) == {"", "bash"}
    for command in re.findall(r"`(?:\w+=\S+ )?(make [^`]*)`", README):
        dry_run(shlex.split(command))
    steps = [line for line in (REPOSITORY / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert steps == ["make check", "make all PROFILE=demo"]


def test_the_batch_script_passes_the_signal_on_and_requeues_after_its_processes(tmp_path):
    """With stand-ins for Slurm's commands, which write what they were called for."""
    script = re.search(r"^```bash\n(#!/bin/bash\n.*?)^```$", SECTIONS["Slurm"], re.MULTILINE | re.DOTALL)[1]
    (tmp_path / "job").write_text(script)
    stand_ins = {
        "srun": "trap 'sleep 0.3; echo ended >> log; exit 1' TERM; echo $$ > pid; while :; do sleep 0.1; done",
        "scancel": 'echo "scancel $*" >> log; kill -TERM $(cat pid)',
        "scontrol": '[ "$1" = show ] && echo node1 || echo "scontrol $*" >> log',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["/bin/bash", "job"], cwd=tmp_path, env=environment)
    while not (tmp_path / "pid").exists() and job.poll() is None:
        time.sleep(0.01)
    job.terminate()
    job.wait(timeout=60)
    assert (tmp_path / "log").read_text().splitlines() == ["scancel --signal=TERM 7", "ended", "scontrol requeue 7"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A new user's folder: a tiny teacher where the README puts the demo's, MBPP, and a file of their own."""
    folder = tmp_path_factory.mktemp("workplace")
    teacher = folder / "artifacts" / "teachers" / "demo"
    teacher.mkdir(parents=True)
    starcoder2(teacher)
    rows = [mbpp_row(i) for i in (*range(511, 517), *range(601, 625))]
    (folder / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, numbers in (("mine.jsonl", range(30)), ("heldout.jsonl", range(30, 35))):
        own = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}."} for i in numbers]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in own))
    return folder


def run_section(section, folder, monkeypatch, *, instead):
    """Run a section's commands in order, in this process; `instead` exchanges whole words and adds options."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for words in commands_of(section):
        words = [instead.get(word, word) for word in words[1:]] + instead.get(" ".join(words[1:3]), [])
        if words[:2] == ["teacher", "fetch-demo"]:  # needs the registry: `.ci/run` has it
            parse(["codedistill", *words])
            assert (folder / words[3] / "model.safetensors").exists()
            continue
        result = CliRunner().invoke(codedistill, words)
        assert result.exit_code == 0, (words, result.output, result.exception)


def test_step_by_step(workplace, monkeypatch):
    brief = {"eval humaneval": ["--limit=2", "--max-new-tokens=4"], "eval draft": ["--limit=2", "--new-tokens=4"]}
    run_section("Step by step", workplace, monkeypatch, instead=brief)
    artifacts = workplace / "artifacts"
    assert [Cache(artifacts / "caches" / name).num_documents for name in ("mbpp-train", "mbpp-validation")] == [24, 6]
    report = read_json(artifacts / "report" / "report.json")
    assert list(report["models"]) == ["teacher", "kd", "ce"]


def test_bring_your_own_teacher_and_data(workplace, monkeypatch):
    run_section(
        "Bring your own teacher and data", workplace, monkeypatch, instead={"DIR_OR_ID": "artifacts/teachers/demo"}
    )
    assert Cache(workplace / "caches" / "mine").num_documents == 30
    assert read_json(workplace / "eval/mine/fidelity.json")["seen_in_training"] is False
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(workplace / "exported" / "mine")
    assert exported.config.vocab_size == Cache(workplace / "caches" / "mine").tokenizer_size
