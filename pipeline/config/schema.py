"""The keys of a configuration, their defaults, and what each one means.

Every field has one comment behind it: the meaning, the unit, the choices, and what an empty or zero
value does.
`pipeline.config.load` reads configurations. This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cvae.config import LossConfig, ModelConfig, PriorConfig

EXECUTOR_NAMES = ("local", "debug", "slurm")
STRIDED_UP_TO = 128  # pixels; see `ShardConfig.stored_as`


@dataclass(frozen=True)
class ToyConfig:
    """Faces that the project draws itself; used if `shard.source` is empty."""

    n: int = 4000  # number of images
    seed: int = 0  # of the drawn faces


@dataclass(frozen=True)
class ShardConfig:
    """From a data set to shards (WebDataset tars)."""

    source: str = ""  # folder that holds a data set, or URLs of tars; empty: toy faces
    source_kind: str = ""  # celeba | celeba_hq | parquet | webdataset | images+csv; empty: found by looking
    allow_pipe: bool = False  # let a source `pipe:PROGRAM ...` start that program (never through a shell)
    crop: int = 0  # side of the centred square that is cut out, pixels; 0: as usual for the data set
    size: int = 64  # side of the stored image, pixels
    background: str = "keep"  # behind the heads: keep | green (another one can then be put behind samples)
    samples_per_shard: int = 2048  # images in one tar
    seed: int = 0  # of the permutation that assigns images to shards
    allow_subset: bool = False  # accept annotations of images that are missing; the manifest counts them
    skip_damaged: bool = False  # leave out images that cannot be read; the manifest counts them
    allow_upsampling: bool = False  # accept a size above crop, which only enlarges the images
    format: str = "auto"  # strided (pixels) | encoded (image files) | in_place | auto: strided up to size 128

    @property
    def stored_as(self) -> str:
        """Return `strided` or `encoded`.

        Pixels need no decoding, but their place grows with the area: 10 GB for CelebA at 128 pixels,
        40 GB at 256. A JPEG of either size has some 10 to 60 kB.
        Tars in place are encoded ones that others made.
        """
        if self.format == "in_place":
            return "encoded"
        if self.format != "auto":
            return self.format
        return "strided" if self.size <= STRIDED_UP_TO else "encoded"


@dataclass(frozen=True)
class DataConfig:
    """From shards to batches."""

    shards: str = ""  # folder of existing shards to train on without their source; empty: the shard stage's
    attributes: list[str] = field(default_factory=list)  # names that the model reads; empty: all attributes
    flip: bool = True  # flip each image horizontally with probability 1/2
    rotation_degrees: float = 0.0  # rotate each image by a random angle up to this one, degrees
    random_crop: float = 0.0  # least share of the square that a random crop keeps; 0: no crop (encoded only)
    shards_at_once: int = 8  # number of shards whose images are mixed with one another
    verify: str = "once"  # when the shards' sha256 are checked: once (per node and file) | always
    damaged: str = "stop"  # a damaged shard: stop (with an error) | exclude (leave its images out)
    stage_to: str = ""  # node-local folder to copy shards to, e.g. $SLURM_TMPDIR; empty: read them in place
    tars: str = ""  # folder or URL of the tars if they do not lie beside their manifest (encoded only)
    cache_dir: str = ""  # node-local folder for tars fetched from a URL, e.g. $SLURM_TMPDIR
    cache_gb: float = 50.0  # most bytes that fetched tars of one node may take, GB


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer; the learning rate rises linearly, then falls along a schedule."""

    name: str = "adam"  # optimizer: adam (AdamW if weight_decay is not 0)
    schedule: str = "cosine"  # how the learning rate falls after the warm-up: cosine | linear
    lr: float = 1e-3  # highest learning rate
    beta1: float = 0.9  # decay of the gradient's running mean
    beta2: float = 0.999  # decay of the squared gradient's running mean
    weight_decay: float = 0.0  # decoupled weight decay; 0: none
    warmup_images: int = 5_000  # images over which the learning rate rises from 0
    final_lr_fraction: float = 0.02  # of `lr`, reached at the end; 1: constant after the warm-up
    clip_norm: float = 1.0  # largest norm of the gradient (of nats per dimension); 0: no clipping


@dataclass(frozen=True)
class TrainConfig:
    """How long and how the model is trained; nothing here depends on the number of ranks."""

    images: int = 150_000  # images to train on in all, repeats included
    batch_size: int = 64  # GLOBAL batch, split over the ranks
    micro_batch: int = 0  # most images of a rank in one pass (gradient accumulation); 0: its whole share
    kl_warmup_images: int = 15_000  # images over which the KL term's weight rises from 0 to 1
    ema_decay: float = 0.999  # decay of the averaged weights, per step
    precision: str = "auto"  # auto (bf16 if the device has it, else fp16 on GPUs) | fp32 | bf16 | fp16 | fp64
    step: str = "auto"  # how steps run: auto | eager | compiled (torch.compile) | graph (one CUDA graph)
    channels_last: bool = True  # keep images as N x H x W x C in memory
    deterministic: bool = False  # use deterministic kernels on a GPU
    log_interval: int = 20  # steps between two records of the training loss
    val_interval: int = 300  # steps between two validations
    max_lost_steps: int = 300  # most steps that a crash may cost; a checkpoint is written every half of it
    keep_checkpoints: int = 2  # newest checkpoints to keep, besides the best one
    keep_every: int = 0  # keep the checkpoints at multiples of this too, steps; 0: none
    max_bad_steps: int = 5  # most non-finite losses in a row; one more stops the run
    profile: int = 0  # steps to trace with torch.profiler; 0: none
    threads: int = 0  # CPU threads of a rank; 0: the node's cores shared by its ranks
    timeout_s: int = 600  # longest wait of one rank for another while training starts, seconds
    stall_s: int = 180  # a rank that stays silent this long ends the job, which names it, seconds; 0: never
    init_from: str = ""  # run directory whose best weights training starts from; empty: random weights


