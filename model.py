"""mT5, written out: config and sizes, encoder-decoder, loss, generation, conversion.

What makes mT5 (the T5 1.1 architecture) not the Transformer of the textbook:
- no position embeddings: a learnt number per head and bucket of distances is added to the scores
  of self-attention; one table a stack, shared by its layers; none in cross-attention;
- scores are not divided by the square root of the width: the initialisation takes care of it;
- norms come before each block, scale only (no mean, no bias); no bias anywhere;
- feed-forward gated by a tanh-GELU; the output head is neither tied to the embedding nor scaled.

Shapes: B sentences, S source tokens, T target tokens, D width, H heads, K width of a head,
V vocabulary. A mask is True at real tokens.
"""

import math
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from data import EOS, IGNORE, PAD, Tokenizer, write_file

FORMAT = "xlrs-mt5 1"  # first entry of every checkpoint; the number grows when the layout changes


@dataclass
class MT5Config:
    """The sizes of one mT5, named as in its published config.json. The defaults are mT5-small's."""

    vocab_size: int = 250112
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 8
    num_decoder_layers: int = 8
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        for name, value in asdict(self).items():
            kind = float if name in ("dropout_rate", "layer_norm_epsilon") else int
            if type(value) not in (kind, int):
                raise ValueError(f"config: expected {kind.__name__} for {name}, found {value!r}")
            if value <= 0 and name != "dropout_rate":
                raise ValueError(f"config: expected a positive {name}, found {value!r}")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"config: expected dropout_rate in [0, 1), found {self.dropout_rate}")
        if self.relative_attention_num_buckets % 4:
            raise ValueError("config: expected relative_attention_num_buckets to be a multiple of 4"
                             f", found {self.relative_attention_num_buckets}")
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ValueError("config: expected relative_attention_max_distance above half the "
                             f"buckets, found {self.relative_attention_max_distance}")


def _size(d_model, d_ff, layers, heads):
    return MT5Config(d_model=d_model, d_ff=d_ff, num_layers=layers, num_decoder_layers=layers,
                     num_heads=heads)


SIZES = {
    "small": _size(512, 1024, 8, 6),  # 300 million parameters, 85 % of them embedding and head
    "base": _size(768, 2048, 12, 12),  # 582 million
    "large": _size(1024, 2816, 24, 16),  # 1.2 billion
    "xl": _size(2048, 5120, 24, 32),  # 3.7 billion
    "xxl": _size(4096, 10240, 24, 64),  # 12.9 billion
}


