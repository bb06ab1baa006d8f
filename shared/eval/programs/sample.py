"""Completions of problems, kept in a JSONL file as they are made, so that whatever ends the work ends little of it."""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data.records import Problem
from data.templates import humaneval_prompt
from shared.distributed import agree
from shared.errors import ConfigError
from shared.eval.programs.completion import Ending
from shared.eval.programs.generate import (
    Generation,
    Request,
    Sampling,
    caches_by_token,
    generate_batch,
    plan_batches,
    prepare,
    require_generation,
    special_texts,
)
from shared.eval.programs.style import PROMPT, Style
from shared.files import naming, write_bytes
from shared.process import log, rank, world_size
from shared.progress import progress
from shared.tokenizer import Tokenizer

COMPLETIONS = "completions.jsonl"
REFUSED = "refused"  # the finish reason where the model cannot take the prompt

Key = tuple[str, int]  # task id and number of the sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How completions are made.

    Args:
        max_new_tokens: at most as many tokens each.
        batch_size: completions made at a time.
        num_samples: of each problem; several differ only where they are drawn.
        temperature: 0 takes the most likely token, more draws from the distribution at that temperature.
        top_p: in (0, 1]; the share of probability that is drawn from.
        seed: of all draws, together with problem and sample.

    Raises:
        ConfigError: values out of range, or several samples that would all be the same.
    """

    max_new_tokens: int
    batch_size: int
    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError("a temperature that cannot be", expected="0 (greedy) or more", got=self.temperature)
        if not 0 < self.top_p <= 1:
            raise ConfigError("a top-p that cannot be", expected="above 0, at most 1", got=self.top_p)
        if self.temperature == 0 and (self.num_samples > 1 or self.top_p < 1):
            got = f"{self.num_samples} samples, top-p {self.top_p:g}, temperature 0"
            fix = "--temperature 0.8, say, or --samples 1 --top-p 1"
            raise ConfigError("greedy decoding draws nothing", got=got, fix=fix)

    @property
    def sampling(self) -> Sampling | None:
        """None where greedy."""
        return Sampling(temperature=self.temperature, top_p=self.top_p) if self.temperature else None

    def to_dict(self) -> dict[str, Any]:
        """The effective values; what takes no part is left out."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return {
            "decoding": "sampled" if self.temperature else "greedy",
            "samples": self.num_samples,
            **(drawn if self.temperature else {}),
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
        }


