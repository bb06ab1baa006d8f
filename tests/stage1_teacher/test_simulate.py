"""`cache simulate`: sizes, divergences and gradient errors, against values formed here from the teacher's logits."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from shared.errors import CacheMismatchError, ConfigError
from stage1_teacher.simulate_cli import simulate
from tests.stage1_teacher.test_build import build, rows, save_teacher, teacher, tokenizer  # noqa: F401


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


def run(*arguments):
    result = CliRunner().invoke(simulate, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_figures_against_the_teachers_own(teacher, rows, tmp_path, tokenizer):  # noqa: F811
    from transformers import AutoModelForCausalLM

    cache, _ = build(teacher, rows, tmp_path / "cache", "--top-k", "12", "--codec", "f16")
    output = run(cache.path, "--documents", "3", "--teacher", teacher, "--out", tmp_path / "out")
    assert "KL, T=0.5" in output and "relative error" in output
    found = json.loads((tmp_path / "out/simulate.json").read_text())
    assert (tmp_path / "out/simulate.svg").read_bytes().startswith(b"<?xml")
    assert found["documents"] == 3 and found["tokens"] == cache.doc_lengths[:3].sum()
    variants = {(v["top_k"], v["codec"]): v for v in found["variants"]}
    assert sorted(variants) == [(k, codec) for k in (1, 2, 4, 8, 12) for codec in ("f16", "q")]

    # The dense gradient of a student with equal logits, and the ghost gradient of exact rows of 4 entries.
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    V, K, angles, errors, kls = len(tokenizer), 4, [], [], []
    for document in range(3):
        ids = torch.from_numpy(cache.tokens(document))
        logits = model(input_ids=ids[None]).logits[0, :-1].double().detach().numpy()
        for p in np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)):
            dense = 1 / V - p
            sparse = np.full(V, (1 - np.sort(p)[::-1][:K].sum()) / (V - K))
            top = np.argsort(-p, kind="stable")[:K]
            sparse[top] = p[top]
            sparse = 1 / V - sparse
            angles.append(np.degrees(np.arccos(sparse @ dense / np.linalg.norm(sparse) / np.linalg.norm(dense))))
            errors.append(np.linalg.norm(sparse - dense) / np.linalg.norm(dense))
            cells = np.argsort(-p, kind="stable")[:12]
            rest = 1 - p[cells].sum()
            q = 1 / V - sparse
            kls.append((p[cells] * np.log(p[cells] / q[cells])).sum() + rest * np.log(rest / (1 - q[cells].sum())))
    four = variants[4, "f16"]
    assert four["angle_degrees"] == pytest.approx(np.mean(angles), rel=0.02)
    assert four["relative_error"] == pytest.approx(np.mean(errors), rel=0.02)
    assert four["kl_nats"]["1"] == pytest.approx(np.mean(kls), rel=0.02)
    for codec in ("f16", "q"):
        chain = [variants[k, codec] for k in (1, 2, 4, 8, 12)]
        for key in ("angle_degrees", "relative_error"):
            values = [variant[key] for variant in chain]
            assert values == sorted(values, reverse=True)
        assert [v["bytes_per_token"] for v in chain] == sorted(v["bytes_per_token"] for v in chain)
        assert chain[-1]["kl_nats"]["1"] == pytest.approx(chain[-1]["coding_kl_nats"]["1"], abs=1e-7)

    # The teacher as its own student: the dense gradient is 0 but for rounding, so a student of other weights is taken.
    other = save_teacher(tmp_path / "o", tokenizer, width=len(tokenizer), change=lambda m: m.lm_head.weight.div_(30))
    assert "angle" in run(cache.path, "--documents", "2", "--teacher", teacher, "--student", other)
    assert "angle" not in run(cache.path, "--documents", "2")


def test_what_is_refused(teacher, rows, tmp_path, tokenizer):  # noqa: F811
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    cache, _ = build(teacher, rows, tmp_path / "cache", "--top-k", "4", "--limit-docs", "2")
    with pytest.raises(ConfigError, match="an empty sample"):
        run(cache.path, "--documents", "0")
    text = tokenizer.backend_tokenizer.to_str().replace('"add_prefix_space":false', '"add_prefix_space":true')
    changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), bos_token="<|endoftext|>")
    other = save_teacher(tmp_path / "other", changed, width=len(tokenizer))
    with pytest.raises(CacheMismatchError, match=r"the tokenizer of .* differ"):
        run(cache.path, "--teacher", other)
    result = CliRunner().invoke(simulate, [str(cache.path), "--student", str(other)])
    assert result.exit_code == 2
