"""mT5, written out: config and sizes, encoder-decoder, loss, generation, conversion.

What makes mT5 (the T5 1.1 architecture) not the Transformer of the textbook:
- no position embeddings: a learnt number per head and bucket of distances is added to the scores
  of self-attention; one table a stack, shared by its layers; none in cross-attention;
- scores are not divided by √K, the root of a head's width: the initialisation takes care of it;
- norms come before each block, scale only (no mean, no bias); no bias anywhere;
- feed-forward gated by a tanh-GELU; the output head is neither tied to the embedding nor scaled.

Shapes: B sentences, S source tokens, T target tokens, D width, H heads, K width of a head,
V vocabulary; N the real tokens of a batch; W beams of a sentence, one in greedy generation. A mask
is True at real tokens.
"""

import argparse
import json
import math
import mmap
import re
import sys
import warnings
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from data import (EOS, IGNORE, PAD, Tokenizer, brief, check, check_text, each_line, naming,
                  parse, write_file)

FORMAT = "xlrs-mt5 1"  # first entry of every checkpoint; the number grows when the layout changes
# Of weights, under their names in safetensors files.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
        for name, value in vars(self).items():  # below 10^6, no size of a matrix overflows
            kind = float if name in ("dropout_rate", "layer_norm_epsilon") else int
            least = 0 if name == "dropout_rate" else 1e-30
            if type(value) not in (kind, int) or not least <= value < 1e6:
                raise ValueError(f"config: expected a positive {kind.__name__} below 1,000,000 as "
                                 f"{name}, found {brief(value)}")
        if self.dropout_rate >= 1:
            raise ValueError(f"config: expected dropout_rate below 1, found {self.dropout_rate}")
        buckets, distance = (self.relative_attention_num_buckets,
                             self.relative_attention_max_distance)
        if buckets % 4 or distance <= buckets // 2:
            raise ValueError("config: expected relative_attention_num_buckets to be a multiple of "
                             "4 and relative_attention_max_distance above half of it, found "
                             f"{buckets} and {distance}")


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
        # mesh-tensorflow draws the head afresh, with this same width. Ours starts it as the scaled
        # embedding, as if the two were tied, and lets them part.
        with torch.no_grad():
            self.head.weight.copy_(self.embedding.weight * width ** -0.5)

    def encode(self, input_ids, mask):
        """Return the final encoder states (B, S, D). input_ids (B, S) int64, mask (B, S) bool."""
        return self.encoder(self.embedding(input_ids), mask)

    def logits(self, input_ids, mask, labels):
        """Return the scores of each next token (B, T, V), the decoder being fed the true labels.

        input_ids (B, S) int64; mask (B, S) bool; labels (B, T) int64, IGNORE (-100) at padding.
        """
        states = self.encode(input_ids, mask)
        everywhere = torch.ones_like(labels, dtype=torch.bool)
        return self.head(self.decoder(self.embedding(shift(labels)), states, mask, everywhere))

    def forward(self, input_ids, mask, labels):
        """Return the mean cross-entropy of the real labels, a float32 scalar in nats a token.

        The same as from logits(), but the padding has no scores, and source and target share one
        lookup, since the gradient of every lookup is a tensor as large as the embedding.
        """
        previous, real = shift(labels), labels != IGNORE
        fed = real.flip(1).cumsum(1).flip(1) > 0  # up to the last real label
        ids = torch.cat([input_ids.flatten(), previous.flatten()])
        source, target = self.embedding(ids).split([input_ids.numel(), previous.numel()])
        states = self.encoder(source.view(*input_ids.shape, -1), mask)
        hidden = self.decoder(target.view(*labels.shape, -1), states, mask, fed)
        return HeadLoss.apply(hidden[real], self.head.weight, labels[real])

    @torch.no_grad()
    def generate(self, input_ids, mask, max_new_tokens, num_beams=1):
        """Return the generated ids (B, at most max_new_tokens) int64, PAD after the end `</s>`.

        num_beams 1 takes the best token at each step; more search with that many beams.
        """
        assert not self.training, "generate() would drop out: call model.eval() first"
        states = self.encode(input_ids, mask)
        if num_beams == 1:
            return greedy(self, states, mask, max_new_tokens)
        return beam_search(self, states, mask, max_new_tokens, num_beams)


