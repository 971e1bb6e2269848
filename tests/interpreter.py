"""Triton's interpreter with the products of a GPU, whose tensor cores round the operands that the interpreter keeps."""

import numpy as np
from triton.runtime import interpreter

TF32_MASK = np.uint32(0xFFFFE000)  # 10 of the 23 bits; a tensor core does not read the others


def round_products() -> None:
    exact = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, acc, input_precision, *others):
        if input_precision.name == "TF32" and a.data.dtype == np.float32:
            a, b = (interpreter.TensorHandle(truncated(t.data), t.dtype) for t in (a, b))
        return exact(self, a, b, acc, input_precision, *others)

    interpreter.InterpreterBuilder.create_dot = create_dot


def truncated(numbers: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(numbers).view(np.uint32) & TF32_MASK).view(np.float32)
