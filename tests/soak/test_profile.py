"""The profile `starcoder2` in fresh clones, on CPU, with only the Hub exchanged: `make all`; README's two machines.

Needs git; `unshare --net` for the second machine.
"""

import json
import shutil
import site
import subprocess
import sys

import pytest

from shared.cache.reader import Cache
from shared.cache.verify import verify_cache
from shared.files import read_json
from tests.support.eval_models import NO_DRAFT, unknown_figures
from tests.support.hub_contents import MBPP, SPLITS, TEACHER, starcoder2
from tests.support.loopback_hub import Repository
from tests.support.readme import REPOSITORY, commands_of

# The profile's settings stay; only so few and small steps, and problems, that two processor cores take them.
FEW_STEPS = "max_steps=2 per_device_train_batch_size=1 per_device_eval_batch_size=1 block_size=256"
FEW_PROBLEMS = "HUMANEVAL=--limit 3 --max-new-tokens 4"
OTHER_TEACHER = "Qwen/Qwen2.5-Coder-3B"
NAMESPACE = ["unshare", "--net", "--map-root-user"]


def fresh_clone(clone):
    """A clone of HEAD whose .venv holds what this environment holds, but takes our packages from the clone."""
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, clone], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone / ".venv"], check=True)
    (packages,) = (clone / ".venv" / "lib").glob("python*/site-packages")
    (packages / "clone.pth").write_text("\n".join([str(clone), *site.getsitepackages(), ""]))
    program = clone / ".venv" / "bin" / "codedistill"
    program.write_text(f"#!{clone}/.venv/bin/python\nfrom shared.__main__ import main\nmain()\n")
    program.chmod(0o755)
    (clone / ".venv" / ".installed").touch()
    return clone


def run(clone, environment, *command, code=0):
    """Run a command in a clone, as its user does; gives what it printed."""
    environment = {key: value for key, value in environment.items() if key not in ("PYTHONPATH", "MAKEFLAGS")}
    environment |= {"WANDB_MODE": "offline", "PATH": f"{clone}/.venv/bin:{environment['PATH']}"}
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def state_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def two_teachers(hub, tmp_path_factory):
    """The Hub, with the README's other teacher as well."""
    hub.models[OTHER_TEACHER] = Repository()
    hub.models[OTHER_TEACHER].commit(starcoder2(tmp_path_factory.mktemp("other"), seed=1))
    return hub


def test_make_all(two_teachers, tmp_path):
    hub = two_teachers
    clone, environment = fresh_clone(tmp_path / "clone"), hub.environment(tmp_path / "home")
    everything = ("make", "all", "PROFILE=starcoder2", f"SET={FEW_STEPS}", FEW_PROBLEMS)
    run(clone, environment, *everything)
    for step in ("draft", "report"):
        run(clone, environment, "make", step, "PROFILE=starcoder2", "DRAFT=--limit 2 --new-tokens 4 --repeats 1")
    made = clone / "artifacts" / "starcoder2"
    for split in ("train", "validation"):
        cache = Cache(made / f"cache-{split}")
        assert verify_cache(cache.path) == []
        (source,) = cache.manifest.sources
        assert (source["name"], source["split"], source["num_documents"]) == ("mbpp", split, len(SPLITS[split]))
        assert source["revision"] == hub.datasets[MBPP].branches["main"]
        teacher = cache.manifest.identity["teacher"]
        assert (teacher["name"], teacher["commit"]) == (TEACHER, hub.models[TEACHER].branches["main"])

    models = read_json(made / "report" / "report.json")["models"]
    assert list(models) == ["teacher", "student_kd", "student_ce"]
    for name, figures in models.items():
        assert figures["humaneval"]["num_problems"] == 3
        assert unknown_figures(figures) == (NO_DRAFT if name == "teacher" else set())
    for name, alpha in (("student_kd", 0.7), ("student_ce", 0.0)):
        record = read_json(made / "students" / name / "run.json")
        assert (record["config"]["preset"], record["config"]["alpha"]) == ("gpt-125m", alpha)
        assert record["metrics"]["steps"] == 2

    before = state_of(made)
    said = run(clone, environment, *everything)
    # Caches, the teacher's four results, students, their three results each, latency and the report.
    assert said.count(" is up to date\n") == 2 + 4 + 2 + 2 * 3 + 1 + 1
    no_hub = environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "another learning_rate" in run(
        clone, no_hub, "make", "student", "PROFILE=starcoder2", f"SET={FEW_STEPS} learning_rate=1e-4", code=2
    )
    said = run(clone, environment, "make", "cache", "PROFILE=starcoder2", f"TEACHER={TEACHER}", FEW_PROBLEMS)
    assert said.count(" is up to date\n") == 2 + 4
    other = ("make", "cache", "PROFILE=starcoder2", f"TEACHER={OTHER_TEACHER}")
    assert "teacher" in run(clone, environment, *other, code=2).partition("error: ")[2]
    assert state_of(made) == before


