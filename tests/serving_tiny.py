"""A server of a tiny random model on a port of its own, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from tiny import EOS, VOCABULARY, WIDTH, make_model, make_policy, make_tokenizer
from transformers import BertConfig, BertModel

from fssa_fast import SqliteStore, SteerablePolicy, TextEmbedder
from fssa_fast.serving import Settings, make_app
from fssa_fast.serving.keys import Key
from fssa_fast.serving.server import Server, _Protocol
from fssa_fast.serving.versions import only


def make_embedder() -> TextEmbedder:
    """Random, and the same every time."""
    config = BertConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=VOCABULARY
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return TextEmbedder(model, make_tokenizer())


def make_talking_policy(capacity: int = 32) -> SteerablePolicy:
    """A policy with tokenizer and embedder, whose users differ in what they are answered."""
    model = make_model(max_position_embeddings=256)
    model.generation_config.eos_token_id = EOS
    policy = make_policy(model, capacity=capacity, tokenizer=make_tokenizer(), embedder=make_embedder())
    with torch.no_grad():
        policy.modulator.weight.mul_(30)
    policy.users.refresh()
    return policy


def make_served_policy(path: Path, capacity: int = 32) -> tuple[SteerablePolicy, SqliteStore]:
    """That policy with its users in a file, and the store."""
    policy = make_talking_policy(capacity)
    store = SqliteStore(path)
    policy.use_store(store)
    return policy, store


class Running:
    """An app that is served, in a thread. `url` is where."""

    def __init__(self, app: Any) -> None:
        config = uvicorn.Config(app, port=0, log_level="warning", http=_Protocol, timeout_graceful_shutdown=2)
        self._server = Server(config, app, 5.0)
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
    """A server that is running. `url` is where."""

    def __init__(self, path: Path, keys: list[Key] | None, engine: dict[str, Any], **settings: Any) -> None:
        self.policy, self.store = make_served_policy(path)
        self.engine = self.policy.engine(**{"max_rows": 8, "max_tokens": 2048, "step_tokens": 64, **engine})
        self.app = make_app(only(self.policy, self.engine), self.store, Settings("tiny", **settings), keys)
        self.service = self.app.state.service
        super().__init__(self.app)

    def stop(self) -> None:
        super().stop()
        self.store.close()


@contextlib.contextmanager
def tiny_server(
    path: Path, keys: list[Key] | None = None, engine: dict[str, Any] | None = None, **settings: Any
) -> Iterator[Tiny]:
    """A server for the block; options are those of Settings."""
    server = Tiny(path, keys, engine or {}, **settings)
    try:
        yield server
    finally:
        server.stop()