def _tune_optim() -> OptimConfig:
    return OptimConfig(lr=4e-4, warmup_images=640)


def _refine_optim() -> OptimConfig:
    return OptimConfig(lr=1e-3, warmup_images=6400)


def _refine_prior() -> PriorConfig:
    return PriorConfig(name="flow_matching")


def _steer_optim() -> OptimConfig:
    return OptimConfig(lr=5e-4, weight_decay=0.05, warmup_images=6400)


@dataclass(frozen=True)
class TuneConfig:
    """The stage `tune`: fit the decoder alone, with loss terms that are too dear for the whole training."""

    images: int = 0  # images seen; 0: the stage is left out
    batch_size: int = 32  # GLOBAL batch
    ema_decay: float = 0.99  # of the averaged weights
    code_noise: float = 0.0  # most noise that the decoder learns to forgive, in standard deviations of codes
    optim: OptimConfig = field(default_factory=_tune_optim)  # the optimizer
    losses: LossConfig = field(default_factory=LossConfig)  # terms beside the negative ELBO


@dataclass(frozen=True)
class RefineConfig:
    """The stage `refine`: fit a new prior on the codes of the frozen encoder."""

    images: int = 0  # images encoded; 0: the stage is left out
    batch_size: int = 64  # GLOBAL batch, images
    attribute_dropout: float = 0.1  # share of requests whose attributes are hidden, for guidance
    ema_decay: float = 0.998  # of the averaged weights
    optim: OptimConfig = field(default_factory=_refine_optim)  # the optimizer
    prior: PriorConfig = field(default_factory=_refine_prior)  # the prior that is fitted


@dataclass(frozen=True)
class SteerConfig:
    """The stage `steer`: teach the attribute control what classifiers see in decoded codes."""

    images: int = 0  # images decoded; 0: the stage is left out
    batch_size: int = 16  # GLOBAL batch, images
    ema_decay: float = 0.998  # of the averaged weights
    optim: OptimConfig = field(default_factory=_steer_optim)  # the optimizer
    width: int = 1024  # units of the network that reads attributes in codes
    guide_epochs: int = 8  # passes over the training split by each of the classifiers that teach


@dataclass(frozen=True)
class ClassifierConfig:
    """The attribute classifier (ResNet-18 with GroupNorm); all runs on the same shards share it."""

    epochs: int = 5  # passes over the training split
    batch_size: int = 64  # GLOBAL batch, split over the ranks
    lr: float = 1e-3  # highest learning rate
    weight_decay: float = 1e-2  # decoupled weight decay
    precision: str = "auto"  # auto | fp32 | bf16 | fp16
    seed: int = 0  # of its weights and its order of images


@dataclass(frozen=True)
class EvalConfig:
    """Settings of the evaluation: metrics, images and judges."""

    split: str = "test"  # images to compare with: val | test
    n: int = 3000  # number of samples and of reconstructions; at most the size of the split
    block: int = 100  # images per forward pass; results do not depend on the number of ranks
    checkpoint: str = "best"  # best | latest | a step | all (each kept one, the best last)
    weights: str = "ema"  # ema (averaged) | raw
    stage: str = ""  # whose weights: train | tune | refine | steer; empty: the last one of this configuration
    guidance: float = 1.0  # how closely samples follow the request; needs refine.prior.name=flow_matching
    margin: float = 0.0  # score that named attributes reach, 1: as average images; needs refine.prior.control
    tries: int = 1  # times that a sample is drawn at most, while it is anomalous; needs refine.prior.anomaly
    edit_strength: float = 1.0  # how strongly a toggled attribute acts; needs control or flow_matching
    flip_images: int = 200  # images whose request is changed by one attribute at a time
    metrics: list[str] = field(default_factory=list)  # names of metrics; empty: all of them
    iw_images: int = 500  # images for the importance-weighted bound
    iw_samples: int = 50  # latent samples per image for that bound (K)
    rare_samples: int = 500  # samples per rare combination of attributes
    neighbour_images: int = 20_000  # training images to search for the nearest one to a sample
    kid_subsets: int = 100  # subsets over which KID is averaged (torch-fidelity's default)
    kid_subset_size: int = 1000  # images in one of them; at most the number of images
    judge: bool = True  # measure on features of EfficientNet-Lite2 too, where the extra `judge` is there
    inception_weights: str = ""  # file of torch-fidelity's Inception weights; empty: $CVAE_INCEPTION_WEIGHTS
    network: str = ""  # one more feature network: weights (.safetensors) or TorchScript file; empty: none
    network_name: str = ""  # torchvision's name for `network`, e.g. resnet50; empty: `network` is TorchScript
    network_sha256: str = ""  # of the file `network`; required for TorchScript, which is a program
    network_size: int = 224  # side to which `network` gets images resized, pixels
    projection: str = "tsne"  # drawing of latent vectors: tsne | umap (needs the extra `umap`)
    seed: int = 0  # of the samples