def test_the_readme_s_two_machines(two_teachers, tmp_path):
    """README's commands for the large GPU, Slurm and the cheaper GPU, in order; the last without any network."""
    large, environment = fresh_clone(tmp_path / "large"), two_teachers.environment(tmp_path / "home")
    rows = [{"prompt": f"# {i} squared\n", "completion": f"print({i} ** 2)"} for i in range(20)]
    for name, part in (("code.jsonl", rows[:15]), ("heldout.jsonl", rows[15:])):
        (large / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    makes, audits = (("stage1_teacher", title) for title in ("A large GPU, with make", "Plan and audit"))
    for words in [*commands_of(makes), *commands_of(audits)]:
        if words[1:3] == ["cache", "audit"]:  # of a cache that came from elsewhere
            shutil.copytree(large / "artifacts" / "starcoder2" / "cache-train", large / words[3])
        run(large, environment, *words, *[FEW_PROBLEMS] * (words[0] == "make"))
    own = Cache(large / "artifacts" / "qwen" / "cache-train")
    assert (own.num_documents, own.manifest.identity["teacher"]["name"]) == (15, OTHER_TEACHER)
    (words,) = [words for words in commands_of(("stage1_teacher", "Several GPUs and Slurm")) if "build" in words]
    assert (words[0], words[-1]) == ("srun", "&")
    torchrun = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # here: one node
    run(large, environment, *torchrun, *words[words.index("--no-python") : -1])
    assert (
        Cache(large / "caches" / "cache-train").label_identity
        == Cache(large / "artifacts" / "starcoder2" / "cache-train").label_identity
    )

    small = fresh_clone(tmp_path / "small")
    alone = {key: value for key, value in environment.items() if not key.startswith("HF_")}
    alone["HF_HOME"] = str(tmp_path / "empty")
    copy, *commands = commands_of(("stage2_student", "A cheaper GPU, with make"))
    assert copy == ["rsync", "-a", "big:codedistill/artifacts/starcoder2/cache-*", "caches/"]
    for name in ("cache-train", "cache-validation"):
        shutil.copytree(large / "artifacts" / "starcoder2" / name, small / "caches" / name)
    for words in commands:
        words = [word for word in words if not word.startswith("SET=")] + [
            f"SET={' '.join([word[4:] for word in words if word.startswith('SET=')])} preset=tiny {FEW_STEPS}"
        ] * ("student" in words)
        run(small, alone, *NAMESPACE, *words, FEW_PROBLEMS)
    made = small / "artifacts" / "starcoder2"
    models = read_json(made / "report" / "report.json")["models"]
    assert list(models) == ["teacher", "student_kd", "student_ce", "cool"]
    assert all(unknown_figures(figures) == NO_DRAFT for figures in models.values())  # no teacher to draft for
    configs = [read_json(made / "students" / name / "run.json")["config"] for name in list(models)[1:]]
    assert [(c["alpha"], c["seed"]) for c in configs] == [(0.7, 0), (0.0, 0), (0.5, 1)]
