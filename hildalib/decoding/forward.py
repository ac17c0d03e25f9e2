"""One cached forward of a decode: the logits of the rows that are asked for.

A plain Llama, Qwen2 or Qwen3 goes in straight lines: the numbers of Transformers' modules, without what decoding a small model mostly pays
for: calls of modules, keys repeated for grouped heads, masks converted in each layer, rows that nobody asked for. So does a gated one, its
clean rows first (`adapters`). Any other model (of another family, quantised under its adapters) runs its own forward. Entry point: `Forward`.
"""

from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from hildalib import attention
from hildalib.decoding import adapters
from hildalib.decoding.cache import BlockCache
from hildalib.decoding.linear import linear, linears
from hildalib.gated import is_gated, noisy_rows
from hildalib.layout import selected_rows

STRAIGHT = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")  # classes of Transformers whose decoder is the one below


def is_straight(model) -> bool:
    """Whether `model` is a decoder as `Forward` writes it: of one of these classes, in evaluation, on one device, with SDPA over all positions."""
    gated = is_gated(model)
    config, name = model.config, type(model.get_base_model() if gated else model)
    return (name.__name__ in STRAIGHT and name.__module__.startswith("transformers.") and not model.training and (not gated or adapters.fits(model))
            and not hasattr(model, "_hf_hook")  # Accelerate's, which fetches weights from other devices
            and config._attn_implementation in ("sdpa", attention.TILED) and {*(getattr(config, "layer_types", None) or [])} <= {"full_attention"})


