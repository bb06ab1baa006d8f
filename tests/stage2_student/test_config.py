"""Keys and values of the student's configuration."""

import pytest

from shared.errors import ConfigError
from stage2_student.config import StudentConfig, require_labels, student_config
from tests.support.student_cache import make_cache


def test_later_layers_win_and_defaults_fill_the_rest():
    config = student_config({"alpha": 0.1, "seed": 3}, {"alpha": 1}, {"preset": "tiny"})
    assert config == StudentConfig(alpha=1.0, seed=3, preset="tiny")
    assert isinstance(config.alpha, float)


def test_training_arguments_pass_through():
    given = {"optim": "adamw_torch", "optim_args": "eps=1e-6", "adam_epsilon": 1, "logging_first_step": True}
    given |= {"lr_scheduler_kwargs": {"num_cycles": 2}, "optim_target_modules": ["a"], "dataloader_prefetch_factor": 3}
    assert student_config(given).training == given


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("alhpa", "alpha"),
        ("temprature", "temperature"),
        ("blocksize", "block_size"),
        ("learning_rates", "learning_rate"),
        ("adam_epsilom", "adam_epsilon"),  # only TrainingArguments has it
        ("dataloader_pin_memry", "dataloader_pin_memory"),
    ],
)
def test_an_unknown_key_names_the_nearest_of_both_sides(key, near):
    with pytest.raises(ConfigError, match=f"unknown configuration key '{key}'.*did you mean '{near}'"):
        student_config({key: 1})


@pytest.mark.parametrize("key", ["zzzzzz", "training"])
def test_an_unknown_key_far_from_all_lists_the_choices(key):
    with pytest.raises(ConfigError, match="unknown configuration key"):
        student_config({key: {}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha", "0.5"),
        ("alpha", True),
        ("max_steps", 3.0),
        ("bf16", 1),
        ("preset", 1),
        ("loss", "reverse"),
        ("divergence", "kl"),
        ("k", 1.5),
        ("targets", "prompt"),
        ("adam_epsilon", "small"),
        ("logging_first_step", "yes"),
        ("logging_first_step", 1),
        ("ddp_timeout", 3.5),
        ("ddp_timeout", True),
        ("optim", 3),
        ("lr_scheduler_kwargs", 3),
        ("optim_target_modules", 3),
        ("tf32", "no"),
    ],
)
def test_a_value_of_the_wrong_type_names_the_key(key, value):
    with pytest.raises(ConfigError, match=rf"\.{key};"):
        student_config({key: value})


@pytest.mark.parametrize(
    "key", ["output_dir", "report_to", "remove_unused_columns", "label_smoothing_factor", "hub_token", "push_to_hub"]
)
def test_what_codedistill_sets_itself_is_refused(key):
    with pytest.raises(ConfigError, match=f"cannot be set; where: {key}"):
        student_config({key: "x"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("preset", "huge"),
        ("alpha", 1.1),
        ("alpha", -0.1),
        ("temperature", 0.0),
        ("skew", 0.0),
        ("skew", 1.0),
        ("beta", 0.0),
        ("beta", 1.0),
        ("k", -1),
        ("block_size", 0),
        ("block_size", 2049),
        ("num_train_epochs", 0),
        ("gradient_accumulation_steps", 0),
        ("logging_steps", 0),
        ("save_total_limit", 0),
    ],
)
def test_values_out_of_range_name_the_key(key, value):
    with pytest.raises(ConfigError, match=f"where: {key};"):
        student_config({key: value})


@pytest.mark.parametrize("divergence", ["reverse", "jsd", "skewed-forward", "skewed-reverse"])
@pytest.mark.parametrize("loss", ["sampled", "hybrid"])
def test_samples_have_the_forward_divergence_alone(loss, divergence):
    with pytest.raises(ConfigError, match=f"loss={loss}, divergence={divergence}"):
        student_config({"loss": loss, "divergence": divergence})
    assert student_config({"loss": "truncated", "divergence": divergence}).divergence == divergence


@pytest.mark.parametrize("loss", ["sampled", "hybrid"])
def test_samples_cannot_be_cut(loss):
    with pytest.raises(ConfigError, match=f"loss={loss}, k=4"):
        student_config({"loss": loss, "k": 4})
    assert student_config({"loss": loss}).uses_samples


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    directory = tmp_path_factory.mktemp("caches")
    sampled = {"temperature": 1.5, "num": 4}
    return {
        None: make_cache(directory / "none", lengths=(5, 7)),
        "full": make_cache(directory / "full", lengths=(5, 7), samples=sampled | {"drawn_from": "full"}),
        "tail": make_cache(directory / "tail", lengths=(5, 7), samples=sampled | {"drawn_from": "tail"}),
    }


@pytest.mark.parametrize(
    ("options", "drawn_from", "message"),
    [
        ({"loss": "sampled"}, None, "loss=sampled needs sampled targets, and the cache holds none"),
        ({"loss": "hybrid"}, None, "loss=hybrid needs sampled targets, and the cache holds none"),
        ({"loss": "sampled"}, "tail", "loss=sampled.*expected: samples_from=full; got: samples_from=tail"),
        ({"loss": "hybrid"}, "full", "loss=hybrid.*expected: samples_from=tail; got: samples_from=full"),
        ({"loss": "sampled", "temperature": 2.0}, "full", "samples_temperature=1.5; got: temperature=2"),
        ({"loss": "hybrid", "temperature": 2.0}, "tail", "samples_temperature=1.5; got: temperature=2"),
        ({"k": 7}, None, "expected: k at most 6; got: 7"),
    ],
)
def test_a_loss_that_the_cache_has_no_labels_for_is_refused(caches, options, drawn_from, message):
    with pytest.raises(ConfigError, match=message):
        require_labels(StudentConfig(**options), caches[drawn_from])


@pytest.mark.parametrize(
    ("options", "drawn_from"),
    [
        ({"loss": "sampled", "temperature": 1.5}, "full"),
        ({"loss": "hybrid", "temperature": 0.5}, "tail"),
        ({"loss": "truncated", "k": 6}, None),
        ({}, "tail"),
    ],
)
def test_a_loss_that_the_cache_has_labels_for_passes(caches, options, drawn_from):
    require_labels(StudentConfig(**options), caches[drawn_from])


def test_the_profiles_load():
    from pathlib import Path

    import stage2_student
    from shared.config import read_toml

    folder = Path(stage2_student.__file__).parent / "configs"
    presets = {name: student_config(read_toml(folder / f"{name}.toml")).preset for name in ("demo", "starcoder2")}
    assert presets == {"demo": "tiny", "starcoder2": "gpt-125m"}
