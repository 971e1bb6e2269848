"""What tilewise's own tests measure with, for users' tests too: error metrics, tolerances, inputs."""

from tilewise.testing.accuracy import assert_accurate, floor, relative_error
from tilewise.testing.inputs import class_targets, confident_logits, masked_logits
from tilewise.testing.memory import allocated_bytes, saved_bytes

__all__ = [
    "allocated_bytes",
    "assert_accurate",
    "class_targets",
    "confident_logits",
    "floor",
    "masked_logits",
    "relative_error",
    "saved_bytes",
]
