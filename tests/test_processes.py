"""Several processes are one (Invariant 3): weights, log, rows read, and what is left after a kill; real processes over gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import processes
import psutil
import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
CASES = {
    "dllm": {"draft_share": 0.5, "kl_weight": 0.5, "causal_context": True, "context_weight": 0.5, "mask_noise": 0.5, "mask_noise_steps": 3},
    "rows of one micro-batch": {"accumulate": 1, "batch_size": 8, "weighting": "1/t", "low": 0.3, "head_rows": 5, "gradient_checkpointing": True},
    "rows of which few are drafted": {"accumulate": 1, "batch_size": 2, "draft_share": 0.5, "causal": 0, "seed": 2},  # in the second step one process runs a forward more than the other
    "twin": {"name": "AR twin"},
    "sharded": {"sharded": True, "draft_share": 0.5, "kl_weight": 0.5, "head_rows": 5, "gradient_checkpointing": True},
}
CLOSE = 2e-5  # float32, other orders of sums, six Adam steps at 1e-2


def launch(count, *lines):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), str(HERE / "processes.py"),
               *(json.dumps(line) for line in lines)]  # standalone: a port of its own choice
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def saved(folder):
    return torch.cat([value.flatten() for _, value in sorted(load_file(folder / "model" / "model.safetensors").items())])


def curves(folder):
    found = pd.read_csv(folder / "log.csv").drop(columns=["clean_tokens_per_s", "peak_memory_gb"])
    return found[sorted(found)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Case -> folder, of two processes and of one."""
    root = tmp_path_factory.mktemp("runs")
    two = launch(2, *({"folder": str(root / "two" / name), **case} for name, case in CASES.items()))
    output = two.communicate(timeout=300)[0]
    assert two.returncode == 0, output[-3000:]
    for name, case in CASES.items():
        processes.run(root / "one" / name, **case | {"sharded": False})
    return root


@pytest.mark.parametrize("name", CASES)
def test_3_two_processes_give_the_weights_and_the_curves_of_one(both, name):
    one, two = both / "one" / name, both / "two" / name
    assert torch.allclose(saved(two), saved(one), atol=CLOSE)
    pd.testing.assert_frame_equal(curves(two), curves(one), check_exact=False, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["dllm", "rows of one micro-batch"])
def test_3_the_processes_read_other_rows_and_all_of_them_once(both, name):
    first, second, alone = (json.loads((both / f"{path}.json").read_text()) for path in
                            (f"two/{name}.rows0", f"two/{name}.rows1", f"one/{name}.rows0"))
    assert not {*first} & {*second} and sorted(first + second) == sorted(alone) == list(range(48))


@pytest.mark.parametrize("sharded", [False, True])
def test_7_a_killed_process_ends_the_run_and_another_number_of_processes_continues_it(tmp_path, sharded):
    """One of two processes gets SIGKILL; the launcher stops the other; one process finishes the run, and has the curve of an undisturbed one."""
    case = {"steps": 60, "draft_share": 0.5}
    line = {"folder": str(tmp_path / "cut"), "sharded": sharded, **case}
    cut = launch(2, line)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("cut/checkpoints/checkpoint-*/trainer_state.json")) and time.monotonic() < deadline and cut.poll() is None:
        time.sleep(0.02)
    workers = [child for child in psutil.Process(cut.pid).children() if "processes.py" in " ".join(child.cmdline())]
    os.kill(workers[-1].pid, signal.SIGKILL)
    output = cut.communicate(timeout=120)[0]
    assert cut.returncode != 0 and not (tmp_path / "cut" / "model").exists(), output[-2000:]
    rest = launch(1, line)
    output = rest.communicate(timeout=200)[0]
    assert rest.returncode == 0, output[-2000:]
    processes.run(tmp_path / "whole", **case)
    begun = json.loads((tmp_path / "cut.rows0.json").read_text())
    assert 0 < min(begun) and max(begun) == 62 * 8 - 1  # it did go on, not start again
    assert torch.allclose(saved(tmp_path / "cut"), saved(tmp_path / "whole"), atol=1e-3)
    pd.testing.assert_frame_equal(curves(tmp_path / "cut"), curves(tmp_path / "whole"), check_exact=False, atol=1e-3, rtol=1e-3)
