"""`codedistill eval draft` on tiny models, against decoding without KV cache and without batches."""

import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner

from shared.checkpoints import load_model
from shared.cli import codedistill
from shared.errors import ConfigError
from shared.eval.results import Equality
from shared.eval.speed import draft
from shared.eval.speed.draft import Decoder, decode_plain, decode_with_draft, evaluate_draft
from shared.tokenizer import encode_prompt
from tests.support.eval_models import save_model, save_recurrent
from tests.support.small_device import limit_memory

PROMPTS = ["def add(a, b):", "for", "x = 1\nwhile x < 100:\n    x = x + add(x, x)", "print(name)", "a", "return b + a"]
OPTIONS = {"prompts_file": None, "limit": None, "new_tokens": 12, "draft_tokens": 3, "repeats": 1, "dtype": "float32"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """The teacher with some noise, so that it agrees now and then."""
    folder = save_model(tmp_path_factory.mktemp("student"))
    model, _ = load_model(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        "".join(json.dumps({"task_id": f"p{i}", "prompt": text + "\n"}) + "\n" for i, text in enumerate(PROMPTS))
    )
    return file


@torch.inference_mode()
def most_likely(model, ids):
    return int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())


def greedy_by_hand(model, ids, steps, eos=()):
    made = []
    while len(made) < steps and not (made and made[-1] in eos):
        made.append(most_likely(model, ids + made))
    return made


def draft_by_hand(teacher, student, ids, steps, gamma, eos=()):
    """Speculative decoding by its definition: proposed, accepted and passes along the teacher's own greedy tokens."""
    target = greedy_by_hand(teacher, ids, steps, eos)
    at = proposed = accepted = passes = 0
    while at < len(target):
        drafted = greedy_by_hand(student, ids + target[:at], min(gamma, steps - at - 1), eos)
        agreed = 0
        while agreed < len(drafted) and target[at + agreed : at + agreed + 1] == drafted[agreed : agreed + 1]:
            agreed += 1
        proposed, accepted, passes = proposed + len(drafted), accepted + agreed, passes + 1
        at += agreed + 1
    return target, proposed, accepted, passes


@pytest.mark.filterwarnings("error:.*past_key_values")  # a name that transformers will drop
@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_counts_and_tokens_equal_the_definition(teacher, student, draft_tokens):
    (model, tokenizer), (drafter, _) = load_model(teacher), load_model(student)
    totals = [0, 0, 0]
    for text in PROMPTS:
        ids = encode_prompt(tokenizer, text)
        plain = decode_plain(Decoder(model), ids, new_tokens=16, eos=[])
        drafted = decode_with_draft(
            Decoder(model), Decoder(drafter), ids, new_tokens=16, eos=[], draft_tokens=draft_tokens
        )
        target, *counts = draft_by_hand(model, drafter, ids, 16, draft_tokens)
        assert plain == drafted.ids == target
        assert [drafted.proposed, drafted.accepted, drafted.passes] == counts
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
    assert 0 < totals[1] < totals[0]  # the student is right now and then


def test_a_model_that_drafts_for_itself_is_always_right(teacher):
    model, tokenizer = load_model(teacher)
    drafted = decode_with_draft(
        Decoder(model), Decoder(model), encode_prompt(tokenizer, "def add"), new_tokens=20, eos=[], draft_tokens=4
    )
    assert (drafted.proposed, drafted.accepted, drafted.passes, len(drafted.ids)) == (16, 16, 4, 20)
    drafted = decode_with_draft(
        Decoder(model), Decoder(model), encode_prompt(tokenizer, "x"), new_tokens=1, eos=[], draft_tokens=4
    )
    assert (drafted.proposed, drafted.accepted, drafted.passes, len(drafted.ids)) == (0, 0, 1, 1)


@pytest.mark.parametrize("end", [1, 2, 5, 9])
def test_an_end_token_ends_both_ways_wherever_it_falls(teacher, student, end):
    (model, tokenizer), (drafter, _) = load_model(teacher), load_model(student)
    ids = encode_prompt(tokenizer, PROMPTS[2])
    eos = [greedy_by_hand(model, ids, 12)[end]]
    for assistant in (model, drafter):
        drafted = decode_with_draft(Decoder(model), Decoder(assistant), ids, new_tokens=20, eos=eos, draft_tokens=4)
        target, *counts = draft_by_hand(model, assistant, ids, 20, 4, eos)
        assert decode_plain(Decoder(model), ids, new_tokens=20, eos=eos) == drafted.ids == target
        assert drafted.ids[-1] in eos
        assert [drafted.proposed, drafted.accepted, drafted.passes] == counts


