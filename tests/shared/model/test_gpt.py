"""The student equals transformers' Starcoder2 in parameters, logits and gradients."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from transformers import GenerationConfig, Starcoder2Config, Starcoder2ForCausalLM

from shared.errors import ConfigError
from shared.model.gpt import GPT, IGNORE, PRESETS, Documents, GPTConfig

SMALL = GPTConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_theta=500.0,
    norm_epsilon=1e-4,
)


def count(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config).parameters())


def pair(implementation="eager"):
    """Our model and transformers' with the same weights, none of them 0 or 1."""
    torch.manual_seed(3)
    ours = GPT(SMALL)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs = Starcoder2ForCausalLM(Starcoder2Config(**SMALL.to_dict(), attn_implementation=implementation))
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    theirs.tie_weights()
    return ours.eval(), theirs.eval()


def packed(lengths_by_row):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, SMALL.vocab_size, (len(lengths_by_row), sum(lengths_by_row[0])), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in lengths_by_row])
    return ids, positions


def documents(ids, lengths_by_row):
    return [piece[None] for row, lengths in zip(ids, lengths_by_row, strict=True) for piece in row.split(lengths)]


ROWS = [[7, 1, 12, 4], [24], [10, 14], [1, 1, 21, 1]]


def test_sizes_of_the_presets():
    assert count(PRESETS["gpt-125m"]) == 125_159_424
    assert count(PRESETS["tiny"]) == 11_019_392
    assert count(dataclasses.replace(PRESETS["gpt-125m"], vocab_size=49_153)) == 125_159_424 + 768


def test_names_and_shapes_are_those_of_starcoder2():
    for preset in PRESETS.values():
        with torch.device("meta"):
            ours = {name: tuple(tensor.shape) for name, tensor in GPT(preset).state_dict().items()}
            theirs = Starcoder2ForCausalLM(Starcoder2Config(**preset.to_dict())).state_dict()
        assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items() if name != "lm_head.weight"}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_of_whole_rows_equal_transformers(implementation):
    ours, theirs = pair(implementation)
    ids, _ = packed([[40], [40], [40]])
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(ids[:, :1]).logits, theirs(ids[:, :1]).logits, rtol=0, atol=1e-5)


def test_logits_of_packed_rows_equal_each_document_alone():
    ours, theirs = pair()
    ids, positions = packed(ROWS)
    logits = ours(ids, positions).logits
    for own, document in zip(documents(logits, ROWS), documents(ids, ROWS), strict=True):
        torch.testing.assert_close(own, theirs(document).logits, rtol=0, atol=1e-5)


def test_the_mask_for_accelerators_equals_the_loop_for_processors(monkeypatch):
    ours, _ = pair()
    ids, positions = packed(ROWS)
    expected = ours(ids, positions).logits
    monkeypatch.setattr(Documents, "attend_in_turn", Documents.attend_masked)
    torch.testing.assert_close(ours(ids, positions).logits, expected, rtol=0, atol=1e-5)


def test_the_kernel_for_any_length_gets_every_document_once(monkeypatch):
    """With a stand-in for the kernel, which does to each sequence what it documents."""

    def attend(q_NAD, k_NAD, v_NAD, bounds, bounds_of_keys, longest, longest_key, *, window_size, enable_gqa=False):
        assert (bounds.dtype, window_size) == (torch.int32, (-1, 0))
        assert torch.equal(bounds, bounds_of_keys)
        assert longest == longest_key >= bounds.diff().max()
        pieces = zip(
            *(tensor.transpose(0, 1).split(bounds.diff().tolist(), 1) for tensor in (q_NAD, k_NAD, v_NAD)), strict=True
        )
        assert enable_gqa == (q_NAD.shape[1] > k_NAD.shape[1])
        attended = [F.scaled_dot_product_attention(*piece, is_causal=True, enable_gqa=enable_gqa) for piece in pieces]
        return torch.cat(attended, 1).transpose(0, 1)

    ours, _ = pair()
    ids, positions = packed(ROWS)
    expected = ours(ids, positions).logits
    monkeypatch.setattr("shared.model.gpt.varlen.varlen_attn", attend)
    monkeypatch.setattr(Documents, "attend", Documents.attend_varlen)
    torch.testing.assert_close(ours(ids, positions).logits, expected, rtol=0, atol=1e-5)


