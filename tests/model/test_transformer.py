"""The decoder: parameter counts, documents that do not see each other, recompute and compile, the probe."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minka.model.rope_table import Rope
from minka.model.transformer import Transformer
from models import model, packed, plain, section

GOLDENS = Path(__file__).parent.parent / "goldens" / "model_shapes.csv"
ROWS = [row for row in csv.DictReader(GOLDENS.read_text().splitlines()) if row["position"] == "rope"]


@pytest.mark.parametrize("row", ROWS, ids=[row["model"] for row in ROWS])
def test_parameter_counts_are_the_published_ones(row: dict[str, str]) -> None:
    numbers = {name: int(row[name]) for name in "layers d_model heads kv_heads head_dim d_ff vocab".split()}
    flags = {
        "tied": row["tied"] == "yes",
        "qkv_bias": row["qkv_bias"] == "qkv",
        "qk_norm": row["qk_norm"] == "per-head",
    }
    with torch.device("meta"):
        built = Transformer(section(**numbers, **flags))
    assert sum(parameter.numel() for parameter in built.parameters()) == int(row["params"])


def test_parameter_names_are_the_ones_checkpoints_hold() -> None:
    names = {name for name, _ in Transformer(section(layers=1, qkv_bias=True, qk_norm=True)).named_parameters()}
    inner = {f"attention.{w}.{kind}" for w in ("wq", "wk", "wv") for kind in ("weight", "bias")}
    inner |= {"attention_norm.weight", "attention.wo.weight", "attention.q_norm.weight", "attention.k_norm.weight"}
    inner |= {"mlp_norm.weight", "mlp.gate.weight", "mlp.up.weight", "mlp.down.weight"}
    outer = {"embedding.weight", "norm.weight", "head.weight"}
    assert names == outer | {f"blocks.0.{name}" for name in inner}


def test_tied_weights_are_one_parameter_before_and_after_they_get_memory() -> None:
    with torch.device("meta"):
        built = Transformer(section(tied=True))
    built.to_empty(device="cpu")
    assert built.head.matrix() is built.embedding.weight
    assert [name for name in built.state_dict() if "embedding" in name or "head" in name] == ["embedding.weight"]
    assert all(buffer is None for buffer in built.buffers())  # nothing that to_empty would leave undefined


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2, one head of keys": {"qkv_bias": True, "kv_heads": 1},
    "qwen3, tied": {"qk_norm": True, "tied": True, "kv_heads": 4},
}


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_packed_documents_are_the_documents_alone(shape: str) -> None:
    built = model(section(**SHAPES[shape]))
    tokens, documents, positions, _ = packed(rows=3, length=40, vocab=300)
    together = built(tokens, documents, positions)
    for row in range(3):
        for document in documents[row].unique():
            place = documents[row] == document
            alone = built(*plain(tokens[row, place][None]))
            torch.testing.assert_close(together[row, place], alone[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_changed_document_changes_no_other_loss() -> None:
    built = model(section())
    tokens, documents, positions, targets = packed(rows=2, length=40, vocab=300)
    before = built(tokens, documents, positions, targets, reduce=False)
    changed = tokens.clone()
    place = (documents == 2) & (torch.arange(2)[:, None] == 0)
    assert 0 < place.sum() < 40
    changed[place] = (changed[place] + 1) % 300
    after = built(changed, documents, positions, targets, reduce=False)
    assert torch.equal(after[~place], before[~place])
    assert not torch.equal(after[place], before[place])


@torch.no_grad()
def test_later_tokens_change_no_earlier_logit() -> None:
    built = model(section())
    tokens = torch.randint(0, 300, (2, 30))
    changed = torch.cat((tokens[:, :20], tokens[:, 20:].flip(1)), dim=1)
    assert torch.equal(built(*plain(tokens))[:, :20], built(*plain(changed))[:, :20])


def gradients(built: Transformer, arguments: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """Gradient of the objective with respect to every parameter."""
    built.zero_grad()
    built(*arguments).objective.backward()
    return {name: parameter.grad for name, parameter in built.named_parameters() if parameter.grad is not None}


def test_one_document_a_row_is_the_same_with_ids_without_and_with_a_mask() -> None:
    built = model(section(z_loss=1e-3))
    tokens, _, positions, targets = packed(rows=2, length=40, vocab=300)
    one = torch.zeros_like(tokens)
    without = gradients(built, (tokens, None, positions, targets))
    assert without.keys() == dict(built.named_parameters()).keys()
    same = gradients(built, (tokens, one, positions, targets))
    extra = torch.cat((one, one[:1] + torch.arange(40)))  # a row of a different structure forces the mask on all
    more = torch.cat((targets, torch.full((1, 40), -100)))
    masked = gradients(built, (torch.cat((tokens, tokens[:1])), extra, torch.cat((positions, positions[:1])), more))
    for name, gradient in without.items():
        assert torch.equal(same[name], gradient), name
        torch.testing.assert_close(masked[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def recompute(block: nn.Module) -> None:
    forward = block.forward
    block.forward = lambda *arguments: checkpoint(forward, *arguments, use_reentrant=False)


def compile_graph(block: nn.Module) -> None:
    block.compile(fullgraph=True, backend="aot_eager")


def compile_code(block: nn.Module) -> None:
    block.compile(fullgraph=True)


WRAPPERS: list[tuple[Callable[[nn.Module], None], str]] = [
    (recompute, "llama"),
    (recompute, "qwen3, tied"),
    (compile_graph, "llama"),
    (compile_graph, "qwen2, one head of keys"),
    (compile_graph, "qwen3, tied"),
    (compile_code, "qwen3, tied"),
]


@pytest.mark.parametrize(
    ("wrap", "shape"), [pytest.param(*w, marks=pytest.mark.slow if w[0] is compile_code else ()) for w in WRAPPERS]
)
def test_recompute_and_compile_give_the_same_gradients(wrap: Callable[[nn.Module], None], shape: str) -> None:
    """Of two micro-batches whose forward passes both precede the backward passes, as in a pipeline."""
    torch.compiler.reset()
    built = model(section(**SHAPES[shape]))
    batches = [packed(rows=2, length=16, vocab=300, seed=seed) for seed in (1, 2)]
    expected = [gradients(built, batch) for batch in batches]
    for block in built.blocks.values():
        wrap(block)
    built.zero_grad()
    objectives = [built(*batch).objective for batch in batches]
    for objective in objectives:
        objective.backward()
    for name, parameter in built.named_parameters():
        total = expected[0][name] + expected[1][name]
        torch.testing.assert_close(parameter.grad, total, rtol=1e-4, atol=1e-4 * total.abs().max().item(), msg=name)


def test_the_tables_of_rotation_are_fp32_in_a_bf16_model() -> None:
    """Half precision cannot tell position 1000 from 1001."""
    built = model(section()).to(torch.bfloat16)
    with torch.no_grad():
        far = torch.arange(1000, 1016)[None]
        tokens = torch.randint(0, 300, (1, 16))
        near, shifted = built(tokens, None, far - 1000), built(tokens, None, far)
    assert near.dtype == torch.float32
    assert (near - shifted).abs().max() < 0.05 * near.abs().max()  # attention sees differences of positions only


@torch.no_grad()
def test_the_probe_gives_each_layer_s_largest_allowed_logit() -> None:
    built = model(section())
    tokens, documents, positions, _ = packed(rows=2, length=24, vocab=300)
    seen: list[tuple[Tensor, Rope]] = []
    layers = [built.get_submodule(f"blocks.{layer}.attention") for layer in range(2)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    probe: list[Tensor] = []
    built(tokens, documents, positions, probe=probe)
    assert len(probe) == 2
    for layer, (x, rope), largest in zip(layers, seen, probe, strict=True):
        q = layer.get_submodule("wq")(x).view(2, 24, 4, 12)
        k = layer.get_submodule("wk")(x).view(2, 24, 2, 12).repeat_interleave(2, dim=2)
        turned = [y * rope.cos + torch.cat((y[..., 6:], y[..., :6]), -1) * rope.sin for y in (q, k)]
        logits = torch.einsum("bqhc,bkhc->bhqk", *turned) / 12**0.5
        allowed = (documents[:, None, :, None] == documents[:, None, None, :]) & torch.ones(24, 24).tril().bool()
        torch.testing.assert_close(largest, logits.masked_fill(~allowed, float("-inf")).max(), rtol=1e-5, atol=1e-5)
        assert largest.dtype == torch.float32
        assert largest.ndim == 0
