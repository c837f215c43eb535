"""The experiment file as typed dataclasses: every key, its unit and its default. It imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Between:
    """Limits of a number, both included, in the `Annotated` type of its field."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"between {self.low:g} and {self.high:g}"


@dataclass(frozen=True)
class SourceConfig:
    """One of several sources of text."""

    path: str
    """A file, a folder, or a hub data set's name, as `corpus.path`."""
    name: str | None = None
    """Configuration name of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; default: its newest."""
    split: str = "train"
    """Split of a hub data set, or of a folder whose files are named after splits."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns by their meaning."""
    weight: Annotated[float, Between(1e-6, 1e6)] | None = None
    """Share of the training tokens, relative to the other sources' weights; default: all tokens of all sources."""
    limit: Annotated[int, Between(1, 2**40)] | None = None
    """Rows that are read at most; a hub data set needs it."""


@dataclass(frozen=True)
class CorpusConfig:
    """The text the teacher reads and the student learns from."""

    path: str | None = None
    """A txt, md, jsonl, json, csv, tsv, parquet or arrow file, a folder of such files, or a hub data set's name."""
    name: str | None = None
    """Configuration name of a hub data set (for example `sample-10BT`)."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; default: its newest, kept by later starts."""
    split: str = "train"
    """Split of a hub data set, or of a folder whose files are named after splits; several as `train+test`."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns by their meaning, such as `{text: body}` or `{prompt: question, completion: answer}`."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Several sources instead of `path`, each with path, name, split, columns, weight and limit."""
    learn: Literal["assistant", "last", "all"] = "assistant"
    """Turns of a conversation that are learned: the assistant's, the assistant's last one, or all text."""
    thoughts: Literal["keep", "drop"] = "keep"
    """drop: leave the assistant's thoughts out of conversations (`reasoning_content`, and text before `</think>`)."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """Rows that cannot be learned: refuse them all in one message, or skip and count them."""
    cut_texts: Literal["keep", "drop"] = "keep"
    """Texts of a folder of `distill generate` that were cut by their limit of tokens: keep them, or leave them out."""
    chat_template: str | None = None
    """File with a chat template (Jinja) to use instead of the tokenizer's; the student gets it too."""
    date: str | None = None
    """Day (YYYY-MM-DD) that chat templates print as today's; default: the day on which the cache is begun."""
    sequence_length: Annotated[int, Between(2, 2**20)] = 1024
    """Tokens a sample."""
    pack: bool | Literal["auto", "documents", "stream", "none"] = "auto"
    """Way of documents into samples, isolated from one another: whole ones by best fit, a stream that is cut, or one a
    sample; auto: documents for conversations, stream for plain text. (true and false: stream and none.)

    A model that cannot isolate them, such as a recurrent one, reads each in a row of its own, by itself.
    """
    long: Literal["split", "skip"] = "split"
    """Documents longer than a sample: split (conversations at turns, with the first turns again as context without
    loss), or left out."""
    held_out: Annotated[float, Between(0, 0.5)] = 0.05
    """Share of the documents, chosen by a hash of their content, that is never trained on."""
    seed: Annotated[int, Between(0, 2**63)] = 0
    """Seed of the order of the documents."""

    @property
    def all_sources(self) -> list[SourceConfig]:
        """The sources; `path` with its keys is one."""
        if self.path is None:
            return self.sources
        return [SourceConfig(self.path, self.name, self.revision, self.split, self.columns)]

    @property
    def named(self) -> str:
        """The paths, for messages."""
        return ", ".join(source.path for source in self.all_sources)

    @property
    def shares_samples(self) -> bool:
        """True if several documents may share a sample."""
        return self.pack not in (False, "none")


@dataclass(frozen=True)
class TeacherConfig:
    """The large model, frozen and quantised."""

    model: str
    """A hub name, a local folder, a GGUF file, or `smollm2-135m-demo`."""
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """4-bit NF4 with double quantisation, 8-bit, or the checkpoint unquantised (bitsandbytes)."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of activations and unquantised weights; auto: the fastest one of the device, kept by later starts."""
    tokenizer: str | None = None
    """A tokenizer folder or a SentencePiece `.model` file; default: the model's own."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint. Only for sources you trust."""
    class_path: str = "huggingface"
    """A built-in's short name, `package.module:Class`, or `file.py:Class`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of a teacher plug-in."""