class MT5(nn.Module):
    """Encoder-decoder: source text to states, states and target so far to the next token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.initialise()

    def initialise(self):
        """Draw all weights from normal distributions of mesh-tensorflow's widths.

        Each keeps the variance of what passes through it at one; a query's also carries the
        factor K^-0.5 that mT5 leaves out of its scores.
        """
        width, inner = self.config.d_model, self.config.num_heads * self.config.d_kv
        std = {
            "embedding": 1.0,
            "q": (width * self.config.d_kv) ** -0.5,
            "k": width ** -0.5,
            "v": width ** -0.5,
            "o": inner ** -0.5,
            "gate": width ** -0.5,
            "up": width ** -0.5,
            "down": self.config.d_ff ** -0.5,
            "positions": width ** -0.5,  # as transformers has it
        }
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and module is not self.head:
                nn.init.normal_(module.weight, std=std[name.rpartition(".")[2]])
        # mesh-tensorflow draws the head afresh with this same width. Ours starts it as the scaled
        # embedding: tied at first, so that a small model learns to copy sooner; then they part.
        with torch.no_grad():
            self.head.weight.copy_(self.embedding.weight * width ** -0.5)

    def encode(self, input_ids, mask):
        """Return the final encoder states (B, S, D). input_ids (B, S) int64, mask (B, S) bool."""
        return self.encoder(self.embedding(input_ids), mask)

    def decode(self, states, mask, labels):
        """Return the final decoder states (B, T, D) that predict labels, given encoder states."""
        start = labels.new_full((len(labels), 1), PAD)
        previous = torch.cat([start, labels[:, :-1]], dim=1)
        previous = previous.masked_fill(previous == IGNORE, PAD)
        return self.decoder(self.embedding(previous), states, mask)

    def logits(self, input_ids, mask, labels):
        """Return the scores of each next token (B, T, V), the decoder being fed the true labels.

        input_ids (B, S) int64; mask (B, S) bool; labels (B, T) int64, IGNORE (-100) at padding.
        """
        return self.head(self.decode(self.encode(input_ids, mask), mask, labels))

    def forward(self, input_ids, mask, labels):
        """Return the mean cross-entropy of the real labels, a float32 scalar in nats a token."""
        return self.loss(self.encode(input_ids, mask), mask, labels)

    def loss(self, states, mask, labels):
        """Return the same from encoder states (B, S, D) that are already at hand."""
        real = labels != IGNORE
        hidden = self.decode(states, mask, labels)[real]  # (real labels, D): no scores for padding
        return F.cross_entropy(self.head(hidden).float(), labels[real])

    @torch.no_grad()
    def generate(self, input_ids, mask, max_new_tokens, num_beams=1):
        """Return the generated ids (B, at most max_new_tokens) int64, PAD after the end `</s>`.

        num_beams 1 takes the best token at each step; more search with that many beams.
        """
        assert not self.training, "generate() would drop out: call model.eval() first"
        states = self.encode(input_ids, mask)
        return greedy(self, states, mask, max_new_tokens)


class Encoder(nn.Module):
    """Layers of self-attention and feed-forward over the source."""

    def __init__(self, config):
        super().__init__()
        self.positions = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.norm = Norm(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.max_distance = config.relative_attention_max_distance

    def forward(self, x, mask):
        """Return final states (B, S, D) of embeddings x (B, S, D); mask (B, S) True at real tokens.

        Scores towards padding get the lowest finite number, not -inf: a sentence without any real
        token then has meaningless states, but no NaN.
        """
        bias = position_bias(self.positions, x.shape[1], self.max_distance, bidirectional=True)
        bias = hide(bias, mask[:, None, None, :])  # (B, H, S, S)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, bias)
        return self.dropout(self.norm(x))


class Decoder(nn.Module):
    """Layers of causal self-attention, attention to the encoder's states, and feed-forward."""

    def __init__(self, config):
        super().__init__()
        self.positions = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_decoder_layers))
        self.norm = Norm(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.max_distance = config.relative_attention_max_distance

    def causal_bias(self, length):
        """Return what is added to the scores of self-attention, (1, H, T, T)."""
        bias = position_bias(self.positions, length, self.max_distance, bidirectional=False)
        seen = torch.ones(length, length, dtype=torch.bool, device=bias.device).tril()
        return hide(bias, seen)

    def forward(self, x, states, mask):
        """Return final states (B, T, D) of target embeddings x (B, T, D), all positions at once.

        states (B, S, D) from the encoder; mask (B, S) True at real source tokens.
        """
        bias = self.causal_bias(x.shape[1])
        source_bias = hide(x.new_zeros(()), mask[:, None, None, :])  # (B, 1, 1, S)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, bias, layer.cross.keys_values(states), source_bias)
        return self.dropout(self.norm(x))

    def step(self, x, bias, self_cache, cross_cache, source_bias, t):
        """Return final states (N, 1, D) of the embeddings x (N, 1, D) at position t."""
        for layer, own, cross in zip(self.layers, self_cache, cross_cache):
            x = layer(x, bias, cross, source_bias, own, t)
        return self.norm(x)


class EncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = Norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = Norm(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x, bias):
        x = x + self.dropout(self.attention(self.attention_norm(x), bias))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = CausalSelfAttention(config)
        self.attention_norm = Norm(config)
        self.cross = CrossAttention(config)
        self.cross_norm = Norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = Norm(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x, bias, source, source_bias, cache=None, t=None):
        x = x + self.dropout(self.attention(self.attention_norm(x), bias, cache, t))
        x = x + self.dropout(self.cross(self.cross_norm(x), source, source_bias))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class SelfAttention(nn.Module):
    """Every source token looks at every other."""

    def __init__(self, config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads, self.dropout_rate = config.num_heads, config.dropout_rate
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)

    def forward(self, x, bias):
        """Return (B, S, D) from x (B, S, D) and bias (B, H, S, S)."""
        q, k, v = (split(project(x), self.heads) for project in (self.q, self.k, self.v))
        return self.o(attend(q, k, v, bias, self.dropout_rate if self.training else 0.0))


class CausalSelfAttention(nn.Module):
    """Every target token looks at itself and those before it, in generation through a cache."""

    def __init__(self, config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads, self.dropout_rate = config.num_heads, config.dropout_rate
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)

    def forward(self, x, bias, cache=None, t=None):
        """Return (B, T, D) from x (B, T, D) and bias (1, H, T, T).

        With cache (2, B, H, longest T, K), x (B, 1, D) is the token at position t and
        bias (1, H, 1, t + 1): its key and value join the cache, and it sees all up to itself.
        """
        q, k, v = (split(project(x), self.heads) for project in (self.q, self.k, self.v))
        if cache is not None:
            cache[0, :, :, t], cache[1, :, :, t] = k[:, :, 0], v[:, :, 0]
            k, v = cache[:, :, :, :t + 1]
        return self.o(attend(q, k, v, bias, self.dropout_rate if self.training else 0.0))


class CrossAttention(nn.Module):
    """Every target token looks at the encoder's states of the source."""

    def __init__(self, config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads, self.dropout_rate = config.num_heads, config.dropout_rate
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)

    def keys_values(self, states):
        """Return the keys and values of the source, each (B, H, S, K), from states (B, S, D)."""
        return split(self.k(states), self.heads), split(self.v(states), self.heads)

    def forward(self, x, source, bias):
        """Return (B, T, D) from x (B, T, D), source = keys_values(states), bias (B, 1, 1, S)."""
        q = split(self.q(x), self.heads)
        return self.o(attend(q, *source, bias, self.dropout_rate if self.training else 0.0))


def split(x, heads):
    """Return x (B, T, H * K) as (B, H, T, K)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q, k, v, bias, dropout):
    """Return softmax(q kᵀ + bias) v, heads joined, (B, T, H * K). Not divided by √K: this is T5.

    q (B, H, T, K); k, v (B, H, S, K); bias broadcasts to (B, H, T, S).
    """
    bias = bias.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=1.0)
    return out.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """down(dropout(gelu(gate(x)) * up(x))): published as wi_0 (gate), wi_1 (up) and wo (down)."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x):
        return self.down(self.dropout(F.gelu(self.gate(x), approximate="tanh") * self.up(x)))


class Norm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, computed in float32 whatever the precision of x."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def position_bias(table, length, max_distance, bidirectional):
    """Return the score added for each pair of positions, (1, H, length, length)."""
    positions = torch.arange(length, device=table.weight.device)
    distance = positions[None, :] - positions[:, None]  # (query, key): positive looks ahead
    buckets = bucket(distance, bidirectional, table.num_embeddings, max_distance)
    return table(buckets).permute(2, 0, 1)[None]


def bucket(distance, bidirectional, num_buckets=32, max_distance=128):
    """Return the bucket, in [0, num_buckets), of each signed distance from query to key.

    Looking both ways, half of the buckets are for keys behind and half for keys ahead; looking
    back only, all are for keys behind and every key ahead falls to bucket 0. Of a direction's
    buckets half hold one distance each (0, 1, 2, …); the other half share the distances up to
    max_distance on a logarithmic scale, and the last takes all beyond.
    """
    offset = 0
    if bidirectional:
        num_buckets //= 2
        offset = (distance > 0) * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    # The order of these float32 operations is mesh-tensorflow's: another one would round the
    # distances on a boundary to the other side.
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (far * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


def hide(bias, visible):
    """Return bias with the lowest finite number wherever visible is False."""
    return torch.where(visible, bias, torch.finfo(bias.dtype).min)


def greedy(model, states, mask, max_new_tokens):
    """Return the ids (B, T) of the best token at each step; sentences leave once they end."""
    decoder, config = model.decoder, model.config
    rows = torch.arange(len(states), device=states.device)  # the sentences still unfinished
    ids = torch.full((len(rows), max_new_tokens), PAD, device=states.device)
    source = [layer.cross.keys_values(states) for layer in decoder.layers]
    source_bias = hide(states.new_zeros(()), mask[:, None, None, :])
    bias = decoder.causal_bias(max_new_tokens)
    cache = source[0][0].new_empty(len(decoder.layers), 2, len(rows), config.num_heads,
                                   max_new_tokens, config.d_kv)
    token = torch.full((len(rows),), PAD, device=states.device)
    for t in range(max_new_tokens):
        x = decoder.step(model.embedding(token)[:, None], bias[:, :, t:t + 1, :t + 1], cache,
                         source, source_bias, t)
        token = model.head(x[:, 0]).argmax(dim=-1)
        ids[rows, t] = token
        going = token != EOS
        if not going.all():
            if not going.any():
                return ids[:, :t + 1]
            rows, token, cache = rows[going], token[going], cache[:, :, going]
            source = [(k[going], v[going]) for k, v in source]
            source_bias = source_bias[going]
    return ids


def save(path, model, tokenizer, **state):
    """Write model, tokenizer and whatever else state names (a training run's) to one file.

    The file is what torch.save makes of a dict of plain types and tensors. Raises OSError.
    """
    content = {"format": FORMAT, "config": asdict(model.config), "model": model.state_dict(),
               "tokenizer": {"model": torch.frombuffer(bytearray(tokenizer.model), dtype=torch.uint8)},
               **state}
    write_file(path, lambda file: torch.save(content, file))


def read_checkpoint(path):
    """Return the dict that save() wrote. Raises FileNotFoundError, ValueError. Runs no code."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint file, found none")
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content


def load(path):
    """Return (model in eval mode, tokenizer) of the checkpoint at path."""
    content = read_checkpoint(path)
    model = MT5(MT5Config(**content["config"]))
    model.load_state_dict(content["model"])
    return model.eval(), Tokenizer(content["tokenizer"]["model"].numpy().tobytes())
