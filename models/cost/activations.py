"""What autograd keeps of a layer and of the loss, and what their backward passes hold beside it: bytes from a config.

Notation: n = micro_batch x seq_len tokens; H hidden, F the MLP's width, V vocabulary; di = d_inner, c = conv_dim, h, G
and N the Mamba heads, groups and state, p = di + c + h what in_proj gives; q and k the widths of all query and all
key heads; b bytes of the dtype, w = 4 of the sums (8 for float64).

kept by a layer  M  n b (2 H + p + c + 2 di) + n w (1 + G); a CPU also the states at the chunks' starts,
                    w micro_batch ceil(seq_len / chunk_size) di N
                 *  n b (2 H + 2 q + 2 k) + n w (1 + heads); with q/k norms n b (q + k) + n w (heads + key heads) more;
                    a CPU with packed rows also a mask, b micro_batch seq_len^2
                 -  n b (2 H + 2 F) + n w; gated n b F more
with positions   n w head_dim once, cosines and sines
checkpointing    n b H a layer instead (and once the mask, a byte a pair), beside the one layer that is worked on
of the loss      n b H of the head's input and as much of its gradient, the teacher's input; V H of the head's gradient
                 (w; on a GPU w, then b); a chunk's logits, V w of student and teacher each (on a GPU V b)

What is kept is what `save_for_backward` names in kernels/: on a GPU the same tensors, without states and mask. The
CPU's figures are held against allocations, and what a GPU keeps against fake tensors (tests/test_train_cost.py); what
its kernels take for themselves is read from the code, and has yet to be measured on one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from ..config import HybridConfig
from ..errors import InputError

TEACHERS = ("online", "cached", "none")
OPTIMIZERS = ("adamw", "muon")
DEVICES = ("cpu", "cuda")
# As the kernels have them: logits that the CPU's loss works through at a time (fused_loss.CACHED), tokens of a block of
# the convolution (causal_conv1d.Blocks, conv_triton.SIZES), and on a GPU tokens between the states of the scan's
# backward, by their bytes, and the programs that it wants (ssd_launch.SIZES, PROGRAMS).
LOGITS = 2**19
CONV_TOKENS = {"cpu": 256, "cuda": 128}
SCAN_TOKENS = {2: 32, 4: 16}
SCAN_TILE, SCAN_PROGRAMS = 4096, 256


@dataclasses.dataclass(frozen=True)
class Training:
    """What decides the memory of a step: rows that go through the models at once, tokens a row, and how.

    `batch` are the rows of a step, in all processes: more of them than go through at once come in several
    micro-batches, with gradients there from the start (None: so it is taken to be). `packed`: rows hold documents, as
    in all training here. `dtype` is that of weights in use and of activations; the optimizer moves float32 copies of
    less. `teacher` is "online", "cached" (its likeliest tokens, from files) or "none" (cross-entropy). `processes`
    share weights, gradients and the optimizer's state (FSDP2).
    """

    micro_batch: int = 1
    seq_len: int = 8192
    batch: int | None = None
    packed: bool = True
    dtype: torch.dtype = torch.bfloat16
    optimizer: str = "adamw"
    checkpointing: bool = False
    average: bool = False
    teacher: str = "online"
    teacher_dtype: torch.dtype = torch.bfloat16
    teacher_offload: bool = False
    processes: int = 1
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.seq_len < 1 or self.processes < 1:
            raise InputError(
                f"train: micro_batch ({self.micro_batch}), seq_len ({self.seq_len}) and processes ({self.processes})"
                " must be at least 1"
            )
        if self.batch is not None and (self.batch < 1 or self.batch % self.processes):
            raise InputError(
                f"train: a batch of {self.batch} rows is not for {self.processes} processes; give a multiple of them"
            )
        for name, known in (("teacher", TEACHERS), ("optimizer", OPTIMIZERS), ("device", DEVICES)):
            if getattr(self, name) not in known:
                raise InputError(f"train: {name} is {getattr(self, name)!r}; known: {', '.join(known)}")

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.seq_len

    @property
    def accumulates(self) -> bool:
        return self.batch is None or self.batch // self.processes > self.micro_batch

    @property
    def stored(self) -> int:
        """Bytes of a number that the optimizer moves, and of its gradient."""
        return max(4, self.width)

    @property
    def width(self) -> int:
        """Bytes a number."""
        return self.dtype.itemsize

    @property
    def sums(self) -> int:
        """Bytes of the numbers that sums are taken in."""
        return 8 if self.dtype == torch.float64 else 4

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def copies(self) -> int:
        """Bytes a number of a copy in the dtype of sums, where a CPU makes one."""
        return self.sums if self.width != self.sums and not self.on_gpu else 0


def kept(letter: str, config: HybridConfig, training: Training) -> int:
    """Bytes that autograd keeps of one layer, its input among them; the formulas stand at the head."""
    n, b, w = training.tokens, training.width, training.sums
    if letter == "M":
        sizes = 2 * config.hidden_size + projected(config) + config.conv_dim + 2 * config.d_inner
        starts = 0 if training.on_gpu else states(config, training, min(config.chunk_size, training.seq_len)) * w
        return n * b * sizes + n * w * (1 + config.n_groups) + starts
    if letter == "*":
        heads, both = config.num_attention_heads, config.num_attention_heads + config.num_key_value_heads
        mask = training.micro_batch * training.seq_len**2 * b if masked(training) else 0
        normed = n * both * (b * config.head_dim + w) if config.qk_norm else 0
        return n * b * 2 * (config.hidden_size + both * config.head_dim) + n * w * (1 + heads) + normed + mask
    return n * b * (2 * config.hidden_size + (2 + config.gated_mlp) * config.intermediate_size) + n * w


def projected(config: HybridConfig) -> int:
    """Rows of in_proj."""
    return config.d_inner + config.conv_dim + config.mamba_num_heads


def states(config: HybridConfig, training: Training, tokens: int) -> int:
    """Elements of the SSM states at the starts of all chunks of so many tokens."""
    return training.micro_batch * -(-training.seq_len // tokens) * config.d_inner * config.ssm_state_size


def layer_input(config: HybridConfig, training: Training) -> int:
    """The residual stream: what a checkpointed layer keeps."""
    return training.tokens * config.hidden_size * training.width


def norm_kept(config: HybridConfig, training: Training) -> int:
    """What a layer's norm (or the final one) keeps: the stream, and a number a row."""
    return layer_input(config, training) + training.tokens * training.sums


