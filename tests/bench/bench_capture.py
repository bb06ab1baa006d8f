"""Capturing a teacher's labels: ours, the best naive loop and the limit side by side, with peak memory and scaling.

- naive: padded batches of B documents in file order, `logits.float().log_softmax(-1).topk(K)`, written to a file; the
  best of several B counts.
- ours: `capture_shard` and `to_arrays` (grid, entropy, gold and top-k) and `write_shard`.
- limit: backbone and float32 head matmul on the same batches in the same chunks, and nothing else.

Speed: all ways run in one process, interleaved; medians of real tokens per second, and the ratios of each repeat.
Memory: a fresh process per way, its peak above what the loaded model holds. Scaling: ours over a tenth of the
documents and over all of them.

    OMP_NUM_THREADS=2 python tests/bench/bench_capture.py --teacher DIR --dataset mbpp.jsonl [--documents N]

`--shape starcoder2-3b` takes that model with random weights, for a GPU; the tokens are still the teacher's.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from data.load import load_documents
from shared.batching import plan_batches
from shared.cache.writer import CacheWriter
from shared.checkpoints import load_frozen
from shared.logits import LogitSource
from shared.tokenizer import load_tokenizer
from stage1_teacher.capture import capture_shard, to_arrays
from stage1_teacher.config import TeacherConfig
from stage1_teacher.documents import Limits, cut_documents, plan_shards

SPEEDUP, MEMORY, SHARE_CPU, SHARE_GPU, SCALING = 1.8, 0.5, 0.88, 0.95, 0.05
# https://huggingface.co/bigcode/starcoder2-3b/blob/main/config.json
STARCODER2_3B = {
    "vocab_size": 49_152,
    "hidden_size": 3_072,
    "intermediate_size": 12_288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16_384,
    "sliding_window": 4_096,
    "norm_epsilon": 1e-5,
    "use_bias": True,
    "tie_word_embeddings": True,
}


class Bench:
    """The teacher, the documents and the ways to label them."""

    def __init__(self, options):
        on_gpu = torch.cuda.is_available()
        self.config = TeacherConfig(
            dtype=options.dtype,
            batch_tokens=options.batch_tokens or (8_192 if on_gpu else 1_024),
            head_rows=options.head_rows or (2_048 if on_gpu else 192),
            shard_tokens=131_072 if on_gpu else 32_768,
        )
        tokenizer = load_tokenizer(Path(options.teacher))
        documents = load_documents(options.dataset, "train", limit_docs=options.documents).documents
        self.size = len(tokenizer)
        limits = Limits(max_length=2_048, on_long="split", head_width=self.size)
        cut = cut_documents([(document, document.digest) for document in documents], tokenizer, limits)
        self.segments = [segment for document in cut for segment in document.segments]
        self.lengths = [len(segment.ids) for segment in self.segments]
        self.device = "cuda" if on_gpu else "cpu"
        if options.shape:
            from transformers import Starcoder2Config, Starcoder2ForCausalLM

            torch.manual_seed(0)
            with torch.device(self.device):
                config = Starcoder2Config(**STARCODER2_3B, dtype=self.config.dtype)
                self.model = Starcoder2ForCausalLM._from_config(config).eval().requires_grad_(False)
        else:
            self.model = load_frozen(Path(options.teacher), dtype=self.config.dtype, device_map="auto")
            sum(float(parameter.sum()) for parameter in self.model.parameters())  # mapped files are read when touched

    def source(self):
        return LogitSource(self.model, self.config.head_rows)

    def ours(self, source, documents):
        options = {
            "codec": "q",
            "filter": "gzip",
            "temperatures": list(self.config.temperatures),
            "top_k": self.config.top_k,
            "tokenizer_size": self.size,
            "head_width": source.head_width,
        }
        with tempfile.TemporaryDirectory() as folder, CacheWriter(Path(folder) / "cache", options) as writer:
            for number, shard in enumerate(plan_shards(self.lengths[:documents], self.config.shard_tokens)):
                segments = [self.segments[i] for i in shard]
                captured = capture_shard(source, segments, self.config, self.size, lambda tokens: None)
                arrays, _ = to_arrays(captured, segments, self.config, self.size)
                writer.write_shard(number, arrays, {})

    @torch.inference_mode()
    def limit(self, source, documents):
        """Only what no way of labelling can leave out."""
        model, head = self.model, self.model.get_output_embeddings()
        weight = head.weight.float()
        out = weight.new_empty(self.config.head_rows, len(weight))
        for shard in plan_shards(self.lengths[:documents], self.config.shard_tokens):
            lengths = [self.lengths[i] - 1 for i in shard]
            for batch in plan_batches([n + 1 for n in lengths], self.config.batch_tokens):
                ids_BT, real_BT = self.padded([shard[i] for i in batch], drop_last=True)
                hidden = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state[real_BT]
                for part in hidden.split(self.config.head_rows):
                    torch.mm(part.float(), weight.T, out=out[: len(part)])
        self.synchronise()

    @torch.inference_mode()
    def naive(self, batch_size, documents):
        with tempfile.TemporaryFile() as file:
            for start in range(0, documents, batch_size):
                ids_BT, real_BT = self.padded(range(start, min(start + batch_size, documents)))
                logits = self.model(input_ids=ids_BT, attention_mask=real_BT.long(), use_cache=False).logits
                values, ids = logits.float().log_softmax(-1).topk(self.config.top_k)
                np.save(file, values[real_BT].half().cpu().numpy())
                np.save(file, ids[real_BT].int().cpu().numpy())

    def padded(self, documents, *, drop_last=False):
        lengths = [self.lengths[i] - drop_last for i in documents]
        ids_BT = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for row, i in enumerate(documents):
            ids_BT[row, : lengths[row]] = torch.from_numpy(self.segments[i].ids[: lengths[row]].astype(np.int64))
        real_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return ids_BT.to(self.device), real_BT.to(self.device)

    def synchronise(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def flops(self, documents):
        """Multiply-adds of backbone and head, twice; attention apart, which adds 2 % at MBPP's lengths."""
        head = self.model.get_output_embeddings().weight.numel()
        matrices = sum(p.numel() for p in self.model.base_model.parameters() if p.dim() > 1)
        embeddings = self.model.get_input_embeddings().weight.numel()
        return 2 * (matrices - embeddings + head) * sum(self.lengths[:documents])