class Forward:
    """The model as a function of ids (b, Q) long, positions (b, Q) long, mask (b, 1, Q, slots) bool (True = may attend; None: all
    slots in use) and a `BlockCache` that knows the slots.

    Returns (n, V) logits of the rows wanted (n,) of the flattened (b Q), None for all of them. real (b, Q) bool: rows that are there for
    their own sake; the others only fill up the batch, and are not wanted or not asked. asked (n,) bool: the wanted rows whose logits
    matter, all of them real; the others may come out as zeros. noisy (b, Q) bool: rows on which the adapters of a gated model act, None for none
    (in straight lines the logit of [MASK], which no decoder looks at, is the parent's).
    carried (b, n, D): added to the embeddings of the first n columns.
    """

    def __init__(self, model):
        self.model, self.straight, self.gate = model, is_straight(model), None
        if not self.straight:
            return
        self.embedding = model.get_input_embeddings()
        if is_gated(model):
            self.gate, self.embedding, model = adapters.Gate(model), adapters.Gate.embedding(model), model.get_base_model()
        self.rotary, self.turns = model.model.rotary_emb, None
        self.layers = [_layer(layer, self.gate) for layer in model.model.layers]
        head = model.lm_head.token_adapter.base_layer if hasattr(model.lm_head, "token_adapter") else model.lm_head
        self.norm, self.head = _norm(model.model.norm), linear(head.weight, head.bias) if _is_plain(head) else head

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: BlockCache, wanted: Tensor | None, *, real: Tensor | None = None,
                 asked: Tensor | None = None, noisy: Tensor | None = None, carried: Tensor | None = None) -> Tensor:
        if self.straight:
            return self._straight(ids, positions, mask, cache, wanted, real, asked, carried, noisy)
        wanted = torch.arange(ids.numel(), device=ids.device) if wanted is None else wanted
        with selected_rows(self.model, wanted), noisy_rows(self.model, noisy):
            source = {"input_ids": ids} if carried is None else {"inputs_embeds": self._embedded(ids, carried)}
            return self.model(**source, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True).logits[0]

    def _straight(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: BlockCache, wanted: Tensor | None, real: Tensor | None,
                  asked: Tensor | None, carried: Tensor | None, noisy: Tensor | None) -> Tensor:
        """Rows are packed: the real ones outside attention, the asked ones in the last layer once the keys are written."""
        shape, slots, turns, rows = ids.shape, cache.index, positions.flatten(), None if real is None else real.flatten().nonzero()[:, 0]
        ends = wanted if asked is None else asked.nonzero()[:, 0] if wanted is None else wanted[asked]
        cut = last = ids.numel()
        back = turned = None
        if self.gate and noisy is not None:
            rows, cut, turned = _clean_first(rows, noisy.flatten())
            ends, last, back = (ends, cut, turned) if ends is None else _clean_first(ends, noisy.flatten())
        x, packed = self._embedded(ids, carried).flatten(0, 1), ends
        if rows is not None:
            x, turns, slots = x[rows], turns[rows], slots[rows]
            packed = None if ends is None else torch.empty(shape.numel(), dtype=torch.long, device=rows.device).index_copy_(
                0, rows, torch.arange(len(rows), device=rows.device))[ends]
        if self.gate:
            self.gate.cut = cut
        cos, sin = self._turns(x, turns, cache.slots)
        bias = None if mask is None else torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, -torch.inf)
        for number, layer in enumerate(self.layers):
            h = layer.norm(x)
            queries, keys, values = _heads(layer, layer.qkv(h), cos, sin)
            cache.note(slots, h, keys, number)
            keys, values = cache.write(slots, keys, values, number)
            if number == len(self.layers) - 1 and packed is not None:
                x, queries, rows = x[packed], queries[packed], ends
                if self.gate:
                    self.gate.cut = last
            read = _attend(_spread(queries, rows, shape), keys, values, cache.bias(bias, number, layer.heads)).transpose(1, 2).reshape(shape.numel(), -1)
            x = layer.o(read if rows is None else read[rows]).add_(x)
            gate_up = layer.gate_up(layer.norm_after(x))
            gate, up = gate_up.chunk(2, -1) if isinstance(gate_up, Tensor) else gate_up
            x = layer.down(layer.act(gate).mul_(up)).add_(x)
        logits = self.head(self.norm(x))
        logits = logits if back is None else logits[back]
        if asked is None:
            return logits
        return logits.new_zeros(asked.shape[0], logits.shape[1]).index_put_((asked,), logits)

    def _embedded(self, ids: Tensor, carried: Tensor | None) -> Tensor:
        """(b, Q, D) input embeddings of ids (b, Q), `carried` (b, n, D) added to the first n."""
        embeds = (self.embedding if self.straight else self.model.get_input_embeddings())(ids)
        return embeds if carried is None else embeds + F.pad(carried, (0, 0, 0, ids.shape[1] - carried.shape[1])).to(embeds.dtype)

    def _turns(self, x: Tensor, positions: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (n, 1, D) of positions (n,); the sine carries the sign of the half that is turned. Looked up, but where the rotation
        of a position depends on the length of the text."""
        if self.turns is None or len(self.turns) < slots:
            varies = getattr(self.rotary, "rope_type", "default") in ("dynamic", "longrope")
            at = positions[None] if varies else torch.arange(slots, device=x.device)[None]
            cos, sin = (table[0, :, None] for table in self.rotary(x, at))
            left, right = sin.chunk(2, -1)
            turns = torch.stack([cos, torch.cat([-left, right], -1)], 1)
            if varies:
                return turns.unbind(1)
            self.turns = turns
        return self.turns[positions].unbind(1)


def _clean_first(index: Tensor | None, noisy: Tensor) -> tuple[Tensor | None, int, Tensor | None]:
    """(index, clean ones, way back): index (n,) of the flattened rows, None for all, in an order that has those not `noisy` first; None for
    what there is no need of."""
    chosen = noisy if index is None else noisy[index]
    cut = len(chosen) - int(chosen.sum())
    if not chosen[:cut].any():
        return index, cut, None
    order = chosen.byte().argsort(stable=True)
    return order if index is None else index[order], cut, order.argsort()


def _layer(layer, gate: adapters.Gate | None) -> SimpleNamespace:
    """What a layer is made of, as functions; looking it up in modules is a tenth of a small forward."""
    at, mlp = layer.self_attn, layer.mlp
    parts = {"qkv": [at.q_proj, at.k_proj, at.v_proj], "o": [at.o_proj], "gate_up": [mlp.gate_proj, mlp.up_proj], "down": [mlp.down_proj]}
    sizes = [part.out_features // at.head_dim for part in (at.q_proj, at.k_proj)]
    norms = [getattr(at, name, None) for name in ("q_norm", "k_norm")]
    both = None if norms[0] is None else SimpleNamespace(weight=torch.cat([norm.weight.detach().expand(size, -1) for norm, size in zip(norms, sizes)]),
                                                         variance_epsilon=norms[0].variance_epsilon)
    return SimpleNamespace(width=at.head_dim, sizes=sizes, heads=sizes[0], act=mlp.act_fn, norm=_norm(layer.input_layernorm),
                           norm_after=_norm(layer.post_attention_layernorm), norms=[_norm(norm) for norm in norms], norm_both=_norm(both),
                           **{name: gate and gate.functions(group) or _functions(group) for name, group in parts.items()})


def _heads(layer: SimpleNamespace, qkv: Tensor | list[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (N, heads, D), normed and turned, of what the layer makes of N rows; queries and keys at once where they lie side by side."""
    if isinstance(qkv, Tensor):
        first = sum(layer.sizes)
        qkv = qkv.view(len(qkv), -1, layer.width)
        both = _rotate(layer.norm_both(qkv[:, :first]), cos, sin)
        return both[:, :layer.heads], both[:, layer.heads:], qkv[:, first:]
    queries, keys, values = (part.view(len(part), -1, layer.width) for part in qkv)
    return *(_rotate(norm(part), cos, sin) for norm, part in zip(layer.norms, (queries, keys))), values


def _functions(modules: list):
    """Linear layers that are just that and read the same rows, as one function like those of `linears`; others (quantised, with an adapter or a hook) as
    they are."""
    if all(map(_is_plain, modules)):
        return linears([module.weight for module in modules], [module.bias for module in modules])
    return modules[0] if len(modules) == 1 else lambda x: [module(x) for module in modules]


def _is_plain(module) -> bool:
    bare = type(module) is torch.nn.Linear and type(module.weight) is torch.nn.Parameter  # torchao quantises the weight inside its layer
    return bare and not module._forward_hooks and not module._forward_pre_hooks


def _norm(module):
    """RMSNorm as Transformers computes it; None: nothing is normed."""
    if module is None:
        return lambda x: x
    weight, epsilon = module.weight, module.variance_epsilon
    if weight.dtype == torch.float32:  # in less precision it would round once where Transformers does twice
        width, scale = weight.shape[-1], weight * weight.shape[-1] ** 0.5
        floor = torch.tensor((width * epsilon) ** 0.5, device=weight.device)
        # x / sqrt(mean x^2 + eps) = x sqrt(n) / hypot(|x|, sqrt(n eps)): two fused calls where torch.rms_norm takes six
        return lambda x: (x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)).mul_(scale)
    return partial(_rms, weight=weight, epsilon=epsilon)


