"""Conditions a model of your own, not from Hugging Face, on users' choices: ``python -m examples.own_model``.

The model is a small network from a point x in [-1, 1]^2 to a number. Every user has a direction, and wants the number
to rise along it; the model is never told the direction, only a few choices "I prefer this point to that one". From them
`ContextEncoder` makes a latent and `Modulator` a row of numbers, with which `lora` modulates an adapter of a layer and
`film` scales and shifts what comes out of it. They are trained together, compiled and exported; under autocast and in
torch.func the ops work as torch's own do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fssa_fast.nn import ContextEncoder, Modulator
from fssa_fast.ops import film, lora

WIDTH, RANK = 32, 4
CHOICES, POINTS = 8, 16  # of a user, in training


class Steered(nn.Module):
    """Linear, tanh, Linear, tanh, Linear, whose middle layer is each user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ContextEncoder(embedding_width=2, latent_width=16, inner="mlp", pooling="mean")
        # A user's row: the adapter's gamma (1 at the start), then the scale and the shift of film (0: unchanged).
        start = torch.cat([torch.ones(RANK), torch.zeros(2 * WIDTH)])
        self.modulator = Modulator(16, RANK + 2 * WIDTH, init=start, std=0.1)
        self.first, self.middle, self.last = nn.Linear(2, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.a = nn.Parameter(torch.randn(RANK, WIDTH) / WIDTH**0.5)
        self.b = nn.Parameter(torch.zeros(RANK, WIDTH))

    def forward(self, x: Tensor, slots: Tensor, pairs: Tensor, choices: Tensor, offsets: Tensor) -> Tensor:
        """x [B, 2], slots [B]: which user a row is for; the users' choices as `ContextEncoder` takes them. [B]."""
        rows = self.modulator(self.encoder(pairs, choices, offsets))
        gamma, scale, shift = rows.split([RANK, WIDTH, WIDTH], 1)
        hidden = torch.tanh(self.first(x))
        (y,) = lora(
            hidden, [self.middle(hidden)], a=self.a, bs=[self.b], gamma=gamma, beta=None, slots=slots, scaling=1.0
        )
        hidden = torch.tanh(film(y, scale=scale, shift=shift, slots=slots))
        return self.last(hidden).squeeze(-1)


def draw(users: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """What the model takes for so many new users, each with POINTS points, and the numbers that they want."""
    angle = 2 * torch.pi * torch.rand(users)
    direction = torch.stack([angle.cos(), angle.sin()], 1)
    pairs = 2 * torch.rand(users, CHOICES, 2, 2) - 1
    choices = (pairs @ direction[:, None, :, None]).squeeze(-1).argmax(-1)  # the option further along
    x, slots = 2 * torch.rand(users * POINTS, 2) - 1, torch.arange(users).repeat_interleave(POINTS)
    given = (x, slots, pairs.flatten(0, 1), choices.flatten(), CHOICES * torch.arange(users + 1))
    return given, (x * direction[slots]).sum(-1)


def explained(model: nn.Module) -> float:
    """The share of the variance that the model explains for users whom it has not seen."""
    given, wanted = draw(200)
    with torch.no_grad():
        return 1 - float(((model(*given) - wanted) ** 2).mean() / wanted.var())


def main(steps: int = 400) -> tuple[float, float, torch.export.ExportedProgram]:
    """Returns what is explained before and after training, and the exported model."""
    torch.manual_seed(0)
    model = Steered()
    before = explained(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        given, wanted = draw(64)
        loss = ((model(*given) - wanted) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = explained(model)
    print(f"of what new users want, explained: {before:.2f} before training, {after:.2f} after")

    given, _ = draw(3)
    model.eval()
    with torch.no_grad():
        eager = model(*given)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*given)  # "inductor" with a C++ compiler
        program = torch.export.export(model, given)
        exported = program.module()(*given)
    for name, result in (("compiled", compiled), ("exported", exported)):
        print(f"{name}: differs from the model by at most {(result - eager).abs().max():.1e}")
        torch.testing.assert_close(result, eager)
    return before, after, program


if __name__ == "__main__":
    main()
