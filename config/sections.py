"""The sections of a run's configuration: one frozen pydantic model each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from .address import Address, LocalPath
from .schedule import GloScheduleConfig
from .section import Fraction, Positive, Section, Trait

UNION_TAGS = ("<number>", "<range>", "<word>")  # tags of the forms of a value; hidden in messages


def _form(value: Any) -> str:
    """The tag of a number, also one in text, or of a word."""
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return UNION_TAGS[2 if isinstance(value, str) else 0]
    return UNION_TAGS[0]


Rate = Annotated[
    Annotated[Positive, Tag(UNION_TAGS[0])] | Annotated[Literal["auto"], Tag(UNION_TAGS[2])], Discriminator(_form)
]

RESOLUTIONS = (28, 32, 64, 128, 256, 512, 1024)


class S3Config(Section):
    """Access to s3:// addresses. Credentials come from the AWS chain, never from the configuration."""

    traits = (
        Trait.RESUMABLE,
        Trait.NOT_SEARCHABLE,
    )

    endpoint_url: str | None = Field(None, description="S3 endpoint; empty means AWS (or AWS_ENDPOINT_URL)")
    region: str | None = Field(None, description="region name; empty means the AWS chain's")
    anonymous: bool = Field(False, description="send no keys, to read public buckets")
    path_style: bool = Field(True, description="address buckets by path (needed by most self-hosted servers)")
    max_attempts: int = Field(8, ge=1, le=50, description="tries per request, with exponential backoff")
    timeout_s: Positive = Field(20.0, description="seconds to wait for a connection or for the next bytes")


class DataConfig(Section):
    """The packed data set and how workers read it."""

    url: Annotated[Address, Trait.NOT_SEARCHABLE] = Field(
        description="folder of a packed data set: a local path or s3://bucket/prefix"
    )
    source: Annotated[Address | None, Trait.RESUMABLE] = Field(
        None, description="images to pack into `url` if it is empty: a named asset, folder or archive"
    )
    resolution: Literal[28, 32, 64, 128, 256, 512, 1024] = Field(description="side of the square images in pixels")
    channels: Literal[1, 3] = Field(3, description="1 for grey images, 3 for RGB")
    max_rows: int | None = Field(None, ge=1, description="train on the first rows only")
    threads: Annotated[int, Trait.RESUMABLE] = Field(2, ge=1, le=128, description="decoding threads per worker")
    prefetch: Annotated[int, Trait.RESUMABLE] = Field(4, ge=1, le=64, description="batches decoded ahead per worker")
    cache_dir: Annotated[LocalPath | None, Trait.RESUMABLE] = Field(
        None, description="cache folder of S3 shards; empty means ~/.cache/glann/shards"
    )
    cache_gb: Annotated[Positive, Trait.RESUMABLE] = Field(
        20.0, description="size limit of the local shard cache per node, in GB"
    )
    max_bad_fraction: Annotated[Fraction, Trait.RESUMABLE] = Field(
        0.0, description="share of corrupt images that is tolerated; with more, the run stops"
    )