def complete(
    model: Any,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    out: Path,
    *,
    decoding: Decoding,
    settings: Mapping[str, Any],
    style: Style = PROMPT,
) -> list[dict[str, Any]]:
    """Complete every problem: one line per sample, by problem, with its settings.

    Batches follow from problems and decoding alone, and each is made by one rank, so neither an interruption nor the
    number of processes changes a completion. A batch that the device has too little memory for is made in halves. A
    model with a recurrent state completes one prompt at a time.

    Every rank saves a batch's lines as soon as it is made, in a part of its own, `completions.rank-N.jsonl`; the caller
    writes all lines as `completions.jsonl` and then removes the parts. Lines of either that have the same settings are
    reused. `completions.jsonl` itself is not changed.

    Args:
        model: a transformers model.
        tokenizer: the model's own.
        problems: in the order of the result.
        out: created where missing; a folder that all ranks see.
        decoding: how.
        settings: what else decides the completions, such as the model's digest; recorded in every line.
        style: how the model is asked.

    Returns:
        All lines, in order (on rank 0; nothing on others). A prompt that leaves the model no position to write to has
        empty completions with the finish reason `REFUSED` and a `reason`.

    Raises:
        ConfigError: the model can continue none of the prompts, or transformers cannot generate with it.
        torch.OutOfMemoryError: the device has too little memory for one prompt.
        PeerEndedError: another rank has ended (through `shared.distributed.joined`).
    """
    settings = {**decoding.to_dict(), **settings}
    prompts = {problem.task_id: humaneval_prompt(problem) for problem in problems}
    special = special_texts(tokenizer)
    ends = {task_id: style.ending(prompt, special) for task_id, prompt in prompts.items()}
    ids = {task_id: style.encode(tokenizer, prompt) for task_id, prompt in prompts.items()}
    prepared, refused = _prepare(model, tokenizer, ids, ends, decoding.max_new_tokens)
    keys = [(task_id, sample) for task_id in prepared for sample in range(decoding.num_samples)]
    requests = [replace(prepared[task_id], seed=f"{decoding.seed}/{task_id}/{sample}") for task_id, sample in keys]
    batches = plan_batches(requests, decoding.batch_size if caches_by_token(model) else 1)

    kept = _resume(out, keys, settings) if rank() == 0 else {}
    if kept:
        log(f"{out}: {len(kept):,} of {len(keys):,} completions are there already")
    missing = agree([any(keys[index] not in kept for index in batch) for batch in batches])
    if any(missing):
        require_generation(model, tokenizer, requests[0])
    mine = [batch for batch, is_missing in zip(batches, missing, strict=True) if is_missing][rank() :: world_size()]
    saver = _Saver(prompts=prompts, ends=ends, settings=settings, style=style)
    of_batches = [[(keys[index], requests[index]) for index in batch] for batch in mine]
    saver.save_batches(model, tokenizer, of_batches, out / f"completions.rank-{rank()}.jsonl", decoding.sampling)
    agree([0])
    if rank() != 0:
        return []
    whole = _read(out, settings)[0]
    for task_id, reason in refused.items():
        log(f"refused, which counts as failed: {reason}")
        none = Generation(text="", finish_reason=REFUSED, num_prompt_tokens=len(ids[task_id]), num_new_tokens=0)
        for sample in range(decoding.num_samples):
            whole[task_id, sample] = saver.line((task_id, sample), none) | {"reason": reason}
    return [whole[task_id, sample] for task_id in prompts for sample in range(decoding.num_samples)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Saver:
    """Makes completions, by task id, and saves each batch as soon as it is made, with `settings` in every line."""

    prompts: Mapping[str, str]
    ends: Mapping[str, Ending]
    settings: Mapping[str, Any]
    style: Style

    def line(self, key: Key, generation: Generation) -> dict[str, Any]:
        """What is saved of a sample."""
        task_id, sample = key
        return {
            "task_id": task_id,
            "sample": sample,
            "prompt": self.prompts[task_id],
            "completion": self.style.completion(self.prompts[task_id], generation.text, self.ends[task_id]),
            "raw": generation.text,
            "finish_reason": generation.finish_reason,
            "num_prompt_tokens": generation.num_prompt_tokens,
            "num_new_tokens": generation.num_new_tokens,
            "settings": self.settings,
        }

    def save_batches(
        self,
        model: Any,
        tokenizer: Tokenizer,
        batches: Sequence[Sequence[tuple[Key, Request]]],
        path: Path,
        sampling: Sampling | None,
    ) -> None:
        """Append this rank's batches to its own file, each durable before the next is begun."""
        start, num_tokens = time.monotonic(), 0
        of_ranks = f" (rank 0 of {world_size()})" if world_size() > 1 else ""
        shown = progress(f"Generating{of_ranks}", sum(map(len, batches)), "completions")
        with naming(path), path.open("ab") as file, shown as bar:
            for batch in batches:
                made = _generate(model, tokenizer, [request for _, request in batch], sampling)
                lines = [self.line(key, generation) for (key, _), generation in zip(batch, made, strict=True)]
                file.write(to_jsonl(lines))
                file.flush()
                os.fsync(file.fileno())
                num_tokens += sum(generation.num_new_tokens for generation in made)
                bar.advance(len(batch), f"{num_tokens / (time.monotonic() - start):,.0f} tokens/s")


def _generate(
    model: Any, tokenizer: Tokenizer, requests: Sequence[Request], sampling: Sampling | None
) -> list[Generation]:
    """As `generate_batch`; halves of the batch where the device runs out of memory."""
    try:
        return generate_batch(model, tokenizer, requests, sampling)
    except torch.OutOfMemoryError:
        if len(requests) == 1:
            raise
    half = len(requests) // 2
    log(f"out of memory; {len(requests)} completions are made again as {half} and {len(requests) - half}")
    parts = (requests[:half], requests[half:])
    return [made for part in parts for made in _generate(model, tokenizer, part, sampling)]


def _prepare(
    model: Any, tokenizer: Tokenizer, prompts: Mapping[str, list[int]], ends: Mapping[str, Ending], max_new_tokens: int
) -> tuple[dict[str, Request], dict[str, str]]:
    """The requests of the prompts that the model can take, and why it cannot take the others; refused if none."""
    prepared: dict[str, Request] = {}
    refused: dict[str, str] = {}
    for task_id, prompt in prompts.items():
        try:
            prepared[task_id] = prepare(
                model, tokenizer, prompt, max_new_tokens=max_new_tokens, end=ends[task_id], where=task_id
            )
        except ConfigError as error:
            refused[task_id] = str(error)
            if len(refused) == len(prompts):
                raise
    return prepared, refused


def remove_parts(out: Path) -> None:
    """Remove the ranks' parts, once `completions.jsonl` has their lines."""
    for part in _parts(out):
        part.unlink()


def to_jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Strict JSON, a row a line."""
    return b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows)


def _parts(out: Path) -> list[Path]:
    return sorted(out.glob("completions.rank-*.jsonl"))


def _resume(out: Path, keys: Sequence[Key], settings: Mapping[str, Any]) -> dict[Key, dict[str, Any]]:
    """What earlier runs made under these settings; lines of parts become rank 0's, without those half written."""
    out.mkdir(parents=True, exist_ok=True)
    found, differing, num_unreadable = _read(out, settings)
    if differing:
        log(f"{out} has completions made with other settings ({', '.join(differing)}): they are not reused")
    if num_unreadable:
        log(f"{out}: {num_unreadable} unreadable lines, as an interruption leaves them, are made anew")
    kept = {key: found[key] for key in keys if key in found}
    parts = _parts(out)
    if parts:
        write_bytes(out / "completions.rank-0.jsonl", to_jsonl(kept.values()))
        for part in parts:
            if part.name != "completions.rank-0.jsonl":
                part.unlink()
    return kept


def _read(out: Path, settings: Mapping[str, Any]) -> tuple[dict[Key, dict[str, Any]], list[str], int]:
    """The readable lines with these settings, each completion once; which settings differ in others; bad lines."""
    found: dict[Key, dict[str, Any]] = {}
    num_unreadable = 0
    differing: set[str] = set()
    for path in [out / COMPLETIONS, *_parts(out)]:
        for text in path.read_bytes().splitlines() if path.exists() else []:
            try:
                line = json.loads(text)
                key, made_with = (line["task_id"], line["sample"]), dict(line["settings"])
            except (ValueError, KeyError, TypeError):
                num_unreadable += 1
                continue
            if made_with == settings:
                found.setdefault(key, line)
            else:
                differing |= {k for k in {*made_with, *settings} if made_with.get(k) != settings.get(k)}
    return found, sorted(differing), num_unreadable