def test_a_sliding_window_is_cut_back_right(teacher, student, tmp_path):
    (folder, drafter) = save_model(tmp_path), load_model(student)[0]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 6}))
    (model, tokenizer), whole = load_model(folder), load_model(teacher)[0]
    ids = encode_prompt(tokenizer, PROMPTS[2])
    expected = greedy_by_hand(model, ids, 20)
    assert expected != greedy_by_hand(whole, ids, 20)
    assert (
        decode_with_draft(Decoder(model), Decoder(drafter), ids, new_tokens=20, eos=[], draft_tokens=4).ids == expected
    )


def test_the_command_writes_figures_that_add_up(teacher, student, prompts, tmp_path):
    out = tmp_path / "new" / "draft.json"
    command = ["eval", "draft", "--teacher", str(teacher), "--student", str(student), "--prompts", str(prompts)]
    command += ["--new-tokens", "12", "--draft-tokens", "3", "--repeats", "2", "--out", str(out), "--limit", "5"]
    done = CliRunner().invoke(codedistill, command)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert result["command"] == " ".join(["codedistill", *command])
    rows = result["per_prompt"]
    assert [row["id"] for row in rows] == ["p0", "p1", "p2", "p3", "p4"]
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key != "id"}
    assert result["acceptance_rate"] == total["accepted"] / total["proposed"]
    assert result["mean_accepted_length"] == total["accepted"] / total["passes"]
    assert result["tokens_per_pass"] == total["new_tokens"] / total["passes"]
    assert result["speedup"] == pytest.approx(total["plain_seconds"] / total["draft_seconds"], rel=1e-12)
    assert result["equal_to_greedy"] is True
    assert result["served_speedup"] is None
    assert "on a processor only eager decoding is timed" in result["reasons"]["served_speedup"]
    assert result["equality"] == {"float32": {"num_prompts": 5, "num_equal": 5, "first_differences": []}}
    assert all(low <= high for low, high in result["ci95"].values())
    model, tokenizer = load_model(teacher)
    drafter, _ = load_model(student)
    for row, text in zip(rows, PROMPTS, strict=False):  # the final newline is no part of the prompt
        _, *counts = draft_by_hand(
            model, drafter, encode_prompt(tokenizer, text), 12, 3, result["settings"]["eos_token_ids"]
        )
        assert [row["proposed"], row["accepted"], row["passes"]] == counts
    again = CliRunner().invoke(codedistill, command)
    assert (again.exit_code, again.stderr) == (0, f"{out} is up to date\n")
    prompts.write_text(prompts.read_text().replace("print", "sprint"))
    assert "wrote" in CliRunner().invoke(codedistill, command).stderr


def test_a_teacher_in_half_precision_is_compared_in_float32_too(teacher, student, prompts):
    result = evaluate_draft(teacher, student, **OPTIONS | {"prompts_file": prompts, "dtype": "bfloat16"})
    assert set(result.equality) == {"bfloat16", "float32"}
    assert result.equal_to_greedy is True
    assert result.teacher.dtype == "bfloat16"
    half = result.equality["bfloat16"]
    assert half.num_equal + len(half.first_differences) == half.num_prompts == len(PROMPTS)


def test_timings_outlast_a_teacher_that_does_not_fit_in_float32(teacher, student, prompts, monkeypatch, tmp_path):
    limit_memory(monkeypatch, draft, lambda model, ids_BT: model.dtype == torch.float32)
    out = tmp_path / "draft.json"
    command = ["eval", "draft", "--teacher", str(teacher), "--student", str(student), "--prompts", str(prompts)]
    command += ["--new-tokens", "12", "--repeats", "1", "--dtype", "bfloat16", "--out", str(out)]
    done = CliRunner().invoke(codedistill, command)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert result["speedup"] > 0 and set(result["equality"]) == {"bfloat16"}
    assert result["reasons"]["equality.float32"] == "CUDA out of memory"
    assert "not compared in float32: CUDA out of memory\n" in done.stderr
    assert f"greedy decoding: {result['equality']['bfloat16']['num_equal']} of 6 in bfloat16\n" in done.stdout


