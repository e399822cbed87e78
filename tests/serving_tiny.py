"""A server of a tiny random model on a port of its own, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from tiny import WIDTH, make_model, make_policy, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fssa_fast import SteerablePolicy, TextEmbedder
from fssa_fast.serving import Settings, make_app
from fssa_fast.serving.keys import Key
from fssa_fast.serving.server import Server
from fssa_fast.serving.versions import only
from fssa_fast.users import open_store


def letters() -> PreTrainedTokenizerFast:
    """A token for each byte, and one for the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def make_embedder(tokenizer: Any = None) -> TextEmbedder:
    """Random, and the same every time."""
    tokenizer = tokenizer or make_tokenizer()
    config = BertConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=len(tokenizer)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return TextEmbedder(model, tokenizer)


def make_talking_policy(tokenizer: Any = None) -> SteerablePolicy:
    """A policy with tokenizer and embedder, whose users differ in what they are answered."""
    tokenizer = tokenizer or make_tokenizer()
    model = make_model(max_position_embeddings=256, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    policy = make_policy(model, capacity=32, tokenizer=tokenizer, embedder=make_embedder(tokenizer))
    with torch.no_grad():
        policy.modulator.weight.mul_(30)
    policy.users.refresh()
    return policy


class Running:
    """An app that is served, in a thread. `url` is where. grace: the server's, in seconds."""

    def __init__(self, app: Any, grace: float = 5.0) -> None:
        self._server = Server(app, grace, port=0)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()), daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            self._thread.join(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)


class Tiny(Running):
    """A server that is running, its users at rest at `where`. `url` is where it is itself.

    engine: options of the engine. settings: those of Settings.
    """

    def __init__(
        self, where: Any, keys: list[Key] | None, engine: dict[str, Any], tokenizer: Any = None, grace: float = 5.0,
        **settings: Any,
    ) -> None:  # fmt: skip
        self.policy, self.store = make_talking_policy(tokenizer), open_store(where)
        self.policy.use_store(self.store)
        self.engine = self.policy.engine(**{"max_rows": 8, "max_tokens": 2048, "step_tokens": 64, **engine})
        self.app = make_app(only(self.policy, self.engine), self.store, Settings("tiny", **settings), keys)
        self.service = self.app.state.service
        super().__init__(self.app, grace)

    def stop(self) -> None:
        super().stop()
        self.store.close()


@contextlib.contextmanager
def tiny_server(
    where: Any, keys: list[Key] | None = None, engine: dict[str, Any] | None = None, **options: Any
) -> Iterator[Tiny]:
    """A server for the block; arguments are those of Tiny."""
    server = Tiny(where, keys, engine or {}, **options)
    try:
        yield server
    finally:
        server.stop()
