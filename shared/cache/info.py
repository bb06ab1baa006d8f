"""What a cache holds, for people and for scripts; also of one that is still being built."""

from pathlib import Path
from typing import Any

from shared.cache.directory import build_options
from shared.cache.format import MANIFEST, TEACHER_EVAL, TOKENIZER
from shared.cache.manifest import Manifest, read_manifest, written_text
from shared.cache.remote import Remote, local_path, url_of
from shared.errors import CacheFormatError
from shared.lock import is_locked


def cache_info(path: Path | str) -> dict[str, Any]:
    """Summarise a cache as JSON values; `finished` tells whether the figures are there.

    Raises:
        CacheFormatError: the folder holds no cache.
        CacheCorruptError: the manifest is damaged.
        ConfigError: a cache that lies elsewhere cannot be reached.
    """
    directory = local_path(path)
    if directory is None:
        manifest, data = Remote(str(url_of(path))).manifest()
        return _finished(manifest, len(data))
    try:
        manifest = read_manifest(directory)
    except CacheFormatError:
        options = build_options(directory)
        if options is None or (directory / MANIFEST).exists():  # it is finished, but not by what is known here
            raise
        return _unfinished(directory, options.get("num_shards"), options)
    missing = [name for name in manifest.files if not (directory / name).is_file()]
    if missing:  # a repair took out what was damaged
        return _unfinished(directory, manifest.num_shards, build_options(directory)) | {"missing": missing}
    return _finished(manifest, (directory / MANIFEST).stat().st_size)


def _finished(manifest: Manifest, manifest_bytes: int) -> dict[str, Any]:
    statistics, identity = manifest.statistics, manifest.identity
    kl, mass = statistics["codec_kl_nats"], statistics["captured_mass"]
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    sizes[MANIFEST] = manifest_bytes
    label_bytes = sum(size for name, size in sizes.items() if name.split("/")[0] not in (TOKENIZER, TEACHER_EVAL))
    counts = ("num_shards", "num_documents", "num_tokens", "num_entries")
    return {
        "finished": True,
        "label_identity": manifest.label_identity,
        **{key: getattr(manifest, key) for key in counts},
        **manifest.head_options,
        "total_bytes": sum(sizes.values()),
        "bytes_per_token": label_bytes / manifest.num_tokens,
        "captured_mass_mean": {T: figures["mean"] for T, figures in mass.items()},
        "encoding_kl_mean_nats": {T: figures["mean"] for T, figures in kl.items()},
        "encoding_kl_max_nats": {T: figures["max"] for T, figures in kl.items()},
        **{key: identity.get(key) for key in ("teacher", "tokenizer", "labels")},
        "declared": bool(identity.get("declared")),
        "derived_from": manifest.derived_from,
        "sources": manifest.sources,
        "statistics": statistics,
    }


def _unfinished(directory: Path, num_shards: int | None, options: dict[str, Any] | None) -> dict[str, Any]:
    names = {entry.name for entry in directory.iterdir()}
    return {
        "finished": False,
        "shards_done": sum(name.endswith(".h5") and f"{name[:-3]}.json" in names for name in names),
        "num_shards": num_shards,
        "in_progress": is_locked(directory),
        "build": options,
    }


def summary(path: Path | str) -> str:
    """The same as text for a terminal."""
    info = cache_info(path)
    if not info["finished"]:
        of = "" if info["num_shards"] is None else f" of {info['num_shards']}"
        state, fix = "unfinished", "; run again the command that began it"
        if info["in_progress"]:
            state, fix = "being built", ""
        return f"{path}: {state}, {info['shards_done']}{of} shards done{fix}"
    statistics = info["statistics"]
    lines = [
        f"{path}",
        f"  labels     {info['label_identity']}",
        f"  documents  {info['num_documents']:,} in {info['num_shards']:,} shards",
        f"  tokens     {info['num_tokens']:,}, {statistics['targets']:,} of them targets",
        f"  entries    {info['num_entries']:,} (top-k {info['top_k']}), vocabulary {info['tokenizer_size']:,}",
        f"  size       {info['total_bytes']:,} bytes, {info['bytes_per_token']:.1f} per token for the labels",
        f"  codec      {info['codec']}, {info['filter']}",
        f"  teacher    NLL {_figure(statistics['teacher_nll_nats'])} nats/target, "
        f"entropy {_figure(statistics['entropy_nats'])} nats, next token in row {_figure(statistics['gold_in_topk'])}",
        "  T          captured mass mean / p1 / p10      encoding KL mean / max (nats)",
    ]
    for T, mass in statistics["captured_mass"].items():
        kl = statistics["codec_kl_nats"][T]
        head = " / ".join(_figure(mass[key]) for key in ("mean", "p1", "p10"))
        lines.append(f"  {T:<10} {head:<34} {_figure(kl['mean'], '.1e')} / {_figure(kl['max'], '.1e')}")
    for part in ("teacher", "tokenizer", "labels"):
        lines.append(f"  {part:<10} {_pairs_of(info[part] or {})}")
    if info["declared"]:
        lines.append("  declared   teacher and tokenizer are what the import was told; nothing proves them")
    if info["derived_from"]:
        lines.append(f"  made by    {info['derived_from'].get('command')}")
    if (info["labels"] or {}).get("derived_from"):
        text = "its encoding KL is measured against the rows it was cut from, which have one of their own"
        lines.append(f"             {text}")
    lines += [f"  source     {_pairs_of(source)}" for source in info["sources"]]
    lines += [f"  written    {text}" for text in written_text(info["sources"])]
    return "\n".join(lines)


def _pairs_of(mapping: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in mapping.items() if not isinstance(value, dict | None))


def _figure(value: float | None, form: str = ".4f") -> str:
    return "none" if value is None else format(value, form)
