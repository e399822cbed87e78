"""Attaching to a Hugging Face model: child modules named `fssa`, and forward hooks that read them.

The parameters of the base model keep their names. The hooks are functions of this module, not closures, so that a deep
copy of the model steers by its own adapters. Which users a forward serves, `current` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.hooks import RemovableHandle

from fssa_fast.ops import film, lora
from fssa_fast.steering.current import ActiveUsers, CurrentUsers
from fssa_fast.steering.sites import FilmSite, Layout, LoraSite


class FilmChild(nn.Module):
    """What hangs on a block: its columns, and whom to ask for the users."""

    def __init__(self, site: FilmSite, current: CurrentUsers) -> None:
        super().__init__()
        self.site, self.current = site, current


class LoraChild(nn.Module):
    """What hangs on a projection: for every adapter there, A [R, D] and B, transposed, [R, O].

    In the default dtype, as PEFT keeps adapters: cast to the base's in a forward, trained in float32.
    """

    def __init__(self, sites: list[LoraSite], current: CurrentUsers, device: torch.device) -> None:
        super().__init__()
        self.sites, self.current = sites, current

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=device))

        self.a = nn.ParameterList([new(site.rank, site.inputs) for site in sites])
        self.b = nn.ParameterList([new(site.rank, site.outputs) for site in sites])
        for a in self.a:
            nn.init.kaiming_uniform_(a, a=5**0.5)  # PEFT's initialisation: A uniform, B zero


def _rows_fit(hidden: Tensor, users: ActiveUsers) -> None:
    if users.slots.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"users: expected one for each of the batch's {hidden.shape[0]} rows, got {users.slots.shape[0]}"
        )


def _film_hook(block: nn.Module, args: Any, output: Any) -> Any:
    child: FilmChild = block.fssa  # type: ignore[assignment]
    users = child.current.users
    if users is None:
        return None
    hidden = output[0] if isinstance(output, tuple) else output
    _rows_fit(hidden, users)
    rows = users.rows.to(hidden.dtype)
    new = film(hidden, scale=rows[:, child.site.scale], shift=rows[:, child.site.shift], slots=users.slots)
    return (new, *output[1:]) if isinstance(output, tuple) else new


def _lora_hook(projection: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    child: LoraChild = projection.fssa  # type: ignore[assignment]
    users = child.current.users
    if users is None:
        return None
    _rows_fit(output, users)
    rows, x = users.rows.to(output.dtype), args[0].to(output.dtype)
    for site, a, b in zip(child.sites, child.a, child.b, strict=True):
        gamma = rows[:, site.gamma].expand(-1, site.rank)
        beta = None if site.beta is None else rows[:, site.beta]
        a, b = a.to(output.dtype), b.to(output.dtype)
        (output,) = lora(
            x, [output], a=a, bs=[b], gamma=gamma, beta=beta, slots=users.slots, scaling=site.scaling
        )
    return output


def is_own_hook(hook: Any) -> bool:
    """Whether a module's forward hook is one of those that `attach` puts there."""
    return hook in (_film_hook, _lora_hook)


@dataclass
class Attachment:
    """The children and hooks that a model carries, to be taken off again by `remove`."""

    model: nn.Module
    layout: Layout
    current: CurrentUsers
    handles: list[RemovableHandle]
    on: bool = True

    def children(self) -> Iterator[tuple[str, LoraChild]]:
        """The projections that carry adapters: (path, child). Raises RuntimeError after `remove`."""
        self.check()
        for path in dict.fromkeys(site.path for site in self.layout.loras):
            yield path, cast(LoraChild, self.model.get_submodule(path).fssa)

    def adapter(self, number: int) -> Iterator[tuple[LoraSite, nn.Parameter, nn.Parameter]]:
        """The sites of one adapter (by its place in the configuration): (site, A, B transposed)."""
        for _, child in self.children():
            for site, a, b in zip(child.sites, child.a, child.b, strict=True):
                if site.adapter == number:
                    yield site, a, b

    def check(self) -> None:
        """Raises RuntimeError after `remove`: the model would answer as the base model, whoever is asked for."""
        if not self.on:
            raise RuntimeError("policy: expected one attached to its base model, got one that was detached")

    def remove(self) -> None:
        """Takes hooks and children off: the model is as it was. Raises RuntimeError the second time."""
        self.check()
        self.on = False
        while self.handles:
            self.handles.pop().remove()
        for path in {site.path for site in self.layout.films} | {site.path for site in self.layout.loras}:
            del self.model.get_submodule(path).fssa


def attach(model: nn.Module, layout: Layout) -> Attachment:
    """Hangs FiLM on the blocks and adapters on the projections of `layout`. Raises ValueError if already attached."""
    if any(name.rsplit(".", 1)[-1] == "fssa" for name, _ in model.named_modules()):
        raise ValueError("model: expected one without a steering attached, got one that carries one; detach it first")
    current, handles = CurrentUsers(), []
    for film_site in layout.films:
        block = model.get_submodule(film_site.path)
        block.add_module("fssa", FilmChild(film_site, current))
        handles.append(block.register_forward_hook(_film_hook))
    by_path: dict[str, list[LoraSite]] = {}
    for site in layout.loras:
        by_path.setdefault(site.path, []).append(site)
    for path, sites in by_path.items():
        projection = model.get_submodule(path)
        projection.add_module("fssa", LoraChild(sites, current, next(projection.parameters()).device))
        handles.append(projection.register_forward_hook(_lora_hook))
    handles.append(model.register_state_dict_post_hook(_leave_out_adapters))
    handles.append(model.register_load_state_dict_post_hook(_expect_no_adapters))
    return Attachment(model, layout, current, handles)


def _leave_out_adapters(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state that the base model is asked for itself, by its own `save_pretrained` for one, is the base model's."""
    if not prefix:
        for name in [name for name in state if ".fssa." in name]:
            del state[name]


def _expect_no_adapters(model: nn.Module, keys: Any) -> None:
    """So that the base model's own state is a whole one to load."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if ".fssa." not in name]


# What takes long to compute again: matrix products, and attention by any of PyTorch's kernels.
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_ATTENTION = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
_LONG = [getattr(torch.ops.aten, name).default for name in _PRODUCTS] + [
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in _ATTENTION
]


def check_checkpointing(model: nn.Module) -> None:
    """Raises ValueError where blocks are recomputed in a backward that would not know whom their forward served."""
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False):
            how = getattr(module, "_gradient_checkpointing_func", None)
            contexts = getattr(how, "keywords", {}).get("context_fn")
            if not getattr(contexts, "serves_users", False):
                raise ValueError(
                    f"model: expected gradient checkpointing by the policy, got the model's own on {name!r}: its "
                    "recomputation would serve other users; call policy.gradient_checkpointing_enable()"
                )


def checkpoint_contexts(current: CurrentUsers, keep_products: bool) -> Callable[[], tuple[Any, Any]]:
    """For torch.utils.checkpoint's context_fn: the recomputation of a block serves the users its forward served.

    keep_products: results of matrix products and of attention are kept, and only the rest is computed again.
    """

    def contexts() -> tuple[Any, Any]:
        users = current.users
        first, again = create_selective_checkpoint_contexts(_LONG) if keep_products else (nullcontext(), nullcontext())
        return _within(current.serve(users), first), _within(current.serve(users), again)

    contexts.serves_users = True  # type: ignore[attr-defined]  # for check_checkpointing
    return contexts


@contextmanager
def _within(outer: Any, inner: Any) -> Iterator[None]:
    with outer, inner:
        yield
