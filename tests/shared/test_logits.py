import numpy as np
import pytest
import torch
import transformers
from accelerate import dispatch_model

from shared.checkpoints import load_frozen
from shared.errors import DistillError
from shared.logits import LogitSource, largest, largest_by_sorting
from stage1_teacher.topk import capture_rows

GRID = (0.5, 1.0, 1.5, 2.0)
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
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def tiny(name, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(GPT2 if name == "GPT2" else TINY), **changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # far from the small, equal weights of initialisation; biases too
        parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def batch(lengths):
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    real = torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, 97, (length,), generator=torch.Generator().manual_seed(length))
        real[row, :length] = True
    return ids, real


def rows_of(source, ids, real):
    return torch.cat([part.clone() for part in source.chunks(ids, real)])


MODELS = [
    ("Starcoder2", {}),
    ("Llama", {}),
    ("Qwen2", {}),
    ("Qwen3", {"head_dim": 8}),
    ("GPT2", {}),
    ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
    ("Gemma2", {"final_logit_softcapping": None, "head_dim": 8}),
    ("Gemma3Text", {"final_logit_softcapping": 3.0, "head_dim": 8}),
    ("Cohere", {"logit_scale": 0.3}),
    ("Cohere2", {"logit_scale": 0.0625}),
    ("Granite", {"logits_scaling": 7.0}),
    ("Phi", {}),  # a head with a bias
    ("Phi3", {}),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("name", "changes"), MODELS)
def test_fused_logits_equal_the_models_own_and_a_float64_reference(name, changes, tied):
    model = tiny(name, **changes, tie_word_embeddings=tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    source = LogitSource(model, chunk_rows=7)
    assert source.notice is None
    assert source.head_width == 97
    ids, real = batch([9, 5, 12])
    ours = rows_of(source, ids, real)
    assert (ours.dtype, ours.shape) == (torch.float32, (26, 97))
    own = model(input_ids=ids, attention_mask=real.long()).logits[real]
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=2e-6)

    rows = capture_rows(ours.clone(), ids[real], top_k=5, temperatures=GRID, tokenizer_size=97)
    z = own.double().numpy()
    order = np.argsort(-z, 1, kind="stable")
    sorted_z = np.take_along_axis(z, order, 1)
    np.testing.assert_array_equal(rows.ids.numpy(), order[:, :5])
    np.testing.assert_allclose(rows.margins.numpy(), sorted_z[:, :1] - sorted_z[:, :5], rtol=1e-5, atol=5e-6)
    tails = [np.log(np.exp((sorted_z[:, 5:] - sorted_z[:, :1]) / t).sum(1)) for t in GRID]
    np.testing.assert_allclose(rows.tail_log.numpy(), np.stack(tails, 1), atol=1e-5)


@pytest.mark.parametrize(("name", "changes"), MODELS)
def test_a_bf16_backbone_gets_a_float32_head(name, changes):
    model = tiny(name, **changes).to(torch.bfloat16)
    source = LogitSource(model, chunk_rows=16)
    assert source.notice is None
    ids, real = batch([12])
    head, hidden = model.get_output_embeddings(), model.base_model(input_ids=ids).last_hidden_state[0]
    z = hidden.double() @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
    z = z * changes.get("logit_scale", 1.0) / changes.get("logits_scaling", 1.0)
    cap = changes.get("final_logit_softcapping")
    z = z if cap is None else cap * torch.tanh(z / cap)
    torch.testing.assert_close(rows_of(source, ids, real).double(), z, rtol=1e-5, atol=1e-5)


