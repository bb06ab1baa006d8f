"""The names and settings of an experiment's runs, what is refused, where they run, and how they are ranked."""

import re
import tomllib

import pytest

from shared.errors import ConfigError
from stage2_student.experiments.grid import read_experiment, to_toml
from stage2_student.experiments.report import rank_rows, run_plot, run_table
from stage2_student.experiments.runner import Row, job_environment
from tests.support.readme import blocks_of


@pytest.fixture
def grid(tmp_path):
    def read(text):
        (tmp_path / "grid.toml").write_text(text)
        return read_experiment(tmp_path / "grid.toml").runs()

    return read


def test_the_product_and_the_runs_in_order(grid):
    runs = grid(
        'preset = "tiny"\nseed = 3\n[grid]\nalpha = [0.5, 1]\nloss = ["ghost", "truncated"]\n'
        "[[run]]\nalpha = 0.0\nnum_hidden_layers = 2\nlr_scheduler_kwargs = { num_cycles = 2 }\n"
    )
    assert [run.name for run in runs] == [
        "alpha=0.5,loss=ghost", "alpha=0.5,loss=truncated", "alpha=1,loss=ghost", "alpha=1,loss=truncated",
        "alpha=0.0,num_hidden_layers=2,lr_scheduler_kwargs=--num_cycles---2-",
    ]  # fmt: skip
    assert runs[3].settings == {"preset": "tiny", "seed": 3, "alpha": 1, "loss": "truncated"}
    assert runs[3].swept == {"alpha": 1, "loss": "truncated"}
    assert (runs[3].config.alpha, runs[3].config.seed, runs[3].config.loss) == (1.0, 3, "truncated")
    assert runs[4].config.student_sizes().num_hidden_layers == 2
    assert runs[4].config.training == {"lr_scheduler_kwargs": {"num_cycles": 2}}


def test_a_name_is_the_same_in_a_grid_that_grew(grid):
    before = grid('preset = "tiny"\n[grid]\nalpha = [0.5]\nseed = [0, 1]\n')
    after = grid('preset = "tiny"\n[grid]\nalpha = [0.1, 0.5]\nseed = [0, 1, 2]\n')
    assert [run.name for run in before] == ["alpha=0.5,seed=0", "alpha=0.5,seed=1"]
    assert {run.name for run in before} < {run.name for run in after}


def test_names_that_would_be_equal_or_too_long_end_in_a_digest(grid):
    names = [run.name for run in grid('[grid]\noptim_args = ["eps=1e-6 ", "eps=1e-6/", "eps=1e-6?"]\n')]
    assert names[0] == "optim_args=eps=1e-6-"
    assert len(set(names)) == 3
    (long,) = grid(f'[grid]\noptim_args = ["{"x" * 400}"]\n')
    assert len(long.name) == 120


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("alpha = 0.5\n", "nothing to train"),
        ("[grid]\n", "nothing to train"),
        ("grid = 3\n", r"wrong type; where: .*grid\.toml, grid; expected: dict"),
        ("run = 3\n[grid]\nalpha = [1]\n", "wrong type; where: .*, run; expected: list"),
        ("[[run]]\n", "must be a table of settings"),
        ("[grid]\nalpha = 0.5\n", r"wrong type; where: .*, grid\.alpha; expected: list"),
        ("[grid]\nalpha = []\n", "needs a list of values"),
        ("[grid]\nalhpa = [0.5]\n", "did you mean 'alpha'"),
        ("temprature = 1.0\n[grid]\nalpha = [0.5]\n", "did you mean 'temperature'"),
        ("[grid]\nalpha = [0.5, 2.0]\n", "refused: .*expected: at least 0, at most 1; got: 2.0; where: .*alpha=2.0"),
        ("[grid]\nalpha = [0.5, 0.5]\n", "two runs are the same.*alpha=0.5 and alpha=0.5"),
        ("[grid]\nalpha = [1, 1.0]\n", "two runs are the same"),
        ("[grid]\nalpha = [0.7]\n[[run]]\nseed = 0\n", "two runs are the same"),
        ("[grid\n", "not valid TOML"),
        ("[[variant]]\nname = 'a'\n[[variant]]\nname = 'a'\nk = 1\n", "told apart"),
        ("[[variant]]\nname = '../x'\n", "told apart"),
        ("[[variant]]\nalpha = 1.0\n", "told apart"),
        ("[[variant]]\nname = 'a'\nversus = ['b']\n", "a variant that does not exist; .*got: b"),
        ("[[variant]]\nname = 'a'\nversus = ['a']\n", "a variant that does not exist; .*got: a"),
        ("[grid]\nk = [1, 2]\n[[variant]]\nname = 'a'\nk = 3\n", "the same grid and seeds; .*got: k"),
        ("[[variant]]\nname = 'a'\nseed = 3\n", "the same grid and seeds; .*got: seed"),
        ("[[variant]]\nname = 'a'\nkk = 3\n", "unknown configuration key"),
        ("[confirm]\nsead = 3\n[grid]\nalpha = [1]\n", r"unknown field; where: .*, confirm\.sead; .*'seeds'"),
    ],
)
def test_what_is_refused(grid, text, words):
    with pytest.raises(ConfigError, match=words):
        grid(text)


