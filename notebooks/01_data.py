# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: notebooks///ipynb,notebooks///py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · Data
#
# **Question.** What does the model read, where did it come from, and how does text become rows that a block-diffusion model can be trained on?
#
# **Needs.** Nothing. Real text is taken from the folder `HILDA_DATA` if it is set, then from the Hugging Face hub; the procedural tasks are always there.
#
# **Time.** Smoke: 15 seconds. Profile nano: about 20 seconds on two cores. Profile smol: about a minute.
#
# **Outputs.** Token shards and packed rows for notebooks 02 and 03 (`outputs/<profile>/01_data/checkpoints`), `sources.csv`, three figures.

# %% tags=["parameters"]
profile = "smoke"
seed = 0
model = "nano"
sources = ["arithmetic"]
documents = 300
eval_documents = 60
length = 64
block_size = 8
whole_documents = True
sft_sources = ["arithmetic"]
sft_documents = 120
sft_eval_documents = 60

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers

from hildalib import artefacts, attention, backbones, corpora, figures, packing, pairs, paths

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
NOTEBOOK = "01_data"
tokenizer = backbones.load(model)[1]

# %% [markdown]
# ## Where the text comes from
#
# A corpus is asked for by name. The answer carries its provenance: origin, licence, number of rows, checksum or revision. Nothing below is shown without it.

# %%
corpora_by_split = {split: [corpora.load(name, split=split, limit=limit, seed=seed) for name in sources]
                    for split, limit in (("train", documents), ("validation", eval_documents))}
provenance = pd.DataFrame([corpora.provenance(corpus)
                           for parts in corpora_by_split.values() for corpus in parts])
provenance[["source", "split", "origin", "rows", "licence"]]

# %%
for parts in corpora_by_split.values():
    for corpus in parts:
        print(f"{corpora.provenance(corpus)['source']}: {corpus[0]['text'][:160]!r}")

# %% [markdown]
# ## From text to shards
#
# Texts are tokenised in a stream into memory-mapped shards: bounded memory whatever the size, and a killed run goes on where it stopped. A document and its twin are always on the same side of the train/validation split.

# %%
shards = {}
for split, parts in corpora_by_split.items():
    folder = paths.checkpoint_dir(profile, NOTEBOOK, seed) / f"shards-{split}"
    texts = (row["text"] for corpus in parts for row in corpus)
    shards[split] = packing.open_shards(packing.write_shards(texts, tokenizer, folder), tokenizer)
    print(f"{split}: {len(shards[split]):,} documents, {int(shards[split].ends[-1]):,} tokens")

# %% [markdown]
# ## From shards to rows
#
# Rows have one length. Each position carries the number of its document, so that attention can be cut at document borders, and its position in the row: the block grid counts from position 0 of the row.

# %%
def packed(shards):
    if whole_documents:
        texts = (shards[i].tolist() for i in range(len(shards)))
        return packing.pack_whole(texts, length, tokenizer.eos_token_id)[0]
    rows = packing.Packed(shards, length)
    return {key: torch.stack([row[key] for row in (rows[i] for i in range(len(rows)))])
            for key in ("input_ids", "doc_ids")}


rows = {}
for split in shards:
    rows[split] = {key: value for key, value in packed(shards[split]).items() if key != "position_ids"}
    rows[split]["maskable"] = rows[split]["doc_ids"] >= 0
    artefacts.save_rows(rows[split], profile, NOTEBOOK, split, seed)
efficiency = rows["train"]["maskable"].float().mean().item()
print({split: tuple(part["input_ids"].shape) for split, part in rows.items()},
      f"{efficiency:.1%} of positions hold a token")

# %%
table = pd.DataFrame({"length": [len(shards["train"][i]) for i in range(len(shards["train"]))]})
table = table.value_counts().sort_index().rename("documents").reset_index()
origin = {"data": ", ".join(sources), "tokenizer": model, "seed": seed}
figures.save(figures.lengths(table, row_length=length, efficiency=efficiency), "01_lengths", table,
             profile=profile, seed=seed, provenance=origin)
plt.show()

# %% [markdown]
# ## The mask, drawn
#
# Block diffusion trains on a noisy copy and a clean copy of the same row at once. A noisy block sees itself and the clean blocks before it; a clean block sees clean blocks up to its own; documents never see each other. Here is the mask of the first row, as the model gets it.

# %%
first = rows["train"]["doc_ids"][:1]
mask = attention.noisy_clean(length, block_size, first)
figures.save(figures.attention(mask, length, block_size, first), "01_attention",
             pd.DataFrame(mask[0, 0].int().numpy()), profile=profile, seed=seed, provenance=origin)
plt.show()

# %% [markdown]
# ## Prompts and responses
#
# For notebook 03: pairs, each on its own run of blocks. Only the response can be noised; it ends with EOS, repeated to the block border.

# %%
for split, limit in (("train", sft_documents), ("validation", sft_eval_documents)):
    texts = [pair for name in sft_sources
             for pair in pairs.of_source(name, tokenizer, split=split, limit=limit, seed=seed + 1)]
    encoded = [tuple(tokenizer(list(pair), add_special_tokens=False)["input_ids"]) for pair in texts]
    sft_rows, left_out = pairs.pack_pairs(encoded, length, tokenizer.eos_token_id, block_size)
    artefacts.save_rows(sft_rows, profile, NOTEBOOK, f"sft-{split}", seed)
    print(f"{split}: {len(encoded):,} pairs in {len(sft_rows['input_ids']):,} rows; "
          f"{left_out} longer than {length} tokens left out; "
          f"{sft_rows['maskable'].float().mean():.0%} of positions are response")

# %%
first_pair = sft_rows["doc_ids"][0] == sft_rows["doc_ids"][0, 0]
for name, part in (("prompt", ~sft_rows["maskable"][0]), ("response", sft_rows["maskable"][0])):
    print(f"{name:8} {tokenizer.decode(sft_rows['input_ids'][0][first_pair & part])[:300]!r}")

# %%
provenance.to_csv(paths.output_dir(profile, NOTEBOOK, seed) / "sources.csv", index=False)
tokens = int(rows["train"]["maskable"].sum())
artefacts.write_metrics({"provenance": provenance.to_dict("records"),
                         "rows": {split: len(part["input_ids"]) for split, part in rows.items()},
                         "train_tokens": tokens, "packing_efficiency": efficiency}, profile, NOTEBOOK, seed)
print(f"{tokens:,} training tokens, {efficiency:.1%} packing efficiency")

# %% [markdown]
# ## What we learned
#
# Short documents waste most of a row when each has one to itself; packed, nearly every position holds a token, and the price is a mask that must know about documents. The picture of that mask is the whole idea of block diffusion: the lower right quarter is an autoregressive model that reads in blocks (or, with `causal_context` in notebook 02, token by token), the upper half is a masked model that looks back at it.
#
# Next: [02 · Conversion](02_wsd.ipynb).