def shift(labels):
    """Return what the decoder is fed, (B, T): PAD, then all labels but the last."""
    previous = F.pad(labels, (1, -1), value=PAD)
    return previous.masked_fill(previous == IGNORE, PAD)


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
        token then has no NaN. States at padding are zero, except in compiled code.
        """
        bias = position_bias(self.positions, x.shape[1], self.max_distance, bidirectional=True)
        bias = hide(bias, mask[:, None, None, :])  # (B, H, S, S)
        tokens = Tokens(mask)
        x = self.dropout(tokens.pack(x))
        for layer in self.layers:
            x = layer(x, tokens, bias)
        return tokens.pad(self.dropout(self.norm(x)))


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

    def forward(self, x, states, mask, fed):
        """Return final states (B, T, D) of target embeddings x (B, T, D), all positions at once.

        states (B, S, D) from the encoder; mask (B, S) True at real source tokens; fed (B, T) True
        up to the last target token that counts: the states beyond are zero.
        """
        bias = self.causal_bias(x.shape[1])
        source_bias = hide(x.new_zeros(()), mask[:, None, None, :])  # (B, 1, 1, S)
        source, target = Tokens(mask), Tokens(fed)
        states, x = source.pack(states), self.dropout(target.pack(x))
        for layer in self.layers:
            x = layer(x, target, bias, layer.cross.keys_values(states, source), source_bias)
        return target.pad(self.dropout(self.norm(x)))


class Tokens:
    """Where the N real tokens of a padded batch stand.

    Layers work on those alone, (N, D); only attention itself needs them padded. That saves the
    share of padding, a third of a ragged batch.
    """

    def __init__(self, mask):
        self.shape = mask.shape  # (B, S)
        full = torch.compiler.is_compiling() or mask.all()  # compiled code likes constant shapes
        self.places = None if full else mask.flatten().nonzero()[:, 0]

    def pack(self, x):
        """Return (N, D) from x (B, S, D)."""
        x = x.flatten(0, 1)
        return x if self.places is None else x.index_select(0, self.places)

    def pad(self, x):
        """Return (B, S, D), zero at padding, from x (N, D)."""
        if self.places is not None:
            x = x.new_zeros(self.shape.numel(), x.shape[1]).index_copy(0, self.places, x)
        return x.unflatten(0, self.shape)


class EncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = Norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = Norm(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x, tokens, bias):
        """Return (N, D) from x (N, D), the source's real tokens."""
        x = x + self.dropout(self.attention(self.attention_norm(x), tokens, bias))
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

    def forward(self, x, target, bias, source_kv, source_bias, cache=None, t=None):
        """Return (N, D) from x (N, D), the target's real tokens, or, with a cache, those at t.

        target: their places; source_kv: the source's keys and values, of this layer's cross.
        """
        own = self.attention_norm(x)
        if cache is None:
            own = self.attention(own, target, bias)
        else:
            own = self.attention.step(own, bias, cache, t)
        x = x + self.dropout(own)
        x = x + self.dropout(self.cross(self.cross_norm(x), target, source_kv, source_bias))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Attention(nn.Module):
    """The four matrices of every kind of attention: queries, keys, values and output."""

    def __init__(self, config):
        super().__init__()
        inner = config.num_heads * config.d_kv  # mT5-small's is not d_model
        self.heads, self.dropout = config.num_heads, nn.Dropout(config.dropout_rate)
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)


class SelfAttention(Attention):
    """Every token looks at every other, as far as the bias lets it."""

    def forward(self, x, tokens, bias):
        """Return (N, D) from x (N, D), the tokens' places, and bias (B or 1, H, T, T)."""
        q, k, v = (split(tokens.pad(part(x)), self.heads) for part in (self.q, self.k, self.v))
        return self.o(tokens.pack(attend(q, k, v, bias, self.dropout)))


class CausalSelfAttention(SelfAttention):
    """A target token looks at itself and those before it; the bias hides what comes after."""

    def step(self, x, bias, cache, t):
        """Return (N, D) from x (N, D), one token at position t of each of N sequences.

        Its key and value join cache (2, N, H, longest T, K), through which it sees all that came
        before; bias (1, H, 1, t + 1).
        """
        q, k, v = (split(part(x)[:, None], self.heads) for part in (self.q, self.k, self.v))
        cache[0, :, :, t], cache[1, :, :, t] = k[:, :, 0], v[:, :, 0]
        keys, values = cache[:, :, :, :t + 1]
        return self.o(attend(q, keys, values, bias, self.dropout)[:, 0])


