"""What documents open and close with: measured by the teacher, chosen, recorded, used by whoever evaluates."""

import json

import pytest
import torch
from click.testing import CliRunner
from tokenizers import AddedToken

from data.records import Document
from shared.cache.reader import Cache
from shared.cli import codedistill
from shared.errors import ConfigError, ResumeError
from shared.logits import LogitSource
from shared.tokenizer import document_ends, encode_prompt, encode_text, load_tokenizer, record_ends
from stage1_teacher.cli import teacher as command
from stage1_teacher.ends import describe_ends, weigh_ends
from tests.stage1_teacher.test_build import build, shards
from tests.support.small_teacher import save_teacher

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory, tokenizer):
    """A teacher whose BOS and EOS are a turn's, as SmolLM2-Instruct's, and whose generation ends with either end."""
    folder = tmp_path_factory.mktemp("chatty")
    tokenizer.save_pretrained(folder)
    made = load_tokenizer(folder)
    made.add_special_tokens({"additional_special_tokens": [AddedToken(TURN, special=True), AddedToken(TURN_END)]})
    made.bos_token, made.eos_token, made.unk_token, made.pad_token = TURN, TURN_END, END, TURN_END

    def generate_to_either_end(model):
        model.generation_config.eos_token_id = [0, made.eos_token_id]

    return save_teacher(folder, made, width=len(made), change=generate_to_either_end)


def reference_nll(model, opening, texts):
    total = count = 0
    for ids in texts:
        logp = model(torch.tensor([[*opening, *ids]])).logits[0].double().log_softmax(-1)
        for at in range(1, len(ids)):
            total -= float(logp[len(opening) + at - 1, ids[at]])
            count += 1
    return total / count


@pytest.mark.parametrize("open_with", ["auto", "bos"])
def test_the_costs_are_the_teachers_own(chatty, open_with):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(chatty, dtype=torch.float32)
    made = load_tokenizer(chatty)
    record_ends(made, open_with)
    documents = [
        Document(id="long", source="s", prompt="def f(x):", completion="\n    return x + 1\n" * 9),
        Document(id="chat", source="s", messages=({"role": "user", "content": "x"},)),
        Document(id="short", source="s", completion="x = 1\n"),
    ]
    texts = [encode_text(made, d.prompt + d.completion) for d in (documents[0], documents[2])]
    assert len(texts[0]) > 63 > len(texts[1])  # the teacher has 64 positions, one is the opening's
    with torch.inference_mode():
        measured = weigh_ends(LogitSource(model, 5), made, documents, 64)
        starts = [ids[:63] for ids in texts]
        want = {"none": reference_nll(model, [], starts)}
        ids = {token: made.convert_tokens_to_ids(token) for token in (TURN, TURN_END, END)}
        want |= {token: reference_nll(model, [id], starts) for token, id in ids.items()}
        before = [texts[0][-63:], ([ids[TURN]] if open_with == "bos" else []) + texts[1]]
        last = [model(torch.tensor([each])).logits[0, -1].double().log_softmax(-1) for each in before]
    assert measured["documents"] == 2
    assert measured["opening"]["token"] == {"auto": "none", "bos": TURN}[open_with]
    assert measured["opening"]["nats"] == pytest.approx(want, rel=1e-5)
    assert measured["closing"]["token"] == TURN_END
    closings = {token: -float(sum(logp[id] for logp in last)) / 2 for token, id in ids.items()}
    assert measured["closing"]["nats"] == pytest.approx(closings, rel=1e-5)
    assert measured["closing"]["generation_config"] == [END, TURN_END]


def test_of_chats_alone_nothing_is_measured_or_said(chatty):
    from transformers import AutoModelForCausalLM

    source = LogitSource(AutoModelForCausalLM.from_pretrained(chatty, dtype=torch.float32), 5)
    chats = [Document(id="chat", source="s", messages=({"role": "user", "content": "x"},))]
    for documents in ([], chats):
        measured = weigh_ends(source, load_tokenizer(chatty), documents, 64)
        assert (measured["documents"], measured["opening"]["nats"], measured["closing"]["nats"]) == (0, {}, {})
        assert describe_ends(measured) == []


def test_a_cheaper_end_and_one_that_generation_does_not_end_with_are_said():
    ends = {
        "documents": 2,
        "opening": {"token": "none", "nats": {"none": 1.75, "<b>": 2.05, "<e>": 1.6}},
        "closing": {"token": "<t>", "nats": {"<t>": 14.0, "<e>": 13.5}, "generation_config": ["<e>"]},
    }
    assert describe_ends(ends) == [
        ("opening", "none 1.750 nats/token (<b> 2.050, <e> 1.600); lower NLL: --open-with '<e>'"),
        ("closing", "<t> 14.000 nats (<e> 13.500); generation_config.json ends texts with <e>"),
    ]
    ends["opening"]["nats"]["none"], ends["closing"]["nats"]["<t>"] = 1.61, 14.6
    assert [text.partition("; ")[2] for _, text in describe_ends(ends)] == [
        "",
        "lower NLL: --close-with '<e>'; generation_config.json ends texts with <e>",
    ]


