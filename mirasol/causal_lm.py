"""A causal language model of `transformers` as the text decoder: gated cross-attention before its blocks.

Source: Flamingo (arXiv 2204.14198), section 2.2: x + tanh(gate) * cross(norm(x)), gates that start at 0, so that at
first the language model says exactly what it says alone.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mirasol.cache import Cross, Seen
from mirasol.config import Config
from mirasol.kernels.core.checks import expect, expect_int
from mirasol.layers import Attention, init_weights
from mirasol.text import lengths_of_texts
from mirasol.tokenizer import import_transformers

_KEYWORD = "mirasol_latents"  # what the language model hands from its `forward` to its blocks, with other keywords


@dataclass
class _Latents:
    """What the cross-attentions of one call look at: latents, or what a cache holds of them."""

    latents: Tensor | None  # [B, N, av_dim]
    cross: Cross | None
    lengths: Tensor | None  # int [Q]
    clip_of_text: Tensor | None  # int64 [Q]
    asked: int = 0  # how many cross-attentions have looked


@dataclass
class LMCache:
    """Keys and values of a decode: the language model's own of the text, ours of the latents.

    Attributes:
        text: the `transformers.Cache`.
        cross: what the rows look at.
        new_text: makes an empty one of `text`.
    """

    text: Any
    cross: Cross
    new_text: Callable[[], Any]

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on as a copy of row `rows[i]`, which is about the same clip."""
        self.text.reorder_cache(rows)

    def reset(self, seen: Seen, *, clip_of_text: Tensor | None = None) -> None:
        """Begin again, about other clips of the same shapes; as in `Cache.reset`, but the text's part grows anew."""
        self.cross.reset(seen, clip_of_text)
        self.text = self.new_text()


