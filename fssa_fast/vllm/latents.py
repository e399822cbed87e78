"""What a request carries to the workers: a strength and a latent, as text.

The text is all that makes a user's row: equal texts are equal rows, so its digest is the user's version wherever one is
needed, such as in the salt of the prefix cache.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BASE, PRIOR = "__base__", "__prior__"
KEY = "fssa"
"""Where a request's extra arguments hold the text."""


@dataclass(frozen=True, eq=False)
class Steering:
    """How strongly, and by which latent [H] in bfloat16, a request is steered."""

    strength: float
    latent: Tensor


def encode(steering: Steering) -> str:
    """The text: the strength, a colon, and the latent's bytes in base64."""
    latent = steering.latent.detach().cpu().bfloat16().contiguous().view(torch.int16).numpy()
    return f"{float(steering.strength)!r}:{base64.b64encode(latent.tobytes()).decode()}"


def decode(text: str, width: int) -> Steering:
    """The strength and the latent of a text.

    Raises ValueError for a text of another form, another width H, or numbers that are not finite.
    """
    if not isinstance(text, str):
        raise ValueError(f"latent: expected a text, got {type(text).__name__}")
    number, _, packed = text.partition(":")
    try:
        strength = float(number)
        latent = np.frombuffer(base64.b64decode(packed, validate=True), np.int16)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"latent: expected STRENGTH:BASE64, got {text[:40]!r}") from error
    if len(latent) != width:
        raise ValueError(f"latent: expected {width} numbers in bfloat16, got {len(latent)}")
    found = torch.from_numpy(latent.copy()).view(torch.bfloat16)
    if not math.isfinite(strength) or not torch.isfinite(found).all():
        raise ValueError("latent: expected finite numbers, got NaN or infinity")
    return Steering(strength, found)


def cache_salt(text: str | None, own: str | None) -> str | None:
    """The salt of a request's prefix blocks, so that only requests steered alike share them.

    Args:
        text: of the request's steering; None is the base model.
        own: the salt that the client gave. It never makes one steering's blocks another's.
    """
    if text is None and own is None:
        return None
    parts = ("base" if text is None else f"latent {text}", own or "")
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
