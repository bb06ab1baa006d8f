"""Generation, fidelity and latency on tiny models, through the code that `codedistill eval` runs."""

import json

import pytest
import torch
from click.testing import CliRunner

from shared.cli import codedistill
from shared.errors import CacheMismatchError, ConfigError
from shared.eval.fidelity import evaluate_fidelity
from shared.eval.generate import generate_greedy
from shared.eval.models import load_model, num_parameters
from tests.eval_models import save_model

PROMPTS = ["def add(a, b):", "for", "x = 1\nwhile x < 100:\n    x = x + add(x, x)", "print(name)", "a", "return b + a"]


@pytest.fixture(scope="module", autouse=True)
def no_tracking():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def greedy_by_hand(model, tokenizer, prompt, steps):
    """The reference: no batch, no padding, no KV cache."""
    from shared.tokenizer import encode_prompt

    ids = encode_prompt(tokenizer, prompt)
    for made in range(steps):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == 0:
            return ids[-made - 1 :]
    return ids[-steps:]


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_greedy_is_the_same_at_every_batch_size(directory, batch_size):
    from shared.tokenizer import decode

    model, tokenizer = load_model(directory)
    made = generate_greedy(
        model, tokenizer, PROMPTS, max_new_tokens=40, batch_size=batch_size, finished=lambda text: False
    )
    expected = [greedy_by_hand(model, tokenizer, prompt, 40) for prompt in PROMPTS]
    assert [g.text for g in made] == [decode(tokenizer, ids) for ids in expected]
    assert [g.num_new_tokens for g in made] == [len(ids) for ids in expected]
    assert len({g.text for g in made}) > 1


def test_the_directory_s_generation_config_has_no_effect(directory, tmp_path):
    careless = save_model(
        tmp_path,
        do_sample=True,
        temperature=5.0,
        top_k=3,
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        max_length=8,
        min_new_tokens=30,
        forced_eos_token_id=300,
        suppress_tokens=list(range(1, 280)),
        begin_suppress_tokens=[7],
    )
    texts = []
    for path in (directory, careless):
        model, tokenizer = load_model(path)
        before = model.generation_config.to_dict()
        made = generate_greedy(model, tokenizer, PROMPTS, max_new_tokens=24, batch_size=3, finished=lambda text: False)
        assert model.generation_config.to_dict() == before
        texts.append([g.text for g in made])
    assert texts[0] == texts[1]


def test_rows_end_by_text_by_eos_and_at_the_model_s_last_position(directory, tmp_path):
    model, tokenizer = load_model(directory)
    run = {"max_new_tokens": 40, "batch_size": 6}
    free = generate_greedy(model, tokenizer, PROMPTS, finished=lambda text: False, **run)
    longest = max(range(len(free)), key=lambda row: free[row].num_new_tokens)
    stop = free[longest].text[:10]
    cut = generate_greedy(model, tokenizer, PROMPTS, finished=lambda text: text.startswith(stop), **run)
    assert cut[longest].finish_reason == "finished"
    assert cut[longest].num_new_tokens == 16
    assert free[longest].text.startswith(cut[longest].text)
    assert [g for row, g in enumerate(cut) if row != longest and not free[row].text.startswith(stop)] == [
        g for row, g in enumerate(free) if row != longest and not g.text.startswith(stop)
    ]
    # The id a row makes third ends it there once the model's config says so; the EOS itself is no text.
    third = tokenizer.encode(free[longest].text, add_special_tokens=False)[2]
    model.config.eos_token_id = [third]
    ended = generate_greedy(model, tokenizer, [PROMPTS[longest]], finished=lambda text: False, **run)[0]
    assert (ended.finish_reason, ended.num_new_tokens <= 3) == ("eos", True)

    short, tokenizer = load_model(save_model(tmp_path, positions=50))
    made = generate_greedy(short, tokenizer, PROMPTS, finished=lambda text: False, **run)
    assert all(g.num_new_tokens == min(40, 50 - g.num_prompt_tokens) for g in made if g.finish_reason == "length")
    assert any(g.finish_reason == "length" and g.num_new_tokens < 40 for g in made)
    with pytest.raises(ConfigError, match="prompt 0"):
        generate_greedy(short, tokenizer, ["x" * 90], finished=lambda text: False, **run)


def test_tied_parameters_count_once(directory):
    model, _ = load_model(directory)
    names = {name: p.numel() for name, p in model.named_parameters()}
    assert "lm_head.weight" not in names
    assert num_parameters(model) == sum(names.values())
    assert names["model.embed_tokens.weight"] == model.config.vocab_size * 32


def test_latency_command(directory, tmp_path):
    out = tmp_path / "latency.json"
    options = ["--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "2", "--out", str(out)]
    done = CliRunner().invoke(codedistill, ["eval", "latency", "--model", f"a={directory}", *options])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    model = result["models"]["a"]
    assert model["bytes"] == (directory / "model.safetensors").stat().st_size
    assert result["settings"]["new_tokens"] == 4
    low, high = model["prefill_ms_range"]
    assert 0 < low <= model["prefill_ms"] <= high
    doubled = ["--model", f"a={directory}", "--model", f"a={directory}"]
    assert CliRunner().invoke(codedistill, ["eval", "latency", *doubled, *options]).exit_code == 2


@pytest.fixture(scope="module")
def cache(directory, tmp_path_factory):
    """The model's own cache, built by stage 1 in float32."""
    from stage1_teacher.cli import teacher

    folder = tmp_path_factory.mktemp("cache")
    rows = [{"prompt": prompt, "completion": f" {prompt}[{i}]\n" * (i + 1)} for i, prompt in enumerate(PROMPTS)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--teacher", str(directory), "--dataset", str(folder / "docs.jsonl"), "--split", "train"]
    options += ["--out", str(folder / "cache"), "--top-k", "8", "--shard-tokens", "60", "--dtype", "float32"]
    done = CliRunner().invoke(teacher, ["build", *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder / "cache"


def test_a_teacher_against_its_own_cache(directory, cache, tmp_path):
    out = tmp_path / "new" / "fidelity.json"
    done = CliRunner().invoke(
        codedistill,
        [
            "eval",
            "fidelity",
            "--model",
            str(directory),
            "--cache",
            str(cache),
            "--out",
            str(out),
            "--batch-tokens",
            "64",
        ],
    )
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert result["top1_agreement"] == 1.0
    assert abs(result["kl_to_teacher_nats"]) < 1e-4
    assert result["nll_nats"] == pytest.approx(result["teacher_nll_nats"], abs=1e-5)
    assert result["kind"] == "partition K=8"
    assert result["reasons"] == {}


def test_another_model_is_not_its_teacher(cache, tmp_path):
    result = evaluate_fidelity(save_model(tmp_path, seed=1), cache, dtype="float32", batch_tokens=4096)
    assert result["kl_to_teacher_nats"] > 0.5
    assert result["top1_agreement"] < 0.5


def test_another_tokenizer_is_refused(directory, cache, tmp_path):
    import shutil

    other = tmp_path / "model"
    shutil.copytree(directory, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true'))
    with pytest.raises(CacheMismatchError, match="tokenizer"):
        evaluate_fidelity(other, cache, dtype="auto", batch_tokens=64)
