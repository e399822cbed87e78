"""Reads the checkpoints that the reference implementation of arXiv 2412.13998 leaves: config.yaml and model_best.pt."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fssa_fast.files import check_fields, check_tensors, parse_yaml, read_text
from fssa_fast.nn import BTL, DPL, NPBTL, CheckpointError, ContextEncoder, RewardModel

CONFIG_NAME = "config.yaml"
STATE_NAME = "model_best.pt"
HEADS, DROPOUT = 8, 0.1  # fixed in the reference

_CONTEXT_FIELDS: dict[str, type] = {
    "input_dim": int,
    "hidden_dim": int,
    "context_agg_func": str,
    "context_input_encoder": str,
    "sample_latents": bool,
}

# Linear by Linear: the reference's name and ours.
_INNER_LINEAR = {"inner_encoder": "inner0"}
_INNER_MLP = {"inner_encoder.net.0": "inner0", "inner_encoder.net.2": "inner1"}
_OUTER = {"outer_encoder.net.0": "outer0", "outer_encoder.net.2": "outer1"}
_ATTENTION = {
    "self_attention.in_proj_weight": "qkv.weight",
    "self_attention.in_proj_bias": "qkv.bias",
    "self_attention.out_proj.weight": "out.weight",
    "self_attention.out_proj.bias": "out.bias",
}
_TARGET = {"inner_encoder.net.0": "target0", "inner_encoder.net.2": "target1"}
_DECODER = {
    "0.weight": "decoder0.weight",
    "1.weight": "norm.weight",
    "1.bias": "norm.bias",
    "1.running_mean": "norm.running_mean",
    "1.running_var": "norm.running_var",
    "1.num_batches_tracked": "norm.num_batches_tracked",
    "3.weight": "decoder1.weight",
}

_MAX_BLOCKS = 100_000
_MAX_NAME = 300
_MAX_PICKLE, _MAX_DEPTH = 4 << 20, 16
_MARKED = (pickletools.markobject, pickletools.stackslice)
_FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_CONTEXT = "model.context_encoder."
_LLM = "model.decoder.conditional_llm.base."
_FILM = re.compile(
    r"(?P<blocks>[\w.]+)\.(?P<block>\d{1,5})\.film\.(?P<part>gamma|beta)_mlp\.net\.0\.(?P<kind>weight|bias)"
)
_LORA = re.compile(
    r"(?P<blocks>[\w.]+?)\.(?P<block>\d{1,5})\.(?:block\.)?(?P<projection>[\w.]+)\.lora_(?P<matrix>[AB])\.default\.weight"
)


@dataclass(frozen=True)
class ReferenceFilm:
    """One block's FiLM, in this library's convention: `h * (1 + scale) + shift`, both affine in the latent."""

    scale: Tensor  # [D, H]
    scale_bias: Tensor  # [D], the reference's gamma bias minus 1
    shift: Tensor  # [D, H]
    shift_bias: Tensor  # [D]


@dataclass(frozen=True)
class ReferenceLora:
    """One projection's plain LoRA: `y + alpha / R * (x A^T) B`."""

    a: Tensor  # [R, D]
    b: Tensor  # [R, O]


@dataclass(frozen=True)
class ReferencePolicy:
    """A policy checkpoint of the reference, checked, in float32 and in this library's names and conventions."""

    config: dict[str, Any]  # config.yaml's section "model", as it was
    encoder: ContextEncoder  # in evaluation mode
    film: dict[int, ReferenceFilm]  # by block
    lora: dict[str, ReferenceLora]  # by the projection's name in the base model: "model.layers.0.self_attn.q_proj"
    alpha: float
    rank: int  # 0 where there is no LoRA


def read_reference(directory: str | os.PathLike[str]) -> RewardModel | ReferencePolicy:
    """Reads a checkpoint directory of the reference: config.yaml and model_best.pt.

    Only tensors are read from the pickle, never code; sizes and shapes are checked before they are used.

    Returns: a reward model in evaluation mode, or a policy, by the configuration's `model_type`.
    Raises: CheckpointError naming the file, what was expected and what came.
    """
    path = Path(directory) / CONFIG_NAME
    document = parse_yaml(read_text(path), str(path))
    check_fields(str(path), document, {"model": dict})
    config = document["model"]
    check_fields(f"{path}, model", config, {"model_type": str})
    kind, state_path = config["model_type"], Path(directory) / STATE_NAME
    if kind == "reward":
        return reward_from_state(config, _read_state(state_path), str(directory))
    if kind == "policy":
        return policy_from_state(config, _read_state(state_path), str(directory))
    raise CheckpointError(f"{path}, model: 'model_type': expected 'reward' or 'policy', got {kind[:80]!r}")