class _Base(transformers.LlamaForCausalLM):
    """A model with code of its own around the head."""

    before = after = staticmethod(lambda x: x)

    def forward(self, input_ids, use_cache=None):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=self.after(self.lm_head(self.before(hidden))))


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        (lambda x: x * 1.001, lambda z: z, "changes the hidden states"),
        (lambda x: x, lambda z: z + 1e-3, "does more behind its head"),
        (lambda x: x, lambda z: z.clamp(-60, 60), "does more behind its head"),
        (lambda x: x, lambda z: torch.where(torch.arange(97) == 5, -torch.inf, z), "does more behind its head"),
        (lambda x: x, lambda z: z[..., :90], "does more behind its head"),
        (lambda x: x, lambda z: z.log_softmax(-1), "does more behind its head"),
        (lambda x: x, lambda z: z.roll(1, -1), "does more behind its head"),
    ],
)
def test_a_model_that_does_more_is_run_the_plain_way(before, after, why):
    model = _Base(tiny("Llama").config).eval()
    model.before, model.after = before, after
    source = LogitSource(model, chunk_rows=5)
    assert why in source.notice
    ids, real = batch([9, 5])
    torch.testing.assert_close(rows_of(source, ids, real), model(ids).logits[real], rtol=0, atol=0)


def test_scale_and_cap_together_are_found():
    model = _Base(tiny("Llama").config).eval()
    model.after = lambda z: 5 * torch.tanh(z * 0.7 / 5)
    source = LogitSource(model, chunk_rows=5)
    assert source.notice is None
    ids, real = batch([9, 5])
    torch.testing.assert_close(rows_of(source, ids, real), model(ids).logits[real], rtol=1e-5, atol=1e-6)


