"""Decoding from a static cache on a processor, where no graph replays the step: its tokens are plain decoding's."""

import json

import pytest
import torch

from shared.checkpoints import load_model
from shared.errors import ConfigError
from shared.eval.speed.draft import Decoder, ServedDecoder, decode_plain, decode_with_draft
from shared.eval.speed.latency import Eager, tokens_per_joule
from shared.eval.speed.served import Served
from tests.support.eval_models import save_model, save_recurrent


@pytest.fixture(scope="module", params=[None, 6])
def model(request, tmp_path_factory):
    """Attention to everything, and inside a window."""
    folder = save_model(tmp_path_factory.mktemp("model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": request.param}))
    return load_model(folder)[0]


@pytest.fixture(scope="module")
def drafter(model):
    """The model with some noise, so that it agrees now and then."""
    noisy = type(model)(model.config).eval()
    noisy.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return noisy


@torch.inference_mode()
def decode(decoder, prompt_BT, steps):
    """The prompts and what follows them."""
    ids_BT = torch.cat((prompt_BT, decoder.prefill(prompt_BT)), 1)
    for _ in range(steps):
        ids_BT = torch.cat((ids_BT, decoder.step(ids_BT[:, -1:])), 1)
    return ids_BT


def test_tokens_are_those_of_decoding_without_a_cache(model):
    prompt_BT = torch.randint(300, (3, 9), generator=torch.Generator().manual_seed(0))
    expected = prompt_BT
    with torch.inference_mode():
        for _ in range(15):
            expected = torch.cat((expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    served = Served(model, batch_size=3, capacity=24)
    for decoder in (served, served, Eager(model)):  # begun anew
        assert torch.equal(decode(decoder, prompt_BT, 14), expected)


@torch.inference_mode()
def test_decoding_goes_on_again_from_where_it_was_kept(model):
    prompt_BT = torch.randint(300, (2, 7), generator=torch.Generator().manual_seed(1))
    for decoder in (Eager(model), Served(model, batch_size=2, capacity=12)):
        first = decoder.prefill(prompt_BT).clone()
        decoder.keep()
        runs = []
        for _ in range(2):
            ids = [first]
            for _ in range(4):
                ids.append(decoder.step(ids[-1]).clone())
            runs.append(torch.cat(ids))
            decoder.rewind()
        assert torch.equal(*runs)


def test_energy_is_of_two_seconds_of_decoding_and_read_between_steps(model, monkeypatch):
    times, joules = iter(range(100)), iter([5.0, 7.5])
    monkeypatch.setattr("time.perf_counter", lambda: 0.5 * next(times))
    decoder = Eager(model)
    prompt_BT = torch.zeros((2, 3), dtype=torch.int64)
    assert tokens_per_joule(decoder, prompt_BT, 4, lambda: next(joules)) == 3 * 2 * 4 / 2.5
    assert tokens_per_joule(decoder, prompt_BT, 4, lambda: 1.0) == "the counter did not move"


@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_drafts_are_kept_and_counted_as_by_eager_decoding(model, drafter, draft_tokens):
    verifier = ServedDecoder(model, capacity=60, width=draft_tokens + 1)
    pair, plain = (verifier, ServedDecoder(drafter, capacity=60)), ServedDecoder(model, capacity=60)
    accepted = 0
    for ids in ([5], [1, 2, 3, 4], list(range(40, 70))):
        expected = decode_plain(Decoder(model), ids, new_tokens=16, eos=[])
        assert decode_plain(plain, ids, new_tokens=16, eos=[]) == expected
        options = {"new_tokens": 16, "eos": [expected[-1]], "draft_tokens": draft_tokens}
        drafted = decode_with_draft(*pair, ids, **options)
        assert drafted == decode_with_draft(Decoder(model), Decoder(drafter), ids, **options)
        accepted += drafted.accepted
    assert accepted > 0


@pytest.mark.parametrize("architecture", ["Mamba", "Qwen3Next", "Rwkv"])
def test_a_recurrent_model_takes_no_static_cache(tmp_path, architecture):
    model, _ = load_model(save_recurrent(tmp_path, architecture))
    with pytest.raises(ConfigError, match="the model takes no static cache"):
        Served(model, batch_size=1, capacity=8)