def _rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    scale = (wide * wide).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x (N, heads, D); sin carries the sign of the half that is turned."""
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))


def _spread(part: Tensor, rows: Tensor | None, shape: torch.Size) -> Tensor:
    """(b, heads, Q, D) of part (N, heads, D), which are the `rows` (N,) of the flattened (b Q), or all of them."""
    if rows is not None:
        part = part.new_zeros(shape.numel(), *part.shape[1:]).index_copy_(0, rows, part)
    return part.view(*shape, *part.shape[1:]).transpose(1, 2)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """SDPA, queries (b, H, Q, D) over as many key heads or fewer; only on the CPU does a fused kernel take a mask and shared keys at once."""
    shape, groups = queries.shape, queries.shape[1] // keys.shape[1]
    if groups > 1 and queries.device.type != "cpu":
        keys, values, groups = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1), 1
    elif groups > 1 and queries.dtype != torch.float32:
        # heads that share a key as rows of one head: the same numbers; with a row or a block of them in a third to nine tenths of the time in bfloat16
        queries, groups = queries.reshape(shape[0], keys.shape[1], -1, shape[3]), 1
        if bias is not None:
            bias = bias.expand(-1, shape[1], -1, -1).reshape(shape[0], keys.shape[1], queries.shape[2], -1)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, enable_gqa=groups > 1).reshape(shape)
