"""The experiment file as typed dataclasses: every key, its unit and its default. It imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from distill.experiment.teacher_sections import Between, CacheConfig, CorpusConfig, GenerateConfig, TeacherConfig


@dataclass(frozen=True)
class StudentConfig:
    """The small model."""

    class_path: str = "pruned"
    """A built-in's short name (pruned, compact, huggingface, lora), `package.module:Class`, or `file.py:Class`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the student's class, checked against its signature."""
    vocabulary: Literal["full", "corpus"] = "full"
    """corpus: only the tokens that the cached text needs (and bytes, special tokens and pieces of those tokens)."""
    search: dict[str, Any] = field(default_factory=dict)
    """Sizes to find: `{share: 0.4}` of the teacher's parameters or `{parameters: 60M}`; also `candidates`, `steps`."""


DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skewed_kl",
    "skewed_reverse_kl",
    "adaptive_kl",
    "total_variation",
    "mean_squared_logits",
)
"""Values of `loss.divergence` that are no function of the user's own."""


@dataclass(frozen=True)
class LossConfig:
    """The loss: `(1 - alpha) * divergence(teacher, student) + alpha * cross-entropy with the true token`."""

    divergence: str = "forward_kl"
    """forward_kl, reverse_kl, jsd, skewed_kl, skewed_reverse_kl, adaptive_kl, total_variation, mean_squared_logits, or
    your own, `module:function` or `file.py:function`. All of ours but forward_kl need cache.scheme `hidden` or `top_k`
    (mean_squared_logits: `hidden`)."""
    beta: Annotated[float, Between(0, 1)] = 0.5
    """jsd: the teacher's share of the mixture that both are compared with."""
    skew: Annotated[float, Between(0, 1)] = 0.1
    """skewed_kl, skewed_reverse_kl: share of the first distribution that is mixed into the second."""
    alpha: Annotated[float, Between(0, 1)] = 0.0
    """Weight of the true token: 0 only the teacher, 1 only the text."""
    alpha_schedule: Literal["constant", "with_learning_rate"] = "constant"
    """with_learning_rate: the teacher's weight, 1 - alpha, rises and falls as the learning rate does."""
    feature: Literal["cosine", "mse"] = "cosine"
    """Distance of the projected student's final hidden state to the teacher's, for feature_weight."""
    feature_weight: Annotated[float, Between(0, 10**6)] = 0.0
    """Weight of that distance, added to the loss; needs cache.scheme `hidden`."""
    chunk_size: Annotated[int, Between(1, 2**20)] = 256
    """Positions whose logits exist at one time."""


