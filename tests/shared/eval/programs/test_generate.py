"""Generation on tiny models, against models that are asked token by token, without batch, padding or KV cache."""

import collections
import dataclasses
import random

import pytest
import torch
from tokenizers import AddedToken

from shared.checkpoints import load_model
from shared.errors import ConfigError
from shared.eval.programs import generate as generate_module
from shared.eval.programs.generate import (
    Sampling,
    caches_by_token,
    eos_ids,
    generate_batch,
    plan_batches,
    prepare,
    require_generation,
    special_texts,
)
from shared.tokenizer import decode, encode_prompt
from tests.support.eval_models import RECURRENT, save_model, save_recurrent
from tests.support.host_waits import HostWaits

PROMPTS = ["def add(a, b):", "for", "x = 1\nwhile x < 100:\n    x = x + add(x, x)", "print(name)", "a", "return b + a"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(directory):
    return load_model(directory)


def generate(model, tokenizer, prompts=PROMPTS, *, batch_size=6, steps=40, end=None, sampling=None):
    requests = []
    for i, prompt in enumerate(prompts):
        request = prepare(model, tokenizer, prompt, max_new_tokens=steps, end=end, where=f"prompt {i}")
        requests.append(dataclasses.replace(request, seed=str(i)))
    made = {}
    for batch in plan_batches(requests, batch_size):
        made |= zip(batch, generate_batch(model, tokenizer, [requests[i] for i in batch], sampling), strict=True)
    return [made[i] for i in range(len(prompts))]


def by_hand(model, tokenizer, prompt, steps, choose):
    """The ids up to EOS that follow a prompt where `choose` takes each from the logits."""
    ids = encode_prompt(tokenizer, prompt)
    made = []
    while len(made) < steps and 0 not in made:
        with torch.inference_mode():
            made.append(choose(model(torch.tensor([ids + made]), use_cache=False).logits[0, -1]))
    return made


@pytest.mark.filterwarnings("error:.*past_key_values")  # a name that transformers will drop
@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_greedy_is_the_same_at_every_batch_size(loaded, batch_size):
    model, tokenizer = loaded
    made = generate(model, tokenizer, batch_size=batch_size)
    expected = [by_hand(model, tokenizer, prompt, 40, lambda logits: int(logits.argmax())) for prompt in PROMPTS]
    assert [g.text for g in made] == [decode(tokenizer, ids) for ids in expected]
    assert [g.num_new_tokens for g in made] == [len(ids) for ids in expected]
    assert len({g.text for g in made}) > 1


@pytest.mark.parametrize("architecture", sorted(RECURRENT))
def test_a_recurrent_model_writes_what_it_writes_without_a_cache(architecture, tmp_path):
    """Mamba and its like alone and beside attention, linear attention, convolutions, and caches of a model's own."""
    model, tokenizer = load_model(save_recurrent(tmp_path, architecture))
    assert not caches_by_token(model)
    prompts, steps = PROMPTS[:3], 20
    made = generate(model, tokenizer, prompts, batch_size=1, steps=steps)
    expected = [by_hand(model, tokenizer, prompt, steps, lambda logits: int(logits.argmax())) for prompt in prompts]
    assert [g.text for g in made] == [decode(tokenizer, ids) for ids in expected]
    assert [g.num_new_tokens for g in made] == [len(ids) for ids in expected]
    ended = generate(model, tokenizer, prompts[:1], batch_size=1, steps=steps, end=lambda text: 0 if text else None)
    assert [g.num_new_tokens for g in ended] == [min(16, len(expected[0]))]


def test_a_model_that_cannot_generate_says_so_before_any_work(loaded, monkeypatch):
    model, tokenizer = loaded
    request = prepare(model, tokenizer, "for", max_new_tokens=40)
    require_generation(model, tokenizer, request)

    def forward(self, **_):
        raise TypeError("no such argument")

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(
        ConfigError, match=r"cannot generate with this model.*Starcoder2ForCausalLM; got: TypeError: no su"
    ):
        require_generation(model, tokenizer, request)


def drawer(seed, temperature, top_p):
    """Inverse sampling as it is defined, an id at a time."""
    generator = random.Random(seed)

    def choose(logits):
        probs = (logits.double() / temperature).softmax(-1).tolist()
        nucleus, mass = set(), 0.0
        for id in sorted(range(len(probs)), key=lambda id: -probs[id]):
            if mass >= top_p:
                break
            nucleus.add(id)
            mass += probs[id]
        point = generator.random() * mass
        for id in sorted(nucleus):
            point -= probs[id]
            if point < 0:
                return id
        raise AssertionError

    return choose


@pytest.mark.parametrize(("temperature", "top_p"), [(0.8, 0.95), (1.3, 1.0)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_drawn_tokens_follow_from_seed_and_model_alone(loaded, batch_size, temperature, top_p):
    model, tokenizer = loaded
    made = generate(model, tokenizer, batch_size=batch_size, sampling=Sampling(temperature=temperature, top_p=top_p))
    expected = [
        by_hand(model, tokenizer, prompt, 40, drawer(str(i), temperature, top_p)) for i, prompt in enumerate(PROMPTS)
    ]
    assert [g.text for g in made] == [decode(tokenizer, ids) for ids in expected]
    assert [g.num_new_tokens for g in made] == [len(ids) for ids in expected]


@pytest.mark.parametrize("sampling", [Sampling(temperature=1e-310), Sampling(temperature=1.0, top_p=1e-9)])
def test_the_limits_of_sampling_are_greedy(loaded, sampling):
    assert generate(*loaded, sampling=sampling) == generate(*loaded)


def test_draws_have_the_model_s_distribution(loaded):
    """Pearson's statistic of 4,000 first tokens, against the 99.9 % point (Wilson and Hilferty's approximation)."""
    model, tokenizer = loaded
    sampling, num_draws = Sampling(temperature=1.5), 4000
    request = prepare(model, tokenizer, "for", max_new_tokens=1)
    requests = [dataclasses.replace(request, seed=str(i)) for i in range(num_draws)]
    made = [
        g.text
        for i in range(0, num_draws, 1000)
        for g in generate_batch(model, tokenizer, requests[i : i + 1000], sampling)
    ]
    with torch.inference_mode():
        probs = (model(torch.tensor([request.ids])).logits[0, -1].double() / 1.5).softmax(-1).tolist()
    by_text = collections.Counter()  # several ids are half a character, and read the same
    for id, prob in enumerate(probs):
        by_text[decode(tokenizer, [id])] += prob * num_draws
    expected = {text: number for text, number in by_text.items() if number >= 5}
    expected["rare"] = num_draws - sum(expected.values())
    counts = collections.Counter(text if text in expected else "rare" for text in made)
    statistic = sum((counts[text] - number) ** 2 / number for text, number in expected.items())
    freedom = len(expected) - 1
    assert freedom > 20
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


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
        made = [
            generate(model, tokenizer, steps=24, batch_size=3, sampling=s) for s in (None, Sampling(temperature=1.0))
        ]
        assert model.generation_config.to_dict() == before
        texts.append([[g.text for g in run] for run in made])
    assert texts[0] == texts[1]


def test_rows_end_by_text_by_eos_and_at_the_model_s_last_position(directory, tmp_path):
    model, tokenizer = load_model(directory)
    free = generate(model, tokenizer)
    longest = max(range(len(free)), key=lambda row: free[row].num_new_tokens)
    stop = free[longest].text[:10]
    cut = generate(model, tokenizer, end=lambda text: 0 if text.startswith(stop) else None)
    assert cut[longest].finish_reason == "finished"
    assert cut[longest].num_new_tokens == 16
    assert free[longest].text.startswith(cut[longest].text)
    assert [g for row, g in enumerate(cut) if row != longest and not free[row].text.startswith(stop)] == [
        g for row, g in enumerate(free) if row != longest and not g.text.startswith(stop)
    ]
    # The id a row makes third ends it there once the model's config says so; the EOS itself is no text.
    third = tokenizer.encode(free[longest].text, add_special_tokens=False)[2]
    model.config.eos_token_id = [third]
    ended = generate(model, tokenizer, [PROMPTS[longest]])[0]
    assert (ended.finish_reason, ended.num_new_tokens <= 3) == ("eos", True)

    # So does any special token, which StarCoder2 puts between files.
    tokenizer.add_tokens([AddedToken("<file_sep>", special=True)])
    assert eos_ids(model, tokenizer) == sorted([0, third, tokenizer.convert_tokens_to_ids("<file_sep>")])
    assert special_texts(tokenizer) == ["<file_sep>", "<|endoftext|>"]

    short, tokenizer = load_model(save_model(tmp_path, positions=50))
    made = generate(short, tokenizer)
    assert all(g.num_new_tokens == min(40, 50 - g.num_prompt_tokens) for g in made if g.finish_reason == "length")
    assert any(g.finish_reason == "length" and g.num_new_tokens < 40 for g in made)
    with pytest.raises(ConfigError, match="prompt 0; expected: 1 to 49 tokens"):
        generate(short, tokenizer, ["x" * 90])


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.8, top_p=0.95)])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1] * 6])
def test_the_host_waits_once_per_step_for_the_tokens_of_all_rows(loaded, monkeypatch, sampling, prompts):
    """Padded or not. A batch adds a few waits of its own; masks are made of what lies on the host."""
    model, tokenizer = loaded
    monkeypatch.setattr(generate_module, "eos_ids", lambda *_: [])
    make = generate_module.create_masks_for_generate

    def make_on_the_host(attention_mask, cache, **options):
        before = len(host.found)
        masks = make(attention_mask=attention_mask, cache=cache, **options)
        del host.found[before:]
        return masks

    monkeypatch.setattr(type(model), "create_masks_for_generate", staticmethod(make_on_the_host), raising=False)
    waits = []
    for steps in (16, 32):
        requests = [prepare(model, tokenizer, prompt, max_new_tokens=steps) for prompt in prompts]
        with HostWaits() as host:
            made = generate_batch(model, tokenizer, requests, sampling)
        assert [generation.num_new_tokens for generation in made] == [steps] * 6
        assert host.found.count("cpu (6,)") == steps
        waits.append(len(host.found))
    assert waits[1] - waits[0] == 16
    assert waits[0] < 16 + 6
