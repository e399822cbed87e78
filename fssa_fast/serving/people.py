"""/v1/users and what belongs to them: choices, feedback, questions, the map."""

from __future__ import annotations

import hashlib
import itertools
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from fssa_fast.data.history import Made
from fssa_fast.generation.prompts import told
from fssa_fast.policy import SteerablePolicy
from fssa_fast.serving.completions import Answers, Whom, submit, tells_chats
from fssa_fast.serving.errors import ApiError, failure, json_response, translated, unknown_user
from fssa_fast.serving.forms import ChoicesForm, FeedbackForm, Name, NameInPath, QuestionForm, UserForm
from fssa_fast.serving.keys import Client
from fssa_fast.serving.remembered import Completion
from fssa_fast.serving.service import Asking, Service, Serving, once
from fssa_fast.users import Choice, UnknownUser
from fssa_fast.users.store import Option, StoreConflict, StoredUser

router = APIRouter(prefix="/v1", tags=["users"])

Limit = Annotated[int, Query(ge=1, le=1000)]
ATTEMPTS = 5  # at a change of a user whom another replica changes too
MAP_USERS = 1000


@router.get("/users")
async def users(service: Serving, client: Asking, limit: Limit = 100, after: Name | None = None) -> Response:
    """A page of this key's users, in the order of their names; the next begins `after` the last of it."""

    def page() -> list[str]:
        begin = client.prefix if after is None else client.stored(after)
        names = service.store.names(begin)
        own = itertools.takewhile(lambda name: name.startswith(client.prefix), names)
        return list(itertools.islice(own, limit + 1))

    names = await service.call(page)
    found = [user for name in names[:limit] if (user := await service.call(service.store.get, name)) is not None]
    return json_response({"object": "list", "data": [_user(client, one) for one in found],
                          "has_more": len(names) > limit})  # fmt: skip


@router.post("/users", status_code=201)
async def create(form: UserForm, request: Request, service: Serving, client: Asking) -> Response:
    """Makes a user, of choices or of none."""
    name = client.stored(form.name)

    async def write() -> Response:
        new = _made([(c.chosen, c.rejected, c.prompt) for c in form.choices])
        await service.call(_create, service, name, new)
        found = await service.call(_stored, service, client, name)
        _record(service, found, new)
        return json_response(_user(client, found), 201)

    return await once(request, service, client, write)


@router.get("/users/{name}")
async def user(name: NameInPath, service: Serving, client: Asking, latent: bool = False) -> Response:
    """A user; with the latent where asked for."""
    stored = await service.call(_stored, service, client, client.stored(name))
    return json_response(_user(client, stored) | ({"latent": stored.latent.tolist()} if latent else {}))


@router.delete("/users/{name}")
async def delete(name: NameInPath, request: Request, service: Serving, client: Asking) -> Response:
    """Forgets a user; by the time of the answer nothing is left at rest."""

    async def write() -> Response:
        try:
            await service.call(service.users.remove, client.stored(name))
        except UnknownUser as error:
            raise unknown_user(name) from error
        return json_response({"id": name, "object": "user", "deleted": True})

    return await once(request, service, client, write)


# ------------------------------------------------------------ choices


@router.get("/users/{name}/choices")
async def choices(
    name: NameInPath,
    service: Serving,
    client: Asking,
    limit: Limit = 100,
    offset: Annotated[int, Query(ge=0, le=1 << 31)] = 0,
) -> Response:
    """A user's choices in the order in which they were made, a page of them."""
    found = await service.call(_choices, service, client, client.stored(name))
    data = [choice_object(*pair) for pair in found[offset : offset + limit]]
    return json_response({"object": "list", "data": data, "has_more": len(found) > offset + limit})