@dataclass(frozen=True)
class TrainConfig:
    """The training of the student."""

    caches: dict[str, Annotated[float, Between(0, 10**6)]] = field(default_factory=dict)
    """Caches of one teacher to train on together, by folder, each with its weight: its share of an epoch's samples.
    Held-out samples are the first one's, which may weigh 0. Default: the experiment's own cache."""
    begin_from: str | None = None
    """Folder of a finished training of the same student (its `run_dir` or `train.dir`, with its checkpoints), whose
    weights this training begins with; optimiser and learning rate begin anew."""
    dir: str | None = None
    """Folder of the trained models, their checkpoints and logs; default: `run_dir`."""
    epochs: Annotated[int, Between(1, 10**6)] = 1
    """Passes over the cache, or over as many samples as all caches have; in each round."""
    max_steps: Annotated[int, Between(1, 10**9)] | None = None
    """Optimiser steps at most, in each round; default: all of the epochs."""
    max_time: str | None = None
    """Stop with a checkpoint after this long, such as `90m` or `11h30m`; the same command with --resume continues."""
    batch_size: Annotated[int, Between(1, 2**16)] | Literal["auto"] = 8
    """The micro-batch: samples of one forward pass on each device; halved when the device runs out of memory. auto: the
    largest divisor of step_samples that fits a card (a few on a processor), by the forecast; kept by later starts."""
    accumulate_grad_batches: Annotated[int, Between(1, 2**16)] = 1
    """Passes (micro-batches) of an optimiser step."""
    step_samples: Annotated[int, Between(1, 2**16)] | None = None
    """batch_size auto: samples of an optimiser step on each device, however many passes they take. Default: batch_size
    times accumulate_grad_batches."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true"] = "auto"
    """Lightning's precision: mixed keeps float32 (master) weights, bf16-true has bfloat16 weights alone; auto: 32-true
    or mixed, the fastest one of the device, kept by later starts."""
    rounding: Literal["auto", "nearest", "stochastic", "kahan"] = "auto"
    """bf16-true: rounding of steps smaller than a weight's last digit (auto: stochastic); kahan keeps a remainder."""
    optimizer: Literal["adamw", "adamw_8bit", "adamw_4bit", "paged_adamw_8bit"] = "adamw"
    """AdamW with moments in the weights' type, 8 bits, 4 bits, or 8 bits that move to the host (CUDA)."""
    step_in_backward: bool = False
    """Update each weight as soon as its gradient is there, so that never all gradients exist (no clipping then)."""
    learning_rate: Annotated[float, Between(0, 10)] = 6e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Learning rate after the warm-up: a cosine, or stable and then a linear decay (warm-up-stable-decay)."""
    warmup_fraction: Annotated[float, Between(0, 1)] = 0.05
    """Share of the steps in which the learning rate rises."""
    decay_fraction: Annotated[float, Between(0, 1)] = 0.2
    """wsd: share of the steps in which the learning rate falls."""
    final_learning_rate: Annotated[float, Between(0, 1)] = 0.1
    """Learning rate at the end, as a share of the peak."""
    weight_decay: Annotated[float, Between(0, 10)] = 0.1
    """AdamW's decoupled weight decay, on matrices only."""
    beta1: Annotated[float, Between(0, 1)] = 0.9
    """AdamW's first momentum."""
    beta2: Annotated[float, Between(0, 1)] = 0.95
    """AdamW's second momentum."""
    gradient_clip: Annotated[float, Between(0, 10**6)] = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    activation_checkpointing: bool = False
    """Recompute blocks in the backward pass instead of keeping their activations."""
    checkpoint_every_k: Annotated[int, Between(1, 10**6)] = 1
    """activation_checkpointing: recompute every k-th block only."""
    offload_activations: bool = False
    """Keep the activations that wait for the backward pass in host memory."""
    non_finite: Literal["stop", "skip"] = "stop"
    """Policy for a loss or gradient that is not finite: stop, or leave that step out, say so and count it."""
    early_stopping: Annotated[int, Between(1, 10**6)] | None = None
    """Stop after this many measurements of the held-out KL without a new best; the best weights become the student."""
    seed: Annotated[int, Between(0, 2**31)] = 0
    """Seed of weights and order."""
    loggers: list[Literal["tensorboard", "csv", "wandb", "mlflow", "trackio"]] = field(
        default_factory=lambda: ["tensorboard", "csv"]
    )
    """Loggers of the curves; the report draws them from csv. wandb, mlflow and trackio must be installed."""
    callbacks: list[str | dict[str, Any]] = field(default_factory=list)
    """Lightning callbacks of your own: `module:Class` or `file.py:Class`, or `{class_path: …, init_args: {…}}`."""
    accelerator: str = "auto"
    """Lightning's accelerator: auto, cpu, cuda, mps."""
    devices: Annotated[int, Between(1, 1024)] = 1
    """Devices to train on; on a CPU: processes."""
    num_nodes: Annotated[int, Between(1, 1024)] = 1
    """Machines that run this command at the same time, with Lightning's environment variables."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """Lightning's strategy: ddp gives each device the whole student, fsdp a share of it."""
    num_workers: Annotated[int, Between(0, 256)] = 0
    """Processes that read the cache."""
    log_every_steps: Annotated[int, Between(1, 10**9)] = 10
    """Optimiser steps between two log lines."""
    validate_every_steps: Annotated[int, Between(1, 10**9)] = 200
    """Optimiser steps between two measurements of the held-out KL."""
    texts_every_steps: Annotated[int, Between(1, 10**9)] | None = None
    """Optimiser steps between two looks at texts: `evaluate.texts` held-out prompts, the likeliest `text_tokens` tokens
    after each, in the log, the loggers and the report; default: none."""
    checkpoint_every_steps: Annotated[int, Between(1, 10**9)] = 200
    """Optimiser steps between two checkpoints. A killed training repeats at most these."""
    keep_checkpoints: Annotated[int, Between(1, 10**6)] = 2
    """Newest checkpoints that are kept, beside that of the best held-out KL."""
    resume: bool = False
    """Continue from the last checkpoint of this run (`--resume`)."""

    @property
    def micro_batch(self) -> int:
        """Samples a forward pass, where `auto` has been replaced."""
        assert self.batch_size != "auto", "`distill.experiment.micro_batch` replaces it before a phase begins"
        return self.batch_size

    @property
    def samples_of_step(self) -> int:
        """Samples of an optimiser step on each device."""
        if self.batch_size == "auto":
            assert self.step_samples is not None, "the checks of values ask for it"
            return self.step_samples
        return self.batch_size * self.accumulate_grad_batches


