"""How fast a conversion step is, beside the plain form of the same step: `python -m hildalib.throughput --help`.

Plain: one noisy copy beside each clean copy, LM head on all 2L rows, the mask built anew and dense. Shared: C noisy copies share one clean
copy, LM head only where loss is, masks cached and cut in tiles. Same weights, noise, targets and precision, equal loss and
gradient; what counts is supervised tokens a CPU-second. Entry points: `plain_loss`, `shared_loss`, `measure`.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from hildalib import attention, backbones
from hildalib.layout import Layout, target_logits
from hildalib.noise import corrupt
from hildalib.objective import predictable, source_rows


def plain_loss(model, x0: Tensor, noisy: Tensor, docs: Tensor, targets: Tensor, block_size: int) -> Tensor:
    """Summed nats of the shifted targets (B, C, L), one forward a copy as published code does it; x0, docs (B, L), noisy (B, C, L)."""
    length, mask_id, total = x0.shape[1], model.config.hilda["mask_token_id"], 0.0
    positions = torch.arange(length, device=x0.device).repeat(2).expand(len(x0), -1)
    source = source_rows(length, block_size, True)[0].to(x0.device)
    for copy in range(noisy.shape[1]):
        attention._noisy_clean.cache_clear()
        mask = attention.noisy_clean(length, block_size, docs)
        logits = model(input_ids=torch.cat([noisy[:, copy], x0], 1), attention_mask=mask, position_ids=positions, use_cache=False).logits.float()
        logits[..., mask_id] = -torch.inf
        nll = F.cross_entropy(logits[:, source].transpose(1, 2), x0, reduction="none")
        total = total + (nll * targets[:, copy]).sum()
    return total


def shared_loss(model, x0: Tensor, noisy: Tensor, docs: Tensor, targets: Tensor, block_size: int) -> Tensor:
    """The same sum in one forward."""
    logits = target_logits(model, Layout.build(x0, noisy, docs, block_size, True), targets)
    return F.cross_entropy(logits, x0[:, None].expand_as(noisy)[targets], reduction="sum")


def matmul_rate(model, rows: int = 1024, seconds: float = 2.0) -> float:
    """FLOP a second of this machine on the model's own widest body matmul: rows x hidden x intermediate."""
    config, weight = model.config, next(model.parameters())
    a = torch.randn(rows, config.hidden_size, device=weight.device, dtype=weight.dtype)
    b = torch.randn(config.hidden_size, config.intermediate_size, device=weight.device, dtype=weight.dtype)
    done, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        a @ b
        done += 1
    return done * 2 * rows * b.numel() / (time.process_time() - start)


def step_flops(model, rows: int, head_rows: int, scores: int) -> int:
    """FLOPs of one forward and backward. scores: query-key pairs computed in a layer, for all rows of the batch."""
    config, head = model.config, model.get_output_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    body = model.num_parameters() - head * (1 if tied else 2)
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return 6 * (body * rows + head * head_rows) + 12 * width * scores * config.num_hidden_layers


def batch_of(model, tokenizer, length: int, copies: int, block_size: int, seed: int) -> tuple[Tensor, ...]:
    """Random text of two documents with M2T and T2T noise: x0, noisy, docs, targets."""
    generator = torch.Generator().manual_seed(seed)
    forbidden = backbones.forbidden_ids(model, tokenizer)
    allowed = torch.ones(model.get_input_embeddings().num_embeddings, dtype=torch.bool)
    allowed[forbidden] = False
    x0 = allowed.nonzero()[:, 0][torch.randint(int(allowed.sum()), (1, length), generator=generator)]
    docs = (torch.arange(length) >= length // 2).long()[None]
    maskable = predictable(torch.ones_like(x0, dtype=torch.bool), docs, True)
    noised = [corrupt(x0, maskable, block_size=block_size, mask_token_id=model.config.hilda["mask_token_id"], forbidden_ids=forbidden,
                      edit_rate=0.1, generator=generator) for _ in range(copies)]
    noisy, targets = (torch.stack(parts, 1) for parts in ([n.noisy_ids for n in noised], [n.mask_targets | n.edit_targets for n in noised]))
    return tuple(part.to(model.device) for part in (x0, noisy, docs, targets))


def measure(model, tokenizer, *, length: int, copies: int, block_size: int, rounds: int, seed: int = 0) -> list[dict]:
    """One row a round and form: supervised tokens, CPU-seconds (forward and backward), share of the matmul rate, loss."""
    rows, peak = [], matmul_rate(model)
    for number in range(rounds + 1):  # the first round warms allocator and kernels up and is not counted
        x0, noisy, docs, targets = batch_of(model, tokenizer, length, copies, block_size, seed + number)
        for form, loss_of, implementation in (("plain", plain_loss, "sdpa"), ("shared", shared_loss, attention.TILED)):
            model.set_attn_implementation(implementation)
            model.zero_grad(set_to_none=True)
            start = time.process_time()
            loss = loss_of(model, x0, noisy, docs, targets, block_size)
            (loss / targets.sum()).backward()
            spent = time.process_time() - start
            if form == "plain":
                flops = copies * step_flops(model, 2 * length, 2 * length, (2 * length) ** 2)
            else:
                tiles = Layout.build(x0, noisy, docs, block_size, True).tiles
                scores = sum((r.stop - r.start) * len(keys) for r, keys, _ in tiles) if tiles else ((copies + 1) * length) ** 2
                flops = step_flops(model, (copies + 1) * length, int(targets.sum()), scores)
            if number:
                rows.append({"round": number, "form": form, "supervised": int(targets.sum()), "cpu_s": spent, "loss": loss.item() / int(targets.sum()),
                             "tokens_per_cpu_s": int(targets.sum()) / spent, "matmul_share": flops / spent / peak})
                print("round {round}  {form:6}  {tokens_per_cpu_s:7.1f} supervised tokens/CPU-s  {matmul_share:4.0%} of the matmul rate  loss {loss:.5f}".format(
                    **rows[-1]), flush=True)
    model.set_attn_implementation("sdpa")
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hildalib.throughput", description="Supervised tokens a CPU-second of a conversion step, "
                                     "beside the plain form of the same step, in alternating rounds.")
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or hub id (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--copies", type=int, default=4, help="noisy copies that share a clean one (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=8, help="block size (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: %(default)s)")
    given = parser.parse_args(arguments)
    model, tokenizer = backbones.load(given.model, dtype="float32")
    found = measure(model.train(), tokenizer, length=given.length, copies=given.copies, block_size=given.block_size, rounds=given.rounds)
    ratios = sorted(shared["tokens_per_cpu_s"] / plain["tokens_per_cpu_s"] for plain, shared in zip(found[::2], found[1::2]))
    print(f"shared / plain: median {ratios[len(ratios) // 2]:.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} rounds; "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
