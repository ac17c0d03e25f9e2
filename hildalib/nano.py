"""Nano: a character-level Llama from random init, small enough to train on a CPU in minutes.

Entry points: `nano` (model and tokenizer), `nano_config`, `character_tokenizer`. It is where mechanisms are compared with several seeds;
everything else treats it as any other backbone.
"""

from __future__ import annotations

import string

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hildalib import HildaError

MASK_TOKEN = "[MASK]"
CHARACTERS = "\n\t " + string.digits + string.ascii_letters + string.punctuation  # 97: printable ASCII, newline, tab


def character_tokenizer(vocabulary: str | None = None) -> PreTrainedTokenizerFast:
    """One token a character of `vocabulary` (default: printable ASCII, newline, tab), after five specials.

    Ids 0..4 are [PAD] [BOS] [EOS] [MASK] [UNK]; none is added to a text by itself. decode(encode(s)) == s for every s over
    the vocabulary that spells no special token; any other character becomes [UNK].
    """
    specials = ["[PAD]", "[BOS]", "[EOS]", MASK_TOKEN, "[UNK]"]
    symbols = specials + list(dict.fromkeys(vocabulary or CHARACTERS))
    core = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]",
                                   mask_token=MASK_TOKEN, unk_token="[UNK]", clean_up_tokenization_spaces=False)


def nano_config(hidden: int = 128, layers: int = 4, heads: int = 4, *, vocab_size: int, max_length: int = 512, **ids) -> LlamaConfig:
    """Llama configuration of a nano model; the feed-forward width is 8/3 of `hidden` (SwiGLU parity) up to a multiple of 64."""
    return LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
                       intermediate_size=-(-8 * hidden // (3 * 64)) * 64, vocab_size=vocab_size, tie_word_embeddings=True,
                       max_position_embeddings=max_length, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                       attn_implementation="sdpa", **ids)


def nano(hidden: int = 128, layers: int = 4, heads: int = 4, vocabulary: str | None = None, seed: int = 0, *,
         max_length: int = 512) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A randomly initialised character-level Llama (float32, CPU) and its tokenizer; the same `seed` gives the same weights.

    The defaults have 866,176 parameters (`model.num_parameters()`). Raises HildaError if the widths do not fit together."""
    if hidden % heads or (hidden // heads) % 2:
        raise HildaError(f"hidden={hidden} does not split into {heads} heads of even width (rotary positions turn pairs); change hidden or heads")
    tokenizer = character_tokenizer(vocabulary)
    config = nano_config(hidden, layers, heads, vocab_size=len(tokenizer), max_length=max_length,
                         pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.config.hilda = {"mask_token_id": tokenizer.mask_token_id, "block_size": None, "label_shift": True, "causal_context": False, "stage": "ar",
                          "parent": "nano", "weights": f"random init, seed {seed}"}
    return model.eval(), tokenizer
