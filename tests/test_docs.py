"""The documentation: its Python runs, page by page, and what it links to is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_embedder import make_bert
from tiny import make_ids, make_model, make_policy, make_tokenizer

from fssa_fast import TextEmbedder

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_a_pages_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks one after the other, with a policy and some token ids at hand."""
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    embedder = TextEmbedder(make_bert(), tokenizer)
    torch.manual_seed(0)
    names: dict[str, Any] = {"ids": make_ids(3), "policy": fresh(tokenizer, embedder)}
    for block in blocks(page):
        if "use_store" in block:  # which wants a policy without users
            names["policy"] = fresh(tokenizer, embedder)
        exec(compile(block, page.name, "exec"), names)


def fresh(tokenizer: Any, embedder: TextEmbedder) -> Any:
    return make_policy(make_model(), tokenizer=tokenizer, embedder=embedder)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (DOCS / target).is_file(), f"{page.name}: {target}"
