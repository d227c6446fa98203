"""The configuration: frozen dataclasses, the only place with defaults.

A YAML file holds one mapping per section (``model:``, ``data:``, ...); a later file or a dotted option
(``--optimise.learning_rate 1e-5``) is laid over an earlier one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from scir_jax.config.choices import LabelName, RewardName
from scir_jax.config.columns import ColumnsConfig
from scir_jax.config.evaluation import EvaluateConfig
from scir_jax.config.judge import JudgeConfig


@dataclass(frozen=True)
class RunConfig:
    """The run as a whole."""

    directory: str = "runs/quickstart"
    """where every file of the run is written; the same command resumes it"""
    seed: int = 0
    """seed of data order, sampling and pairing"""
    iterations: int = 2
    """rounds of SCIR training: 2 turns M1 into M3"""
    distributed: bool = False
    """this is one of several processes, one per host, started alike: they find each other on a TPU slice and under
    Slurm, elsewhere by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"""
    host_timeout: float = 60.0
    """seconds without a sign of another host after which the others stop"""
    until: str | None = None
    """stop when this stage is done, for example sample:2 (sft, or sample, score, optimise, evaluate with the number of
    the iteration); the same command without it goes on"""
    accept_replaced: tuple[str, ...] = ()
    """files of stages that were replaced on purpose, for example [iteration_01/responses.jsonl]; any other file that is
    not what the run wrote is refused"""
    start_from: str | None = None
    """RUN or RUN:M3, another run whose model is M1 here, instead of SFT; its references come with it. RUN alone is
    RUN:M1, so that methods start from one model"""
    auto: bool = False
    """propose what is not given from the model, the data's lengths and the device's memory; the default where --model
    or --prompts are given and --config is not"""
    proposed: dict[str, str] = field(default_factory=dict)
    """written by the program: setting -> why it was proposed; a resumed run keeps these settings"""
    tensorboard: bool = True
    """write TensorBoard events beside metrics.jsonl"""
    wandb: bool = False
    """log to Weights & Biases too, with tables of answers and pairs (needs the extra [wandb])"""
    trackio: bool = False
    """the same with Trackio (needs the extra [trackio])"""
    lease: float = 90.0
    """seconds of a run in a bucket (gs://): so long after its process was killed it goes on elsewhere"""
    compilation_cache: str | None = None
    """directory of compiled programs, so that a second run does not compile again"""


@dataclass(frozen=True)
class WorldConfig:
    """The embedded world of the quickstart; unused when `directory` is empty."""

    directory: str | None = None
    """made here if absent; `{world}` in any path of `model` and `data` stands for it"""
    seed: int = 0
    """another seed is another world: other words, answers and model"""
    hidden_size: int = 64
    """width of the model, a multiple of 32; heads and feed-forward width follow from it"""
    layers: int = 4
    """of the model"""
    steps: int = 450
    """training steps of the base model M0"""
    documents: int = 48
    """documents per step"""
    comparisons: int = 96
    """comparisons per step"""
    learning_rate: float = 8e-3
    """peak of the cosine schedule"""


@dataclass(frozen=True)
class ModelConfig:
    """The model, a Hugging Face directory with safetensors and a chat template."""

    path: str = "{world}/model"
    """directory with config.json, *.safetensors, tokenizer files, or OWNER/NAME or OWNER/NAME@REVISION of the hub"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the computation; trained weights and log-probabilities stay float32"""
    attention: Literal["auto", "xla", "blocks", "cudnn", "splash"] = "auto"
    """auto: cuDNN on a GPU in bfloat16 without a cap, splash on a TPU for rows of 256 tokens and more, else blocks for
    rows that are longer than a block, XLA for others"""
    remat: Literal["none", "dots", "full"] = "none"
    """what the backward pass computes again instead of keeping"""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: only they are trained and checkpointed, the model's own weights stay as they are."""

    rank: int = 0
    """of the adapters; 0: none, full fine-tuning"""
    alpha: float = 16.0
    """an adapter's output is multiplied by alpha / rank"""
    rslora: bool = False
    """alpha / sqrt(rank) instead"""
    dropout: float = 0.0
    """share of the adapters' inputs that training leaves out"""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """adapted layers"""
    adapter: str | None = None
    """PEFT adapter to go on from, a directory or a name like model.path; it says rank, alpha, targets and the rest"""


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh; one axis may be -1 (all devices that are left)."""

    data: int = -1
    """replicas"""
    fsdp: int = 1
    """parameters and optimiser state split over batch shards"""
    tensor: int = 1
    """heads, feed-forward width and the width of embedding and head split"""


@dataclass(frozen=True)
class DataConfig:
    """The user's data: JSON Lines, JSON, Parquet, a directory, or OWNER/NAME:CONFIG:SPLIT of the Hugging Face hub."""

    prompts: str | None = None
    """rows with `prompt`: a text or a list of messages"""
    ift: str | None = None
    """instruction fine-tuning rows: `messages`, or `prompt` and `response` (or `completion`)"""
    eft: str | None = None
    """judging examples: `prompt`, `chosen`, `rejected`"""
    heldout_prompts: str | None = None
    """prompts for evaluation only"""
    holdout: int = 0
    """rows of data.prompts that are kept from training and evaluated on where data.heldout_prompts is not set"""
    heldout_pairs: str | None = None
    """labelled pairs for evaluation only: `prompt`, `chosen`, `rejected`"""
    pairs: str | None = None
    """pairs made elsewhere, used instead of sampling: `prompt`, `response_a`, `response_b`, or chosen/rejected"""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """other names of columns"""
    on_bad_row: Literal["error", "skip"] = "error"
    """a row that cannot be understood stops the run, or is left out and counted"""
    max_bad_rows: float = 0.01
    """with skip: more bad rows than this share of a file stop the run all the same; 10 rows are always allowed"""


@dataclass(frozen=True)
class TextConfig:
    """Token limits, and how the rows of training are packed."""

    max_prompt_tokens: int = 512
    """most tokens of a prompt, with the chat template's"""
    max_response_tokens: int = 512
    """most tokens of a response, with the stop token"""
    long_prompts: Literal["middle", "drop", "error"] = "middle"
    """an over-long prompt loses its middle, is left out, or stops the run"""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """options of the model's chat template, true, false, texts or numbers: `{"enable_thinking": false}`"""
    packing: Literal["auto", "bins", "lengths", "off"] = "auto"
    """of training's rows: several in a bin; each in one of few lengths; all as long as the longest that the data files
    and these limits allow; auto: off for rows of up to 128 tokens, lengths with cuDNN attention, else bins"""
    bin_tokens: int = 0
    """of a bin at the most; 0: 4096 on accelerators or the longest row, no limit on a CPU"""
    share_prompts: Literal["auto", "always", "never"] = "auto"
    """rows of a pair and answers to score that begin alike, with a prompt, share what is computed of it; in bins with
    blocks or xla attention; auto: in training where that makes a stage's steps shorter"""


@dataclass(frozen=True)
class TrainingConfig:
    """What SFT and SCIR training share: the optimiser, the schedule, micro-batches."""

    optimizer: Literal["adamw", "adafactor", "muon"] = "adamw"
    """adafactor: no first moment, a factored second one, a few percent of AdamW's state; muon: orthogonal updates of the
    layers' matrices as large as AdamW's, AdamW for all else, half of its state"""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the first moment"""
    b1: float = 0.9
    """decay of AdamW's first moment"""
    b2: float = 0.95
    """decay of AdamW's second moment"""
    weight_decay: float = 0.0
    """decoupled weight decay"""
    clip: float = 1.0
    """gradients are scaled down to this global norm"""
    warmup: float = 0.1
    """share of a stage's steps with linear warm-up"""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """after warm-up; cosine and linear fall towards `final` times the peak by the end of the stage"""
    final: float = 0.1
    """see schedule"""
    accumulate: int = 1
    """micro-batches per step; this changes memory, not the result (but for the inputs that lora.dropout leaves out)"""
    max_skipped: int = 5
    """consecutive steps with a non-finite loss or gradient after which the run stops"""


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning M0 -> M1 on IFT conversations and EFT judge questions."""

    epochs: float = 1.0
    """passes over the longer of the two files; 0 leaves SFT out (M1 = M0)"""
    ift_batch_size: int = 16
    """conversations per step"""
    eft_batch_size: int = 16
    """judge questions per step"""
    learning_rate: float = 5e-6
    """peak of the schedule"""


@dataclass(frozen=True)
class SampleConfig:
    """How responses are sampled."""

    responses: int = 4
    """N, responses per prompt"""
    prompts: int | None = None
    """prompts per iteration; null: the file is divided evenly over the iterations"""
    temperature: float = 1.0
    """of sampling; 0 is greedy"""
    top_p: float = 1.0
    """nucleus"""
    top_k: int = 0
    """0: no limit"""
    batch_size: int = 16
    """prompts whose answers are sampled at once; a slot whose answer is finished takes the next prompt's"""
    command: str | None = None
    """shell command of another engine that answers the iterations' prompts, on the first host: it reads {prompts} and
    the model in {model}, and writes {output}; {engines}, {responses}, {temperature}, {top_p}, {top_k}, {max_tokens},
    {stop_ids} and {seed} stand for what they say; `--config engines/vllm` has one"""


@dataclass(frozen=True)
class PairsConfig:
    """Which responses of a prompt are compared."""

    kind: Literal["random", "all", "best_worst", "cream", "dice"] = "random"
    """best_worst ranks the N responses by the judge's wins (with preference.labels pointwise by its points) and pairs
    the best with the worst and the second-worst;
    cream pairs the implicit reward's best with its worst, for preference.labels cream; dice too, with its rewards less
    alpha times the characters, for preference.labels dice"""
    per_prompt: int = 2
    """pairs per prompt (random and best_worst)"""
    likelihood_weight: float = 0.0
    """best_worst: weight of the standardised likelihood beside the judge's mean win probability"""
    offline: float = 0.0
    """share of the pairs to train on that are the labelled ones of data.eft, with pairs.kind dice"""
    scorer: str | None = None
    """who labels the pairs with preference.labels external, and ranks them with best_worst: `module:function` of
    (conversations, answers) -> rewards, or a reward model, a Hugging Face directory or OWNER/NAME of the hub"""


@dataclass(frozen=True)
class GenerativeConfig:
    """The generative reward model: the policy as a pairwise judge."""

    templates: tuple[str, ...] = ("standalone",)
    """judge templates, built-in names or YAML files; each is a reward model of its own"""
    pointwise: str = "additive"
    """the template that gives points to one answer, for the reward model pointwise: built-in or a YAML file"""
    passes: int = 10
    """Monte-Carlo passes that sample the judge's uncertainty, where a method asks for it and lora.dropout is set;
    without dropout the templates and both orders are the sample"""
    quote_thinking: bool = False
    """show the judge the thinking block of an answer too, not only what follows it"""


@dataclass(frozen=True)
class ImplicitConfig:
    """The implicit reward model: beta * log(pi / pi_ref)."""

    beta: float = 0.1
    """reward per nat"""
    reference: str = "previous"
    """reference model, which must lag the policy: previous (M_{t-1}), sft (M1), base (M0), or a model, a
    directory or a name like model.path"""
    length: Literal["none", "mean", "penalty"] = "none"
    """mean: per token; penalty: r - alpha |y|, alpha fitted once per iteration"""


@dataclass(frozen=True)
class RewardsConfig:
    """The set of internal reward models and their consensus."""

    models: tuple[RewardName, ...] = ("generative", "implicit")
    """reward models that must agree; pointwise: the points of an answer alone, frozen like likelihood's"""
    likelihood_length: Literal["none", "mean"] = "none"
    """the likelihood reward is a sum or a mean over tokens"""
    entropy_scale: float = 1.0
    """the entropy reward is this number times (mean token entropy of the other answer - that of the answer), in nats"""
    weights: dict[str, float] = field(default_factory=lambda: {"generative": 1.0})
    """reward model -> weight; the consensus is the sigmoid of the weighted sum of logits, absent weights are 0"""


@dataclass(frozen=True)
class ConsistencyConfig:
    """The consistency penalty over all pairs."""

    kind: Literal["kl", "js", "cross_entropy", "agreement", "pseudo_label"] = "kl"
    """kl and cross_entropy are symmetric"""
    weight: float = 1.0
    """0 leaves the penalty out"""
    stop_gradient: Literal["none", "generative", "implicit", "entropy"] = "none"
    """this reward model teaches and does not learn"""
    target: Literal["mutual", "consensus", "lagged", "transitive", "labels"] = "mutual"
    """whom the reward models are compared with: each other; or each with a target frozen at the start of the iteration:
    their consensus; lagged: the mean verdict of M_t and M_{t-1}, weighted by their agreement; transitive: the difference
    of both answers' mean verdicts against all others, with pairs.kind all or best_worst; labels: the given ones"""
    sharpen: float = 0.5
    """temperature of the pseudo-label"""
    entropy: float = 0.0
    """weight of the mean entropy of the reward models' predictions, added to the penalty: a positive one asks for
    confidence; 1 with kl and target mutual is cross_entropy"""


@dataclass(frozen=True)
class SelectionConfig:
    """Which pairs the preference loss sees."""

    rule: Literal["agreement", "both_orders", "certainty", "sampled", "all"] = "agreement"
    """agreement: all reward models on the same side of 1/2; both_orders: and the judge's verdict in each order too;
    certainty: all pairs, each with the weight (1 - B)^power, B the judge's uncertainty at the start of the iteration;
    sampled: pairs are drawn with these weights, without those whose label most of the judge's verdicts contradict"""
    power: float = 1.0
    """power of the rules certainty and sampled"""
    confidence: float = 0.0
    """with the rule agreement each reward model is further than this from 1/2"""


@dataclass(frozen=True)
class PreferenceConfig:
    """The preference loss (DPO)."""

    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """sigmoid is DPO"""
    beta: float = 0.1
    """DPO's beta"""
    weight: float = 1.0
    """0 leaves the term out"""
    label_smoothing: float = 0.0
    """share of the loss on the reversed pair"""
    length_normalised: bool = False
    """log-ratios per token"""
    reference: str = "start"
    """reference model: start (M_t, so that the first step's loss is ln 2), sft (M1), base (M0), or a model directory"""
    labels: LabelName = "agreement"
    """who says which response is better; external: the user or pairs.scorer; cream: the agreement of the rankings by
    M_t and by M_{t-1}, with pairs.kind cream; dice: the order of pairs.kind dice"""
    soft: bool = False
    """probabilities as labels: q l(m) + (1-q) l(-m)"""
    update: Literal["dynamic", "frozen"] = "dynamic"
    """labels made anew in every step, or once at the start of the iteration"""


@dataclass(frozen=True)
class ReplayConfig:
    """SFT examples beside the pairs, so that the judge is not forgotten."""

    weight: float = 0.3
    """0 leaves replay out"""
    ift_batch_size: int = 0
    """conversations per step"""
    eft_batch_size: int = 16
    """judge questions per step"""


@dataclass(frozen=True)
class OptimiseConfig:
    """SCIR training M_t -> M_{t+1}."""

    batch_size: int = 16
    """pairs per step"""
    epochs: int = 1
    """passes over the pairs"""
    learning_rate: float = 1e-6
    """peak of the schedule, in SCIR training"""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints inside a training stage."""

    every: int = 100
    """steps from one checkpoint to the next"""
    keep: int = 2
    """newest checkpoints of a stage that stay"""


@dataclass(frozen=True)
class Config:
    """Everything that determines a run."""

    run: RunConfig = field(default_factory=RunConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    generative: GenerativeConfig = field(default_factory=GenerativeConfig)
    implicit: ImplicitConfig = field(default_factory=ImplicitConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    optimise: OptimiseConfig = field(default_factory=OptimiseConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
