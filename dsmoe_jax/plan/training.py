"""The plan of a training run: memory, communication and time of a step. Start at `TrainingPlan`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.plan.cards import Card
from dsmoe_jax.plan.collectives import Traffic, traffic
from dsmoe_jax.plan.memory import temporaries
from dsmoe_jax.plan.roofline import Estimate, Speed, estimate
from dsmoe_jax.plan.workload import Parameters, Workload
from dsmoe_jax.progress import byte_size
from dsmoe_jax.train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """What a training step needs of every device.

    Attributes:
        work: The step.
        card: The device.
        held: Bytes of the arguments of the step, by kind.
        temporary: Bytes of temporaries at the peak, by kind.
        traffic: The communication of a step.
        estimates: The time of a step, slow and fast.
        speed: Tokens per second and model FLOPs utilization, slow and fast.
    """

    work: Workload
    card: Card
    held: Mapping[str, int]
    temporary: Mapping[str, int]
    traffic: tuple[Traffic, ...]
    estimates: tuple[Estimate, Estimate]
    speed: Speed

    @classmethod
    def of(
        cls,
        config: RunConfig,
        model: ModelConfig,
        devices: int,
        card: Card,
        *,
        parameters: Parameters | None = None,
        dtype: Any = jnp.bfloat16,
    ) -> "TrainingPlan":
        """Plan a run.

        Args:
            config: The run.
            model: The model to train.
            devices: Number of devices.
            card: The device.
            parameters: Of the same run on another mesh, which saves computing them again.
            dtype: Storage dtype of a frozen base.

        Returns:
            The plan; it may not fit.

        Raises:
            DSMoEError: The mesh does not divide the devices, the model or the batch.
        """
        work = Workload.of(config, model, devices, parameters=parameters, dtype=dtype)
        held = {**work.state_bytes(), "frozen weights": work.frozen_bytes(), "batch": work.batch_bytes()}
        found = tuple(traffic(work, card.platform))
        estimates = estimate(work, card, found)
        speed = Speed.of(work, card, estimates)
        return cls(work, card, held, temporaries(work, card.platform), found, estimates, speed)

    @property
    def arguments(self) -> int:
        """The bytes of the arguments on a device."""
        return sum(self.held.values())

    @property
    def temporaries(self) -> int:
        """The bytes of temporaries on a device at the peak."""
        return sum(self.temporary.values())

    @property
    def bytes(self) -> int:
        """The bytes on a device."""
        return self.arguments + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.bytes <= self.card.usable

    def __str__(self) -> str:
        """Return one line."""
        parts = f"arguments {byte_size(self.arguments)}, temporaries {byte_size(self.temporaries)}"
        return f"{byte_size(self.bytes)} of {byte_size(self.card.usable)} per device ({parts})"
