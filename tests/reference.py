"""Slow, uncached, batch-one decoders written straight from the rules: the oracle of the fast ones."""

import torch

from hildalib import attention


def embedded(model, ids, carried):
    """(1, n, D) embeddings of ids (n,), with the vector of each position of the dict `carried` in place of its own."""
    embeds = model.get_input_embeddings()(ids)[None].clone()
    for position, vector in carried.items():
        embeds[0, position] = vector
    return embeds


def _logits(model, x, end, mask, carried={}):
    positions = torch.arange(end)[None]
    z = model(inputs_embeds=embedded(model, x[:end], carried), attention_mask=mask, position_ids=positions, use_cache=False).logits[0].float()
    z[:, model.config.hilda["mask_token_id"]] = -torch.inf
    return torch.cat([z[:1], z[:-1]]) if model.config.hilda["label_shift"] else z


def open_block(start, end, size, causal):
    """The open block [start, end) sees itself and all before it; what is before it was read block by block, or token by token."""
    if not causal:
        return attention.block_causal(end, size)
    position = torch.arange(end)
    return ((position[:, None] >= start) | (position[:, None] >= position))[None, None]


@torch.no_grad()
def edit_decode(model, prompt, s):
    """(generated ids up to and with the first EOS, forwards without commits, canvas history)"""
    K = s.block_size or model.config.hilda["block_size"]
    M, P, shift = model.config.hilda["mask_token_id"], len(prompt), model.config.hilda["label_shift"]
    causal = model.config.hilda.get("causal_context", False)
    blocks = -(-(P + s.max_new_tokens) // K)
    x = torch.full((blocks * K,), M)
    x[:P] = prompt
    for k in range(P // K, blocks):
        a, e, post = k * K, (k + 1) * K, 0
        while True:
            m = x[a:e] == M
            post += not m.any()
            if post > s.max_post_steps:
                break
            z = _logits(model, x, e, open_block(a, e, K, causal))[a:e]
            p, v = z.softmax(-1).max(-1)
            fill = m & (p > s.tau_mask)
            if m.any() and fill.sum() < s.minimum:
                fill = torch.zeros_like(m)
                fill[p.masked_fill(~m, -1).argsort(dim=-1, descending=True, stable=True)[: min(s.minimum, int(m.sum()))]] = True
            edit = ~m & (torch.arange(a, e) >= P) & (p > s.tau_edit) & (v != x[a:e])
            x[a:e] = torch.where(fill | edit, v, x[a:e])
            if not m.any() and not edit.any():
                break
        ended = torch.isin(x[P:e], torch.tensor([model.config.eos_token_id])).any()
        if (s.stop_at_eos and ended) or k == blocks - 1:
            break
        if s.look_back:
            start = max(e - (s.look_back + 1) * K, 0)
            position = torch.arange(e)
            window = (position[:, None] >= start) | open_block(e, e, K, causal)
            z = _logits(model, x, e, window)[:a]
            p, v = z.softmax(-1).max(-1)
            edit = (position[:a] >= max(P, start + shift)) & (p > s.tau_edit) & (v != x[:a])
            x[:a] = torch.where(edit, v, x[:a])
    out = x[P:P + s.max_new_tokens]
    if not s.stop_at_eos or not (out == model.config.eos_token_id).any():
        return out
    return out[: int((out == model.config.eos_token_id).nonzero()[0]) + 1]
