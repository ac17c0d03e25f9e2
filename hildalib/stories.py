"""Stories that a small language model writes itself, for where no published ones can be had: an embedded corpus, labelled as such.

Entry points: `story_openings` (a grammar of first sentences), `written_stories` (what a writer made of them, kept in the cache).
The writer is any callable (openings, seed) -> continuations; this module knows no model.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm

from hildalib import HildaError, paths
from hildalib.textfiles import read_json, sha256_of

STORIES = 512  # stories when no limit is given: about 0.4 MB, minutes on one CPU
STORY_BATCH = 16  # openings handed to the writer at once, and the most that an interruption loses


def story_openings(count: int, seed: int = 0) -> list[str]:
    """`count` first sentences for children's stories, from a small grammar; the same for the same seed."""
    rng = random.Random(f"openings/{seed}")
    heroes = "rabbit bear bird boy cat dog dragon duck farmer fish fox frog girl horse king mouse owl puppy robot turtle".split()
    traits = "brave clever funny grumpy happy kind lazy little lonely old quiet shy silly small tired young".split()
    names = "Anna Ben Bella Daisy Finn Jack Leo Lily Lucy Max Mia Nina Oscar Pip Rosie Sam Sara Tim Tom Zoe".split()
    wishes = ["wanted to find a friend", "lost a red ball", "found a strange key", "loved to sing", "was afraid of the dark", "wanted to fly",
              "found a tiny seed", "heard a noise in the garden", "wanted to help mom", "had a big secret", "went to the beach", "built a boat"]
    starts = ["Once upon a time, there was", "One day, there was", "Long ago, there lived", "In a small town, there lived"]
    return [f"{rng.choice(starts)} a {rng.choice(traits)} {rng.choice(heroes)} named {rng.choice(names)} who {rng.choice(wishes)}."
            for _ in range(count)]


def written_stories(writer: Callable[[list[str], int], list[str]] | None, count: int, seed: int) -> tuple[list[dict], dict]:
    """Stories that `writer` continued from `story_openings`, kept in the cache; an interrupted writing goes on where it stopped."""
    path = paths.cache_dir() / f"stories-smollm2-{count}-seed{seed}.jsonl"
    partial = path.with_suffix(".partial")
    openings = story_openings(count, seed)
    if not path.exists():
        if writer is None:
            raise HildaError(f"no stories are cached at {path}; pass writer=, a callable (openings, seed) -> continuations, to have them written")
        done = partial.read_bytes().split(b"\n")[:-1] if partial.exists() else []  # the part after the last newline is half a row
        done = done[:len(done) - len(done) % STORY_BATCH]
        partial.write_bytes(b"".join(line + b"\n" for line in done))
        _write_stories(writer, openings, len(done), partial, seed)
        os.replace(partial, path)
    label = {"source": "stories-smollm2", "origin": "embedded", "licence": "Apache-2.0 (SmolLM2)", "revision": f"{count} openings, seed {seed}",
             "note": "written by SmolLM2 itself, not by people; not TinyStories", "sha256": {path.name: sha256_of(path)}}
    return [{"source": "stories-smollm2", **row} for _, row in read_json(path)], label


def _write_stories(writer: Callable[[list[str], int], list[str]], openings: list[str], start: int, partial: Path, seed: int) -> None:
    with open(partial, "a", encoding="utf-8", newline="\n") as file, tqdm(total=len(openings), initial=start, desc="stories", disable=None) as bar:
        for first in range(start, len(openings), STORY_BATCH):
            batch = openings[first:first + STORY_BATCH]
            for number, (opening, rest) in enumerate(zip(batch, writer(batch, seed + first), strict=True), start=first):
                file.write(json.dumps({"id": f"story-{number}", "prompt": opening, "response": rest, "text": opening + rest}) + "\n")
            file.flush()
            bar.update(len(batch))
