"""The keys of a configuration and their defaults, as frozen dataclasses; `pipeline.config` loads them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from cvae import config as cvae_config
from cvae.config import ModelConfig


@dataclass(frozen=True)
class ToyConfig:
    """Faces drawn by the project itself, used where `shard.source` is empty."""

    n: int = 4000
    seed: int = 0


@dataclass(frozen=True)
class ShardConfig:
    """CelebA files -> WebDataset tars."""

    source: str = ""  # folder in CelebA's official layout; empty: toy faces
    crop: int = 148  # side of the centred square cut from the 178x218 image, pixels
    size: int = 64  # side of the stored image, pixels
    samples_per_shard: int = 2048
    seed: int = 0  # of the permutation that assigns samples to shards
    allow_subset: bool = False  # accept annotations of images that are not there (counted in the manifest)
    skip_damaged: bool = False  # leave out images that cannot be read (counted in the manifest)


@dataclass(frozen=True)
class DataConfig:
    """Shards -> batches."""

    attributes: list[str] = field(default_factory=list)  # read by the model; empty: all of the manifest
    flip: bool = True  # random horizontal flip
    rotation_degrees: float = 0.0  # random rotation within +- this angle
    shards_at_once: int = 8  # shards that are mixed with one another at a time
    verify: str = "once"  # sha256 of shards: once (per node and file) | always
    damaged: str = "stop"  # a damaged shard: stop, or exclude its samples (counted in the log and in MLflow)
    stage_to: str = ""  # node-local folder that shards are copied to for training, e.g. $SLURM_TMPDIR; empty: read in place


@dataclass(frozen=True)
class OptimConfig:
    """Adam with a cosine schedule after a linear warm-up."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    warmup_images: int = 5_000
    final_lr_fraction: float = 0.02  # of `lr`, at the end of the cosine; 1: constant
    clip_norm: float = 1.0  # of the gradient of nats per dimension; 0: off


@dataclass(frozen=True)
class TrainConfig:
    """Length and habits of training; nothing here depends on the number of ranks."""

    images: int = 150_000  # images seen in all
    batch_size: int = 64  # GLOBAL batch, split over the ranks
    micro_batch: int = (
        0  # most images per rank in one forward pass (gradient accumulation); 0: the rank's whole share
    )
    kl_warmup_images: int = 15_000  # beta rises linearly from 0 to 1 over this many images
    ema_decay: float = 0.999
    precision: str = "auto"  # auto | fp32 | bf16 | fp16 | fp64
    channels_last: bool = True
    deterministic: bool = False  # deterministic kernels on a GPU
    log_interval: int = 20  # steps
    val_interval: int = 300  # steps
    checkpoint_interval: int = 300  # steps that a crash costs at most; one is written every half of it
    keep_checkpoints: int = 2  # newest ones kept, besides the best
    keep_every: int = 0  # steps; checkpoints at multiples of this are kept too; 0: none
    max_bad_steps: int = 5  # non-finite losses in a row before the run stops
    profile: int = 0  # steps to trace with torch.profiler
    threads: int = 0  # CPU threads per rank; 0: cores / ranks on this node
    timeout_s: int = 600  # of the process group while training starts
    stall_s: int = (
        180  # a step that takes longer ends the job with the names of the ranks that did not answer; 0: off
    )
    init_from: str = ""  # run directory whose best weights training starts from


