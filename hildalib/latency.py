"""How long a decode takes, beside diffusers' pipeline and beside its own floor: `python -m hildalib.latency --help`.

A random Qwen3 writes a fixed number of tokens a forward, greedily: the same tokens from `edit_decode` and from `LLaDA2Pipeline`, which reads the
whole text anew in each forward. The floor is the matmuls alone, on the model's own weights in their order: the body's for every position that
`edit_decode` feeds, the head's for every row whose logits it asks for. A decode that knows no better puts every position through the head, too: that
is the wider floor, all weights x positions fed at the rate those matmuls reached. What counts is CPU-seconds of one thread, in alternating rounds.
Entry points: `random_model`, `pipeline_decode`, `decode`, `shapes`, `matmuls`, `shares`, `measure`.
"""

import argparse
import time
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import Qwen3Config, Qwen3ForCausalLM

from hildalib import HildaError, attention
from hildalib.decoding import Decoded, EditSettings, commit, edit_decode
from hildalib.decoding.forward import Forward
from hildalib.decoding.linear import linear

NO_DIFFUSERS = "diffusers, with LLaDA2Pipeline, is not installed, so there is only the floor to compare with; pip install -U diffusers"
MATMULS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")  # names under which the profiler files those with weights


def random_model(block_size: int = 32, *, hidden: int = 512, layers: int = 8, heads: int = 8, key_heads: int = 4, intermediate: int = 1408,
                 vocabulary: int = 6400, seed: int = 0):
    """A Qwen3 of random weights (26.9 M by default), without end of text; the last id is [MASK]. Context block-causal, labels unshifted."""
    config = Qwen3Config(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
                         head_dim=hidden // heads, intermediate_size=intermediate, vocab_size=vocabulary, tie_word_embeddings=True,
                         max_position_embeddings=4096, eos_token_id=None, bos_token_id=None, pad_token_id=None, attn_implementation="sdpa")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.config.hilda = {"mask_token_id": vocabulary - 1, "block_size": block_size, "label_shift": False, "causal_context": False}
    return model.eval()


class _BlockCausal(torch.nn.Module):
    """What the pipeline takes for a LLaDA2: block-causal whatever the 2-D mask says, for here nothing is padded; [MASK] barred."""

    def __init__(self, model):
        super().__init__()
        self.model, self.record = model, model.config.hilda
        self.device, self.dtype = model.device, model.dtype  # the pipeline looks for them

    def forward(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor):
        mask = attention.block_causal(ids.shape[1], self.record["block_size"])
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
        out.logits[..., self.record["mask_token_id"]] = -torch.inf
        return out


def has_pipeline() -> bool:
    """Whether diffusers is installed and has the LLaDA2 pipeline."""
    try:
        from diffusers import BlockRefinementScheduler, LLaDA2Pipeline  # noqa: F401
    except ImportError:
        return False
    return True


def pipeline_decode(model, prompt_ids: Tensor, new: int, steps: int, **options) -> Tensor:
    """(B, new) tokens of diffusers' LLaDA2Pipeline after prompt_ids (B, P): block_size / steps tokens a forward, no edits; options go to it."""
    from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

    record = model.config.hilda
    pipeline = LLaDA2Pipeline(model=_BlockCausal(model), scheduler=BlockRefinementScheduler())
    pipeline.set_progress_bar_config(disable=True)
    quota = {"threshold": 2.0, "editing_threshold": None}  # no confidence is above 2: the pipeline falls back to its quota
    return pipeline(input_ids=prompt_ids, gen_length=new, block_length=record["block_size"], num_inference_steps=steps, eos_early_stop=False,
                    mask_token_id=record["mask_token_id"], output_type="seq", **quota | options).sequences


