"""Conversion, SFT and their AR twins on the Hugging Face Trainer.

Block size 1 with shifted labels is the AR objective: the parent and every twin train through the same code, at the same
tokens and steps. Entry points: `train` (resumes, saves, returns the log), `DiffusionTrainer`.
"""

import contextlib
import math
import os
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

from hildalib import HildaError, adapters, backbones, tables
from hildalib.attention import TILED
from hildalib.devices import bf16_fault, start_peak
from hildalib.gated import CleanReading, checkpointing, is_gated, read_clean
from hildalib.layout import Layout, clean_logits, target_logits, target_scores, validate
from hildalib.noise import Noised, own_drafts
from hildalib.objective import combine, correct_entropy, predictable, target_counts, top_k_kl
from hildalib.recipe import NoisedRows, Recipe, collate, noised_of
from hildalib.runs import claim, fingerprint, load_finished, publish, resumable
from hildalib.trainlog import ProgressLines, Sums
from hildalib.wsd import merge_checkpoints


class DiffusionTrainer(Trainer):
    """Hugging Face Trainer with the block-diffusion objective: its checkpoints, resume, accumulation and accelerate."""

    def __init__(self, *args, recipe: Recipe, hilda: dict, parent=None, reference=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.recipe, self.hilda, self.parent, self.reference = recipe, hilda, parent, reference
        self.loss_is_scaled_for_ga = True  # losses are divided by the target counts of the whole step
        self._sums = Sums()

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)  # row n carries its own shuffle, block size and noise

    def _issue_warnings_after_load(self, load_result):
        tied = {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()  # stored once, so not missing
        super()._issue_warnings_after_load(load_result._replace(missing_keys=[key for key in load_result.missing_keys if key not in tied]))

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if "8bit" in self.args.optim:  # the Trainer keeps embeddings in 32 bits, at V = 151,936 most of the state; block-wise 8 bits need no such care
            from bitsandbytes.optim import GlobalOptimManager

            GlobalOptimManager.get_instance().module_weight_config_triple.clear()
        return optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one step, and the target counts of all of them over all processes."""
        samples = [batch for _, batch in zip(range(num_batches), epoch_iterator)]
        counts: dict[str, Tensor] = {}
        for batch in samples:
            for name, count in target_counts(self._settled(batch), self.recipe.weighting).items():
                counts[name] = counts.get(name, 0) + count.to(device)
            counts["context"] = counts.get("context", 0) + self._context(batch).sum().to(device)
        if self.args.world_size > 1:
            counts = {name: self.accelerator.gather(count[None]).sum() for name, count in counts.items()}
        return samples, counts

    @staticmethod
    def _settled(batch: dict) -> Noised:
        """The noise with drafted positions already counted as edit targets; their ids come later."""
        noised = noised_of(batch)
        return own_drafts(noised, batch["fill"].flatten(0, 1), lambda noisy: noisy)

    @staticmethod
    def _context(batch: dict) -> Tensor:
        """(B, L) bool, True = the clean half is to predict it as an AR model does."""
        return predictable(batch["maskable"][:, 0], batch["doc_ids"], True)

    def _noisy_embeddings(self, model, layout: Layout, first: int) -> Tensor | None:
        """Embeddings with fading Gaussian noise on [MASK] at the start (LLaDA2.0 section 7.1); None once it is over.

        first: number of the first layout row in the whole run; the noise of a row depends on nothing else.
        """
        step, recipe = self.state.global_step, self.recipe
        if step >= recipe.mask_noise_steps:
            return None
        embeds = self.accelerator.unwrap_model(model).get_input_embeddings()(layout.ids)
        start = recipe.seed * 1_000_003 + first + 2**40  # another stream than the one that draws the masks of the row
        generators = [torch.Generator().manual_seed((start + row) % 2**63) for row in range(len(embeds))]
        noise = torch.stack([torch.randn(embeds.shape[1:], generator=generator) for generator in generators])
        noise *= recipe.mask_noise * (1 - step / recipe.mask_noise_steps)
        return embeds + noise.to(embeds) * (layout.ids == self.hilda["mask_token_id"])[..., None]

    def _carried(self, model, batch: dict, noised: Noised, layout: Layout, embeds: Tensor | None) -> Tensor | None:
        """Input embeddings whose masks carry what the frozen reference expects there, in the rows that are to (RCD, Algorithm 1);
        `embeds` where there are none."""
        rows = batch["carries"]
        if layout.autoregressive or not rows.any():
            return embeds
        mask_id = self.hilda["mask_token_id"]
        masks = (noised.noisy_ids == mask_id).view(batch["noisy_ids"].shape)[rows]
        before = self._layout(batch, noised.noisy_ids.masked_fill(batch["unseen"].flatten(0, 1), mask_id), rows)
        with torch.no_grad():
            logits = target_logits(self.reference, before, masks)
        return layout.carry(model, logits, rows, embeds)

    @torch.no_grad()
    def _draft(self, model, batch: dict, noised: Noised, reading: CleanReading | None) -> Noised:
        """Masks marked `fill` get the model's argmax (multi-turn forward); only rows with such masks are run."""
        batch_size, copies, length = batch["fill"].shape
        rows = batch["fill"].any(-1).any(-1)
        if self.is_fsdp_enabled and self.accelerator.gather(rows.any()[None]).any():
            rows = torch.ones_like(rows)  # a forward gathers the weights of all processes, so all of them run it or none
        if not rows.any():
            return noised
        fill = batch["fill"][rows]
        read = None if reading is None else reading.of(rows)

        def predict(noisy: Tensor) -> Tensor:
            canvas = noisy.view(batch_size, copies, length).clone()
            drafted = canvas[rows]
            drafted[fill] = target_scores(model, self._layout(batch, noisy, rows), fill, lambda logits, _: logits.argmax(-1), self.recipe.head_rows, reading=read)
            canvas[rows] = drafted
            return canvas.flatten(0, 1)

        return own_drafts(noised, batch["fill"].flatten(0, 1), predict, self.recipe.draft_turns)

    @torch.no_grad()
    def _teacher(self, batch: dict, targets: Tensor, reading: CleanReading | None) -> tuple[Tensor, Tensor]:
        """The frozen parent's top-k next-token (log probabilities, ids), each (n, k), for targets (B, C, L); a gated model carries its own."""
        def top(logits: Tensor, _=None) -> Tensor:
            best, ids = logits.topk(min(self.recipe.kl_top_k, logits.shape[-1]), dim=-1)
            return torch.cat([best - logits.logsumexp(-1, keepdim=True), ids.float()], -1)  # below 2^24 an id is exact in float32

        if reading is None:
            layout = Layout.build(batch["input_ids"], targets, batch["doc_ids"], 1, True)  # size 1, shifted: an AR forward
            with contextlib.nullcontext() if self.parent else self.model.disable_adapter():  # an adapter's base is its parent
                found = target_scores(self.parent or self.model, layout, targets, top, self.recipe.head_rows)
        else:
            row, _, position = targets.nonzero(as_tuple=True)
            found = top(clean_logits(self.model, reading, row, position - 1))
        logp, ids = found.chunk(2, -1)
        return logp, ids.long()

    def _scorer(self, labels: Tensor, told: Tensor | None, teacher: tuple[Tensor, Tensor] | None):
        """For `target_scores`: columns nats of the label; the parent's KL of rows `told` (n,), 0 elsewhere; CAP's entropy and right."""
        if told is not None:
            teacher = tuple(torch.zeros(len(labels), part.shape[1], dtype=part.dtype, device=part.device).masked_scatter(told[:, None], part) for part in teacher)

        def score(logits: Tensor, rows: slice) -> Tensor:
            wanted = labels[rows, None] if told is None else torch.cat([labels[rows, None], teacher[1][rows]], 1)
            picked = logits.log_softmax(-1).gather(1, wanted)  # once for label and parent: 630 rows of 49k tokens take an eighth of a second a pass
            columns = [-picked[:, 0]]
            if told is not None:
                columns.append(torch.where(told[rows], top_k_kl(picked[:, 1:], teacher[0][rows]), 0.0))
            if self.recipe.cap_weight:
                columns += [column.to(columns[0]) for column in correct_entropy(logits, labels[rows])]
            return torch.stack(columns, -1)

        return score

    def _layout(self, batch: dict, noisy_ids: Tensor, rows=slice(None)) -> Layout:
        """Of noisy_ids (B * C, L); rows: of those rows of the batch alone."""
        return Layout.build(batch["input_ids"][rows], noisy_ids.view(batch["noisy_ids"].shape)[rows], batch["doc_ids"][rows], batch["block_size"],
                            self.recipe.label_shift, self.recipe.causal_context, self.recipe.pipeline, stream=self.recipe.tail_slack > 0)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():  # the Trainer casts what goes through the whole model; the clean half and the teacher's head do not
            return self._loss(model, inputs, return_outputs, num_items_in_batch)

    def _loss(self, model, inputs, return_outputs, num_items_in_batch):
        recipe, shape = self.recipe, inputs["noisy_ids"].shape
        reading = None if recipe.head_rows else read_clean(model, self._layout(inputs, inputs["noisy_ids"]))
        noised = self._draft(model, inputs, noised_of(inputs), reading) if recipe.draft_share else noised_of(inputs)
        layout = self._layout(inputs, noised.noisy_ids)
        targets = noised.mask_targets | noised.edit_targets | (noised.keep_targets if recipe.keep_weight or recipe.tail_slack else False)
        context = self._context(inputs) if recipe.context_weight and layout.clean is not None else None
        embeds = self._noisy_embeddings(model, layout, inputs["row"] * len(layout.ids) // shape[0])
        embeds = self._carried(model, inputs, noised, layout, embeds)
        hits, labels = int(targets.sum()), inputs["input_ids"].repeat_interleave(shape[1], 0)[targets]
        labels = labels if context is None else torch.cat([labels, inputs["input_ids"][context]])
        told = teacher = None
        if recipe.kl_weight:
            spots = predictable(inputs["maskable"].flatten(0, 1), inputs["doc_ids"].repeat_interleave(shape[1], 0), True)  # the parent is shifted
            spots &= noised.mask_targets
            told, teacher = F.pad(spots[targets], (0, len(labels) - hits)), self._teacher(inputs, spots.view(shape), reading)
        scores = target_scores(model, layout, targets.view(shape), self._scorer(labels, told, teacher), recipe.head_rows, embeds, context, reading)
        nll, token_loss = scores[:hits, 0], scores[:hits, 0]
        if told is not None:
            kl, token_loss = scores[:hits, 1], torch.where(told[:hits], (1 - recipe.kl_weight) * nll + recipe.kl_weight * scores[:hits, 1], nll)
            self._sums.add("kl", kl.detach().sum().item(), told.sum().item())
        grid = torch.zeros(targets.shape, device=nll.device).masked_scatter(targets, token_loss)
        losses = combine(grid, noised, weighting=recipe.weighting, edit_weight=recipe.edit_weight, keep_weight=recipe.keep_weight, counts=num_items_in_batch)
        total, processes = losses.total, self.args.world_size
        if context is not None:
            next_token = scores[hits:, 0].sum()
            total = total + recipe.context_weight * next_token / (num_items_in_batch["context"] if num_items_in_batch else context.sum()).clamp(min=1)
            self._sums.add("context", next_token.item(), len(scores) - hits)
        if recipe.cap_weight:
            entropy, right = (scores[:hits, column][noised.mask_targets[targets]] for column in (-2, -1))
            total = total + recipe.cap_weight * entropy.sum() / right.sum().clamp(min=1) / (self.args.gradient_accumulation_steps * processes)
        if not torch.isfinite(total):
            raise HildaError(f"loss is {total.item()} at step {self.state.global_step}, block size {inputs['block_size']}, row {inputs['row']}: "
                             f"lower `lr`, raise `low` (1/t weighting), or look at that row's text; checkpoints before it are kept")
        self._sums.watch(noised, targets, nll.detach(), inputs["input_ids"].numel())
        total = total * processes  # DDP and FSDP average gradients; the counts are already global
        return (total, scores) if return_outputs else total

    def log(self, logs: dict, *args, **kwargs) -> None:
        """Adds the means since the last log over all processes: m2t, t2t, keep, context (next token, clean half), m2t by t bucket (nats), kl, block
        size, stage, speed, memory."""
        if "loss" in logs:
            schedule, step = self.recipe.schedule, max(self.state.global_step - 1, 0)
            logs |= self._sums.means(self.accelerator) | {"block_size": schedule.block_size(step), "stage": schedule.stage(step)}
        super().log(logs, *args, **kwargs)


def _arguments(recipe: Recipe, folder: Path, device: torch.device) -> TrainingArguments:
    log_every, (batch_size, accumulate) = min(recipe.log_every, recipe.schedule.total_steps), recipe.share(processes())
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulate,
        max_steps=recipe.schedule.total_steps, learning_rate=recipe.adapter_lr if recipe.adapter_rank else recipe.lr, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.lr_floor}, warmup_steps=recipe.warmup_steps, weight_decay=recipe.weight_decay,
        optim=recipe.optimizer, adam_beta2=0.95,  # 0.999 averages over more steps than a short run has
        logging_first_step=True,
        logging_steps=math.gcd(log_every, recipe.save_every) if recipe.save_every else log_every,  # a log never spans a checkpoint: a resumed log is the same
        save_strategy="steps" if recipe.save_every else "no", save_steps=recipe.save_every or 1,
        save_total_limit=None if recipe.merge_top_k else 2, report_to=[], disable_tqdm=True, remove_unused_columns=False,
        seed=recipe.seed, use_cpu=device.type == "cpu", bf16=recipe.precision == "bfloat16", dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False, ddp_broadcast_buffers=False)  # all are used; buffers are constants, and not every process runs a drafting forward
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a second card is for a second process: DataParallel would split rows that belong together
    return arguments