def test_the_ends_are_part_of_the_labels_and_of_the_resume(chatty, rows, tmp_path):
    auto, result = build(chatty, rows, tmp_path / "auto", "--top-k", "5")
    named, _ = build(chatty, rows, tmp_path / "named", "--top-k", "5", "--open-with", END, "--close-with", END)
    turns = {cache: [int(cache.tokens(0)[at]) for at in (0, -1)] for cache in (auto, named)}
    made = load_tokenizer(chatty)
    assert turns[auto] == [encode_text(made, "# task 0")[0], made.convert_tokens_to_ids(TURN_END)]
    assert turns[named] == [0, 0]
    assert len(named.tokens(0)) == len(auto.tokens(0)) + 1
    labels = [cache.manifest.identity["labels"] for cache in (auto, named)]
    assert [(each["opening"], each["closing"]) for each in labels] == [([], [TURN_END]), ([END], [END])]
    assert auto.label_identity != named.label_identity
    assert auto.manifest.identity["tokenizer"]["digest"] == named.manifest.identity["tokenizer"]["digest"]
    assert [c.manifest.identity["tokenizer"]["bos"] for c in (auto, named)] == [None, 0]
    assert document_ends(load_tokenizer(named.tokenizer_path)) == ((END,), (END,))
    opening, closing = (line for line in result.stderr.splitlines() if " of documents: " in line)
    assert opening.startswith("opening of documents: none ") and f"({TURN} " in opening
    assert closing.startswith(f"closing of documents: {TURN_END} ")

    before = shards(tmp_path / "auto")
    with pytest.raises(ResumeError, match="open_with"):
        build(chatty, rows, tmp_path / "auto", "--top-k", "5", "--open-with", "bos")
    with pytest.raises(ConfigError, match="the tokenizer has no such special token; where: --close-with"):
        build(chatty, rows, tmp_path / "other", "--close-with", "x")
    assert shards(tmp_path / "auto") == before
    assert not (tmp_path / "other").exists()
    (tmp_path / "auto/manifest.json").unlink()
    (tmp_path / "auto/shard-00000.json").unlink()
    again, result = build(chatty, rows, tmp_path / "auto", "--top-k", "5")
    assert shards(tmp_path / "auto") == before
    assert again.label_identity == auto.label_identity
    assert " of documents: " not in result.stderr  # said when it began


def test_a_plan_has_them_too(chatty, rows, tmp_path):
    arguments = ["plan", "--teacher", chatty, "--dataset", rows, "--out", tmp_path / "out", "--dtype", "float32"]
    run = CliRunner().invoke(command, [*map(str, arguments), "--json", "--open-with", "eos"])
    assert run.exit_code == 0, run.output
    ends = json.loads(run.stdout)["ends"]
    assert (ends["documents"], ends["opening"]["token"], ends["closing"]["token"]) == (8, TURN_END, TURN_END)
    assert list(ends["opening"]["nats"]) == [TURN_END, "none", TURN, END]


def test_the_teacher_is_evaluated_as_its_cache_was_made(chatty, rows, tmp_path):
    """Its own tokenizer says nothing of what the cache's documents open with."""
    cache, _ = build(chatty, rows, tmp_path / "cache", "--top-k", "5", "--open-with", END)
    problem = {"task_id": "p", "prompt": "def f():", "entry_point": "f", "test": "def check(candidate):\n    pass"}
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    common = ["eval", "humaneval", "--model", chatty, "--problems", tmp_path / "problems.jsonl", "--max-new-tokens", 2]
    num_prompt_tokens, openings = [], []
    for name, options in (("alone", []), ("cache", ["--cache", cache.path])):
        done = CliRunner().invoke(codedistill, [*map(str, [*common, "--out", tmp_path / name, *options])])
        assert done.exit_code == 0, (done.output, done.exception)
        (line,) = map(json.loads, (tmp_path / name / "completions.jsonl").open())
        num_prompt_tokens.append(line["num_prompt_tokens"])
        openings.append(line["settings"]["opening"])
    bare = len(encode_prompt(load_tokenizer(chatty), "def f():"))
    assert (num_prompt_tokens, openings) == ([bare, bare + 1], [[], [END]])
    assert Cache(cache.path).manifest == cache.manifest
