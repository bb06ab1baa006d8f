"""The loss alone, head included, beside the ways of others: extra peak memory and tokens per second.

Every measurement is a fresh process: inputs are made, the peak of the resident set is reset, one forward and backward
pass gives the extra peak (without the two gradients, which every way must return), a second one the time. The repeats
of all ways are interleaved. The ways of other projects are written anew from their public code, at T = 1.

    OMP_NUM_THREADS=2 python tests/bench/bench_loss.py [--repeats 3] [--rows 2048] [--ways ours,dense]
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

H, V, K = 768, 49_152, 50
LIMIT_MIB, LIMIT_SPEEDUP = 130, 2.0


def ours(inputs, config):
    """The fused head and loss of stage 2."""
    from stage2_student.config import StudentConfig
    from tests.support.given_labels import GivenLabels

    head_loss = GivenLabels(StudentConfig(**config))

    def loss(hidden, weight):
        soft = {"soft_ids": inputs["ids"], "soft_logp": inputs["logp"], "soft_log_tail": inputs["log_tail"]}
        soft = {name: tensor[None] for name, tensor in soft.items()} | {"soft_k": inputs["k"][None]}
        return head_loss(hidden, weight, inputs["labels"], **(soft if config["alpha"] else {}))["loss"]

    return loss


def dense(inputs, _):
    """`F.kl_div` against the full distribution, which is there already."""
    import torch.nn.functional as F

    def loss(hidden, weight):
        log_q = F.log_softmax(F.linear(hidden, weight), 1)
        return F.kl_div(log_q, inputs["dense"], reduction="batchmean")

    return loss


def cross_entropy(inputs, _):
    """`F.cross_entropy`: no teacher at all."""
    import torch.nn.functional as F

    return lambda hidden, weight: F.cross_entropy(F.linear(hidden, weight), inputs["labels"])


def distillkit(inputs, config):
    """DistillKit's sparse KL, its tail bucket from log(1 − Σ); `chunk` rows of the full logits at a time."""
    import torch
    import torch.nn.functional as F

    def log_missing(logp):
        x = logp.logsumexp(-1).clamp(max=-1e-6)
        return torch.where(x > -1, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))

    def part(logits, ids, logp):
        log_q = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
        missing = log_missing(logp)
        inner = (logp.exp() * (logp - log_q)).sum(-1) + missing.exp() * (missing - log_missing(log_q))
        return inner.sum()

    def loss(hidden, weight):
        logits = F.linear(hidden, weight)
        size = config.get("chunk", len(logits))
        starts = range(0, len(logits), size)
        cuts = [slice(start, start + size) for start in starts]
        return sum(part(logits[cut], inputs["ids"][cut], inputs["logp"][cut]) for cut in cuts) / len(logits)

    return loss


def axolotl_part(logits, ids, logp):
    log_q = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
    return (logp.exp() * (logp - log_q)).sum()


def axolotl(inputs, config):
    """axolotl's top-k forward KL without a tail, in `chunks` parts of the full logits."""
    import torch.nn.functional as F

    def loss(hidden, weight):
        logits = F.linear(hidden, weight) / 1.0  # its division by the temperature, which it always does
        cuts = zip(*(x.chunk(config["chunks"]) for x in (logits, inputs["ids"], inputs["logp"])), strict=True)
        return sum(axolotl_part(*cut) for cut in cuts) / len(logits)

    return loss


def axolotl_fused(inputs, config):
    """axolotl's Liger-based kernel: head and loss of `chunk` rows, differentiated by `torch.func` in the forward."""
    import torch
    import torch.nn.functional as F

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            gradient_weight, gradients, total = torch.zeros_like(weight), [], 0.0
            parts = [x.split(config["chunk"]) for x in (hidden, inputs["ids"], inputs["logp"])]
            for x, ids, logp in zip(*parts, strict=True):
                function = torch.func.grad_and_value(
                    lambda x, w, ids=ids, logp=logp: axolotl_part(F.linear(x, w) / 1.0, ids, logp), argnums=(0, 1)
                )
                (gradient, of_weight), value = function(x, weight)
                gradient_weight += of_weight
                gradients.append(gradient)
                total = total + value
            ctx.save_for_backward(torch.cat(gradients), gradient_weight)
            return total

        @staticmethod
        def backward(ctx, gradient):
            gradient_hidden, gradient_weight = ctx.saved_tensors
            return gradient_hidden * gradient, gradient_weight * gradient

    return lambda hidden, weight: Fused.apply(hidden, weight) / len(hidden)


