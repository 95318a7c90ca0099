"""The section of generators that are trained behind an encoder: `method: autoencoder`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .networks import CriticConfig, NetworksConfig, ObjectiveConfig, PenaltyConfig
from .samplers import PriorConfig, SamplerConfig
from .schedule import ScheduleConfig
from .section import Fraction, Positive, Section, Trait


class AdversaryConfig(Section):
    """A critic in the training of an autoencoder; its keys are those of `networks`."""

    judges: Annotated[Literal["none", "images", "codes"], Trait.IN_REGISTRY] = Field(
        "none",
        description="images: reconstructions and images of fresh codes (VAE-GAN); codes: those of the encoder, against "
        "the prior (adversarial autoencoder)",
    )
    weight: float = Field(
        1.0, ge=0, description="weight of the objective in G's loss (images), or the encoder's (codes)"
    )
    features: float = Field(
        0.0,
        ge=0,
        description="images: weight of 1/2 |d|^2, in nats, of an image and its reconstruction in the critic's features "
        "(published VAE-GAN: in place of pixels)",
    )
    objective: ObjectiveConfig = ObjectiveConfig()
    critic: CriticConfig = CriticConfig()
    penalty: PenaltyConfig = PenaltyConfig()
    gate: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="the critic is updated only up to this accuracy on the last batch"
    )

    def networks(self, epochs: int, batch_size: int) -> NetworksConfig:
        """As the section of a generator and its critic."""
        return NetworksConfig(
            epochs=epochs,
            batch_size=batch_size,
            objective=self.objective,
            critic=self.critic,
            penalty=self.penalty,
            gate=self.gate,
            adversarial=self.weight,
        )

    def fault(self, resolution: int, accumulation: int) -> str | None:
        """What is wrong with it, and what to do."""
        name = "autoencoder.adversary"
        if self.judges == "none":
            if self != AdversaryConfig():
                return f"{name}.* are keys of a critic, and {name}.judges=none is without; set it to images or codes"
            return None
        if self.judges == "codes" and self.critic.kind != "mlp":
            return f"{name}.judges=codes needs a critic of codes; set {name}.critic.kind=mlp"
        if self.judges == "codes" and self.features:
            return f"{name}.features are the critic's of images; set {name}.judges=images"
        if self.judges == "images" and accumulation > 1:
            return f"{name}.judges=images trains G on several codes of a row at once; set engine.accumulation=1"
        if self.critic.classes or self.critic.steps > 1:
            return f"{name}.critic.classes and {name}.critic.steps are of method=gan; leave them out"
        fault = self.networks(1, 1).fault(resolution, accumulation)
        return fault and fault.replace("networks.", f"{name}.")


class AutoencoderConfig(Section):
    """Training of an encoder and the generator behind it (method: autoencoder)."""

    epochs: Annotated[int, Trait.IN_REGISTRY] = Field(ge=1, description="passes over the data set")
    batch_size: Annotated[int, Trait.IN_REGISTRY] = Field(
        64, ge=1, description="global batch, over all workers; independent of their number"
    )
    kl: Annotated[float, Trait.IN_REGISTRY] = Field(
        1.0,
        ge=0,
        description="weight of the divergence of a code's distribution from N(0, I), in nats: 1 beside a likelihood is "
        "the published VAE; 0: codes are points",
    )
    reconstruction: float = Field(
        1.0,
        ge=0,
        description="weight of the reconstruction loss (loss.*); 0 only beside autoencoder.adversary.features",
    )
    adversary: AdversaryConfig = AdversaryConfig()
    lr: Annotated[Positive, Trait.IN_REGISTRY] = Field(1e-3, description="learning rate of encoder and generator")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="Adam's betas, for all networks")
    schedule: ScheduleConfig = ScheduleConfig()
    max_bad_steps: int = Field(5, ge=1, description="non-finite steps in a row before the run stops")

    def fault(self, sampler: SamplerConfig, resolution: int, accumulation: int) -> str | None:
        """What is wrong with it beside this sampler, these images and micro-batches, and what to do."""
        adversary = self.adversary
        if fault := adversary.fault(resolution, accumulation):
            return fault
        if not (self.reconstruction or adversary.features):
            return "autoencoder.reconstruction=0 leaves nothing to reconstruct by; set autoencoder.adversary.features"
        if self.kl and adversary.judges == "codes":
            return (
                "autoencoder.kl and autoencoder.adversary.judges=codes both draw codes towards a distribution; set "
                "autoencoder.kl=0"
            )
        if not isinstance(sampler, PriorConfig):
            return None
        if sampler.categories:
            return f"sampler.categories={sampler.categories} are of method=gan; set sampler.categories=0"
        if adversary.judges == "codes":
            return None
        if not self.kl:
            return (
                "autoencoder.kl=0 leaves codes anywhere, and sampler.kind=prior draws them from a fixed distribution; "
                "set another sampler.kind, such as gmm or ot"
            )
        if sampler.shape != "normal":
            return "autoencoder.kl draws codes towards N(0, I); set sampler.shape=normal"
        return None
