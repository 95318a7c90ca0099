"""The section of generators that are trained against a critic: `method: gan`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .samplers import PriorConfig, SamplerConfig
from .schedule import ScheduleConfig
from .section import Fraction, Positive, Section, Trait
from .sections import GeneratorConfig

# One entry per objective, with the keys of `networks.objective` that it reads.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "minimax": ("smooth",),
    "non-saturating": ("smooth",),
    "least-squares": ("targets",),
    "wasserstein": (),
    "hinge": (),
    **dict.fromkeys(("kl", "reverse-kl", "pearson", "neyman", "hellinger", "js", "gan", "tv"), ()),
    "energy": ("margin",),
    "began": ("gamma", "rate"),
    "loss-sensitive": ("weight",),
    "relativistic": (),
}
OF_ERRORS = ("energy", "began", "loss-sensitive")  # objectives whose real images have the lower scores
OF_LOGITS = ("minimax", "non-saturating")  # those whose score is the logit of `real`
LONGEST_DECAY = 0.9999  # of RMSProp
OF_SIGNS = ("minimax", "non-saturating", "hinge")  # those whose critic says `real` by a positive score


class ObjectiveConfig(Section):
    """What generator and critic are trained for; a kind reads only the keys whose descriptions name it."""

    kind: Annotated[str, Trait.IN_REGISTRY] = Field("non-saturating", description=", ".join(OBJECTIVES))
    smooth: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="minimax, non-saturating: label of real images; below 1 is one-sided smoothing"
    )
    targets: tuple[float, float, float] = Field(
        (0.0, 1.0, 1.0), description="least-squares: a, b, c, where generated and real images are moved, and by G"
    )
    margin: Positive = Field(0.2, description="energy: error of generated images up to which the critic raises it")
    gamma: Fraction = Field(0.75, description="began: wanted ratio of the errors of generated and real images")
    rate: Positive = Field(0.001, description="began: step of the balance between the two")
    weight: Positive = Field(1.0, description="loss-sensitive: weight of the margin, which is the images' distance")


class CriticConfig(Section):
    """The critic: image -> score."""

    kind: Annotated[Literal["infogan", "dcgan", "resnet", "autoencoder", "mlp"], Trait.IN_REGISTRY] = Field(
        "infogan",
        description="infogan: 28-64 px; dcgan; resnet: 32-1024 px; autoencoder (28-64 px): its error; mlp",
    )
    width: Annotated[int, Trait.IN_REGISTRY] = Field(
        64, ge=4, le=1024, description="base number of channels, or of units of each hidden layer (mlp)"
    )
    max_width: int = Field(1024, ge=4, le=4096, description="upper bound of channels (resnet)")
    code_dim: int = Field(64, ge=1, le=4096, description="size of the code (autoencoder)")
    batch_norm: bool = Field(False, description="BatchNorm, of real and generated images apart; not with a penalty")
    spectral_norm: bool = Field(False, description="divide every layer by its largest singular value (SNGAN)")
    clip: float = Field(0.0, ge=0, description="bound of every weight (published Wasserstein GAN: 0.01); 0 is off")
    kernels: int = Field(
        0, ge=0, le=4096, description="numbers that say how near an image is to its batch (minibatch discrimination)"
    )
    kernel_dim: int = Field(5, ge=1, le=256, description="dimension in which each of these measures")
    classes: int = Field(
        0, ge=0, le=4096, description="classes of the images beside that of generated ones (semi-supervised, K + 1)"
    )
    lr: Annotated[Positive, Trait.IN_REGISTRY] = Field(1e-4, description="learning rate of the critic")
    steps: int = Field(1, ge=1, description="updates of the critic, each with new images, before those of G")


class PenaltyConfig(Section):
    """The penalty on the critic's slope."""

    kind: Annotated[Literal["none", "between", "around", "r1", "r2", "r1-r2"], Trait.IN_REGISTRY] = Field(
        "none",
        description="between (WGAN-GP) and around real images (DRAGAN): towards slope 1; r1 at real images, r2 at "
        "generated ones: towards 0",
    )
    weight: Positive = Field(10.0, description="weight of the penalty (R3GAN's gamma for r1-r2)")


