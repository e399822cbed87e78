"""The fused form of an attached model: the same numbers within rounding, for inference only, in few steps.

A block is: one product for queries, keys, values and the A matrices of the adapters beside them; the adapters'
expansion, added in place; one step from there through norms, rotary positions and the cache to the attention's output;
the output projection; residual add and norm; one product for gate and up; their product; the down projection; and film,
folded into the residual add and the next norm: ten launches a block on a GPU with an adapter, nine without. The base
model's parameters stay as they are; the packed copies take as much memory again. The attached form goes on working
beside the fused one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fssa_fast.backends import chosen_backend
from fssa_fast.generation.block_ops import (
    ACTIVATIONS,
    AttentionInputs,
    AttentionSettings,
    Expansion,
    FilmNorm,
    Packed,
    Step,
)
from fssa_fast.generation.cache import BlockCache
from fssa_fast.generation.graphs import SIZES, CudaGraphs, padded
from fssa_fast.generation.steered import Steered
from fssa_fast.generation.which_ops import ops_for
from fssa_fast.steering.attach import is_own_hook
from fssa_fast.steering.sites import LoraSite

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


class CannotFuse(ValueError):
    """The model has no fused form that computes the same."""


class StaleFused(RuntimeError):
    """The model has changed since it was fused: fuse it again."""


@dataclass(frozen=True)
class _Adapter:
    """One adapter's columns in its group's product, its B, and the columns of the output that it is added to."""

    site: LoraSite
    hidden: slice
    b: Packed
    output: slice


@dataclass(frozen=True)
class _Group:
    """Projections that share an input, and the A matrices beside them, as one weight."""

    weight: Packed
    bias: Tensor | None
    columns: tuple[slice, ...]  # of each projection's output
    adapters: tuple[_Adapter, ...]


@dataclass(frozen=True)
class _Block:
    qkv: _Group
    o: _Group
    gate_up: _Group
    down: _Group
    attention: AttentionSettings
    mid_norm: Tensor  # before the feed-forward
    after_attention: Tensor | None  # norms of what a block adds to the residual stream, where it has them (Gemma)
    after_mlp: Tensor | None
    film: tuple[slice, slice] | None


class FusedModel:
    """The fused form of a policy's model, as its parameters are now: fuse again after training.

    Made by `SteerablePolicy.fuse`. Any device works: the CPU by native steps, a GPU by Triton's, replayed as CUDA
    graphs where a step has at most 256 tokens. All who use it share its buffers: several threads do so in turn, each
    holding `turn` from before `forward` until the logits have been read, as engines do.

    Args:
        beside: the fused form of another policy on the same base model's parameters. What no adapter of either is
            packed into, is packed once for both, and those who use either take turns.

    Raises: CannotFuse for an architecture, a projection, a rope or a hook that it does not know; StaleFused for a bank
        of another dtype or device than the model's, or where the parameters of `beside` have changed; ValueError for a
        `beside` with steps of another kind.
    """

    def __init__(
        self,
        policy: Steered,
        max_positions: int | None = None,
        attention: str = "auto",
        beside: FusedModel | None = None,
    ) -> None:
        model = policy.model
        _check(policy)
        # What is packed is a copy: it is known by what it was made from.
        self._weights = [(name, weight, _state_of(weight)) for name, weight in model.named_parameters()]
        self._adapters = [weight for name, weight, _ in self._weights if ".fssa." in name]
        self._adapters_version = sum(weight._version for weight in self._adapters)
        self.policy, self.model = policy, model
        self.config = model.config.get_text_config()
        self.dtype, self.device, self.backend = model.dtype, policy.device, chosen_backend()
        self._check_rows(policy.bank.rows)
        head_width = model.model.layers[0].self_attn.head_dim
        self.ops = ops_for(self.device, self.dtype, head_width, attention)
        self._packed: dict[tuple[int, ...], Packed] = {}  # of the base's weights alone, by their addresses
        if beside is not None:
            beside.check()
            if type(beside.ops) is not type(self.ops):
                raise ValueError(
                    f"beside: expected steps by {type(self.ops).__name__}, got {type(beside.ops).__name__}"
                )
            own = {weight.data_ptr() for weight in model.parameters()}
            self._packed |= {key: packed for key, packed in beside._packed.items() if own.issuperset(key)}
        captures = self.device.type == "cuda" and self.ops.capturable
        self.graphs = CudaGraphs(self.device) if captures else None
        self.max_positions = max_positions or self.config.max_position_embeddings
        backbone = model.model
        self.embed = backbone.embed_tokens
        self.eps = self.config.rms_norm_eps
        self.activation = _activation(self.config)
        self.first_norm = self._norm(backbone.layers[0].input_layernorm)
        self._ropes: dict[str | None, tuple[Tensor, Tensor]] = {}
        films = {site.path: (site.scale, site.shift) for site in policy.layout.films}
        prefix = next(name for name, module in model.named_modules() if module is backbone.layers)
        with torch.no_grad():
            self.blocks = [self._block(f"{prefix}.{i}", block, films) for i, block in enumerate(backbone.layers)]
            self.norms = [self._norm(block.input_layernorm) for block in list(backbone.layers)[1:]]
            self.norms.append(self._norm(backbone.norm))
            head = model.get_output_embeddings()
            self.head = self._pack_of_base([head.weight])
            self.head_bias = head.bias
        self.softcap = getattr(self.config, "final_logit_softcapping", None)
        self._workspace = _Workspace(self, 0)
        self.turn: threading.RLock = threading.RLock() if beside is None else beside.turn

    @property
    def vocabulary(self) -> int:
        """How many logits a token has."""
        return self.head.outputs

    @property
    def nbytes(self) -> int:
        """Memory of the packed weights, in bytes: what fusing costs."""
        groups = [group for block in self.blocks for group in (block.qkv, block.o, block.gate_up, block.down)]
        weights = [self.head, *(g.weight for g in groups), *(a.b for g in groups for a in g.adapters)]
        return sum(weight.data.nbytes for weight in weights)

    @property
    def cache_block(self) -> int:
        """Positions of a block of the cache."""
        return self.ops.cache_block

    def new_cache(self, sequences: int, max_length: int, blocks: int | None = None) -> BlockCache:
        """A cache for that many sequences of at most max_length positions; `blocks` in all (None: for all)."""
        if not 0 < max_length <= self.max_positions:
            raise ValueError(
                f"max_length: expected at most the {self.max_positions} positions of the model, got {max_length}"
            )
        attention = self.blocks[0].attention
        return BlockCache(
            len(self.blocks),
            attention.kv_heads,
            attention.head_width,
            sequences=sequences,
            max_length=max_length,
            blocks=blocks,
            block=self.cache_block,
            dtype=self.dtype,
            device=self.device,
        )

    def stale(self) -> str | None:
        """What has changed in the model since it was fused, by words; None where nothing has."""
        for name, parameter, known in self._weights:
            if _state_of(parameter) != known:
                return f"{name} has been changed or moved"
        return None

    def check(self) -> None:
        """Raises StaleFused where the model is no longer the one that was fused."""
        changed = self.stale()
        if changed is not None:
            raise StaleFused(f"model: expected the parameters that were fused, but {changed}; call policy.fuse() again")

    def _check_rows(self, rows: Tensor) -> None:
        # Kernels are handed addresses: rows of another dtype would be read as other numbers, and past their end.
        if rows.dtype != self.dtype or rows.device != self.device:
            raise StaleFused(
                f"bank: expected rows of {self.dtype} on {self.device}, as the model had them when it was fused, got "
                f"{rows.dtype} on {rows.device}; call policy.fuse() again"
            )

    @torch.inference_mode()
    def forward(
        self,
        ids: Tensor,
        slots: Tensor,
        sequences: Tensor,
        positions: Tensor,
        cache: BlockCache,
        logits_of: Tensor | None = None,
    ) -> Tensor:
        """One step over n tokens, of any sequences, in any order; one sequence's follow one another in position.

        Args:
            ids: token ids [n]. slots: of the bank, [n]. sequences: rows of the cache's table, [n].
            positions: of each token in its sequence, [n]; all before it are in the cache or among these tokens.
            logits_of: indices [m] of the tokens whose logits are wanted; None: all.

        Returns: logits [m, V], in memory that the next call writes again.
        Raises: StaleFused where the bank has another dtype or place, or an adapter was changed since; ValueError for
            arguments of different lengths; IndexError for a slot, a sequence or a position that is
            out of range. On a GPU, where to look would be to wait, they are taken as they are.
        """
        n = len(ids)
        self._check_rows(self.policy.bank.rows)
        if sum(weight._version for weight in self._adapters) != self._adapters_version:
            self.check()
        for name, values in (("slots", slots), ("sequences", sequences), ("positions", positions)):
            if values.shape != ids.shape:
                raise ValueError(f"{name}: expected one for each of the {n} tokens, got shape {list(values.shape)}")
            if values.device.type == "cpu" and n and int(values.min()) < 0:
                raise IndexError(f"{name}: expected numbers of at least 0, got {int(values.min())}")
        self._make_room(n)
        with torch.cuda.device_of(self.embed.weight):
            return self._workspace.run(ids, slots, sequences, positions, cache, logits_of)

    def warm_up(self, cache: BlockCache, rows: int, tokens: int) -> Iterator[int]:
        """Captures the graphs of steps on a cache, one an item, whose size it gives; nothing where there are none.

        rows: of steps of which all tokens are asked for their logits. tokens: of those of which only some are.
        """
        if self.graphs is None:
            return
        some = torch.zeros(1, dtype=torch.int64, device=self.device)
        kinds = (rows, None), (tokens, some)
        for most, logits_of in kinds:
            for size in SIZES[: SIZES.index(padded(min(most, SIZES[-1]))) + 1]:
                with torch.inference_mode(), torch.cuda.device_of(self.embed.weight):
                    self._make_room(size)
                    ids, slots, sequences, positions = self._workspace.nobody.expand(-1, size)
                    self._workspace.run(ids, slots, sequences, positions, cache, logits_of)
                yield size

    def _make_room(self, tokens: int) -> None:
        if tokens > self._workspace.size:
            least = 0 if self.graphs is None else SIZES[-1]  # graphs hold addresses: they go when it grows
            self._workspace = _Workspace(self, max(tokens, 2 * self._workspace.size, least))

    def forget(self, cache: BlockCache) -> None:
        """Lets go what is kept for the steps on a cache that will not be used again, and so the cache itself."""
        self._workspace.forget(cache)

    # ------------------------------------------------------------ making

    def _block(self, path: str, block: Any, films: dict[str, tuple[slice, slice]]) -> _Block:
        attn, mlp = block.self_attn, block.mlp
        gemma = hasattr(block, "pre_feedforward_layernorm")
        after_attention = block.post_attention_layernorm if gemma else None
        return _Block(
            qkv=self._group(f"{path}.self_attn", attn, ("q_proj", "k_proj", "v_proj")),
            o=self._group(f"{path}.self_attn", attn, ("o_proj",)),
            gate_up=self._group(f"{path}.mlp", mlp, ("gate_proj", "up_proj")),
            down=self._group(f"{path}.mlp", mlp, ("down_proj",)),
            attention=self._attention(attn),
            mid_norm=self._norm(block.pre_feedforward_layernorm if gemma else block.post_attention_layernorm),
            after_attention=None if after_attention is None else self._norm(after_attention),
            after_mlp=self._norm(block.post_feedforward_layernorm) if gemma else None,
            film=films.get(path),
        )

    def _attention(self, attn: Any) -> AttentionSettings:
        width = attn.head_dim
        # Mistral keeps its window in the configuration, for all blocks.
        window = getattr(self.config if self.config.model_type == "mistral" else attn, "sliding_window", None)
        cos, sin = self._rope(getattr(attn, "layer_type", None))
        if cos.shape[1] != width:
            raise CannotFuse(f"model: expected rotary positions on all {width} columns, got {cos.shape[1]}")
        return AttentionSettings(
            heads=attn.q_proj.out_features // width,
            kv_heads=attn.k_proj.out_features // width,
            head_width=width,
            q_norm=self._norm(attn.q_norm) if hasattr(attn, "q_norm") else None,
            k_norm=self._norm(attn.k_norm) if hasattr(attn, "k_norm") else None,
            eps=self.eps,
            cos=cos,
            sin=sin,
            scale=float(attn.scaling),
            softcap=float(getattr(attn, "attn_logit_softcapping", None) or 0.0),
            window=int(window or 0),
        )

    def _rope(self, layer_type: str | None) -> tuple[Tensor, Tensor]:
        rotary: Any = self.model.model.rotary_emb
        by_type = isinstance(rotary.rope_type, dict)
        key = layer_type if by_type else None
        if key not in self._ropes:
            kind = rotary.rope_type[key] if by_type else rotary.rope_type
            if kind not in _STATIC_ROPE:
                raise CannotFuse(f"model: expected a rope of the kinds {', '.join(_STATIC_ROPE)}, got {kind!r}")
            positions = torch.arange(self.max_positions, device=self.device)[None]
            x = torch.zeros(1, device=self.device)
            cos, sin = rotary(x, positions, *([key] if by_type else []))
            self._ropes[key] = cos[0].float().contiguous(), sin[0].float().contiguous()
        return self._ropes[key]

    def _norm(self, norm: Any) -> Tensor:
        weight = norm.weight.detach()
        if self.config.model_type.startswith("gemma"):
            weight = (1 + weight.double()).to(weight.dtype)
        return weight.contiguous()

    def _group(self, path: str, parent: nn.Module, names: Sequence[str]) -> _Group:
        projections = [getattr(parent, name) for name in names]
        weights, columns, start = [], [], 0

        def take(weight: Tensor) -> slice:
            nonlocal start
            weights.append(weight.to(self.dtype))
            start += len(weight)
            return slice(start - len(weight), start)

        for projection in projections:
            columns.append(take(projection.weight))
        adapters = []
        for projection, output in zip(projections, columns, strict=True):
            child = getattr(projection, "fssa", None)
            for site, a, b in zip(child.sites, child.a, child.b, strict=True) if child is not None else ():
                packed = self.ops.pack((b.T * site.scaling).to(self.dtype))
                adapters.append(_Adapter(site, take(a), packed, output))
        bias = None
        if any(projection.bias is not None for projection in projections):
            bias = torch.zeros(start, dtype=self.dtype, device=self.device)
            for projection, output in zip(projections, columns, strict=True):
                if projection.bias is not None:
                    bias[output] = projection.bias
        packed = self.ops.pack(torch.cat(weights)) if adapters else self._pack_of_base(weights)
        return _Group(packed, bias, tuple(columns), tuple(adapters))

    def _pack_of_base(self, weights: Sequence[Tensor]) -> Packed:
        """Weights of the base model, one above the other, packed once for all forms beside this one."""
        key = tuple(weight.data_ptr() for weight in weights)
        if key not in self._packed:
            self._packed[key] = self.ops.pack(torch.cat(list(weights)) if len(weights) > 1 else weights[0])
        return self._packed[key]


class _Workspace:
    """Buffers for up to `size` tokens, and the list of steps for each number of tokens met."""

    KEPT = 72  # numbers of tokens whose steps are kept
    NOBODY = (0, 0, -1, 0)  # the id, slot, sequence and position of a token that fills a graph up

    def __init__(self, fused: FusedModel, size: int) -> None:
        self.fused, self.size = fused, size
        # Steps hold addresses: what they belong to is kept with them.
        self._plans: dict[tuple[int, ...], tuple[list[Step], BlockCache, Tensor]] = {}
        self._replays: dict[tuple[int, ...], tuple[Callable[[], Tensor], BlockCache, Tensor, Tensor]] = {}
        width, block = fused.embed.weight.shape[1], fused.blocks[0]

        def new(columns: int) -> Tensor:
            return torch.zeros(size, columns, dtype=fused.dtype, device=fused.device)

        self.index = torch.zeros(4, size, dtype=torch.int32, device=fused.device)
        self.ids, self.slots, self.sequences, self.positions = self.index
        self.nobody = torch.tensor(self.NOBODY, dtype=torch.int32, device=fused.device)[:, None]
        self.hidden, self.normed = new(width), new(width)
        self.qkv = new(max(b.qkv.weight.outputs for b in fused.blocks))
        self.attended = new(block.attention.heads * block.attention.head_width)
        self.out = new(max(g.weight.outputs for b in fused.blocks for g in (b.o, b.down)))
        self.gate_up = new(max(b.gate_up.weight.outputs for b in fused.blocks))
        self.gated = new(block.down.weight.width)
        self.logits = torch.empty(0, fused.vocabulary, dtype=fused.dtype, device=fused.device)
        self.zeros = torch.zeros(1, width, dtype=fused.dtype, device=fused.device)

    def run(
        self,
        ids: Tensor,
        slots: Tensor,
        sequences: Tensor,
        positions: Tensor,
        cache: BlockCache,
        logits_of: Tensor | None,
    ) -> Tensor:
        n, graphs = len(ids), self.fused.graphs
        for buffer, values in zip(self.index, (ids, slots, sequences, positions), strict=True):
            buffer[:n] = values
        work = self._all_logits if logits_of is None else self._blocks
        if graphs is not None and 0 < n <= SIZES[-1]:
            found = self._replayed(graphs, work, padded(n), n, cache)
        else:
            found = work(n, cache)
        return found if logits_of is None else self._head(found[logits_of])

    def forget(self, cache: BlockCache) -> None:
        """Drops the steps on a cache."""
        self._plans = {key: plan for key, plan in self._plans.items() if plan[1] is not cache}
        self._replays = {key: replay for key, replay in self._replays.items() if replay[1] is not cache}

    def _replayed(
        self, graphs: CudaGraphs, work: Callable[[int, BlockCache], Tensor], size: int, n: int, cache: BlockCache
    ) -> Tensor:
        """What the work gives for the first n tokens, by its graph for `size`; the others are nobody's."""
        self.index[:, n:size] = self.nobody
        rows = self.fused.policy.bank.rows
        key = size, work == self._all_logits, id(cache), id(rows)
        if key not in self._replays:
            if len(self._replays) >= self.KEPT:
                self._replays.clear()
            replay = graphs.capture(lambda: work(size, cache))
            self._replays[key] = replay, cache, rows, self.logits
        return self._replays[key][0]()[:n]

    def _blocks(self, n: int, cache: BlockCache) -> Tensor:
        """From the ids of the first n tokens to their last norm."""
        rows = self.fused.policy.bank.rows
        self.out[:n, : self.hidden.shape[1]] = self.fused.embed(self.ids[:n])
        key = n, id(cache), id(rows), torch.get_num_threads()
        if key not in self._plans:
            if len(self._plans) >= self.KEPT:
                self._plans.clear()
            self._plans[key] = list(self._steps(n, cache, rows)), cache, rows
        for step in self._plans[key][0]:
            step()
        return self.normed[:n]

    def _all_logits(self, n: int, cache: BlockCache) -> Tensor:
        return self._head(self._blocks(n, cache))

    def _head(self, normed: Tensor) -> Tensor:
        fused = self.fused
        if len(normed) > len(self.logits):
            self.logits = torch.empty(len(normed), fused.vocabulary, dtype=fused.dtype, device=fused.device)
        logits = self.logits[: len(normed)]
        fused.ops.linear(normed, fused.head, fused.head_bias, logits)()
        return logits if fused.softcap is None else fused.softcap * torch.tanh(logits / fused.softcap)

    def _steps(self, n: int, cache: BlockCache, rows: Tensor) -> Iterator[Step]:
        fused, ops = self.fused, self.fused.ops
        slots, sequences, positions = self.slots[:n], self.sequences[:n], self.positions[:n]
        hidden, normed, attended, gated = self.hidden[:n], self.normed[:n], self.attended[:n], self.gated[:n]
        width = hidden.shape[1]
        nothing = self.zeros.expand(len(rows), width)

        def norm(x: Tensor, residual: Tensor, weight: Tensor, film: tuple[slice, slice] | None, to: Tensor) -> Step:
            scale, shift = (nothing, nothing) if film is None else (rows[:, film[0]], rows[:, film[1]])
            return ops.film_norm(FilmNorm(x, residual, scale, shift, slots, weight, fused.eps, to, normed))

        def alone(x: Tensor, weight: Tensor) -> Step:
            zeros = self.zeros.expand(n, width)
            return ops.film_norm(FilmNorm(x, zeros, nothing, nothing, slots, weight, fused.eps, normed, normed))

        def project(x: Tensor, group: _Group, buffer: Tensor) -> Iterator[Step]:
            y = buffer[:n]
            yield ops.linear(x, group.weight, group.bias, y[:, : group.weight.outputs])
            if group.adapters:
                yield ops.adapt(
                    [
                        Expansion(
                            y[:, adapter.hidden],
                            rows[:, adapter.site.gamma].expand(-1, adapter.site.rank),
                            None if adapter.site.beta is None else rows[:, adapter.site.beta],
                            adapter.b,
                            y[:, adapter.output],
                        )
                        for adapter in group.adapters
                    ],
                    slots,
                )

        out = self.out[:n, :width]
        yield norm(out, self.zeros.expand(n, width), fused.first_norm, None, hidden)
        for layer, (block, next_norm) in enumerate(zip(fused.blocks, fused.norms, strict=True)):
            yield from project(normed, block.qkv, self.qkv)
            q, k, v = (self.qkv[:n, columns] for columns in block.qkv.columns)
            given = AttentionInputs(q, k, v, positions, sequences)
            yield ops.attention(block.attention, given, cache, layer, attended)
            yield from project(attended, block.o, self.out)
            if block.after_attention is not None:
                yield alone(out, block.after_attention)
            added = out if block.after_attention is None else normed
            yield norm(added, hidden, block.mid_norm, None, hidden)
            yield from project(normed, block.gate_up, self.gate_up)
            gate, up = (self.gate_up[:n, columns] for columns in block.gate_up.columns)
            yield ops.gate(fused.activation, gate, up, gated)
            yield from project(gated, block.down, self.out)
            if block.after_mlp is not None:
                yield alone(out, block.after_mlp)
            added = out if block.after_mlp is None else normed
            yield norm(added, hidden, next_norm, block.film, hidden)


