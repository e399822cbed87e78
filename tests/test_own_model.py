"""The example of a model that is not from Hugging Face: trained, compiled and exported."""

from __future__ import annotations

import torch

from examples import own_model


def test_own_model_is_trained_compiled_and_exported(capsys):
    before, after, program = own_model.main(steps=200)
    assert before < 0.1 and after > 0.7
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"fssa.context.default", "fssa.lora.default", "fssa.film.default"} <= ops
    output = capsys.readouterr().out
    assert "compiled: differs" in output and "exported: differs" in output


def test_own_model_says_nothing_of_a_user_to_another():
    torch.manual_seed(0)
    model = own_model.Steered()
    (x, slots, pairs, choices, offsets), _ = own_model.draw(2)
    with torch.no_grad():
        model.b.normal_()
        both = model(x, slots, pairs, choices, offsets)
        flipped = choices.clone()
        flipped[own_model.CHOICES :] = 1 - flipped[own_model.CHOICES :]
        changed = model(x, slots, pairs, flipped, offsets)
    assert torch.equal(both[slots == 0], changed[slots == 0])
    assert not torch.equal(both[slots == 1], changed[slots == 1])
