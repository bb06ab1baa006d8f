"""`teacher build` through the command line, with tiny random teachers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from shared.cache.reader import Cache
from shared.cache.verify import verify_cache
from shared.errors import CacheFormatError, ConfigError, DistillError, ResumeError
from stage1_teacher.cli import teacher as command
from tests.support import warm
from tests.support.small_teacher import WIDTH, save_teacher


def build(teacher, rows, out, *options):
    arguments = ["build", "--teacher", str(teacher), "--dataset", str(rows), "--out", str(out)]
    options = ("--dtype", "float32", "--shard-tokens", "300", *options)
    result = CliRunner().invoke(command, [*arguments, *options])
    if result.exception is not None:
        raise result.exception
    return Cache(out), result


def shards(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("shard-*"))}


def test_labels_equal_the_teachers_own_logits(teacher, tokenizer, rows, tmp_path):
    from transformers import AutoModelForCausalLM

    cache, result = build(teacher, rows, tmp_path / "cache", "--top-k", "20", "--codec", "f16")
    assert verify_cache(cache.path) == []
    assert cache.num_documents == 20
    assert cache.num_shards > 2
    assert "captured mass" in result.output
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    nll, target_nll = [], []
    for document in range(20):
        ids = torch.from_numpy(cache.tokens(document))
        assert ids[0] == ids[-1] == 0
        logp = model(input_ids=ids[None]).logits[0].double().log_softmax(-1).detach().numpy()[:-1]
        targets = cache.targets(document, 1.0)
        assert targets.k.tolist() == [20] * len(logp) + [0]
        want = np.sort(logp, axis=1)[:, ::-1]
        np.testing.assert_array_equal(targets.ids[:-1], np.argsort(-logp, axis=1, kind="stable")[:, :20])
        # The codec's own steps: margins of 11 bits, tails of 1/16 nat, both against the row's first entry.
        head, tail = targets.logp[:-1], targets.log_tail[:-1]
        np.testing.assert_allclose(head[:, :1] - head, want[:, :1] - want[:, :20], rtol=2**-11, atol=1e-5)
        want_tail = np.log(np.exp(want[:, 20:]).sum(1)) - want[:, 0]
        np.testing.assert_allclose(tail - head[:, 0], want_tail, rtol=0, atol=1 / 32 + 1e-4)
        prompt = 1 + len(tokenizer.encode(f"# task {document}"))
        mask = np.arange(len(ids)) >= prompt - 1
        mask[-1] = False
        np.testing.assert_array_equal(cache.loss_mask(document), mask)
        nll.append(-logp[np.arange(len(logp)), ids[1:].numpy()])
        target_nll.append(nll[-1][mask[:-1]])
    assert cache.statistics["teacher_nll_all_nats"] == pytest.approx(np.mean(np.concatenate(nll)), rel=1e-5)
    assert cache.statistics["teacher_nll_nats"] == pytest.approx(np.mean(np.concatenate(target_nll)), rel=1e-5)


def test_a_second_call_finds_it_done_without_torch(teacher, rows, tmp_path):
    out = tmp_path / "cache"
    build(teacher, rows, out, "--limit-docs", "5")
    arguments = ["build", "--teacher", str(teacher), "--dataset", str(rows), "--out", str(out)]
    arguments += ["--dtype", "float32", "--shard-tokens", "300", "--limit-docs", "5"]
    code = f"import sys; from stage1_teacher.cli import teacher; teacher.main({arguments!r}, standalone_mode=False); "
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "up to date" in result.stderr
    assert result.stdout.splitlines()[-1] == "False False"


def test_a_finished_build_parses_no_document_again(teacher, rows, tmp_path, monkeypatch):
    from stage1_teacher import request as module

    first, _ = build(teacher, rows, tmp_path / "cache")
    open_documents, parsed = module.open_documents, []

    def count(source):
        parsed.append(source)
        return open_documents(source)

    monkeypatch.setattr(module, "open_documents", count)
    again, _ = build(teacher, rows, tmp_path / "cache")
    assert (parsed, again.manifest) == ([], first.manifest)
    # The same rows in other bytes: only reading them tells.
    rows.write_text("".join(json.dumps(json.loads(line), indent=None) + " \n" for line in rows.open()))
    again, _ = build(teacher, rows, tmp_path / "cache")
    assert (len(parsed), again.manifest) == (1, first.manifest)


def test_resumes_to_the_same_bytes(teacher, rows, tmp_path, monkeypatch):
    whole, _ = build(teacher, rows, tmp_path / "whole")
    from stage1_teacher import capture as module

    capture_shard, done = module.capture_shard, []

    def stop_at_the_third(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return capture_shard(*arguments)

    monkeypatch.setattr(module, "capture_shard", stop_at_the_third)
    with pytest.raises(SystemExit):  # click turns the interrupt into an abort
        build(teacher, rows, tmp_path / "resumed")
    assert len(shards(tmp_path / "resumed")) == 4
    done.clear()
    monkeypatch.setattr(module, "capture_shard", capture_shard)
    resumed, _ = build(teacher, rows, tmp_path / "resumed")
    assert shards(tmp_path / "resumed") == shards(tmp_path / "whole")
    assert resumed.label_identity == whole.label_identity
    assert (tmp_path / "resumed/manifest.json").read_bytes() == (tmp_path / "whole/manifest.json").read_bytes()


def test_a_resume_of_something_else_is_refused(teacher, rows, tmp_path, tokenizer):
    out = tmp_path / "cache"
    build(teacher, rows, out)
    before = shards(out)
    with pytest.raises(ResumeError, match="top_k"):
        build(teacher, rows, out, "--top-k", "5")
    other = save_teacher(
        tmp_path / "other", tokenizer, width=len(tokenizer), change=lambda model: model.lm_head.weight.mul_(2)
    )
    with pytest.raises(ResumeError, match="teacher"):
        build(other, rows, out)
    rows.write_text(rows.read_text().replace("task 3", "task three"))
    with pytest.raises(ResumeError, match="sources"):
        build(teacher, rows, out)
    assert shards(out) == before


def test_a_moved_teacher_and_a_touched_file_change_nothing(teacher, rows, tmp_path, tokenizer):
    first, _ = build(teacher, rows, tmp_path / "cache")
    moved = save_teacher(tmp_path / "moved", tokenizer, width=len(tokenizer))
    rows.touch()
    again, _ = build(moved, rows, tmp_path / "cache")
    assert again.manifest == first.manifest


def test_long_documents_are_split_at_the_models_positions(teacher, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "# p", "completion": "\n" + "a b c d e f g h\n" * 12}) + "\n")
    cache, result = build(teacher, path, tmp_path / "cache")
    assert "1 documents too long and split: 1" in result.stderr
    assert max(cache.doc_lengths) == 64
    parts = [cache.meta(document) for document in range(cache.num_documents)]
    assert [part["part"] for part in parts] == list(range(parts[0]["parts"]))
    with pytest.raises(ConfigError, match="beyond the teacher's positions"):
        build(teacher, path, tmp_path / "more", "--max-length", "65")


def lower_case(tokenizer):
    """As uncased BERT has it."""
    import copy

    from tokenizers import normalizers

    made = copy.deepcopy(tokenizer)
    made.backend_tokenizer.normalizer = normalizers.Lowercase()
    return made


def word_piece(_):
    """Words without what was between them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator(["X = 0123456789 # task y"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


@pytest.mark.parametrize(
    ("make", "texts", "got"),
    [
        (lower_case, ["x = 3\n"] * 18 + ["X = 3\n"] * 3, r"3, such as 19, where 'X = 3\n' becomes 'x = 3\n'"),
        (word_piece, ["task y\nX = 3\n"] * 2, r"2, such as 1, where 'task y\nX = 3\n' becomes 'task y X = 3'"),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused_unless_asked_for(tokenizer, tmp_path, make, texts, got):
    made = make(tokenizer)
    teacher, rows = save_teacher(tmp_path / "teacher", made, width=len(made)), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.raises(ConfigError) as caught:
        build(teacher, rows, tmp_path / "cache", "--top-k", "5")
    expected = f"expected: at most 10% of {len(texts)} documents (--max-lossy); got: {got}; fix: "
    assert f"does not give documents back as they were; where: teacher; {expected}" in str(caught.value)
    assert not (tmp_path / "cache").exists()
    cache, result = build(teacher, rows, tmp_path / "cache", "--max-lossy", "1", "--top-k", "5")
    num_lossy = int(got.partition(",")[0])
    assert cache.manifest.sources[0]["num_lossy"] == num_lossy
    assert f"{num_lossy} documents not restored by the tokenizer" in result.stderr
    with pytest.raises(ConfigError, match=r"TeacherConfig.max_lossy; expected: at least 0, at most 1; got: 1.5"):
        build(teacher, rows, tmp_path / "cache", "--max-lossy", "1.5")


def test_a_few_documents_may_be_lossy(tokenizer, tmp_path):
    made, rows = lower_case(tokenizer), tmp_path / "rows.jsonl"
    teacher = save_teacher(tmp_path / "teacher", made, width=len(made))
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["x = 3"] * 18 + ["X = 3"] * 2))
    cache, _ = build(teacher, rows, tmp_path / "cache", "--top-k", "5")
    assert cache.manifest.sources[0]["num_lossy"] == 2  # of 20, which is the share that is taken
    with pytest.raises(ConfigError, match=r"at most 0% of 20 documents .*got: 2, such as 19"):
        build(teacher, rows, tmp_path / "none", "--max-lossy", "0")


def test_nan_logits_are_refused_by_document_and_position(rows, tmp_path, tokenizer):
    def poison(model):
        model.model.embed_tokens.weight[tokenizer.encode("7")[0]] = float("nan")

    teacher = save_teacher(tmp_path / "nan", tokenizer, width=len(tokenizer), change=poison)
    with pytest.raises(CacheFormatError, match=r"document '8', position \d+"):  # the first to hold a 7
        build(teacher, rows, tmp_path / "cache")


def test_mass_beyond_the_tokenizer_is_refused(rows, tmp_path, tokenizer):
    # A norm weight of 0 makes every logit 0: the mass beyond the tokenizer is the share of ids there.
    teacher = save_teacher(tmp_path / "flat", tokenizer, change=lambda model: model.model.norm.weight.zero_())
    with pytest.raises(CacheFormatError, match=f"got: {(WIDTH - len(tokenizer)) / WIDTH:.2e}"):
        build(teacher, rows, tmp_path / "cache")


def test_a_padded_head_is_masked_and_its_mass_recorded(rows, tmp_path, tokenizer):
    size = len(tokenizer)

    def push_down(model):
        """One feature stays positive through all layers, and only the ids beyond the tokenizer weigh it, down."""
        model.model.embed_tokens.weight[:, -1] = 1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[-1] = 0
            layer.mlp.down_proj.weight[-1] = 0
        model.lm_head.weight[:size, -1] = 0
        model.lm_head.weight[size:] = 0
        model.lm_head.weight[size:, -1] = -3

    teacher = save_teacher(tmp_path / "padded", tokenizer, change=push_down)
    cache, _ = build(teacher, rows, tmp_path / "cache", "--top-k", str(WIDTH))
    assert (cache.tokenizer_size, cache.head_width) == (size, WIDTH)
    targets = cache.targets(0, 1.0)
    assert set(targets.k[:-1]) == {size}
    assert targets.ids.max() == size - 1
    assert np.isneginf(targets.log_tail).all()
    masses = [json.loads(path.read_text())["capture"]["excess_mass"] for path in cache.path.glob("shard-*.json")]
    assert all(0 < mass < 1e-4 for mass in masses)


def test_unusable_requests_are_named(teacher, rows, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no such model"):
        build(tmp_path / "nowhere", rows, tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"lacks a file.*config\.json"):
        build(tmp_path / "empty", rows, tmp_path / "cache")
    with pytest.raises(ConfigError, match="top_k"):
        build(teacher, rows, tmp_path / "cache", "--top-k", "0")
    with pytest.raises(ConfigError, match=r"--top-k is beyond the teacher's vocabulary.*at most [0-9]+; got: 60000"):
        build(teacher, rows, tmp_path / "cache", "--top-k", "60000")
    with pytest.raises(SystemExit):  # click's usage error
        build(teacher, rows, tmp_path / "cache", "--on-long", "cut")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="do not come together"):
        build(teacher, rows, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_teacher_without_its_tokenizer_is_refused(teacher, rows, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((teacher / name).read_bytes())
    with pytest.raises(DistillError, match="tokenizer"):
        build(bare, rows, tmp_path / "cache")


def test_defaults_and_a_profile(teacher, rows, tmp_path):
    cache, _ = build(teacher, rows, tmp_path / "default", "--limit-docs", "3")
    assert [getattr(cache.manifest, key) for key in ("codec", "filter", "top_k")] == ["q", "gzip", 64]
    profile = tmp_path / "profile.toml"
    profile.write_text('codec = "f16"\ntop_k = 7\ntemperatures = [1.0]\n')
    cache, _ = build(teacher, rows, tmp_path / "cache", "--config", str(profile), "--top-k", "9")
    assert (cache.manifest.codec, cache.manifest.top_k, cache.temperatures) == ("f16", 9, (1.0,))


def test_top_p_cuts_rows_and_is_part_of_the_labels(teacher, rows, tmp_path):
    whole, _ = build(teacher, rows, tmp_path / "whole", "--top-k", "20")
    cut, _ = build(teacher, rows, tmp_path / "cut", "--top-k", "20", "--top-p", "0.5")
    assert cut.label_identity != whole.label_identity
    assert cut.manifest.identity["labels"]["top_p"] == 0.5
    for document in range(20):
        ours, theirs = cut.targets(document, 1.0), whole.targets(document, 1.0)
        inside = np.arange(20) < ours.k[:, None]
        assert np.array_equal(ours.ids, np.where(inside, theirs.ids, 0))
        mass = np.exp(np.where(inside, theirs.logp, -np.inf).astype(np.float64))[:-1]
        kept, shorter = mass.sum(1), mass.sum(1) - mass[np.arange(len(mass)), ours.k[:-1] - 1]
        assert np.all((kept > 0.5 - 0.02) | (ours.k[:-1] == 20)) and np.all(shorter < 0.5 + 0.02)
    assert cut.statistics["entries"] < whole.statistics["entries"]
    for key in ("entropy_nats", "teacher_nll_nats", "teacher_nll_all_nats"):
        assert cut.statistics[key] == whole.statistics[key]
    with pytest.raises(ResumeError, match="top_p"):
        build(teacher, rows, tmp_path / "cut", "--top-k", "20", "--top-p", "0.6")


def test_the_filter_is_no_part_of_the_labels(teacher, rows, tmp_path):
    pytest.importorskip("hdf5plugin")
    caches = [build(teacher, rows, tmp_path / name, "--filter", name)[0] for name in ("gzip", "zstd")]
    assert [cache.manifest.filter for cache in caches] == ["gzip", "zstd"]
    assert caches[0].label_identity == caches[1].label_identity
    gzip, zstd = (cache.targets(3, 2.0) for cache in caches)
    assert np.array_equal(gzip.logp, zstd.logp) and np.array_equal(gzip.ids, zstd.ids)


def test_a_chats_targets_are_the_assistants_turns(teacher, tokenizer, tmp_path):
    chatty = tmp_path / "chatty"
    shutil.copytree(teacher, chatty)
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    (chatty / "chat_template.jinja").write_text(template + "{{ 'assistant: ' if add_generation_prompt else '' }}")
    path = tmp_path / "chats.jsonl"
    turns = [("user", "add"), ("assistant", "a + b"), ("user", "print"), ("assistant", "print(a)")]
    chat = [{"role": role, "content": content} for role, content in turns]
    path.write_text(json.dumps({"turns": chat}) + "\n")
    options = ("--columns", "messages=turns", "--top-k", "5")
    cache, _ = build(chatty, path, tmp_path / "cache", *options)
    assert json.loads((cache.path / "build.json").read_text())["options"]["columns"] == "messages=turns"
    ids, mask = cache.tokens(0).tolist(), cache.loss_mask(0)
    text = "user: add<|endoftext|>assistant: a + b<|endoftext|>user: print<|endoftext|>assistant: print(a)<|endoftext|>"
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    # The space that ends the generation prompt is one token with the turn's first letters.
    learnt = [next_id for next_id, target in zip(ids[1:], mask[:-1], strict=True) if target]
    assert tokenizer.decode(learnt, clean_up_tokenization_spaces=False) == " a + b<|endoftext|> print(a)<|endoftext|>"
    assert cache.statistics["target_bytes"] == len(" a + b print(a)")
    edited = template.replace(": ", ":  ") + "{{ 'assistant:  ' if add_generation_prompt else '' }}"
    (chatty / "chat_template.jinja").write_text(edited)
    with pytest.raises(ResumeError, match="tokenizer_files_digest"):
        build(chatty, path, tmp_path / "cache", *options)
    with pytest.raises(ConfigError, match=r"has no chat template; where: chats\.jsonl 1, .*teacher"):
        build(teacher, path, tmp_path / "other", *options)


def test_a_damaged_finished_cache_is_found_and_mended_by_the_same_build(teacher, rows, tmp_path):
    out = tmp_path / "cache"
    build(teacher, rows, out)
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    shard = out / "shard-00001.h5"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    program = [sys.executable, "-c", "from shared.__main__ import main; main()", "cache", "verify", str(out)]
    result = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "shard-00001.h5: SHA-256" in result.stdout
    _, result = build(teacher, rows, out)
    assert "damaged" in result.stderr
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before
    assert subprocess.run(program, capture_output=True, timeout=60).returncode == 0


def test_what_a_killed_command_left_in_a_finished_cache_is_cleared(teacher, rows, tmp_path):
    out = tmp_path / "cache"
    build(teacher, rows, out)
    before = {path.name for path in out.rglob("*")}
    (out / ".manifest.json.tmp-5").write_bytes(b"")
    build(teacher, rows, out)
    assert {path.name for path in out.rglob("*")} == before


def test_a_killed_and_resumed_build_is_one_wandb_run(teacher, rows, tmp_path):
    """Real offline runs: the id stays through a kill, is forgotten at the end, and is no part of the cache."""
    out = tmp_path / "tracked" / "cache"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"WANDB_MODE": "offline", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = ["teacher", "build", "--teacher", teacher, "--dataset", rows]
    command += ["--out", out, "--dtype", "float32", "--shard-tokens", 60]

    def ids():
        return [path.name.rpartition("-")[2] for path in sorted(out.parent.glob("wandb/offline-run-*"))]

    process = warm.Command(*command, env=environment)
    deadline = time.monotonic() + 60
    while not (out / "shard-00000.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    (first,) = ids()
    resumed = warm.run(*command, env=environment, timeout=120)
    assert resumed.returncode == 0 and "shards are done already" in resumed.stderr
    assert ids() == [first, first]
    assert not (out.parent / "wandb" / "cache.json").exists()
    made = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    build(teacher, rows, tmp_path / "plain", "--shard-tokens", "60")
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir() if path.is_file()}


@pytest.mark.parametrize("drawn_from", ["full", "tail"])
def test_samples_follow_from_the_document_alone(drawn_from, teacher, rows, tmp_path):
    options = ("--top-k", "12", "--samples", "9", "--samples-from", drawn_from, "--samples-temperature", "2")
    cache, _ = build(teacher, rows, tmp_path / "cache", *options)
    assert verify_cache(cache.path) == []
    assert cache.manifest.identity["labels"]["samples"] == [9, drawn_from, 2.0]
    other, _ = build(teacher, rows, tmp_path / "other", *options, "--batch-tokens", "40", "--shard-tokens", "90")
    assert other.num_shards > cache.num_shards
    drawn = 0
    for document in range(cache.num_documents):
        ours, theirs = cache.samples(document), other.samples(document)
        assert (ours.num, ours.drawn_from, ours.temperature) == (9, drawn_from, 2.0)
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_array_equal(ours.counts, theirs.counts)
        np.testing.assert_allclose(ours.margins, theirs.margins, atol=1e-4)
        drawn += int(ours.counts.sum())
    assert drawn == 9 * (cache.num_tokens - cache.num_documents)


def test_quantisation_without_its_package_is_refused(teacher, rows, tmp_path):
    with pytest.raises(ConfigError, match=r"--load-in 4bit needs bitsandbytes.*pip install"):
        build(teacher, rows, tmp_path / "cache", "--load-in", "4bit")