class CrossAttention(Attention):
    """A target token looks at the source."""

    def keys_values(self, states, source):
        """Return keys and values of the source, each (B, H, S, K), from its packed states."""
        return [split(source.pad(part(states)), self.heads) for part in (self.k, self.v)]

    def forward(self, x, target, source_kv, bias):
        """Return (N, D) from x (N, D), the target's places, keys_values(), bias (B, 1, 1, S)."""
        q = split(target.pad(self.q(x)), self.heads)
        return self.o(target.pack(attend(q, *source_kv, bias, self.dropout)))


def split(x, heads):
    """Return x (B, T, H * K) as (B, H, T, K)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q, k, v, bias, dropout):
    """Return softmax(q kᵀ + bias) v, heads joined, (B, T, H * K). Not divided by √K: this is T5.

    q (B, H, T, K); k, v (B, H, S, K); bias broadcasts to (B, H, T, S). torch's fused function is
    the faster one on a GPU, and on a CPU where the bias needs no gradient.
    """
    if q.is_cuda or not torch.is_grad_enabled():
        rate = dropout.p if dropout.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout_p=rate, scale=1.0)
    else:
        out = dropout((q @ k.mT + bias).softmax(dim=-1)).to(v.dtype) @ v
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

    Looking both ways, the first half of the buckets is for distance 0 and keys behind, the second
    half, numbered alike, for keys ahead (its first stays unused); looking back only, all are for
    keys behind and every key ahead falls to bucket 0. Of a direction's
    buckets half hold one distance each (0, 1, 2, …); the other half share the distances up to
    max_distance on a logarithmic scale, rounded down, and the last takes all beyond.
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
    """Return bias with the lowest number that is finite in bf16 too wherever visible is False."""
    return torch.where(visible, bias, torch.finfo(torch.bfloat16).min)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the scores hidden @ weightᵀ, without ever holding all of them.

    The scores of 1,024 tokens over 250,112 pieces take 1 GB, and autograd keeps three such
    tensors. Here a few rows at a time become scores, loss and, in place, their gradient
    softmax(scores) - onehot(target), and are gone: on a CPU twice as fast as well.
    (torch.nn.functional.linear_cross_entropy has the same aim; on a CPU it was slower than both.)
    """

    SCORES = 2**26  # held at a time, a quarter of a gigabyte

    @staticmethod
    def forward(ctx, hidden, weight, target):
        """Return the loss in nats a token; hidden (N, D), weight (V, D), target (N,) int64."""
        parts = len(hidden) * len(weight) // HeadLoss.SCORES + 1
        loss = torch.zeros((), device=hidden.device)
        hidden_grad, weight_grad = torch.empty_like(hidden), None
        for part, part_grad, label in zip(*(x.tensor_split(parts) for x in (
                hidden, hidden_grad, target[:, None]))):
            scores = F.linear(part, weight)  # (part of N, V), in autocast's precision
            low = scores.dtype
            scores = scores.float()
            top = scores.amax(dim=1, keepdim=True)
            loss += (top - scores.gather(1, label)).sum()
            scores = scores.sub_(top).exp_()
            total = scores.sum(dim=1, keepdim=True)
            loss += total.log().sum()
            if not any(ctx.needs_input_grad):
                continue
            scores.div_(total).scatter_add_(1, label, -torch.ones_like(total))
            slope = scores.div_(len(hidden)).to(low)
            part_grad.copy_(slope @ weight)
            if weight_grad is None:
                weight_grad = (slope.mT @ part).to(weight.dtype)
            else:
                weight_grad += slope.mT @ part
        ctx.grads = hidden_grad, weight_grad
        return loss / len(hidden)

    @staticmethod
    def backward(ctx, grad):
        (hidden_grad, weight_grad), ctx.grads = ctx.grads, None  # autograd may keep, not copy them
        return hidden_grad.mul_(grad), weight_grad.mul_(grad), None  # in place: once is enough


