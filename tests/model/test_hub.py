"""Hugging Face's models and ours are the same functions, in both directions; what cannot be is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minka.model.generate import generate
from minka.model.hub_folder import INDEX, WHOLE, read_tensors, write_folder
from minka.plan.config_sections import ModelSection, RopeScaling
from minka.plan.errors import UserError
from minka.plan.hub_config import read_config
from models import from_folder, from_section, load_theirs, model, plain, section

STRETCHED = RopeScaling(factor=4.0, original_max_positions=16)  # short, so that 40 tokens meet all three bands
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, llama3 frequencies": ("llama", {"tied": True, "rope_scaling": STRETCHED, "rope_theta": 100.0}),
    "mistral": ("mistral", {"head_dim": 16}),
    "qwen2": ("qwen2", {"qkv_bias": True, "norm_eps": 1e-6}),
    "qwen2, tied": ("qwen2", {"qkv_bias": True, "tied": True}),
    "qwen3": ("qwen3", {"qk_norm": True, "head_dim": 20}),
    "qwen3, tied": ("qwen3", {"qk_norm": True, "tied": True, "kv_heads": 1}),
}
TOKENS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))


def cfg_of(case: str) -> ModelSection:
    return section(**CASES[case][1])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_ours_loads_in_transformers_with_the_same_logits_and_the_same_text(case: str, tmp_path: Path) -> None:
    ours = model(cfg_of(case))
    write_folder(tmp_path / "out", ours.cfg, ours.named_parameters(), family=CASES[case][0], eod_token=None)
    theirs = load_theirs(tmp_path / "out")
    assert type(theirs).__name__.lower().startswith(CASES[case][0])
    torch.testing.assert_close(ours(*plain(TOKENS)), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert len(list(theirs.parameters())) == len(list(ours.parameters()))

    prompt = TOKENS[0, :7].tolist()
    text = generate(
        lambda t, at: ours(*plain(t), at=at)[0, 0], prompt, 20, context=64, temperature=0, stop=None, seed=0
    )
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert text == expected[0, 7:].tolist()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_theirs_loads_here_with_the_same_logits(case: str, tmp_path: Path) -> None:
    theirs = from_section(cfg_of(case), CASES[case][0])
    theirs.save_pretrained(tmp_path)
    ours = from_folder(tmp_path)
    assert ours.cfg == cfg_of(case)
    torch.testing.assert_close(ours(*plain(TOKENS)), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "family"), [({}, "llama"), ({"qkv_bias": True}, "qwen2"), ({"qk_norm": True}, "qwen3")]
)
def test_the_family_follows_from_the_shape(fields: dict[str, Any], family: str, tmp_path: Path) -> None:
    ours = model(section(**fields))
    write_folder(tmp_path / "out", ours.cfg, ours.named_parameters(), eod_token=5)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == family
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == 5


def test_shards_index_tokenizer_and_dtype(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tokenizer / name).write_text("{}")
    ours, out = model(section()), tmp_path / "out"
    write_folder(out, ours.cfg, [], eod_token=0)
    (out / "stale.safetensors").touch()
    write_folder(
        out,
        ours.cfg,
        ours.named_parameters(),
        tokenizer=tokenizer,
        eod_token=0,
        dtype=torch.bfloat16,
        max_shard_bytes=30_000,
    )
    assert not (out / "stale.safetensors").exists()
    assert (out / "tokenizer.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2
    for file in set(weight_map.values()):
        tensors = load_file(out / file)
        assert {name for name, place in weight_map.items() if place == file} == tensors.keys()
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 30_000
    again = from_folder(out)
    for (name, mine), (_, read) in zip(ours.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(mine.bfloat16().float(), read), name
    assert torch.equal(load_theirs(out).lm_head.weight, again.head.weight)


def test_a_write_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    ours, out = model(section()), tmp_path / "out"
    write_folder(out, ours.cfg, ours.named_parameters(), eod_token=0)
    with pytest.raises(KeyError):
        write_folder(out, ours.cfg, [("blocks.0.unheard.weight", torch.ones(1))], eod_token=0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / WHOLE).exists()


def test_what_cannot_be_the_same_is_refused_by_the_name_of_its_file(tmp_path: Path) -> None:
    """tests/plan/test_hub_config.py has all that is refused."""
    write_folder(tmp_path / "out", section(), [], eod_token=0)
    path = tmp_path / "out/config.json"
    assert read_config(path.parent) == section()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mlp_bias": True}))
    with pytest.raises(UserError, match="mlp_bias") as caught:
        read_config(path.parent)
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("fields", "family"),
    [
        ({"qkv_bias": True, "qk_norm": True}, "auto"),
        ({"qkv_bias": True}, "llama"),
        ({"qk_norm": True}, "qwen2"),
        ({}, "qwen3"),
        ({}, "gpt2"),
        ({"d_model": 50}, "llama"),
    ],
)
def test_a_shape_that_no_family_has_is_not_written(fields: dict[str, Any], family: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        write_folder(tmp_path / "out", section(**fields), [], family=family, eod_token=0)
    assert list(tmp_path.iterdir()) == []


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / WHOLE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / WHOLE)


def reshape_tensor(folder: Path) -> None:
    tensors = load_file(folder / WHOLE)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].t().contiguous()}, folder / WHOLE)


def spoil(folder: Path) -> None:
    (folder / WHOLE).write_bytes(b"no safetensors at all")


def remove(folder: Path) -> None:
    (folder / WHOLE).unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop_tensor, ["model.layers.1.mlp.up_proj.weight", "missing"]),
        (reshape_tensor, ["model.layers.1.mlp.up_proj.weight", "[48, 80]", "[80, 48]"]),
        (spoil, ["cannot be read as safetensors"]),
        (remove, ["No such file", INDEX, ".bin is never read"]),
    ],
)
def test_damaged_weights_are_refused_by_name(damage: Callable[[Path], None], said: list[str], tmp_path: Path) -> None:
    ours, out = model(section()), tmp_path / "out"
    write_folder(out, ours.cfg, ours.named_parameters(), eod_token=0)
    damage(out)
    with pytest.raises(UserError) as caught:
        list(read_tensors(out, ours.cfg))
    assert all(word in str(caught.value) for word in [*said, str(out)])
    assert "\n" not in str(caught.value)


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="weight_map"):
        list(read_tensors(tmp_path, section()))


def test_weights_are_marked_as_torch_s(tmp_path: Path) -> None:
    """transformers refuses a file without this mark."""
    ours = model(section())
    write_folder(tmp_path / "out", ours.cfg, ours.named_parameters(), eod_token=0)
    with safe_open(tmp_path / "out" / WHOLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
