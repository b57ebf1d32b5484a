"""A decoder of the Llama shape (Llama, Mistral, Qwen 2 and 3), computed with as few calls as it takes.

The tokens of all slots go through a layer together: one matrix for queries, keys and values, one for gate and up. Only
attention looks at each text by itself: single tokens in one padded call, longer spans one by one. Values are those of
transformers' own modules up to the rounding of sums; in bfloat16 roundings happen at the same places.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn import functional

from llmos_cli.serve.runner.cache import SlotCache
from llmos_cli.serve.runner.linears import Kernels, Linear, fuse
from llmos_cli.serve.runner.spans import Span

ARCHITECTURES: Final = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SLOTS: Final = 16
_FIXED_ROPES: Final = ("default", "linear", "llama3", "yarn")  # others change with the length of the text

Norm = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Layer:
    before: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    out: Linear
    between: Norm
    gate_up: Linear
    down: Linear


def unfit(model: Any) -> str | None:
    """Why a model is not for this runner; None if it is."""
    name, config = type(model).__name__, model.config
    if name not in ARCHITECTURES:
        return f"a {name} is not of the Llama shape"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    rope = getattr(model.model.rotary_emb, "rope_type", "default")
    if rope not in _FIXED_ROPES:
        return f"its positions are of type {rope}"
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in kinds or (not kinds and window and window < config.max_position_embeddings):
        return "it attends to a window"
    return None


class LeanRunner:
    """Takes the weights of `model` over: its layers are left without them."""

    rewinds = True

    def __init__(self, model: Any, kernels: Kernels, *, slots: int = SLOTS, budget: int) -> None:
        config, core = model.config, model.model
        self.model, self.slots = model, slots
        self._heads, self._groups = config.num_attention_heads, config.num_key_value_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._dtype, self._device = kernels.compute, model.device
        self._embed: Norm = core.embed_tokens
        self._rotary = core.rotary_emb
        self._layers = [self._layer(layer, kernels) for layer in core.layers]
        self._norm = _norm(core.norm, self._dtype)
        self._head = fuse([model.lm_head], kernels, keep=True)
        self._scale = self._width**-0.5
        self.cache = SlotCache(
            len(self._layers), self._groups, self._width, dtype=self._dtype, device=self._device,
            context=config.max_position_embeddings, budget=budget,
        )  # fmt: skip

    def fits(self, slots: int, length: int) -> bool:
        return self.cache.fits(slots, length)

    @torch.inference_mode()
    def take(self, slot: int, start: int, end: int) -> torch.Tensor:
        return self.cache.take(slot, start, end)

    @torch.inference_mode()
    def put(self, slot: int, start: int, block: torch.Tensor) -> None:
        self.cache.put(slot, start, block)

    def clear(self, slot: int) -> None:
        """Nothing: what a slot holds beyond its text is never looked at."""

    @torch.inference_mode()
    def run(self, spans: Sequence[Span]) -> torch.Tensor:
        order = sorted(range(len(spans)), key=lambda i: (len(spans[i].tokens) > 1, spans[i].slot))
        ordered = [spans[i] for i in order]
        self.cache.provide(1 + max(span.slot for span in ordered), max(span.end for span in ordered))
        rows = self._rows([span for span in ordered if len(span.tokens) == 1])
        parts = [span for span in ordered if len(span.tokens) > 1]
        hidden = self._hidden(ordered, rows, parts)
        at = 0
        places: list[list[int]] = [[] for _ in spans]
        for index, span in zip(order, ordered, strict=True):
            at += len(span.tokens)
            places[index] = list(range(at - span.wanted, at))
        wanted = torch.tensor([place for part in places for place in part], dtype=torch.long, device=self._device)
        logits = self._head(self._norm(hidden[wanted])) if len(wanted) else hidden[:0]
        found: torch.Tensor = logits.float().cpu()
        return found

    def _hidden(self, spans: Sequence[Span], rows: "_Rows | None", parts: Sequence[Span]) -> torch.Tensor:
        ids = torch.tensor([token for span in spans for token in span.tokens], device=self._device)
        positions = torch.tensor([p for span in spans for p in range(span.start, span.end)], device=self._device)
        slots = [span.slot for span in spans for _ in span.tokens]
        places = self.cache.places(slots, positions.tolist())
        hidden: torch.Tensor = self._embed(ids).to(self._dtype)
        cos, sin = self._rotary(hidden.unsqueeze(0), positions.unsqueeze(0))
        cos, sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)
        half = self._width // 2
        turned = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        masks = [self._mask(span) for span in parts]
        heads, groups, width, number = self._heads, self._groups, self._width, len(ids)
        for layer, keys, values in zip(self._layers, self.cache.keys, self.cache.values, strict=True):
            qkv = layer.qkv(layer.before(hidden)).view(number, heads + 2 * groups, width)
            qk = qkv[:, : heads + groups]
            if layer.q_norm and layer.k_norm:
                qk = torch.cat((layer.q_norm(qk[:, :heads]), layer.k_norm(qk[:, heads:])), dim=1)
            # x cos + rotate_half(x) sin, the sign of the half in the sine
            qk = qk * cos + torch.cat((qk[..., half:], qk[..., :half]), dim=-1) * turned
            keys.view(-1, width).index_copy_(0, places, qk[:, heads:].reshape(-1, width))
            values.view(-1, width).index_copy_(0, places, qkv[:, heads + groups :].reshape(-1, width))
            seen = self._attend(qk[:, :heads], keys, values, rows, parts, masks)
            hidden = hidden + layer.out(seen.reshape(number, heads * width))
            gate, up = layer.gate_up(layer.between(hidden)).chunk(2, dim=-1)
            hidden = hidden + layer.down(functional.silu(gate) * up)
        return hidden

    def _attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: "_Rows | None",
        parts: Sequence[Span],
        masks: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """[tokens, heads, width]. Heads that share keys stand as further queries, so that nothing is repeated."""
        groups, width = self._groups, self._width
        shared = self._heads // groups
        found = []
        at = 0
        if rows is not None:
            at = len(rows.slots)
            q = queries[:at].reshape(at, groups, shared, width)
            if rows.spread:
                q = q.new_zeros((rows.number, groups, shared, width)).index_copy_(0, rows.index, q)
            k, v = (t[: rows.number, :, : rows.length] for t in (keys, values))
            seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=rows.mask, scale=self._scale)
            if rows.spread:
                seen = seen[rows.index]
            found.append(seen.reshape(at, self._heads, width))
        for span, mask in zip(parts, masks, strict=True):
            size = len(span.tokens)
            q = queries[at : at + size].view(size, groups, shared, width).permute(1, 2, 0, 3)
            k, v = (t[span.slot : span.slot + 1, :, : span.end] for t in (keys, values))
            seen = functional.scaled_dot_product_attention(
                q.reshape(1, groups, shared * size, width), k, v, attn_mask=mask, scale=self._scale
            )
            found.append(seen.view(groups, shared, size, width).permute(2, 0, 1, 3).reshape(size, self._heads, width))
            at += size
        return found[0] if len(found) == 1 else torch.cat(found)

    def _rows(self, singles: Sequence[Span]) -> "_Rows | None":
        if not singles:
            return None
        slots = [span.slot for span in singles]
        number, length = slots[-1] + 1, max(span.end for span in singles)
        ends = torch.ones(number, dtype=torch.long)
        ends[slots] = torch.tensor([span.end for span in singles])
        mask = None
        if int(ends.min()) < length:
            hidden = torch.arange(length) >= ends.unsqueeze(1)
            mask = torch.zeros((number, length), dtype=self._dtype).masked_fill_(hidden, -torch.inf)
            mask = mask.view(number, 1, 1, length).to(self._device)
        index = torch.tensor(slots, device=self._device)
        return _Rows(slots, index, number, length, mask, spread=number > len(slots))

    def _mask(self, span: Span) -> torch.Tensor:
        """[queries of all heads of a group, keys]: a token sees what stands before it, and itself."""
        size = len(span.tokens)
        after = torch.arange(span.end) > torch.arange(span.start, span.end).unsqueeze(1)
        mask = torch.zeros((size, span.end), dtype=self._dtype).masked_fill_(after, -torch.inf)
        return mask.repeat(self._heads // self._groups, 1).to(self._device)

    def _layer(self, layer: Any, kernels: Kernels) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        return _Layer(
            _norm(layer.input_layernorm, self._dtype),
            fuse([attention.q_proj, attention.k_proj, attention.v_proj], kernels),
            None if q_norm is None else _norm(q_norm, self._dtype),
            None if k_norm is None else _norm(k_norm, self._dtype),
            fuse([attention.o_proj], kernels),
            _norm(layer.post_attention_layernorm, self._dtype),
            fuse([mlp.gate_proj, mlp.up_proj], kernels),
            fuse([mlp.down_proj], kernels),
        )


@dataclass(frozen=True)
class _Rows:
    """Slots that go one token further: attention is computed for the first `number` slots, `length` keys each."""

    slots: Sequence[int]
    index: torch.Tensor
    number: int
    length: int
    mask: torch.Tensor | None
    spread: bool


def _norm(module: Any, dtype: torch.dtype) -> Norm:
    if dtype != torch.float32:
        return module  # type: ignore[no-any-return] # rounds where transformers does
    weight, eps = module.weight.float(), module.variance_epsilon
    share = 1 / len(weight)

    def norm(x: torch.Tensor) -> torch.Tensor:
        # as many calls as rms_norm makes of it, on one number a row
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        found: torch.Tensor = (x * size.square_().mul_(share).add_(eps).rsqrt_()).mul_(weight)
        return found

    return norm