class GeneratorConfig(Section):
    """The generator G: latent code -> image."""

    kind: Annotated[Literal["infogan", "dcgan", "resnet"], Trait.IN_REGISTRY] = Field(
        description="infogan: 28-64 px; dcgan: 28-1024 px; resnet (Mescheder 2018): 64-1024 px"
    )
    latent_dim: Annotated[int, Trait.IN_REGISTRY] = Field(
        64, ge=1, le=4096, description="dimension d of the latent codes"
    )
    width: Annotated[int, Trait.IN_REGISTRY] = Field(64, ge=4, le=1024, description="base number of channels")
    max_width: int = Field(1024, ge=4, le=4096, description="upper bound of channels (dcgan, resnet)")
    upsample: Literal["native", "resize"] = Field(
        "native", description="native: the published layer; resize: upsample plus convolution (no checkerboard)"
    )
    batch_norm: bool = Field(True, description="BatchNorm in infogan (paper: off for CIFAR) and dcgan")
    reference: int = Field(
        0,
        ge=0,
        le=4096,
        description="method=gan: codes of a fixed batch by which BatchNorm normalises each row (virtual batch "
        "normalisation); 0: by the row's own batch",
    )
    norm_after: tuple[Literal["fc1", "fc2", "up1"], ...] = Field(
        ("fc1", "fc2", "up1"),
        description="layers of infogan that BatchNorm follows, where it is on (yedidh/glann: [fc2, up1])",
    )
    activation: Literal["relu", "leaky-relu"] = Field(
        "relu", description="of infogan's and dcgan's hidden layers (yedidh/glann, compare_gan: leaky-relu, 0.2)"
    )
    init: Literal["normal", "xavier"] = Field(
        "normal",
        description="of infogan: normal is N(0, 0.02^2) with BatchNorm, else He's; xavier has gain sqrt 2 (yedidh)",
    )
    fc_bias: bool = Field(
        True, description="biases of infogan's fully connected layers where no BatchNorm follows (yedidh/glann: none)"
    )
    unit_input: bool = Field(
        False, description="divide codes by their norm in front of G, for sampler.constraint=none (yedidh/glann)"
    )

    @property
    def norms(self) -> tuple[str, ...]:
        """The layers that BatchNorm follows."""
        return self.norm_after if self.kind == "infogan" and self.batch_norm else ()

    @property
    def normalises(self) -> bool:
        """Whether the network has BatchNorm over the rows of a batch."""
        return not self.reference and self.has_norms

    @property
    def has_norms(self) -> bool:
        """Whether the network has BatchNorm, virtual or not."""
        return bool(self.norms) or (self.kind == "dcgan" and self.batch_norm)


class LossConfig(Section):
    """The reconstruction loss between G(z_i) and x_i, one number per image."""

    kind: Annotated[Literal["perceptual", "laplacian", "l1", "l2", "bernoulli", "gaussian"], Trait.IN_REGISTRY] = Field(
        "perceptual",
        description="what the loss compares; bernoulli, gaussian: -log p(x_i) in nats, for autoencoder.kl",
    )
    network: Annotated[Literal["vgg16", "squeezenet"], Trait.IN_REGISTRY] = Field(
        "vgg16", description="frozen network of the perceptual loss"
    )
    weights: str | None = Field(
        None, description="asset name or safetensors path of the network; empty means the first available asset"
    )
    taps: tuple[str, ...] | None = Field(None, description="feature maps to compare; empty means the paper's choice")
    levels: int | None = Field(
        None, ge=1, le=8, description="scales (full size and halvings); empty means the paper's choice"
    )
    deviation: Positive = Field(0.1, description="gaussian: standard deviation of a pixel around G(z)")
    magnify: float = Field(
        1.0,
        ge=1,
        le=8,
        description="perceptual: enlarge images this many times before the frozen network, for small images",
    )
    pixel_weight: float = Field(1.0, ge=0, description="weight of L1 on pixels")
    feature_weight: float = Field(1.0, ge=0, description="weight of L1 on each feature map")
    patch: int | None = Field(
        None, ge=32, description="use random patches of this side at full resolution (whole image at lower scales)"
    )
    cache_features: Annotated[float, Trait.RESUMABLE, Trait.NOT_SEARCHABLE] = Field(
        0.0,
        ge=0,
        description="gigabytes of a worker's device for the feature maps of its images, each computed once; "
        "0 computes them at every visit",
    )

    def fault(self, resolution: int, precision: str) -> str | None:
        """What is wrong with it for images of so many pixels and this precision of G, and what to do."""
        if self.patch and self.patch > resolution:
            return f"loss.patch={self.patch} is larger than data.resolution={resolution}"
        if self.cache_features and (self.patch or self.kind != "perceptual"):
            return (
                f"loss.cache_features={self.cache_features:g} keeps the feature maps of whole images, which "
                f"loss.{'patch' if self.patch else f'kind={self.kind}'} does not compare; leave it out"
            )
        if self.kind == "bernoulli" and precision == "bf16":
            return (
                "loss.kind=bernoulli takes logarithms of G's output, which engine.precision=bf16 rounds to 0 and 1; "
                "set engine.precision=fp32 or loss.kind=gaussian"
            )
        return None


