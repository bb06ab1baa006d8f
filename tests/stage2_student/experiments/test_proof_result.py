"""What a proof trains, chooses and claims, and which experiments prove nothing."""

import re
from pathlib import Path

import pytest

import stage2_student
from shared.errors import ConfigError
from shared.eval.report.plots import proof_plot
from shared.eval.results import Comparison, PairedDifference, Proof, ProofVariant, Spread
from shared.files import write_json
from stage2_student.experiments.grid import read_experiment
from stage2_student.experiments.proof import BEST_EPOCH, choose, prove, summarise_proof
from stage2_student.experiments.report import proof_page
from stage2_student.experiments.runner import Row

FOLDER = Path(stage2_student.__file__).parent
EXPERIMENT = """
preset = "tiny"
seed = 9
[grid]
learning_rate = [1e-3, 2e-3]
[confirm]
seeds = [1, 2, 3]
[[variant]]
name = "ce"
alpha = 0.0
[[variant]]
name = "truncated"
loss = "truncated"
k = 8
[[variant]]
name = "ghost"
k = 8
versus = ["truncated"]
"""


def experiment_of(tmp_path, text=EXPERIMENT):
    (tmp_path / "experiment.toml").write_text(text)
    return read_experiment(tmp_path / "experiment.toml")


def test_the_profile_has_the_variants_of_the_claim():
    experiment = read_experiment(FOLDER / "configs" / "proof.toml")
    configs = {run.swept["variant"]: run.config for run in experiment.runs()}
    assert {(c.loss, c.k) for name, c in configs.items() if c.alpha and name != "dense"} == {
        (loss, k) for loss in ("ghost", "truncated") for k in (8, 16, 50)
    }
    assert configs["cross-entropy"].alpha == configs["label-smoothing"].alpha == 0
    assert configs["label-smoothing"].label_smoothing > 0
    assert configs["dense"].loss == "dense"
    assert len(experiment.confirm.seeds) >= 5