@dataclass(frozen=True)
class GenerateConfig:
    """The texts that a model writes, to learn from (`distill generate`)."""

    by: Literal["teacher", "student", "control", "fresh"] = "teacher"
    """The writer: the teacher, the trained student or control of this run, or the fresh, untrained student."""
    prompts: str | None = None
    """File, folder or hub data set with prompts, as `corpus.path` takes them; default: `corpus.path`."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of `prompts` by their meaning, such as `{prompt: question}`."""
    to: str | None = None
    """Folder for the texts, which `corpus.path` reads; default: `written` in `run_dir`."""
    max_prompts: Annotated[int, Between(1, 2**32)] | None = None
    """Prompts at most; default: all."""
    samples_per_prompt: Annotated[int, Between(1, 2**16)] = 1
    """Texts for each prompt."""
    max_new_tokens: Annotated[int, Between(1, 2**20)] = 512
    """Tokens of a text at most, without its prompt; a text that reaches them is cut."""
    prompt_tokens: Annotated[int, Between(1, 2**20)] = 64
    """Tokens of a plain text's beginning that are the prompt."""
    temperature: Annotated[float, Between(0, 100)] = 1.0
    """Temperature of the sampling; 0 takes the likeliest token."""
    top_p: Annotated[float, Between(1e-6, 1)] = 1.0
    """Sample among the likeliest tokens that have this probability together; 1: among all."""
    top_k: Annotated[int, Between(1, 2**24)] | None = None
    """Sample among this many likeliest tokens; default: among all."""
    min_p: Annotated[float, Between(0, 1)] = 0.0
    """Sample among tokens with at least this share of the likeliest one's probability."""
    seed: Annotated[int, Between(0, 2**63)] = 0
    """Seed of the sampling."""
    system: str | None = None
    """System message for conversations that have none."""
    thinking: bool | None = None
    """Thinking on or off, for chat templates that have `enable_thinking`; default: the template's choice."""
    batch_size: Annotated[int, Between(1, 2**16)] = 32
    """Texts that are written, or asked for, at one time; halved when the device runs out of memory."""
    server: str | None = None
    """Address of an OpenAI-compatible server that writes as the teacher, such as `http://127.0.0.1:8080/v1`."""
    server_model: str | None = None
    """Name of the server's model; default: its only one."""
    group: Annotated[int, Between(1, 2**20)] = 64
    """Prompts a part, the unit of work: a part that was interrupted is written anew."""


@dataclass(frozen=True)
class CacheConfig:
    """The cache of the teacher's distributions: its content and its place."""

    dir: str | None = None
    """Folder of the cache (to train from one: or its URL, such as s3://bucket/cache); default: `cache` in `run_dir`."""
    part: str | None = None
    """Make only this part of the cache, such as `3/8`, the third of eight; `distill merge` joins the parts."""
    devices: Annotated[int, Between(1, 1024)] = 1
    """Devices that run the teacher, each in a separate process; on a CPU: processes."""
    num_nodes: Annotated[int, Between(1, 1024)] = 1
    """Machines that run this command at the same time into the same folder, with Lightning's environment variables."""
    local_copy_gb: Annotated[float, Between(0.001, 1e6)] = 100.0
    """Gigabytes of local copies of the shards of a `dir` that is a URL; those used longest ago go first."""
    scheme: Literal["varopt", "top_k", "random", "hidden"] = "varopt"
    """Unbiased threshold sampling, the k largest and a bucket, random draws, or hidden states (exact)."""
    threshold: Annotated[float, Between(1e-4, 1)] = 0.02
    """varopt: probabilities from here up are kept exactly; the rest is sampled in steps of about this size."""
    entries: Annotated[int, Between(1, 65_535)] = 50
    """top_k: entries a position; random: draws a position."""
    bytes_per_token: Annotated[float, Between(1, 1e6)] | None = None
    """varopt: choose the threshold at which the first samples take this many bytes a token, instead of `threshold`."""
    max_size: str | None = None
    """Refuse to start if the cache would be larger, for example `20GB` or `12GiB`."""
    temperature: Annotated[float, Between(1e-2, 100)] = 1.0
    """Temperature of the teacher's distribution."""
    seed: Annotated[int, Between(0, 2**63)] = 0
    """Seed of the sampling."""
    batch_size: Annotated[int, Between(1, 2**16)] = 8
    """Samples a forward pass of the teacher (the micro-batch); halved when the device runs out of memory."""
    shard_samples: Annotated[int, Between(1, 2**20)] = 64
    """Samples a shard file."""
    chunk_size: Annotated[int, Between(1, 2**20)] = 512
    """Positions whose logits exist at one time, in the teacher's type; a block of them at a time in float32."""
    max_time: str | None = None
    """Stop after this long, such as `90m` or `11h30m`, with every finished batch kept; the same command continues."""
    max_samples: Annotated[int, Between(1, 2**40)] | None = None
    """Largest number of training samples; default: the whole corpus. A cache grows with it; of a larger one the first
    samples are used."""
    held_out_samples: Annotated[int, Between(0, 2**40)] = 64
    """Largest number of held-out samples, from all held-out documents, cached too, to watch the training student."""
    overwrite: bool = False
    """Delete a cache that was made with other settings, and begin anew."""


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
    batch_size: Annotated[int, Between(1, 2**16)] = 8
    """The micro-batch: samples of one forward pass on each device; halved when the device runs out of memory."""
    accumulate_grad_batches: Annotated[int, Between(1, 2**16)] = 1
    """Passes (micro-batches) of an optimiser step."""
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
    checkpoint_every_steps: Annotated[int, Between(1, 10**9)] = 200
    """Optimiser steps between two checkpoints. A killed training repeats at most these."""
    keep_checkpoints: Annotated[int, Between(1, 10**6)] = 2
    """Newest checkpoints that are kept, beside that of the best held-out KL."""
    resume: bool = False
    """Continue from the last checkpoint of this run (`--resume`)."""


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
