"""A corpus tokenised in parallel: the bytes of one process, an exact account, and nothing lost or left running after a kill."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_packing import EOS, _bytes, _tokenizer

from hildalib import backbones, corpora, packing, tokenisation
from hildalib.__main__ import main

HERE = Path(__file__).parent


def documents(count=400):
    return [{"text": f"a{'b' * (n % 37)} [MASK]<eos> {n}" + "é☃" * (n % 3), "source": f"s{n % 3}", "id": str(n)} for n in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return _tokenizer(["Ã", "©", "â", "ĺ", "ĥ"])


def test_several_processes_write_the_bytes_of_one_and_of_the_plain_call(tmp_path, tokenizer):
    folders = [packing.write_shards(iter(documents()), tokenizer, tmp_path / str(jobs), shard_tokens=2000, jobs=jobs, batch=13) for jobs in (1, 2)]
    assert _bytes(folders[0]) == _bytes(folders[1]) and len(list(folders[0].glob("*.bin"))) > 3
    shards = packing.open_shards(folders[1], tokenizer)
    plain = [tokenizer(row["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"] for row in documents()]
    assert [shards[n].tolist() for n in range(len(shards))] == plain
    rows, whole = packing.Packed(shards, 64), packing.pack(plain, 64, EOS)
    assert all(rows[n]["input_ids"].equal(whole["input_ids"][n]) and rows[n]["doc_ids"].equal(whole["doc_ids"][n]) for n in range(len(rows)))


def test_the_account_counts_documents_tokens_and_bytes_of_each_source(tmp_path, tokenizer):
    packing.write_shards(iter(documents()), tokenizer, tmp_path, shard_tokens=2000)
    expected = {}
    for row in documents():
        ids = tokenizer(row["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        old = expected.get(row["source"], [0, 0, 0])
        expected[row["source"]] = [old[0] + 1, old[1] + len(ids) + 1, old[2] + len(row["text"].encode())]
    assert packing.accounted(tmp_path) == expected
    assert sum(counts[1] for counts in expected.values()) == int(packing.open_shards(tmp_path).ends[-1])


def test_reading_stays_a_few_tasks_ahead_of_writing(tokenizer):
    read = []
    source = (read.append(n) or row for n, row in enumerate(documents()))
    stream = tokenisation.encoded(source, tokenizer, jobs=2, batch=5)
    for number, (row, _) in enumerate(stream):
        assert row["id"] == str(number) and len(read) <= number + 5 * (2 * tokenisation.AHEAD + 1)


@pytest.fixture
def corpus(tmp_path, tokenizer):
    """A folder of Dolma documents, and one of a model's tokenizer."""
    (tmp_path / "docs").mkdir()
    for part in range(3):
        with gzip.open(tmp_path / "docs" / f"{part}.json.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row | {"added": "x", "text": f"{part} {row['text']}"}) + "\n" for row in documents(3000))
    (tmp_path / "model").mkdir()
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(tokenizer), "eos_token_id": 0}))
    return tmp_path


def test_the_command_writes_accounts_for_and_foretells_a_corpus(corpus, capsys):
    arguments = ["tokenise", f"dolma:{corpus / 'docs'}", "--model", str(corpus / "model"), "--out", str(corpus / "out"), "--jobs", "1"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    rows = list(corpora.rows(f"dolma:{corpus / 'docs'}"))
    shards = packing.open_shards(corpus / "out", backbones.tokenizer_of(str(corpus / "model")))
    assert len(shards) == len(rows) > 8000 and f"{len(rows):12,} {int(shards.ends[-1]):16,}" in shown and "20 GB take" in shown
    assert main(arguments) == 0 and "20 GB" not in capsys.readouterr().out  # there is nothing left to do


def test_after_sigkill_no_worker_is_left_and_the_same_command_gives_the_same_bytes(corpus):
    code = ("import sys; from hildalib import packing; from hildalib.__main__ import main; import os\n"
            "if __name__ == '__main__':\n"
            "    write = packing.write_shards\n"
            "    packing.write_shards = lambda *a, **k: write(*a, **{**k, 'shard_tokens': 9000})\n"
            "    sys.exit(main(sys.argv[1:]))")
    (corpus / "start.py").write_text(code)

    def command(out, jobs):
        return [sys.executable, str(corpus / "start.py"), "tokenise", f"dolma:{corpus / 'docs'}", "--model", str(corpus / "model"), "--out", str(out), "--jobs", jobs]

    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    cut, whole = corpus / "cut", corpus / "whole"
    process = subprocess.Popen(command(cut, "2"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(list(cut.glob("shard-*.json"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert family and not (cut / packing.INDEX).exists(), "the run was over before it could be killed"
    gone, left = psutil.wait_procs(family, timeout=30)
    assert not left
    for out, jobs in ((cut, "2"), (whole, "1")):
        subprocess.run(command(out, jobs), env=environment, check=True, capture_output=True)
    assert _bytes(cut) == _bytes(whole)