def megatron(inputs, _):
    """Megatron's ghost token: log-probabilities by max and sum, the student's tail as 1 − Σ."""
    import torch
    import torch.nn.functional as F

    def loss(hidden, weight):
        logits = F.linear(hidden, weight)
        top = logits.detach().amax(-1, keepdim=True)
        log_sum = (logits - top).exp().sum(-1, keepdim=True).log()
        log_q = logits.gather(-1, inputs["ids"]) - top - log_sum
        tail_q = (1 - log_q.exp().sum(-1)).clamp(min=1e-8)
        tail_p = (1 - inputs["logp"].exp().sum(-1)).clamp(min=1e-8)
        inner = (inputs["logp"].exp() * (inputs["logp"] - log_q)).sum(-1)
        return (inner + tail_p * (torch.log(tail_p) - torch.log(tail_q))).mean()

    return loss


def products(inputs, _):
    """The limit: the three matrix products alone, in the fused way's chunks; no loss at all."""
    import torch

    class Products(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            gradient_weight, gradients = torch.zeros_like(weight), []
            z_full = torch.empty(256, len(weight))
            for x in hidden.split(256):
                z = torch.mm(x, weight.T, out=z_full[: len(x)])
                gradients.append(z @ weight)
                gradient_weight.addmm_(z.T, x)
            ctx.save_for_backward(torch.cat(gradients), gradient_weight)
            return hidden.new_zeros(())

        @staticmethod
        def backward(ctx, gradient):
            return ctx.saved_tensors

    return Products.apply


WAYS = {
    "limit: the products": (products, {}),
    "ours": (ours, {"alpha": 1.0}),
    "ours, alpha 0.7": (ours, {"alpha": 0.7}),
    "ours, T 1.5": (ours, {"alpha": 1.0, "temperature": 1.5}),
    "ours, reverse": (ours, {"alpha": 1.0, "divergence": "reverse"}),
    "ours, cross-entropy": (ours, {"alpha": 0.0}),
    "dense": (dense, {}),
    "F.cross_entropy": (cross_entropy, {}),
    "DistillKit sparse": (distillkit, {}),
    "DistillKit chunk 256": (distillkit, {"chunk": 256}),
    "axolotl forward_kl": (axolotl, {"chunks": 1}),
    "axolotl chunked-8": (axolotl, {"chunks": 8}),
    "axolotl fused 256": (axolotl_fused, {"chunk": 256}),
    "Megatron ghost": (megatron, {}),
}


def measure(way, num_rows):
    """Extra peak in MiB and tokens per second, in this process."""
    import torch

    function, config = WAYS[way]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, H, generator=generator).requires_grad_()
    weight = (torch.randn(V, H, generator=generator) * 0.02).requires_grad_()
    teacher = torch.randn(num_rows, V, generator=generator).mul_(3)
    teacher -= teacher.logsumexp(1, keepdim=True)
    logp, ids = teacher.topk(K)
    inputs = {
        "ids": ids,
        "logp": logp,
        "log_tail": teacher.scatter(1, ids, -torch.inf).logsumexp(1),
        "k": torch.full((num_rows,), K),
        "labels": torch.randint(0, V, (num_rows,), generator=generator),
    }
    inputs["dense"] = teacher.exp_() if way == "dense" else None
    del teacher
    small = torch.randn(64, 64, requires_grad=True)  # the libraries' own memory is there before
    torch.nn.functional.kl_div((small @ small).log_softmax(1), small.softmax(1), reduction="batchmean").backward()
    loss = function(inputs, config)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident()["VmRSS"]
    loss(hidden, weight).backward()
    extra = resident()["VmHWM"] - before - (hidden.nbytes + weight.nbytes) / 2**20
    hidden.grad = weight.grad = None
    start = time.perf_counter()
    loss(hidden, weight).backward()
    return {"extra_mib": extra, "tokens_per_second": num_rows / (time.perf_counter() - start)}


def resident():
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Vm"))
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by ';'")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.rows)))
        return
    ways = arguments.ways.split(";")
    results = {way: [] for way in ways}
    environment = {"OMP_NUM_THREADS": "2"} | os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for _ in range(arguments.repeats):
        for way in ways:
            command = [sys.executable, __file__, "--child", way, "--rows", str(arguments.rows)]
            output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[way].append(json.loads(output.splitlines()[-1]))
    print(f"N={arguments.rows} H={H} V={V} K={K} fp32, OMP_NUM_THREADS={environment['OMP_NUM_THREADS']}")
    speeds = {way: [r["tokens_per_second"] for r in results[way]] for way in ways}
    print(f"{'way':22} {'extra MiB':>9}   tokens/s (range)       beside dense")
    for way in ways:
        extra = statistics.median(r["extra_mib"] for r in results[way])
        pairs = [a / b for a, b in zip(speeds[way], speeds.get("dense", speeds[way]), strict=True)]
        print(
            f"{way:22} {extra:9.0f}   {statistics.median(speeds[way]):5.0f} ({min(speeds[way]):.0f}-"
            f"{max(speeds[way]):.0f})   {statistics.median(pairs):15.2f}x ({min(pairs):.2f}-{max(pairs):.2f})"
        )
    print(f"limits for ours: {LIMIT_MIB} MiB, {LIMIT_SPEEDUP}x")


if __name__ == "__main__":
    main()
