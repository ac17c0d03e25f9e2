"""Decoders: the block loop with its cache, trace and rules (`commit`, `revise`), search over its orders and tokens, and the AR twin's.

Entry points: `edit_decode`, `EditSettings`, `Compression`, `PRESETS`, `Decoded`, `ar_decode`, `generate_decode`, `self_speculate`, `order_token_search`, `explore`,
`vote`, `SearchSettings`, `Beams`, `pipeline_decode`, `PipelineSettings`, `routed_decode`, `RoutedSettings`,
`refreshed_decode`, `RefreshedSettings`, `staleness`, `Trace`.
"""

from dataclasses import replace

from hildalib import HildaError
from hildalib.decoding import commit, revise
from hildalib.decoding.autoregressive import ar_decode, generate_decode
from hildalib.decoding.compression import Compression
from hildalib.decoding.decoded import Decoded
from hildalib.decoding.edit import edit_decode
from hildalib.decoding.pipeline import PipelineSettings, pipeline_decode
from hildalib.decoding.refreshed import RefreshedSettings, refreshed_decode, staleness
from hildalib.decoding.routed import RoutedSettings, routed_decode
from hildalib.decoding.search import Beams, SearchSettings, explore, order_token_search, vote
from hildalib.decoding.settings import PRESETS, EditSettings
from hildalib.decoding.speculation import self_speculate
from hildalib.decoding.trace import Trace

__all__ = ["PRESETS", "Beams", "Compression", "Decoded", "EditSettings", "PipelineSettings", "RefreshedSettings", "RoutedSettings", "SearchSettings", "Trace",
           "ar_decode", "commit", "edit_decode", "explore", "generate_decode", "order_token_search", "pipeline_decode", "refreshed_decode", "revise",
           "routed_decode", "self_speculate", "settings_for", "staleness", "vote"]


def settings_for(mode: str, tau_mask: float | None = None, tau_edit: float | None = None, presets: dict | None = None, **changes) -> EditSettings:
    """The preset `mode` with thresholds overridden; thresholds outside [0, 1] and unknown modes are refused."""
    presets = presets or PRESETS
    if mode not in presets:
        raise HildaError(f"mode {mode!r} is unknown; use one of {', '.join(presets)}")
    for name, value in (("tau_mask", tau_mask), ("tau_edit", tau_edit)):
        if value is None:
            continue
        if not 0 <= value <= 1:
            raise HildaError(f"{name} = {value} is outside [0, 1]; thresholds are probabilities")
        changes[name] = value
    return replace(presets[mode], **changes)
