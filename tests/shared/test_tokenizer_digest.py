"""The digest is one and the same however a tokenizer was loaded or saved, and another after any change to it."""

import copy
import json
import subprocess
import sys

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shared.tokenizer import encode_documents, load_tokenizer, save_tokenizer, tokenizer_digest
from tests.support.loopback_hub import Repository

CORPUS = ["def f(x):\n    return x + 12\n", "class A:\n    x = 34\n", "for é in naïve: print(é)\n"] * 5
SPECIAL = ["<unk>", "<s>", "</s>", "<fim>"]


def byte_level():
    """As GPT-2, StarCoder2 and SmolLM2 have it."""
    backend = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return backend, trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)


def metaspace():
    """As Llama and Mistral have it: words behind ▁, bytes for what is not in the vocabulary."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    return backend, trainers.BpeTrainer(vocab_size=330, special_tokens=tokens)


def unigram():
    """As T5 and XLM-R have it."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return backend, trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>")


KINDS = [byte_level, metaspace, unigram]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved tokenizer of each kind."""
    made = {}
    for kind in KINDS:
        backend, trainer = kind()
        backend.train_from_iterator(CORPUS, trainer)
        made[kind] = tmp_path_factory.mktemp(kind.__name__)
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(made[kind])
    return made


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def folder(request, folders):
    return folders[request.param]


@pytest.fixture(scope="module")
def digest(folder):
    return tokenizer_digest(load_tokenizer(folder))


def copied(folder, path, state=None, **config):
    """The tokenizer's files in another folder, with another `tokenizer.json` or configuration."""
    path.mkdir()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    state = state or json.loads((folder / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(state))
    (path / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return path


def test_however_it_is_loaded_or_saved(folder, digest, tmp_path):
    loaded = {
        "fast": PreTrainedTokenizerFast.from_pretrained(folder),
        "its file": load_tokenizer(copied(folder, tmp_path / "file")),
    }
    for name in ("GPT2Tokenizer", "LlamaTokenizerFast", "T5Tokenizer", "PreTrainedTokenizerFast"):
        loaded[name] = load_tokenizer(copied(folder, tmp_path / name, tokenizer_class=name))
    loaded["auto"] = AutoTokenizer.from_pretrained(tmp_path / "PreTrainedTokenizerFast")
    used = load_tokenizer(folder)
    used(CORPUS, truncation=True, max_length=3)
    encode_documents(used, [(CORPUS[0], CORPUS[1])])
    loaded["used"] = used
    for name, tokenizer in list(loaded.items()):
        save_tokenizer(tokenizer, tmp_path / "saved" / name)
        loaded[f"{name}, saved"] = again = load_tokenizer(tmp_path / "saved" / name)
        save_tokenizer(again, tmp_path / "twice" / name)
        loaded[f"{name}, saved twice"] = load_tokenizer(tmp_path / "twice" / name)
    assert {name: tokenizer_digest(tokenizer) for name, tokenizer in loaded.items()} == dict.fromkeys(loaded, digest)


def test_what_does_not_decide_ids_leaves_it(folder, digest, tmp_path):
    state = json.loads((folder / "tokenizer.json").read_text())
    if "merges" in state["model"]:  # as tokenizers before 0.20 wrote them
        state["model"]["merges"] = [" ".join(pair) for pair in state["model"]["merges"]]
    state["model"]["vocab"] = (
        dict(reversed(state["model"]["vocab"].items()))
        if isinstance(state["model"]["vocab"], dict)
        else state["model"]["vocab"]
    )
    state["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer = load_tokenizer(
        copied(
            folder, tmp_path / "other", state, model_max_length=17, chat_template="{{ messages }}", padding_side="left"
        )
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A $A", special_tokens=[])
    assert tokenizer_digest(tokenizer) == digest


def test_from_the_hub(hub, folders, tmp_path):
    names = []
    for number, folder in enumerate(folders.values()):
        hub.models[f"owner/tokenizer-{number}"] = Repository()
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".json"}
        commit = hub.models[f"owner/tokenizer-{number}"].commit(files)
        names += [[f"owner/tokenizer-{number}", revision] for revision in ("main", commit)]
    code = "import json, sys; from shared.tokenizer import load_tokenizer, tokenizer_digest; "
    code += "print(*(tokenizer_digest(load_tokenizer(*name)) for name in json.loads(sys.argv[1])))"
    command = [sys.executable, "-c", code, json.dumps(names)]
    environment = hub.environment(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    digests = [tokenizer_digest(load_tokenizer(folder)) for folder in folders.values()]
    assert done.stdout.split() == [digest for digest in digests for _ in range(2)]


def changes(state):
    """Edits of `tokenizer.json` by what they change; each makes some text other ids, or other ids other text."""
    model, made = state["model"], {}

    def edit(name, part, **values):
        """A copy of the file in which the dictionary at `part` is updated."""
        made[name] = copy.deepcopy(state)
        target = made[name]
        for key in part:
            target = target[key]
        target.update(values)

    tokens = list(model["vocab"]) if isinstance(model["vocab"], dict) else [token for token, _ in model["vocab"]]
    a, b = [token for token in tokens if token.isalpha() and token.isascii()][:2]
    if isinstance(model["vocab"], dict):
        edit("vocabulary: two ids swapped", ["model", "vocab"], **{a: model["vocab"][b], b: model["vocab"][a]})
        edit("vocabulary: one more", ["model", "vocab"], **{"xyzzy": len(tokens)})
        merges = model["merges"]
        edit("merges: two swapped", ["model"], merges=[merges[1], merges[0], *merges[2:]])
        edit("merges: one less", ["model"], merges=merges[:-1])
        edit("merges: ignored for whole words", ["model"], ignore_merges=not model["ignore_merges"])
        edit("byte fallback", ["model"], byte_fallback=not model["byte_fallback"])
    else:
        vocab = model["vocab"]
        edit("vocabulary: two ids swapped", ["model"], vocab=[*vocab[:4], vocab[5], vocab[4], *vocab[6:]])
        edit("vocabulary: one more", ["model"], vocab=[*vocab, ["xyzzy", -9.0]])
        edit("vocabulary: another score", ["model"], vocab=[*vocab[:-1], [vocab[-1][0], vocab[-1][1] - 1e-6]])
        edit("unknown", ["model"], unk_id=1)
    edit("normaliser: another", [], normalizer={"type": "Lowercase"})
    edit("pre-tokenizer: another", [], pre_tokenizer={"type": "WhitespaceSplit"})
    edit("decoder: another", [], decoder={"type": "Fuse"} if state["decoder"] != {"type": "Fuse"} else None)
    for part, key in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"), ("decoder", "decoders")):
        if state[part] and key in state[part]:
            edit(f"{part}: one step less", [part], **{key: state[part][key][1:]})
            edit(f"{part}: other order", [part], **{key: state[part][key][::-1]})
        elif state[part]:
            edit(f"{part}: none", [], **{part: None})
    if "prepend_scheme" in (state["pre_tokenizer"] or {}):
        edit("pre-tokenizer: prefix", ["pre_tokenizer"], prepend_scheme="first")
        edit("pre-tokenizer: split", ["pre_tokenizer"], split=not state["pre_tokenizer"]["split"])
    added = state["added_tokens"]
    for flag in ("single_word", "lstrip", "rstrip", "normalized", "special"):
        edit(f"added token: {flag}", ["added_tokens", -1], **{flag: not added[-1][flag]})
    more = added[-1] | {"id": len(tokens), "content": "<new>"}
    edit("added token: one more", [], added_tokens=[*added, more])
    return made


def test_every_change_is_seen(folder, digest, tmp_path):
    state = json.loads((folder / "tokenizer.json").read_text())
    edits = changes(state)
    assert len(edits) >= 17
    found = {"none": digest}
    for number, (name, edited) in enumerate(edits.items()):
        assert edited != state, name
        found[name] = tokenizer_digest(load_tokenizer(copied(folder, tmp_path / str(number), edited)))
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([AddedToken("<new>", lstrip=True)])
    found["added token: by transformers"] = tokenizer_digest(tokenizer)
    for end in ("bos_token", "eos_token"):
        found[f"another {end}"] = tokenizer_digest(load_tokenizer(copied(folder, tmp_path / end, **{end: "x"})))
    same = {}
    for name, value in found.items():
        same.setdefault(value, []).append(name)
    assert [names for names in same.values() if len(names) > 1] == []