def test_prompts_that_part_are_counted_and_named(teacher, student, prompts, monkeypatch, capsys):
    """A wrong verifier must show."""

    def wrong(*arguments, **options):
        good = decode_with_draft(*arguments, **options)
        if len(good.ids) > 4:
            good.ids[4] += 1
        return good

    monkeypatch.setattr(draft, "decode_with_draft", wrong)
    result = evaluate_draft(teacher, student, **OPTIONS | {"prompts_file": prompts, "limit": 2})
    assert result.equal_to_greedy is False
    assert result.equality["float32"] == Equality(
        num_prompts=2, num_equal=0, first_differences=[{"prompt": "p0", "position": 4}, {"prompt": "p1", "position": 4}]
    )
    assert "float32: 0 of 2 prompts decode to the same tokens" in capsys.readouterr().err


def test_output_is_equal_only_if_it_is_so_in_the_timed_precision_too(teacher, student, prompts, monkeypatch):
    compare, found = draft.compare_tokens, []

    def first_parts(*arguments):
        equality = compare(*arguments)
        found.append(equality if found else dataclasses.replace(equality, num_equal=0))
        return found[-1]

    monkeypatch.setattr(draft, "compare_tokens", first_parts)
    result = evaluate_draft(teacher, student, **OPTIONS | {"prompts_file": prompts, "limit": 2, "dtype": "bfloat16"})
    assert {dtype: part.num_equal for dtype, part in result.equality.items()} == {"bfloat16": 0, "float32": 2}
    assert result.equal_to_greedy is False


def test_what_cannot_be_drafted_is_refused(teacher, student, prompts, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true'))
    with pytest.raises(ConfigError, match="different tokenizers"):
        evaluate_draft(teacher, other, **OPTIONS | {"prompts_file": prompts})
    short = save_model(tmp_path / "short", positions=1)
    with pytest.raises(ConfigError, match="a prompt the model cannot continue; where: p0"):
        evaluate_draft(teacher, short, **OPTIONS | {"prompts_file": prompts})
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no prompts"):
        evaluate_draft(teacher, student, **OPTIONS | {"prompts_file": tmp_path / "empty.jsonl"})


def test_a_prompt_that_is_too_long_is_skipped_and_counted(teacher, prompts, tmp_path, capsys):
    short = save_model(tmp_path / "short", positions=14)
    result = evaluate_draft(teacher, short, **OPTIONS | {"prompts_file": prompts})
    tokenizer = load_model(teacher)[1]
    too_long = {f"p{i}": len(encode_prompt(tokenizer, text)) for i, text in enumerate(PROMPTS)}
    too_long = {name: length for name, length in too_long.items() if length >= 14}
    assert list(too_long) == ["p2"]
    assert [row["id"] for row in result.per_prompt] == ["p0", "p1", "p3", "p4", "p5"]
    assert (result.settings["num_prompts"], result.settings["num_skipped"]) == (5, 1)
    assert {part.num_prompts for part in result.equality.values()} == {5}
    refusal = f"a prompt the model cannot continue; where: p2; expected: 1 to 13 tokens; got: {too_long['p2']}\n"
    assert f"skipped: {refusal}" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["Mamba", "Qwen3Next", "Lfm2"])
def test_a_recurrent_teacher_or_student_cannot_take_tokens_back(student, prompts, tmp_path, architecture):
    recurrent = save_recurrent(tmp_path, architecture)
    for pair in ((recurrent, student), (student, recurrent)):
        with pytest.raises(ConfigError, match="a model with a recurrent state cannot take tokens back") as caught:
            evaluate_draft(*pair, **OPTIONS | {"prompts_file": prompts})
        assert caught.value.where == recurrent


def test_a_student_of_fewer_positions_ends_the_drafts_not_the_model(teacher, prompts, tmp_path):
    short = save_model(tmp_path, positions=40)
    result = evaluate_draft(teacher, short, **OPTIONS | {"prompts_file": prompts, "new_tokens": 60})
    tokenizer = load_model(teacher)[1]
    for row, text in zip(result.per_prompt, PROMPTS, strict=True):
        assert row["new_tokens"] <= 40 - len(encode_prompt(tokenizer, text))
    assert result.acceptance_rate == 1.0  # its weights are the teacher's
    assert result.equal_to_greedy is True
