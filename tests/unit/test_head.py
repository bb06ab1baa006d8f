import math

import numpy as np
import pytest
import torch

from stage1_teacher.head import LogitSource, label_rows

GRID = (0.5, 1.0, 1.5, 2.0)


def label(logits, gold=None, *, top_k=4, temperatures=GRID, tokenizer_size=None):
    logits = torch.as_tensor(logits, dtype=torch.float32)
    gold = torch.zeros(len(logits), dtype=torch.int64) if gold is None else torch.as_tensor(gold)
    size = logits.shape[1] if tokenizer_size is None else tokenizer_size
    return label_rows(logits.clone(), gold, top_k=top_k, temperatures=temperatures, tokenizer_size=size)


def reference(logits, gold, top_k, temperatures):
    """The same figures, row by row in float64 by sorting."""
    z = np.asarray(logits, dtype=np.float64)
    order = np.lexsort((np.broadcast_to(np.arange(z.shape[1]), z.shape), -z), axis=1)
    s = np.take_along_axis(z, order, 1)
    tail = s[:, top_k:]
    with np.errstate(divide="ignore"):
        logs = [
            np.log(np.exp((tail - tail.max(1, keepdims=True)) / t).sum(1)) + (tail.max(1) - s[:, 0]) / t
            if tail.shape[1]
            else np.full(len(z), -np.inf)
            for t in temperatures
        ]
    logp = s - s[:, :1] - np.log(np.exp(s - s[:, :1]).sum(1, keepdims=True))
    p = np.exp(logp)
    return {
        "ids": order[:, :top_k],
        "margins": s[:, :1] - s[:, :top_k],
        "tail_log": np.stack(logs, 1),
        "entropy": -(np.where(p > 0, p * logp, 0.0)).sum(1),
        "gold": np.take_along_axis(logp, np.argsort(order, 1)[np.arange(len(z)), gold][:, None], 1)[:, 0],
        "hit": np.argsort(order, 1)[np.arange(len(z)), gold] < top_k,
    }


