"""SteerablePolicy: a Hugging Face causal LM that many users steer, each with a row of numbers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from fssa_fast.arguments import check_tensor
from fssa_fast.generation.attached import AttachedModel
from fssa_fast.generation.engine import Engine
from fssa_fast.generation.fused import CannotFuse, FusedModel
from fssa_fast.generation.generate import Prompts, generate, stream
from fssa_fast.generation.prompts import has_template
from fssa_fast.nn import ContextEncoder, Modulator
from fssa_fast.policy.import_reference import policy_from_reference
from fssa_fast.policy.storage import load_policy, save_policy
from fssa_fast.steering.attach import attach, check_checkpointing, checkpoint_contexts
from fssa_fast.steering.config import SteeringConfig
from fssa_fast.steering.current import ActiveUsers
from fssa_fast.steering.sites import plan_sites
from fssa_fast.users.bank import Bank
from fssa_fast.users.embedder import TextEmbedder
from fssa_fast.users.open_store import open_store
from fssa_fast.users.store import UserStore
from fssa_fast.users.stored_users import StoredUsers
from fssa_fast.users.users import Users

logger = logging.getLogger("fssa_fast")

MODULATION_STD, MODULATION_MEAN = 0.1, 1.0  # as a policy begins, whoever makes it


class SteerablePolicy(nn.Module):
    """Attaches steering to a causal LM, in place, and holds what makes users of choices: encoder, modulator, bank.

    The base model's parameters keep their names and are frozen; without users a forward of it is the base model's.

    Args:
        model: any Hugging Face causal LM. config: what to attach.
        tokenizer: for prompts given as texts. embedder: for choices given as texts.
        chat: whether a prompt given as a text is told as a user's message of a chat, through the tokenizer's template,
            as it was in training; False and None: as it is. It is saved with the policy.
        capacity: how many users the bank holds at once.
        modulation_std: standard deviation, at the start, of the weights that make adapters' columns of latents; FiLM's
            start at zero, since they multiply through all blocks.
        modulation_mean: those columns, at the start, of a latent of zeros: 1 is the whole adapter, and what is better
            for everyone is learnt first; 0 is the base model, and all that is learnt depends on the user.

    Raises: ConfigError for blocks or projections the model lacks; ValueError for an embedder of another width, or a
        tokenizer without a template for `chat`.
    """

    def __init__(
        self,
        model: Any,
        config: SteeringConfig,
        *,
        tokenizer: Any = None,
        embedder: TextEmbedder | None = None,
        chat: bool | None = None,
        capacity: int = 64,
        modulation_std: float = MODULATION_STD,
        modulation_mean: float = MODULATION_MEAN,
    ) -> None:
        super().__init__()
        if embedder is not None and embedder.width != config.encoder.embedding_width:
            raise ValueError(
                f"embedder: expected width {config.encoder.embedding_width}, as config.encoder has it, "
                f"got {embedder.width}"
            )
        if chat and tokenizer is not None and not has_template(tokenizer):
            raise ValueError("tokenizer: expected one with a chat template, since prompts are told as chats; got none")
        layout = plan_sites(model, config)
        parameter = next(model.parameters())
        kind = {"device": parameter.device, "dtype": torch.get_default_dtype()}
        self.model, self.steering, self.layout = model, config, layout
        self.tokenizer, self.embedder, self.chat = tokenizer, embedder, chat
        self.encoder = ContextEncoder(**asdict(config.encoder)).to(**kind)
        self.modulator = Modulator(
            config.encoder.latent_width,
            layout.modulated,
            init=modulation_mean * layout.initial_bias(),
            std=modulation_std * layout.adapter_columns(),
        ).to(**kind)
        self.bank = Bank(layout.width, layout.modulated, capacity, model.dtype, parameter.device)
        self.users: Users = Users(self)
        self.users.refresh()
        base = list(model.parameters())
        self.attachment = attach(model, layout)  # the first step that changes the model, and the last that may raise
        for weight in base:
            weight.requires_grad_(False)
        self.eval()

    # ------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        base: Any = None,
        *,
        tokenizer: Any = None,
        embedder: TextEmbedder | str | None = None,
        capacity: int = 64,
        revision: str | None = None,
        device_map: Any = None,
        dtype: torch.dtype | str | None = None,
    ) -> SteerablePolicy:
        """Loads a saved policy onto its base model.

        Args:
            directory: written by `save_pretrained`, or a name on the hub, then perhaps of a revision.
            base: the base model, or its path; None takes the one the policy names.
            tokenizer: None takes the base's. embedder: one, or a path to its encoder; None takes the one named, and
                puts it on the base's device.
            device_map, dtype: where and in what the base is loaded, as of transformers' `from_pretrained`.

        Raises: CheckpointError, ConfigError for a damaged, foreign or newer file; ValueError where base model or
            embedder are not those of the policy. Nothing is attached to `base` then.
        """
        return load_policy(
            cls, directory, base, tokenizer=tokenizer, embedder=embedder, capacity=capacity, revision=revision,
            device_map=device_map, dtype=dtype,
        )  # fmt: skip

    @classmethod
    def from_reference(cls, directory: str | os.PathLike[str], base: Any = None, **options: Any) -> SteerablePolicy:
        """Loads a policy checkpoint of the reference implementation; `base` as for `from_pretrained`."""
        return policy_from_reference(cls, directory, base, **options)

    def save_pretrained(self, directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Writes steering.json and the tensors it names: all but the base model, the embedder's weights and the users.

        dtype: of the tensors written; None keeps each one's own. Saved over an older policy, whatever happens, the
        folder holds one of the two; the older tensors go.
        """
        save_policy(self, directory, dtype)

    def detach(self) -> Any:
        """Takes the steering off the base model and returns it as it was, but frozen."""
        self.attachment.remove()
        return self.model

    def use_store(self, store: UserStore | str | os.PathLike[str], **options: Any) -> StoredUsers:
        """Keeps the users in a store from now on; see `fssa_fast.users.StoredUsers`.

        Args: store: a SQLite file by its path, a PostgreSQL database by its URL ("postgresql://..."), or any store.

        Raises ValueError where users have been added already; StoreError; ImportError for a URL without
        `fssa-fast[postgres]`.
        """
        if len(self.users):
            raise ValueError(f"store: expected a policy without users, got one with {len(self.users)}")
        at_rest = open_store(store) if isinstance(store, (str, os.PathLike)) else store
        self.users = users = StoredUsers(self, at_rest, **options)
        return users

    # ------------------------------------------------------------ steering

    @property
    def config(self) -> Any:
        """The base model's configuration, where transformers' Trainer looks for it; ours is `steering`."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the base model's first parameter lies."""
        return self.bank.rows.device

    @contextmanager
    def steer(self, users: Sequence[str]) -> Iterator[Tensor]:
        """Every forward of the base model in this block serves these users, one a row.

        Those of this thread, asyncio task or generator: others have blocks of their own, or none. A task started within
        belongs to the block as long as it is open, and raises RuntimeError after.
        For the model's own methods (`policy.model.generate`, pipelines, ...). With beams or several sequences a
        prompt, name each user as often as the batch repeats it; `policy.generate` does so by itself.
        Yields the slots [B]. Raises UnknownUser.
        """
        with self.users.slots(users) as slots, self.serve(self.bank.rows, slots):
            yield slots

    def rows(self, latents: Tensor) -> Tensor:
        """The rows [U, M] of latents [U, H], differentiable: for training, where `forward` takes them."""
        modulations = self.modulator(latents)
        return torch.cat(
            [modulations, modulations.new_ones(len(latents), self.layout.width - self.layout.modulated)], 1
        )

    def strengthen(self, strength: float) -> None:
        """Multiplies everyone's modulations by `strength`, for good; the users in the bank follow, or nothing changes.

        What a user's answers gain by steering grows as the strength, what all answers lose in likelihood as its square:
        a policy that was trained hard often follows its users better at half of its strength.
        Raises ValueError for a strength, or rows, that are not finite; BankFull where running generations leave no slot
        for a row that they read.
        """
        self.users.strengthen(strength)

    def forward(self, *args: Any, rows: Tensor | None = None, slots: Tensor | None = None, **kwargs: Any) -> Any:
        """The base model's forward, steered.

        Args:
            rows: [S, M], from `rows`; None takes the bank's.
            slots: the row of each batch row, int32 or int64 [B]; None is the base model.
            the others: the model's own.
        """
        with self.serve(rows, slots):
            return self.model(*args, **kwargs)

    def serve(self, rows: Tensor | None, slots: Tensor | None) -> AbstractContextManager[None]:
        """A block whose forwards of the base model serve rows of a table: arguments as of `forward`."""
        self.attachment.check()
        if self.model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            check_checkpointing(self.model)
        if slots is None:
            if rows is not None:
                raise ValueError("slots: expected one for each batch row, since rows are given; got None")
            return self.attachment.current.serve(None)
        if not isinstance(slots, Tensor) or slots.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"slots: expected a tensor of int32 or int64, got {getattr(slots, 'dtype', slots)!r}")
        rows = self.bank.rows if rows is None else rows
        check_tensor("rows", rows, (None, self.layout.width))
        return self.attachment.current.serve(ActiveUsers(rows, slots))

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        rows: Tensor | None,
        slots: Tensor | None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states [B, T, D], after the final norm, that `logits` turns into logits; as `forward`."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        with self.serve(rows, slots):
            return self.model.base_model(**inputs, use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], with the cap that some models put on them.

        Raises ValueError for a model that scales them.
        """
        config = self.model.config.get_text_config()
        for name in ("logits_scaling", "logit_scale", "lm_head_multiplier"):
            if getattr(config, name, 1) not in (None, 1):
                raise ValueError(
                    f"model: expected logits without {name}, got {type(self.model).__name__}, which has one"
                )
        logits = self.model.get_output_embeddings()(hidden)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Trades compute for memory in training; a block's recomputation serves the users its forward served.

        Arguments as for the model's own, and among gradient_checkpointing_kwargs `keep_products` (False): keep the
        results of matrix products and of attention, and compute only the rest of a block again, which is cheap. Raises
        ValueError for reentrant checkpoints, which cannot serve the users.
        """
        kwargs = dict(gradient_checkpointing_kwargs or {})
        keep_products = kwargs.pop("keep_products", False)
        if kwargs.setdefault("use_reentrant", False):
            raise ValueError("use_reentrant: expected False, got True")
        kwargs["context_fn"] = checkpoint_contexts(self.attachment.current, keep_products)
        # Later versions of transformers call it activation checkpointing.
        enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
        enable(kwargs, **options)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """`gradient_checkpointing_enable`, by the name that later versions of transformers call."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    # ------------------------------------------------------------ dtype, device and copies

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # What `to`, `float`, `cuda` and the like call: the bank goes with the model; the fused form was another one's.
        with self.bank.unread():  # nobody meets the model converted and the bank not yet
            super()._apply(fn, *args, **kwargs)
            self._follow_model()
        return self

    def _follow_model(self) -> None:
        """Lets the bank have the dtype and the device that the model has by now; its own `to` may have been called."""
        dtype, device = self.model.dtype, next(self.model.parameters()).device
        if (self.bank.rows.dtype, self.bank.rows.device) != (dtype, device):
            self.bank.convert(dtype, device)
            self.fused = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "policy: expected save_pretrained and from_pretrained, got pickle or deepcopy, which cannot take the "
            "users: their rows and locks belong to this object"
        )

    # ------------------------------------------------------------ generation

    def generate(self, prompts: Prompts, users: Sequence[str], **options: Any) -> Any:
        """Answers prompts, each for its user, all in one batch; see `fssa_fast.generation.generate`."""
        return generate(self, prompts, users, **options)

    def stream(self, prompt: Any, user: str, **options: Any) -> Iterator[str]:
        """Answers one prompt piece by piece; see `fssa_fast.generation.stream`."""
        return stream(self, prompt, user, **options)

    # ------------------------------------------------------------ many users at once

    fused: FusedModel | None = None
    """The fused form, once `fuse` has made it."""

    def fuse(
        self, *, max_positions: int | None = None, attention: str = "auto", beside: FusedModel | None = None
    ) -> FusedModel:
        """Makes the fused form of the model as it is now, for inference; see `fssa_fast.generation.FusedModel`.

        The model and its parameters stay as they are; the packed weights take as much memory again. After training,
        fuse again.

        Args:
            max_positions: the longest sequence it will serve; None takes the model's own limit.
            attention: on a GPU, by "flash-attn" or by our "own" kernels; "auto": by flash-attn where it is installed
                and takes the model's dtype and heads.
            beside: the fused form of another policy on the same parameters (see `share_parameters`): weights that no
                adapter is packed into are shared with it, and steps of the two take turns.

        Raises: CannotFuse for a model that has no fused form which computes the same; BackendError where flash-attn was
            asked for and cannot run; ValueError for another attention.
        """
        self._follow_model()
        self.fused = FusedModel(self, max_positions, attention, beside)
        return self.fused

    def unfuse(self) -> None:
        """Lets the fused form go, and its memory. Engines that use it keep it until they are closed."""
        self.fused = None

    def engine(self, **options: Any) -> Engine:
        """An engine that serves requests of many users in one batch; see `fssa_fast.generation.Engine`.

        The policy is fused where it is not, or where its parameters have changed since. A model that has no fused form
        is served as it is, a row at a time, and a warning says why. Raises what the engine raises.
        """
        fused = self.fused
        if fused is None or fused.stale():
            try:
                fused = self.fuse()
            except CannotFuse as error:
                logger.warning("the engine serves the attached form, a row at a time: %s", error)
                return Engine(self, AttachedModel(self), **options)
        return Engine(self, fused, **options)
