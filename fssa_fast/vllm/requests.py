"""Requests at vLLM's front: who is asked for becomes a latent, or the client is told why not.

All that a client sends is checked here: what reaches the workers is a text that `latents.encode` made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fssa_fast.users.store import StoreError
from fssa_fast.vllm.latents import BASE, KEY, cache_salt
from fssa_fast.vllm.named import KEYS, NamedUsers
from fssa_fast.vllm.options import read_options
from fssa_fast.vllm.seams import check_seams, request_classes, wrap

BASE_MODEL = ":base"
"""What ends the name of the base model."""


def start(theirs: Callable[..., Any], processor: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """`InputProcessor.__init__`: then, where this vLLM is steered, its users, and what requests go through."""
    theirs(processor, vllm_config, *args, **kwargs)
    options = read_options(vllm_config.load_config)
    processor.fssa_users = None if options is None else NamedUsers.open(options, vllm_config.model_config)
    if options is not None:
        check_seams()
        wrap(type(processor), "process_inputs", process_inputs)
        for request in request_classes():
            wrap(request, "to_sampling_params", carry_user)
            if hasattr(request, "to_beam_search_params"):
                wrap(request, "to_beam_search_params", no_beams)


def process_inputs(theirs: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    """`InputProcessor.process_inputs`: then, the latent among the extra arguments, and the salt that goes with it.

    Raises vLLM's validation error, which is a 400, for an unknown user or a steering that cannot be.
    """
    request = theirs(processor, *args, **kwargs)
    users = processor.fssa_users
    if users is None or request.sampling_params is None:
        return request
    params = request.sampling_params
    asked = dict(params.extra_args or {})
    text = _checked(users.text, asked)
    rest = {key: value for key, value in asked.items() if key not in KEYS}
    params.extra_args = rest if text is None else {**rest, KEY: text}
    request.cache_salt = cache_salt(text, request.cache_salt)
    return request


def _checked(text: Callable[[Mapping[str, Any]], str | None], asked: Mapping[str, Any]) -> str | None:
    from vllm.exceptions import VLLMValidationError

    try:
        return text(asked)
    except StoreError:
        raise  # the server's fault, not the client's
    except (LookupError, ValueError) as error:
        raise VLLMValidationError(error.args[0], parameter="user") from error


def asked_user(request: Any) -> str | None:
    """Whom a request over HTTP names: the base by the model's name, else the field `user`."""
    if isinstance(request.model, str) and request.model.endswith(BASE_MODEL):
        return BASE
    return request.user or None


def carry_user(theirs: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    """`to_sampling_params`: then, the user among the extra arguments, where vllm_xargs name none."""
    params = theirs(request, *args, **kwargs)
    extra, user = dict(params.extra_args or {}), asked_user(request)
    if user is not None and not KEYS.intersection(extra) - {"fssa_strength"}:
        params.extra_args = {**extra, "fssa_user": user}
    return params


def no_beams(theirs: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    """`to_beam_search_params`: only for who is not steered by name, since beams carry no extra arguments."""
    if asked_user(request) is not None or KEYS.intersection(request.vllm_xargs or {}):
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError("use_beam_search: expected false for a request with a user, got true")
    return theirs(request, *args, **kwargs)
