"""How much device memory a training run takes, before anything is allocated."""

from dataclasses import dataclass

from shared.model.gpt import GPTConfig
from stage2_student.fused import CHUNK_ROWS


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes at the peak of a training step.

    Attributes:
        state_bytes: float32 weights, gradients and Adam's two moments.
        activation_bytes: what the layers keep for the backward pass of one micro-batch.
        head_bytes: the fused head's scratch memory and the gradient of its matrix.
    """

    state_bytes: int
    activation_bytes: int
    head_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.state_bytes + self.activation_bytes + self.head_bytes


def estimate_memory(sizes: GPTConfig, num_parameters: int, micro_batch_tokens: int, *, bf16: bool) -> MemoryEstimate:
    """Estimate the memory of training; attention matrices are not kept (flash or memory-efficient attention).

    Args:
        sizes: the student's.
        num_parameters: its parameters, tied tensors once.
        micro_batch_tokens: rows of one forward pass, padding included.
        bf16: mixed precision: matrix products keep bfloat16 inputs, norms and the residual stream float32.
    """
    H, F, V = sizes.hidden_size, sizes.intermediate_size, sizes.vocab_size
    kept = H + 2 * sizes.num_key_value_heads * sizes.head_dim  # q, k, v
    product_bytes = 2 if bf16 else 4
    # Per token and layer: two norms' inputs in float32; their outputs, q, k and v (also turned and repeated for the
    # query heads), attention's output, the MLP's hidden layer before and after its non-linearity as product inputs.
    per_token = 2 * 4 * H + product_bytes * (2 * H + 2 * kept + 3 * H + H + 2 * F)
    # Logits and the matrix's gradient; under mixed precision their bfloat16 twins and the matrix's bfloat16 copy too.
    head = CHUNK_ROWS * V * (4 + (2 if bf16 else 0)) + V * H * (4 + (4 if bf16 else 0))
    return MemoryEstimate(
        state_bytes=16 * num_parameters,
        activation_bytes=micro_batch_tokens
        * (sizes.num_hidden_layers * per_token + 4 * H),  # and the last norm's input
        head_bytes=head,
    )