@dataclass(frozen=True)
class EvaluateConfig:
    """The comparison of the student with its teacher."""

    control: bool = False
    """Train and measure a control too: the same student and steps, learning from the text alone (alpha 1)."""
    seeds: Annotated[int, Between(1, 100)] = 1
    """Trainings of the student (and control), with the seeds `train.seed`, `train.seed + 1`, …: mean and deviation."""
    max_samples: Annotated[int, Between(1, 2**40)] | None = None
    """Held-out samples to measure on at most, spread over all held-out documents; default: all."""
    batch_size: Annotated[int, Between(1, 2**16)] = 8
    """Samples a forward pass (the micro-batch); halved when the device runs out of memory."""
    student_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights and computations of student and control while they are measured."""
    tasks: list[str] = field(default_factory=list)
    """Benchmarks of lm-eval for teacher, student and control, such as `[arc_easy, hellaswag]` (extra `eval`)."""
    tasks_path: str | None = None
    """Folder of further task files for lm-eval, such as `configs/tasks`. A task can hold code, which is run."""
    tasks_limit: Annotated[int, Between(1, 2**40)] | None = None
    """Documents of each benchmark at most, for a quick look; default: all."""
    cost: bool = True
    """Measure the speed and memory of teacher, student and control."""
    cost_batch_sizes: list[Annotated[int, Between(1, 2**16)]] = field(default_factory=lambda: [1, 8])
    """Batch sizes, in sequences, at which the speed is measured."""
    texts: Annotated[int, Between(0, 1000)] = 4
    """Held-out prompts that teacher, student and control continue, side by side; 0: none."""
    text_tokens: Annotated[int, Between(1, 2**16)] = 48
    """Tokens of each continuation."""
    own_texts: Annotated[int, Between(0, 2**20)] = 0
    """Held-out prompts that teacher, student and control write on from as `generate` says, to measure the student where
    its own texts lead, and its answers beside the true ones; 0: none."""
    metric: str | None = None
    """Metric of your own for answers, `module:function` or `file.py:function`: (answer, reference) to a number."""


@dataclass(frozen=True)
class RoundsConfig:
    """Rounds of `distill run`: the student writes, the teacher scores its texts, training goes on from that student."""

    count: Annotated[int, Between(0, 1000)] = 0
    """Rounds after the training on the corpus; 0: none. Without a corpus the fresh student writes the first texts."""
    prompts: str | None = None
    """File, folder or hub data set with prompts, as `generate.prompts` (and `generate.columns`), the default."""
    samples_per_prompt: Annotated[int, Between(1, 2**16)] = 1
    """Texts for each prompt in each round."""
    share: Annotated[float, Between(0.001, 1)] = 0.5
    """Share of a round's samples that are its own texts; earlier rounds and the corpus divide the rest equally."""


@dataclass(frozen=True)
class Experiment:
    """One experiment: all settings of the commands."""

    corpus: CorpusConfig
    teacher: TeacherConfig
    student: StudentConfig = field(default_factory=StudentConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    run_dir: str = "runs/experiment"
    """Folder in which the experiment leaves everything it makes."""
    preflight: bool = True
    """Forecast each phase's memory before it begins and refuse what cannot fit."""
    memory_limit: str | None = None
    """Limit of the device memory, such as `12GiB`: to prove a recipe for a small card on a large one."""
