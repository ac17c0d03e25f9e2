"""What the runner leaves behind when it is killed, again and again, over data, conversion and fine-tuning.

HILDA_KILLS sets how often (default 2, to keep the suite short; the published check is 20).
"""

import os
import random
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
from safetensors.torch import load_file

from hildalib import paths

KILLS = int(os.environ.get("HILDA_KILLS", 2))
COMMAND = [sys.executable, "-m", "hildalib", "run", "01_data", "02_wsd", "03_sft", "--profile", "smoke", "--set", "save_every=4"]
MEASURED = ["clean_tokens_per_s", "peak_memory_gb", "tokens_per_s", "cpu_seconds"]  # of the machine, not of the seed


def start(folder):
    environment = {**os.environ, "HILDA_OUTPUTS": str(folder / "outputs"), "HILDA_FIGURES": str(folder / "figures"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(COMMAND, env=environment, cwd=paths.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill(process, whole_tree):
    """SIGKILL to the runner alone (its kernel notices by itself) or to every process below it."""
    try:
        family = psutil.Process(process.pid).children(recursive=True) if whole_tree else []
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    for child in family:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()
    process.stdout.close()


def contents(folder):
    """Every table, shard and weight of a run, without what a clock or a memory meter wrote."""
    found = {}
    for path in sorted((folder / "outputs").rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            found[name] = {key: value.numpy().tobytes() for key, value in load_file(path).items()}
        elif path.suffix == ".csv" and path.name != "log.csv":
            key = path.read_text(encoding="utf-8").startswith("# ")  # a kept table says in its first line what it answers
            found[name] = pd.read_csv(path, skiprows=int(key)).drop(columns=MEASURED, errors="ignore").to_csv()
        elif path.suffix == ".bin" and "shard" in path.name:
            found[name] = path.read_bytes()
    return found


@pytest.mark.timeout(300 * (KILLS + 3))
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="SIGKILL is a POSIX signal")
def test_killed_at_random_points_the_book_ends_with_the_same_bytes(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    begun = time.monotonic()
    process = start(whole)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    duration, rng, killed = time.monotonic() - begun, random.Random(0), 0
    for number in range(KILLS):
        process = start(cut)
        try:
            process.wait(rng.uniform(0.1, 0.8) * duration)
            process.stdout.close()
        except subprocess.TimeoutExpired:
            kill(process, whole_tree=number % 2 == 0)
            killed += 1
    assert killed, "every run was over before it could be killed"
    process = start(cut)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    expected, found = contents(whole), contents(cut)
    assert len(expected) >= 15 and sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
