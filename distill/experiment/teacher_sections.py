"""Sections of the experiment file on texts and their reading by the teacher. It imports nothing heavy."""

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
    reader: str | None = None
    """`file.py:function` that yields a file's rows, for formats of your own."""


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
    reader: str | None = None
    """`file.py:function` that yields the rows of each file of `path`, for formats of your own."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Several sources instead of `path`, each with path, name, split, columns, weight, limit and reader."""
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
        return [SourceConfig(self.path, self.name, self.revision, self.split, self.columns, reader=self.reader)]

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
    batch_size: Annotated[int, Between(1, 2**16)] | Literal["auto"] = 8
    """Samples a forward pass of the teacher (the micro-batch); halved when the device runs out of memory. auto: the
    largest that fits a card (a few on a processor), by the forecast; kept by later starts."""
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

    @property
    def micro_batch(self) -> int:
        """Samples a forward pass, where `auto` has been replaced."""
        assert self.batch_size != "auto", "`distill.experiment.micro_batch` replaces it before a phase begins"
        return self.batch_size
