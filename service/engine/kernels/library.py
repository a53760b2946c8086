"""The compiled library's functions and structures, as ctypes sees them. `interface.h` says what each means."""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import POINTER, Structure, c_double, c_float, c_int, c_void_p

from service.engine.kernels.build import KernelsUnavailable, find_library, usable_levels

log = logging.getLogger(__name__)


class Shape(Structure):
    _fields_ = (
        *[
            (name, c_int)
            for name in (
                "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim num_positions"
            ).split()
        ],
        ("rms_norm_eps", c_float),
        ("is_int8", c_int),
    )


class Step(Structure):
    _fields_ = (
        *[(name, c_int) for name in ("num_rows", "num_spans", "num_wanted")],
        *[(name, c_void_p) for name in ("token_ids", "spans", "wanted", "cache")],
        ("blocks_per_slot", c_int),
        ("logits", c_void_p),
    )


class Drawing(Structure):
    _fields_ = (
        *[(name, c_void_p) for name in ("scores", "allowed")],
        *[(name, c_double) for name in ("top_p", "quantile")],
        *[(name, c_float) for name in ("temperature", "min_p")],
        *[(name, c_int) for name in ("top_k", "token")],
    )


SIGNATURES = {
    "smollm_start": (c_int, []),
    "smollm_new": (c_void_p, [POINTER(Shape)]),
    "smollm_delete": (None, [c_void_p]),
    "smollm_logits_width": (c_int, [c_void_p]),
    "smollm_set_tables": (None, [c_void_p, c_void_p, c_void_p, c_void_p]),
    "smollm_set_norm": (None, [c_void_p, c_int, c_int, c_void_p]),
    "smollm_set_matrix": (None, [c_void_p, c_int, c_int, c_int, c_int, c_int, c_void_p]),
    "smollm_draw": (None, [POINTER(Drawing), c_int, c_int, c_int]),
    "smollm_step": (None, [c_void_p, POINTER(Step), c_int]),
}


class Library:
    """One loaded level."""

    def __init__(self, level: str, path: str) -> None:
        self.level = level
        self.functions = ctypes.CDLL(path)
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self.functions, name)
            function.restype, function.argtypes = result, arguments


@functools.cache
def load_library(wanted: str = "auto") -> Library:
    """Load the best level that this machine can compile and run.

    Raises:
        KernelsUnavailable: there is none; the sentence says why.
    """
    reason = "this CPU has no level"
    for level in usable_levels(wanted):
        try:
            library = Library(level.name, str(find_library(level)))
        except KernelsUnavailable as error:  # of a compiler that is older than this CPU: it may know the next level
            reason = str(error)
        except OSError as error:
            reason = f"the library cannot be loaded: {error}"
        else:
            if library.functions.smollm_start():
                return library
            reason = f"the operating system does not allow {level.name} instructions"
        log.info("no kernels for %s: %s", level.name, reason)
    raise KernelsUnavailable(reason)
