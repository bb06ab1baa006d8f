"""Stage 1 at scale: how fast documents become a token store, beside `tokenizers` itself, and how much memory it takes.

1. Tokens per second of `make_store` over JSONL on disk, beside `encode_batch` of the tokenizers library over the same
   texts, which lie in memory already. Each runs several times, in turn; the best counts.
2. The most memory of a build, by number of documents, from a process of its own for each: opened, tokenised, planned,
   and its first shards labelled by a tiny random teacher. Beside it, what a process takes that only loads that teacher.
3. Seconds from the start of a resumed build to its first label: digests are checked, nothing is tokenised.

    python tests/bench/bench_stage1.py --tokenizer DIR [--documents 10000 100000] [--tokens 900] [--repeats 3]
"""

import argparse
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from data.load import Source, open_documents
from shared.tokenizer import load_tokenizer, plain_backend, record_ends
from stage1_teacher.documents import Limits
from stage1_teacher.store import BATCH_DOCUMENTS, make_store

SPEED_DOCUMENTS = 2_000
SHARDS = 2  # that are labelled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a directory")
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--tokens", type=int, default=900, help="of a document, about")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--build", nargs=3, help=argparse.SUPPRESS)  # a child: teacher, documents, out
    options = parser.parse_args()
    if options.build:
        build(*options.build)
        return
    with tempfile.TemporaryDirectory() as folder:
        show_speed(Path(folder), options)
        show_memory(Path(folder), options)


def write_documents(path: Path, count: int, tokenizer, tokens: int) -> None:
    """Documents of about so many tokens: stretches of the interpreter's library at random places."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    rng = random.Random(0)
    characters = round(tokens * 200_000 / len(tokenizer.encode(text[:200_000])))
    with path.open("w", encoding="utf-8") as out:
        for _ in range(count):
            start = rng.randrange(len(text) - characters)
            border = start + characters // 10
            row = {"prompt": text[start:border], "completion": text[border : start + characters] + " x"}
            out.write(json.dumps(row) + "\n")


def show_speed(folder: Path, options) -> None:
    tokenizer = load_tokenizer(options.tokenizer)
    record_ends(tokenizer)
    path = folder / "speed.jsonl"
    write_documents(path, SPEED_DOCUMENTS, tokenizer, options.tokens)
    data = open_documents(Source(str(path), "train"))
    texts = [document.prompt + document.completion for document in data.documents]
    ours, theirs = [], []
    limits = Limits(max_length=None, on_long="split", head_width=len(tokenizer))
    for _ in range(options.repeats):
        start = time.perf_counter()
        store = make_store(folder / "tokens", {}, data, tokenizer, limits)
        ours.append(store.facts.num_tokens / (time.perf_counter() - start))
        num_tokens, start = 0, time.perf_counter()
        with plain_backend(tokenizer.backend_tokenizer) as backend:
            for at in range(0, len(texts), BATCH_DOCUMENTS):
                encodings = backend.encode_batch(texts[at : at + BATCH_DOCUMENTS], add_special_tokens=False)
                num_tokens += sum(map(len, encodings))
        theirs.append(num_tokens / (time.perf_counter() - start))
    cores = len(os.sched_getaffinity(0))
    print(f"tokenising {SPEED_DOCUMENTS:,} documents, {store.facts.num_tokens:,} tokens, on {cores} cores")
    print(f"  {max(ours):,.0f} tokens/s from JSONL to the store; encode_batch alone {max(theirs):,.0f} tokens/s:")
    print(f"  {max(ours) / max(theirs):.2f} of it", flush=True)


def show_memory(folder: Path, options) -> None:
    teacher = folder / "teacher"
    make_teacher(teacher, options.tokenizer)
    alone = child(teacher, Path(), Path())["peak_bytes"]
    print(f"the teacher alone: {alone / 2**20:,.0f} MiB", flush=True)
    for count in options.documents:
        path, out = folder / f"{count}.jsonl", folder / f"cache-{count}"
        write_documents(path, count, load_tokenizer(options.tokenizer), options.tokens)
        found = child(teacher, path, out)
        peak, beyond = found["peak_bytes"] / 2**20, (found["peak_bytes"] - alone) / 2**20
        line = (
            f"{count:>9,} documents, {found['tokens']:>12,} tokens: most memory {peak:,.0f} MiB, {beyond:,.0f} beyond "
        )
        line += f"the teacher; first label after {found['seconds']:,.1f} s, "
        line += f"resumed after {child(teacher, path, out)['seconds']:,.1f} s"
        print(line, flush=True)
        path.unlink()


def child(teacher: Path, path: Path, out: Path) -> dict:
    """One build in a process of its own, which ends after its first shards."""
    command = [sys.executable, __file__, "--tokenizer", str(teacher), "--build", str(teacher), str(path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"WANDB_MODE": "disabled"})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def build(teacher: str, dataset: str, out: str) -> None:
    """Build until some shards are captured; without documents only load the teacher."""
    began = time.monotonic()
    from stage1_teacher import capture
    from stage1_teacher.build import build_cache
    from stage1_teacher.config import TeacherConfig
    from stage1_teacher.request import find_teacher
    from stage1_teacher.store import TokenStore, store_folder

    capture_shard, starts, num_tokens = capture.capture_shard, [], 0
    options = {"dtype": "float32", "top_k": 8, "shard_tokens": 8_192, "device_map": "cpu"}
    config = TeacherConfig(teacher=teacher, dataset=dataset, **options)

    def counted(*arguments):
        starts.append(time.monotonic() - began)
        if len(starts) > SHARDS:
            raise KeyboardInterrupt
        return capture_shard(*arguments)

    capture.capture_shard = counted
    if dataset == str(Path()):
        capture.load_teacher(config, find_teacher(config))
        starts.append(time.monotonic() - began)
    else:
        with contextlib.suppress(KeyboardInterrupt):
            build_cache(config, Path(out))
        num_tokens = TokenStore(store_folder(Path(out))).facts.num_tokens
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"tokens": num_tokens, "seconds": starts[0], "peak_bytes": peak}))


def make_teacher(folder: Path, tokenizer: str) -> None:
    """A tiny random Llama over a real tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    loaded = load_tokenizer(tokenizer)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(loaded), **sizes, num_key_value_heads=1, max_position_embeddings=2_048)
    LlamaForCausalLM(config).save_pretrained(folder)
    loaded.save_pretrained(folder)


if __name__ == "__main__":
    main()
