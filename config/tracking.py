"""The section of a run's configuration that says where it is tracked."""

from __future__ import annotations

from pydantic import Field

from .section import Section, Trait


class TrackingConfig(Section):
    """Tracking in MLflow, and in TensorBoard."""

    traits = (
        Trait.RESUMABLE,
        Trait.NOT_SEARCHABLE,
    )

    enabled: bool = Field(True, description="log the run to MLflow")
    uri: str | None = Field(None, description="tracking server; empty means MLFLOW_TRACKING_URI or sqlite:///mlflow.db")
    experiment: str = Field("glann", description="MLflow experiment")
    every_steps: int = Field(
        100, ge=1, description="steps of stage 1 between entries of loss and speed, besides those of every epoch"
    )
    system_metrics: bool = Field(
        True,
        description="log processor, memory and GPU of the first 32 workers each minute, as MLflow's system metrics",
    )
    tensorboard: bool = Field(False, description="also write TensorBoard's event files, into the run folder")
    register_as: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="name in the model registry; empty registers nothing",
    )
