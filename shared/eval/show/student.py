"""A student's rows beside the teacher's, for the documents that are shown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shared.cache.reader import Cache
from shared.cache.shard import Targets
from shared.eval.fidelity.measure import load_for_cache, logit_source
from shared.eval.show.documents import MAX_ENTRIES, StudentRow, num_entries
from shared.logits import LogitSource, largest
from shared.partition import kl_rows, partition_
from shared.progress import progress


def student_rows(model_dir: Path, cache: Cache, shown: Mapping[int, int]) -> dict[int, list[StudentRow]]:
    """Run a student over the first tokens of documents, of each as many as `shown` says.

    Returns:
        By document a row for each of these tokens but the first.

    Raises:
        CacheMismatchError: the student has another tokenizer, or too narrow a head.
    """
    model = load_for_cache(model_dir, "auto", cache)
    source = logit_source(model, cache)
    positions = getattr(model.config, "max_position_embeddings", None) or max(shown.values())
    rows: dict[int, list[StudentRow]] = {}
    with progress("Scoring", sum(shown.values()), "tokens") as bar:
        for doc, num_tokens in shown.items():
            rows[doc] = [
                row
                for start in range(0, num_tokens - 1, positions)
                for row in _rows(source, cache, doc, start, min(start + positions, num_tokens - 1))
            ]
            bar.advance(num_tokens)
    return rows


def _rows(source: LogitSource, cache: Cache, doc: int, start: int, stop: int) -> list[StudentRow]:
    """The rows `start` to `stop` of a document, which go through the model together."""
    tokens = torch.from_numpy(cache.tokens(doc)[start : stop + 1])
    targets = cache.targets(doc, 1.0, start, stop)
    rows: list[StudentRow] = []
    for logits in source.chunks(tokens[None, :-1], torch.ones(1, stop - start, dtype=torch.bool)):
        chunk = slice(len(rows), len(rows) + len(logits))
        rows += _compare(logits[:, : cache.tokenizer_size].cpu(), tokens[1:][chunk], targets, chunk)
    return rows


def _compare(logits_NV: torch.Tensor, gold_N: torch.Tensor, targets: Targets, rows: slice) -> list[StudentRow]:
    k_N, ids_NK, logp_NK, log_tail_N = (
        torch.from_numpy(getattr(targets, name)[rows]) for name in ("k", "ids", "logp", "log_tail")
    )
    logq_NC = partition_(logits_NV.clone(), ids_NK, torch.arange(ids_NK.shape[1]) < k_N[:, None]).logq
    kl_N = kl_rows(torch.cat((logp_NK, log_tail_N[:, None]), 1), logq_NC)
    logq_NV = logits_NV.log_softmax(1)
    gold_logq_N1 = logq_NV.gather(1, gold_N[:, None])
    rank_N = (logq_NV > gold_logq_N1).sum(1) + 1
    first_NM = largest(logits_NV, MAX_ENTRIES)[1]
    first_q_NM = logq_NV.gather(1, first_NM).exp()
    figures: list[Any] = [gold_logq_N1[:, 0].exp(), rank_N, logq_NC[:, -1].exp(), kl_N.clamp(min=0)]
    result = []
    for row, (p, rank, tail, kl) in enumerate(zip(*(figure.tolist() for figure in figures), strict=True)):
        own = num_entries(first_q_NM[row].numpy())
        beside = num_entries(logp_NK[row, : int(k_N[row])].double().exp().numpy())
        entries = dict(zip(ids_NK[row, :beside].tolist(), logq_NC[row, :beside].exp().tolist(), strict=True))
        entries |= dict(zip(first_NM[row, :own].tolist(), first_q_NM[row, :own].tolist(), strict=True))
        result.append(StudentRow(p=p, rank=rank, tail=tail, kl_nats=kl, entries=entries))
    return result
