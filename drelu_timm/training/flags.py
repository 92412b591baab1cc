"""The flags of `drelu-timm train`, in the groups that its help shows."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Task:
    """What is trained, and on what."""

    model: str
    """timm architecture, plain or with its D-ReLU: resnet50, wide_resnet28_10, resnet50_drelu, dense_drelu, ..."""
    dataset: str
    """digits, mnist, cifar10, cifar100, tiny_imagenet, or folder for any folder of images."""
    data_dir: Path = Path("data")
    """Where the dataset lies, or is downloaded to. For folder: DIR/train and DIR/val (or test), folders or .tar files
    with a folder per class at the top and its images at any depth below."""
    img_size: int | None = None
    """Side of an image, in pixels; by default the dataset's own, and needed for folder."""
    n_train: int | None = None
    """Use the first so many training images only; any first ones are a fair sample."""
    generated: tuple[Path, ...] = ()
    """Generated images to mix in: .npz files with `image` and `label`, such as EDM's; several are read as one."""
    generated_fraction: float = 0.0
    """Share of generated images in every batch; an epoch keeps the size of the real training set."""


@dataclass(frozen=True)
class Start:
    """Where the run goes, and what it begins with."""

    output_dir: Path | None = None
    """Run directory to write; by default runs/ and a name of what the run holds."""
    resume: bool = False
    """Go on with the run in the output directory; starts anew where there is none."""
    init_from: Path | None = None
    """Run whose trained weights to start from."""
    preset: str | None = None
    """Named settings, printed with their source, over which flags given beside it win:
    paper-drelu, paper-at, paper-trades, paper-drelu-edm, paper-trades-edm, wang2023, wang2023-tiny-imagenet.
    (From Python: `TrainConfig.from_preset`.)"""
    pretrained: bool = False
    """Start from the base architecture's ImageNet weights."""
    seed: int = 0
    """Keys all randomness."""


@dataclass(frozen=True)
class Objective:
    """The loss, and the attack that makes its images."""

    objective: str = "natural"
    """natural, at (adversarial training by PGD), trades or mart."""
    beta: float = 6.0
    """TRADES and MART: weight of the KL term."""
    awp_gamma: float = 0.0
    """Adversarial weight perturbation, of this size relative to the weights (0.005 is common); 0 for none."""
    label_smoothing: float = 0.0
    """Share of the label that goes to all classes evenly, in the loss (not in the attack)."""
    norm: str | None = None
    """Norm of the inner attack, Linf or L2; by default the dataset's. Another one needs --eps."""
    eps: str | None = None
    """Radius of the inner attack, such as 8/255; by default the dataset's."""
    steps: int = 10
    """Gradients of the inner attack."""
    step_size: float | None = None
    """Length of a step, in units of a [0, 1] pixel; by default eps / 4."""


@dataclass(frozen=True)
class Layer:
    """The added layer of a *_drelu model, and its caps."""

    placement: str | None = None
    """Where a *_drelu model has its D-ReLUs: head (the default), stem or all."""
    activation: str | None = None
    """What stands there: drelu (the default), srelu, relu, relu6, silu, gelu, prelu or pssilu."""
    width: int | None = None
    """Units of the added dense layer, or channels of the added convolution; by default 128."""
    cap: float | None = None
    """Initial cap of a D-ReLU, fixed cap of an S-ReLU; by default 100."""
    cap_weight: float = 0.0
    """Weight of the caps' penalty in the loss (the paper's balancer, lambda)."""
    cap_penalty: str = "squared"
    """squared (the paper's: the sum of squared caps), or effective (each cap times what the next layer makes of it)."""
    cap_lr: float = 0.1
    """Learning rate of the caps; at the paper's 1e-3 a cap needs some 100,000 steps from 100 to 1."""
    small_images: bool = False
    """A stem for small images: 3x3, stride 1, no pooling, or an upsampling layer where the family has no such stem."""


@dataclass(frozen=True)
class Optimisation:
    """How long, how fast, and which epoch is kept."""

    optimizer: str = "adam"
    """Any optimiser of timm: adam, adamw, sgd (Nesterov, momentum 0.9), ..."""
    lr: float = 1e-3
    """Learning rate of everything but the caps, at its highest."""
    weight_decay: float = 0.0
    """Weight decay; biases, norms, caps and what timm's model names (position embeddings, ...) are spared."""
    schedule: str = "constant"
    """Learning rates: constant, plateau (halved after 5 epochs without a lower loss),
    cosine (to 0, step by step) or onecycle (up, then as a cosine to 0, step by step)."""
    warmup: float = 0.025
    """Share of the steps in which onecycle rises."""
    ema_decay: float = 0.0
    """Decay, a step, of an exponential moving average of the weights (0.995 is common); 0 for none.
    The averaged model is measured beside the raw one, and is what the run keeps."""
    epochs: int = 10
    """Passes over the training set, at most."""
    monitor: str | None = None
    """Held-out figure that says which epoch is best: loss, or pgd (accuracy under the inner attack).
    By default loss for natural training and pgd for robust objectives; of the averaged weights if there are any."""
    patience: int | None = None
    """Stop after so many epochs without a better held-out figure; by default never."""
    batch_size: int = 128
    """Images a step, over all processes together: the same run on any number of GPUs."""
    grad_accum_steps: int = 1
    """Parts that each process takes its share of a batch in, one after the other, where memory is short.
    The same update as without up to rounding, but that BatchNorm takes the statistics of each part."""
    sync_bn: bool = False
    """BatchNorm over the batch of all processes; by default each takes the statistics of its own part."""


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images, beside the dataset's own crop and flip."""

    cutout: int = 0
    """Side of the square that Cutout erases, in pixels; 0 for none."""
    cutmix: float = 0.0
    """Probability that a batch is mixed by CutMix."""
    rand_augment: str = ""
    """timm's RandAugment, such as rand-m9-n2-mstd0.5; empty for none."""


@dataclass(frozen=True)
class Machine:
    """What changes no result."""

    compile: bool = False
    """Compile the model by torch.compile: a minute or more at the start, fewer seconds a step on a GPU."""
    workers: int = 0
    """Processes that prepare batches, beside each training process; 0 for none."""
    save_every: int = 0
    """Save a state after every so many steps as well; by default at the end of an epoch, and on SIGTERM."""
    log_with: str | None = None
    """Tracker of accelerate for the figures of every epoch, beside log.jsonl: tensorboard, wandb, ..."""
