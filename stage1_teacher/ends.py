"""What a document opens and closes with, and what else it could: the teacher's cost of each, on a few documents."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.records import Document
from shared.logits import LogitSource
from shared.tokenizer import Tokenizer, document_ends, encode_text

NUM_DOCS = 8
NUM_TOKENS = 64  # of each document: the opening matters most at the start
OPTIONS = {"opening": "--open-with", "closing": "--close-with"}
NOTABLE_NATS = {"opening": 0.02, "closing": 1.0}  # by which another token must be cheaper before it is recommended


def weigh_ends(
    source: LogitSource, tokenizer: Tokenizer, documents: Sequence[Document], positions: int | None
) -> dict[str, Any]:
    """Read a few documents with each token that may open or close them. Chats are passed over.

    The tokens are those in use and the ones that the tokenizer names BOS, EOS, PAD and UNK: an instruction-tuned
    teacher often names the turns' tokens as BOS and EOS, and those that it was pretrained with otherwise.

    Args:
        source: the teacher's logits.
        tokenizer: the teacher's, with its ends recorded.
        documents: of the build; some are chosen, evenly spaced.
        positions: most tokens that the teacher takes.

    Returns:
        JSON values: `documents`, how many were read; `opening` and `closing`, each with the `token` in use (or `none`)
        and `nats`, the teacher's mean NLL by token: behind each opening per token of the text but its first, over
        the first 64; and of each closing token itself, behind the text. `closing` also has `generation_config`, the
        tokens that the teacher's own generation ends with.
    """
    in_use = document_ends(tokenizer)
    room = min(NUM_TOKENS, (positions or NUM_TOKENS + 1) - max(len(in_use.opening), 1))
    plain = [document for document in documents if document.messages is None]
    count = min(NUM_DOCS, len(plain))
    chosen = [plain[(2 * i + 1) * len(plain) // (2 * count)] for i in range(count)]
    texts = [encode_text(tokenizer, document.prompt + document.completion) for document in chosen]
    texts = [ids for ids in texts if min(len(ids), room) > 1]
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    named = [token for name in names if (token := getattr(tokenizer, name)) is not None]
    generated, size = _generated_ends(source.model, tokenizer), len(tokenizer)
    openings, closings = dict[str, float](), dict[str, float]()
    if texts:
        starts = [ids[:room] for ids in texts]
        for tokens in dict.fromkeys([in_use.opening, (), *((token,) for token in named)]):
            openings[_name(tokens)] = _mean_nll(source, _ids(tokenizer, tokens), starts, size)
        before = [ids[-room:] if len(ids) > room else _ids(tokenizer, in_use.opening) + ids for ids in texts]
        logprobs = torch.cat([_logprobs(source, ids, 1, size) for ids in before])
        for token in dict.fromkeys([*in_use.closing, *named, *generated]):
            closings[token] = -float(logprobs[:, _ids(tokenizer, [token])].mean())
    return {
        "documents": len(texts),
        "opening": {"token": _name(in_use.opening), "nats": openings},
        "closing": {"token": _name(in_use.closing), "nats": closings, "generation_config": generated},
    }


def describe_ends(ends: dict[str, Any]) -> list[tuple[str, str]]:
    """A label and a line each for the opening and the closing, from what `weigh_ends` measured; none of chats alone."""
    lines: list[tuple[str, str]] = []
    if not ends["documents"]:
        return lines
    for label, unit in (("opening", " nats/token"), ("closing", " nats")):
        token, nats = ends[label]["token"], ends[label]["nats"]
        text = token + (f" {nats[token]:.3f}{unit}" if token in nats else "")
        others = {other: cost for other, cost in nats.items() if other != token}
        if others:
            text += f" ({', '.join(f'{other} {cost:.3f}' for other, cost in others.items())})"
            best = min(others, key=lambda other: others[other])
            if others[best] < nats.get(token, -math.inf) - NOTABLE_NATS[label]:
                text += f"; lower NLL: {OPTIONS[label]} '{best}'"
        generated = ends[label].get("generation_config", [])
        if generated and token not in generated:
            text += f"; generation_config.json ends texts with {', '.join(generated)}"
        lines.append((label, text))
    return lines


def _generated_ends(model: Any, tokenizer: Tokenizer) -> list[str]:
    """The tokens that the model's generation config ends texts with."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = ids if isinstance(ids, list) else [ids]
    tokens: list[str] = tokenizer.convert_ids_to_tokens([id for id in ids if id is not None and id < len(tokenizer)])
    return tokens


def _name(tokens: Sequence[str]) -> str:
    """An opening or closing as options and messages write it."""
    return "".join(tokens) or "none"


def _ids(tokenizer: Tokenizer, tokens: Sequence[str]) -> list[int]:
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))
    return ids


def _mean_nll(source: LogitSource, opening: list[int], texts: Sequence[list[int]], size: int) -> float:
    """Nats per token of texts but each one's first, behind an opening."""
    nlls = []
    for ids in texts:
        logprobs_NV = _logprobs(source, [*opening, *ids[:-1]], len(ids) - 1, size)
        nlls.append(-logprobs_NV.gather(1, torch.tensor(ids[1:])[:, None]))
    return float(torch.cat(nlls).mean())


def _logprobs(source: LogitSource, ids: list[int], count: int, size: int) -> Tensor:
    """Log-probabilities of what follows each of the last `count` ids: f32 [count, size].

    Texts run one by one, so that a device that has room for the build's documents has room for these.
    """
    ids_BT = torch.tensor([ids])
    chosen_BT = torch.arange(len(ids))[None] >= len(ids) - count
    return torch.cat([logits[:, :size].log_softmax(1).cpu() for logits in source.chunks(ids_BT, chosen_BT)])
