"""llama.cpp's own quantizers for the benchmarks: functions of ggml in the wheel xllamacpp, called by ctypes."""

import ctypes
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def library() -> ctypes.CDLL | None:
    """ggml as the wheel has it; None, and said, if there is none."""
    found = find_spec("xllamacpp")
    if found is None or found.origin is None:
        print("skipped: llama.cpp (pip install xllamacpp) is not installed")
        return None
    loaded = ctypes.CDLL(str(next(Path(found.origin).parent.glob("xllamacpp*.so"))))
    loaded.ggml_row_size.restype = loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    loaded.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    loaded.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p,
    ]  # fmt: skip
    return loaded


def quantize(ggml: ctypes.CDLL, weight: "np.ndarray[Any, Any]", kind: str) -> "np.ndarray[Any, Any]":
    """Float32 rows as blocks of a type ("Q4_0"), [rows, bytes of a row]. Releases the GIL."""
    number = int(gguf.GGMLQuantizationType[kind])
    rows, columns = weight.shape
    made = np.empty((rows, ggml.ggml_row_size(number, columns)), np.uint8)
    ggml.ggml_quantize_chunk(number, weight.ctypes.data, made.ctypes.data, 0, rows, columns, None)
    return made


def rounded(ggml: ctypes.CDLL, weight: "np.ndarray[Any, Any]", kind: str) -> "np.ndarray[Any, Any]":
    """What a reader gets back, float32."""
    return gguf.quants.dequantize(quantize(ggml, weight, kind), gguf.GGMLQuantizationType[kind])
