"""The example in the README runs."""

import re
from pathlib import Path

import pytest
import tiny
import torch
from transformers import BertConfig, BertModel

ROOT = Path(__file__).parent.parent


def save_encoder(path: Path) -> None:
    config = BertConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=384,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(path)
    tiny.make_tokenizer().save_pretrained(path)


def test_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    model, encoder = tmp_path / "model", tmp_path / "encoder"
    tiny.make_model(hidden_size=64).save_pretrained(model)
    tiny.make_tokenizer().save_pretrained(model)
    save_encoder(encoder)
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(model), "ENCODER": str(encoder)}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["answers"]) == 5
    assert len(list((tmp_path / "my-policy").glob("steering-*.safetensors"))) == 1


def test_files_named_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / name).is_file(), name
