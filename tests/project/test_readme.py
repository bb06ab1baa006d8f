"""Every command of the READMEs is run or parsed, and those of the quick start are run as a newcomer would."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path
from unittest import mock

import click
import pytest
from click.testing import CliRunner

from shared.cache import Cache
from shared.cli import codedistill
from shared.files import read_json
from tests.support.hub_contents import mbpp_row, starcoder2
from tests.support.readme import READMES, REPOSITORY, SECTIONS, blocks_of, commands_of

QUICK_START = (".", "Your own teacher and data")
SLURM = ("stage1_teacher", "Several GPUs and Slurm")
LAUNCHERS = ("srun", "torchrun")
OTHERS = ("rsync", "trap", "wait", "pip", "hf")
LINKS = [(folder, link) for folder, text in READMES.items() for link in re.findall(r"\]\(([^)#]+)\)", text)]


@mock.patch.object(click.Path, "convert", lambda self, value, *_: Path(value))  # the files need not be there
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


@pytest.mark.parametrize("section", [section for section in SECTIONS if commands_of(section)], ids=" ".join)
def test_every_command_is_well_formed(section):
    for words in commands_of(section):
        if words[0] in LAUNCHERS:
            words = words[words.index("codedistill") : words.index("&") if "&" in words else None]
        if words[0] == "make":
            dry_run(words)
        elif words[0] == "codedistill":
            parse(words)
        else:
            assert words[0] in OTHERS, words


def test_every_block_is_checked_and_so_is_every_make_command_in_the_text():
    known = {"bash", "python", "text", "toml", "mermaid"}
    for folder, readme in READMES.items():
        blocks = re.findall(r"^```(.*)$", readme, re.MULTILINE)
        assert set(blocks[::2]) <= known and set(blocks[1::2]) <= {""}
        in_sections = sum(text.count("```bash") for (where, _), text in SECTIONS.items() if where == folder)
        assert readme.count("```bash") == in_sections
        for command in re.findall(r"`(?:\w+=\S+ )?(make [^`]*)`", readme):
            dry_run(shlex.split(command))
    steps = [line for line in (REPOSITORY / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert steps == ["make check", "make all PROFILE=demo"]


@pytest.mark.parametrize(("folder", "link"), [pair for pair in LINKS if "://" not in pair[1]])
def test_links_lead_to_files(folder, link):
    assert (REPOSITORY / folder / link).exists()


def test_the_batch_script_passes_the_signal_on_and_requeues_after_its_processes(tmp_path):
    """With stand-ins for Slurm's commands, which write what they were called for."""
    (script,) = [block for block in blocks_of(SLURM, "bash") if block.startswith("#!/bin/bash")]
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
    """A new user's folder: a tiny teacher and files of their own."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "TEACHER").mkdir()
    starcoder2(folder / "TEACHER")
    rows = [{"prompt": f"What is {i} + 1?\n", "completion": f"It is {i + 1}."} for i in range(30)]
    for name, chosen in (("mine", rows[:25]), ("heldout", rows[25:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    prompt = {"prompt": "def add(a, b):", "test": "def check(add):\n    assert add(1, 2) == 3\n", "entry_point": "add"}
    (folder / "prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    mbpp = [mbpp_row(i) for i in (*range(511, 517), *range(601, 625))]
    (folder / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mbpp))
    return folder


def run(words):
    result = CliRunner().invoke(codedistill, words)
    assert result.exit_code == 0, (words, result.output, result.exception)


def test_the_quick_start(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for words in commands_of(QUICK_START):
        short = {"humaneval": ["--limit=2", "--max-new-tokens=4"], "generate": ["--keep=all", "--max-new-tokens=8"]}
        run(words[1:] + next((options for word, options in short.items() if word in words), []))
    assert [Cache(f"caches/{name}").num_documents for name in ("mine", "heldout")] == [25, 5]
    (program,) = blocks_of(QUICK_START, "python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "README.md", "exec"), {})
    lines = printed.getvalue().splitlines()
    probabilities = [float(line.split()[-1]) for line in lines[:5]]
    assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 1.001
    assert lines[5].startswith("def add(a, b):")


def test_mbpps_own_file_becomes_two_caches_and_a_report(workplace, monkeypatch):
    """The Makefile's steps by hand: two splits of MBPP, a student and its baseline, and the report of all three."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    build = ["teacher", "build", "--teacher", "TEACHER", "--dataset", "mbpp.jsonl"]
    for split in ("train", "validation"):
        run([*build, "--split", split, "--out", f"caches/{split}"])
    assert [Cache(f"caches/{split}").num_documents for split in ("train", "validation")] == [24, 6]
    for name, alpha in (("kd", 0.7), ("ce", 0)):
        train = ["student", "train", "--cache", "caches/train", "--preset", "tiny", "--set", "max_steps=2"]
        run([*train, "--out", f"runs/{name}", "--set", f"alpha={alpha}"])
    for name, model in (("teacher", "TEACHER"), ("kd", "runs/kd"), ("ce", "runs/ce")):
        fidelity = ["eval", "fidelity", "--model", model, "--cache", "caches/validation"]
        run([*fidelity, "--out", f"measured/{name}/fidelity.json"])
    students = ["--student", "kd=runs/kd", "--student", "ce=runs/ce"]
    run(["eval", "report", "--eval", "measured", *students, "--cache", "caches/train", "--out", "report"])
    assert list(read_json(workplace / "report" / "report.json")["models"]) == ["teacher", "kd", "ce"]
