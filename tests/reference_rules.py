"""Every commit and revision rule once more, for one row, in plain loops and sets from the published descriptions; and the uncached
decoder that uses them. Positions are numbers 0..K-1, sets say who is chosen. Entry points: `step`, `decode`, `shadow_logits`.
"""

import itertools
import math

import numpy as np
import torch
from reference import _logits, embedded, open_block

from hildalib.decoding import commit, revise
from hildalib.residual import Residual


class Row:
    """What a forward says about one block; `state` lives as long as the block."""

    def __init__(self, logits, canvas, free, mask_id, state, snapshot, history, sub_block):
        self.logits, self.canvas, self.state, self.snapshot, self.history = logits.float(), canvas, state, snapshot, history
        self.p = [row.softmax(-1) for row in self.logits]
        self.token = [int(p.argmax()) for p in self.p]
        self.confidence = [float(p.max()) for p in self.p]
        self.hidden = {i for i in range(len(canvas)) if canvas[i] == mask_id}
        self.visible = {i for i in range(len(canvas)) if free[i]} - self.hidden
        self.masked = self.hidden
        if sub_block and self.hidden:
            part = min(self.hidden) // sub_block
            self.masked = {i for i in self.hidden if i // sub_block == part}


def best(among, score, count):
    return set(sorted(among, key=lambda i: (-score(i), i))[:max(int(count), 0)])


# ---- who is written -------------------------------------------------------------------------------------------------------------

def threshold(r, row):
    passed = {i for i in row.masked if row.confidence[i] > r.tau}
    return passed if len(passed) >= r.minimum else best(row.masked, row.confidence.__getitem__, r.minimum)


def quota(r, row):
    return best(row.masked, row.confidence.__getitem__, r.tokens)


def factor(r, row):
    ranked = sorted((row.confidence[i] for i in row.masked), reverse=True)
    for n in range(len(ranked), 0, -1):
        if (n + 1) * (1 - ranked[n - 1]) < r.factor:
            return best(row.masked, row.confidence.__getitem__, n)
    return set()


def entropy_bound(r, row):
    def entropy(i):
        return -sum(p * math.log(p) for p in row.p[i].tolist() if p > 0)

    order, chosen = sorted(row.masked, key=lambda i: (entropy(i), i)), set()
    for k in range(1, len(order) + 1):
        values = [entropy(i) for i in order[:k]]
        if sum(values) - max(values) <= r.gamma:
            chosen = set(order[:k])
    return chosen


def klass(r, row):
    before, now = row.state.get("p"), [p.tolist() for p in row.p]
    moves = row.state.setdefault("moves", [[] for _ in now])
    for i, p in enumerate(now):
        moves[i].append(math.inf if before is None else sum(a * math.log(a / max(b, 1e-12)) for a, b in zip(p, before[i]) if a > 0))
    row.state["p"] = now
    ready = {i for i in row.masked if row.confidence[i] > r.tau and len(moves[i]) >= r.history and max(moves[i][-r.history:]) < r.epsilon}
    return ready or best(row.masked, row.confidence.__getitem__, r.minimum)


def hierarchy(r, row):
    chosen = {i for i in row.masked if row.confidence[i] > r.tau}
    for is_mask, run in itertools.groupby(range(len(row.p)), lambda i: i in row.masked):
        top = max(run, key=lambda i: row.confidence[i])
        if is_mask and row.confidence[top] > r.low:
            chosen.add(top)
    return chosen


def credit(r, row):
    table = row.state.setdefault("credit", {})
    for key in table:
        table[key] *= r.beta
    for i in row.hidden:
        key = i, row.token[i]
        table[key] = table.get(key, 0.0) + row.confidence[i] ** r.gamma
    for i in row.hidden:
        bonus = torch.tensor([r.alpha * math.log(1 + table.get((i, v), 0.0)) for v in range(len(row.p[i]))])
        p = (row.logits[i] + bonus).softmax(-1)
        row.token[i], row.confidence[i] = int(p.argmax()), float(p.max())
    return threshold(commit.Threshold(r.tau), row)


def position_calibrated(r, row):
    def score(i):
        f = 1 / len(row.p[i]) if r.frequencies is None else float(r.frequencies[row.token[i]])
        return math.exp(-r.decay * i) * min(-row.confidence[i] * math.log(f), r.clip)

    return best(row.masked, score, r.tokens)


def saber(r, row):
    seen = [c for c in row.history if not math.isnan(c)]
    tau = sum(seen) / len(seen) if seen else 1.0
    return threshold(commit.Threshold(tau, r.minimum), row)


def wino(r, row):
    most = min(max(int(len(row.hidden) * r.share), 5), 20)
    return best({i for i in row.masked if row.confidence[i] > r.tau}, row.confidence.__getitem__, most)


# ---- who is revised -------------------------------------------------------------------------------------------------------------

def edit(r, row, filled, spent, shadow, draws):
    return {i for i in row.visible if row.token[i] != row.canvas[i] and row.confidence[i] > r.tau}


def token_to_mask(r, row, filled, spent, shadow, draws):
    doubtful = {i for i in row.visible - spent if row.p[i][row.canvas[i]] < r.tau}
    return best(doubtful, lambda i: -float(row.p[i][row.canvas[i]]), max(1, math.floor(r.share * len(row.visible))))


def _fills_the_block(r, row, filled):
    if not filled or row.hidden - filled:
        return False
    row.state["rounds"] = row.state.get("rounds", 0) + 1
    return row.state["rounds"] <= r.rounds


def snapshot(r, row, filled, spent, shadow, draws):
    if not _fills_the_block(r, row, filled):
        return set()
    written = row.visible | filled
    return best(written - spent, lambda i: -row.snapshot[i], math.floor(r.ratio * len(written)))


def ratio(r, row, filled, spent, shadow, draws):
    if not _fills_the_block(r, row, filled):
        return set()
    written, size, chosen = row.visible | filled, len(row.p), set()
    tau = float(np.quantile(np.array([row.snapshot[i] for i in written], dtype=np.float32), r.cap))
    starts = [start for start in range(0, size, r.stride) if start + r.window <= size]
    if not starts or starts[-1] + r.window < size:
        starts.append(max(size - r.window, 0))
    for start in starts:
        inside = {i for i in written if start <= i < start + r.window}
        below = sum(row.snapshot[i] < tau for i in inside)
        count = max(min(math.floor(r.target * len(inside)), below), math.ceil(r.minimum * len(inside)))
        chosen |= best(inside - spent, lambda i: -row.snapshot[i], count)
    return chosen


def wino_verifier(r, row, filled, spent, shadow, draws):
    before, row.state["wrote"] = row.state.get("wrote", 0), len(filled)
    if len(filled) <= 1 or shadow is None:
        return set()
    support = {i: float(shadow[i].float().softmax(-1)[row.canvas[i]]) for i in row.visible - spent}
    doubtful = {i for i in support if support[i] < r.tau}
    return doubtful if len(doubtful) < before else best(doubtful, lambda i: -support[i], before - 1)


def backtrack(r, row, filled, spent, shadow, draws):
    before, row.state["confidence"] = row.state.get("confidence", [0.0] * len(row.p)), list(row.confidence)
    if not row.hidden - filled:
        return set()
    count = min(max(r.least // 2, math.ceil(len(filled) / 8)), len(filled) - 1)
    return best((row.visible | filled) - spent, lambda i: before[i] - row.confidence[i], count)


def remdm(r, row, filled, spent, shadow, draws):
    if not row.visible:
        return set()
    size = len(row.visible | row.hidden)
    alpha_t, alpha_s = len(row.visible) / size, len(row.visible | filled) / size
    most = min(1.0, (1 - alpha_s) / alpha_t)
    total = sum(math.exp(-row.snapshot[i]) for i in row.visible)
    sigma = {"cap": lambda i: min(r.eta, most), "rescale": lambda i: r.eta * most, "conf": lambda i: most * math.exp(-row.snapshot[i]) / total}[r.strategy]
    return {i for i in row.visible - spent if float(draws[i]) < sigma(i)}


COMMIT = {commit.Threshold: threshold, commit.Quota: quota, commit.Factor: factor, commit.EntropyBound: entropy_bound, commit.Klass: klass,
          commit.Hierarchy: hierarchy, commit.Credit: credit, commit.PositionCalibrated: position_calibrated, commit.Saber: saber, commit.Wino: wino}
REVISE = {revise.Edit: edit, revise.TokenToMask: token_to_mask, revise.Snapshot: snapshot, revise.Ratio: ratio, revise.Wino: wino_verifier,
          revise.Saber: backtrack, revise.ReMDM: remdm}


# ---- a step and a decode --------------------------------------------------------------------------------------------------------

def step(settings, logits, canvas, free, mask_id, state, snapshot, history, remasks, shadow=None, draws=None):
    """(canvas, filled, revised) of one block after one forward; snapshot and remasks, lists of K, are brought up to date."""
    row = Row(logits, canvas, free, mask_id, state, snapshot, history, settings.sub_block)
    filled = COMMIT[type(settings.commit_rule)](settings.commit_rule, row)
    filled = filled or best(row.masked, row.confidence.__getitem__, 1)
    for i in filled:
        snapshot[i] = row.confidence[i]
    spent = {i for i in range(len(canvas)) if remasks[i] >= settings.max_remasks}
    rule = settings.revision_rule
    revised = REVISE[type(rule)](rule, row, filled, spent, shadow, draws)
    after = [row.token[i] if i in filled else canvas[i] for i in range(len(canvas))]
    for i in revised:
        after[i] = mask_id if rule.remasks else row.token[i]
        if rule.remasks:
            remasks[i] += 1
        else:
            snapshot[i] = row.confidence[i]
    return after, filled, revised


def shadow_logits(model, x, start, end, isolated, carried={}):
    """(K, V): what WINO's shadow rows say, from one uncached forward over [x_0 .. x_end | shadow] and a mask written out pair by pair."""
    M, shift, size = model.config.hilda["mask_token_id"], model.config.hilda["label_shift"], end - start
    rows = [("mask", i) for i in range(shift, size)] + [("again", i) for i in range(1, size) if shift]  # i: the position that is predicted
    ids = x[:end].tolist() + [M if kind == "mask" else int(x[start + i - 1]) for kind, i in rows]
    places = [*range(end)] + [start + i - (kind == "again") for kind, i in rows]
    sees = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    sees[:end, :end] = open_block(start, end, size, model.config.hilda.get("causal_context", False))[0, 0]
    for q, (kind, i) in enumerate(rows):
        for key in range(end):
            sees[end + q, key] = key != start + i and not (kind == "again" and key == start + i - 1)
        for key, (other, j) in enumerate(rows):
            sees[end + q, end + key] = (other == "mask" and (j == i or not isolated)) or key == q
    z = model(inputs_embeds=embedded(model, torch.tensor(ids), carried), attention_mask=sees[None, None], position_ids=torch.tensor([places]), use_cache=False).logits[0].float()
    z[:, M] = -torch.inf
    return torch.cat([z[start - 1 if start else 0][None], z[end + size - 1:]]) if shift else z[end:]


def carried_by(rule, model, logits, forwards):
    """The embedding of a mask whose distribution was softmax(logits) (V,) in the last of `forwards` forwards of its text."""
    E, mask = model.get_input_embeddings().weight, model.get_input_embeddings().weight[model.config.hilda["mask_token_id"]]
    p, q = logits.softmax(-1).tolist(), (logits / rule.temperature).softmax(-1).tolist()
    if not isinstance(rule, Residual):
        share = min(rule.start + rule.growth * (forwards - 1), rule.most)
        return mask + share * sum(chance * vector for chance, vector in zip(q, E))
    share = rule.weight * -sum(chance * math.log(chance) for chance in q if chance > 0) / math.log(len(q))
    chances = q if rule.tempered else p
    kept = sorted(range(len(p)), key=lambda v: -chances[v])[:rule.top_k or len(p)]
    expected = sum(chances[v] * E[v] for v in kept) / sum(chances[v] for v in kept)
    return (1 - share) * mask + share * expected


@torch.no_grad()
def decode(model, prompt, s, generator=None):
    """(generated ids up to and with the first EOS, forwards): uncached, one row, one block after the other."""
    K, M, P = s.block_size or model.config.hilda["block_size"], model.config.hilda["mask_token_id"], len(prompt)
    blocks, rule = -(-(P + s.max_new_tokens) // K), s.revision_rule
    causal = model.config.hilda.get("causal_context", False)
    x = torch.full((blocks * K,), M)
    x[:P] = prompt
    snapshot, remasks, forwards = [math.nan] * len(x), [0] * len(x), 0
    for k in range(P // K, blocks):
        a, e, fulls, state, carried = k * K, (k + 1) * K, 0, {}, {}
        while True:
            canvas, free = x[a:e].tolist(), [i >= P for i in range(a, e)]
            had_masks = M in canvas
            visible = any(free[i] and canvas[i] != M for i in range(K))
            shadow = shadow_logits(model, x, a, e, rule.isolated, carried) if rule.shadow and had_masks and visible else None
            z = _logits(model, x, e, open_block(a, e, K, causal), carried)[a:e]
            forwards += 1
            read = list(canvas)
            own_snapshot, own_remasks = snapshot[a:e], remasks[a:e]
            draws = torch.rand(1, K, generator=generator)[0] if generator else None
            canvas, filled, revised = step(s, z, canvas, free, M, state, own_snapshot, list(snapshot), own_remasks, shadow, draws)
            x[a:e], snapshot[a:e], remasks[a:e] = torch.tensor(canvas), own_snapshot, own_remasks
            left = [i for i in range(K) if read[i] == M and i not in filled] if s.residual else []
            carried = {a + i: carried_by(s.residual, model, z[i], forwards) for i in left}
            fulls += M not in canvas
            stable = not had_masks and not revised
            if stable or M not in canvas and fulls > (s.max_post_steps if rule.confirms else 0):
                break
        if (s.stop_at_eos and model.config.eos_token_id in x[P:e].tolist()) or k == blocks - 1:
            break
        if generator and not stable:
            torch.rand(1, K, generator=generator)  # the commit of an exhausted block is drawn for, and changes nothing
        if not s.look_back:
            forwards -= stable  # the forward that confirmed this block is the next one's first
            continue
        forwards += 2 + (not stable)  # re-read, commit again; and the commit of an exhausted block
        first, position = max(e - (s.look_back + 1) * K, 0), torch.arange(e)
        z = _logits(model, x, e, (position[:, None] >= first) | open_block(e, e, K, causal))[:a]
        p, v = z.softmax(-1).max(-1)
        for i in range(max(P, first + model.config.hilda["label_shift"]), a):
            if p[i] > s.tau_edit and v[i] != x[i]:
                x[i], snapshot[i] = v[i], float(p[i])
    out = x[P:P + s.max_new_tokens].tolist()
    return out[:out.index(model.config.eos_token_id) + 1] if s.stop_at_eos and model.config.eos_token_id in out else out, forwards