class Memory:
    """The key-value cache of generation, token by token, for W beams of each of B sentences.

    Keys and values of the source are computed once and shared by a sentence's beams; those of the
    target stand in caches that have their full length from the start.
    """

    def __init__(self, model, states, mask, num_beams, length):
        self.model, self.t = model, 0
        self.bias = model.decoder.causal_bias(length)
        self.source_bias = hide(states.new_zeros(()), mask[:, None, None, :])  # (B, 1, 1, S)
        source = Tokens(mask)
        states = source.pack(states)
        self.source_kv = torch.stack([
            torch.stack(layer.cross.keys_values(states, source))
            for layer in model.decoder.layers])  # (layers, 2, B, H, S, K)
        layers, _, sentences, heads, _, width = self.source_kv.shape
        self.cache = self.source_kv.new_empty(
            layers, 2, sentences * num_beams, heads, length, width)

    def step(self, tokens):
        """Return the scores of what follows tokens, (B, W, V) from (B, W): one step on."""
        target = Tokens(torch.ones_like(tokens, dtype=torch.bool))
        x = target.pack(self.model.embedding(tokens))
        bias = self.bias[:, :, self.t:self.t + 1, :self.t + 1]
        for layer, source_kv, cache in zip(self.model.decoder.layers, self.source_kv, self.cache):
            x = layer(x, target, bias, source_kv, self.source_bias, cache, self.t)
        self.t += 1
        return target.pad(self.model.head(self.model.decoder.norm(x)))

    def follow(self, parents, going):
        """Let row r of the caches go on from row parents[r]; sentences leave where going is False.

        Only rows that move are copied, and only as far as they are filled.
        """
        if not going.all():
            self.source_kv = self.source_kv[:, :, going]
            self.source_bias = self.source_bias[going]
        moved = (parents != torch.arange(len(parents), device=parents.device)).nonzero()[:, 0]
        self.cache[:, :, moved, :, :self.t] = self.cache[:, :, parents[moved], :, :self.t]
        self.cache = self.cache[:, :, :len(parents)]


def greedy(model, states, mask, max_new_tokens):
    """Return the ids (B, T) of the best token at each step. A sentence that has ended leaves."""
    memory = Memory(model, states, mask, 1, max_new_tokens)
    rows = torch.arange(len(states), device=states.device)  # the sentences still going
    ids = torch.full((len(rows), max_new_tokens), PAD, device=states.device)
    token = ids.new_full((len(rows), 1), PAD)
    for t in range(max_new_tokens):
        token = memory.step(token).argmax(dim=-1)
        ids[rows, t] = token[:, 0]
        going = token[:, 0] != EOS
        if not going.any():
            return ids[:, :t + 1]
        if not going.all():
            rows, token = rows[going], token[going]
            memory.follow(going.nonzero()[:, 0], going)
    return ids


def beam_search(model, states, mask, max_new_tokens, num_beams):
    """Return the ids (B, T) of the best ended beam by its mean log-probability per token.

    The rules are those of transformers' default (length_penalty 1, early_stopping False): of the
    2W best continuations those among the first W that end are kept as results, the W best others
    go on; a sentence is done when it has W results and its best beam's mean so far is no better
    than the worst of them. What is cut off at max_new_tokens counts as ended.
    """
    memory = Memory(model, states, mask, num_beams, max_new_tokens)
    rows = torch.arange(len(states), device=states.device)  # the sentences still going
    result = torch.full((len(rows), max_new_tokens), PAD, device=states.device)
    ids = result[:, None].repeat(1, num_beams, 1)  # (B, W, longest T)
    ended, ended_scores = ids.clone(), torch.full(ids.shape[:2], -math.inf, device=ids.device)
    scores = ended_scores.clone()
    scores[:, 0] = 0  # all beams start alike: the first step goes on from one of them
    token = ids[:, :, 0]

    for t in range(max_new_tokens):
        logits = memory.step(token).float()
        best, token = logits.topk(2 * num_beams)  # (B, W, 2W): no other can be among the 2W best
        best = best - logits.logsumexp(dim=-1, keepdim=True) + scores[:, :, None]
        best, order = best.flatten(1).topk(2 * num_beams)  # (B, 2W)
        token, parent = token.flatten(1).gather(1, order), order // (2 * num_beams)
        candidates = pick(ids, parent)
        candidates[:, :, t] = token
        ends = (token == EOS) | (t + 1 == max_new_tokens)

        results = best.masked_fill(~ends, -math.inf)[:, :num_beams] / (t + 1)
        ended_scores, order = torch.cat([ended_scores, results], dim=1).topk(num_beams)
        ended = pick(torch.cat([ended, candidates[:, :num_beams]], dim=1), order)
        scores, order = best.masked_fill(ends, -math.inf).topk(num_beams)
        ids = pick(candidates, order)
        token, parent = token.gather(1, order), parent.gather(1, order)

        going = scores[:, 0] / (t + 1) > ended_scores[:, -1]
        result[rows[~going]] = ended[~going, 0]
        if not going.any():
            break
        parent = parent + num_beams * torch.arange(len(parent), device=parent.device)[:, None]
        memory.follow(parent[going].flatten(), going)
        rows, ids, token, scores = rows[going], ids[going], token[going], scores[going]
        ended, ended_scores = ended[going], ended_scores[going]
    return result[:, :t + 1]


