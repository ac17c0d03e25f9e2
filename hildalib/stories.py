"""Stories: published ones out of running text, and those that a small language model writes itself where none can be had.

Entry points: `whole_stories` (lines to stories), `story_openings` (a grammar of first sentences), `written_stories` (what a writer
made of them, kept in the cache).
The writer is any callable (openings, seed) -> continuations, SmolLM2-135M unless another is given.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm.auto import tqdm

from hildalib import paths
from hildalib.textfiles import read_json, sha256_of

STORIES = 512  # stories when no limit is given: about 0.3 MB, a quarter of an hour on two cores
STORY_BATCH = 16  # openings handed to the writer at once, and the most that an interruption loses
_STORY_OPENING = re.compile(r"Once upon a time|Once there (?:was|were)|Once, there|One day, (?:an?|there|two|in)\b|There (?:was|once)|Long ago")
_STORY_LENGTHS = range(300, 1501)  # characters: 95 % of whole TinyStories; outside lie fragments and two stories run together


def _stories(lines: Iterator[str]) -> Iterator[str]:
    """Stories of running text whose paragraphs are parted by an empty line; what precedes the first boundary is dropped.

    A recognised opening begins a story, and so does a line right below another: the training text parts stories so.
    """
    story, started, below_text = [], False, False
    for line in map(str.strip, lines):
        if line and (below_text or _STORY_OPENING.match(line)):
            if started:
                yield "\n\n".join(story)
            story, started = [], True
        if line:
            story.append(line)
        below_text = bool(line)
    if started:
        yield "\n\n".join(story)


def whole_stories(lines: Iterator[str]) -> Iterator[str]:
    """Stories less fragments and merged ones, which their length betrays."""
    return (story for story in _stories(lines) if len(story) in _STORY_LENGTHS)


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
            from hildalib.decoding.autoregressive import story_writer  # only here: everything else in this file needs no model

            writer = story_writer()
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