def processes() -> int:
    """How many processes a launcher (`accelerate launch`, `torchrun`) has started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def lean(model, recipe: Recipe):
    """Within, a step copies and casts no more of the weights than it must: `adapters.halved`, `tables.in_place`."""
    with contextlib.ExitStack() as stack:
        if recipe.precision == "bfloat16" and hasattr(model, "peft_config"):
            stack.enter_context(adapters.halved(model))
        if recipe.head_rows and processes() == 1:
            stack.enter_context(tables.in_place(model))
        yield


def _whole(model):
    """A plain copy of a model whose weights are sharded over the processes (FSDP2), all of which must call this."""
    state = {name: (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu() for name, value in model.state_dict().items()}
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    return plain


def _merge_best(model, recipe: Recipe, folder: Path, validation: dict[str, Tensor]) -> None:
    """Loads the mean of the best checkpoints that were saved at the working block size."""
    schedule, losses = recipe.schedule, {}
    working = schedule.block_size(schedule.total_steps)
    for checkpoint in folder.glob("checkpoint-*"):
        if schedule.block_size(int(checkpoint.name.split("-")[1]) - 1) == working:
            file = checkpoint / "model.safetensors"
            model.load_state_dict(load_file(file), strict=False)  # a tied head is stored once
            losses[file] = sum(validate(model, validation, block_size=working, label_shift=recipe.label_shift,
                                        causal_context=recipe.causal_context).values())
    best = sorted(losses, key=losses.get)[:recipe.merge_top_k]
    model.load_state_dict(merge_checkpoints(best), strict=False)


def _check_gated(recipe: Recipe) -> None:
    """Raises HildaError for a recipe that asks something of clean rows, which the frozen parent reads."""
    if not recipe.causal_context:
        raise HildaError("adapters on noisy rows need causal_context: true, for the frozen parent reads the clean half as it always did")
    if recipe.context_weight or recipe.ar_share or recipe.schedule.rungs()[0][0] == 1 and recipe.label_shift and recipe.schedule.rungs()[0][1]:
        raise HildaError("adapters on noisy rows cannot learn from clean ones; set context_weight and ar_share to 0 and leave block size 1 out of the schedule")


def train(model, tokenizer, rows: dict[str, Tensor], recipe: Recipe, folder: Path, *, parent=None, reference=None,
          validation: dict[str, Tensor] | None = None, title: str = "train"):
    """Trains `model` in place by `recipe`, saves it as folder/model and returns the log as a DataFrame (one row a log step).

    rows: {"input_ids" long, "doc_ids" long, "maskable" bool}, each (N, L). parent: the frozen AR model, needed when
    recipe.kl_weight > 0 (a model with adapters is its own teacher: the parent under them). reference: the frozen dLLM of the same
    vocabulary whose distributions masks carry, needed when recipe.residual_share > 0. validation: rows that choose the checkpoints to
    merge, needed when recipe.merge_top_k > 0. Under `accelerate launch` or `torchrun` the processes share the rows of each step (`Recipe.share`):
    the run, its weights and its log are those of one process but for the order of sums, and its checkpoints continue in any number of
    processes. An interrupted run with the same recipe, rows and weights continues from its last checkpoint; a finished one is loaded.
    Raises HildaError on an impossible recipe or a loss that is not a number.
    """
    import pandas as pd

    if is_gated(model):
        _check_gated(recipe)
    if recipe.kl_weight and parent is None and not hasattr(model, "peft_config"):
        raise HildaError("kl_weight > 0 needs the frozen AR parent; pass parent=... or set kl_weight to 0")
    if recipe.residual_share and reference is None:
        raise HildaError("residual_share > 0 needs the frozen model that supplies the residual; pass reference=... or set residual_share to 0")
    if recipe.merge_top_k and (validation is None or not recipe.save_every):
        raise HildaError("merge_top_k > 0 needs validation rows and save_every > 0, or there is nothing to choose from")
    if recipe.merge_top_k and hasattr(model, "peft_config"):
        raise HildaError("merge_top_k averages whole models, and here adapters are trained; set merge_top_k to 0")
    if recipe.precision == "bfloat16" and (fault := bf16_fault(model.device)):
        if model.device.type == "cuda":
            raise HildaError(f"{fault}; train with --set precision=float32, or add +pascal to the profile")
        print(f"{fault}: with precision = float32 (--set precision=float32) the same steps are faster here", flush=True)
    arguments, log = _arguments(recipe, folder / "checkpoints", model.device), folder / "log.csv"
    if arguments.process_index == 0:
        claim(folder, fingerprint(model, rows, recipe))
    with arguments.main_process_first(local=False):  # a barrier: the folder is ready before anyone looks into it
        finished = log.exists()  # written last, after the model
    if finished:
        load_finished(model, folder / "model")
        model.eval()  # as after training
        return pd.read_csv(log)
    ids = {"mask_token_id": model.config.hilda["mask_token_id"], "forbidden_ids": backbones.forbidden_ids(model, tokenizer),
           "vocab_size": model.get_input_embeddings().weight.shape[0]}
    trainer = DiffusionTrainer(model=model, args=arguments, train_dataset=NoisedRows(rows, recipe, ids), data_collator=collate,
                               recipe=recipe, hilda=model.config.hilda, parent=parent, reference=reference)
    if trainer.is_fsdp_enabled and (recipe.merge_top_k or recipe.residual_share or recipe.mask_noise_steps or hasattr(model, "peft_config")):
        raise HildaError("with sharded weights (FSDP) there is no merge_top_k, residual, mask_noise or adapter; set these to 0, or train without FSDP")
    start_peak()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressLines(title))
    model.train()
    for tiled in filter(None, (model, parent, reference)):
        tiled.set_attn_implementation(TILED)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(checkpointing(model))
    with arguments.main_process_first(local=False):  # what is damaged is removed once
        checkpoint = resumable(folder / "checkpoints")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")  # each save of an adapter looks for its base's config.json on the hub
        with lean(model, recipe):
            trainer.train(resume_from_checkpoint=checkpoint)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()
    for tiled in filter(None, (model, parent, reference)):
        tiled.set_attn_implementation("sdpa")
    if recipe.merge_top_k:
        _merge_best(model, recipe, folder / "checkpoints", validation)
    sizes = [size for size, steps in recipe.schedule.rungs() if steps]
    model.config.hilda = model.config.hilda | {"block_size": sizes[-1], "label_shift": recipe.label_shift,
                                                      "causal_context": recipe.causal_context, "stage": recipe.stage} | (
        {"causal_blocks": True} if recipe.tail_slack else {})
    history = pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry])
    history = history[sorted(history.columns)]  # as a checkpoint gives its log back: a resumed run's is the same
    whole = _whole(model) if trainer.is_fsdp_enabled else model
    if trainer.is_world_process_zero():
        publish(whole, tokenizer, history, folder)
    trainer.accelerator.wait_for_everyone()
    return history
