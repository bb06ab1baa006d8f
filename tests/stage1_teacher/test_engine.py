"""`teacher build --hidden-states`: files as vLLM's connector writes them, against a plain build."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from shared.cache.reader import Cache
from shared.cache.verify import verify_cache
from shared.errors import ConfigError, ResumeError
from stage1_teacher.cli import teacher as command
from stage1_teacher.engine import EXAMPLE
from tests.support.eval_models import save_tokenizer

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 0,
    "initializer_range": 0.3,
}  # fmt: skip
ARCHITECTURES = {
    "Llama": {},
    "Starcoder2": {"tie_word_embeddings": True},  # norms with a bias
    "Gemma2": {"final_logit_softcapping": 3.0},  # 1 + weight in its norms, embeddings scaled, logits capped
    "Granite": {"logits_scaling": 4.0},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


def save_teacher(folder, architecture="Llama", dtype=torch.float32):
    vocabulary = save_tokenizer(folder)
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=vocabulary, pad_token_id=0, **SMALL | ARCHITECTURES[architecture]
    )
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # not the identity
            parameter.data.add_(0.5 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [{"prompt": f"# task {i}", "completion": f"\nx = {i}\n" + "y = x\n" * (i % 5)} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


def build(teacher, rows, out, *more, dtype="float32"):
    words = ["build", "--teacher", teacher, "--dataset", rows, "--out", out, "--dtype", dtype, "--shard-tokens", 120]
    words += ["--top-k", 8, "--samples", 6, "--batch-tokens", 1]  # a document is a batch: the same sums everywhere
    return CliRunner().invoke(command, [*map(str, words), *map(str, more)])


def begin(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "engine.json").write_text(json.dumps(EXAMPLE | {"dtype": "float32"} | changes))
    return folder


def answer(teacher, folder, *, final_norm=False, dtype=torch.float32, layers=1):
    """Play the engine: run the requests, and write states as vLLM's connector does."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=dtype).eval()
    norm = model.base_model.norm
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    for line in (folder / "requests.jsonl").read_text().splitlines():
        tokens = torch.tensor(json.loads(line)["prompt_token_ids"])
        with torch.inference_mode():
            model(tokens[None], use_cache=False)
        states = seen[-1][final_norm][0]
        if layers > 1:
            states = torch.stack([torch.randn_like(states)] * (layers - 1) + [states], 1)
        request = folder / f"cmpl-{len(seen)}"
        request.mkdir()
        save_file({"hidden_states": states.contiguous(), "token_ids": tokens}, request / "hidden_states.safetensors")


def built(teacher, rows, folder, out, *more, **options):
    """The two calls of a build behind an engine."""
    dtype = str(options.get("dtype", torch.float32)).removeprefix("torch.")
    begin(folder, dtype=dtype, final_norm=options.get("final_norm", False))
    done = build(teacher, rows, out, "--hidden-states", folder, *more, dtype=dtype)
    assert isinstance(done.exception, ConfigError), done.output
    assert "documents have no hidden states yet" in str(done.exception) and "requests.jsonl" in str(done.exception)
    answer(teacher, folder, **options)
    done = build(teacher, rows, out, "--hidden-states", folder, *more, dtype=dtype)
    assert done.exit_code == 0, (done.output, done.exception)
    return Cache(out)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_labels_are_bit_for_bit_those_of_a_plain_build(tmp_path, rows, architecture):
    teacher = save_teacher(tmp_path / "teacher", architecture)
    assert build(teacher, rows, tmp_path / "plain").exit_code == 0
    plain = Cache(tmp_path / "plain")
    for final_norm, side in ((False, "before"), (True, "after")):
        cache = built(teacher, rows, tmp_path / f"states-{side}", tmp_path / side, final_norm=final_norm)
        assert verify_cache(cache.path) == []
        assert cache.num_shards > 1
        assert cache.manifest.shard_digests == plain.manifest.shard_digests
        assert cache.label_identity != plain.label_identity
        labels = cache.manifest.identity["labels"]
        assert labels.pop("engine") == f"vllm 0.23.0, float32, {side} the final norm"
        assert labels == plain.manifest.identity["labels"]


