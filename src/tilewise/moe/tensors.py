"""Whether an argument is a tensor at all: said before anything else is asked of it."""

from __future__ import annotations

from collections.abc import Collection

import torch


def check_tensors(optional: Collection[str] = (), /, **arguments: object) -> None:
    """Raises TypeError for a list, an array or anything else in a tensor's place.

    Args:
        optional: names that may be None.
        arguments: by name.
    """
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) or (value is None and name in optional):
            continue
        raise TypeError(
            f"{name} must be a torch.Tensor{' or None' * (name in optional)}, got "
            f"{type(value).__name__}: torch.as_tensor makes one of lists and arrays"
        )
