"""A whole training step on soft labels beside the same student's cross-entropy steps and beside a live teacher.

Every measurement is a fresh process that trains a few steps (forward, backward, clipping, AdamW) on the same batches;
the repeats of all ways are interleaved. Peak memory is that of the whole process.

    OMP_NUM_THREADS=2 python tests/bench/bench_step.py --cache CACHE [--teacher DIR] [--preset tiny] [--repeats 3]
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

LIMIT_STEP, LIMIT_WAIT = 1.10, 0.02
BASELINES = ("ours, alpha 0", "F.cross_entropy", "Liger")


def batches_of(arguments):
    """The real loader over the cache, at the temperature that training defaults to."""
    from torch.utils.data import DataLoader

    from shared.cache.reader import Cache
    from stage2_student.dataset import PackedBlocks, collate

    num_blocks = arguments.batch_size * (arguments.steps + 1)
    temperature = None if arguments.child in BASELINES else 1.0
    blocks = PackedBlocks(
        [Cache(arguments.cache)],
        block_size=arguments.block_size,
        seed=0,
        num_blocks=num_blocks,
        temperature=temperature,
    )
    return DataLoader(blocks, batch_size=arguments.batch_size, shuffle=False, collate_fn=collate)


def liger(hidden, weight, labels):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    from shared.model.gpt import IGNORE

    return {"loss": liger_fused_linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORE)}


def live(teacher):
    """Online distillation: the teacher runs in each step, the divergence is `F.kl_div` over the full distribution."""
    import torch
    import torch.nn.functional as F

    from shared.model.gpt import IGNORE

    def loss(hidden, weight, labels, *, input_ids, position_ids):
        with torch.no_grad():
            log_p = F.log_softmax(teacher(input_ids=input_ids, position_ids=position_ids).logits.float(), -1)
        log_p, logits, valid = log_p.flatten(0, 1), F.linear(hidden, weight), labels != IGNORE
        kd = F.kl_div(F.log_softmax(logits, 1), log_p, reduction="none", log_target=True).sum(1)
        ce = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        return {"loss": (0.7 * (kd * valid).sum() + 0.3 * ce) / valid.sum()}

    return loss


def measure(arguments):
    """Median seconds of a step without the wait for its batch, the wait's share, and the peak in MiB."""
    import torch

    from shared.cache.reader import Cache
    from shared.model.gpt import GPT, PRESETS, cross_entropy
    from stage2_student.config import StudentConfig
    from stage2_student.fused import HeadLoss

    way, device = arguments.child, "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(dataclasses.replace(PRESETS[arguments.preset], vocab_size=Cache(arguments.cache).tokenizer_size))
    model.to(device)
    if way == "live teacher":
        from transformers import AutoModelForCausalLM

        teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.bfloat16)
        model.head_loss = live(teacher.to(device).eval().requires_grad_(False))
    else:
        alpha = 0.7 if way == "soft labels" else 0.0
        fused = HeadLoss(StudentConfig(alpha=alpha, k=arguments.k if alpha else 0))
        model.head_loss = {"F.cross_entropy": cross_entropy, "Liger": liger}.get(way, fused)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    seconds, waits = [], []
    batches = iter(batches_of(arguments))
    for _ in range(arguments.steps + 1):
        start = time.perf_counter()
        batch = {name: tensor.to(device) for name, tensor in next(batches).items()}
        ready = time.perf_counter()
        if way == "live teacher":
            batch = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}
            hidden = model.model(batch["input_ids"], batch["position_ids"])
            weight, labels = model.model.embed_tokens.weight, batch.pop("labels").flatten()
            loss = model.head_loss(hidden.flatten(0, 1), weight, labels, **batch)["loss"]
        else:
            if way in ("F.cross_entropy", "Liger"):
                del batch["targets"]  # which positions need no logits is our loss's knowledge
            loss = model(**batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - ready)
        waits.append(ready - start)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else int(status["VmHWM"].split()[0]) / 1024
    wait = sum(waits[1:])  # the first step warms up
    return {
        "seconds": statistics.median(seconds[1:]),
        "wait": wait / (wait + sum(seconds[1:])),
        "peak_mib": peak,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="artifacts/demo/cache-train", help="a cache of at least --k entries per row")
    parser.add_argument("--teacher", help="its teacher, a transformers directory, for online distillation")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments)))
        return
    ways = ["soft labels", "ours, alpha 0", "F.cross_entropy", *(["live teacher"] if arguments.teacher else [])]
    try:
        import liger_kernel  # noqa: F401
        import torch

        ways += ["Liger"] if torch.cuda.is_available() else []
    except ImportError:
        pass  # its kernels need Triton and a GPU
    environment = {"OMP_NUM_THREADS": "2"} | os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    results = {way: [] for way in ways}
    for _ in range(arguments.repeats):
        for way in ways:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", way]
            output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[way].append(json.loads(output.splitlines()[-1]))
    tokens = arguments.batch_size * arguments.block_size
    print(
        f"{arguments.preset}, {tokens} tokens a step, K={arguments.k}, OMP_NUM_THREADS={environment['OMP_NUM_THREADS']}"
    )
    for way in ways:
        seconds, peak = ([r[name] for r in results[way]] for name in ("seconds", "peak_mib"))
        print(
            f"{way:16} {statistics.median(seconds):7.3f} s ({min(seconds):.3f}-{max(seconds):.3f}), "
            f"peak {statistics.median(peak):6.0f} MiB, waits {statistics.median(r['wait'] for r in results[way]):.2%}"
        )
    ours, baselines = results["soft labels"], [way for way in ways if way in BASELINES]
    for name in ("seconds", "peak_mib"):
        # The best baseline of each repeat, which ran beside it.
        ratios = [r[name] / min(results[way][i][name] for way in baselines) for i, r in enumerate(ours)]
        print(f"soft labels / best cross-entropy, {name}: {spread(ratios)}; limit {LIMIT_STEP:.2f}")
        if arguments.teacher:
            ratios = [b[name] / a[name] for a, b in zip(ours, results["live teacher"], strict=True)]
            print(f"live teacher / soft labels, {name}: {spread(ratios)}")
    print(f"wait for data: {spread([r['wait'] for r in ours], '.2%')}; limit {LIMIT_WAIT:.0%}")


def spread(values, form=".2f"):
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


if __name__ == "__main__":
    main()
