"""The native core: the C interface of csrc/fssa.h and csrc/cuda/interface.h, by ctypes.

A plain C library, so that one build serves every Python. A struct has here the members that it has in the header, in
their order; tests/test_native.py compares them as a C compiler lays them out. A struct inside a struct is given as a
tuple, an address as an integer, 0 for NULL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from ctypes import (
    CDLL,
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_void_p,
    sizeof,
)
from ctypes import Array as CArray
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def _members(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Input(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64)]


class Output(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64)]


class Slots(Structure):
    _fields_ = [("data", c_void_p), ("is_int64", c_int32), *_members(c_int64, "count rows_per_slot limit")]


class Film(Structure):
    _fields_ = _members(Input, "scale shift")


class Norm(Structure):
    _fields_ = [("weight", c_void_p), ("eps", c_float)]


class Modulation(Structure):
    _fields_ = [*_members(Input, "gamma beta"), ("gamma_column_stride", c_int64)]


_ROWS = [("dtype", c_int), *_members(c_int64, "rows width")]  # how most arguments begin


class FilmArgs(Structure):
    _fields_ = [*_ROWS, ("x", Input), ("film", Film), ("slots", Slots), ("y", Output), ("threads", c_int32)]


class FilmNormArgs(Structure):
    _fields_ = [
        *_ROWS, *_members(Input, "x residual"), ("film", Film), ("slots", Slots), ("norm", Norm),
        *_members(Output, "hidden normed"), ("threads", c_int32),
    ]  # fmt: skip


class FilmBackwardArgs(Structure):
    _fields_ = [
        *_ROWS, *_members(Input, "grad x scale"), ("slots", Slots), *_members(Output, "dx dscale dshift"),
        ("threads", c_int32),
    ]  # fmt: skip


class FilmNormGradients(Structure):
    _fields_ = [*_members(Output, "dx dscale dshift"), ("dweight", c_void_p)]


class FilmNormBackwardArgs(Structure):
    _fields_ = [
        *_ROWS, *_members(Input, "grad_hidden grad_normed x residual"), ("film", Film), ("slots", Slots),
        ("norm", Norm), ("gradients", FilmNormGradients), ("threads", c_int32),
    ]  # fmt: skip


class LoraPart(Structure):
    _fields_ = [*_members(c_int64, "rank width"), *_members(Input, "y b"), ("out", Output)]


class LoraArgs(Structure):
    _fields_ = [
        *_ROWS, *_members(Input, "x a"), ("modulation", Modulation), ("slots", Slots), ("scaling", c_float),
        ("parts", POINTER(LoraPart)), ("part_count", c_int64), ("threads", c_int32),
    ]  # fmt: skip


class LoraBackwardPart(Structure):
    _fields_ = [*_members(c_int64, "rank width"), *_members(Input, "grad b"), ("db", Output)]


class LoraGradients(Structure):
    _fields_ = _members(Output, "dx da dgamma dbeta")


class LoraBackwardArgs(Structure):
    _fields_ = [
        *_ROWS, *_members(Input, "x a"), ("modulation", Modulation), ("slots", Slots), ("scaling", c_float),
        ("parts", POINTER(LoraBackwardPart)), ("part_count", c_int64), ("gradients", LoraGradients),
        ("threads", c_int32),
    ]  # fmt: skip


_WEIGHTS = "inner0 inner0_bias inner1 inner1_bias qkv qkv_bias out out_bias outer0 outer0_bias outer1 outer1_bias"


class ContextWeights(Structure):
    _fields_ = _members(c_void_p, _WEIGHTS)


class ContextGradients(Structure):
    _fields_ = _members(c_void_p, _WEIGHTS)


class ContextEncoder(Structure):
    _fields_ = [
        *_members(c_int64, "embedding_width latent_width encoded_width heads"), *_members(c_int, "inner pooling"),
    ]  # fmt: skip


class ContextInput(Structure):
    _fields_ = [
        ("dtype", c_int), *_members(c_int64, "pair_count users"), ("encoder", ContextEncoder),
        *_members(c_void_p, "pairs choices offsets"), ("weights", ContextWeights), ("threads", c_int32),
    ]  # fmt: skip


class ContextArgs(Structure):
    _fields_ = [("input", ContextInput), ("encoded", c_void_p)]


class ContextRowsArgs(Structure):
    _fields_ = [
        ("input", ContextInput), ("bank_dtype", c_int), ("bank", Output), ("bank_width", c_int64), ("slots", Slots),
        *_members(c_void_p, "modulation modulation_bias noise latents"),
    ]  # fmt: skip


class ContextBackwardArgs(Structure):
    _fields_ = [("input", ContextInput), *_members(c_void_p, "grad dpairs"), ("gradients", ContextGradients)]


class LinearArgs(Structure):
    _fields_ = [
        *_ROWS, ("outputs", c_int64), ("x", Input), *_members(c_void_p, "weight bias"), ("y", Output),
        ("threads", c_int32),
    ]  # fmt: skip


class AdaptPart(Structure):
    _fields_ = [
        *_members(c_int64, "rank width"), ("hidden", Input), ("modulation", Modulation), ("b", c_void_p), ("y", Output),
    ]  # fmt: skip


class AdaptArgs(Structure):
    _fields_ = [
        ("dtype", c_int), ("rows", c_int64), ("slots", Slots), ("parts", POINTER(AdaptPart)), ("part_count", c_int64),
        ("threads", c_int32),
    ]  # fmt: skip


class GateArgs(Structure):
    _fields_ = [
        *_members(c_int, "dtype activation"), *_members(c_int64, "rows width"), *_members(Input, "gate up"),
        ("y", Output), ("threads", c_int32),
    ]  # fmt: skip


class Heads(Structure):
    _fields_ = _members(c_int64, "heads kv_heads head_width")


class Tokens(Structure):
    _fields_ = [("count", c_int64), *_members(Input, "q k v"), *_members(c_void_p, "positions sequences")]


class Rotary(Structure):
    _fields_ = [
        *_members(c_void_p, "q_norm k_norm"), ("eps", c_float), *_members(c_void_p, "cos sin"), ("positions", c_int64),
    ]  # fmt: skip


class BlockCache(Structure):
    _fields_ = [
        *_members(c_void_p, "keys values"), ("blocks", c_int64), ("table", c_void_p),
        *_members(c_int64, "sequences table_stride"),
    ]  # fmt: skip


class Scores(Structure):
    _fields_ = [*_members(c_float, "scale softcap"), ("window", c_int64)]


class AttentionArgs(Structure):
    _fields_ = [
        ("dtype", c_int), ("heads", Heads), ("tokens", Tokens), ("rotary", Rotary), ("cache", BlockCache),
        ("scores", Scores), ("out", Output), ("threads", c_int32),
    ]  # fmt: skip


class SampleArgs(Structure):
    _fields_ = [
        *_ROWS, ("logits", Input), ("slots", Slots),
        *_members(c_void_p, "temperature min_p top_k top_p seed positions tokens"), ("threads", c_int32),
    ]  # fmt: skip


ARGS: dict[str, type[Structure]] = {
    "film": FilmArgs,
    "film_norm": FilmNormArgs,
    "film_backward": FilmBackwardArgs,
    "film_norm_backward": FilmNormBackwardArgs,
    "lora": LoraArgs,
    "lora_backward": LoraBackwardArgs,
    "context": ContextArgs,
    "context_rows": ContextRowsArgs,
    "context_backward": ContextBackwardArgs,
    "linear": LinearArgs,
    "adapt": AdaptArgs,
    "gate": GateArgs,
    "attention": AttentionArgs,
    "sample": SampleArgs,
}
STRUCTS: dict[str, type[Structure]] = {f"fssa_{op}_args": args for op, args in ARGS.items()} | {
    "fssa_input": Input,
    "fssa_output": Output,
    "fssa_slots": Slots,
    "fssa_film": Film,
    "fssa_norm": Norm,
    "fssa_modulation": Modulation,
    "fssa_film_norm_gradients": FilmNormGradients,
    "fssa_lora_part": LoraPart,
    "fssa_lora_backward_part": LoraBackwardPart,
    "fssa_lora_gradients": LoraGradients,
    "fssa_context_weights": ContextWeights,
    "fssa_context_gradients": ContextGradients,
    "fssa_context_encoder": ContextEncoder,
    "fssa_context_input": ContextInput,
    "fssa_adapt_part": AdaptPart,
    "fssa_heads": Heads,
    "fssa_tokens": Tokens,
    "fssa_rotary": Rotary,
    "fssa_block_cache": BlockCache,
    "fssa_scores": Scores,
}
EXCEPTIONS = {1: ValueError, 2: IndexError, 3: MemoryError, 4: RuntimeError}  # by fssa_status


def array(kind: type[Structure], items: Sequence[tuple[Any, ...]]) -> tuple[CArray[Any], int]:
    """The items as an array in C, and their number."""
    made: Any = kind * len(items)  # ctypes makes each struct of its tuple
    return made(*items), len(items)


class Library:
    """A native library, loaded from this path.

    Raises:
        OSError: it cannot be loaded.
        ImportError: it was built from other sources than these, so that arguments would not be what it takes them for.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.c = path, CDLL(str(path))
        try:
            self.c.fssa_last_error.restype = c_char_p
            self.c.fssa_size_of.restype = c_int64
            differ = [name for name, struct in STRUCTS.items() if self.c.fssa_size_of(name.encode()) != sizeof(struct)]
        except AttributeError as error:
            raise ImportError(str(error)) from error
        if differ:
            raise ImportError(f"{path.name} was built from other sources than these: {', '.join(differ)}")

    def check(self, status: int) -> None:
        """Raises what a status says."""
        if status:
            raise EXCEPTIONS[status](self.c.fssa_last_error().decode())