class GatedCrossAttention(nn.Module):
    """x [Q, L, dim] -> x + tanh(gate) * attention(norm(x)), in the dtype of x; computed in that of the weights."""

    def __init__(self, index: int, config: Config):
        super().__init__()
        self.index = index
        self.norm = nn.LayerNorm(config.text_dim, config.norm_eps)
        self.attention = Attention(config.text_dim, config.text_heads, config.av_dim)
        self.gate = nn.Parameter(torch.empty(1))  # not a scalar, which FSDP2 cannot shard

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gate)

    def forward(self, x: Tensor, seen: _Latents) -> Tensor:
        y = self.norm(x.to(self.norm.weight.dtype))
        if seen.cross is not None:
            y = seen.cross.attend(self.attention, y, self.index)
        else:
            assert seen.latents is not None
            keys, values = self.attention.keys_values(seen.latents)
            if seen.clip_of_text is not None:
                keys, values = keys[seen.clip_of_text], values[seen.clip_of_text]
            ragged: dict[str, Any] = {} if seen.lengths is None else {"k_lengths": seen.lengths}
            y = self.attention(y, (keys, values), q_chunk=x.shape[1], k_chunk=keys.shape[2], **ragged)
        return x + (self.gate.tanh() * y).to(x.dtype)

    def before_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of a block: what the block is given has looked at the latents."""
        seen = kwargs.pop(_KEYWORD, None)
        if seen is not None:
            seen.asked += 1
            if args:
                args = (self(args[0], seen), *args[1:])
            else:
                kwargs["hidden_states"] = self(kwargs["hidden_states"], seen)
        return args, kwargs


class CausalLMDecoder(nn.Module):
    """Token ids [Q, L] and latents [B, N, av_dim] -> logits [Q, L, vocab_size], by a language model that stays itself.

    The blocks are not replaced but hooked, so that the language model's parameters keep their names, below `lm.`;
    ours are below `cross.`, one for every `config.cross_every`-th block. `lm.requires_grad_(False)` leaves these to be
    trained. Called by itself, the language model is as before.

    Args:
        config: made to agree with the language model by `config_for`.
        lm: a causal language model of transformers whose `forward` hands its keywords to its blocks.
    Raises:
        TypeError, ValueError: another kind of model.
    """

    def __init__(self, config: Config, lm: nn.Module):
        super().__init__()
        self.config = config
        self.lm = lm
        blocks = _blocks(lm)
        used = [block for i, block in enumerate(blocks) if (i + 1) % config.cross_every == 0]
        expect(len(used) > 0, "cross_every", f"be at most the {len(blocks)} blocks of text_decoder", config.cross_every)
        crosses = [GatedCrossAttention(i, config) for i in range(len(used))]
        self.cross = nn.ModuleList(crosses)
        # Bound methods, which a deep copy of the whole binds to the copied modules.
        for block, cross in zip(used, crosses, strict=True):
            block.register_forward_pre_hook(cross.before_block, with_kwargs=True)
        for block in blocks:
            if block not in used:
                block.register_forward_pre_hook(_without_latents, with_kwargs=True)
        # Releases of transformers differ in the name.
        self._cache_keyword = "cache" if "cache" in inspect.signature(lm.forward).parameters else "past_key_values"
        self.init_weights()

    @property
    def no_split_modules(self) -> tuple[str, ...]:
        """Names of the classes that are sharded or checkpointed each as a whole."""
        return (GatedCrossAttention.__name__, *sorted({type(block).__name__ for block in _blocks(self.lm)}))

    def init_weights(self) -> None:
        """Initial values of the cross-attentions; the language model keeps its own."""
        self.cross.apply(init_weights)

    def forward(
        self,
        text: Tensor,
        latents: Tensor | None,
        cache: LMCache | None = None,
        *,
        lengths: Tensor | None = None,
        clip_of_text: Tensor | None = None,
    ) -> Tensor:
        """With a cache, `text` continues what the cache holds, and the latents are those of the cache.

        Args:
            latents: None without a cache: the language model alone.
            lengths: int [B], latents of each clip that count; the rest is padding.
            clip_of_text: int64 [Q], the clip that each text is about; default: text q is about clip q.
        """
        seen: _Latents | None = None
        options: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            cache.cross.begin()
            seen = _Latents(None, cache.cross, None, None)
            options[self._cache_keyword] = cache.text
        elif latents is not None:
            seen = _Latents(latents, None, lengths_of_texts(lengths, clip_of_text), clip_of_text)
        if seen is not None:
            options[_KEYWORD] = seen
        logits = self.lm(input_ids=text, **options).logits
        if seen is not None and seen.asked < len(self.cross):
            raise ValueError(f"text_decoder must hand keywords to its blocks, was {_name(self.lm)}, which does not")
        return logits

    def see(self, latents: Tensor, lengths: Tensor | None = None) -> Seen:
        """Keys and values of latents [C, N, av_dim], of which the first `lengths` [C] count; None: all."""
        crosses = cast(Iterable[GatedCrossAttention], self.cross)
        return Seen([cross.attention.keys_values(latents) for cross in crosses], lengths)

    def new_cache(
        self, seen: Seen, longest: int, copies: int = 1, *, clip_of_text: Tensor | None = None, own: bool = False
    ) -> LMCache:
        """An empty cache for Q texts, `copies` rows each; the language model's part grows as it is filled.

        Arguments as in `TextDecoder.new_cache`.
        """
        expect_int("longest", longest)
        new_text = partial(import_transformers().DynamicCache, config=self.lm.config)
        return LMCache(new_text(), Cross.of(seen, copies, clip_of_text, own), new_text)


def config_for(config: Config, lm: Any) -> Config:
    """The configuration with the sizes of a language model and, where they were left at their defaults, its ids.

    A missing pad or bos id becomes that of eos; of several eos ids, the first is taken.

    Raises:
        TypeError: not a causal language model.
        ValueError: a `vocab_size` that was set and is another, or an eos id that nobody names.
    """
    for name in ("get_input_embeddings", "get_output_embeddings", "config"):
        if not hasattr(lm, name):
            raise TypeError(f"text_decoder must be a causal language model of transformers, was {_name(lm)}")
    if lm.get_output_embeddings() is None:
        raise TypeError(f"text_decoder must have a language-model head, was {_name(lm)}")
    rows, width = lm.get_input_embeddings().weight.shape
    default = Config()
    expect(
        config.vocab_size in (rows, default.vocab_size),
        "vocab_size",
        f"be {rows} like the rows of text_decoder's embedding, or left at {default.vocab_size}",
        config.vocab_size,
    )
    ids = {name: getattr(lm.config, f"{name}_token_id", None) for name in ("eos", "bos", "pad")}
    if isinstance(ids["eos"], list | tuple):
        ids["eos"] = ids["eos"][0]
    if ids["eos"] is None:
        expect(config.eos_id != default.eos_id, "eos_id", "be set, for text_decoder.config names none", config.eos_id)
        ids["eos"] = config.eos_id
    changes: dict[str, Any] = {}
    for name, value in ids.items():
        if getattr(config, f"{name}_id") == getattr(default, f"{name}_id"):
            changes[f"{name}_id"] = ids["eos"] if value is None else value
    heads = math.gcd(width, lm.config.num_attention_heads)
    return dataclasses.replace(
        config, vocab_size=rows, text_dim=width, text_layers=len(_blocks(lm)), text_heads=heads, **changes
    )


def _blocks(lm: Any) -> list[nn.Module]:
    """The language model's blocks, in their order."""
    count = lm.config.num_hidden_layers
    lists = [module for module in lm.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    expect(len(lists) > 0, "text_decoder", f"hold its {count} blocks in a ModuleList", _name(lm))
    return list(lists[0])


def _without_latents(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    kwargs.pop(_KEYWORD, None)
    return args, kwargs


def _name(lm: Any) -> str:
    return type(lm).__name__
