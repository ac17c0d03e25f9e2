"""Memory and operations of a training step, byte by byte, without weights: the step itself is run on tensors that have a shape and no content.

Every allocation that PyTorch's operators make is seen, so nothing is estimated by a formula that could grow old; what kernels allocate inside
themselves is not. Entry points: `simulate` (a `Step`), `held` (of real work), `config_of`, `Shape`.
"""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM

from hildalib import backbones
from hildalib.attention import TILED
from hildalib.gated import checkpointing, gate
from hildalib.layout import Layout, target_scores
from hildalib.training import lean

PARTS = ("weights", "gradients", "optimiser state", "activations", "logits and loss", "dequantised weights", "backward workspace",
         "optimiser workspace")
GROUP, ABSMAX_GROUP = 64, 256  # weights that share a scale in NF4; scales that share one of their own (double quantisation)
BLOCK, SMALL = 256, 4096  # bitsandbytes: values that share a scale in an 8-bit state; smaller tensors keep 32-bit states


@dataclass
class Step:
    """parts: bytes at the moment of the highest total, by name of PARTS; peak: their sum; pageable: the part of the optimiser state that may
    leave the card; flops: of forward and backward, with what checkpointing runs again; trained: weights that learn."""

    parts: dict[str, int]
    forward_flops: int
    flops: int
    pageable: int = 0
    trained: int = 0

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


@dataclass
class _Watch(TorchDispatchMode):
    """Writes down when each storage is born and dies, and in which phase."""

    phase: str = "activations"
    events: list[tuple[int, int]] = field(default_factory=list)  # (storage, + or - bytes)
    born: dict[int, str] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seen: dict = field(default_factory=dict)

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops[self.phase] += flop_registry[packet](*args, **kwargs or {}, out_val=out)
        elif "scaled_dot_product_flash_attention_for_cpu" in str(packet):
            query, key = (args[1], args[2]) if "backward" in str(packet) else (args[0], args[1])
            self.flops[self.phase] += (10 if "backward" in str(packet) else 4) * query.numel() * key.shape[-2]  # products of the textbook form
        return out

    def note(self, tensor, phase: str | None = None) -> int:
        """Number of the tensor's storage, written down as born if it is new."""
        storage = tensor.untyped_storage()
        known = self.seen.get(storage._cdata)
        if known is None:
            number, size = len(self.born), storage.nbytes()
            self.seen[storage._cdata] = known = number, weakref.ref(storage, lambda _, key=storage._cdata: self._died(key, number, size))
            self.born[number] = phase or self.phase
            self.events.append((number, size))
        return known[0]

    def _died(self, key: int, number: int, size: int) -> None:
        if self.seen.get(key, (None,))[0] == number:
            del self.seen[key]
        self.events.append((number, -size))

    @contextlib.contextmanager
    def during(self, phase: str):
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def highest(self, gradients: set[int]) -> dict[str, int]:
        """Bytes by part at the highest total; storages in `gradients` ended as a gradient."""
        total, best, at = 0, -1, 0
        for index, (_, size) in enumerate(self.events):
            total += size
            if total > best:
                best, at = total, index
        alive: dict[int, int] = defaultdict(int)
        for number, size in self.events[:at + 1]:
            alive[number] += size
        parts = dict.fromkeys(PARTS, 0)
        for number, size in alive.items():
            parts["gradients" if number in gradients else self.born[number]] += size
        return parts