def kept_once(config: HybridConfig, training: Training) -> int:
    """What all attention layers share: rotary angles, and with checkpointing the mask that they are given again."""
    if "*" not in config.pattern:
        return 0
    mask = training.micro_batch * training.seq_len**2 if training.checkpointing and masked(training) else 0
    rows = training.tokens if training.packed else training.seq_len
    return mask + (rows * config.head_dim * training.sums if config.rope_theta is not None else 0)


def masked(training: Training) -> bool:
    """Whether attention gets a mask of all pairs of tokens."""
    return training.packed and not training.on_gpu


def backward(letter: str, config: HybridConfig, training: Training) -> int:
    """Bytes at the fullest step of a layer's backward, what is still kept of the layer included."""
    steps = {"M": mamba_backward, "*": attention_backward, "-": mlp_backward}[letter]
    stream, n = layer_input(config, training), training.tokens
    work = stream if training.on_gpu else 2 * n * config.hidden_size * (training.sums + training.copies)
    return max(*steps(config, training), norm_kept(config, training) + 2 * stream + work)


def fresh(rows: int, columns: int, training: Training) -> int:
    """A matrix's gradient, before it is added to what the micro-batches before have left, or put in the dtype that the
    optimizer moves; FSDP2 has whole ones anyway."""
    if training.processes > 1:
        return 0
    changed = training.width < training.stored
    here = training.width * (training.accumulates or changed) + training.stored * (training.accumulates and changed)
    return rows * columns * here


