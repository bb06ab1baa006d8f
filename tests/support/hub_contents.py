"""What the loopback Hub serves: a tiny StarCoder2 with random weights, MBPP-like rows, HumanEval."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.loopback_hub import Hub, Repository

TEACHER, MBPP, HUMANEVAL = "bigcode/starcoder2-3b", "google-research-datasets/mbpp", "openai/openai_humaneval"
SPLITS = {"train": range(601, 975), "test": range(11, 511), "validation": range(511, 601), "prompt": range(1, 11)}


def fill(hub: Hub, folder) -> None:
    """Give the Hub the teacher and the two data sets; `folder` is for the teacher's files."""
    for repositories, name, files in (
        (hub.models, TEACHER, starcoder2(folder)),
        (hub.datasets, MBPP, mbpp()),
        (hub.datasets, HUMANEVAL, humaneval()),
    ):
        repositories[name] = Repository()
        repositories[name].commit(files)


def mbpp_row(i: int) -> dict:
    return {
        "task_id": i,
        "text": f"Write a function to add {i} to a number.",
        "code": f"def add_{i}(x):\r\n\treturn x + {i}",
        "test_list": [f"assert add_{i}(1) == {i + 1}", f"assert add_{i}(0) == {i}"],
        "test_setup_code": "",
        "challenge_test_list": [],
    }


def mbpp() -> dict[str, bytes]:
    """The published layout: a card that names the configurations, one parquet file per split."""
    texts = pa.list_(pa.string())
    full = {"task_id": pa.int32(), "text": pa.string(), "code": pa.string(), "test_list": texts}
    full |= {"test_setup_code": pa.string(), "challenge_test_list": texts}
    sanitized = {"source_file": pa.string(), "task_id": pa.int32(), "prompt": pa.string(), "code": pa.string()}
    sanitized |= {"test_imports": texts, "test_list": texts}
    files = {}
    for split, ids in SPLITS.items():
        rows = [mbpp_row(i) for i in ids]
        files[f"full/{split}-00000-of-00001.parquet"] = _parquet(rows, full)
        short = [row | {"source_file": "x", "prompt": row["text"], "test_imports": []} for row in rows[:7]]
        files[f"sanitized/{split}-00000-of-00001.parquet"] = _parquet(short, sanitized)
    card = ["---", "license:", "- cc-by-4.0", "configs:"]
    for name in ("full", "sanitized"):
        card += [f"- config_name: {name}", "  data_files:"]
        card += [line for s in SPLITS for line in (f"  - split: {s}", f"    path: {name}/{s}-*")]
        card += ["  default: true"] if name == "full" else []
    return files | {"README.md": "\n".join([*card, "---", "# Dataset Card", ""]).encode()}


def several() -> dict[str, bytes]:
    """Two configurations, neither the default; integers as ids, and a column that Python cannot hold."""
    columns = {"id": pa.int64(), "text": pa.string(), "day": pa.date32()}
    files, card = {}, ["---", "configs:"]
    for first, name in ((0, "a"), (10, "b")):
        rows = [{"id": first + i, "text": f"{name} = {i}", "day": 10_000_000} for i in range(2)]
        files[f"{name}/train.parquet"] = _parquet(rows, columns)
        card += [f"- config_name: {name}", "  data_files:", "  - split: train", f"    path: {name}/train.parquet"]
    return files | {"README.md": "\n".join([*card, "---", ""]).encode()}


def humaneval(problems=None) -> dict[str, bytes]:
    """The published layout, with the published problems by default."""
    from dataclasses import asdict

    from data.humaneval import load_humaneval

    columns = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    name = "openai_humaneval/test-00000-of-00001.parquet"
    rows = [{key: asdict(problem)[key] for key in columns} for problem in problems or load_humaneval()]
    card = "---\nlicense:\n- mit\nconfigs:\n- config_name: openai_humaneval\n  data_files:\n  - split: test\n"
    card += "    path: openai_humaneval/test-*\n  default: true\n---\n"
    return {name: _parquet(rows, dict.fromkeys(columns, pa.string())), "README.md": card.encode()}


def _parquet(rows: list[dict], columns: dict[str, pa.DataType]) -> bytes:
    table = pa.Table.from_pylist([{key: row[key] for key in columns} for row in rows], pa.schema(columns))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def bpe_tokenizer(texts, vocab_size: int):
    """A byte-level BPE with StarCoder2's pre-tokenizer and its one special token, trained on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end)


def starcoder2(folder, *, seed: int = 0) -> dict[str, bytes]:
    """The files of a StarCoder2 with two small layers, bfloat16, and a byte-level BPE with StarCoder2's one end."""
    import torch
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    tokenizer = bpe_tokenizer([mbpp_row(i)["text"] + mbpp_row(i)["code"] for i in range(1, 50)], 512)
    torch.manual_seed(seed)
    config = Starcoder2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,  # HumanEval's longest prompt takes 1,315 of these tokens
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    Starcoder2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    (folder / "README.md").write_text("---\nlicense: bigcode-openrail-m\n---\n# StarCoder2\n")
    return {path.name: path.read_bytes() for path in folder.iterdir()}