class Core(Library):
    """The CPU ops. They run without Python's lock."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._functions = {op: self.c[f"fssa_cpu_{op}"] for op in ARGS}

    def prepare(self, op: str, *members: Any) -> Callable[[], None]:
        """A call of this op whose arguments, the members of its struct, are laid out once."""
        function, args, check = self._functions[op], ARGS[op](*members), self.check
        pointer = byref(args)

        def call() -> None:
            check(function(pointer))

        return call

    def run(self, op: str, *members: Any) -> None:
        """Calls this op with the members of its struct."""
        self.check(self._functions[op](byref(ARGS[op](*members))))

    def isa(self) -> str:
        """The instruction set in use."""
        name = c_char_p()
        self.check(self.c.fssa_cpu_isa(byref(name)))
        assert name.value is not None
        return name.value.decode()

    def set_isa(self, name: str) -> None:
        """Uses this instruction set from now on, in all threads."""
        self.check(self.c.fssa_set_cpu_isa(name.encode()))

    def has_isa(self, name: str) -> bool:
        """Whether this machine has the instruction set."""
        supported = c_int32()
        self.check(self.c.fssa_cpu_isa_supported(name.encode(), byref(supported)))
        return bool(supported.value)


class Cuda(Library):
    """The CUDA ops."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        for op in ("lora", "context"):
            self.c[f"fssa_cuda_{op}_workspace"].restype = c_int64

    def run(self, op: str, stream: int, workspace: Callable[[int], int], *members: Any) -> None:
        """Puts this op on a stream, with the members of its struct; workspace(bytes) gives the address of memory."""
        args = ARGS[op](*members)
        memory = []
        if op == "lora":
            memory = [c_void_p(workspace(self.c.fssa_cuda_lora_workspace(byref(args))))]
        elif op in ("context", "context_rows"):
            memory = [c_void_p(workspace(self.c.fssa_cuda_context_workspace(byref(args.input))))]
        self.check(self.c[f"fssa_cuda_{op}"](byref(args), *memory, c_void_p(stream)))


@cache
def load_native() -> tuple[Core | None, str | None]:
    """The native core and None, or None and the reason. FSSA_CORE names one to load in place of the package's own."""
    try:
        return Core(Path(os.environ.get("FSSA_CORE") or FOLDER / "_C.so")), None
    except (OSError, ImportError) as error:
        return None, (
            f"the native core fssa_fast/_C.so could not be loaded ({error}); `pip install .` in a checkout builds it, "
            "with a C++17 compiler"
        )
