"""Random numbers of the simulated devices."""

from __future__ import annotations

from typing import Any

import torch

import torch_musa
from torch_musa import _MUSAC

default_generators: tuple[Any, ...] = ()
_SEEDED = [torch.Generator(device=f"musa:{index}") for index in range(_MUSAC.device_count())]


def manual_seed(seed: int) -> None:
    """Seed this thread's device."""
    _generator(None).manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    """Seed all devices."""
    for index in range(_MUSAC.device_count()):
        _generator(index).manual_seed(seed)


def seed() -> None:
    """Seed this thread's device with something."""
    _generator(None).seed()


def initial_seed() -> int:
    """Return the seed of this thread's device."""
    return _generator(None).initial_seed()


def get_rng_state(device: Any = "musa") -> torch.Tensor:
    """Return a device's state."""
    return _generator(device).get_state()


def set_rng_state(state: torch.Tensor, device: Any = "musa") -> None:
    """Set a device's state."""
    _generator(device).set_state(state)


def _generator(device: Any) -> torch.Generator:
    return _SEEDED[torch_musa._index(device)]