def test_variants_differ_only_in_their_own_settings(tmp_path):
    experiment = experiment_of(tmp_path)
    chosen = {name: {"learning_rate": rate} for name, rate in (("ce", 1e-3), ("truncated", 2e-3), ("ghost", 2e-3))}
    search, final = experiment.runs(BEST_EPOCH), experiment.confirming_runs(chosen, BEST_EPOCH)
    assert len({run.name for run in search}) == 6
    assert [run.name for run in final[:3]] == [
        "ce,learning_rate=0.001,seed=1", "truncated,learning_rate=0.002,seed=1", "ghost,learning_rate=0.002,seed=1",
    ]  # fmt: skip
    assert [run.config.seed for run in search + final] == [9] * 6 + [1] * 3 + [2] * 3 + [3] * 3
    own = {"alpha", "loss", "k", "learning_rate", "seed"}
    first = search[0].config
    for run in search + final:
        for field in type(first).__dataclass_fields__.keys() - own:
            assert getattr(run.config, field) == getattr(first, field), field


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds = [1, 2, 3]", "seeds = [1]", "two or more"),
        ("seeds = [1, 2, 3]", "seeds = [1, 1]", "two or more"),
        ("seeds = [1, 2, 3]", "seeds = [1, 9]", "none the search's"),
        ("[confirm]", "seed = [4, 5]\n[confirm]", "two or more in .confirm. seeds"),
        ("k = 8\nversus", "label_smoothing = 0.1\nversus", "smoothed"),
        ("k = 8\nversus", 'k = 8\nloss = "dense"\nversus', "the full distribution"),
        ('[[variant]]\nname = "ce"', '[[run]]\nk = 3\n[[variant]]\nname = "ce"', "no ..run"),
        (EXPERIMENT[EXPERIMENT.index('[[variant]]\nname = "truncated"') :], "", "compares variants"),
    ],
)
def test_an_experiment_that_proves_nothing_is_refused(tmp_path, old, new, words):
    assert old in EXPERIMENT
    (tmp_path / "experiment.toml").write_text(EXPERIMENT.replace(old, new, 1))
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match=words):
        prove(tmp_path / "experiment.toml", nowhere, nowhere, nowhere, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def trial(variant, rate, *nll):
    return Row(name="", setting="", seed=9, swept={"variant": variant, "learning_rate": rate}, seconds=1.0,
               validation_nll_nats=list(nll), best_epoch=2)  # fmt: skip


def test_the_choice_rests_on_the_best_validation_epoch(tmp_path):
    searched = [
        trial("ce", 1e-3, 6.0, 5.0, 7.0), trial("ce", 2e-3, 5.5, 5.1),
        trial("truncated", 1e-3, 5.0), trial("truncated", 2e-3, 4.0),
        trial("ghost", 1e-3, 3.0), trial("ghost", 2e-3, 3.0),
    ]  # fmt: skip
    rates = {name: values["learning_rate"] for name, values in choose(experiment_of(tmp_path), searched).items()}
    assert rates == {"ce": 1e-3, "truncated": 2e-3, "ghost": 1e-3}


NLL = {"ce": (5.0, 5.5, 6.0), "truncated": (5.1, 5.4, 6.0), "ghost": (4.0, 4.51, 4.99)}
CACHE = {"documents": 1, "tokens": 2, "shards": {"a.h5": "0" * 64}, "label_identity": "1" * 64}
SETTINGS = {"top_k": 64, "seeds": [1, 2, 3], "caches": {"train": CACHE}}


def finals(**changed):
    configs = {
        "ce": {"loss": "ghost", "k": 0, "alpha": 0.0},
        "truncated": {"loss": "truncated", "k": 8, "alpha": 0.7},
        "ghost": {"loss": "ghost", "k": 0, "alpha": 0.7},
    }
    common = {"temperature": 1.0, "label_smoothing": 0.0, "learning_rate": 1e-3, "block_size": 64}
    return [
        Row(**{"name": name, "setting": "", "swept": {"variant": name, "learning_rate": 1e-3, "seed": seed},
               "seed": seed, "best_epoch": 1, "steps": 7, "seconds": 1.0, "nll_nats": value, "reasons": {},
               "kl_to_teacher_nats": value / 2, "config": configs[name] | common, "data": {"blocks": 3},
               "initial_weights_sha256": f"w{seed}"} | (changed if name == "ce" else {}))
        for name, values in NLL.items() for seed, value in zip((1, 2, 3), values, strict=True)
    ]  # fmt: skip


def test_claims_are_paired_and_negative_results_stay_in(tmp_path):
    searched = [trial(name, rate, 5.0) for name in NLL for rate in (1e-3, 2e-3)]
    proof = summarise_proof(experiment_of(tmp_path), SETTINGS, searched, finals())
    ce, truncated, ghost = proof.variants
    assert (ce.loss, ce.k, ce.versus_ce) == ("cross-entropy", None, None)
    assert (truncated.loss, truncated.k) == ("truncated", 8)
    assert (ghost.loss, ghost.k, ghost.test_nll.mean) == ("ghost", 64, pytest.approx(4.5))
    assert (ghost.epochs, ghost.epochs_by_seed) == (2, [1, 1, 1])
    assert ghost.test_nll.seeds == list(NLL["ghost"])
    assert ce.test_nll.sd == pytest.approx(0.5)
    assert ghost.versus_ce.difference == pytest.approx(-1.0) and ghost.versus_ce.significant
    assert truncated.versus_ce.difference == pytest.approx(0.0) and not truncated.versus_ce.significant
    assert [(row.setting, row.versus) for row in proof.comparisons] == [
        ("truncated", "ce"), ("ghost", "ce"), ("ghost", "truncated"),
    ]  # fmt: skip
    assert ghost.versus_ce.p_holm == pytest.approx(3 * ghost.versus_ce.p)
    assert "truncated: no difference from ce shown" in proof.summary[0]
    assert "ghost: lower test NLL than ce" in proof.summary[1]
    text = proof_page(proof)
    assert re.search(r"\| ghost +\| ce +\| \*\*-1.0000\*\* ", text)
    assert re.search(r"\| truncated +\| ce +\| \+0.0000 ", text)
    write_json(tmp_path / "proof.json", proof.to_dict())
    assert Proof.read(tmp_path / "proof.json") == proof
    drawing = proof_plot(proof).svg()
    assert drawing.startswith(b"<?xml") and drawing == proof_plot(proof).svg()


def test_the_readmes_plot_shows_the_figures_of_the_log():
    """proof.svg is what `student proof` draws, from the differences that LOG.md lists; it has no figures by seed."""
    variants = [variant_of("cross-entropy", None)]
    number = r"\**([-+][\d.]+)\** \(([-+][\d.]+) to ([-+][\d.]+)\)"
    for line in (FOLDER / "LOG.md").read_text().splitlines():
        if found := re.fullmatch(rf"\| (\S+) − cross-entropy \| {number} \| ([\d.]+) \| {number} \|", line):
            nll, kl = (paired(*map(float, found.group(*groups))) for groups in ((2, 3, 4), (6, 7, 8)))
            versus = Comparison(setting=found[1], versus="cross-entropy", p_holm=float(found[5]),
                                kl=PairedDifference(**kl), **nll)  # fmt: skip
            variants.append(variant_of(found[1], versus))
    assert len(variants) == 10
    proof = Proof(variants=variants, comparisons=[], summary=[], settings={}, search=[], runs=[], seconds=0.0)
    assert (FOLDER / "proof.svg").read_bytes() == proof_plot(proof).svg()


def paired(difference, low, high):
    return {"difference": difference, "ci95": [low, high], "p": 0.0, "significant": not low <= 0 <= high}


def variant_of(name, versus):
    unknown = Spread(mean=0.0, sd=None, seeds=[])
    return ProofVariant(
        name=name, loss="", k=None, alpha=0.7, temperature=1.0, label_smoothing=0.0, learning_rate=1e-3, epochs=3,
        epochs_by_seed=[], test_nll=unknown, test_kl=unknown, versus_ce=versus,
    )  # fmt: skip


def test_a_run_without_figures_is_refused(tmp_path):
    lost = {"nll_nats": None, "reasons": {"nll_nats": "not finite (inf)"}}
    with pytest.raises(ConfigError, match=r"no test figures; where: ce; got: .*not finite"):
        summarise_proof(experiment_of(tmp_path), SETTINGS, [], finals(**lost))


@pytest.mark.parametrize("changed", [{"initial_weights_sha256": "other"}, {"data": {"blocks": 4}}, {"steps": 8}])
def test_students_that_began_differently_are_no_pairs(tmp_path, changed):
    with pytest.raises(ConfigError, match="no pairs"):
        summarise_proof(experiment_of(tmp_path), SETTINGS, [], finals(**changed))