@router.post("/users/{name}/choices", status_code=201)
async def add_choices(
    name: NameInPath, form: ChoicesForm, request: Request, service: Serving, client: Asking
) -> Response:
    """Adds choices; by the time of the answer they are on disk, and the next answer is steered by them."""
    stored = client.stored(name)

    async def write() -> Response:
        new = _made([(c.chosen, c.rejected, c.prompt) for c in form.choices])
        found = await service.call(_add, service, client, stored, new)
        _record(service, found, new)
        return json_response(_user(client, found), 201)

    return await once(request, service, client, write)


@router.delete("/users/{name}/choices/{choice}")
async def remove_choice(name: NameInPath, choice: str, request: Request, service: Serving, client: Asking) -> Response:
    """Removes a choice; of several that are the same, all."""
    stored = client.stored(name)

    async def write() -> Response:
        found = await service.call(_remove_choice, service, client, stored, choice)
        return json_response(_user(client, found))

    return await once(request, service, client, write)


@router.post("/feedback", status_code=201)
async def feedback(form: FeedbackForm, request: Request, service: Serving, client: Asking) -> Response:
    """Which of two completions was better: a choice of the user whom they were made for, or of the one named."""

    async def write() -> Response:
        sides = [
            await service.call(_remembered, service, client, *side)
            for side in (("better", form.better, form.better_index), ("worse", form.worse, form.worse_index))
        ]
        (better, chosen), (worse, rejected) = sides
        if better.prompt != worse.prompt:
            raise ApiError(400, "different_prompts", "better, worse: expected answers to the same prompt", "worse")
        if form.user is not None:
            stored = client.stored(form.user)
        elif better.user is not None and better.user == worse.user:
            stored = better.user
        else:
            raise ApiError(
                400, "invalid_value", "user: expected a name, since these were not made for one user", "user"
            )
        (new,) = _made([(chosen, rejected, better.prompt)])
        found = await service.call(_add, service, client, stored, [new])
        _record(service, found, [new], better.made, worse.made)
        return json_response({"object": "feedback", "user": _user(client, found)}, 201)

    return await once(request, service, client, write)


@router.post("/users/{name}/question")
async def question(
    name: NameInPath, form: QuestionForm, request: Request, service: Serving, client: Asking
) -> Response:
    """Two answers to a prompt, the choice between which tells most; `/v1/feedback` takes their ids.

    Of some sampled answers, the two after which the user's row would differ most by which of them is preferred.
    """
    stored = client.stored(name)
    context = _pairs(await service.call(_choices, service, client, stored), service)
    version = service.versions.of(stored)
    embedder = version.policy.embedder
    if embedder is None:
        raise ApiError(400, "no_embedder", "question: expected a policy with a text embedder; this one has none")
    prompt = told(form.prompt, tells_chats(service))
    options: dict[str, Any] = {
        "temperature": form.temperature,
        "top_p": form.top_p,
        "seed": None if form.seed is None else form.seed % (1 << 63),
    }
    with service.using(version), client.open():
        try:
            whom = Whom(stored, 1.0, version, stored)
            begun = service.call(submit, service, client, whom, [prompt], form.candidates, form.max_tokens, options)
            handles, made = await begun
        except Exception as error:
            raise translated(error) from error
        try:
            results = await Answers(service, client, handles, time.perf_counter()).all()
        except Exception as error:
            raise failure(error) from error
        finally:
            for handle in handles:
                handle.cancel()
    texts = list(dict.fromkeys(result.text or "" for result in results))
    if len(texts) < 2:
        raise ApiError(409, "no_question", "candidates: expected two different answers, but all were the same")

    def pick() -> tuple[int, int, float]:
        return telling_pair(version.policy, context, embedder.encode([(form.prompt, text) for text in texts]))

    first, second, distance = await service.call(pick)
    answers = []
    for text in (texts[first], texts[second]):
        one = Completion(stored, form.prompt, (text,), made)
        number = "chatcmpl-" + uuid.uuid4().hex
        if service.history is not None:
            service.history.completion(number, stored, made)
        service.completions.put((client.namespace, number), one, one.size())
        answers.append({"id": number, "text": text})
    return json_response({"object": "question", "user": name, "prompt": form.prompt, "answers": answers,
                          "distance": distance})  # fmt: skip


