"""Make the golden of today's checkpoint format: `PYTHONPATH=.ns:tests python tests/goldens/checkpoints/make.py`.

Run once, by the code that writes the format; see README.md beside this. It refuses to write over anything.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from minka.checkpoint.manifest import FORMAT
from minka.launch.supervisor import Job
from minka.plan.ledger import current, read_ledger
from minka.plan.load_config import validate
from minka.plan.run_folder import RunFolder
from minka.train.worker import work

HERE = Path(__file__).resolve().parent
STEP = 4


def main() -> None:
    """format-1's run and corpus, trained by today's code: the checkpoint of STEP, and what came after it."""
    target, first = HERE / f"format-{FORMAT}", HERE / "format-1"
    target.mkdir()  # FileExistsError: a golden is never made again
    shutil.copytree(first / "corpus", target / "corpus")
    shutil.copy(first / "run.json", target / "run.json")
    values: dict[str, Any] = json.loads((target / "run.json").read_text())
    values["run"]["folder"] = "runs"
    values["data"] |= {"paths": ["corpus"], "store": "store"}
    config = validate(values, str(target))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # relative paths alone: the checkpoint holds the configuration, and no machine's folders
        shutil.copytree(target / "corpus", "corpus")
        if work(Job(config=config, threads=1)):
            raise SystemExit("the run did not end well")
        run = RunFolder.of(config)
        shutil.copytree(run.checkpoints / f"step-{STEP:08d}", target / f"step-{STEP:08d}")
        steps = [e for e in current(read_ledger(run.ledger_file)) if e["event"] == "step" and e["step"] > STEP]
        os.chdir(HERE)
    kept = [{key: step[key] for key in ("step", "loss", "grad_norm", "learning_rate")} for step in steps]
    (target / "steps.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