@pytest.mark.parametrize(("scale", "vocabulary", "top_k"), [(1, 300, 5), (4, 5000, 64), (0.01, 100, 99), (30, 700, 16)])
def test_equals_a_float64_reference(scale, vocabulary, top_k):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(37, vocabulary, generator=generator) * scale
    gold = torch.randint(vocabulary, (37,), generator=generator)
    rows = label(logits, gold, top_k=top_k)
    want = reference(logits, gold.numpy(), top_k, GRID)
    np.testing.assert_array_equal(rows.ids.numpy(), want["ids"])
    np.testing.assert_array_equal(rows.gold_in_topk.numpy(), want["hit"])
    np.testing.assert_array_equal(rows.k.numpy(), np.full(37, top_k))
    np.testing.assert_allclose(rows.margins.numpy(), want["margins"], rtol=1e-6)
    np.testing.assert_allclose(rows.tail_log.numpy(), want["tail_log"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(rows.entropy_nats.numpy(), want["entropy"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows.gold_logprob.numpy(), want["gold"], rtol=1e-6, atol=1e-6)
    assert rows.excess_mass.tolist() == [0.0] * 37


@pytest.mark.parametrize("mass", [1e-2, 1e-6, 1e-12])
def test_a_small_tail_keeps_its_digits(mass):
    """A tail of 1,000 equal logits that together hold `mass` relative to the top: total − head would lose it."""
    level = math.log(mass / 1000)
    rows = label([[0.0, -1.0] + [level] * 1000], top_k=2)
    level = float(np.float32(level))
    want = [math.log(1000) + level / t for t in GRID]
    np.testing.assert_allclose(rows.tail_log[0].numpy(), want, rtol=1e-6)


def test_without_a_tail_it_is_minus_infinity_and_entropy_is_exact():
    for top_k in (4, 9):
        rows = label([[0.0, 0.0, 0.0, 0.0]], top_k=top_k)
        assert rows.k.tolist() == [4]
        assert rows.tail_log.tolist() == [[-math.inf] * 4]
        assert rows.entropy_nats.item() == pytest.approx(math.log(4), abs=1e-7)


def test_entries_of_minus_infinity_are_not_counted():
    rows = label([[1.0, -math.inf, 2.0, -math.inf, -math.inf, -math.inf]], [1], top_k=4)
    assert rows.k.tolist() == [2]
    assert rows.ids[0, :2].tolist() == [2, 0]
    assert rows.tail_log.tolist() == [[-math.inf] * 4]
    assert rows.gold_logprob.item() == -math.inf
    assert rows.gold_in_topk.tolist() == [False]
    p = 1 / (1 + math.exp(-1))
    assert rows.entropy_nats.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-7)


def test_minus_infinity_in_the_tail_adds_nothing():
    rows = label([[3.0, 2.0, 1.0, -math.inf]], top_k=2)
    assert rows.k.tolist() == [2]
    np.testing.assert_allclose(rows.tail_log[0].numpy(), [-2 / t for t in GRID], rtol=1e-6)


def test_ties_are_ordered_by_id_also_across_the_boundary():
    values = torch.tensor([[1.0, 5.0, 3.0, 3.0, 5.0, 3.0, 0.0, 3.0]])
    for top_k, want in [(1, [1]), (2, [1, 4]), (3, [1, 4, 2]), (4, [1, 4, 2, 3]), (6, [1, 4, 2, 3, 5, 7])]:
        assert label(values, top_k=top_k).ids[0].tolist() == want


def test_smaller_k_is_a_prefix_of_larger_on_coarse_logits():
    logits = torch.randn(50, 2000, generator=torch.Generator().manual_seed(1)).mul(2).round()
    want = reference(logits, np.zeros(50, int), 100, GRID)["ids"]
    for top_k in (1, 10, 100):
        np.testing.assert_array_equal(label(logits, top_k=top_k).ids.numpy(), want[:, :top_k])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_unusable_rows_show_in_the_top_logit_and_spare_their_neighbours(bad):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    clean = label(logits)
    logits[1, 20] = bad
    rows = label(logits)
    assert rows.top_logit.isfinite().tolist() == [True, False, True]
    assert torch.equal(rows.tail_log[[0, 2]], clean.tail_log[[0, 2]])
    assert not label([[-math.inf] * 6]).top_logit.isfinite().item()


def test_ids_beyond_the_tokenizer_are_masked_and_their_mass_recorded():
    inside = [[1.0, 0.0, -1.0, 0.5, 0.2]]
    rows = label([[*inside[0], 9.0, 2.0]], top_k=3, tokenizer_size=5)
    alone = label(inside, top_k=3)
    assert torch.equal(rows.tail_log, alone.tail_log)
    assert torch.equal(rows.gold_logprob, alone.gold_logprob)
    e = np.exp([*inside[0], 9.0, 2.0])
    assert rows.excess_mass.item() == pytest.approx(e[5:].sum() / e.sum(), rel=1e-6)


def test_a_grid_of_one_temperature():
    logits = torch.randn(5, 90, generator=torch.Generator().manual_seed(4))
    assert torch.equal(label(logits, temperatures=(1.0,)).tail_log[:, 0], label(logits).tail_log[:, 1])


# --- logits of real models -------------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def tiny(name, **changes):
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} if name == "GPT2" else TINY
    config = getattr(transformers, f"{name}Config")(**shape, **changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def batch(lengths):
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    real = torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, 97, (length,), generator=torch.Generator().manual_seed(length))
        real[row, :length] = True
    return ids, real


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("Llama", {}, None),
        ("Starcoder2", {}, None),
        ("GPT2", {}, None),
        ("Qwen2", {"tie_word_embeddings": True}, None),
        ("Phi", {}, None),  # a head with a bias
        ("Cohere", {"logit_scale": 0.25}, "scales or caps"),
        ("Gemma2", {"final_logit_softcapping": 30.0, "head_dim": 8}, "scales or caps"),
        ("Gemma2", {"final_logit_softcapping": None, "head_dim": 8}, None),
        ("Granite", {"logits_scaling": 8.0}, "scales or caps"),
    ],
)
def test_logits_equal_the_models_own(name, changes, why):
    model = tiny(name, **changes)
    source = LogitSource(model, chunk_rows=7)
    assert (source.notice is None) if why is None else (why in source.notice)
    assert source.head_width == 97
    ids, real = batch([9, 5, 12])
    ours = torch.cat([part.clone() for part in source.chunks(ids, real)])
    own = model(input_ids=ids, attention_mask=real.long()).logits[real]
    assert ours.shape == (26, 97)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Llama", "Granite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_model_fused_or_not(name, dtype):
    model = tiny(name).to(dtype)
    ids, real = batch([9, 5])
    gold = torch.arange(14)
    labelled = {"top_k": 5, "temperatures": GRID, "tokenizer_size": 97}
    (logits,) = LogitSource(model, chunk_rows=16).chunks(ids, real)
    want = label_rows(logits.clone(), gold, **labelled)
    rows = label_rows(logits, gold, **labelled)
    assert torch.equal(rows.tail_log, want.tail_log)
    assert torch.equal(rows.ids, want.ids)


def test_neighbours_and_padding_do_not_change_a_document():
    source = LogitSource(tiny("Llama"), chunk_rows=16)
    ids, real = batch([9, 5, 12])
    together = torch.cat([part.clone() for part in source.chunks(ids, real)])
    alone = torch.cat([part.clone() for part in source.chunks(ids[1:2, :5], real[1:2, :5])])
    torch.testing.assert_close(together[9:14], alone, rtol=1e-6, atol=1e-6)


def test_a_bf16_backbone_gets_a_float32_head():
    model = tiny("Llama").to(torch.bfloat16)
    source = LogitSource(model, chunk_rows=16)
    assert source.notice is None
    ids, real = batch([12])
    (ours,) = source.chunks(ids, real)
    hidden = model.model(input_ids=ids).last_hidden_state[0]
    assert torch.equal(ours, hidden.float() @ model.lm_head.weight.float().T)


def test_an_offloaded_head_falls_back_with_a_notice():
    model = tiny("Llama")
    model.lm_head = torch.nn.Linear(32, 97, bias=False, device="meta")
    assert "offloaded" in LogitSource(model, chunk_rows=4).notice