def resident_bytes(device, *, peak):
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def measure_memory(options):
    """In a process of its own: peak above the loaded model, and tokens per second."""
    bench = Bench(options)
    before = resident_bytes(bench.device, peak=False)
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    documents = options.run_documents or len(bench.segments)
    if options.memory == "ours":
        source = bench.source()
        start = time.perf_counter()
        bench.ours(source, documents)
    else:
        start = time.perf_counter()
        bench.naive(int(options.memory), documents)
    seconds = time.perf_counter() - start
    peak = resident_bytes(bench.device, peak=True) - before
    print(json.dumps({"mib": peak / 2**20, "tokens_per_second": sum(bench.lengths[:documents]) / seconds}))


def in_a_process(way, documents=None):
    command = [sys.executable, __file__, *sys.argv[1:], "--memory", way]
    command += ["--run-documents", str(documents)] if documents else []
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def spread(values, form="{:.2f}"):
    return f"{form.format(statistics.median(values))} ({form.format(min(values))}–{form.format(max(values))})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="artifacts/teachers/SmolLM2-135M-Instruct", help="model and tokenizer")
    parser.add_argument("--dataset", default="mbpp.jsonl")
    parser.add_argument("--documents", type=int, help="use only N")
    parser.add_argument("--shape", choices=["starcoder2-3b"], help="random weights of this shape instead")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--head-rows", type=int)
    parser.add_argument("--naive-batches", default="1,4,8", help="batch sizes of the naive loop")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="the device's, for the share of it that is used")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--run-documents", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        measure_memory(options)
        return

    bench = Bench(options)
    source, documents = bench.source(), len(bench.segments)
    tokens = sum(bench.lengths)
    device = torch.cuda.get_device_name() if bench.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{documents} documents, {tokens:,} tokens; {device}; torch {torch.__version__}; {options.dtype}")
    ways = {
        "ours": lambda: bench.ours(source, documents),
        "limit": lambda: bench.limit(source, documents),
        **{
            f"naive, batch {b}": lambda b=b: bench.naive(b, documents)
            for b in map(int, options.naive_batches.split(","))
        },
    }
    rates = {way: [] for way in ways}
    for repeat in range(options.repeats + 1):  # the first warms up
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            bench.synchronise()
            if repeat:
                rates[way].append(tokens / (time.perf_counter() - start))
    for way, values in rates.items():
        print(f"{way:16} {spread(values, '{:,.0f}')} tokens/s")
    best = max((way for way in rates if way.startswith("naive")), key=lambda way: statistics.median(rates[way]))

    def ratio(way):
        return [a / b for a, b in zip(rates["ours"], rates[way], strict=True)]

    print(f"ours / best naive ({best}): {spread(ratio(best))}, wanted at least {SPEEDUP}")
    share = SHARE_GPU if bench.device == "cuda" else SHARE_CPU
    print(f"ours / limit: {spread(ratio('limit'))}, wanted at least {share}")
    used = [bench.flops(documents) * rate / tokens / 1e12 for rate in rates["ours"]]
    peak = f", {statistics.median(used) / options.peak_tflops:.1%} of the peak" if options.peak_tflops else ""
    print(f"ours: {spread(used)} TFLOP/s{peak}; {tokens / statistics.median(rates['ours']):.1f} s for all documents")

    memory = {way: in_a_process(way)["mib"] for way in ("ours", best.removeprefix("naive, batch "))}
    mine, theirs = memory.values()
    print(
        f"peak above the weights: ours {mine:,.0f} MiB, {best} {theirs:,.0f} MiB: {mine / theirs:.2f}, at most {MEMORY}"
    )
    few, all_ = in_a_process("ours", max(documents // 10, 1)), in_a_process("ours", documents)
    change = all_["tokens_per_second"] / few["tokens_per_second"] - 1
    print(
        f"a tenth of the documents → all: {few['tokens_per_second']:,.0f} → {all_['tokens_per_second']:,.0f} tokens/s "
        f"({change:+.1%}, within {SCALING:.0%}), peak {few['mib']:,.0f} → {all_['mib']:,.0f} MiB"
    )


if __name__ == "__main__":
    main()