@torch.no_grad()
def telling_pair(policy: SteerablePolicy, context: torch.Tensor, options: torch.Tensor) -> tuple[int, int, float]:
    """Which two of the options [N, E] tell most of a user with these choices [K, 2, E].

    The two for which the rows after preferring the one and after preferring the other are farthest apart, and how far.
    """
    pairs = list(itertools.combinations(range(len(options)), 2))
    contexts = [torch.cat([context, options[list(order)][None]]) for a, b in pairs for order in ((a, b), (b, a))]
    joined = torch.cat(contexts).to(policy.modulator.weight)
    offsets = torch.tensor([0, *(len(one) for one in contexts)]).cumsum(0)
    nothing = torch.zeros(len(joined), dtype=torch.long, device=joined.device)
    rows = policy.rows(policy.encoder.latents(joined, nothing, offsets))
    distances = (rows[::2] - rows[1::2]).norm(dim=1)
    best = int(distances.argmax())
    return *pairs[best], float(distances[best])


@router.get("/users/{name}/export")
async def export(name: NameInPath, service: Serving, client: Asking) -> Response:
    """A user as `fssa users import` reads one: all that is kept of a person but the numbers made of it."""
    stored = client.stored(name)
    found = await service.call(_stored, service, client, stored)
    listed = [{key: value for key, value in choice_object(*pair).items() if key not in ("id", "object")}
              for pair in await service.call(_choices, service, client, stored)]  # fmt: skip
    return json_response({"name": name, "strength": found.strength, "choices": listed})


@router.get("/map")
async def map_of_users(service: Serving, client: Asking) -> Response:
    """Where this key's first thousand users are: latents on their two principal axes, around the prior's.

    A latent z is at `axes (z - center)`: so that who asks can follow a user whose latent changes.
    """
    return json_response(await service.call(_map, service, client))


def _map(service: Service, client: Client) -> dict[str, Any]:
    names = itertools.takewhile(lambda name: name.startswith(client.prefix), service.store.names(client.prefix))
    found = [user for name in itertools.islice(names, MAP_USERS) if (user := service.store.get(name)) is not None]
    policy = service.policy
    with torch.no_grad():
        nothing = torch.empty(0, 2, policy.encoder.embedding_width, device=policy.modulator.weight.device)
        offsets = torch.tensor([0, 0])
        none = torch.zeros(0, dtype=torch.long, device=nothing.device)
        center = policy.encoder.latents(nothing.to(policy.modulator.weight), none, offsets)[0].float().cpu()
    latents = (
        torch.stack([user.latent.float() for user in found]) - center if found else center.new_empty(0, len(center))
    )
    # Fewer than three users have no two axes of their own: then those in which latents move the model most.
    spread = latents if len(found) > 2 else policy.modulator.weight.detach().float().cpu()
    axes = torch.linalg.svd(spread, full_matrices=True).Vh[:2]
    axes = axes * torch.where(axes.sum(1, keepdim=True) < 0, -1.0, 1.0)  # which way an axis points is arbitrary
    places = (latents @ axes.T).tolist()
    return {
        "object": "map",
        "axes": axes.tolist(),
        "center": center.tolist(),
        "users": [{"id": client.public(u.name), "at": at} for u, at in zip(found, places, strict=True)],
    }


# ------------------------------------------------------------ inside


def _user(client: Client, user: StoredUser) -> dict[str, Any]:
    return {"id": client.public(user.name), "object": "user", "version": user.version, "strength": user.strength,
            "choices": user.choices}  # fmt: skip


def choice_id(chosen: Option, rejected: Option) -> str:
    """What a choice is named by: the same sides have the same name."""
    return "choice-" + hashlib.blake2b(chosen.key() + rejected.key(), digest_size=12).hexdigest()


