"""Generation's speed, and whether pass@k's intervals hold what they promise.

Speed: HumanEval's first prompts, greedily, as ours does it; without the end by syntax; one prompt at a time; and the
limit in tokens per second, prompts all alike that run to the end.

Intervals: benchmarks drawn from problems of known difficulty; how often ours, the percentile bootstrap and the normal
interval hold the true pass@k, and how wide they are.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from data.humaneval import load_humaneval
from data.templates import humaneval_prompt
from shared.checkpoints import load_model
from shared.eval.programs.completion import body_end
from shared.eval.programs.generate import generate_batch, plan_batches, prepare
from shared.eval.programs.passk import mean_interval, pass_at_k

# Chances of a problem's samples, one drawn per problem; problems; samples; k.
BENCHMARKS = {
    "mostly hard, k=1": ([0, 0, 0, 0, 0.01], 164, 10, 1),
    "mostly hard, k=10": ([0, 0, 0, 0, 0.01], 164, 10, 10),
    "hard and even, k=2": ([0, 0, 0.02, 0.1, 0.5], 50, 5, 2),
    "of all kinds, k=10": ([0, 0.2, 0.5, 0.9, 1], 164, 20, 10),
    "all alike, k=1": ([0.3], 164, 10, 1),
    "greedy, mostly hard": ([0, 0, 0.005], 164, 1, 1),
}


def intervals(chances, num_problems, num_samples, k, *, repeats, generator):
    """Coverage and mean width of each interval."""
    truth = np.mean([1 - (1 - chance) ** k for chance in chances])
    covered, widths = np.zeros(3), np.zeros(3)
    for _ in range(repeats):
        passes = generator.binomial(num_samples, generator.choice(chances, num_problems))
        estimates = np.array([pass_at_k(num_samples, int(c), k) for c in passes])
        means = estimates[generator.integers(0, num_problems, (1000, num_problems))].mean(1)
        half = 1.96 * estimates.std(ddof=1) / num_problems**0.5
        found = np.array(
            [
                mean_interval(estimates.tolist(), num_samples),
                np.percentile(means, [2.5, 97.5]),
                (estimates.mean() - half, estimates.mean() + half),
            ]
        )
        covered += (found[:, 0] <= truth) & (truth <= found[:, 1])
        widths += found[:, 1] - found[:, 0]
    return covered / repeats, widths / repeats


def ways(model, tokenizer, num_prompts, max_new_tokens, batch_size):
    """For each way what it generates, in its batches."""

    def of(prompts, end):
        return [prepare(model, tokenizer, p, max_new_tokens=max_new_tokens, end=end) for p in prompts]

    prompts = [humaneval_prompt(problem) for problem in load_humaneval()[:num_prompts]]
    ours = of(prompts, body_end)
    endless = of(prompts, None)
    alike = of([prompts[0]] * num_prompts, lambda text: False)
    return {
        "ours": [[ours[i] for i in batch] for batch in plan_batches(ours, batch_size)],
        "no end by syntax": [[endless[i] for i in batch] for batch in plan_batches(endless, batch_size)],
        "one at a time": [[request] for request in ours],
        "limit: prompts alike": [alike[i : i + batch_size] for i in range(0, num_prompts, batch_size)],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("artifacts/teachers/SmolLM2-135M-Instruct"))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--benchmarks", type=int, default=1000, help="drawn per kind")
    arguments = parser.parse_args()

    generator = np.random.default_rng(0)
    print("interval: coverage (width) of ours, percentile bootstrap, normal; limit 95 %")
    for name, setting in BENCHMARKS.items():
        covered, widths = intervals(*setting, repeats=arguments.benchmarks, generator=generator)
        print(f"{name:22}" + ", ".join(f"{c:.1%} ({w:.4f})" for c, w in zip(covered, widths, strict=True)))

    model, tokenizer = load_model(arguments.model)
    work = ways(model, tokenizer, arguments.prompts, arguments.max_new_tokens, arguments.batch_size)
    seconds, tokens = ({way: [] for way in work} for _ in range(2))
    for _ in range(arguments.repeats):
        for way in random.sample(list(work), len(work)):
            start = time.perf_counter()
            made = [generation for batch in work[way] for generation in generate_batch(model, tokenizer, batch)]
            seconds[way].append(time.perf_counter() - start)
            tokens[way].append(sum(generation.num_new_tokens for generation in made))
    print(f"{arguments.prompts} prompts, {torch.get_num_threads()} threads, {model.dtype}, {model.device}")
    for way in work:
        ratios = [ours / own for ours, own in zip(seconds["ours"], seconds[way], strict=True)]
        rates = [t / s for t, s in zip(tokens[way], seconds[way], strict=True)]
        print(
            f"{way:22}{statistics.median(seconds[way]):7.2f} s, {tokens[way][0]:6} tokens, "
            f"{statistics.median(rates):6.1f} tokens/s, ours takes {statistics.median(ratios):.2f} of its time "
            f"({min(ratios):.2f}-{max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