def test_a_bfloat16_teacher_of_several_layers(tmp_path, rows):
    teacher = save_teacher(tmp_path / "teacher", dtype=torch.bfloat16)
    assert build(teacher, rows, tmp_path / "plain", dtype="bfloat16").exit_code == 0
    for layers in (1, 3):
        out = tmp_path / f"cache-{layers}"
        cache = built(teacher, rows, tmp_path / f"states-{layers}", out, dtype=torch.bfloat16, layers=layers)
        assert cache.manifest.shard_digests == Cache(tmp_path / "plain").manifest.shard_digests


def test_files_are_deleted_only_when_asked(tmp_path, teacher, rows):
    folder = tmp_path / "states"
    built(teacher, rows, folder, tmp_path / "kept")
    files = set(folder.rglob("*.safetensors"))
    assert len(files) == 8
    other = next(iter(files)).with_name("other.safetensors")
    save_file({"hidden_states": torch.zeros(2, 32), "token_ids": torch.tensor([9, 9])}, other)
    for file in files:
        file.with_name(f"{file.name}.lock").touch()
    more = ("--hidden-states", folder, "--delete-hidden-states")
    assert build(teacher, rows, tmp_path / "again", *more).exit_code == 0
    assert list(folder.rglob("*.safetensors*")) == [other]
    done = build(teacher, rows, tmp_path / "again", *more)  # the cache is finished: nobody needs them
    assert done.exit_code == 0 and Cache(tmp_path / "again").manifest == Cache(tmp_path / "kept").manifest


def test_only_what_is_missing_is_asked_for(tmp_path, teacher, rows):
    folder = begin(tmp_path / "states")
    build(teacher, rows, tmp_path / "cache", "--hidden-states", folder)
    assert len((folder / "requests.jsonl").read_text().splitlines()) == 8
    answer(teacher, folder)
    next(folder.rglob("*.safetensors")).unlink()
    done = build(teacher, rows, tmp_path / "cache", "--hidden-states", folder)
    assert "got: 1 without" in str(done.exception)
    assert len((folder / "requests.jsonl").read_text().splitlines()) == 1


def test_an_answer_that_holds_the_last_token_too_will_do(tmp_path, teacher, rows):
    folder = begin(tmp_path / "states")
    build(teacher, rows, tmp_path / "plain")
    build(teacher, rows, tmp_path / "cache", "--hidden-states", folder)
    plain = Cache(tmp_path / "plain")
    whole = [{"prompt_token_ids": plain.tokens(doc).tolist()} for doc in range(plain.num_documents)]
    (folder / "requests.jsonl").write_text("".join(json.dumps(request) + "\n" for request in whole))
    answer(teacher, folder)
    assert build(teacher, rows, tmp_path / "cache", "--hidden-states", folder).exit_code == 0
    for doc in range(plain.num_documents):  # attention over one token more sums otherwise
        ours, theirs = Cache(tmp_path / "cache").targets(doc, 1.0), plain.targets(doc, 1.0)
        assert np.array_equal(ours.ids, theirs.ids)
        np.testing.assert_allclose(ours.logp, theirs.logp, atol=1e-4)


def test_a_build_goes_on_only_with_the_same_engine(tmp_path, teacher, rows):
    cache = built(teacher, rows, tmp_path / "states", tmp_path / "cache")
    begin(tmp_path / "states", version="0.24.0")
    done = build(teacher, rows, cache.path, "--hidden-states", tmp_path / "states")
    assert isinstance(done.exception, ResumeError) and "engine" in str(done.exception)
    assert isinstance(build(teacher, rows, cache.path).exception, ResumeError)


@pytest.fixture(scope="module")
def answered(tmp_path_factory, teacher, rows):
    """A build that an engine has answered, to be copied whole."""
    folder = tmp_path_factory.mktemp("answered")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        build(teacher, rows, folder / "cache", "--hidden-states", begin(folder / "states"))
    answer(teacher, folder / "states")
    return folder