def pick(sequences, order):
    """Return sequences (B, W, T) in the order (B, M) given for each sentence, (B, M, T)."""
    return sequences.gather(1, order[:, :, None].expand(-1, -1, sequences.shape[-1]))


# Checkpoints: one file with everything that a model needs.

def save(path, model, tokenizer, **state):
    """Write model, tokenizer and whatever else state names (a training run's) to one file.

    The file is what torch.save makes of a dict of plain types and tensors. Raises OSError.
    """
    pieces = torch.frombuffer(bytearray(tokenizer.model), dtype=torch.uint8)
    content = {"format": FORMAT, "config": asdict(model.config), "model": dict(model.state_dict()),
               "tokenizer": {"model": pieces}, **state}
    write_file(path, lambda file: torch.save(content, file))


def load(path):
    """Return (model in eval mode, tokenizer) of the checkpoint at path.

    Weights are read from disk when they are first used. Raises what read_checkpoint() raises.
    """
    content = read_checkpoint(path)
    model = build(MT5Config(**content["config"]), content["model"])
    return model, tokenizer_of(content)


def build(config, weights):
    """Return the model of config in eval mode, its weights {name: tensor} taken as they are."""
    with torch.device("meta"):  # sizes only: no memory, no random numbers
        model = MT5(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def read_checkpoint(path):
    """Return the dict that save() wrote, tensors on the CPU; no code in the file can run.

    Raises FileNotFoundError, and ValueError for anything but a whole checkpoint of this format.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: expected a checkpoint file, found a folder; a hub folder "
                         f"becomes one by: python model.py convert {path} FILE")
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a checkpoint file, found none")
    content = read_pickle(path)
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(found, str) or not found.startswith("xlrs-mt5 "):
        raise ValueError(f"{path}: expected a checkpoint of this project, found another kind of "
                         "file; a hub folder becomes one by: python model.py convert FOLDER FILE")
    if found != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT!r}, found {brief(found)}; use the "
                         "version of this project that wrote it")
    where = f"{path}: damaged checkpoint"
    check(content, where, {"config": {str: float}, "model": dict, "tokenizer": dict})
    for part in ("tokenizer", "model"):
        check_tensors(content[part], where)
    try:
        config = MT5Config(**content["config"])
        check_tokenizer(tokenizer_of(content), config)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{where}: {str(error)[:200]}") from None
    if faults := find_faults(content["model"], config):
        raise ValueError(f"{path}: {faults}")
    if len(found := {tensor.dtype for tensor in content["model"].values()}) > 1:
        raise ValueError(f"{path}: expected weights of one precision, found {brief(found)}")
    return content


def tokenizer_of(content):
    """Return the Tokenizer in a checkpoint's content."""
    model = content["tokenizer"]["model"]
    if model.dtype != torch.uint8:
        raise ValueError(f"expected the bytes of a SentencePiece model, found {model.dtype}")
    return Tokenizer(model.detach().numpy().tobytes())


def check_tensors(tensors, where):
    """Return tensors {name: tensor}; raises ValueError if one is no ordinary tensor on the CPU.

    Nor may it have fewer numbers in memory than in its shape: a small file can make one number look
    like a billion of them, which the first copy would then hold.
    """
    for name, tensor in check(tensors, where, {str: torch.Tensor}).items():
        if (tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided
                or tensor.device.type != "cpu"
                or tensor.nbytes > tensor.untyped_storage().nbytes()):
            raise ValueError(f"{where}: expected a tensor with all its numbers, found another "
                             f"kind as {brief(name)}")
    return tensors


def find_faults(weights, config, names=None):
    """Return what is wrong with weights {name: tensor} for config, one line, '' if nothing is.

    names {our name: name in weights}, where they differ.
    """
    if config.num_layers + config.num_decoder_layers > len(weights):  # before building so many
        return f"expected {config.num_layers} + {config.num_decoder_layers} layers, found fewer"
    with torch.device("meta"):  # sizes without memory
        wanted = {names[name] if names else name: tuple(tensor.shape)
                  for name, tensor in MT5(config).state_dict().items()}
    faults = [f"missing {name}" for name in wanted if name not in weights]
    faults += [f"unknown {brief(name)}" for name in weights if name not in wanted]
    for name, tensor in weights.items():
        if name in wanted and (tensor.shape != wanted[name]
                               or tensor.dtype not in DTYPES.values()):
            faults.append(f"{name} is {brief(tuple(tensor.shape))} {tensor.dtype}, not "
                          f"{wanted[name]}")
    more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
    return f"weights do not fit: {'; '.join(faults[:20])}{more}" if faults else ""


def read_pickle(path):
    """Return what torch.load makes of the file at path, mapped rather than read where it can be.

    weights_only=True: tensors and plain types; whatever asks for code raises ValueError.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        with open(path, "rb") as file:
            if swells(file, zipped):
                raise ValueError("takes more memory than the file")
        with warnings.catch_warnings(action="ignore"):  # of the pickle's age
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a broken file can fail in any way, and each is the file's fault
        code = re.search(r"GLOBAL (\S+)", str(error))
        found = f"one that asks for {code[1][:80]}, which was not run" if code else "a broken one"
        raise ValueError(f"{path}: expected a whole file of tensors written by torch.save, found "
                         f"{found}; fetch or convert it again") from None


def swells(file, zipped):
    """Return whether torch.load could fill more memory than the open file has bytes.

    torch.save neither compresses nor, for tensors, asks for a bytearray; torch.load, even with
    weights_only=True, unpacks whatever is compressed and makes a bytearray of any length.
    """
    bomb = b"\nbytearray\n"  # the end of a pickle's GLOBAL
    if not zipped:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ).find(bomb) >= 0
    archive = zipfile.ZipFile(file)
    return (sum(part.file_size for part in archive.infolist()) > file.seek(0, 2)
            or any(bomb in archive.read(part) for part in archive.infolist()
                   if part.filename.lower().endswith(".pkl")))


# Conversion from and to the hub's folders: config.json, weights, spiece.model.

SUBLAYERS = {  # of a block, in order: our name -> (published name, {our name: published name})
    "attention": ("SelfAttention", {"q": "q", "k": "k", "v": "v", "o": "o"}),
    "cross": ("EncDecAttention", {"q": "q", "k": "k", "v": "v", "o": "o"}),
    "feed_forward": ("DenseReluDense", {"gate": "wi_0", "up": "wi_1", "down": "wo"}),
}
POSITIONS = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of shared.weight
STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # never used


def published_names(config):
    """Return {our name: published name} of all tensors of a model."""
    names = {"embedding.weight": "shared.weight", "head.weight": "lm_head.weight"}
    for stack, blocks in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        names[f"{stack}.positions.weight"] = POSITIONS.format(stack)
        names[f"{stack}.norm.weight"] = f"{stack}.final_layer_norm.weight"
        sublayers = [name for name in SUBLAYERS if stack == "decoder" or name != "cross"]
        for block in range(blocks):
            for number, ours in enumerate(sublayers):
                layer, (theirs, parts) = f"{stack}.block.{block}.layer.{number}", SUBLAYERS[ours]
                names[f"{stack}.layers.{block}.{ours}_norm.weight"] = f"{layer}.layer_norm.weight"
                for part, published in parts.items():
                    names[f"{stack}.layers.{block}.{ours}.{part}.weight"] = (
                        f"{layer}.{theirs}.{published}.weight")
    return names


def convert(source, target, trim=()):
    """Write the mT5 in the hub folder source to the checkpoint file target; print what was done.

    trim: text files; where given, only the pieces that they need are kept, and their rows of
    embedding and head. Raises FileNotFoundError, ValueError.
    """
    source = Path(source)
    path = source / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a folder with config.json, weights, "
                                "spiece.model, found none")
    settings, published = parse(path.read_bytes(), path), read_weights(source)
    config = infer_config(settings, published, source)
    ignored = set_aside(published, settings, source)
    names = published_names(config)
    if faults := find_faults(published, config, names):
        raise ValueError(f"{source}: {faults}")
    tokenizer = read_tokenizer(source / "spiece.model", config)
    weights = {ours: published[theirs].float() for ours, theirs in names.items()}
    if trim:
        kept = tokenizer.needed(each_text(trim))
        print(f"trimmed: {len(kept):,} of {len(tokenizer):,} pieces, and of "
              f"{config.vocab_size:,} rows of embedding and head, are kept")
        with naming(source / "spiece.model"):
            tokenizer, config.vocab_size = tokenizer.only(kept), len(kept)
        for name in ("embedding.weight", "head.weight"):
            weights[name] = weights[name][kept]
    save(target, build(config, weights), tokenizer)
    for line in ignored:
        print(f"ignored: {line}")
    print(f"{target}: {sum(map(torch.Tensor.numel, weights.values())):,} parameters, "
          f"{Path(target).stat().st_size / 1e6:,.1f} MB")


def infer_config(settings, published, folder):
    """Return the MT5Config of published weights: sizes from shapes, the rest from settings."""
    positions = POSITIONS.format("encoder")
    if (settings.get("model_type") == "umt5"
            or positions.replace("block.0", "block.1") in published):
        raise ValueError(f"{folder}: expected mT5, found umT5, which has a table of positions in "
                         "each layer: not supported")
    if settings.get("feed_forward_proj", "gated-gelu") != "gated-gelu":
        raise ValueError(f"{folder}/config.json: expected feed_forward_proj 'gated-gelu' as in "
                         f"mT5, found {brief(settings['feed_forward_proj'])}: not supported")
    shapes = {}  # of the matrices that tell the sizes
    for name in ("shared.weight", positions, "encoder.block.0.layer.0.SelfAttention.q.weight",
                 "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"):
        if name not in published or published[name].dim() != 2:
            raise ValueError(f"{folder}: expected the weights of an mT5, found no matrix {name}")
        shapes[name] = published[name].shape
    (vocab_size, d_model), (buckets, heads), (inner, _), (d_ff, _) = shapes.values()
    depth = [len({name.split(".")[2] for name in published if name.startswith(f"{stack}.block.")})
             for stack in ("encoder", "decoder")]
    other = {name: settings[name] for name in (
        "relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon")
        if name in settings}
    with naming(folder):
        return MT5Config(vocab_size, d_model, inner // max(1, heads), d_ff, *depth, heads, buckets,
                         **other)


def set_aside(published, settings, folder):
    """Take from published what is not part of the model; return why, a line for each."""
    lines = []
    for name in ALIASES:
        if name in published:
            same, shared = published.pop(name), published["shared.weight"]
            if same.data_ptr() != shared.data_ptr() and not torch.equal(same, shared):
                raise ValueError(f"{folder}: expected {name} to equal shared.weight, it differs")
            lines.append(f"{name}, the same as shared.weight")
    if published.pop(STRAY, None) is not None:
        lines.append(f"{STRAY}, which mT5 does not use")
    if "lm_head.weight" not in published and settings.get("tie_word_embeddings"):
        published["lm_head.weight"] = published["shared.weight"]
        lines.append("tie_word_embeddings: without lm_head.weight, shared.weight becomes the head")
    return lines


def read_tokenizer(path, config):
    """Return the Tokenizer of the SentencePiece model at path, checked against config."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the SentencePiece model, found none; "
                                "all mT5 of any size share the one of google/mt5-small")
    with naming(path):
        return check_tokenizer(Tokenizer(path.read_bytes()), config)


