"""The student: a decoder-only transformer, written from scratch, top to bottom in this file.

Pre-norm blocks, LayerNorm with bias, rotary positions, grouped-query attention, a GELU(tanh) MLP, biases on every
linear layer but the output head, which shares its matrix with the embedding. The tensors carry the names that
transformers' `Starcoder2ForCausalLM` gives them, so a saved student is a Starcoder2 checkpoint that vLLM, llama.cpp and
`AutoModelForCausalLM` load without custom code.

Shapes: B rows, T positions, N = B·T flattened positions, H hidden size, V vocabulary, A query heads, G key/value heads,
D head size.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from shared.errors import require, require_range

try:
    from torch.nn.attention import varlen
except ImportError:  # not in every build of torch; packed blocks are masked instead
    varlen = None  # type: ignore[assignment]

_VARLEN_TAKES_GROUPS = varlen is not None and "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
IGNORE = -100  # a position without a training target
# (hidden_NH, weight_VH, labels_N, **batch) → outputs with at least "loss"
HeadLoss = Callable[..., dict[str, Tensor]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GPTConfig:
    """Sizes of a student, named as in transformers' `Starcoder2Config`."""

    vocab_size: int = 49_152
    hidden_size: int = 768
    intermediate_size: int = 3712
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 4
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            require_range(getattr(self, field.name), f"GPTConfig.{field.name}", above=0)
        heads = self.num_attention_heads
        require(self.hidden_size % (2 * heads) == 0, "heads must have an even size", where="GPTConfig.hidden_size",
                expected=f"a multiple of 2 x num_attention_heads = {2 * heads}", got=self.hidden_size)  # fmt: skip
        require(heads % self.num_key_value_heads == 0, "query heads must share key/value heads evenly",
                where="GPTConfig.num_key_value_heads", expected=f"a divisor of num_attention_heads = {heads}",
                got=self.num_key_value_heads)  # fmt: skip

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` of the same model as a `Starcoder2ForCausalLM`.

        transformers 5 reads `rope_parameters`, earlier versions and other readers `rope_theta`.
        """
        return dataclasses.asdict(self) | {
            "architectures": ["Starcoder2ForCausalLM"],
            "model_type": "starcoder2",
            "hidden_act": "gelu_pytorch_tanh",
            "use_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "sliding_window": None,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
            "embedding_dropout": 0.0,
        }


PRESETS: dict[str, GPTConfig] = {
    # 125,159,424 parameters
    "gpt-125m": GPTConfig(),
    # 11 million parameters, of which 9.4 are the embedding: trains in minutes on a laptop's processor
    "tiny": GPTConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    ),
}


class Attention(nn.Module):
    """Causal grouped-query attention that never looks across a document's border."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BTH: Tensor, rotation: tuple[Tensor, Tensor], documents: "Documents") -> Tensor:
        """Return the attention output [B, T, H] for the normalised input [B, T, H]."""
        B, T, H = x_BTH.shape
        q_BATD, k_BGTD, v_BGTD = (
            projection(x_BTH).view(B, T, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BATD, k_BGTD = rotate(q_BATD, *rotation), rotate(k_BGTD, *rotation)
        y_BATD = documents.attend(q_BATD, k_BGTD, v_BGTD)
        return self.o_proj(y_BATD.transpose(1, 2).reshape(B, T, H))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers with a GELU (tanh form) between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Return the transformed input [B, T, H]."""
        return self.c_proj(F.gelu(self.c_fc(x_BTH), approximate="tanh"))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x_BTH: Tensor, rotation: tuple[Tensor, Tensor], documents: "Documents") -> Tensor:
        """Return the residual stream [B, T, H] after this layer."""
        x_BTH = x_BTH + self.self_attn(self.input_layernorm(x_BTH), rotation, documents)
        return x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))  # type: ignore[no-any-return]


class Backbone(nn.Module):
    """Everything below the output head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.sizes = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.recomputes = False

    def forward(self, input_ids_BT: Tensor, position_ids_BT: Tensor, bounds: Tensor | None = None) -> Tensor:
        """Return the final hidden states [B, T, H]; `bounds` as in `Documents`."""
        documents = Documents(position_ids_BT, bounds)
        rotation = rotary_angles(position_ids_BT, self.sizes)
        x_BTH = self.embed_tokens(input_ids_BT)
        for layer in self.layers:
            if self.recomputes and torch.is_grad_enabled():
                x_BTH = checkpoint(layer, x_BTH, rotation, documents, use_reentrant=False)
            else:
                x_BTH = layer(x_BTH, rotation, documents)
        return self.norm(x_BTH)  # type: ignore[no-any-return]


class GPT(nn.Module):
    """The student model.

    Args:
        config: its sizes.

    Attributes:
        head_loss: called with (hidden_NH, weight_VH, labels_N, **batch) when `forward` gets labels; plain cross-entropy
            unless stage 2 sets another. It runs inside `forward`, so DDP and FSDP see the head's matrix in use.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.sizes = config  # not `config`: HF Trainer writes into whatever has that name
        self.model = Backbone(config)
        self.head_loss: HeadLoss = cross_entropy
        self.apply(self._initialise)
        # Residual projections start smaller by the square root of their number (Radford et al. 2019, section 2.3).
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "c_proj.weight")):
                std = config.initializer_range / (2 * config.num_hidden_layers) ** 0.5
                nn.init.normal_(parameter, std=std)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.sizes.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """Keep the layers' inputs for the backward pass, which computes the rest again; HF `Trainer` calls it."""
        self.model.recomputes = True

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before transformers 5.2x

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        document_bounds: Tensor | None = None,
        **batch: Any,
    ) -> CausalLMOutput | dict[str, Tensor]:
        """Predict the next token at every position.

        Args:
            input_ids: token ids [B, T], int64.
            position_ids: positions [B, T], int64; every 0 opens a new document, and no position attends across one.
                Default: each row is one document.
            labels: the id that follows each position [B, T], `IGNORE` where there is no target. Not shifted again.
            document_bounds: where the documents of all rows begin, as `Documents` takes it; default: found on the
                device, which the host then waits for.
            batch: whatever else `head_loss` takes (soft labels, `num_items_in_batch`), [B, T, …].

        Returns:
            Without labels the logits [B, T, V]; with labels the dictionary that `head_loss` returns.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        hidden_BTH = self.model(input_ids, position_ids, document_bounds)
        weight_VH = self.model.embed_tokens.weight
        if labels is None:
            return CausalLMOutput(logits=F.linear(hidden_BTH, weight_VH))
        return self._loss(hidden_BTH.flatten(0, 1), weight_VH, labels.flatten(), **batch)  # type: ignore[no-any-return]

    @torch.compiler.disable  # what forms its gradients by itself gains nothing from a compiler, and takes it minutes
    def _loss(self, *args: Tensor, **batch: Any) -> dict[str, Tensor]:
        return self.head_loss(*args, **batch)


def cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    targets: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> dict[str, Tensor]:
    """Plain next-token cross-entropy: a sum over targets divided by their number, here or in the whole window.

    `targets`, int64, are the places that have a label; where they are given, no other place gets logits.
    """
    if targets is not None:
        hidden_NH, labels_N = hidden_NH[targets], labels_N[targets]
    logits_NV = F.linear(hidden_NH, weight_VH).float()
    total = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="sum")
    num_targets = (labels_N != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
    return {"loss": total / num_targets}


class Documents:
    """Where documents begin in a batch of packed rows, and attention that stays inside them.

    Which way is the fastest depends on the device: on a processor a loop over documents; on CUDA in half precision one
    kernel for sequences of any length; otherwise a mask over the block.

    Args:
        position_ids_BT: positions, int64; every 0 opens a document, and so does every row.
        bounds: places among the B·T positions where documents begin, and B·T, int32; see `document_bounds`.
    """

    def __init__(self, position_ids_BT: Tensor, bounds: Tensor | None = None) -> None:
        self.position_ids_BT = position_ids_BT
        self.bounds = document_bounds(position_ids_BT) if bounds is None else bounds
        self.one_per_row = len(self.bounds) == len(position_ids_BT) + 1

    def attend(self, q_BATD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        """Causal scaled dot-product attention within documents; returns [B, A, T, D]."""
        if runs_flash(v_BGTD):
            if self.one_per_row:
                return F.scaled_dot_product_attention(q_BATD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=True)
            if varlen is not None:
                return self.attend_varlen(q_BATD, k_BGTD, v_BGTD)
        groups = q_BATD.shape[1] // k_BGTD.shape[1]
        k_BATD, v_BATD = k_BGTD.repeat_interleave(groups, dim=1), v_BGTD.repeat_interleave(groups, dim=1)
        if q_BATD.device.type == "cpu":
            return self.attend_in_turn(q_BATD, k_BATD, v_BATD)  # type: ignore[no-any-return]
        if self.one_per_row:
            return F.scaled_dot_product_attention(q_BATD, k_BATD, v_BATD, is_causal=True)
        return self.attend_masked(q_BATD, k_BATD, v_BATD)

    @torch.compiler.disable  # kernels of the layers would depend on the batches compiled before
    def attend_in_turn(self, q_BATD: Tensor, k_BATD: Tensor, v_BATD: Tensor) -> Tensor:
        """Attend in one document after another; the result always lies in memory as [B, T, A, D]."""
        if self.one_per_row:
            return F.scaled_dot_product_attention(q_BATD, k_BATD, v_BATD, is_causal=True)
        B, A, T, D = q_BATD.shape
        lengths = self.bounds.diff().tolist()
        pieces = [
            tensor.transpose(0, 1).reshape(1, A, B * T, D).split(lengths, dim=2) for tensor in (q_BATD, k_BATD, v_BATD)
        ]
        attended = [F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in zip(*pieces, strict=True)]
        return torch.cat([y_1AnD.transpose(1, 2) for y_1AnD in attended], dim=1).view(B, T, A, D).transpose(1, 2)

    def attend_varlen(self, q_BATD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        """Attend with the kernel for sequences of any length; only bfloat16 or float16 on CUDA."""
        B, A, T, D = q_BATD.shape
        q_NAD, k_NGD, v_NGD = (x.transpose(1, 2).reshape(B * T, -1, D) for x in (q_BATD, k_BGTD, v_BGTD))
        options: dict[str, Any] = {"enable_gqa": True}
        if k_NGD.shape[1] == A or not _VARLEN_TAKES_GROUPS:
            k_NGD, v_NGD = (x.repeat_interleave(A // x.shape[1], dim=1) for x in (k_NGD, v_NGD))
            options = {}
        y_NAD = varlen.varlen_attn(q_NAD, k_NGD, v_NGD, self.bounds, self.bounds, T, T, window_size=(-1, 0), **options)
        assert isinstance(y_NAD, Tensor)  # a single tensor, unless more is asked for
        return y_NAD.view(B, T, A, D).transpose(1, 2)

    def attend_masked(self, q_BATD: Tensor, k_BATD: Tensor, v_BATD: Tensor) -> Tensor:
        """Attend everywhere, with what lies in other documents masked."""
        document_BT = (self.position_ids_BT == 0).cumsum(1)
        mask_B1TT = (document_BT[:, None, :, None] == document_BT[:, None, None, :]).tril()
        return F.scaled_dot_product_attention(q_BATD, k_BATD, v_BATD, attn_mask=mask_B1TT)


@torch.compiler.disable  # its shape depends on the data
def document_bounds(position_ids_BT: Tensor) -> Tensor:
    """Where documents begin among the B·T positions of a batch, and B·T at the end, int32 [documents + 1]."""
    starts_BT = position_ids_BT == 0
    starts_BT[:, 0] = True
    return F.pad(starts_BT.flatten().nonzero().flatten(), (0, 1), value=starts_BT.numel()).to(torch.int32)


def runs_flash(x_BATD: Tensor) -> bool:
    """Whether flash attention takes heads of this dtype and size, on this card: from compute capability 8.0 on."""
    half, size = x_BATD.dtype in (torch.float16, torch.bfloat16), x_BATD.shape[-1]
    return x_BATD.device.type == "cuda" and half and size % 8 == 0 and size <= 256 and _is_ampere()


@torch.compiler.assume_constant_result
def _is_ampere() -> bool:
    return torch.cuda.get_device_capability() >= (8, 0)


def rotary_angles(position_ids_BT: Tensor, config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, 1, T, D] of the rotary angles (Su et al. 2021, section 3.2.2), in float32."""
    exponents = torch.arange(0, config.head_dim, 2, device=position_ids_BT.device).float() / config.head_dim
    angles_BTd = position_ids_BT[..., None].float() * config.rope_theta**-exponents
    angles_B1TD = torch.cat((angles_BTd, angles_BTd), dim=-1)[:, None]
    return angles_B1TD.cos(), angles_B1TD.sin()


def rotate(x_BATD: Tensor, cos_B1TD: Tensor, sin_B1TD: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of a head by its position's angle; keeps the dtype."""
    first, second = x_BATD.chunk(2, dim=-1)
    turned = x_BATD * cos_B1TD + torch.cat((-second, first), dim=-1) * sin_B1TD
    return turned.to(x_BATD.dtype)