@dataclass(frozen=True)
class ClassifierConfig:
    """Attribute classifier: ResNet-18 with GroupNorm, shared by every run on the same shards."""

    epochs: int = 5
    batch_size: int = 64  # GLOBAL batch
    lr: float = 1e-3
    weight_decay: float = 1e-2
    precision: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class EvalConfig:
    """What is measured, and on how much of the test split."""

    split: str = "test"
    n: int = 3000  # samples and reconstructions; at most the size of the split
    block: int = 100  # images per forward pass; fixed, so that the result does not depend on the ranks
    checkpoint: str = "best"  # best | latest | a step | all (each kept one, the best last)
    weights: str = "ema"  # ema | raw
    metrics: list[str] = field(default_factory=list)  # names in METRICS; empty: all
    iw_images: int = 500
    iw_samples: int = 50  # K of the importance-weighted bound
    rare_samples: int = 500  # per rare combination
    neighbour_images: int = 20_000  # training images among which a sample's nearest one is looked for
    kid_subsets: int = 100  # of kid_subset_size images each; torch-fidelity's defaults
    kid_subset_size: int = 1000  # at most the number of images
    inception_weights: str = ""  # torch-fidelity's weights-inception-2015-12-05-6726825d.pth; empty: $CVAE_INCEPTION_WEIGHTS, if set
    network: str = ""  # a further network of features: .safetensors of the torchvision architecture `network_name`, or TorchScript
    network_name: str = ""  # e.g. resnet50; empty: `network` is TorchScript
    network_sha256: str = ""  # of the file; needed for TorchScript, which is a program
    network_size: int = 224  # images are resized to this side, pixels
    projection: str = "tsne"  # of latent vectors to a drawing: tsne | umap (needs the extra `umap`)
    seed: int = 0


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow; metrics.jsonl in the run directory is complete without it."""

    enabled: bool = True
    uri: str = ""  # empty: sqlite under runs_dir
    experiment: str = "cvae"


@dataclass(frozen=True)
class StageResources:
    """Overrides of ClusterConfig for one stage; a field left out keeps the cluster's value."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int | None = None
    tasks_per_node: int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: int | None = None
    timeout_min: int | None = None
    jobs: int | None = None


@dataclass(frozen=True)
class ClusterConfig:
    """Where jobs run; a cluster is one YAML file in configs/cluster/."""

    executor: str = "local"  # local (processes on this machine) | debug (in this process) | slurm
    nodes: int = 1
    tasks_per_node: int = 2  # ranks per node; on GPU nodes the number of GPUs
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    mem_gb: int | None = None  # per node
    timeout_min: int = 60 * 24
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    signal_delay_s: int = 120  # seconds of warning before the time limit
    jobs: int = 1  # jobs that a stage is split into where it can be (shard), as one array
    max_timeouts: int = 20  # requeues after a time-out
    max_crashes: int = 3  # crashes in a row without progress after which a job is not restarted
    max_restarts: int = 20  # restarts after crashes, in all
    python: str | None = None  # command that starts python, e.g. behind a container; a raw shell command
    setup: list[str] = field(default_factory=list)  # shell lines before the job: modules, conda
    extra_sbatch: dict[str, str] = field(default_factory=dict)
    stages: dict[str, StageResources] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConfig:
    """One run: a configuration and a seed."""

    name: str = "sigma_cvae_nf"
    seed: int = 0
    runs_dir: str = "runs"
    toy: ToyConfig = field(default_factory=ToyConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


CHOICES: dict[str, tuple[str, ...]] = {
    "model.conditioner.name": cvae_config.CONDITIONER_NAMES,
    "model.prior.name": cvae_config.PRIOR_NAMES,
    "model.prior.net": cvae_config.PRIOR_NET_NAMES,
    "model.variance.name": cvae_config.VARIANCE_NAMES,
    "model.net.norm": cvae_config.NORM_NAMES,
    "model.net.activation": cvae_config.ACTIVATION_NAMES,
    "data.verify": ("once", "always"),
    "data.damaged": ("stop", "exclude"),
    "train.precision": ("auto", "fp32", "bf16", "fp16", "fp64"),
    "classifier.precision": ("auto", "fp32", "bf16", "fp16"),
    "eval.split": ("val", "test"),
    "eval.weights": ("ema", "raw"),
    "eval.projection": ("tsne", "umap"),
    "cluster.executor": ("local", "debug", "slurm"),
}
AT_LEAST_ONE = (
    "shard.crop", "shard.size", "shard.samples_per_shard", "train.batch_size", "train.images", "train.log_interval",
    "train.val_interval", "train.checkpoint_interval", "train.keep_checkpoints", "classifier.batch_size",
    "classifier.epochs", "eval.n", "eval.block", "eval.iw_samples", "eval.kid_subsets", "eval.kid_subset_size", "eval.network_size",
    "eval.neighbour_images", "cluster.nodes", "cluster.tasks_per_node",
    "model.z_dim", "data.shards_at_once", "toy.n", "cluster.jobs", "cluster.signal_delay_s",
)  # fmt: skip
