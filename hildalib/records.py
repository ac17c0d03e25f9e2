"""Parameter records of the notebooks: each parameter declared once, with its type, smoke default, help, and bounds or choices.

Entry points: `RECORDS` (notebook -> record), `field`, `notebook`, `SMOKE`. To add a parameter write one line in a record, e.g.
`lr: float = field(1e-3, "peak learning rate", low=0)`, then the same name and default in the notebook's parameters cell and a value in each
params/<profile>/<notebook>.yaml; `params` checks that they agree.
"""

import copy
import dataclasses
from collections.abc import Iterable

from hildalib.values import Pairs

SMOKE = "smoke"  # the notebooks' own defaults; the one profile without a folder of YAML files
RECORDS: dict[str, type] = {}


def field(default, help: str, *, low: float | None = None, high: float | None = None, choices: Iterable | None = None):
    """A parameter with its smoke default; bounds are inclusive, and bounds and choices hold for each element of a list."""
    rules = {"help": help, "low": low, "high": high, "choices": tuple(choices) if choices is not None else None}
    return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=rules)


def notebook(name: str):
    """Class decorator: a frozen record of the parameters of notebook `name`."""
    def register(cls: type) -> type:
        RECORDS[name] = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        return RECORDS[name]
    return register


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    profile: str = field(SMOKE, "name of the parameter set")
    seed: int = field(0, "seed of everything random", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Parameters shared by the notebooks that train; hildalib.recipe.Recipe explains each."""

    batch_size: int = field(8, "rows in a micro-batch", low=1)
    accumulate: int = field(1, "micro-batches in an optimiser step", low=1)
    lr: float = field(1e-3, "peak learning rate", low=0)
    weighting: str = field("mean", "M2T weight", choices=("mean", "1/t"))
    low: float = field(0.0, "lowest mask rate", low=0, high=1)
    high: float = field(1.0, "highest mask rate", low=0, high=1)
    full_share: float = field(0.1, "share of blocks masked completely", low=0, high=1)
    suffix_share: float = field(0.0, "share of blocks whose last positions are masked", low=0, high=1)
    complementary: bool = field(False, "train on each mask and on its complement")
    edit_rate: float = field(0.1, "share of visible tokens replaced at random (T2T)", low=0, high=1)
    edit_weight: float = field(0.5, "weight of the T2T loss", low=0)
    keep_weight: float = field(0.1, "weight of the loss on untouched visible tokens", low=0)
    draft_share: float = field(0.5, "share of rows that carry the model's own drafts", low=0, high=1)
    draft_turns: int = field(1, "no-gradient turns that write a draft", low=1)
    ar_share: float = field(0.1, "share of steps at block size 1", low=0, high=1)
    kl_weight: float = field(0.5, "share of the parent's distribution in the M2T label", low=0, high=1)
    kl_top_k: int = field(16, "tokens kept of the parent's distribution", low=1)
    optimizer: str = field("adamw_torch_fused", "a Trainer optimizer", choices=("adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit"))
    precision: str = field("float32", "arithmetic of the forward", choices=("float32", "bfloat16"))
    gradient_checkpointing: bool = field(False, "trade time for memory")
    save_every: int = field(0, "steps between resumable checkpoints, 0 for none", low=0)
    arms: list[str] = field(["dLLM", "no T2T", "AR twin"], "what is trained; hildalib.recipe.ARMS")


@notebook("01_data")
class Data(Common):
    model: str = field("nano", "backbone whose tokenizer is used")
    sources: list[str] = field(["arithmetic"], "names of the text and task sources")
    documents: int = field(300, "training documents drawn from each source", low=1)
    eval_documents: int = field(60, "validation documents drawn from each source", low=1)
    length: int = field(64, "tokens in a packed row", low=2)
    block_size: int = field(8, "tokens in a block of the diffusion grid", low=1)
    whole_documents: bool = field(True, "never split a document over rows")
    sft_sources: list[str] = field(["arithmetic"], "sources of prompt-response pairs")
    sft_documents: int = field(120, "training pairs drawn from each source", low=1)
    sft_eval_documents: int = field(60, "validation pairs drawn from each source", low=1)


@notebook("02_wsd")
class Wsd(Training, Common):
    model: str = field("nano", "backbone to convert: nano, smollm2-135m, a folder or a hub id")
    hidden: int = field(32, "width of nano", low=8)
    layers: int = field(2, "layers of nano", low=1)
    parent_steps: int = field(30, "optimiser steps that train nano as an AR model", low=1)
    parent_batch: int = field(8, "rows a step of the parent's training", low=1)
    parent_lr: float = field(0.003, "peak learning rate of the parent's training", low=0)
    lr: float = field(0.002, "peak learning rate", low=0)
    warmup: Pairs = field([[1, 2], [4, 6]], "[[block size, steps], ...] up from block size 1")
    stable: list[int] = field([64, 0], "[block size, steps] of the full-sequence stage; 0 steps leave it out")
    decay: Pairs = field([[8, 12]], "[[block size, steps], ...] down to the working size")
    label_shift: bool = field(True, "predict position i from row i - 1, as the parent does")
    causal_context: bool = field(True, "closed blocks attend causally, as in the parent")
    context_weight: float = field(1.0, "weight of the next-token loss on a causal context", low=0)
    copies: int = field(1, "noisy copies that share one clean copy", low=1)
    cap_weight: float = field(0.0, "weight of the confidence-aware loss (CAP)", low=0)
    adapter_rank: int = field(0, "rank of adapters on noisy rows over the frozen parent; 0 trains every weight", low=0)
    adapter_lr: float = field(0.0, "peak learning rate of adapters", low=0)
    weights: str = field("float32", "how the weights are stored", choices=("float32", "bfloat16"))
    quantize: str = field("", "nf4: 4-bit weights, which stay frozen; empty for none", choices=("", "nf4"))
    lora_rank: int = field(0, "rank of adapters on every row, where the weights stay frozen; 0 trains every weight", low=0)
    head_rows: int = field(0, "rows of the output head worked on at a time, for large vocabularies; 0: all", low=0)
    mask_noise: float = field(0.1, "std of the noise on [MASK] embeddings at the start", low=0)
    mask_noise_steps: int = field(5, "steps until that noise has faded", low=0)
    merge_top_k: int = field(0, "best checkpoints to average at the end; 0 keeps the last weights", low=0)
    probe_task: str = field("arithmetic", "task whose validation prompts the arms answer right after conversion; empty for none")
    probe_items: int = field(16, "prompts a pair of thresholds", low=1)
    probe_masks: list[float] = field([0.5], "thresholds for writing a token", low=0, high=1)
    probe_edits: list[float] = field([0.5, 1.0], "thresholds for editing a token; 1 never edits", low=0, high=1)
    probe_tokens: int = field(32, "tokens of an answer", low=1)


@notebook("03_sft")
class Sft(Training, Common):
    block_size: int = field(8, "tokens in a block; that of 01_data", low=1)
    steps: int = field(6, "optimiser steps", low=1)
    full_share: float = field(0.2, "share of blocks masked completely", low=0, high=1)
    suffix_share: float = field(0.0, "share of blocks whose last positions are masked", low=0, high=1)
    ar_share: float = field(0.0, "share of steps at block size 1", low=0, high=1)
    context_weight: float = field(1.0, "weight of the next-token loss on a causal context", low=0)
    adapter_lr: float = field(0.0, "peak learning rate of adapters, where 02 made the dLLM of them or the twin is tuned in them", low=0)
    adapter_base: str = field("", "arm, named before theirs, over whose tuned weights such adapters learn on; empty: over the parent they had", choices=("", "AR twin"))
    twin_rank: int = field(0, "rank of adapters in which the AR twin is tuned over the untouched base of the dLLM's adapters, to be handed out; 0: every weight of 02's twin", low=0)
    weights: str = field("float32", "how the weights are stored", choices=("float32", "bfloat16"))
    head_rows: int = field(0, "rows of the output head worked on at a time, for large vocabularies; 0: all", low=0)
    kl_weight: float = field(0.0, "share of the parent's distribution in the M2T label", low=0, high=1)
    sample_task: str = field("arithmetic", "task whose prompts are answered at the end")
    sample_items: int = field(3, "how many", low=1)
    max_new_tokens: int = field(32, "tokens of an answer", low=1)
    chat: bool = field(False, "wrap prompts in the chat template")


@notebook("04_decode")
class Decode(Common):
    arm: str = field("dLLM", "model of 03_sft to decode")
    task: str = field("arithmetic", "task whose validation prompts are decoded")
    items: int = field(16, "prompts a pair of thresholds", low=1)
    batch_size: int = field(64, "prompts decoded together", low=1)
    tau_masks: list[float] = field([0.5, 0.9], "thresholds for writing a token", low=0, high=1)
    tau_edits: list[float] = field([0.0, 0.5, 1.0], "thresholds for editing a token; 1 never edits", low=0, high=1)
    max_post_steps: int = field(4, "forwards a block may spend after its last mask", low=0)
    max_new_tokens: int = field(32, "tokens of an answer", low=1)
    trace_prompts: int = field(2, "prompts whose traces the sliders show", low=1)
    chat: bool = field(False, "wrap prompts in the chat template")
    judge: str = field("", "AR model whose likelihood is the quality of open text; empty for accuracy")
    tpf_q: float = field(2.0, "tokens a forward that preset Q must reach", low=0)
    tpf_s: float = field(3.0, "tokens a forward that preset S must reach", low=0)


@notebook("05_benchmarks")
class Benchmarks(Common):
    dtype: str = field("float32", "of weights and arithmetic; in bfloat16 sums of other shapes round to other tokens now and then", choices=("float32", "bfloat16"))
    task_names: list[str] = field(["arithmetic"], "tasks; hildalib.tasks.NAMES")
    items: int = field(16, "test items a task", low=1)
    open_items: int = field(16, "test items of a task without right answers (stories)", low=1)
    tolerance: float = field(0.1, "own text that keeps drafts this many times as probable as its favourite; 1 leaves this contestant out", low=0.001, high=1)
    batch_size: int = field(64, "prompts decoded together", low=1)
    max_new_tokens: int = field(32, "tokens of an answer", low=1)
    other_arms: list[str] = field(["no T2T"], "arms of 03_sft to set beside dLLM, at equal tokens per forward")
    sweep_masks: list[float] = field([0.5, 0.9], "tau_mask values of the editing comparison", low=0, high=1)
    sweep_edits: list[float] = field([0.5, 1.0], "tau_edit values of the editing comparison", low=0, high=1)
    sweep_items: int = field(16, "test items a setting of that comparison", low=1)
    against: list[str] = field(["no T2T"], "arms of 03_sft, where they were trained, that answer beside dLLM, paired by prompt")
    against_tasks: list[str] = field(["arithmetic"], "tasks on which they do; one without right answers needs a judge")
    against_items: int = field(16, "test items of each", low=2)
    judge: str = field("", "AR model that judges open text; empty for none")
    chat: bool = field(False, "wrap prompts in the chat template")


@notebook("06_rl")
class Rl(Common):
    source: str = field("03_sft", "notebook whose dLLM and AR twin begin", choices=("02_wsd", "03_sft"))
    task: str = field("shortcuts", "task that gives demonstrations, prompts and rewards")
    start_steps: int = field(3, "optimiser steps on demonstrations of the task before RL; 0 begins with the source as it is", low=0)
    start_pairs: int = field(60, "demonstrations", low=1)
    start_length: int = field(64, "tokens of a row of demonstrations, a multiple of the block size", low=1)
    start_batch: int = field(4, "rows a step", low=1)
    start_lr: float = field(5e-4, "peak learning rate", low=0)
    methods: list[str] = field(["wd1++", "wd1++ redrawn", "wd1", "ESPO", "EBPO", "diffu-GRPO", "AGRPO", "AGRPO with edits", "REINFORCE",
                                "SFT on successes", "AR GRPO"], "what is compared, the default first; hildalib.rl.METHODS")
    wrappers: list[str] = field(["STP-inspired", "LENS-like", "R3L-like"], "other ways to sample wd1's completions; hildalib.rl.exploration.EXPLORATIONS")
    quota: int = field(2, "tokens that a forward of the rollouts, and of the setting to improve, writes: no more, no fewer", low=1)
    edit_rollouts: float = field(0.5, "tau_edit of the rollouts of AGRPO with edits and of the audit", low=0, high=1)
    max_new_tokens: int = field(24, "tokens of an answer", low=1)
    chat: bool = field(False, "wrap prompts in the chat template")
    draw: int = field(6, "training prompts whose success rate is measured", low=1)
    draw_group: int = field(4, "completions a prompt for it", low=2)
    steps: int = field(2, "RL steps a method", low=1)
    prompts: int = field(2, "prompts a step", low=1)
    group: int = field(4, "completions a prompt", low=2)
    updates: int = field(1, "gradient steps on each batch", low=1)
    samples: int = field(2, "noisy copies of an ELBO, rounds of a block that a trajectory scores; even", low=2)
    lr: float = field(1e-3, "learning rate of the first step, the same for all methods", low=0)
    lr_end: float = field(0.0, "share of it that is left at the end of a linear decay; 1 = constant", low=0, high=1)
    temperature: float = field(1.0, "of the rollouts", low=0)
    partial_credit: bool = field(False, "reward the share of a worked response that is right (arithmetic); False: its answer alone")
    micro_batch: int = field(64, "rows of a forward with gradient", low=1)
    save_every: int = field(5, "steps between resumable checkpoints", low=1)
    eval_every: int = field(1, "steps between looks at the validation prompts", low=1)
    items: int = field(8, "validation prompts", low=1)
    test_items: int = field(8, "test prompts", low=1)
    batch_size: int = field(64, "prompts decoded together", low=1)
    noise_batches: int = field(2, "batches from which the noise of a gradient is estimated", low=2)
    audit_prompts: int = field(2, "completions whose likelihood is enumerated", low=1)
    audit_copies: list[int] = field([2, 4], "noisy copies of the audited estimators; even", low=2)
    audit_draws: int = field(4, "draws of each", low=2)


@notebook("07_residual")
class Residual(Training, Common):
    steps: int = field(6, "optimiser steps of stage 2", low=1)
    full_share: float = field(0.2, "share of blocks masked completely", low=0, high=1)
    suffix_share: float = field(0.0, "share of blocks whose last positions are masked", low=0, high=1)
    ar_share: float = field(0.0, "share of steps at block size 1", low=0, high=1)
    context_weight: float = field(1.0, "weight of the next-token loss on a causal context", low=0)
    kl_weight: float = field(0.0, "share of the parent's distribution in the M2T label", low=0, high=1)
    residual_share: float = field(1.0, "share of rows whose masks carry a residual, in the arm that learns it", low=0, high=1)
    temperature: float = field(1.0, "T_res, of the entropy that weighs the residual in decoding", low=0.01)
    top_k: int = field(0, "tokens that a residual is made of in decoding; 0 for all", low=0)
    arms: list[str] = field(["residual", "no residual", "AR twin"], "what is trained; hildalib.recipe.ARMS")
    looks_rows: int = field(32, "held-out rows whose masks are looked at twice", low=1)
    task: str = field("arithmetic", "task whose prompts are answered")
    items: int = field(16, "validation prompts a pair of thresholds", low=1)
    tau_masks: list[float] = field([0.5, 0.9], "thresholds for writing a token", low=0, high=1)
    tau_edits: list[float] = field([0.5, 1.0], "thresholds for editing a token; 1 never edits", low=0, high=1)
    max_post_steps: int = field(4, "forwards a block may spend after its last mask", low=0)
    max_new_tokens: int = field(32, "tokens of an answer", low=1)
    tpf_floor: float = field(2.0, "tokens a forward that the pair used on test prompts must reach", low=0)
    test_items: int = field(16, "test prompts", low=1)
    chat: bool = field(False, "wrap prompts in the chat template")


@notebook("08_search")
class Search(Common):
    task: str = field("arithmetic", "task whose test prompts are searched")
    items: int = field(4, "test items a decoder", low=1)
    batch_size: int = field(16, "prompts decoded together, each with all its beams", low=1)
    max_new_tokens: int = field(32, "tokens of an answer", low=1)
    chat: bool = field(False, "wrap prompts in the chat template")
    tau_masks: list[float] = field([0.3, 0.9], "thresholds for writing a token, of decoding without search", low=0, high=1)
    draft: float = field(0.3, "threshold for writing a token of the careless drafts that are searched, not edited", low=0, high=1)
    temperature: float = field(1.0, "of the noise that tells children apart", low=0)
    scorers: list[str] = field(["path", "causal"], "what judges a finished block; hildalib.decoding.scorers.SCORERS")
    scorer: str = field("causal", "the one of them that goes on to the other questions")
    widths: Pairs = field([[1, 2], [2, 2]], "[[beams, children of each], ...]")
    width: list[int] = field([2, 2], "the one of them at which scorers, and searches of what is edited, are compared")
    path_beams: list[int] = field([2], "beams of the search in which every write is a branch", low=1)
    ar_beams: list[int] = field([2], "beams of the AR twin", low=1)


@notebook("09_speed")
class Speed(Common):
    task: str = field("arithmetic", "task whose test prompts are decoded")
    items: int = field(16, "prompts decoded in batches", low=1)
    single_items: int = field(4, "prompts decoded one by one", low=1)
    rounds: int = field(1, "times all contestants take turns on those", low=1)
    batch_size: int = field(64, "prompts decoded together", low=1)
    max_new_tokens: int = field(32, "tokens of an answer", low=1)
    chat: bool = field(False, "wrap prompts in the chat template")
    dtype: str = field("float32", "of weights and arithmetic; in bfloat16 sums of other shapes round to other tokens now and then", choices=("float32", "bfloat16"))
    arms: list[str] = field(["gated", "continued", "pipelined", "CARD", "full sequence"], "what is trained here; drafter too, where the dLLM is adapters")
    steps: int = field(4, "optimiser steps of each", low=1)
    train_rows: int = field(6, "rows in such a step", low=1)
    save_every: int = field(0, "steps between resumable checkpoints, 0 for none", low=0)
    answered: int = field(32, "training prompts that the twin answers for drafter", low=1)
    lr: float = field(0.001, "peak learning rate of continued, pipelined and CARD", low=0)
    rank: int = field(8, "rank of the adapter that drafts for the twin", low=1)
    adapter_lr: float = field(0.002, "peak learning rate of adapters: of gated and, where the dLLM is adapters, of drafter and the others", low=0)
    suffix_share: float = field(0.5, "share of blocks whose last positions are masked", low=0, high=1)
    full_share: float = field(0.5, "share of blocks masked completely", low=0, high=1)
    context_weight: float = field(1.0, "weight of the next-token loss on the causal context of continued and pipelined", low=0)
    kl_weight: float = field(0.5, "share of the twin's distribution in the label of the adapter", low=0, high=1)
    pipeline: int = field(4, "blocks of a group that pipelined trains on, and that are open at once", low=2)
    thresholds: list[float] = field([0.5, 0.9], "tau_mask of the plain threshold and of the models trained here", low=0, high=1)
    draft: float = field(0.5, "tau_mask of the drafts that revision rules work on", low=0, high=1)
    decoders: list[str] = field(["factor", "factor, sub-blocks", "wino + wino", "threshold + edit", "threshold + edit, look back"], "commit rules, and commit + revision rules (decoding.commit.RULES, decoding.revise.RULES), alone, with ', sub-blocks' or with ', look back'")
    search: list[int] = field([2, 2], "[beams, children of each] of order-token search; [] for none", low=1)
    routes: list[str] = field(["dynamic"], "when S2D2 lets block size 1 judge a draft: always, static, dynamic or span")
    full_length: int = field(48, "positions of the texts that full sequence is trained on, one a row", low=1)
    caches: list[str] = field(["none", "dual"], "what full sequence reads from a cache: none, prefix or dual")
    cache_thresholds: list[float] = field([0.9], "tau_mask of full sequence", low=0, high=1)
    kv: list[str] = field(["all", "int4", "zap 0.5", "random 0.5 8"], "what is kept of committed keys: all, offloaded (all, in a file), int8, int4, or a scorer (knorm, large, zap, random), the share it keeps and the newest positions it spares")
    zap_texts: int = field(16, "training texts that the linear KVzap is fitted on", low=1)
    formats: list[str] = field(["float32", "bfloat16"], "formats of the weights; hildalib.formats.FORMATS")
    sizes: list[int] = field([1, 4], "block sizes whose forwards are timed", low=1)
    batches: list[int] = field([1], "batches whose forwards are timed", low=1)
    contexts: list[int] = field([32, 64], "tokens already read by those; the first is that of all block sizes and batches", low=1)
    shape: list[int] = field([], "[hidden, layers, heads, key heads, intermediate, vocabulary] of a random Llama timed beside the model; [] for none", low=1)