@pytest.mark.parametrize(
    "value", [1, -0.5, 1e-5, 1e22, True, 'a "b" \\ é 🙂\n', ["a", [1, 2]], {"a": {"b c": [1.5]}, "d": "x"}, [], {}]
)
def test_values_as_toml(value):
    assert tomllib.loads(f"value = {to_toml(value)}") == {"value": value}


def test_each_variant_has_the_whole_grid(grid):
    runs = grid(
        'preset = "tiny"\n[grid]\nlearning_rate = [1e-3, 2e-3]\nseed = [1, 2]\n'
        '[[variant]]\nname = "ce"\nalpha = 0.0\n[[variant]]\nname = "ghost"\nk = 8\n[[run]]\nk = 4\n'
    )
    assert [run.name for run in runs] == [
        *(f"{name},learning_rate={rate},seed={seed}"
          for name in ("ce", "ghost") for rate in (0.001, 0.002) for seed in (1, 2)),
        "k=4",
    ]  # fmt: skip
    assert runs[4].settings == {"preset": "tiny", "k": 8, "learning_rate": 1e-3, "seed": 1}
    assert runs[4].swept == {"variant": "ghost", "learning_rate": 1e-3, "seed": 1}
    assert runs[4].setting == runs[5].setting == "ghost,learning_rate=0.001"
    assert [run.name for run in grid("[[variant]]\nname = 'ghost'\n")] == ["ghost"]


def test_the_readmes_grid_is_one(grid):
    (text,) = blocks_of(("stage2_student", "Sweeps"), "toml")
    assert len(grid(text)) == 3 * 2 * 3 + 1


def row(name, nll, kl, **swept):
    return Row(name=name, setting=name, seed=0, swept=swept, state="finished", parameters=1234, steps=5,
               nll_nats=nll, kl_to_teacher_nats=kl)  # fmt: skip


ROWS = [
    row("none", None, None, alpha=0.9),
    row("worse", 3.0, 0.5, alpha=0.5, lr=0.001),
    row("tied", 2.5, 0.7, alpha=0.1, lr=0.01),
    row("best", 2.5, 0.25, alpha=0.5, lr=0.0001),
]


def test_ranked_by_nll_then_kl_and_runs_without_figures_last():
    ranked = rank_rows(ROWS)
    assert [row.name for row in ranked] == ["best", "tied", "worse", "none"]
    lines = run_table(ranked).splitlines()
    assert lines[:3] == [
        "| alpha | lr     | NLL    | KL     | parameters | steps | state    |",
        "| ----- | ------ | ------ | ------ | ---------- | ----- | -------- |",
        "| 0.5   | 0.0001 | 2.5000 | 0.2500 | 1,234      | 5     | finished |",
    ]
    assert lines[-1] == "| 0.9   | –      | –      | –      | 1,234      | 5     | finished |"


def test_the_plot_has_a_panel_for_each_setting_and_figure():
    rows = [*ROWS, row("named", 2.7, 0.4, loss="ghost"), row("failed", None, None, seed=1)]
    drawing = run_plot(rows).svg()
    assert drawing == run_plot(rows).svg()
    texts = re.findall(r">([^<>]+)</text>", drawing.decode())
    assert [texts.count(label) for label in ("alpha", "lr", "loss", "seed", "ghost")] == [2, 2, 2, 2, 2]
    assert sum("nats per token" in text for text in texts) == 2
    assert run_plot(ROWS[:1]) is None


def test_each_job_has_one_gpu_or_its_share_of_the_threads(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("WANDB_RUN_ID", "one")
    for visible, expected in (("", ["0", "1", "0"]), ("5,GPU-3a", ["5", "GPU-3a", "5"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        jobs = [job_environment(slot, 3, group="g") for slot in range(3)]
        assert [job["CUDA_VISIBLE_DEVICES"] for job in jobs] == expected
        assert all(job["WANDB_RUN_GROUP"] == "g" and "WANDB_RUN_ID" not in job for job in jobs)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    assert [job_environment(0, jobs, group="g")["OMP_NUM_THREADS"] for jobs in (2, 3, 8)] == ["3", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert job_environment(0, 1, group="g")["OMP_NUM_THREADS"] == "7"