@dataclass(frozen=True)
class TrackingConfig:
    """The store that numbers are sent to; metrics.jsonl in the run directory is complete without it."""

    enabled: bool = True  # false: nothing is sent anywhere
    name: str = "mlflow"  # tracker: mlflow
    uri: str = ""  # the tracker's store; empty: $MLFLOW_TRACKING_URI, else mlflow.db in `runs_dir`
    experiment: str = ""  # group of runs in the store; empty: $MLFLOW_EXPERIMENT_NAME, else cvae


@dataclass(frozen=True)
class ClusterConfig:
    """The place where jobs run; each cluster is one YAML file in configs/cluster/."""

    executor: str = "local"  # local (processes on this machine) | debug (this very process) | slurm
    nodes: int = 1  # number of nodes
    tasks_per_node: int = 2  # ranks per node; on GPU nodes the number of GPUs
    gpus_per_node: int | str = 0  # GPUs per node: 4 | a100:4 | gpu:a100:4 (as a GRES) | auto (this machine)
    cpus_per_task: int = 1  # CPU cores per rank
    mem_gb: int | None = None  # memory per node, GB; null: the cluster's default
    timeout_min: int = 60 * 24  # time limit of a job, minutes
    partition: str | None = None  # Slurm partition; null: the cluster's default
    account: str | None = None  # Slurm account; null: the user's default
    qos: str | None = None  # Slurm quality of service; null: the user's default
    constraint: str | None = None  # Slurm node features; null: any node
    signal_delay_s: int = 120  # warning before the time limit, seconds
    jobs: int = 1  # jobs of one array that a stage is split into, if it can be (shard)
    max_timeouts: int = 20  # how often a job that timed out is requeued
    max_crashes: int = 3  # crashes in a row without progress after which a job is not restarted
    max_restarts: int = 20  # restarts after crashes, in all
    python: str | None = None  # shell command that starts Python, e.g. in a container; null: this Python
    setup: list[str] = field(default_factory=list)  # shell lines before the job, e.g. module load
    extra_sbatch: dict[str, str | None] = field(default_factory=dict)  # more options of sbatch; null: none
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)  # stage: any key above; null: its default


@dataclass(frozen=True)
class RunConfig:
    """One run: a configuration and a seed."""

    name: str = "sigma_cvae_nf"  # of the run and its directory: letters, digits, '.', '_' and '-'
    seed: int = 0  # of weights, order of images, flips and noise
    runs_dir: str = "runs"  # folder of all runs and of what they share
    toy: ToyConfig = field(default_factory=ToyConfig)  # the faces drawn here
    shard: ShardConfig = field(default_factory=ShardConfig)  # stage shard
    data: DataConfig = field(default_factory=DataConfig)  # shards to batches
    model: ModelConfig = field(default_factory=ModelConfig)  # the conditional VAE
    optim: OptimConfig = field(default_factory=OptimConfig)  # stage train: the optimizer
    train: TrainConfig = field(default_factory=TrainConfig)  # stage train: length, logging, checkpoints
    tune: TuneConfig = field(default_factory=TuneConfig)  # stage tune
    refine: RefineConfig = field(default_factory=RefineConfig)  # stage refine
    steer: SteerConfig = field(default_factory=SteerConfig)  # stage steer
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)  # stage classifier
    eval: EvalConfig = field(default_factory=EvalConfig)  # stage eval
    tracking: TrackingConfig = field(default_factory=TrackingConfig)  # MLflow
    cluster: ClusterConfig = field(default_factory=ClusterConfig)  # jobs


LATER_PHASES = ("tune", "refine", "steer")  # trainings that a configuration may leave out, in their order
PHASES = ("train", *LATER_PHASES)
SOURCE_NAMES = ("celeba", "celeba_hq", "parquet", "webdataset", "images+csv")
OPTIMIZER_NAMES = ("adam",)
SCHEDULE_NAMES = ("cosine", "linear")

# Keys that name a file or folder. A launch expands `~` and `$VARIABLES` in them and makes them absolute.
# URLs stay as they are. `data.stage_to` and `data.cache_dir` are not among them: they name a folder of the
# node where the job runs.
PATH_KEYS = (
    "runs_dir",
    "shard.source",
    "data.shards",
    "data.tars",
    "train.init_from",
    "model.losses.perceptual.network",
    "tune.losses.perceptual.network",
    "eval.inception_weights",
    "eval.network",
)