def check_tokenizer(tokenizer, config):
    """Return tokenizer; raises ValueError where the embedding of config has no row for a piece."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"expected at most {config.vocab_size} pieces, as many as rows of the "
                         f"embedding, found {len(tokenizer)}")
    return tokenizer


def each_text(paths):
    """Yield the lines of UTF-8 text files; of .jsonl files the strings in each line."""
    for path in map(Path, paths):
        for number, line in enumerate(each_line(path), start=1):
            if path.suffix != ".jsonl":
                yield line
            elif line.strip():
                where = f"{path}:{number}"
                yield from (check_text(text, where) for text in parse(line, where).values()
                            if isinstance(text, str))


def read_weights(folder):
    """Return {published name: tensor} from a hub folder's weights, whole or in shards."""
    for name in ("model.safetensors", "model.safetensors.index.json",
                 "pytorch_model.bin", "pytorch_model.bin.index.json"):
        path = folder / name
        if path.is_file():
            break
    else:
        raise FileNotFoundError(f"{folder}: expected model.safetensors or pytorch_model.bin, or "
                                "the .index.json of either, found none")
    shards = [name]
    if path.suffix == ".json":
        files = parse(path.read_bytes(), path, {"weight_map": {str: str}})["weight_map"]
        shards = sorted(set(files.values()))
        if not all(Path(shard).name == shard for shard in shards):
            raise ValueError(f"{path}: expected weight_map to name each tensor's file")
    weights = {}
    for path in (folder / shard for shard in shards):
        read = read_safetensors if path.suffix == ".safetensors" else read_pickle
        part = check_tensors(read(path), path)
        if twice := part.keys() & weights.keys():
            raise ValueError(f"{path}: expected each tensor once, found {min(twice)} in another "
                             "shard too")
        weights.update(part)
    return weights