def decode(model, prompt_ids: Tensor, new: int, steps: int) -> Decoded:
    """The same from `edit_decode`."""
    quota = commit.Quota(model.config.hilda["block_size"] // steps)
    return edit_decode(model, prompt_ids, EditSettings(commit=quota, tau_edit=2.0, max_new_tokens=new, stop_at_eos=False))


def shapes(model, run) -> list[tuple[int, int]]:
    """(positions fed, rows through the head) of each forward in `run()`."""
    fed, asked = [], []
    hooks = [model.get_input_embeddings().register_forward_hook(lambda _, args, out: fed.append(args[0].numel())),
             model.get_output_embeddings().register_forward_hook(lambda _, args, out: asked.append(out.numel() // out.shape[-1]))]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return list(zip(fed, asked))


def flops(model, forwards: list[tuple[int, int]]) -> int:
    """Of the matmuls with weights in `forwards`, what `shapes` returned."""
    head = model.get_output_embeddings().weight
    body = sum(layer.weight.numel() for layer in _linear(model))
    return 2 * sum(body * fed + head.numel() * asked for fed, asked in forwards)


def _linear(model) -> list[torch.nn.Linear]:
    """The body's linear layers in their order."""
    return [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not model.get_output_embeddings()]


@torch.inference_mode()
def matmuls(model, forwards: list[tuple[int, int]]) -> None:
    """The matmuls with weights of `forwards`, what `shapes` returned, and nothing else."""
    head = model.get_output_embeddings().weight
    layers, ends = [(layer.in_features, linear(layer.weight, layer.bias)) for layer in _linear(model)], linear(head)
    widths = {width for width, _ in layers} | {head.shape[1]}
    inputs = {(rows, width): torch.randn(rows, width) for pair in {*forwards} for rows in pair for width in widths}
    for fed, asked in forwards:
        for width, layer in layers:
            layer(inputs[fed, width])
        ends(inputs[asked, head.shape[1]])


def shares(run) -> dict[str, float]:
    """Where the time of `run()`, a decode, goes: matmuls with weights, attention, the rest of the forwards, the loop and its rules; sums to 1."""
    call = Forward.__call__

    def marked(self, *arguments, **options):
        with record_function("forward"):
            return call(self, *arguments, **options)

    Forward.__call__ = marked
    try:
        with profile(activities=[ProfilerActivity.CPU]) as seen, record_function("decode"):
            run()
    finally:
        Forward.__call__ = call
    events = {event.key: event for event in seen.key_averages()}
    total, forward = (events[name].cpu_time_total for name in ("decode", "forward"))
    attend = sum(event.self_cpu_time_total for key, event in events.items() if key.startswith("aten::_scaled_dot_product"))
    matmul = sum(event.self_cpu_time_total for key, event in events.items() if key in MATMULS)
    return {"matmul": matmul / total, "attention": attend / total, "forward, other": (forward - matmul - attend) / total,
            "loop and rules": (total - forward) / total}


def _cpu(run) -> tuple[float, object]:
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def measure(model, *, prompt: int, new: int, steps: int, rounds: int, seed: int = 0) -> list[dict]:
    """One row a round: CPU-seconds of `decode`, of its floor, of the wider floor and of the pipeline (None without diffusers). Raises HildaError if the
    tokens differ."""
    ids = torch.randint(model.config.vocab_size - 1, (1, prompt), generator=torch.Generator().manual_seed(seed))
    forwards, theirs, rows = shapes(model, lambda: decode(model, ids, new, steps)), has_pipeline(), []
    asked, every = flops(model, forwards), flops(model, [(fed, fed) for fed, _ in forwards])
    for number in range(rounds + 1):  # the first round warms allocator and kernels up and is not counted
        pipeline_s, expected = _cpu(lambda: pipeline_decode(model, ids, new, steps)) if theirs else (None, None)
        ours_s, found = _cpu(lambda: decode(model, ids, new, steps))
        floor_s, _ = _cpu(lambda: matmuls(model, forwards))
        if theirs and not torch.equal(found.ids, expected):
            raise HildaError(f"{int((found.ids != expected).sum())} of {new} tokens differ from the pipeline's: the times cannot be compared")
        if number:
            rows.append({"round": number, "ours_s": ours_s, "floor_s": floor_s, "wide_floor_s": floor_s * every / asked, "pipeline_s": pipeline_s,
                         "fed": int(found.positions_fed), "gflops": asked / floor_s / 1e9})
            beside = f", pipeline {pipeline_s:.2f} s" if theirs else ""
            print("round {round}  decode {ours_s:.2f} CPU-s, floor {floor_s:.2f} s at {gflops:.0f} GFLOP/s".format(**rows[-1]) + beside, flush=True)
    return rows


def _spread(ratios: list[float]) -> str:
    return f"median {median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hildalib.latency", description="CPU-seconds of a greedy block-diffusion decode with a fixed quota, "
                                     "beside diffusers' LLaDA2Pipeline (same tokens) and beside its matmuls alone, in alternating rounds of one thread.")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--new", type=int, default=256, help="tokens written, whole blocks (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=32, help="block size (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="forwards in which a block is filled (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: %(default)s)")
    given = parser.parse_args(arguments)
    if given.block_size % given.steps or (given.prompt + given.new) % given.block_size:
        parser.error("steps must divide the block size, and the block size prompt + new")
    torch.set_num_threads(1)
    model = random_model(given.block_size)
    if not has_pipeline():
        print(NO_DIFFUSERS)
    rows = measure(model, prompt=given.prompt, new=given.new, steps=given.steps, rounds=given.rounds)
    if has_pipeline():
        print(f"decode / pipeline: {_spread([row['ours_s'] / row['pipeline_s'] for row in rows])}; same tokens")
    print(f"decode / floor: {_spread([row['ours_s'] / row['floor_s'] for row in rows])}; {rows[0]['fed']} positions fed, the head only where asked")
    print(f"decode / wider floor: {_spread([row['ours_s'] / row['wide_floor_s'] for row in rows])}; every weight for every position fed")
    ids = torch.zeros(1, given.prompt, dtype=torch.long)
    print("; ".join(f"{name} {share:.0%}" for name, share in shares(lambda: decode(model, ids, given.new, given.steps)).items()))
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {given.rounds} rounds, 1 thread, torch {torch.__version__}")


if __name__ == "__main__":
    main()