def test_a_head_with_code_of_its_own_is_run_the_plain_way():
    class Doubling(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny("Llama")
    model.lm_head = Doubling(32, 97, bias=False)
    source = LogitSource(model, chunk_rows=5)
    assert "no backbone with a linear head" in source.notice
    ids, real = batch([9, 5])
    torch.testing.assert_close(rows_of(source, ids, real), model(ids).logits[real], rtol=0, atol=0)


def test_a_multimodal_wrapper_is_run_the_plain_way():
    text = {**TINY, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    source = LogitSource(model, chunk_rows=5)
    assert "takes more than text" in source.notice
    assert source.head_width == 97
    ids, real = batch([9])
    torch.testing.assert_close(rows_of(source, ids, real), model(input_ids=ids).logits[real], rtol=1e-5, atol=1e-6)


def test_a_model_that_looks_ahead_is_refused():
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(DistillError, match="depend on later tokens"):
        LogitSource(transformers.BertLMHeadModel(config).eval(), chunk_rows=4)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2"])
def test_neighbours_and_padding_do_not_change_a_documents_rows(name):
    source = LogitSource(tiny(name, **({"head_dim": 8} if name == "Gemma2" else {})), chunk_rows=16)
    lengths = [9, 5, 12, 1, 30]
    ids, real = batch(lengths)
    gold = torch.arange(sum(lengths))
    together = rows_of(source, ids, real)
    ids_with_other_padding = torch.where(real, ids, 41)
    torch.testing.assert_close(rows_of(source, ids_with_other_padding, real), together, rtol=0, atol=0)
    labelled = {"top_k": 5, "temperatures": GRID, "tokenizer_size": 97}
    want = capture_rows(together.clone(), gold, **labelled)
    for row, (start, length) in enumerate(zip(np.cumsum([0, *lengths]), lengths, strict=False)):
        alone = rows_of(source, ids[row : row + 1, :length], real[row : row + 1, :length])
        torch.testing.assert_close(alone, together[start : start + length], rtol=1e-5, atol=5e-6)
        rows = capture_rows(alone, gold[start : start + length], **labelled)
        assert torch.equal(rows.ids, want.ids[start : start + length])
        torch.testing.assert_close(rows.tail_log, want.tail_log[start : start + length], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_dropout_of_the_configuration_and_train_mode_are_without_effect(name):
    drop = {"GPT2": {"resid_pdrop": 0.9, "embd_pdrop": 0.9, "attn_pdrop": 0.9}, "Llama": {"attention_dropout": 0.9}}
    ids, real = batch([9, 5])
    want = rows_of(LogitSource(tiny(name), chunk_rows=16), ids, real)
    source = LogitSource(tiny(name, **drop[name]).train().requires_grad_(True), chunk_rows=16)
    ours = rows_of(source, ids, real)
    assert torch.equal(ours, want)
    assert not ours.requires_grad


# --- accelerate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["Phi", "Cohere"])
@pytest.mark.parametrize("where", ["disk", "cpu", "head only"])
def test_offloaded_weights_come_back(name, tied, where, tmp_path):
    model = tiny(name, tie_word_embeddings=tied)
    ids, real = batch([9, 5])
    want = rows_of(LogitSource(model, chunk_rows=7), ids, real)
    base = model.base_model_prefix
    device_map = {base: where, "lm_head": where}
    if where == "head only":
        device_map = {base: "cpu", "lm_head": "disk"}
    model = dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert model.get_output_embeddings().weight.is_meta == (where != "cpu" and not (tied and where == "head only"))
    source = LogitSource(model, chunk_rows=7)
    assert source.notice is None
    assert torch.equal(rows_of(source, ids, real), want)


def test_a_saved_model_loads_with_its_layers_on_disk(tmp_path):
    model = tiny("Llama")
    model.save_pretrained(tmp_path / "model")
    ids, real = batch([9, 5])
    want = rows_of(LogitSource(model, chunk_rows=7), ids, real)
    offloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "disk"}
        | {"model.rotary_emb": "cpu"},
        offload_folder=str(tmp_path / "offload"),
    )
    assert offloaded.lm_head.weight.is_meta
    assert torch.equal(rows_of(LogitSource(offloaded, chunk_rows=7), ids, real), want)


@pytest.mark.parametrize("part", ["lm_head", "model.layers.1.mlp.up_proj"])
def test_weights_on_meta_without_hooks_are_refused_by_name(part):
    model = tiny("Llama")
    model.get_submodule(part).to("meta")
    with pytest.raises(DistillError, match=rf"{part}\.weight"):
        LogitSource(model, chunk_rows=4)


def test_a_head_of_zeros_is_refused():
    model = tiny("Llama")
    model.lm_head.weight.zero_()
    with pytest.raises(DistillError, match="all weights of the model's head are zero"):
        LogitSource(model, chunk_rows=4)


def test_the_loader_gives_an_evaluated_model_without_gradients(tmp_path):
    tiny("GPT2", resid_pdrop=0.9).save_pretrained(tmp_path)
    model = load_frozen(tmp_path, dtype="float32", device_map="cpu")
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("way", [largest, largest_by_sorting])
def test_equal_logits_are_ordered_by_id_at_the_border_too(way):
    z = torch.zeros(4, 40)
    z[1, [30, 20, 10]] = torch.tensor([3.0, 2.0, 2.0])
    z[2, 5:] = 1.0
    z[3] = torch.arange(40.0)
    assert way(z, 5)[1].tolist() == [
        [0, 1, 2, 3, 4], [30, 10, 20, 0, 1], [5, 6, 7, 8, 9], [39, 38, 37, 36, 35]
    ]  # fmt: skip
    values, ids = way(torch.tensor([[1.0, 2.0, 2.0]]), 5)
    assert (values.tolist(), ids.tolist()) == ([[2.0, 2.0, 1.0]], [[1, 2, 0]])


@pytest.mark.parametrize("way", [largest, largest_by_sorting])
@pytest.mark.parametrize(("V", "k", "step"), [(5000, 20, 0.5), (4099, 64, 0.05), (70_001, 300, 0.01), (130, 64, 1.0)])
def test_the_largest_logits_are_those_of_a_stable_sort(way, V, k, step):
    """Logits as coarse as half precision's: most rows tie, also at the border and between maxima of groups."""
    z = (torch.randn(20, V, generator=torch.Generator().manual_seed(V)) / step).round() * step
    z[0] = 0.0
    want = z.sort(dim=1, descending=True, stable=True)
    values, ids = way(z[:, :V], k)
    assert torch.equal(values, want.values[:, : k + 1])
    assert torch.equal(ids, want.indices[:, :k])


def test_logits_are_never_formed_in_tf32():
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    LogitSource(tiny("Llama"), chunk_rows=4)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