class GloConfig(Section):
    """Stage 1 (GLO): latent codes and generator."""

    epochs: Annotated[int, Trait.IN_REGISTRY] = Field(ge=1, description="passes over the data set")
    batch_size: Annotated[int, Trait.IN_REGISTRY] = Field(
        128, ge=1, description="global batch, over all workers; independent of their number"
    )
    latent_lr: Annotated[Rate, Trait.SCHEDULABLE, Trait.IN_REGISTRY] = Field(
        0.01,
        description="learning rate of the latent codes; auto: as far per epoch as glo.published_lr, by N and batch",
    )
    published_lr: Positive = Field(
        0.01, description="rate in the terms of the published code, for glo.latent_lr=auto (paper: 0.01, faces 0.003)"
    )
    generator_lr: Annotated[Positive, Trait.SCHEDULABLE, Trait.IN_REGISTRY] = Field(
        0.001, description="learning rate of the generator"
    )
    betas: tuple[Fraction, Fraction] = Field((0.5, 0.999), description="Adam's betas, for codes and generator")
    latent_optimizer: Literal["adam", "adagrad", "published"] = Field(
        "adam",
        description="adam: one per row; adagrad: one number of state per row; published: a new dense Adam every epoch",
    )
    init_scale: Positive | None = Field(
        None,
        description="deviation of a new code on each axis (published: 0.01), on the sphere from its first visit; "
        "empty: on the sphere",
    )
    constraint: Annotated[Literal["sphere", "ball"], Trait.IN_REGISTRY] = Field(
        "sphere", description="projection after each update of a code"
    )
    code_noise: Annotated[float, Trait.IN_REGISTRY] = Field(
        0.0, ge=0, description="norm of the noise on a code in each step, of unit norm itself; 0 is off (published)"
    )
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="decay of the averaged generator; 0 is off")
    schedule: GloScheduleConfig = GloScheduleConfig()
    max_bad_steps: int = Field(5, ge=1, description="non-finite steps in a row before the run stops")

    @property
    def bounds_movement(self) -> bool:
        """Whether the published optimiser has a bounded movement: its second moments outlive its first ones."""
        beta1, beta2 = self.betas
        return beta1**2 < beta2 < 1

    def fault(self) -> str | None:
        """What is wrong with a combination of keys, and what to do."""
        if self.latent_lr == "auto" and self.latent_optimizer == "adagrad":
            return (
                "glo.latent_lr=auto is a rule for Adam, and glo.latent_optimizer=adagrad takes another rate; "
                "set glo.latent_lr to a number"
            )
        if (self.latent_optimizer == "published" or self.latent_lr == "auto") and not self.bounds_movement:
            return (
                f"glo.betas={list(self.betas)} have no published optimiser, whose movements would have no bound; "
                "set betas with the first squared below the second and both below 1"
            )
        if self.latent_optimizer == "published" and self.constraint != "sphere":
            return (
                f"glo.latent_optimizer=published is for codes on the sphere, not glo.constraint={self.constraint}; "
                "set glo.constraint=sphere or glo.latent_optimizer=adam"
            )
        return None


class EngineConfig(Section):
    """How the generator is trained on each worker."""

    kind: Annotated[Literal["deepspeed", "torch"], Trait.RESUMABLE] = Field(
        "deepspeed", description="torch: plain PyTorch, one worker"
    )
    zero: Annotated[Literal[0, 1, 2, 3], Trait.RESUMABLE] = Field(0, description="DeepSpeed ZeRO stage")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast, weights and optimiser in fp32")
    accumulation: int = Field(1, ge=1, description="micro-batches per step; 1 with BatchNorm")
    clip_norm: float = Field(0.0, ge=0, description="global gradient norm to clip to; 0 is off")
    activation_checkpointing: Annotated[bool, Trait.RESUMABLE] = Field(
        False, description="recompute the generator's blocks in backward"
    )
    compile: Annotated[bool, Trait.RESUMABLE] = Field(
        False, description="torch.compile the loss network and the generator"
    )


WorkerCount = Annotated[int, Field(ge=1, le=4096)]


