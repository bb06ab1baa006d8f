"""Speculative decoding: how much a student saves its teacher by drafting for it, and whether the output stays the same.

The student proposes a few tokens, the teacher verifies them in one pass and keeps the longest prefix that it would have
chosen itself, plus one token of its own (Leviathan et al. 2023, arXiv:2211.17192, at temperature 0). The loop is ours,
and so is that of plain decoding: both run the same code at batch 1, so that the ratio of their times is the method's.
"""

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from shared.cache.format import Array
from shared.checkpoints import describe_model, dtype_name, load_model, trial
from shared.errors import ConfigError, require
from shared.eval.bootstrap import METHOD, percentile_interval, resample_sums
from shared.eval.programs.generate import cache_name, caches_by_token, eos_ids, prepare
from shared.eval.programs.problems import read_prompts
from shared.eval.results import Draft, Equality, ModelFacts
from shared.eval.speed.served import HOW, NOT_ON_CPU, Served
from shared.process import first_sentence, log
from shared.progress import progress
from shared.tokenizer import Tokenizer, tokenizer_digest

DEFINITIONS = {
    "acceptance_rate": "drafted tokens that the teacher kept / drafted tokens",
    "mean_accepted_length": "drafted tokens kept per pass of the teacher, prefill included",
    "tokens_per_pass": "new tokens per pass of the teacher; plain decoding makes 1",
    "speedup": "seconds of plain greedy decoding / seconds with drafts, prefill included: sums over prompts of medians "
    "over repeats; speedup_range: least and greatest over repeats",
    "served_speedup": f"the speed-up where teacher and student decode as people serve them: {HOW}",
    "equal_to_greedy": "whether all prompts gave the tokens of plain greedy decoding, the teacher in its own dtype and "
    "in float32 (unless memory did not hold it, see reasons)",
    "ci95": METHOD + ", over prompts",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Drafted:
    """What one prompt gave.

    Args:
        ids: the new tokens, an end token included.
        proposed: tokens that the student drafted; accepted: those that the teacher kept.
        passes: of the teacher, prefill included.
    """

    ids: list[int]
    proposed: int
    accepted: int
    passes: int


class Decoder:
    """A model with the KV cache of one sequence, run eagerly.

    The cache is made without the model's config: layers of a sliding window could not be cut back.

    Args:
        model: a transformers model.
        num_ids: only the first ids are ever the most likely; default: all.
    """

    def __init__(self, model: Any, num_ids: int | None = None) -> None:
        self._model, self._cache_name, self._num_ids = model, cache_name(model.forward), num_ids
        self._cache, self._length = DynamicCache(), 0

    def most_likely(self, ids: list[int], rows: int) -> list[int]:
        """The most likely next id after each of the last `rows` tokens; what the cache lacks of `ids` is fed."""
        fed_BT = torch.tensor([ids[self._length :]], device=self._model.device)
        output = self._model(fed_BT, use_cache=True, logits_to_keep=rows, **{self._cache_name: self._cache})
        self._length = len(ids)
        most_likely: list[int] = output.logits[0, :, : self._num_ids].argmax(-1).cpu().tolist()
        return most_likely

    def cut(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        if length == 0:
            self._cache, self._length = DynamicCache(), 0
        elif length < self._length:
            self._cache.crop(length - self._length)  # negative: so many tokens are removed
            self._length = length


class ServedDecoder:
    """The same as people serve it, see `Served`; at most `width` tokens are asked for at once."""

    def __init__(self, model: Any, *, capacity: int, width: int = 1, num_ids: int | None = None) -> None:
        self._served = Served(model, batch_size=1, capacity=capacity, width=width, num_ids=num_ids)
        self._width, self._device, self._length = width, model.device, 0

    def most_likely(self, ids: list[int], rows: int) -> list[int]:
        """As of `Decoder`."""
        first = len(ids) - rows
        if self._length == 0 and first:
            self._served.prefill(torch.tensor([ids[:first]], device=self._device))
            self._length = first
        while True:
            fed = ids[self._length : first] or ids[first:]
            fed = fed[: self._width]
            next_BW = self._served.step(torch.tensor([fed + [0] * (self._width - len(fed))]))
            self._length += len(fed)
            self._served.cut(self._length)
            if self._length == len(ids):
                most_likely: list[int] = next_BW[0, :rows].cpu().tolist()
                return most_likely

    def cut(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        self._length = min(length, self._length)
        self._served.cut(self._length)


@torch.inference_mode()
def decode_plain(teacher: Decoder | ServedDecoder, ids: list[int], *, new_tokens: int, eos: Sequence[int]) -> list[int]:
    """The most likely token at every step, up to `new_tokens` or an end token."""
    teacher.cut(0)
    made: list[int] = []
    while len(made) < new_tokens and not (made and made[-1] in eos):
        made += teacher.most_likely(ids + made, 1)
    return made


@torch.inference_mode()
def decode_with_draft(
    teacher: Decoder | ServedDecoder,
    student: Decoder | ServedDecoder,
    ids: list[int],
    *,
    new_tokens: int,
    eos: Sequence[int],
    draft_tokens: int,
) -> Drafted:
    """Decode greedily, `draft_tokens` of the student's verified at once; see `decode_plain`."""
    teacher.cut(0)
    student.cut(0)
    made: list[int] = []
    proposed = accepted = passes = 0
    while len(made) < new_tokens and not (made and made[-1] in eos):
        drafted: list[int] = []
        for _ in range(min(draft_tokens, new_tokens - len(made) - 1)):
            drafted += student.most_likely(ids + made + drafted, 1)
            if drafted[-1] in eos:
                break
        verified = teacher.most_likely(ids + made + drafted, len(drafted) + 1)
        agreed = next((i for i, id in enumerate(drafted) if id != verified[i]), len(drafted))
        ended = agreed > 0 and drafted[agreed - 1] in eos
        made += verified[: agreed if ended else agreed + 1]
        proposed, accepted, passes = proposed + len(drafted), accepted + agreed, passes + 1
        for decoder in (teacher, student):
            decoder.cut(len(ids) + len(made) - 1)
    return Drafted(ids=made, proposed=proposed, accepted=accepted, passes=passes)


def evaluate_draft(
    teacher_dir: Path,
    student_dir: Path,
    *,
    prompts_file: Path | None,
    limit: int | None,
    new_tokens: int,
    draft_tokens: int,
    repeats: int,
    dtype: str,
) -> Draft:
    """Time a teacher's greedy decoding with and without a student's drafts, and compare the tokens.

    Args:
        teacher_dir, student_dir: transformers directories with one tokenizer.
        prompts_file, limit: see `read_prompts`.
        new_tokens: at most as many per prompt, fewer where an end token comes or positions run out.
        draft_tokens: drafted before each pass of the teacher.
        repeats: timed rounds; in each, every prompt goes through both ways in turn.
        dtype: see `checkpoints.load_frozen`. If the teacher is not in float32, a last round compares the tokens there.

    Returns:
        The figures of `DEFINITIONS`, None where nothing was drafted; `equality` by the teacher's dtype, without float32
        where the device has too little memory for it.

    Raises:
        ConfigError: other tokenizers, a model that cannot take tokens back, no prompts, or none with room to go on.
        torch.OutOfMemoryError: memory ran out before all rounds were timed.
    """
    teacher, student, tokenizer = _load_pair(teacher_dir, student_dir, dtype)
    prompts = read_prompts(prompts_file, limit)
    names, requests = _requests(prompts, tokenizer, (teacher, student), new_tokens)
    eos = eos_ids(teacher, tokenizer)
    eager, drafter = Decoder(teacher), Decoder(student, teacher.config.vocab_size)
    both = _BothWays(plain=eager, verifier=eager, drafter=drafter, eos=eos, draft_tokens=draft_tokens)
    with trial("these models cannot draft for each other", _names_of(teacher, student)):
        both.run(requests[0], drafts_first=False)
    rounds = both.rounds(requests, repeats)
    equality = {dtype_name(teacher): compare_tokens(names, rounds[-1])}
    served_rounds, reasons = _served_rounds(teacher, student, requests, eos, draft_tokens, repeats)
    if served_rounds:
        equality[f"{dtype_name(teacher)}, served"] = compare_tokens(names, served_rounds[-1])
    described = [ModelFacts(**describe_model(*pair)) for pair in ((teacher, teacher_dir), (student, student_dir))]
    if "float32" not in equality and (in_float32 := _rounds_in_float32(teacher, both, requests, reasons)):
        equality["float32"] = compare_tokens(names, in_float32)
    for name, found in equality.items():
        if found.num_equal < found.num_prompts:
            log(f"teacher in {name}: {found.num_equal} of {found.num_prompts} prompts decode to the same tokens")
    rows = _prompt_rows(names, rounds)
    figures, served_figures = _ratios(rows), {}
    if served_rounds:
        of_served = _ratios(_prompt_rows(names, served_rounds))
        served_figures = {"served_speedup": of_served["speedup"], "served_speedup_range": _speedup_range(served_rounds)}
        figures["ci95"]["served_speedup"] = of_served["ci95"]["speedup"]
    return Draft(
        **figures,
        **served_figures,
        reasons=reasons,
        speedup_range=_speedup_range(rounds),
        equal_to_greedy=all(found.num_equal == found.num_prompts for found in equality.values()),
        equality=equality,
        definitions=DEFINITIONS,
        teacher=described[0],
        student=described[1],
        settings={
            "prompts": prompts_file.name if prompts_file else "HumanEval",
            "num_prompts": len(requests),
            "num_skipped": len(prompts) - len(requests),
            "batch_size": 1,
            "new_tokens": new_tokens,
            "draft_tokens": draft_tokens,
            "eos_token_ids": eos,
            "repeats": repeats,
            "threads": torch.get_num_threads(),
            "device": teacher.device.type,
        },
        per_prompt=rows,
    )


def _load_pair(teacher_dir: Path, student_dir: Path, dtype: str) -> tuple[Any, Any, Tokenizer]:
    """Teacher, student, and the tokenizer that both have, as the student has it."""
    teacher, tokenizer = load_model(teacher_dir, dtype)
    student, other = load_model(student_dir, dtype)
    digests = [tokenizer_digest(each) for each in (tokenizer, other)]
    require(
        digests[0] == digests[1],
        "teacher and student have different tokenizers",
        where=f"{teacher_dir} and {student_dir}",
        expected=digests[0],
        got=digests[1],
        fix="draft with a student that was distilled from this teacher",
    )
    for model, directory in ((teacher, teacher_dir), (student, student_dir)):
        what = "a model with a recurrent state cannot take tokens back"
        require(caches_by_token(model), what, where=directory, expected="a cache of attention only")
    return teacher, student, other  # the student's knows what its cache's documents open with


def _requests(
    prompts: Sequence[tuple[str, str]], tokenizer: Tokenizer, models: Sequence[Any], new_tokens: int
) -> tuple[list[str], list[tuple[list[int], int]]]:
    """Names of prompts; their ids, and how many tokens may follow them. Prompts that leave no room are skipped."""
    names, requests, refusals = [], [], []
    for name, text in prompts:
        try:
            taken = [prepare(model, tokenizer, text, max_new_tokens=new_tokens, where=name) for model in models]
        except ConfigError as error:
            refusals.append(error)
            log(f"skipped: {error}")
            continue
        names.append(name)
        requests.append((taken[0].ids, min(request.max_new_tokens for request in taken)))
    if not requests:
        raise refusals[0]
    return names, requests


@dataclass(frozen=True, kw_only=True, slots=True)
class _Timed:
    plain: list[int]
    drafted: Drafted
    plain_seconds: float
    draft_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _BothWays:
    """Both ways to decode a prompt, timed one after the other: by itself, and with the drafter's tokens verified."""

    plain: Decoder | ServedDecoder
    verifier: Decoder | ServedDecoder
    drafter: Decoder | ServedDecoder
    eos: Sequence[int]
    draft_tokens: int

    def run(self, request: tuple[list[int], int], *, drafts_first: bool) -> _Timed:
        ids, new_tokens = request
        times = {}
        for drafts in (drafts_first, not drafts_first):
            start = time.perf_counter()  # ways end with tokens on the host
            if drafts:
                drafted = decode_with_draft(self.verifier, self.drafter, ids, new_tokens=new_tokens, eos=self.eos,
                                            draft_tokens=self.draft_tokens)  # fmt: skip
            else:
                plain = decode_plain(self.plain, ids, new_tokens=new_tokens, eos=self.eos)
            times[drafts] = time.perf_counter() - start
        return _Timed(plain=plain, drafted=drafted, plain_seconds=times[False], draft_seconds=times[True])

    def rounds(self, requests: Sequence[tuple[list[int], int]], repeats: int) -> list[list[_Timed]]:
        """Every request in each round, which way goes first in turn."""
        rounds: list[list[_Timed]] = []
        with progress("Drafting", repeats * len(requests), "prompts") as bar:
            for number in range(repeats):
                rounds.append([])
                for request in requests:
                    rounds[-1].append(self.run(request, drafts_first=number % 2 == 1))
                    bar.advance(1)
        return rounds


def _served_rounds(
    teacher: Any,
    student: Any,
    requests: Sequence[tuple[list[int], int]],
    eos: Sequence[int],
    draft_tokens: int,
    repeats: int,
) -> tuple[list[list[_Timed]], dict[str, str]]:
    """The rounds of models that decode as served, or the reason why there are none."""
    if teacher.device.type != "cuda":
        return [], {"served_speedup": NOT_ON_CPU}
    capacity = max(len(ids) + count for ids, count in requests) + draft_tokens + 1
    positions = min(getattr(m.config, "max_position_embeddings", None) or capacity for m in (teacher, student))
    try:
        require(capacity <= positions, "no position is left for drafts", expected=f"<= {positions}", got=capacity)
        with trial("these models do not decode as served", _names_of(teacher, student)):
            served = _BothWays(
                plain=ServedDecoder(teacher, capacity=capacity),
                verifier=ServedDecoder(teacher, capacity=capacity, width=draft_tokens + 1),
                drafter=ServedDecoder(student, capacity=capacity, num_ids=teacher.config.vocab_size),
                eos=eos,
                draft_tokens=draft_tokens,
            )
            return served.rounds(requests, repeats), {}
    except ConfigError as error:
        return [], {"served_speedup": str(error)}
    except torch.OutOfMemoryError as error:
        return [], {"served_speedup": first_sentence(error)}


def _rounds_in_float32(
    teacher: Any, both: _BothWays, requests: Sequence[tuple[list[int], int]], reasons: dict[str, str]
) -> list[_Timed]:
    """A round of the teacher in float32; none where that takes too much memory, which `reasons` then says."""
    try:
        teacher.float()
        return [both.run(request, drafts_first=False) for request in requests]
    except torch.OutOfMemoryError as error:
        reasons["equality.float32"] = first_sentence(error)
        log(f"not compared in float32: {reasons['equality.float32']}")
        return []


def _names_of(teacher: Any, student: Any) -> str:
    return f"{type(teacher).__name__} and {type(student).__name__}"


def compare_tokens(names: Sequence[str], timed: Sequence[_Timed]) -> Equality:
    """How many prompts gave the same tokens both ways, and where the others part first."""
    differences = []
    for name, one in zip(names, timed, strict=True):
        if one.plain != one.drafted.ids:
            pairs = itertools.zip_longest(one.plain, one.drafted.ids)
            differences.append({"prompt": name, "position": next(i for i, (a, b) in enumerate(pairs) if a != b)})
    return Equality(num_prompts=len(timed), num_equal=len(timed) - len(differences), first_differences=differences)


def _prompt_rows(names: Sequence[str], rounds: Sequence[Sequence[_Timed]]) -> list[dict[str, Any]]:
    return [
        {
            "id": name,
            "new_tokens": len(timed[0].drafted.ids),
            "proposed": timed[0].drafted.proposed,
            "accepted": timed[0].drafted.accepted,
            "passes": timed[0].drafted.passes,
            "plain_seconds": statistics.median(one.plain_seconds for one in timed),
            "draft_seconds": statistics.median(one.draft_seconds for one in timed),
        }
        for name, timed in zip(names, zip(*rounds, strict=True), strict=True)
    ]


def _speedup_range(rounds: Sequence[Sequence[_Timed]]) -> list[float]:
    """The least and greatest speed-up of a round."""
    speedups = [sum(t.plain_seconds for t in timed) / sum(t.draft_seconds for t in timed) for timed in rounds]
    return [min(speedups), max(speedups)]


def _ratios(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of sums over prompts, with intervals over at least two of them."""
    columns = [key for key in rows[0] if key != "id"]
    sums_PF = np.array([[row[key] for key in columns] for row in rows], np.float64)

    def ratios(sums: Array) -> dict[str, Array]:
        of = dict(zip(columns, sums, strict=True))
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                "acceptance_rate": of["accepted"] / of["proposed"],
                "mean_accepted_length": of["accepted"] / of["passes"],
                "tokens_per_pass": of["new_tokens"] / of["passes"],
                "speedup": of["plain_seconds"] / of["draft_seconds"],
            }

    figures = {name: float(value) for name, value in ratios(sums_PF.sum(0)).items()}
    resampled = ratios(resample_sums(sums_PF).T)
    intervals = {name: percentile_interval(values) if len(rows) > 1 else None for name, values in resampled.items()}
    return {name: None if math.isnan(value) else value for name, value in figures.items()} | {"ci95": intervals}
