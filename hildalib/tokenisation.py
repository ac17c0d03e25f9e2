"""Texts to token ids in several processes, in order and with bounded memory; and `hilda tokenise`, which writes a whole corpus to shards.

Entry points: `encoded` (used by `packing.write_shards`), `run` (the command). Nothing heavy is imported by the workers: they hold a tokenizer.
"""

import itertools
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np

BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1 << 20  # of a task: large enough to hide its transport, small enough to keep memory bounded
AHEAD = 3  # tasks a worker that are read before their turn
PROJECTED = 20e9  # bytes of text whose time is foretold
_worker: dict = {}


def _begin(serialised: str) -> None:
    """Makes this process's tokenizer; a worker whose parent was killed ends by itself."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    tokenizer = Tokenizer.from_str(serialised)
    tokenizer.encode_special_tokens = True  # special tokens spelled out in a text stay ordinary characters: data cannot write [MASK]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _worker["tokenizer"] = tokenizer
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: multiprocessing.connection.wait([parent.sentinel]) and os._exit(1), daemon=True).start()


def _encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray, float]:
    """All ids in a row (uint32), how many belong to each text, and the CPU-seconds that it took."""
    start = time.process_time()
    found = [encoding.ids for encoding in _worker["tokenizer"].encode_batch_fast(texts, add_special_tokens=False)]
    lengths = np.array([len(ids) for ids in found])
    return np.fromiter(itertools.chain.from_iterable(found), np.uint32, lengths.sum()), lengths, time.process_time() - start


def _batches(documents: Iterable[dict], most: int) -> Iterator[list[dict]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document["text"])
        if len(batch) == most or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded(documents: Iterable[dict], tokenizer, jobs: int = 1, batch: int = BATCH_DOCUMENTS,
            spent: list[float] | None = None) -> Iterator[tuple[dict, np.ndarray]]:
    """Each document ({"text", ...}) with its ids (uint32, no special token added), in order. jobs: processes; memory holds a few tasks of at most
    `batch` documents for each.

    spent: CPU-seconds of the encoding are added to its first element. tokenizer: a fast one of Transformers.
    """
    serialised, batches = tokenizer.backend_tokenizer.to_str(), _batches(documents, batch)
    if jobs == 1:
        _begin(serialised)
        results = ((task, _encode([document["text"] for document in task])) for task in batches)
    else:
        results = _parallel(batches, serialised, jobs)
    for task, (ids, lengths, seconds) in results:
        if spent is not None:
            spent[0] += seconds
        yield from zip(task, np.split(ids, np.cumsum(lengths)[:-1]))


def _parallel(batches: Iterator[list[dict]], serialised: str, jobs: int):
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (serialised,)) as pool:
        waiting: deque = deque()
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(_encode, [document["text"] for document in batch])))
                if len(waiting) >= AHEAD * jobs:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def run(source: str, model: str, out: str, *, split: str = "train", jobs: int = 1) -> int:
    """`hilda tokenise`: a corpus by name, or dolma:FOLDER, to shards in `out`; the same command continues after a kill. Prints the account by
    source, the throughput, and how long 20 GB would take."""
    from hildalib import backbones, corpora, packing
    from hildalib.progress import duration

    tokenizer = backbones.tokenizer_of(model)
    spent, start = [0.0], time.perf_counter()
    before = packing.accounted(out)
    packing.write_shards(corpora.rows(source, split), tokenizer, out, jobs=jobs, spent=spent)
    account, wall = packing.accounted(out), time.perf_counter() - start
    print(f"{'source':24} {'documents':>12} {'tokens':>16} {'bytes of text':>16}")
    total = [sum(column) for column in zip(*account.values())]
    for name, counts in [*sorted(account.items()), ("all", total)]:
        print(f"{name:24} {counts[0]:12,} {counts[1]:16,} {counts[2]:16,}")
    done = total[2] - sum(counts[2] for counts in before.values())
    if done and spent[0]:
        rate = done / spent[0]
        print(f"{done / 1e6:,.1f} MB in {duration(wall)}: {done / wall / 1e6:.2f} MB/s in {jobs} processes, {rate / 1e6:.2f} MB a CPU-second of encoding; "
              f"20 GB take {duration(PROJECTED / rate / jobs)} on {jobs} free cores, {duration(PROJECTED / rate / 32)} on 32")
    return 0