def _read_state(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file of torch.save, dense, on the CPU."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(f"{path}: expected a whole zip archive, as torch.save writes, got {error}") from error
    # A compressed record, or one listed twice, could be far larger than the file.
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise CheckpointError(f"{path}: expected records stored as they are, as torch.save writes, got compressed ones")
    if sum(record.file_size for record in records) > path.stat().st_size:
        raise CheckpointError(f"{path}: expected records no larger than the file, got more")
    _check_pickle(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused: it holds more than tensors ({str(error).splitlines()[0]})") from error
    except Exception as error:  # a hostile pickle can raise anything from torch's unpickler
        raise CheckpointError(f"{path}: not a whole file of torch.save: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a mapping of names to tensors, got {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or len(name) > _MAX_NAME:
            raise CheckpointError(f"{path}: expected names of at most {_MAX_NAME} characters, got {name!r:.120}")
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name[:120]!r}: expected a tensor, got {type(tensor).__name__}")
        if tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name[:120]!r}: expected numbers, got a tensor on {tensor.device} without")
        # Not contiguous: a huge tensor can be a view of one number.
        if tensor.layout != torch.strided or not tensor.is_contiguous() or tensor.is_quantized:
            raise CheckpointError(f"{path}: {name[:120]!r}: expected a plain contiguous tensor")
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise CheckpointError(f"{path}: {name[:120]!r}: expected finite numbers, got NaN or infinity")
    return {name: tensor.detach() for name, tensor in state.items()}


def _check_pickle(path: Path) -> None:
    """Raises CheckpointError for a pickle that builds more than a flat mapping of tensors needs; nothing is built.

    A tuple that holds one tuple twice, and so on thirty times, is a hundred bytes, and its hash never ends. What is
    remembered and fetched again may therefore be plain (a name, a dtype), never a container.
    """
    try:
        data = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")  # the reader that torch.load uses
    except RuntimeError as error:
        raise CheckpointError(f"{path}: not a whole file of torch.save: {error}") from error
    if len(data) > _MAX_PICKLE:
        raise CheckpointError(f"{path}: expected at most {_MAX_PICKLE} bytes of names and shapes, got {len(data)}")
    stack: list[int] = []  # of each value its depth: 0 is plain, -1 is a mark
    memo: dict[int, int] = {}
    try:
        for code, value_of, _ in pickletools.genops(data):
            argument: Any = value_of
            if code.name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                memo[len(memo) if code.name == "MEMOIZE" else int(argument)] = stack[-1]
                continue
            if code.name in ("BINGET", "LONG_BINGET", "GET"):
                if memo[int(argument)]:
                    raise CheckpointError(f"{path}: refused: it holds one container in several places")
                stack.append(0)
                continue
            taken: list[int] = []
            if pickletools.markobject in code.stack_before:
                while (value := stack.pop()) != -1:
                    taken.append(value)
            for _ in [kind for kind in code.stack_before if kind not in _MARKED]:
                taken.append(stack.pop())
            # What is made of parts is one deeper than they; what is filled stays as deep, or gets so.
            filled = taken.pop() if code.name in _FILLING else 0
            depth = max(filled, 1 + max(taken)) if taken else int(code.name.startswith("EMPTY_"))
            depth = 0 if code.name == "STACK_GLOBAL" else depth
            if depth > _MAX_DEPTH:
                raise CheckpointError(f"{path}: refused: it nests more than {_MAX_DEPTH} containers")
            stack += [-1 if kind is pickletools.markobject else depth for kind in code.stack_after]
    except CheckpointError:
        raise
    except Exception as error:  # not a pickle: what is missing on its stack, or in its memo
        raise CheckpointError(f"{path}: not a whole file of torch.save: {error}") from error


# ---------------------------------------------------------------- parts of a state


def _linears(names: Mapping[str, str]) -> dict[str, str]:
    return {f"{old}.{part}": f"{new}.{part}" for old, new in names.items() for part in ("weight", "bias")}


def _context_names(inner: str, pooling: str) -> dict[str, str]:
    names = _linears((_INNER_MLP if inner == "mlp" else _INNER_LINEAR) | _OUTER)
    return names | (_ATTENTION if pooling == "self-attention" else {})


def _context_arguments(where: str, config: dict[str, Any]) -> dict[str, Any]:
    check_fields(f"{where}, model", config, _CONTEXT_FIELDS)
    return {
        "embedding_width": config["input_dim"],
        "latent_width": config["hidden_dim"],
        "inner": config["context_input_encoder"],
        "pooling": config["context_agg_func"],
        "heads": HEADS,
        "dropout": DROPOUT,
        "sampled": config["sample_latents"],
    }


def _prefixed(prefix: str, names: Mapping[str, str], ours: str = "") -> dict[str, str]:
    return {prefix + old: ours + new for old, new in names.items()}


def _load(where: str, module: torch.nn.Module, names: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    """Gives `module` (on meta) the tensors of `state`, whose names are the keys of `names`, after checking them."""
    wanted = module.state_dict()
    expected = {old: wanted[new] for old, new in names.items()}
    check_tensors(where, {name: tuple(tensor.shape) for name, tensor in state.items()}, expected)
    found = {}
    for old, new in names.items():
        if state[old].is_floating_point() != wanted[new].is_floating_point():
            raise CheckpointError(f"{where}: {old!r}: expected dtype {wanted[new].dtype}, got {state[old].dtype}")
        found[new] = state[old].to(wanted[new].dtype)
    module.load_state_dict(found, assign=True)
    module.eval()


# ---------------------------------------------------------------- rewards


def reward_from_state(config: dict[str, Any], state: Mapping[str, Tensor], where: str) -> RewardModel:
    """The reward model of the reference's configuration and state; `where` names their source in errors."""
    check_fields(
        f"{where}, model",
        config,
        {
            "input_dim": int,
            "hidden_dim": int,
            "is_conditional": bool,
            "distributional_head": bool,
            "target_input_encoder": str,
        },
    )
    if config["target_input_encoder"] != "mlp":
        raise CheckpointError(
            f"{where}, model: 'target_input_encoder': expected 'mlp', got {config['target_input_encoder'][:80]!r}"
        )
    conditional = config["is_conditional"]
    if conditional and config["distributional_head"]:
        raise CheckpointError(f"{where}, model: 'distributional_head': expected false with a context, got true")
    decoder = "model.decoder.decoder.net." if conditional else "model.decoder.net."
    names = _prefixed("model.target_encoder.", _linears(_TARGET)) | _prefixed(decoder, _DECODER)
    kind: type[RewardModel]
    if conditional:
        kind, arguments = NPBTL, _context_arguments(where, config)
        context = _context_names(arguments["inner"], arguments["pooling"])
        names |= _prefixed(_CONTEXT, context, "encoder.")
    else:
        kind = DPL if config["distributional_head"] else BTL
        arguments = {"embedding_width": config["input_dim"], "latent_width": config["hidden_dim"]}
    try:
        with torch.device("meta"):
            model = kind(**arguments)
    except ValueError as error:
        raise CheckpointError(f"{where}, model: {error}") from error
    _load(where, model, names, state)
    return model


# ---------------------------------------------------------------- policies


def encoder_from_state(
    config: dict[str, Any], state: Mapping[str, Tensor], where: str, prefix: str = ""
) -> ContextEncoder:
    """The context encoder of the reference's configuration and state, in evaluation mode."""
    arguments = _context_arguments(where, config)
    try:
        with torch.device("meta"):
            encoder = ContextEncoder(**arguments)
    except ValueError as error:
        raise CheckpointError(f"{where}, model: {error}") from error
    _load(where, encoder, _prefixed(prefix, _context_names(encoder.inner_kind, encoder.pooling)), state)
    return encoder


def policy_from_state(config: dict[str, Any], state: Mapping[str, Tensor], where: str) -> ReferencePolicy:
    """The policy of the reference's configuration and state; `where` names their source in errors."""
    check_fields(
        f"{where}, model",
        config,
        {"is_conditional": bool, "tune_llm": bool, "num_film_layers": (int, list)},
    )
    if not config["is_conditional"]:
        raise CheckpointError(
            f"{where}, model: 'is_conditional': expected true, got false: there is no latent to steer by"
        )
    rank, alpha = 0, 0.0
    if config["tune_llm"]:
        check_fields(f"{where}, model", config, {"lora_r": int, "lora_alpha": float})
        rank, alpha = config["lora_r"], float(config["lora_alpha"])
    own = {name: tensor for name, tensor in state.items() if name.startswith(_CONTEXT)}
    encoder = encoder_from_state(config, own, where, _CONTEXT)

    # The adapter library puts one more "model." between its own wrapper and the base model.
    prefix = _LLM + "model." if config["tune_llm"] else _LLM
    film_parts: dict[int, dict[str, Tensor]] = {}
    lora_parts: dict[tuple[int, str], dict[str, Tensor]] = {}
    containers = set()
    for name, tensor in state.items():
        if name in own:
            continue
        inside = name.removeprefix(prefix)
        film, lora = _FILM.fullmatch(inside), _LORA.fullmatch(inside)
        match = film or lora
        if inside == name or match is None or (lora is not None and not rank):
            raise CheckpointError(f"{where}: tensor {name[:160]!r} is not expected")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{where}: {name!r}: expected a floating dtype, got {tensor.dtype}")
        containers.add(match["blocks"])
        block = int(match["block"])
        if film:
            parts, part = film_parts.setdefault(block, {}), f"{film['part']}.{film['kind']}"
        else:
            parts, part = lora_parts.setdefault((block, match["projection"]), {}), match["matrix"]
        if part in parts:
            raise CheckpointError(f"{where}: {name[:160]!r}: this tensor is there twice, under two names")
        parts[part] = tensor.to(torch.float32)
    if len(containers) > 1:
        raise CheckpointError(f"{where}: expected one list of blocks, got {sorted(containers)}")
    container = containers.pop() if containers else ""

    _check_blocks(where, config["num_film_layers"], set(film_parts), {block for block, _ in lora_parts})
    width: int | None = None
    for block, parts in sorted(film_parts.items()):
        at = f"{prefix}{container}.{block}.film"
        _check_parts(where, at, parts, ("gamma.weight", "gamma.bias", "beta.weight", "beta.bias"))
        width = parts["gamma.weight"].shape[0] if width is None else width
        for part, tensor in parts.items():
            shape = (width, encoder.latent_width) if part.endswith("weight") else (width,)
            _check_shape(where, f"{at} {part}", tensor, shape)
    projections = {projection for _, projection in lora_parts}
    for (block, projection), parts in sorted(lora_parts.items()):
        at = f"{prefix}{container}.{block} {projection}"
        _check_parts(where, at, parts, ("A", "B"))
        _check_shape(where, f"{at} lora_A", parts["A"], (rank, width))
        _check_shape(where, f"{at} lora_B", parts["B"], (None, rank))
    for block in sorted({block for block, _ in lora_parts}):
        for projection in sorted(projections):
            if (block, projection) not in lora_parts:
                raise CheckpointError(f"{where}: {prefix}{container}.{block}: LoRA on {projection} is missing")
    return ReferencePolicy(
        config=config,
        encoder=encoder,
        film={
            block: ReferenceFilm(
                parts["gamma.weight"], parts["gamma.bias"] - 1, parts["beta.weight"], parts["beta.bias"]
            )
            for block, parts in sorted(film_parts.items())
        },
        lora={
            f"{container}.{block}.{projection}": ReferenceLora(parts["A"], parts["B"].T.contiguous())
            for (block, projection), parts in sorted(lora_parts.items())
        },
        alpha=alpha,
        rank=rank,
    )


def _check_blocks(where: str, wanted: int | list[Any], film: set[int], lora: set[int]) -> None:
    """Whether the blocks that have FiLM are those the configuration asks for, and LoRA's are all there are."""
    if isinstance(wanted, list):
        legal = bool(wanted) and all(type(block) is int and 0 <= block < _MAX_BLOCKS for block in wanted)
        expected = set(wanted) if legal else set()
    else:
        legal = wanted == -1 or 0 < wanted <= _MAX_BLOCKS
        expected = set(range(max(film | lora, default=-1) + 1 if wanted == -1 else wanted)) if legal else set()
    if not legal:
        raise CheckpointError(
            f"{where}, model: 'num_film_layers': expected -1, a count or a list of blocks, got {str(wanted)[:80]}"
        )
    if film != expected or not film:
        raise CheckpointError(
            f"{where}: 'num_film_layers' is {str(wanted)[:80]}: expected FiLM on blocks {sorted(expected)[:20]}, got "
            f"{sorted(film)[:20]}"
        )
    if lora and lora != set(range(max(film | lora) + 1)):
        raise CheckpointError(f"{where}: expected LoRA on blocks 0 to {max(film | lora)}, got {sorted(lora)[:20]}")


def _check_parts(where: str, at: str, parts: Mapping[str, Tensor], expected: tuple[str, ...]) -> None:
    for part in expected:
        if part not in parts:
            raise CheckpointError(f"{where}: {at}: {part} is missing")


def _check_shape(where: str, at: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    if tensor.dim() != len(shape) or any(
        want not in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
    ):
        want = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        raise CheckpointError(f"{where}: {at}: expected shape {want}, got {list(tensor.shape)}")
