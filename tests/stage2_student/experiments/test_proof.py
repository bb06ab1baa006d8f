"""`student proof` on a small teacher: its runs are pairs, what is finished stays, and what does not fit is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from shared.cache.reader import Cache
from shared.cli import codedistill
from shared.errors import CacheMismatchError, ConfigError
from shared.eval.fidelity.measure import evaluate_fidelity
from shared.files import read_json
from stage1_teacher.cli import teacher as teacher_command
from stage2_student.cli import student
from stage2_student.experiments.dense import write_dense
from stage2_student.experiments.proof import prove
from tests.support import warm
from tests.support.eval_models import save_model
from tests.support.wandb_runs import wandb_runs

EXPERIMENT = """
preset = "tiny"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
block_size = 64
per_device_train_batch_size = 2
num_train_epochs = 3
bf16 = false
[grid]
learning_rate = [1e-3, 1e-2]
[confirm]
seeds = [1, 2]
[[variant]]
name = "cross-entropy"
alpha = 0.0
[[variant]]
name = "dense"
loss = "dense"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher, its three caches and an experiment."""
    folder = tmp_path_factory.mktemp("proof")
    save_model(folder / "teacher")
    for name, count in (("train", 24), ("validation", 5), ("test", 7)):
        rows = [{"prompt": f"# {name} {i}", "completion": f"\nx = {i}\n" + "y = x\n" * (i % 9)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = ["--dataset", folder / f"{name}.jsonl", "--out", folder / name, "--dtype", "bfloat16"]
        done = CliRunner().invoke(teacher_command, ["build", "--teacher", *map(str, [folder / "teacher", *options])])
        assert done.exit_code == 0, done.exception
    (folder / "experiment.toml").write_text(EXPERIMENT)
    return folder


def arguments(made):
    return (made / "experiment.toml", made / "train", made / "validation", made / "test", made / "out")


@pytest.fixture(scope="module")
def proved(made):
    experiment, train, validation, test, out = map(str, arguments(made))
    command = ["proof", "--cache", train, "--validation", validation, "--test", test, "--config", experiment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        warm.fork_students(patch)
        done = CliRunner().invoke(
            codedistill, ["student", *command, "--teacher", str(made / "teacher"), "--out", out, "--jobs", "2"]
        )
    assert done.exit_code == 0, done.exception
    return done.stdout


def test_all_students_are_tracked_in_the_proofs_group(made, proved):
    result = read_json(made / "out" / "proof.json")
    for folder, rows in (("search", result["search"]), ("final", result["runs"])):
        runs = wandb_runs(made / "out" / folder)
        assert len(runs) == len(rows) > 0
        assert set(runs.values()) == {("out", 0)}


def test_runs_of_a_seed_are_pairs_and_the_search_never_sees_the_test_set(made, proved):
    out = made / "out"
    result = read_json(out / "proof.json")
    assert proved.splitlines() == result["summary"]
    assert result["command"].startswith("codedistill student proof --cache ")
    assert {path.name for path in out.iterdir()} == {"search", "final", "proof.json", "proof.md", "proof.svg"}
    assert [run["scored_on_sha256"] for run in result["search"]] == [None] * 4
    assert len({run["scored_on_sha256"] for run in result["runs"]} - {None}) == 1
    for seed in (1, 2):
        runs = [run for run in result["runs"] if run["seed"] == seed]
        assert [run["swept"]["variant"] for run in runs] == ["cross-entropy", "dense"]
        for key in ("initial_weights_sha256", "data", "steps"):
            assert runs[0][key] == runs[1][key], key
    assert len({run["initial_weights_sha256"] for run in result["runs"]}) == 2


def test_a_run_ends_with_its_best_epoch_and_is_scored_in_float32(made, proved):
    result = read_json(made / "out" / "proof.json")
    for run in result["runs"]:
        folder = made / "out" / "final" / run["name"]
        assert len(run["validation_nll_nats"]) == 3
        best = min(run["validation_nll_nats"])
        assert run["validation_nll_nats"][run["best_epoch"] - 1] == best
        assert read_json(folder / "run.json")["metrics"]["eval_ce"] == best
        validation = evaluate_fidelity(folder, made / "validation", dtype="float32", batch_tokens=64)
        assert validation.nll_nats == pytest.approx(best, rel=1e-5)
        test = evaluate_fidelity(folder, made / "test", dtype="float32", batch_tokens=64)
        assert run["nll_nats"] == pytest.approx(test.nll_nats, rel=1e-5)
        assert run["kl_to_teacher_nats"] == pytest.approx(test.kl_to_teacher_nats, rel=1e-5)
        assert not list(folder.glob("checkpoint-*"))


def test_a_finished_proof_is_left_alone_and_other_settings_are_refused(made, proved, tmp_path):
    files = [path for path in (made / "out").glob("*/*/*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    then = read_json(made / "out" / "proof.json")
    result = prove(*arguments(made), teacher=made / "teacher")
    assert {path: path.stat().st_mtime_ns for path in files} == before and len(before) > 8
    assert result.to_dict()["variants"] == then["variants"] and result.runs == then["runs"]
    _, train, validation, test, out = arguments(made)
    (tmp_path / "experiment.toml").write_text(EXPERIMENT.replace("num_train_epochs = 3", "num_train_epochs = 2"))
    with pytest.raises(ConfigError, match="another num_train_epochs"):
        prove(tmp_path / "experiment.toml", train, validation, test, out, teacher=made / "teacher")


def test_what_does_not_fit_is_refused(made, tmp_path):
    experiment, train, validation, test, _ = arguments(made)
    with pytest.raises(ConfigError, match="share a document"):
        prove(experiment, train, validation, train, tmp_path / "new", teacher=made / "teacher")
    with pytest.raises(ConfigError, match="needs the teacher"):
        prove(experiment, train, validation, test, tmp_path / "new")
    save_model(tmp_path / "other", seed=1)
    with pytest.raises(CacheMismatchError, match="not those of the cache"):
        prove(experiment, train, validation, test, tmp_path / "new", teacher=tmp_path / "other")
    shutil.rmtree(tmp_path / "new")


def test_full_distributions_are_the_teachers_but_certain_where_documents_end(made, tmp_path):
    cache = Cache(made / "validation")
    write_dense(made / "teacher", cache, tmp_path / "dense.npy")
    rows = torch.from_numpy(np.load(tmp_path / "dense.npy")).double().exp()
    assert torch.allclose(rows.sum(1), torch.ones(len(rows), dtype=torch.float64), atol=1e-2)
    at = 0
    for doc in range(cache.num_documents):
        at += int(cache.loss_mask(doc)[:-1].sum())
        row, end = rows[at - 1], int(cache.tokens(doc)[-1])
        assert row[end] == 1 and row.sum() == 1
        assert rows[at - 2].max() < 1


def test_full_distributions_of_another_cache_are_refused(made, tmp_path):
    write_dense(made / "teacher", Cache(made / "validation"), tmp_path / "other.npy")
    options = ["train", "--cache", str(made / "train"), "--out", str(tmp_path / "run"), "--preset", "tiny"]
    for more, words in [
        (["--set=loss=dense"], "belong together"),
        (["--teacher-logprobs", str(tmp_path / "other.npy")], "belong together"),
        (["--set=loss=dense", "--teacher-logprobs", str(tmp_path / "none.npy")], "log-probabilities are missing"),
        (["--set=loss=dense", "--teacher-logprobs", str(tmp_path / "other.npy")], "log-probabilities of another cache"),
    ]:
        error = CliRunner().invoke(student, [*options, *more]).exception
        assert isinstance(error, ConfigError) and words in str(error)