def test_recomputed_layers_have_the_same_gradients():
    ours, _ = pair()
    ids, positions = packed(ROWS)
    gradients = []
    for _ in range(2):
        ours.zero_grad()
        ours(ids, positions, labels=ids)["loss"].backward()
        gradients.append([parameter.grad.clone() for parameter in ours.parameters()])
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs=None)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gradients_of_a_step_equal_transformers():
    ours, theirs = pair()
    ids, positions = packed(ROWS)
    labels = torch.cat([F.pad(document[0, 1:], (0, 1), value=IGNORE) for document in documents(ids, ROWS)])
    loss = ours(ids, positions, labels=labels.view_as(ids))["loss"]
    loss.backward()
    total = sum(
        F.cross_entropy(theirs(document).logits[0, :-1], document[0, 1:], reduction="sum")
        for document in documents(ids, ROWS)
        if document.shape[1] > 1
    )
    expected = total / (labels != IGNORE).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_num_items_in_batch_replaces_the_number_of_targets():
    ours, _ = pair()
    ids, positions = packed(ROWS)
    labels = ids.roll(-1, 1)
    here = ours(ids, positions, labels=labels)["loss"]
    torch.testing.assert_close(ours(ids, positions, labels=labels, num_items_in_batch=960)["loss"] * 10, here)


def test_config_json_loads_as_starcoder2(tmp_path):
    from shared.files import write_json

    write_json(tmp_path / "config.json", SMALL.to_dict())
    config = Starcoder2Config.from_pretrained(tmp_path)
    for field in dataclasses.fields(SMALL):
        if field.name != "rope_theta":
            assert getattr(config, field.name) == getattr(SMALL, field.name)
    assert config.rope_parameters["rope_theta"] == 500.0
    assert (config.use_bias, config.tie_word_embeddings, config.sliding_window) == (True, True, None)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"hidden_size": 36}, "hidden_size"),  # heads of 9
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"norm_epsilon": 0.0}, "norm_epsilon"),
    ],
)
def test_bad_sizes_are_refused_by_name(change, name):
    with pytest.raises(ConfigError, match=f"GPTConfig.{name}"):
        dataclasses.replace(SMALL, **change)


def test_initial_weights_depend_on_the_seed_alone():
    def weights(seed):
        torch.manual_seed(seed)
        return GPT(SMALL).state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == (first[name].dim() == 1) for name in first)


def test_initial_scales():
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    for name, parameter in GPT(config).named_parameters():
        if name.endswith(("o_proj.weight", "c_proj.weight")):
            assert parameter.std().item() == pytest.approx(0.01, rel=0.03)
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03)
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm" in name and "weight" in name)))


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_equals_transformers_with_and_without_a_kv_cache(use_cache):
    ours, theirs = pair()
    ids = torch.randint(1, ours.sizes.vocab_size, (1, 9), generator=torch.Generator().manual_seed(3))
    expected = ids
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat((expected, ours(expected).logits[:, -1:].argmax(-1)), dim=1)
    config = GenerationConfig(
        max_new_tokens=12, do_sample=False, use_cache=use_cache, pad_token_id=0, eos_token_id=None
    )
    generated = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert torch.equal(generated, expected)


def test_no_batch_decides_what_another_is_compiled_to():
    """On a processor all batches of one shape run the graphs of the first, in whatever order they come."""

    def compiled_for(*batches):
        torch.compiler.reset()
        graphs = []

        def backend(module, inputs):
            graphs.append(module.print_readable(print_output=False))
            return module.forward

        model = torch.compile(pair()[0], backend=backend)
        for rows in batches:
            ids, positions = packed(rows)
            model(ids, positions, labels=ids)["loss"].backward()
        return graphs

    several, other, one = [[7, 1, 16]] * 2, [[10, 14], [4, 20]], [[24]] * 2
    expected = compiled_for(several)
    assert any("addmm" in graph or "linear" in graph for graph in expected)
    assert compiled_for(one, several, other) == compiled_for(other, one, several) == expected