def mamba_backward(config: HybridConfig, training: Training) -> Iterator[int]:
    """out_proj, the gated norm, the scan, the convolution, the split of what in_proj gives, in_proj."""
    n, b, w, c = training.tokens, training.width, training.sums, config.conv_dim
    whole, stream, inner = kept("M", config, training), layer_input(config, training), n * config.d_inner * b
    rest = norm_kept(config, training) + 2 * stream  # the norm's, its output, and the gradient of the layer's output
    yield whole + stream + inner + fresh(config.hidden_size, config.d_inner, training)
    if training.on_gpu:
        yield whole + stream + 2 * inner
    else:  # the gate, what is normed, normed, its gradient, and two of the gate's
        yield whole + stream + n * config.d_inner * (6 * w + 3 * training.copies)
    given = 3 * inner + n * b * 2 * config.n_groups * config.ssm_state_size  # dy, dz, dx, dB and dC
    yield whole - 2 * inner + stream + given + scan_work(config, training)
    columns = n * config.mamba_num_heads * b + inner  # ddt and dz
    tokens = -(-n // CONV_TOKENS["cuda"]) if training.on_gpu else min(CONV_TOKENS["cpu"], training.seq_len)
    yield rest + n * b * projected(config) + columns + n * c * (2 * b + training.copies) + 5 * tokens * c * w
    yield rest + 2 * n * b * projected(config)
    yield rest + n * b * projected(config) + stream + fresh(projected(config), config.hidden_size, training)


def scan_work(config: HybridConfig, training: Training) -> int:
    """What the scan's backward holds beside inputs, kept states and gradients of x, B and C."""
    n, b, w, heads = training.tokens, training.width, training.sums, config.mamba_num_heads
    state = training.micro_batch * config.d_inner * config.ssm_state_size
    if training.on_gpu:
        most = min(SCAN_TOKENS[min(b, 4)], config.chunk_size, SCAN_TILE // config.ssm_state_size)
        chunk = max(16, 1 << (most.bit_length() - 1))
        programs = training.micro_batch * -(-training.seq_len // chunk) * config.n_groups
        shares = min(heads // config.n_groups, -(-SCAN_PROGRAMS // programs))
        parts = shares * n * 2 * config.n_groups * config.ssm_state_size * 4 if shares > 1 else 0
        return 2 * states(config, training, chunk) * min(b, 4) + n * heads * b + parts
    chunk = min(config.chunk_size, training.seq_len)
    steps = n * heads * (4 * w + 8)  # raw and clamped steps, their gradient, that of a, and a in float64
    pairs = training.micro_batch * chunk * chunk * (4 * heads + 2 * config.n_groups) * w
    rows = training.micro_batch * chunk * w * (9 * config.d_inner + 4 * config.n_groups * config.ssm_state_size)
    copied = 3 * training.micro_batch * chunk * config.d_inner * training.copies
    return steps + pairs + rows + copied + 4 * state * w


def attention_backward(config: HybridConfig, training: Training) -> Iterator[int]:
    """o_proj, the softmax, the three projections."""
    n, b, stream = training.tokens, training.width, layer_input(config, training)
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    whole, new = kept("*", config, training), fresh(config.hidden_size, queries, training)
    # A GPU's kernel has the queries' gradient in float32, and keys' and values' for each query head.
    expanded = n * queries * (2 * b + 4) if training.on_gpu else 0
    yield whole + stream + n * b * queries + new
    yield whole + stream + n * b * 2 * (queries + keys) + expanded
    yield norm_kept(config, training) + 4 * stream + n * b * (queries + 2 * keys) + new


def mlp_backward(config: HybridConfig, training: Training) -> Iterator[int]:
    """down_proj, the activation, up_proj (and the gate's)."""
    stream, ffn = layer_input(config, training), training.tokens * config.intermediate_size * training.width
    whole, new = kept("-", config, training), fresh(config.hidden_size, config.intermediate_size, training)
    inputs = 1 + config.gated_mlp
    yield whole + stream + ffn + new
    yield whole + stream + (inputs + (2 if config.gated_mlp and not training.on_gpu else 0)) * ffn
    yield norm_kept(config, training) + (2 + inputs) * stream + inputs * ffn + new


def loss_forward(student: HybridConfig, teacher: HybridConfig | None, training: Training) -> int:
    """What the loss holds beside the layers': inputs, gradients, and a chunk's logits."""
    n, b, w, vocabulary = training.tokens, training.width, training.sums, student.vocab_size
    target = 0 if teacher is None else n * teacher.hidden_size * training.teacher_dtype.itemsize
    head, values = vocabulary * student.hidden_size, n * 5 * w
    sides = 2 if training.teacher == "online" else 1
    given = 2 * layer_input(student, training) + target + values
    if training.on_gpu:
        chunk = min(n, max(2048, 2**28 // vocabulary))
        here = b + w if training.teacher == "cached" else b * sides  # linear_topk_kl takes logits in float32
        logits = chunk * (vocabulary * here + student.hidden_size * 4)
        return given + head * 4 + max(logits, head * b if b < 4 else 0)
    chunk = min(n, max(256, 2**22 // vocabulary))
    logits = chunk * vocabulary * (w * sides + (b if training.copies else 0))
    # Log-probabilities of the tokens at work; with a teacher of both sides, with its probabilities and their product.
    parts = {"online": 4, "cached": 0, "none": 1}[training.teacher]
    return given + head * w + logits + parts * min(chunk * vocabulary, LOGITS) * w


def loss_backward(config: HybridConfig, training: Training) -> int:
    """Both gradients as the forward pass left them, and once more, times the loss's own; or the second of the head in
    the dtype that the optimizer moves, too."""
    b, head = training.width, config.vocab_size * config.hidden_size
    first = b if training.on_gpu else training.sums
    moved = b + training.stored if b < training.stored and training.processes == 1 else 0
    return 2 * layer_input(config, training) + head * max(first + b + training.copies, moved)


def forward_alone(config: HybridConfig, training: Training) -> int:
    """What a model without gradients holds at its fullest layer: about what autograd would have kept of it."""
    unkept = dataclasses.replace(training, device="cuda", packed=False)  # neither states nor mask stay
    mask = training.micro_batch * training.seq_len**2 if "*" in config.pattern and masked(training) else 0
    return max(kept(letter, config, unkept) for letter in config.pattern) + layer_input(config, training) + mask
