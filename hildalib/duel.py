"""Models beside each other on the same test prompts: `hilda compare`, for whoever has tuned or converted one and asks whether it is better.

Entry points: `compare` (answers kept, differences paired by prompt), `Contest` (what is asked), `contestant` (NAME=MODEL:MODE); `beside` and `judged`, for
answers that are there.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from hildalib import HildaError, artefacts, backbones, comparison, evaluate, runs, tasks
from hildalib.decoding import EditSettings, settings_for

MODES = ("own", "S", "Q", "single", "ar")  # own greedy text, drafted and verified; the presets; one token a forward; left to right
BESIDE = ("measure", "rival", "items", "ours", "theirs", "difference", "low", "high", "p", "our_tpf", "tpf", "our_tokens_per_s", "tokens_per_s")


@dataclass(frozen=True)
class Contest:
    """tasks: of hildalib.tasks; items: test prompts of each; open_items: of one without right answers, whose texts `judge`, an AR model, reads."""

    tasks: Sequence[str]
    items: int = 200
    open_items: int = 40
    batch_size: int = 20
    max_new_tokens: int = 128
    dtype: str = "auto"
    judge: str = "smollm2-135m"
    chat: bool = True


def contestant(text: str) -> tuple[str, str, str]:
    """(name in tables, model, mode) of MODEL:MODE or NAME=MODEL:MODE; without a mode it is "own". HildaError for an unknown mode."""
    name, sign, rest = text.rpartition("=")
    model, colon, mode = rest.rpartition(":")
    if not colon or not model or "/" in mode or "\\" in mode:  # the colon of a drive
        model, mode = rest, "own"
    if mode not in MODES:
        raise HildaError(f"{text}: mode {mode!r} is unknown; use one of {', '.join(MODES)}, as in {model}:Q")
    return name if sign else f"{model}:{mode}", model, mode


def compare(contestants: Sequence[str], contest: Contest, out: str | Path) -> pd.DataFrame:
    """The first of `contestants` ("NAME=MODEL:MODE") beside each of the others, one row a task and rival, also in `out`/paired.csv.

    Columns: task, measure ("score", or "nats a token" of open texts under the judge, where less is better), ours, theirs (means), difference
    (ours - theirs), low, high (95 % t over prompts), p (exact sign test), items, and tokens a forward and a second of both. Every answer is kept in `out`, so
    an interrupted comparison, or one with further rivals, asks only what is new; `out`/scores.csv has a row a prompt.
    """
    them, folder = [contestant(text) for text in contestants], Path(out)
    if len({name for name, *_ in them}) < max(2, len(them)):
        raise HildaError("compare needs two or more contestants of different names, e.g. smollm2-135m-dllm:own new=my-model/model:own")
    folder.mkdir(parents=True, exist_ok=True)
    frames = {(task, label): _answers(model, mode, task, contest, folder) for label, model, mode in them for task in contest.tasks}
    rows, scores = [], []
    open_tasks = {name for name in contest.tasks if hasattr(tasks.load(name), "metrics")}
    referee = backbones.load(contest.judge, dtype="float32") if open_tasks else None
    for name in contest.tasks:
        parts = {label: frames[name, label] for label, *_ in them}
        parts = judged(parts, referee) if name in open_tasks else parts
        scores += [part.assign(task=name, arm=label, item=range(len(part)), score=part[_value(part)]) for label, part in parts.items()]
        rows.append(beside(parts, them[0][0]).assign(task=name))
    pd.concat(scores)[["task", "arm", "item", "score", "tokens", "forwards"]].to_csv(folder / "scores.csv", index=False)
    result = pd.concat(rows, ignore_index=True)[["task", *BESIDE]]
    result.to_csv(folder / "paired.csv", index=False)
    return result


def judged(frames: Mapping[str, pd.DataFrame], judge: tuple) -> dict[str, pd.DataFrame]:
    """Frames of `evaluate.run` with the nats a token of each text after its prompt under `judge`, an AR model and its tokenizer."""
    return {label: frame.assign(nats=evaluate.likelihood(*judge, frame.prompt.tolist(), frame.text.tolist())) for label, frame in frames.items()}


def beside(frames: Mapping[str, pd.DataFrame], mine: str) -> pd.DataFrame:
    """`mine` beside each of the other contestants of frames {name: of `evaluate.run`, or `judged`}, all on the same prompts: the columns of `compare`
    but task."""
    value = _value(frames[mine])
    found = comparison.paired(pd.concat([frame.assign(arm=label, item=range(len(frame))) for label, frame in frames.items()]), value, reference=mine)
    rates = {label: evaluate.summary(frame).iloc[0] for label, frame in frames.items()}
    return found.rename(columns={"mean": "theirs", "arm": "rival"}).assign(
        measure={"nats": "nats a token"}.get(value, value), ours=frames[mine][value].mean(), our_tpf=rates[mine].tpf, our_tokens_per_s=rates[mine].tokens_per_s,
        tpf=[rates[label].tpf for label in found.arm], tokens_per_s=[rates[label].tokens_per_s for label in found.arm])[list(BESIDE)]


def _value(frame: pd.DataFrame) -> str:
    return "nats" if "nats" in frame else "score"


def _answers(model: str, mode: str, task_name: str, contest: Contest, folder: Path) -> pd.DataFrame:
    task, source = tasks.load(task_name), backbones.fetch(model)
    limit = contest.open_items if hasattr(task, "metrics") else contest.items
    key = {key: value for key, value in asdict(contest).items() if key not in ("tasks", "items", "open_items", "judge")}

    def ask() -> pd.DataFrame:
        loaded, tokenizer = backbones.load(model, dtype=contest.dtype)
        return evaluate.run(loaded, tokenizer, task, _decoder(loaded, model, mode, contest.max_new_tokens), limit=limit, batch_size=contest.batch_size,
                            chat=contest.chat)

    name = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{task_name}-{limit}-{model}-{mode}")
    return artefacts.kept(folder / f"{name[-120:]}.csv", key | {"model": runs.digest(source), "mode": mode, "task": task_name, "items": limit}, ask)


def _decoder(loaded, name: str, mode: str, max_new_tokens: int) -> evaluate.Decoder:
    record = loaded.config.hilda
    if mode in ("own", "ar") and not record["label_shift"]:
        raise HildaError(f"{name}:{mode}: that model predicts a token at its own place, so it has no left-to-right text; use Q or single")
    if mode == "ar":
        return evaluate.autoregressive(max_new_tokens)
    if not record["block_size"]:
        raise HildaError(f"{name}:{mode}: that model is autoregressive; use {name}:ar")
    if mode == "own":
        return evaluate.speculative(max_new_tokens)
    single = EditSettings(tau_mask=1.0, tau_edit=1.0, max_new_tokens=max_new_tokens)
    return evaluate.diffusion(single if mode == "single" else settings_for(mode, max_new_tokens=max_new_tokens))