class Workers(Section):
    """An elastic number of workers."""

    min: WorkerCount = Field(description="fewest workers to run with; the run waits while there is capacity for fewer")
    max: WorkerCount = Field(description="most workers; the run grows at the next checkpoint after nodes join")


class ClusterConfig(Section):
    """Where the workers run."""

    traits = (
        Trait.RESUMABLE,
        Trait.NOT_SEARCHABLE,
    )

    workers: Annotated[
        Annotated[WorkerCount, Tag(UNION_TAGS[0])] | Annotated[Workers, Tag(UNION_TAGS[1])],
        Discriminator(lambda value: UNION_TAGS[isinstance(value, dict | Workers)]),
    ] = Field(
        1, description="number of training workers, or {min: 1, max: 8}: as many as there is capacity for, at any time"
    )
    address: str | None = Field(None, description="Ray cluster to join; empty means RAY_ADDRESS or a local Ray")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs of each worker; 0 trains on CPUs")
    cpus_per_worker: Positive = Field(1.0, description="CPU cores of each worker")
    max_failures: int = Field(
        3, ge=-1, description="restarts after failures without a new checkpoint in between; -1: no limit"
    )
    start_timeout_s: Positive = Field(
        600.0, description="seconds to wait for capacity, at the start and after a failure"
    )
    peer_timeout_s: float = Field(900.0, ge=10, description="timeout of collectives between workers, in seconds")

    @property
    def min_workers(self) -> int:
        """The fewest workers to train with."""
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def max_workers(self) -> int:
        """The most workers to train with."""
        return self.workers if isinstance(self.workers, int) else self.workers.max


class CheckpointConfig(Section):
    """When and where checkpoints are saved."""

    traits = (
        Trait.RESUMABLE,
        Trait.NOT_SEARCHABLE,
    )

    url: Address | None = Field(None, description="folder or s3:// prefix; empty means the run folder (one machine)")
    every_minutes: Positive = Field(10.0, description="time between checkpoints")
    every_epochs: int | None = Field(None, ge=1, description="also every this many epochs")
    keep: int = Field(3, ge=1, description="checkpoints to keep, besides the best by evaluation.best")
    use: Literal["last", "best"] = Field(
        "last",
        description="what a finished run is packaged and measured from, so also registered; best: the one that "
        "evaluation.every_epochs found",
    )
    timeout_s: Positive = Field(600.0, description="seconds that ranks wait for one another while saving")


class PreviewConfig(Section):
    """Pictures while training."""

    traits = (
        Trait.RESUMABLE,
        Trait.NOT_SEARCHABLE,
    )

    every_epochs: int = Field(5, ge=1, description="epochs between previews")
    images: int = Field(64, ge=4, le=1024, description="samples in a grid; half as many images beside reconstructions")


class EvaluationConfig(Section):
    """The metrics measured at the end of a run, and while it trains."""

    traits = (
        Trait.RESUMABLE,
        Trait.NOT_SEARCHABLE,
    )

    extractor: Literal["squeezenet", "lite0", "lite0-96", "vgg16", "inception"] = Field(
        "squeezenet",
        description="feature extractor of the metrics, part of their names; lite0-96 suits images of up to 64 px",
    )
    metrics: tuple[Literal["codes", "copying", "coverage", "is", "kid", "modes", "perceptual", "prd", "all"], ...] = (
        Field((), description="groups of metrics that are measured besides those of every run")
    )
    samples: int = Field(2000, ge=2, description="images drawn from each sampler")
    every_epochs: int | None = Field(
        None,
        ge=1,
        description="also measure samples after this many epochs of a stage, and its last, for which training pauses; "
        "empty: only at the end",
    )
    interim_samples: int = Field(1000, ge=2, description="images drawn by a measurement while the run trains")
    best: str | None = Field(
        None,
        description="metric of samples by which the best checkpoint is chosen; empty: Frechet distance",
    )
    memory_gb: float = Field(
        2.0, gt=0, le=1000, description="memory for decoding images at once, of each worker's device, in GiB"
    )
    data: Address | None = Field(
        None,
        description="packed images that training does not see; empty means the held-out part of `data.url`",
    )