def held(call: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Runs `call` and returns the most bytes of new tensors that were alive at a time: the allocator's count on a GPU, on a CPU that of the
    operators' results, without what kernels allocate inside themselves."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    watch = _Watch()
    with watch:
        call()
    return sum(watch.highest(set()).values())


class _Dequantised(torch.autograd.Function):
    """The product with a 4-bit weight: it is unpacked for the forward, and again for the backward."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.unpacked(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.unpacked(grad.dtype), None


class _NF4(torch.nn.Linear):
    """Shape and bytes of a bitsandbytes Linear4bit with double quantisation. A Linear, so that adapters find it."""

    def __init__(self, linear: torch.nn.Linear, watch: _Watch):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.watch, self.bias = linear.in_features, linear.out_features, watch, None
        count = linear.weight.numel()
        groups = -(-count // GROUP)
        self.weight = torch.nn.Parameter(torch.empty(-(-count // 2), 1, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", torch.empty(groups + 4 * -(-groups // ABSMAX_GROUP), dtype=torch.uint8))

    def unpacked(self, dtype):
        with self.watch.during("dequantised weights"):
            return torch.empty(self.out_features, self.in_features, dtype=dtype)

    def forward(self, x):
        return _Dequantised.apply(x, self)


def _quantised(model, watch: _Watch) -> None:
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is torch.nn.Linear and child is not head:
                setattr(module, name, _NF4(child, watch))


def _built(config, recipe, dtype, lora_rank: int, quantised: _Watch | None):
    """The model to train, without weights. quantised: what watches its 4-bit layers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        model.config.hilda = {"mask_token_id": config.vocab_size - 1}
        if quantised is not None:
            _quantised(model, quantised)
        if recipe.adapter_rank or lora_rank:
            model = backbones.with_lora(model, recipe.adapter_rank or lora_rank)
            model = gate(model) if recipe.adapter_rank else model
    model.set_attn_implementation(TILED)
    model.train()
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(checkpointing(model))
    return model


def _claim(model) -> None:
    """Every tensor of a model on the meta device anew, in the mode and on the device that are on now; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if old is not None:
                    fresh = made.get(id(old))
                    if fresh is None:
                        fresh = torch.empty(old.shape, dtype=old.dtype)
                        fresh = torch.nn.Parameter(fresh, old.requires_grad) if isinstance(old, torch.nn.Parameter) else fresh
                    store[name] = made[id(old)] = fresh


def _states(parameter, optimizer: str) -> int:
    """Bytes of the AdamW state of one parameter."""
    count = parameter.numel()
    if "8bit" not in optimizer:
        return 2 * count * parameter.element_size()
    return 2 * (count + 4 * -(-count // BLOCK)) if count >= SMALL else 8 * count


def _unpacking(parameter, optimizer: str, device: str) -> int:
    """Bytes that the update of one parameter takes for itself: bitsandbytes has a kernel for 8-bit states on a card, not on a CPU, where both states,
    gradient, root and denominator stand in float32 (0.50), and the weight too if it is stored in less. The fused float32 update takes none."""
    return (20 + 4 * (parameter.element_size() < 4)) * parameter.numel() if "8bit" in optimizer and device == "cpu" and parameter.numel() >= SMALL else 0


def simulate(config, recipe, length: int, *, weights: str = "float32", quantize: str = "", lora_rank: int = 0, math: bool = False, device: str = "cuda",
             targets: torch.Tensor | None = None, context: torch.Tensor | None = None) -> Step:
    """The step of `recipe` (one micro-batch, forward, backward, optimiser) on a model of `config`, in its working block size.

    weights, quantize, lora_rank: as in notebook 02. math: attention that makes its scores whole (cards before Volta). targets (B, C, L), context
    (B, L): positions with a loss; None: all, which is the most that a step can have. A parent that teaches is counted as weights. Adapters on noisy
    rows without checkpoints read the clean half apart and without a gradient (`gated.read_clean`); here it is run with one, so theirs is a bound.
    """
    batch, copies, size = recipe.batch_size, recipe.copies_used, recipe.schedule.block_size(recipe.schedule.total_steps)
    targets = torch.ones(batch, copies, length, dtype=torch.bool) if targets is None else targets
    zeros = torch.zeros(batch, length, dtype=torch.long)
    layout = Layout.build(zeros, targets.long(), zeros, size, recipe.label_shift, recipe.causal_context, recipe.pipeline, stream=recipe.tail_slack > 0)
    context = torch.ones(batch, length, dtype=torch.bool) & (torch.arange(length) > 0) if context is None else context
    context = context if recipe.context_weight and layout.clean is not None else None
    rows = layout.rows(targets) if context is None else torch.cat([layout.rows(targets), layout.context_rows(context)])
    watch, dtype = _Watch(), getattr(torch, weights)
    cast = recipe.precision == "bfloat16" and weights == "float32"
    model = _built(config, recipe, dtype, lora_rank, watch if quantize else None)
    # tensors that claim to be on a CPU: on the meta device attention would choose its scores whole, and autocast would do nothing
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.device("cpu"), sdpa_kernel(SDPBackend.MATH) if math else contextlib.nullcontext():
        _claim(model)
        for tensor in (*model.parameters(), *model.buffers()):
            watch.note(tensor, "weights")
        learning = [p for p in model.parameters() if p.requires_grad]
        state = [torch.empty(_states(p, recipe.optimizer), dtype=torch.uint8) for p in learning]
        for tensor in state:
            watch.note(tensor, "optimiser state")
        if recipe.kl_weight and len(learning) == len(list(model.parameters())):
            teacher = torch.empty(sum(p.numel() * p.element_size() for p in learning), dtype=torch.uint8)
            watch.note(teacher, "weights")
        moved = [fake.from_tensor(part) for part in (layout.ids, layout.mask, layout.positions, rows)]
        tiles = layout.tiles and [(span, fake.from_tensor(keys), fake.from_tensor(part)) for span, keys, part in layout.tiles]
        noisy, labels = fake.from_tensor(layout.noisy), torch.zeros(len(rows), dtype=torch.long)
        placed = _Placed(*moved, noisy, tiles)

        def score(logits, some):
            with watch.during("logits and loss"):
                return F.cross_entropy(logits, labels[some], reduction="none")

        if recipe.accumulate > 1:  # of earlier micro-batches
            for parameter in learning:
                parameter.grad = torch.empty_like(parameter)
                watch.note(parameter.grad, "gradients")
        with watch, lean(model, recipe):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast), _marked(model, watch):
                loss = target_scores(model, placed, None, score, recipe.head_rows).sum()
            forward = sum(watch.flops.values())
            with watch.during("backward workspace"):
                loss.backward()
            del loss
            with watch.during("optimiser workspace"):
                torch.empty(max(_unpacking(p, recipe.optimizer, device) for p in learning), dtype=torch.uint8)
        gradients = {watch.note(p.grad) for p in learning if p.grad is not None}
        parts = watch.highest(gradients)
        pageable = sum(map(len, state)) if "paged" in recipe.optimizer else 0
        return Step(parts, forward, sum(watch.flops.values()), pageable, sum(p.numel() for p in learning))


@dataclass
class _Placed:
    """A Layout whose rows were found before its tensors lost their content."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    found: torch.Tensor
    noisy: torch.Tensor
    tiles: list | None
    clean = None

    def rows(self, _) -> torch.Tensor:
        return self.found


@contextlib.contextmanager
def _marked(model, watch: _Watch):
    """Within, what the output head allocates counts as logits."""
    head = getattr(model, "module", model).get_output_embeddings()
    before = head.register_forward_pre_hook(lambda *_: setattr(watch, "phase", "logits and loss"), prepend=True)
    after = head.register_forward_hook(lambda *_: setattr(watch, "phase", "activations"))
    try:
        yield
    finally:
        before.remove()
        after.remove()
