"""The command line: `hilda` = `python -m hildalib`.

Entry point: `main(arguments) -> exit status`; 0 only if what was asked for happened, 1 if a notebook or a check failed, 2 for a mistake of
the caller, 130 after Ctrl-C. Nothing heavy is imported before the arguments are known to be good.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from hildalib import HildaError, __version__
from hildalib.manual import (COMPARE_EXAMPLES, EXAMPLES, EXPORT_EXAMPLES, GENERATE_EXAMPLE, PLAN_EXAMPLES, RUN_EXAMPLES, SERVE_EXAMPLES, TOKENISE_EXAMPLE, TRAIN_EXAMPLES, TUNE_EXAMPLES)


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in [0, 1]")
    return value


def _at_least(low: int):
    def whole(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return int(text)
    return whole


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, for example --set seed=1")
    return key, value


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="hilda", formatter_class=raw, epilog=EXAMPLES,
                                  description="Small autoregressive language models turned into editable block-diffusion models.")
    top.add_argument("--version", action="version", version=f"hilda {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name, act, summary, **more):
        made = commands.add_parser(name, help=summary, description=summary, formatter_class=raw, **more)
        made.set_defaults(act=act)
        return made

    run = command("run", _run, "execute notebooks: only what changed, each accepted only when it is complete", epilog=RUN_EXAMPLES)
    run.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="e.g. 02_wsd (default: all)")
    run.add_argument("--profile", default="nano", help="parameter set: a folder of params/, or smoke (default: nano)")
    run.add_argument("--set", dest="overrides", type=_pair, action="append", default=[], metavar="KEY=VALUE",
                     help="change a parameter in every chosen notebook that has it (repeatable; the value is YAML)")
    run.add_argument("--seeds", type=_at_least(0), nargs="+", metavar="SEED", help="run the chosen notebooks once for each seed")
    run.add_argument("--jobs", type=_at_least(1), default=1, metavar="N", help="notebooks at a time (default: 1)")
    run.add_argument("--force", action="store_true", help="run from scratch even what is up to date")

    train = command("train", _train, "train the arms of a notebook, in as many processes as a launcher starts", epilog=TRAIN_EXAMPLES)
    train.add_argument("notebook", metavar="NOTEBOOK", help="02_wsd or 03_sft")
    train.add_argument("--profile", default="nano", help="parameter set (default: nano)")
    train.add_argument("--set", dest="overrides", type=_pair, action="append", default=[], metavar="KEY=VALUE",
                       help="change a parameter (repeatable)")
    train.add_argument("--arm", dest="arms", action="append", default=[], metavar="NAME",
                       help="only this arm (repeatable; default: all of the profile)")

    tune = command("tune", _tune, "tune a converted model on more pairs, your own or those of named corpora", epilog=TUNE_EXAMPLES)
    tune.add_argument("--model", default="smollm2-135m-dllm", help="folder, hub id or registered name of a converted model (default: %(default)s)")
    tune.add_argument("--sources", nargs="+", required=True, metavar="SOURCE", help=".jsonl files of pairs, or names of corpora with pairs")
    tune.add_argument("--out", required=True, metavar="FOLDER", help="where to: checkpoints, logs and, in the end, FOLDER/model")
    for name, default, help in (("pairs", 1600, "most pairs of each source"), ("length", 256, "tokens in a packed row"),
                                ("steps", 300, "steps of the base (0: it stays as it is), or of all weights"),
                                ("draft-steps", 150, "steps of the drafting adapters")):
        tune.add_argument(f"--{name}", type=_at_least(0 if name == "steps" else 1), default=default, metavar="N", help=f"{help} (default: {default})")
    tune.add_argument("--own-answers", action="store_true", help="the drafting adapters learn on what the base answers to the prompts instead of the "
                      "responses: mode own writes the same text in fewer forwards")
    tune.add_argument("--profile", default="smol", help="parameter set whose 03_sft gives the rest (default: smol)")
    tune.add_argument("--set", dest="overrides", type=_pair, action="append", default=[], metavar="KEY=VALUE",
                      help="change one of those parameters, e.g. seed=1 (repeatable)")
    tune.add_argument("--arm", default="dLLM", metavar="NAME", help="objective of a model that learns in all its weights (default: dLLM)")
    tune.add_argument("--license", default=None, help="licence of adapters to hand out, for their card")

    compare = command("compare", _compare, "set converted models beside each other on the same test prompts, with intervals and p", epilog=COMPARE_EXAMPLES)
    compare.add_argument("contestants", nargs="+", metavar="NAME=MODEL:MODE", help="the first is set beside each of the others; NAME is for tables, MODE is "
                         "own (default), S, Q, single (one token a forward) or ar")
    compare.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="e.g. arithmetic gsm_symbolic tinystories")
    compare.add_argument("--out", required=True, metavar="FOLDER", help="where to: every answer, scores.csv, paired.csv")
    for name, default, help in (("items", 200, "test prompts of a task"), ("open-items", 40, "test prompts of a task without right answers"),
                                ("batch-size", 20, "prompts decoded together"), ("max-new-tokens", 128, "tokens of an answer")):
        compare.add_argument(f"--{name}", type=_at_least(1), default=default, metavar="N", help=f"{help} (default: {default})")
    compare.add_argument("--judge", default="smollm2-135m", metavar="MODEL", help="AR model that judges open texts (default: %(default)s)")
    compare.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of weights and arithmetic (default: auto)")
    compare.add_argument("--bare", action="store_true", help="prompts as they are, not as a turn of the chat template")

    plan = command("plan", _plan, "predict memory and time of a training stage from its parameters alone", epilog=PLAN_EXAMPLES)
    plan.add_argument("notebook", nargs="?", default="02_wsd", metavar="NOTEBOOK", help="02_wsd (default) or 03_sft")
    plan.add_argument("--profile", default="nano", help="parameter set, with overlays: profile+overlay (default: nano)")
    plan.add_argument("--set", dest="overrides", type=_pair, action="append", default=[], metavar="KEY=VALUE",
                      help="change a parameter of this notebook, of 02_wsd or of 01_data (repeatable)")
    plan.add_argument("--arm", default="dLLM", metavar="NAME", help="arm to plan for (default: dLLM)")
    plan.add_argument("--memory", metavar="SIZE", help="of the card, e.g. 8GB: does it fit, and if not, what would make it")
    plan.add_argument("--gflops", type=float, metavar="RATE", help="matmul rate of the machine to plan for, in GFLOP/s (default: measured here)")

    tokenise = command("tokenise", _tokenise, "write a corpus to token shards: in parallel, with bounded memory, continued after a kill",
                       epilog=TOKENISE_EXAMPLE)
    tokenise.add_argument("source", metavar="SOURCE",
                          help="name of a corpus, or dolma:FOLDER for documents {\"text\", \"id\", \"source\"} in .jsonl, .gz or .zst")
    tokenise.add_argument("--model", required=True, help="backbone whose tokenizer is used: name, folder or hub id")
    tokenise.add_argument("--out", required=True, metavar="FOLDER", help="folder of the shards")
    tokenise.add_argument("--split", default="train", help="(default: train)")
    tokenise.add_argument("--jobs", type=_at_least(1), default=os.cpu_count() or 1, metavar="N", help="processes (default: one a core)")

    status = command("status", _status, "list notebooks with their state: up to date, stale, missing, failed, running, invalid")
    status.add_argument("--profile", help="only this one")

    generate = command("generate", _generate, "let an editable diffusion model continue a prompt",
                       epilog=GENERATE_EXAMPLE)
    generate.add_argument("prompt", help="text to continue")
    generate.add_argument("--model", default="smollm2-135m-dllm", help="folder, hub id or registered name (default: %(default)s, which comes with HILDA)")
    generate.add_argument("--chat", action="store_true", help="the prompt is a user's turn of the model's chat template")
    generate.add_argument("--mode", choices=("S", "Q", "own"), default="Q", help="S: speed, Q: quality, own: what the model would write token "
                          "by token, drafted in blocks and verified (default: Q)")
    generate.add_argument("--tau-mask", type=_threshold, metavar="T", help="confidence in [0, 1] needed to fill a mask (default: of the mode)")
    generate.add_argument("--tau-edit", type=_threshold, metavar="T", help="confidence in [0, 1] needed to change a token (default: of the mode)")
    generate.add_argument("--max-new-tokens", type=_at_least(1), default=128, metavar="N", help="(default: %(default)s)")
    generate.add_argument("--seed", type=_at_least(0), default=0, help="(default: 0)")
    generate.add_argument("--engine", choices=("auto", "transformers", "dinfer"), default="auto",
                          help="what decodes; dinfer, for LLaDA2 folders, does not edit: give --tau-edit 1 (default: auto)")

    serve = command("serve", _serve, "answer over HTTP: generation with its steps, OpenAI's completions, runs of the book", epilog=SERVE_EXAMPLES)
    serve.add_argument("--model", required=True, help="folder, hub id or registered name of a converted model")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; another one than loopback needs a token (default: %(default)s)")
    serve.add_argument("--port", type=_at_least(1), default=8000, help="(default: %(default)s)")
    serve.add_argument("--token", help="clients must send `Authorization: Bearer TOKEN` (default: that of HILDA_TOKEN, which other users of the "
                       "machine cannot read)")
    serve.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a name in the Host header that is served (repeatable)")
    serve.add_argument("--engine", choices=("auto", "transformers", "dinfer"), default="auto", help="what decodes (default: auto)")
    for name, default, help in (("max-prompt", 2048, "tokens of a prompt"), ("max-new-tokens", 1024, "tokens a request may ask for"),
                                ("max-body", 1 << 20, "bytes of a request"), ("queue", 128, "requests that may wait"),
                                ("batch", 32, "requests decoded together")):
        serve.add_argument(f"--{name}", type=_at_least(1), default=default, metavar="N", help=f"most {help} (default: {default})")

    export = command("export", _export, "write a model for other programs, read it back and compare", epilog=EXPORT_EXAMPLES)
    export.add_argument("model", metavar="MODEL", help="folder, hub id or registered name")
    export.add_argument("--to", required=True, choices=("hf", "gguf", "onnx", "merged", "int8", "adapter"), help="form")
    export.add_argument("--out", metavar="FOLDER", help="where to (default: MODEL-FORM beside the model)")
    export.add_argument("--license", default=None, help="licence of the weights for the model card (default: that of the parent, to be looked up)")

    command("smoke-test", _smoke_test, "save, load and decode with a tiny random model; prints OK")
    command("doctor", _doctor, "tell the device, its capability, what is supported and which settings follow")
    fetch = command("fetch", _fetch, "download weights or data into the cache ahead of time", epilog="example:\n  hilda fetch smollm2-135m\n")
    fetch.add_argument("names", nargs="+", metavar="NAME", help="name of a backbone or of a corpus")
    return top


def _run(options) -> int:
    from hildalib import book

    return book.run(options.notebooks, options.profile, dict(options.overrides), force=options.force, jobs=options.jobs, seeds=options.seeds)


def _train(options) -> int:
    from hildalib import stages

    return stages.run(options.notebook, options.profile, dict(options.overrides), options.arms)


def _tune(options) -> int:
    from hildalib import tuning

    plan = tuning.Plan(options.sources, options.pairs, options.steps, options.draft_steps, options.own_answers, options.length, options.profile,
                       dict(options.overrides), options.arm, options.license)
    made = tuning.tune(options.model, options.out, plan)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f'next: hilda generate "your prompt" --chat --model {made}')
    return 0


def _compare(options) -> int:
    from hildalib import duel

    contest = duel.Contest(options.tasks, options.items, options.open_items, options.batch_size, options.max_new_tokens, options.dtype, options.judge,
                           not options.bare)
    table = duel.compare(options.contestants, contest, options.out)
    print(table.to_string(index=False, float_format="{:.3g}".format))
    return 0


def _plan(options) -> int:
    from hildalib import planner

    return planner.run(options.notebook, options.profile, dict(options.overrides), options.arm, options.memory, options.gflops)


def _tokenise(options) -> int:
    from hildalib import tokenisation

    return tokenisation.run(options.source, options.model, options.out, split=options.split, jobs=options.jobs)


def _status(options) -> int:
    from hildalib import book
    from hildalib.progress import duration

    rows = [("notebook", "profile", "seed", "state", "wall", "finished (UTC)", "why")]
    for row in book.status(options.profile):
        rows.append((row["notebook"], row["profile"], str(row["seed"]), row["state"], "-" if row["wall"] is None else duration(row["wall"]),
                     (row["finished"] or "-")[:19].replace("T", " "), row["why"]))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    return 0


def _generate(options) -> int:
    from hildalib.engine import open_engine

    engine = open_engine(options.model, options.engine)
    prompt = engine.turn(options.prompt) if options.chat else options.prompt
    print(engine.generate(prompt, options.mode, options.tau_mask, options.tau_edit, options.max_new_tokens, options.seed))
    return 0


def _serve(options) -> int:
    from hildalib import serving

    limits = serving.Limits(options.max_prompt, options.max_new_tokens, options.max_body, options.queue, options.batch)
    return serving.serve(options.model, host=options.host, port=options.port, token=options.token, engine=options.engine,
                         names=tuple(options.allow_host), limits=limits)


def _export(options) -> int:
    from hildalib import exports

    print(exports.export(options.model, options.to, options.out, license=options.license))
    return 0


def _smoke_test(options) -> int:
    """The path of every user, in small: a random model, made a dLLM, saved, loaded, decoded."""
    import tempfile
    from dataclasses import replace

    import torch

    from hildalib import backbones
    from hildalib.decoding import PRESETS, edit_decode

    model, tokenizer = backbones.nano(hidden=32, layers=2, heads=2)
    with tempfile.TemporaryDirectory() as folder:
        backbones.save(model, tokenizer, folder)
        model, tokenizer = backbones.load(folder, dtype="float32", device="cpu")
    prompt = tokenizer("1+1=", return_tensors="pt", add_special_tokens=False).input_ids
    settings = replace(PRESETS["Q"], block_size=4, max_new_tokens=8)
    decoded = edit_decode(model.eval(), prompt, settings, generator=torch.Generator().manual_seed(0))
    if decoded.ids.shape[0] != 1 or (decoded.ids == model.config.hilda["mask_token_id"]).any():
        raise HildaError("the decoder left [MASK] in its output; please report this with the output of `hilda doctor`")
    print("OK")
    return 0


def _doctor(options) -> int:
    from hildalib import backbones, paths

    report = {"hilda": __version__, "results": str(paths.outputs_root()), "cache": str(paths.cache_dir(create=False)),
              "own data (HILDA_DATA)": str(paths.data_dir() or "not set"), **backbones.device_report()}
    width = max(map(len, report))
    for key, value in report.items():
        print(f"{key.ljust(width)}  {value}")
    return 0


def _fetch(options) -> int:
    from hildalib import backbones, corpora, tasks

    for name in options.names:
        if name in ("nano", "stories-smollm2", *tasks.GENERATED):
            print(f"{name}: made on the spot, nothing to fetch")
        elif name in corpora.SOURCES:
            splits = list(corpora.SOURCES[name].hub_splits or corpora.SOURCES[name].folder)
            for split in splits:
                next(corpora.records(name, split))  # the first row comes once the whole split is in the cache
            print(f"{name}: {', '.join(splits)} ready")
        else:
            print(f"{name}: {backbones.fetch(name)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a Windows console may lack characters that a model writes
    try:
        options = parser().parse_args(arguments)
        return options.act(options)
    except HildaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command again continues where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # e.g. `hilda status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        from hildalib import paths

        if not paths.disk_full(str(error)):
            raise
        print(f"error: {error}: {paths.MORE_SPACE}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
