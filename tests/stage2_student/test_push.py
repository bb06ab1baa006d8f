"""`student export --push-to-hub` with the real client against a Hub on this machine, and loading what was pushed."""

import json
import pickle

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from shared.errors import ConfigError
from stage2_student.cli import student
from tests.support.loopback_hub import OWNER, TOKEN, Repository
from tests.support.student_cache import make_cache
from tests.support.warm import Forks
from tests.support.warm import run as run_forked

FILES = {
    "README.md", "config.json", "generation_config.json", "lineage.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip
LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
name, folder = sys.argv[1:]
pushed, ours = AutoModelForCausalLM.from_pretrained(name), AutoModelForCausalLM.from_pretrained(folder)
ids = AutoTokenizer.from_pretrained(name)("def add(a, b):", return_tensors="pt").input_ids
assert (pushed(ids).logits == ours(ids).logits).all() and pushed.config.model_type == "starcoder2"
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, with a pickle that somebody laid beside its weights."""
    folder = tmp_path_factory.mktemp("push")
    options = {"preset": "tiny", "block_size": 48, "max_steps": 2, "save_steps": 0, "bf16": False}
    assigned = [f"--set={key}={json.dumps(value)}" for key, value in options.items()]
    cache = make_cache(folder / "cache").path
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        done = CliRunner().invoke(student, ["train", "--cache", str(cache), "--out", str(folder / "run"), *assigned])
    assert done.exit_code == 0, done.output
    (folder / "run" / "pytorch_model.bin").write_bytes(pickle.dumps("weights"))
    return folder / "run"


@pytest.fixture
def push(hub, run, tmp_path, monkeypatch):
    """`student export --push-to-hub` in this process, whose client knows the Hub and its owner's token."""
    for name, value in {"ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def push(name, *options, out="exported"):
        command = ["export", str(run), "--out", str(tmp_path / out), "--push-to-hub", name, *options]
        return CliRunner().invoke(student, command)

    return push


def test_a_pushed_student_is_loaded_back_from_the_hub(hub, run, push, tmp_path):
    """Both in processes of their own, as a user does it."""
    name, out = f"{OWNER}/student", tmp_path / "exported"
    environment = hub.environment(tmp_path / "home", HF_TOKEN=TOKEN)
    forks = Forks(environment)
    command = ["student", "export", run, "--out", out, "--push-to-hub", name, "--private"]
    done = run_forked(*command, env=environment, forks=forks)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(out), f"{hub.endpoint}/{name}"]
    assert TOKEN not in done.stdout + done.stderr
    repository = hub.models[name]
    assert repository.private
    pushed = repository.commits[repository.branches["main"]]
    assert pushed.keys() - {".gitattributes"} == FILES
    assert all(pushed[file] == (out / file).read_bytes() for file in FILES)
    assert run_forked(name, out, program=LOAD, env=environment, forks=forks).returncode == 0
    forks.stop()


def test_a_repository_that_is_there_takes_it_unless_it_is_public_and_must_not_be(hub, push):
    name = f"{OWNER}/again"
    hub.models[name] = Repository()
    first = hub.models[name].commit({"README.md": b"old"})
    done = push(name, "--private", out="refused")
    assert isinstance(done.exception, ConfigError)
    assert "the repository is there already and is public" in str(done.exception)
    assert hub.models[name].branches["main"] == first
    done = push(name)
    assert done.exit_code == 0, done.output
    assert hub.models[name].commits[hub.models[name].branches["main"]].keys() == FILES


@pytest.mark.parametrize("name", ["student", "a/b/c", "owner/", "owner/two words", "owner/--x", "../run"])
def test_a_repository_id_that_is_none(push, tmp_path, name):
    error = push(name).exception
    assert isinstance(error, ConfigError)
    assert f"not the id of a repository; where: {name}; expected: OWNER/NAME; got: " in str(error)
    assert not (tmp_path / "exported").exists()


def test_no_token_and_no_hub_are_told_before_anything_is_made(push, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    error = push(f"{OWNER}/new").exception
    assert "there is no token for the Hub" in str(error)
    assert "fix: `hf auth login` with a token that may write, or HF_TOKEN" in str(error)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the Hub is switched off (HF_HUB_OFFLINE=1)" in str(push(f"{OWNER}/new").exception)
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("owner", "token", "endpoint", "message"),
    [
        (OWNER, "hf_stale", None, "the Hub refuses this token; where: writer/new"),
        ("nobody", TOKEN, None, "the Hub refuses this token; where: nobody/new"),
        (OWNER, TOKEN, "http://127.0.0.1:9", "the Hub cannot be reached; where: http://127.0.0.1:9"),
    ],
)
def test_what_fails_on_the_way_says_how_to_go_on(hub, push, tmp_path, monkeypatch, owner, token, endpoint, message):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint or hub.endpoint)
    error = str(push(f"{owner}/new").exception)
    assert error.startswith(message)
    assert f"`hf upload {owner}/new {tmp_path / 'exported'}`" in error
    assert (tmp_path / "exported" / "model.safetensors").exists()
    assert f"{owner}/new" not in hub.models


def test_private_without_a_repository_is_a_usage_error(run, tmp_path):
    done = CliRunner().invoke(student, ["export", str(run), "--out", str(tmp_path / "exported"), "--private"])
    assert done.exit_code == 2
    assert "--private needs --push-to-hub" in done.output
    assert not (tmp_path / "exported").exists()