def read_safetensors(path):
    """Return {name: tensor} of a safetensors file, mapped rather than read.

    The file: the header's length (8 bytes, lowest first), the header (JSON: dtype, shape and first
    and last byte of each tensor), the tensors' bytes without gap or overlap.
    """
    def fault(expected):
        return ValueError(f"{path}: expected {expected}; the safetensors file is damaged")

    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if size < 8:
            raise fault("at least 8 bytes")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(content[:8], "little")
    if start > size:
        raise fault(f"a header of at most {size - 8} bytes, found the length {start - 8}")
    header = parse(content[8:start], path)
    header.pop("__metadata__", None)
    whole_number = range(2**48)
    check(header, path, {str: {"dtype": str, "shape": ([whole_number], []),
                               "data_offsets": [whole_number]}})
    tensors, at = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, offsets = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if not dtype or len(shape) > 8 or math.prod(filter(None, shape)) > size:
            raise fault(f"one of {' '.join(DTYPES)} and at most 8 sizes, found {brief(name)}: "
                        f"{brief(entry)}")
        count = math.prod(shape)
        end = at + count * dtype.itemsize
        if offsets != [at, end] or start + end > size:
            raise fault(f"{brief(name)} {shape} at bytes {at} to {end} of {size - start}, found "
                        f"{brief(offsets)}")
        tensors[name] = torch.empty(0, dtype=dtype) if not count else torch.frombuffer(
            content, dtype=dtype, count=count, offset=start + at)
        tensors[name] = tensors[name].view(shape)
        at = end
    if start + at != size:
        raise fault(f"{at} bytes of tensors, found {size - start}")
    return tensors