class NetworksConfig(Section):
    """Training of the generator against a critic (method: gan), or its refinement (method: ae-ot-gan)."""

    epochs: Annotated[int, Trait.IN_REGISTRY] = Field(ge=1, description="passes over the data set, by the critic")
    batch_size: Annotated[int, Trait.IN_REGISTRY] = Field(
        64, ge=1, description="global batch, over all workers; independent of their number"
    )
    objective: ObjectiveConfig = ObjectiveConfig()
    critic: CriticConfig = CriticConfig()
    penalty: PenaltyConfig = PenaltyConfig()
    generator_lr: Annotated[Positive | None, Trait.IN_REGISTRY] = Field(
        None, description="learning rate of the generator; empty: networks.critic.lr"
    )
    generator_steps: int = Field(1, ge=1, description="updates of G after those of the critic")
    optimizer: Literal["adam", "rmsprop"] = Field(
        "adam", description="of both; rmsprop needs betas: [0, its decay] (published Wasserstein GAN)"
    )
    betas: tuple[Fraction, Fraction] = Field((0.5, 0.999), description="Adam's betas, for both")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="decay of the averaged generator; 0 is off")
    gate: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="the critic is updated only up to this accuracy on the last batch (3D-GAN: 0.8)"
    )
    adversarial: float = Field(
        1.0, ge=0, description="weight of the objective in G's loss (0: its other terms alone, as feature matching)"
    )
    feature_matching: float = Field(0.0, ge=0, description="weight of the critic's mean features in G's loss")
    pull_away: float = Field(0.0, ge=0, description="weight in G's loss of the likeness of its images (EBGAN-PT: 0.1)")
    history: float = Field(
        0.0, ge=0, description="weight in both losses of the squared distance of weights to their mean over all updates"
    )
    condition: bool = Field(
        False, description="G and the critic see the label of each image (CGAN), one of sampler.categories"
    )
    labelled: int = Field(
        0, ge=0, description="images whose labels critic.classes learn from, equally many of each; others are not seen"
    )
    information: float = Field(
        0.0, ge=0, description="weight of what an image says of its code's category and first numbers (InfoGAN: 1)"
    )
    continuous: int = Field(0, ge=0, description="first numbers of a code that networks.information is about")
    generated: float = Field(
        3.0, ge=0, description="ae-ot-gan: generated images to each reconstructed one, for both networks"
    )
    content: float = Field(
        0.0,
        ge=0,
        description="ae-ot-gan: weight in G's loss of the reconstruction loss (loss.*) of its codes of images",
    )
    encoder_features: float = Field(
        0.0,
        ge=0,
        description="ae-ot-gan: weight in G's loss of the mean squared distance of a code to that of its image",
    )
    schedule: ScheduleConfig = ScheduleConfig()
    max_bad_steps: int = Field(5, ge=1, description="non-finite steps in a row before the run stops")

    @property
    def rate_of_generator(self) -> float:
        """Learning rate of the generator before the schedule."""
        return self.critic.lr if self.generator_lr is None else self.generator_lr

    @property
    def looks_at_batches(self) -> bool:
        """Whether a loss has statistics of the whole batch."""
        return bool(self.feature_matching or self.pull_away or self.critic.batch_norm or self.critic.kernels)

    def fault(self, resolution: int, accumulation: int) -> str | None:
        """What is wrong with a combination of keys, and what to do.

        Args:
            resolution: of the images, in pixels. accumulation: micro-batches of a step.
        """
        objective, critic, kind = self.objective, self.critic, self.objective.kind
        defaults = ObjectiveConfig()
        if kind not in OBJECTIVES:
            return f"networks.objective.kind={kind!r} is unknown; there are {', '.join(OBJECTIVES)}"
        for key in ObjectiveConfig.model_fields:
            if key not in ("kind", *OBJECTIVES[kind]) and getattr(objective, key) != getattr(defaults, key):
                return f"networks.objective.{key} is not read by networks.objective.kind={kind}; leave it out"
        if critic.kind in ("infogan", "autoencoder") and resolution > 64:
            return f"networks.critic.kind={critic.kind} sees images up to 64 px, not {resolution}; use resnet or dcgan"
        if critic.kind == "resnet" and resolution & (resolution - 1):
            return f"networks.critic.kind=resnet sees images of 32, 64, 128 px and so on, not {resolution}; use infogan"
        if accumulation > 1 and self.looks_at_batches:
            return (
                f"engine.accumulation={accumulation} would take BatchNorm, networks.critic.kernels, "
                "networks.feature_matching and networks.pull_away over micro-batches and so train something else; set "
                "engine.accumulation=1"
            )
        if self.penalty.kind != "none" and critic.batch_norm:
            return (
                f"networks.penalty.kind={self.penalty.kind} needs the slope of each image's own score, which BatchNorm "
                "mixes with those of the batch; set networks.critic.batch_norm=false"
            )
        if self.penalty.kind != "none" and critic.kernels:
            return (
                f"networks.penalty.kind={self.penalty.kind} needs the slope of each image's own score, which "
                "networks.critic.kernels mixes with those of the batch; set networks.critic.kernels=0"
            )
        if kind in ("energy", "began") and critic.kind != "autoencoder":
            return f"networks.objective.kind={kind} needs an error for a score; set networks.critic.kind=autoencoder"
        if critic.kind == "autoencoder" and kind not in OF_ERRORS:
            return (
                "networks.critic.kind=autoencoder has an error for a score; set networks.objective.kind to one of "
                + ", ".join(OF_ERRORS)
            )
        if critic.kind in ("resnet", "mlp") and critic.batch_norm:
            return f"networks.critic.kind={critic.kind} has no BatchNorm; set networks.critic.batch_norm=false"
        if self.gate < 1 and kind not in OF_SIGNS:
            return (
                f"networks.gate needs scores with a sign; set networks.objective.kind to one of {', '.join(OF_SIGNS)}"
            )
        if self.optimizer == "rmsprop" and (self.betas[0] or self.betas[1] > LONGEST_DECAY):
            return (
                f"networks.optimizer=rmsprop has no momentum, and a decay up to {LONGEST_DECAY}; set networks.betas="
                "[0, 0.99]"
            )
        return self.fault_of_labels()

    def fault_of_labels(self) -> str | None:
        """What is wrong with the keys of classes and codes."""
        critic, kind = self.critic, self.objective.kind
        if bool(critic.classes) != bool(self.labelled) or critic.classes == 1:
            return "networks.critic.classes (2 or more) and networks.labelled belong together; set both or neither"
        if self.labelled % max(critic.classes, 1):
            return f"networks.labelled={self.labelled} is no multiple of networks.critic.classes={critic.classes}"
        if critic.classes and kind not in OF_LOGITS:
            return "networks.critic.classes make the score a logit; set networks.objective.kind to one of " + ", ".join(
                OF_LOGITS
            )
        if critic.classes and (self.information or self.condition):
            return (
                "networks.critic.classes use labels and the critic's head in another way than networks.condition and "
                "networks.information; leave out one"
            )
        if critic.kind == "autoencoder" and (critic.classes or critic.kernels or self.information):
            return (
                "networks.critic.kind=autoencoder has no features to classify; leave out networks.critic.classes, "
                "networks.critic.kernels and networks.information"
            )
        if self.continuous and not self.information:
            return "networks.continuous is not read without networks.information; set both or neither"
        return None

    def fault_of_refinement(self, refines: bool) -> str | None:
        """What is wrong with the keys of codes that images have, or not."""
        if not refines and (self.content or self.encoder_features):
            return (
                "networks.content and networks.encoder_features need an encoder and codes of images; set "
                "method=ae-ot-gan, or leave them out"
            )
        if refines and (self.condition or self.information or self.critic.classes):
            return (
                "networks.condition, networks.information and networks.critic.classes are of method=gan, whose codes "
                "say categories; leave them out"
            )
        return None

    def fault_of_codes(self, sampler: SamplerConfig, generator: GeneratorConfig) -> str | None:
        """What is wrong with the keys of codes, their distribution and the generator together."""
        if generator.reference and not generator.has_norms:
            return "generator.reference is for a generator with BatchNorm; set generator.reference=0"
        if not isinstance(sampler, PriorConfig):
            return None
        free = generator.latent_dim - sampler.categories
        if sampler.categories == 1 or free < max(1, self.continuous):
            return (
                f"sampler.categories={sampler.categories} and networks.continuous={self.continuous} do not fit into "
                f"generator.latent_dim={generator.latent_dim}; there are none or at least 2 categories, and at least "
                "one further number"
            )
        if self.condition and not sampler.categories:
            return "networks.condition needs the number of labels; set sampler.categories"
        if self.information and not (sampler.categories or self.continuous):
            return "networks.information is about categories and numbers of a code; set sampler.categories"
        if self.continuous and sampler.shape != "uniform":
            return "networks.continuous is about numbers from -1 to 1; set sampler.shape=uniform"
        return None