def rewrite(folder, change):
    file = sorted(folder.rglob("*.safetensors"))[0]
    tensors = {"hidden_states": torch.randn(20, 32), "token_ids": torch.arange(20)}
    request = json.loads((folder / "requests.jsonl").read_text().splitlines()[0])
    tensors["token_ids"] = torch.tensor(request["prompt_token_ids"])
    tensors["hidden_states"] = torch.randn(len(tensors["token_ids"]), 32)
    save_file(change(tensors), file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"hidden_states": t["hidden_states"][1:].clone()}, "hidden states of another form"),
        (lambda t: t | {"hidden_states": t["hidden_states"].half()}, r"expected: float32 .*got: float16"),
        (lambda t: t | {"hidden_states": t["hidden_states"][:, 0].clone()}, "hidden states of another form"),
        (
            lambda t: t | {"hidden_states": torch.randn(len(t["token_ids"]), 16)},
            "of another model.*expected: 32; got: 16",
        ),
        (lambda t: {"token_ids": t["token_ids"]}, "lacks a tensor.*expected: hidden_states; got: token_ids"),
        (lambda t: {"hidden_states": t["hidden_states"]}, "lacks a tensor.*expected: token_ids"),
        (lambda t: t | {"token_ids": t["token_ids"].float()}, "token ids of another form"),
        (lambda t: t | {"token_ids": torch.tensor(3)}, r"without values; where: .*token_ids; got: \[\]"),
        (
            lambda t: t | {"token_ids": torch.zeros(0, dtype=torch.long)},
            r"without values.*token_ids; got: \[0\]",
        ),
        (
            lambda t: t | {"hidden_states": torch.zeros(20, 0, 32)},
            r"without values.*got: \[20, 0, 32\]",
        ),
        (lambda t: t | {"hidden_states": t["hidden_states"] * torch.nan}, "the teacher's logits cannot be used"),
    ],
)
def test_what_does_not_fit_is_refused_by_file(tmp_path, teacher, rows, answered, change, message):
    folder = shutil.copytree(answered, tmp_path / "copy") / "states"
    rewrite(folder, change)
    done = build(teacher, rows, tmp_path / "copy" / "cache", "--hidden-states", folder)
    with pytest.raises(type(done.exception), match=message):
        raise done.exception
    assert isinstance(done.exception, ValueError)


def test_states_from_the_other_side_of_the_final_norm_are_found_out(tmp_path, teacher, rows):
    for final_norm, got in ((True, "before"), (False, "behind")):
        folder, out = begin(tmp_path / f"states-{got}", final_norm=final_norm), tmp_path / got
        build(teacher, rows, out, "--hidden-states", folder)
        answer(teacher, folder, final_norm=not final_norm)
        done = build(teacher, rows, out, "--hidden-states", folder)
        assert f"got: {got} the final norm" in str(done.exception)


def test_a_changed_byte_and_a_broken_file_are_refused(tmp_path, teacher, rows):
    folder = begin(tmp_path / "states")
    build(teacher, rows, tmp_path / "cache", "--hidden-states", folder)
    answer(teacher, folder)
    file = sorted(folder.rglob("*.safetensors"))[0]
    begin(folder, files={file.relative_to(folder).as_posix(): "0" * 64})
    done = build(teacher, rows, tmp_path / "cache", "--hidden-states", folder)
    assert f"a file's bytes have changed; where: {file}; expected: {'0' * 64}" in str(done.exception)
    file.write_bytes(file.read_bytes()[:50])
    done = build(teacher, rows, tmp_path / "cache", "--hidden-states", folder)
    assert f"a file of hidden states cannot be read; where: {file}" in str(done.exception)


def test_a_folder_that_says_nothing_is_refused(tmp_path, teacher, rows):
    (tmp_path / "states").mkdir()
    done = build(teacher, rows, tmp_path / "cache", "--hidden-states", tmp_path / "states")
    assert "does not say what made them" in str(done.exception) and '"final_norm": false' in str(done.exception)
    (tmp_path / "states" / "engine.json").write_text('{"engine": "vllm"}')
    done = build(teacher, rows, tmp_path / "cache", "--hidden-states", tmp_path / "states")
    assert "a field is missing" in str(done.exception)
    done = build(teacher, rows, tmp_path / "cache", "--hidden-states", begin(tmp_path / "states"), "--load-in", "8bit")
    assert "--load-in with --hidden-states" in str(done.exception)
