"""Generation and decoding speed on CUDA: tokens equal the processor's in float32, and the graph's equal eager ones."""

import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner

from shared.checkpoints import load_model
from shared.cli import codedistill
from shared.eval.programs.generate import Sampling, generate_batch, prepare
from shared.eval.speed.draft import Decoder, ServedDecoder, decode_plain, decode_with_draft
from shared.eval.speed.latency import Eager
from shared.eval.speed.served import Served
from tests.support.eval_models import save_model, save_recurrent

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PROMPTS = ["def add(a, b):", "for", "x = 1\nwhile x < 100:\n    x = x + add(x, x)", "print(name)", "a", "return b + a"]


@pytest.fixture(scope="module", params=[None, 6])
def directory(request, tmp_path_factory):
    """Attention to everything, and inside a window."""
    folder = save_model(tmp_path_factory.mktemp("model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": request.param}))
    return folder


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.8, top_p=0.95)])
def test_completions_are_the_processor_s_in_float32(directory, sampling):
    model, tokenizer = load_model(directory, "float32")
    requests = [
        dataclasses.replace(prepare(model, tokenizer, prompt, max_new_tokens=40 - 3 * i), seed=str(i))
        for i, prompt in enumerate(PROMPTS)
    ]
    made = generate_batch(model, tokenizer, requests, sampling)
    assert made == generate_batch(model.cpu(), tokenizer, requests, sampling)


@torch.inference_mode()
@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_graph_decodes_the_tokens_of_eager_decoding(directory, batch_size):
    model, _ = load_model(directory, "float32")
    prompt_BT = torch.randint(300, (batch_size, 9), generator=torch.Generator().manual_seed(0)).cuda()
    served = Served(model, batch_size=batch_size, capacity=40)
    found = []
    for decoder in (Eager(model), served, served):
        ids = [decoder.prefill(prompt_BT).clone()]
        for _ in range(24):
            ids.append(decoder.step(ids[-1]).clone())
        found.append(torch.cat(ids, 1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_drafts_from_graphs_are_those_of_eager_decoding(directory):
    model, _ = load_model(directory, "float32")
    pair = (ServedDecoder(model, capacity=60, width=5), ServedDecoder(model, capacity=60))
    for ids in ([5], [1, 2, 3, 4]):
        expected = decode_plain(Decoder(model), ids, new_tokens=16, eos=[])
        drafted = decode_with_draft(*pair, ids, new_tokens=16, eos=[], draft_tokens=4)
        assert drafted.ids == expected == decode_plain(pair[1], ids, new_tokens=16, eos=[])
        assert drafted.accepted == drafted.proposed


def test_latency_has_both_ways_and_one_dtype_for_all(directory, tmp_path):
    teacher = save_model(tmp_path / "teacher", dtype=torch.bfloat16)
    recurrent = save_recurrent(tmp_path / "recurrent", "Qwen3Next")
    out = tmp_path / "latency.json"
    models = {"teacher": teacher, "student": directory, "recurrent": recurrent}
    command = ["eval", "latency", *(f"--model={name}={path}" for name, path in models.items()), f"--out={out}"]
    done = CliRunner().invoke(codedistill, [*command, "--prompt-tokens=8", "--new-tokens=4", "--repeats=2"])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())["models"]
    assert {name: model["dtype"] for name, model in found.items()} == {
        "teacher": "bfloat16", "student": "bfloat16", "recurrent": "bfloat16",
        "student, float32": "float32", "recurrent, float32": "float32",
    }  # fmt: skip
    for name, model in found.items():
        assert set(model["served"]) == (set() if "recurrent" in name else {"1", "8"})
        assert (model["not_served"] is None) == ("recurrent" not in name)
        assert all(batch["peak_bytes"] > 0 for batch in model["batches"].values())


def test_draft_has_both_speed_ups(directory, tmp_path):
    out, prompts = tmp_path / "draft.json", tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"task_id": text, "prompt": text}) + "\n" for text in PROMPTS))
    command = ["eval", "draft", f"--teacher={directory}", f"--student={directory}", f"--prompts={prompts}"]
    done = CliRunner().invoke(codedistill, [*command, "--new-tokens=12", f"--out={out}", "--dtype=float32"])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["speedup"] > 0 and found["served_speedup"] > 0 and found["reasons"] == {}
    assert set(found["equality"]) == {"float32", "float32, served"}
    assert found["equal_to_greedy"] is True