def _state_of(weight: Tensor) -> tuple[int, int, torch.dtype]:
    """What changes when a parameter is written, converted or moved."""
    return weight._version, weight.data_ptr(), weight.dtype


def _activation(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or config.hidden_act


def _check(policy: Steered) -> None:
    model = policy.model
    config = model.config.get_text_config()
    kind = config.model_type
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise CannotFuse(f"model: expected all parameters on one device, got them on {', '.join(devices)}")
    if kind not in ARCHITECTURES:
        raise CannotFuse(f"model: expected one of {', '.join(ARCHITECTURES)}, got {kind!r}")
    if _activation(config) not in ACTIVATIONS:
        raise CannotFuse(f"model: expected an activation of {', '.join(ACTIVATIONS)}, got {_activation(config)!r}")
    if getattr(config, "use_bidirectional_attention", False):
        raise CannotFuse("model: expected causal attention, got attention in both directions")
    for name, module in model.named_modules():
        hooks = {**module._forward_hooks, **module._forward_pre_hooks}
        for hook in hooks.values():
            # transformers leaves hooks that only look, once hidden states have been asked for.
            looks = getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
            if not is_own_hook(hook) and not looks:
                raise CannotFuse(f"model: expected no hooks but the policy's, got {hook!r} on {name!r}")
        if "forward" in module.__dict__:
            raise CannotFuse(f"model: expected modules as they are, got {name!r} with a forward put over its own")
    for name, module in model.model.layers.named_modules():
        if name.endswith("_proj") and type(module) is not nn.Linear:
            raise CannotFuse(f"model: expected plain linear projections, got {name!r}, a {type(module).__name__}")
    if any(parameter.dtype != model.dtype for name, parameter in model.named_parameters() if ".fssa." not in name):
        raise CannotFuse(f"model: expected all parameters in {model.dtype}, got several dtypes")