def export(checkpoint, folder):
    """Write the checkpoint as a hub folder that transformers loads; print what was written."""
    content = read_checkpoint(checkpoint)
    config = MT5Config(**content["config"])
    weights = {theirs: content["model"][ours].float()
               for ours, theirs in published_names(config).items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "config.json", json.dumps({
        "architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5", **asdict(config),
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        "is_encoder_decoder": True, "tokenizer_class": "T5Tokenizer", "pad_token_id": PAD,
        "eos_token_id": EOS, "decoder_start_token_id": PAD}, indent=2))
    write_file(folder / "tokenizer_config.json", json.dumps({
        "tokenizer_class": "T5Tokenizer", "extra_ids": 0, "eos_token": "</s>",
        "unk_token": "<unk>", "pad_token": "<pad>"}, indent=2))
    write_file(folder / "spiece.model", content["tokenizer"]["model"].numpy().tobytes())
    write_file(folder / "model.safetensors", lambda file: write_safetensors(weights, file))
    print(f"{folder}: config.json, model.safetensors, spiece.model, tokenizer_config.json; "
          f"{sum(map(torch.Tensor.numel, weights.values())):,} parameters")


def write_safetensors(tensors, file):
    """Write float32 tensors {name: tensor} to an open binary file as read_safetensors() reads."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape),
                        "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)  # the tensors start at a multiple of eight
    file.write(len(header).to_bytes(8, "little") + header)
    for tensor in tensors.values():
        file.write(memoryview(tensor.contiguous().numpy()).cast("B"))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="model.py", description="Converts mT5 checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert", help="hub folder to one checkpoint file")
    command.add_argument("source", metavar="SRC", help="folder: config.json, pytorch_model.bin or "
                         "model.safetensors (or shards and their index), spiece.model")
    command.add_argument("target", metavar="DST", help="checkpoint file to write")
    command.add_argument("--trim", nargs="+", metavar="FILE", default=[], help="keep only the "
                         "pieces that these texts need (default: keep all)")
    command = commands.add_parser("export", help="checkpoint file to a folder for transformers")
    command.add_argument("source", metavar="CHECKPOINT")
    command.add_argument("target", metavar="DIR", help="folder to write")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.command == "convert":
            convert(args.source, args.target, args.trim)
        else:
            export(args.source, args.target)
    except (ValueError, OSError) as error:
        print(f"model.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
