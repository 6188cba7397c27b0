"""Models that accelerate keeps in RAM or on disk, and loads for each call."""

from randlora.offloaded import accelerate as accelerate