def choice_object(chosen: Option, rejected: Option) -> dict[str, Any]:
    """A choice as it is listed: its texts, or, where there were none, its embeddings."""
    found: dict[str, Any] = {"id": choice_id(chosen, rejected), "object": "choice"}
    if chosen.text is not None and rejected.text is not None:
        return found | {"prompt": chosen.prompt, "chosen": chosen.text, "rejected": rejected.text}
    return found | {"chosen": chosen.embedding.tolist(), "rejected": rejected.embedding.tolist()}


def _made(sides: Sequence[tuple[str, str, str]]) -> list[Choice]:
    try:
        return [Choice(chosen, rejected, prompt) for chosen, rejected, prompt in sides]
    except ValueError as error:
        raise translated(error) from error


def _record(
    service: Service, user: StoredUser, new: Sequence[Choice], better: Made | None = None, worse: Made | None = None
) -> None:
    """Writes choices into the history that have been stored: the last ones of a user."""
    if service.history is not None and user.choices is not None:
        version = service.versions.of(user.name).name
        for number, choice in enumerate(new, start=user.choices - len(new) + 1):
            texts = choice.prompt, str(choice.chosen), str(choice.rejected)
            service.history.choice(user.name, version, texts, user.version, number, better, worse)


def _stored(service: Service, client: Client, stored: str) -> StoredUser:
    found = service.store.get(stored)
    if found is None:
        raise unknown_user(client.public(stored))
    return found


def _choices(service: Service, client: Client, stored: str) -> Sequence[tuple[Option, Option]]:
    try:
        return service.users.choices(stored)
    except UnknownUser as error:
        raise unknown_user(client.public(stored)) from error
    except ValueError as error:
        raise ApiError(409, "choices_not_kept", "this user's choices were not kept") from error


def _create(service: Service, stored: str, choices: Sequence[Choice]) -> None:
    try:
        service.users.add(stored, choices)
    except ValueError as error:
        if stored in service.users:
            raise ApiError(409, "user_exists", "name: expected a new one, got one that is taken", "name") from error
        raise translated(error) from error
    service.metrics.choices.inc(len(choices))


def _add(service: Service, client: Client, stored: str, new: Sequence[Choice]) -> StoredUser:
    """Adds choices to a user, whom the first ones make where the server is told so."""
    for attempt in range(ATTEMPTS):
        try:
            if stored in service.users:
                service.users.add_choices(stored, new)
            elif service.settings.create_users:
                service.users.add(stored, new)
            else:
                raise unknown_user(client.public(stored))
            break
        except (StoreConflict, UnknownUser):  # another replica was first: again, on what it left
            if attempt == ATTEMPTS - 1:
                raise
        except ValueError as error:
            raise translated(error) from error
    service.metrics.choices.inc(len(new))
    return _stored(service, client, stored)


def _remove_choice(service: Service, client: Client, stored: str, choice: str) -> StoredUser:
    for attempt in range(ATTEMPTS):
        try:
            if not service.users.remove_choices(stored, lambda *pair: choice_id(*pair) == choice):
                raise ApiError(404, "choice_not_found", f"choice: expected one of this user's, got {choice!r:.80}")
            return _stored(service, client, stored)
        except UnknownUser as error:
            raise unknown_user(client.public(stored)) from error
        except StoreConflict:
            if attempt == ATTEMPTS - 1:
                raise
        except ValueError as error:
            raise translated(error) from error
    raise AssertionError


def _remembered(service: Service, client: Client, param: str, number: str, index: int) -> tuple[Completion, str]:
    found = service.completions.get((client.namespace, number))
    if found is None or index >= len(found.answers):
        raise ApiError(404, "completion_not_found", f"{param}: expected a completion of the last hour, got none of "
                       f"that id and index", param)  # fmt: skip
    return found, found.answers[index]


def _pairs(choices: Sequence[tuple[Option, Option]], service: Service) -> torch.Tensor:
    sides = [option.embedding for pair in choices for option in pair]
    width = service.policy.encoder.embedding_width
    return torch.stack(sides).view(-1, 2, width) if sides else torch.empty(0, 2, width)
