"""BERT encoder of plain modules with mean pooling and L2 norm (Devlin et al., BERT, NAACL 2019).

Attribute names repeat those of the published weights, so `load_state_dict` is the whole loader.
"""

# torch is an optional extra:
# pyright: reportUntypedBaseClass=false

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.zoo.networks.export import export_traced


class Embeddings(nn.Module):
    """Word, position and (constant) type embeddings, summed and normalized."""

    def __init__(self, width: int, vocabulary: int, positions: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, sequence) -> (batch, sequence, width)."""
        positions = self.position_embeddings.weight[: ids.shape[1]]
        x: Tensor = self.LayerNorm(self.word_embeddings(ids) + self.token_type_embeddings.weight[0] + positions)
        return x


class SelfAttention(nn.Module):
    """Scaled dot-product attention, written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """`bias` (batch, 1, 1, sequence) is added to the scores."""
        q, k, v = (
            layer(x).reshape(*x.shape[:2], self.heads, self.head_width).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / self.head_width**0.5 + bias
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Residual(nn.Module):
    """Linear, add, normalize."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(batch, sequence, inner) -> (batch, sequence, width)."""
        y: Tensor = self.LayerNorm(self.dense(x) + residual)
        return y


class Layer(nn.Module):
    """Attention and feed-forward network."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(width, heads), "output": Residual(width, width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = Residual(inner, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(batch, sequence, width) -> the same."""
        x = self.attention["output"](self.attention["self"](x, bias), x)
        y: Tensor = self.output(nn.functional.gelu(self.intermediate["dense"](x)), x)
        return y


class Encoder(nn.Module):
    """Sentence embedding of length one."""

    def __init__(
        self,
        width: int = 384,
        heads: int = 12,
        inner: int = 1536,
        layers: int = 6,
        vocabulary: int = 30522,
        positions: int = 512,
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(width, vocabulary, positions)
        stack = nn.ModuleList(Layer(width, heads, inner) for _ in range(layers))
        self.encoder = nn.ModuleDict({"layer": stack})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, sequence) token ids and 0/1 mask -> (batch, width)."""
        mask = attention_mask.to(torch.float32)
        bias = (1 - mask[:, None, None]) * torch.finfo(torch.float32).min
        x = self.embeddings(input_ids)
        for layer in self.encoder["layer"]:  # type: ignore[union-attr]  # a ModuleList
            x = layer(x, bias)
        pooled = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(pooled)


def export(weights: Path, target: Path) -> None:
    """Write the encoder as ONNX with the weights of a safetensors file; the pooler, unused here, is left out."""
    encoder = Encoder()
    state = {k: v for k, v in load_file(weights).items() if not k.startswith("pooler.") and "position_ids" not in k}
    encoder.load_state_dict(state)
    example = torch.ones(2, 16, dtype=torch.int64)
    free = {0: "batch", 1: "sequence"}
    export_traced(
        encoder,
        (example, example.clone()),
        target,
        inputs=("input_ids", "attention_mask"),
        outputs=("embedding",),
        dynamic={"input_ids": free, "attention_mask": free, "embedding": {0: "batch"}},
    )
