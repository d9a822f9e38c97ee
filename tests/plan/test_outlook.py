"""What a run prints about its plan where it starts, and in a dry run."""

import json

import pytest

from minka.__main__ import main
from minka.plan.cluster import find_cluster
from minka.plan.errors import UserError
from minka.plan.load_config import load_run
from minka.plan.memory import predict_memory
from minka.plan.outlook import outlook, outlook_lines
from minka.plan.time_plan import time_plan


def test_it_is_the_plan_of_memory_and_of_time() -> None:
    config, cluster = load_run("llama3-70b").config, find_cluster("H100-SXM")
    found = outlook(config, 256, "H100-SXM", 2.0)
    planned = time_plan(config, 256, cluster, 2.0)
    assert found["peak_bytes"] == max(rank.total for rank in predict_memory(config, 256))
    assert found["fits"] is True
    assert (found["step_seconds"], found["dollars"]) == (planned["step_seconds"], planned["dollars"])
    said = "\n".join(outlook_lines(found))
    assert "256 x H100-SXM: fits" in said
    assert "hosts of 8 with 50 GB/s of network for each GPU; not calibrated" in said


def test_what_is_not_predicted_is_said_and_the_rest_is_planned() -> None:
    config = load_run("llama3-8b", ["layout.engine=deepspeed", "kernels.compile=false"]).config
    found = outlook(config, 8, "H100-SXM")
    assert found["peak_bytes"] is None
    assert found["step_seconds"] is None
    assert len(found["not_planned"]) == 2
    assert all("is not predicted" in line for line in outlook_lines(found)[:2])
    elsewhere = outlook(load_run("dense-125m").config, 16, "L4")
    assert elsewhere["peak_bytes"] > 0
    assert "network_gb" in elsewhere["not_planned"][0]


def test_a_layout_that_is_not_legal_there_is_refused() -> None:
    with pytest.raises(UserError, match="needs"):
        outlook(load_run("llama3-70b").config, 17, "H100-SXM")


def test_a_dry_run_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "llama3-8b", "--dry-run", "--gpu", "B200", "--ranks", "64"]
    assert main(words) == 0
    assert "# plan: " in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["gpu"] == "B200"
    assert main(["train", "llama3-8b", "--gpu", "B200"]) == 2
    assert "--gpu is for --dry-run" in capsys.readouterr().err
