"""Read and write Hugging Face folders: config.json, safetensors with their index, the tokenizer's files."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minka.model.transformer import Transformer
from minka.plan.atomic import atomic_folder
from minka.plan.config_sections import ModelSection
from minka.plan.errors import UserError
from minka.plan.hub_config import to_config
from minka.plan.hub_tokenizer import copy_tokenizer
from minka.plan.read_file import read_json, reading
from minka.plan.run_folder import EXPORT_MARKER

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MARKER_FORMAT = 1  # only a folder with an EXPORT_MARKER is ever replaced
FETCH_AGAIN = "fetch the whole folder again"
# Ours -> theirs. Both rotate half-split channels, so no weight needs a permutation.
OUTER = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
INNER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def read_tensors(folder: Path, cfg: ModelSection) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of `cfg` as (our name, tensor in the file's dtype), read one at a time.

    Raises UserError for a missing file or tensor, and for a tensor whose shape is not that of `cfg`.
    """
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in Transformer(cfg).named_parameters()}
    files = _tensor_files(folder)
    by_file: dict[Path, list[str]] = {}
    for name in expected:
        if their_name(name) not in files:
            raise _missing(name, folder)
        by_file.setdefault(files[their_name(name)], []).append(name)
    for path, names in by_file.items():
        with _open(path) as file:
            stored = set(file.keys())
            for name in names:
                theirs = their_name(name)
                if theirs not in stored:
                    raise _missing(name, path)
                shape = tuple(file.get_slice(theirs).get_shape())
                if shape != expected[name]:
                    raise UserError(
                        f"{theirs} has shape {list(shape)}, and the model needs {list(expected[name])}",
                        where=str(path),
                        why="config.json and the weights describe different models",
                        remedy="use the config.json that was saved with these weights",
                    )
                yield name, file.get_tensor(theirs)


def write_folder(
    folder: Path,
    cfg: ModelSection,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    family: str = "auto",
    tokenizer: Path | None = None,
    eod_token: int | None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: float = 5e9,
    source: str = "",
    sha256: str = "",
) -> None:
    """Write a folder that transformers loads. `tensors` (our names) are read one at a time; one shard is held at once.

    The folder appears when it is complete, in place of nothing, an empty folder, or what an earlier call wrote.
    `source` and `sha256`, noted in the folder: where the weights come from, and its hash. Raises UserError before any
    tensor is read when no family can represent `cfg` or something else is in this place; and, with nothing changed,
    when the disk is full.
    """
    config = to_config(cfg, family, eod_token, str(dtype).removeprefix("torch."))
    place, remedy = Path(os.path.realpath(folder)), "choose a different folder"
    with atomic_folder(place, check_replaceable=_check_replaceable, remedy=remedy) as new:
        _write_json(new.path / "config.json", config)
        _write_shards(new.path, tensors, dtype, max_shard_bytes)
        generation = {"bos_token_id": None, "do_sample": False, "eos_token_id": eod_token, "use_cache": True}
        _write_json(new.path / "generation_config.json", generation)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, new.path)
        _write_json(new.path / EXPORT_MARKER, {"format": MARKER_FORMAT, "source": source, "sha256": sha256})


def their_name(name: str) -> str:
    """Hugging Face's name of our parameter `name`."""
    module, _, kind = name.rpartition(".")
    inner = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if inner:
        return f"model.layers.{inner[1]}.{INNER[inner[2]]}.{kind}"
    return f"{OUTER[module]}.{kind}"


def _check_replaceable(folder: Path) -> None:
    """Raise UserError unless `folder` is missing, empty, or an earlier export, and not the current folder."""
    if not folder.exists():
        return
    why = "an export replaces a whole folder, and only one that an earlier export wrote"
    if not folder.is_dir():
        what = "this is a file"
    elif Path.cwd().is_relative_to(folder):
        what = "the current folder cannot be replaced"
    elif any(folder.iterdir()) and not _is_export(folder):
        what, why = "this folder holds something else", f"{why} (it contains {EXPORT_MARKER})"
    else:
        return
    raise UserError(what, where=str(folder), why=why, remedy="choose a new or an empty folder")


def _is_export(folder: Path) -> bool:
    try:
        return isinstance(read_json(folder / EXPORT_MARKER).get("format"), int)
    except UserError:
        return False


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, limit: float) -> None:
    """Shards are renamed at the end: their final names contain their number."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    held = total = 0

    def flush() -> None:
        nonlocal shard, held
        try:
            save_file(shard, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        except SafetensorError as error:  # wraps the system's error as text
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error), str(folder)) from None
        shards.append(list(shard))
        shard, held = {}, 0

    for name, tensor in tensors:
        size = tensor.numel() * dtype.itemsize
        if shard and held + size > limit:
            flush()
        shard[their_name(name)] = tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
        held, total = held + size, total + size
    if shard or not shards:
        flush()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        shutil.copymode(folder / "config.json", folder / f"{number}.part")  # safetensors writes 0600
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else WHOLE
        (folder / f"{number}.part").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tensor_files(folder: Path) -> dict[str, Path]:
    """File of each tensor, by Hugging Face's name."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX, remedy=FETCH_AGAIN).get("weight_map")
        if not isinstance(weight_map, dict) or any(Path(str(file)).name != file for file in weight_map.values()):
            raise UserError("weight_map is not a table of file names", where=str(folder / INDEX), remedy=FETCH_AGAIN)
        return {name: folder / file for name, file in weight_map.items()}
    with _open(folder / WHOLE) as file:
        return dict.fromkeys(file.keys(), folder / WHOLE)


def _open(path: Path) -> Any:
    why = "" if path.exists() else f"weights are in {WHOLE}, or in the files that {INDEX} names; .bin is never read"
    with reading(path, "safetensors", SafetensorError, why=why, remedy=FETCH_AGAIN):
        return safe_open(path, framework="pt")


def _missing(name: str, where: Path) -> UserError:
    return UserError(
        f"{their_name(name)} is missing",
        where=str(where),
        why=f"the model has a parameter {name}",
        remedy="fetch the whole folder, with the config.json that was saved with these weights",
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
