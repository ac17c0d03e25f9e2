"""Shared by all tests: results go to a temporary place, nothing reaches the network."""

import os

# Before any test imports transformers or datasets, which read these once. Kernels started by tests inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # the models are tiny, and kernels that tests start share the cores


@pytest.fixture(autouse=True)
def own_results(tmp_path, monkeypatch):
    """No test writes into the outputs or figures of the checkout."""
    monkeypatch.setenv("HILDA_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("HILDA_FIGURES", str(tmp_path / "figures"))
