"""A proof's plan: what is trained with what, what is refused, and what its choice and its claims rest on."""

from pathlib import Path

import pytest

import stage2_student
from shared.errors import ConfigError
from stage2_student.experiments.outcome import choose, summarise
from stage2_student.experiments.proof_plan import read_plan
from stage2_student.experiments.proof_report import page, plot

PROFILE = Path(stage2_student.__file__).parent / "configs" / "proof.toml"
PLAN = """
learning_rates = [1e-3, 2e-3]
search_seed = 9
seeds = [1, 2, 3]
[student]
preset = "tiny"
[[arm]]
name = "ce"
alpha = 0.0
[[arm]]
name = "truncated"
loss = "truncated"
k = 8
[[arm]]
name = "ghost"
k = 8
versus = ["truncated"]
"""


def plan_of(tmp_path, text=PLAN):
    (tmp_path / "plan.toml").write_text(text)
    return read_plan(tmp_path / "plan.toml")


def test_the_profile_has_the_arms_of_the_claim():
    plan = read_plan(PROFILE)
    configs = {member.arm.name: member.config for member in plan.search()}
    assert {(c.loss, c.k) for name, c in configs.items() if c.alpha and name != "dense"} == {
        (loss, k) for loss in ("ghost", "truncated") for k in (8, 16, 50)
    }
    assert configs["cross-entropy"].alpha == configs["label-smoothing"].alpha == 0
    assert configs["label-smoothing"].label_smoothing > 0
    assert [arm.name for arm in plan.arms if arm.dense] == ["dense"]
    assert len(plan.seeds) >= 5


def test_arms_differ_in_their_own_settings_alone(tmp_path):
    plan = plan_of(tmp_path)
    members = plan.search() + plan.finals({"ce": 1e-3, "truncated": 2e-3, "ghost": 2e-3})
    assert len({member.name for member in members}) == len(members) == 6 + 9
    assert [member.seed for member in members] == [9] * 6 + [1] * 3 + [2] * 3 + [3] * 3
    own = {"alpha", "loss", "k", "learning_rate", "seed"}
    first = members[0].config
    for member in members:
        for field in type(first).__dataclass_fields__.keys() - own:
            assert getattr(member.config, field) == getattr(first, field), field


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"ghost"\nk', '"ce"\nk', "told apart"),
        ('"ghost"\nk', '"../x"\nk', "told apart"),
        ('["truncated"]', '["dense"]', "an arm that is not there"),
        ('["truncated"]', '["ghost"]', "an arm that is not there"),
        ("seeds = [1, 2, 3]", "seeds = [1]", "two or more"),
        ("seeds = [1, 2, 3]", "seeds = [1, 1]", "two or more"),
        ("seeds = [1, 2, 3]", "seeds = [1, 9]", "none the search's"),
        ("[1e-3, 2e-3]", "[]", "one or more"),
        ("[1e-3, 2e-3]", "[1e-3, 0.001]", "one or more"),
        ("k = 8\nversus", "k = 8\nlearning_rate = 0.1\nversus", "all arms have the same"),
        ("k = 8\nversus", "k = 8\ndense = true\nversus", "the full distribution"),
        ("k = 8\nversus", "kk = 8\nversus", "unknown configuration key"),
        ("k = 8\nversus", "k = 8\nlabel_smoothing = 0.1\nversus", "smoothed"),
        ("seeds =", "sead = 1\nseeds =", "unknown configuration key"),
    ],
)
def test_a_plan_that_proves_nothing_is_refused(tmp_path, old, new, words):
    assert old in PLAN
    with pytest.raises(ConfigError, match=words):
        plan_of(tmp_path, PLAN.replace(old, new, 1))


def trial(arm, rate, *nll):
    return {"arm": arm, "learning_rate": rate, "validation_nll_nats": list(nll), "best_epoch": 1, "seconds": 1.0}


def test_the_choice_rests_on_the_best_validation_epoch(tmp_path):
    """Trials have no test figures at all."""
    plan = plan_of(tmp_path)
    searched = [
        trial("ce", 1e-3, 6.0, 5.0, 7.0), trial("ce", 2e-3, 5.5, 5.1),
        trial("truncated", 1e-3, 5.0), trial("truncated", 2e-3, 4.0),
        trial("ghost", 1e-3, 3.0), trial("ghost", 2e-3, 3.0),
    ]  # fmt: skip
    assert choose(plan, searched) == {"ce": 1e-3, "truncated": 2e-3, "ghost": 1e-3}


def finals(nll, *, order="o"):
    return [
        {"arm": arm, "learning_rate": 1e-3, "seed": seed, "best_epoch": 1, "seconds": 1.0, "test_nll_nats": value,
         "test_kl_nats": value / 2, "initial_weights_sha256": f"w{seed}",
         "data_order_sha256": order if arm == "ce" else "o"}
        for arm, values in nll.items() for seed, value in zip((1, 2, 3), values, strict=True)
    ]  # fmt: skip


NLL = {"ce": (5.0, 5.5, 6.0), "truncated": (5.1, 5.4, 6.0), "ghost": (4.0, 4.51, 4.99)}
CACHE = {"documents": 1, "tokens": 2, "shards": {"a.h5": "0" * 64}, "label_identity": "1" * 64}
SETTINGS = {"top_k": 64, "seeds": [1, 2, 3], "caches": {"train": CACHE}}


def test_claims_are_paired_and_negative_results_stay_in(tmp_path):
    plan = plan_of(tmp_path)
    searched = [trial(arm.name, rate, 5.0) for arm in plan.arms for rate in plan.learning_rates]
    result = summarise(plan, SETTINGS, searched, finals(NLL))
    ce, truncated, ghost = result["arms"]
    assert (ce["loss"], ce["k"], ce["versus_ce"]) == ("cross-entropy", None, None)
    assert (ghost["loss"], ghost["k"], ghost["test_nll"]["mean"]) == ("ghost", 8, pytest.approx(4.5))
    assert ghost["test_nll"]["seeds"] == list(NLL["ghost"])
    assert ce["test_nll"]["sd"] == pytest.approx(0.5)
    assert ghost["versus_ce"]["difference"] == pytest.approx(-1.0) and ghost["versus_ce"]["significant"]
    assert truncated["versus_ce"]["difference"] == pytest.approx(0.0) and not truncated["versus_ce"]["significant"]
    assert [(row["arm"], row["versus"]) for row in result["comparisons"]] == [
        ("truncated", "ce"), ("ghost", "ce"), ("ghost", "truncated"),
    ]  # fmt: skip
    assert ghost["versus_ce"]["p_holm"] == pytest.approx(3 * ghost["versus_ce"]["p"])
    assert "truncated: no difference from ce shown" in result["summary"][0]
    assert "ghost: lower test NLL than ce" in result["summary"][1]
    text = page(result)
    assert "| ghost | ce | **-1.0000** |" in text and "| truncated | ce | +0.0000 |" in text
    assert plot(result).startswith(b"<?xml") and plot(result) == plot(result)


def test_students_that_began_differently_are_no_pairs(tmp_path):
    with pytest.raises(ConfigError, match="no pairs"):
        summarise(plan_of(tmp_path), SETTINGS, [], finals(NLL, order="another"))
