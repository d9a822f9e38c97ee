"""The bench's arithmetic: ratios of alternating pairs, bounds with slack, and equal work on both sides."""

import torch

from minka.benchmarks.claims import Claim
from minka.benchmarks.training import CLAIMS, config_of, our_step, peer_ratio, peer_step, synthetic_batch
from minka.parallel.mesh import start_mesh
from minka.train.build_engine import build_engine


def test_a_ratio_is_the_median_of_pairs_whoever_goes_first() -> None:
    ours, peer = iter([1.0, 2.0, 1.0, 1.0, 4.0]), iter([2.0, 2.0, 3.0, 9.0, 2.0])
    assert peer_ratio(lambda: next(ours), lambda: next(peer)) == 2.0  # of 2, 1, 3, 9 and a half


def test_bounds_hold_in_their_direction_and_give_by_the_slack() -> None:
    speed = Claim("speed", lambda: 1.1, 1.15, "x", True)
    seconds = Claim("seconds", lambda: 16.0, 15.0, "s")
    assert speed.holds(1.1, 0.9)
    assert not speed.holds(1.1)
    assert seconds.holds(16.0, 0.9)
    assert not seconds.holds(16.0)


def test_every_claim_has_a_name_of_its_own() -> None:
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)


def test_both_sides_have_equally_many_targets_and_about_the_same_first_loss() -> None:
    config = config_of("1M", compiled=False)
    batch = synthetic_batch(config.model.vocab, 2, 32)
    assert int((batch.targets != -100).sum()) == batch.target_count == 2 * 31
    with start_mesh(config.layout) as mesh:
        engine, _ = build_engine(config, mesh)
        weights = {name: p for name, p in engine.tensors().items() if name.startswith("model.")}
        before = {name: piece.local.clone() for name, piece in weights.items()}
        our_step(engine, batch, config, batch.target_count)()
        assert all(not torch.equal(piece.local, before[name]) for name, piece in weights.items())
    peer_step(config, batch, compiled=False)()
