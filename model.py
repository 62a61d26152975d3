"""mT5, written out: sizes, encoder-decoder, loss, generation, checkpoint, conversion, export.

What makes mT5 (the T5 1.1 architecture) not the Transformer of the textbook:
- no position embeddings: a learnt number per head and bucket of distances is added to the scores
  of self-attention; one table a stack, shared by its layers; none in cross-attention;
- scores are not divided by √K, the root of a head's width: the initialisation takes care of it;
- norms come before each block, scale only (no mean, no bias); no bias anywhere;
- feed-forward gated by a tanh-GELU; the output head is neither tied to the embedding nor scaled.

Shapes: B sentences, S source tokens, T target tokens, D width, H heads, K width of a head,
V vocabulary, W beams. A mask is True at real tokens.
"""

import argparse
import contextlib
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from data import EOS, IGNORE, PAD, Tokenizer, each_row, write_file

FORMAT = "xlrs-mt5 1"  # first entry of every checkpoint; the number grows when the layout changes
# The scores of a thousand target tokens over mT5's vocabulary take 1 GB, their gradient as much
# again: the loss makes those of 256 tokens at a time.
IN_PARTS = nn.LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None)
# cuDNN's attention would build a graph for every new length, up to 0.4 s each.
torch.backends.cuda.enable_cudnn_sdp(False)


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


SIZES = {  # the first seven of the above, to num_heads
    "small": MT5Config(250112, 512, 64, 1024, 8, 8, 6),  # 300 million, 85 % embedding and head
    "base": MT5Config(250112, 768, 64, 2048, 12, 12, 12),  # 582 million parameters
    "large": MT5Config(250112, 1024, 64, 2816, 24, 24, 16),  # 1.2 billion
    "xl": MT5Config(250112, 2048, 64, 5120, 24, 24, 32),  # 3.7 billion
    "xxl": MT5Config(250112, 4096, 64, 10240, 24, 24, 64)}  # 12.9 billion


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

    def forward(self, input_ids, mask, labels):
        """Return the mean cross-entropy of the real labels, a float32 scalar in nats a token.

        input_ids (B, S) int64; mask (B, S) bool; labels (B, T) int64, IGNORE (-100) at padding.
        """
        hidden, weight = self.decode(input_ids, mask, labels), self.head.weight
        real = (labels != IGNORE).nonzero(as_tuple=True)
        if torch.is_grad_enabled():  # torch's loss ignores autocast. In bfloat16 the number it
            weight = in_autocast(weight)  # returns has three digits: one only read stays exact
        return F.linear_cross_entropy(hidden[real].to(weight.dtype), weight, labels[real],
                                      options=IN_PARTS).float()

    def logits(self, input_ids, mask, labels):
        """Return the scores of each next token (B, T, V), the decoder being fed the true labels."""
        return self.head(self.decode(input_ids, mask, labels))

    def encode(self, input_ids, mask):
        """Return the final encoder states (B, S, D). input_ids (B, S) int64, mask (B, S) bool."""
        return self.encoder(self.embedding(input_ids), mask)

    def decode(self, input_ids, mask, labels):
        """Return the final decoder states (B, T, D), each fed the labels before it."""
        fed = F.pad(labels, (1, -1), value=PAD)  # PAD starts the target, too
        fed = self.embedding(fed.masked_fill(fed == IGNORE, PAD))  # (B, T, D)
        return self.decoder(fed, self.decoder.look_at(self.encode(input_ids, mask), mask))[0]

    @torch.no_grad()
    def generate(self, input_ids, mask, max_new_tokens, num_beams=1):
        """Return the generated ids (B, at most max_new_tokens) int64, PAD after the end `</s>`.

        num_beams 1 takes the best token at each step; more search with that many beams.
        """
        assert not self.training, "generate() would drop out: call model.eval() first"
        source = self.decoder.look_at(self.encode(input_ids, mask), mask)
        if num_beams == 1:
            return greedy(self, source, len(mask), max_new_tokens)
        return beam_search(self, source, len(mask), max_new_tokens, num_beams)

    def initialise(self):
        """Draw all weights from normal distributions of mesh-tensorflow's widths.

        Each keeps the variance of what passes through it at one; a query's also carries the
        factor K^-0.5 that mT5 leaves out of its scores.
        """
        c = self.config
        std = {"embedding": 1.0, "q": (c.d_model * c.d_kv) ** -0.5, "down": c.d_ff ** -0.5,
               "o": (c.num_heads * c.d_kv) ** -0.5}  # k, v, gate, up, positions: D^-0.5
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and module is not self.head:
                nn.init.normal_(module.weight, std=std.get(name.split(".")[-1], c.d_model ** -0.5))
        # Ours: the head begins as if it were tied to the embedding, and may part from it.
        self.head.weight = nn.Parameter(self.embedding.weight.detach() * c.d_model ** -0.5)


class Encoder(nn.Module):
    """Layers of self-attention and feed-forward over the source."""

    def __init__(self, config):
        super().__init__()
        self.positions = Positions(config, both_ways=True)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.norm = Norm(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x, mask):
        """Return final states (B, S, D) of embeddings x (B, S, D); mask (B, S)."""
        bias = hide(self.positions(0, x.shape[1]), mask[:, None, None, :])  # (B, H, S, S)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, bias)
        return self.dropout(self.norm(x))


class Decoder(nn.Module):
    """Layers of causal self-attention, attention to the encoder's states, and feed-forward."""

    def __init__(self, config):
        super().__init__()
        self.positions = Positions(config, both_ways=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_decoder_layers))
        self.norm = Norm(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def look_at(self, states, mask):
        """Return what forward() sees of the source: keys and values by layer, and who is hidden."""
        return ([layer.cross.keys_values(states) for layer in self.layers],
                hide(states.new_zeros(()), mask[:, None, None, :]))  # (B, 1, 1, S)

    def forward(self, x, source, past=None):
        """Return (final states (B, T, D), keys and values by layer) of target embeddings x.

        source: look_at(); past: keys and values of the targets before x, in generation.
        """
        start = past[0][0].shape[2] if past else 0
        seen = torch.ones(x.shape[1], start + x.shape[1], dtype=torch.bool, device=x.device)
        bias = hide(self.positions(start, seen.shape[1]), seen.tril(start))  # (1, H, T, all so far)
        x, kept, (source_kv, source_bias) = self.dropout(x), [], source
        for i, layer in enumerate(self.layers):
            x, own_kv = layer(x, bias, source_kv[i], source_bias, past and past[i])
            kept.append(own_kv)
        return self.dropout(self.norm(x)), kept


class EncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = Norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = Norm(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x, bias):
        own = self.attention_norm(x)
        x = x + self.dropout(self.attention(own, *self.attention.keys_values(own), bias))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class DecoderLayer(EncoderLayer):
    def __init__(self, config):
        super().__init__(config)
        self.cross = Attention(config)
        self.cross_norm = Norm(config)

    def forward(self, x, bias, source_kv, source_bias, past=None):
        own = self.attention_norm(x)
        own_kv = self.attention.keys_values(own)
        if past is not None:
            own_kv = [torch.cat(pair, dim=2) for pair in zip(past, own_kv)]
        x = x + self.dropout(self.attention(own, *own_kv, bias))
        x = x + self.dropout(self.cross(self.cross_norm(x), *source_kv, source_bias))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), own_kv


class Attention(nn.Module):
    """softmax(q kᵀ + bias) v, by head. Not divided by √K: this is T5."""

    def __init__(self, config):
        super().__init__()
        inner = config.num_heads * config.d_kv  # mT5-small's is not d_model
        self.heads, self.dropout = config.num_heads, nn.Dropout(config.dropout_rate)
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)

    def split(self, x):
        """Return x (B, T, H * K) as (B, H, T, K)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x):
        """Return keys and values, each (B, H, S, K), of what is looked at, x (B, S, D)."""
        return self.split(self.k(x)), self.split(self.v(x))

    def forward(self, x, keys, values, bias):
        """Return (B, T, D) of those who look, x (B, T, D); bias broadcasts to (B, H, T, S)."""
        q = self.split(self.q(x))
        if q.is_cuda or not torch.is_grad_enabled():  # on a CPU slower if the bias has a gradient
            rate = self.dropout.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, keys, values, bias, rate, scale=1.0)
        else:
            out = self.dropout((q @ keys.mT + bias).softmax(dim=-1)).to(values.dtype) @ values
        return self.o(out.transpose(1, 2).flatten(2))


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
    """x / sqrt(mean(x²) + eps) * weight, computed in float32 whatever the precision."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, x):
        x = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
        return in_autocast(x)  # once, for all the matrices that it meets


class Positions(nn.Embedding):
    """What is added to the scores of each pair of positions, learnt by head and bucket."""

    def __init__(self, config, both_ways):
        super().__init__(config.relative_attention_num_buckets, config.num_heads)
        self.both_ways, self.max_distance = both_ways, config.relative_attention_max_distance

    def forward(self, start, end):
        """Return (1, H, end - start, end): of the tokens from start on with all before end."""
        places = torch.arange(end, device=self.weight.device)
        buckets = bucket(places[None, :] - places[start:, None], self.both_ways,
                         self.num_embeddings, self.max_distance)
        return super().forward(buckets).permute(2, 0, 1).contiguous()[None]


def bucket(distance, bidirectional, num_buckets=32, max_distance=128):
    """Return the bucket, in [0, num_buckets), of each signed distance from query to key.

    Looking both ways, the first half of the buckets is for distance 0 and keys behind, the second
    half, numbered alike, for keys ahead (its first stays unused); looking back only, all are for
    keys behind and every key ahead falls to bucket 0. Of a direction's buckets half hold one
    distance each (0, 1, 2, …); the other half share the distances up to max_distance on a
    logarithmic scale, rounded down, and the last takes all beyond.
    """
    if bidirectional:
        half = num_buckets // 2
        return (distance > 0) * half + bucket(-distance.abs(), False, half, max_distance)
    distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    # The order of these float32 operations is mesh-tensorflow's: another one would round the
    # distances on a boundary to the other side.
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (far * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return torch.where(distance < exact, distance, far)


def hide(bias, visible):
    """Return bias with the lowest number that is finite in bf16 too wherever visible is False."""
    return aligned(in_autocast(torch.where(visible, bias, torch.finfo(torch.bfloat16).min)))


def aligned(bias):
    """Return bias with rows that begin at multiples of eight numbers in memory.

    So a GPU's fused attention takes it as it is, without a copy in every layer.
    """
    return F.pad(bias, (0, -bias.shape[-1] % 8))[..., :bias.shape[-1]]


def in_autocast(x):
    """Return x in the precision that autocast has for matrices; as it is outside autocast."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


# Generation, with the keys and values of what has been generated kept.

def greedy(model, source, count, max_new_tokens):
    """Return the ids (B, T) of the best token at each step.

    Sentences that have ended leave once they are a quarter: to copy what goes on costs as well.
    """
    ids = torch.full((count, max_new_tokens + 1), PAD, device=model.head.weight.device)
    rows, past = torch.arange(count, device=ids.device), None  # of ids, those still written
    ended = torch.zeros_like(rows, dtype=torch.bool)
    for t in range(1, max_new_tokens + 1):
        hidden, past = model.decoder(model.embedding(ids[rows, t - 1:t]), source, past)
        token = model.head(hidden[:, -1]).argmax(dim=-1).masked_fill(ended, PAD)
        ids[rows, t] = token
        ended = ended | (token == EOS)
        going = (~ended).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) <= 3 / 4 * len(rows):
            rows, ended = rows[going], ended[going]
            past, source = rows_of(past, going), source_rows(source, going)
    return ids[:, 1:t + 1]


def rows_of(keys_values, rows):
    """Return the chosen rows of the keys and values of each layer."""
    return [[x[rows] for x in pair] for pair in keys_values]


def source_rows(source, rows):
    """Return the chosen rows of what the decoder sees of the source, look_at()."""
    return rows_of(source[0], rows), aligned(source[1][rows])


def beam_search(model, source, count, max_new_tokens, W):
    """Return the ids (B, T) of the best ended beam by its mean log-probability per token.

    The rules are those of transformers' default (length_penalty 1, early_stopping False): of the
    2W best continuations those among the first W that end are kept as results, the W best others
    go on; a sentence is done when it has W results and its best beam's mean so far is no better
    than the worst of them. What is cut off at max_new_tokens counts as ended.
    """
    device = model.head.weight.device
    rows = torch.arange(count, device=device)[:, None]  # x[rows, order]: each sentence's own
    source = source_rows(source, rows.flatten().repeat_interleave(W))
    ids = torch.full((count, W, max_new_tokens + 1), PAD, device=device)
    scores = torch.full((count, W), -math.inf, device=device)
    ended, ended_scores = ids.clone(), scores.clone()
    scores[:, 0] = 0  # all beams start alike: the first step goes on from one of them
    past, done = None, torch.zeros(count, dtype=torch.bool, device=device)
    for t in range(1, max_new_tokens + 1):
        hidden, past = model.decoder(model.embedding(ids[:, :, t - 1].reshape(-1, 1)), source, past)
        logp = model.head(hidden[:, -1]).float().log_softmax(-1).unflatten(0, (count, W))
        best, order = (scores[:, :, None] + logp).flatten(1).topk(2 * W)  # (B, 2W)
        parent, token = torch.unravel_index(order, logp.shape[1:])  # of (W, V)
        candidates = ids[rows, parent]
        candidates[:, :, t] = token
        ends = (token == EOS) | (t == max_new_tokens)

        results = best.masked_fill(~ends | done[:, None], -math.inf)[:, :W] / t
        ended_scores, keep = torch.cat([ended_scores, results], dim=1).topk(W)
        ended = torch.cat([ended, candidates[:, :W]], dim=1)[rows, keep]
        scores, keep = best.masked_fill(ends, -math.inf).topk(W)
        ids = candidates[rows, keep]
        done |= scores[:, 0] / t <= ended_scores[:, -1]
        if done.all():
            break
        past = rows_of(past, (W * rows + parent[rows, keep]).flatten())
    return ended[:, 0, 1:t + 1]


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
    with whole(path, "a checkpoint of this project"):
        model = build(MT5Config(**content["config"]), content["model"])
        return model, Tokenizer(content["tokenizer"]["model"].numpy().tobytes())


def build(config, weights):
    """Return the model of config in eval mode, its weights {name: tensor} taken as they are."""
    with torch.device("meta"):  # sizes only: no memory, no random numbers
        model = MT5(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def read_checkpoint(path):
    """Return the dict that save() wrote, tensors on the CPU; no code in the file can run.

    Raises FileNotFoundError, and ValueError for anything but a checkpoint of this format.
    """
    with whole(path, f"a checkpoint {FORMAT!r} (a hub folder becomes one by model.py convert)"):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        return content


@contextlib.contextmanager
def whole(path, expected):
    """Turn whatever a broken file raises inside, which can be anything, into one ValueError.

    Where there is no file it stays a FileNotFoundError.
    """
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: expected {expected}, found no file") from None
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: expected {expected}, found a broken or another file ({why:.300})"
                         "; fetch it again (in a clone by git lfs pull) or make it again") from None


# Conversion from and to the hub's folders: config.json, weights, spiece.model.

# What the settings of a hub folder must be, where it has them; the first is what we export.
EXPECTED = {"model_type": ["mt5", "t5"], "feed_forward_proj": ["gated-gelu"],
            "dense_act_fn": ["gelu_new", "gelu_pytorch_tanh"], "pad_token_id": [PAD],
            "decoder_start_token_id": [PAD], "eos_token_id": [EOS, [EOS]],
            "forced_bos_token_id": [None], "scale_decoder_outputs": [False], "is_gated_act": [True]}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of shared.weight
STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # never used
PUBLISHED = {  # the published name of each part of a tensor's name; other parts are the same
    "embedding": "shared", "head": "lm_head", "layers": "block", "norm": "final_layer_norm",
    "positions": "block.0.layer.0.SelfAttention.relative_attention_bias",
    "attention": "layer.0.SelfAttention", "attention_norm": "layer.0.layer_norm",
    "cross": "layer.1.EncDecAttention", "cross_norm": "layer.1.layer_norm",
    "feed_forward": "layer.2.DenseReluDense", "feed_forward_norm": "layer.2.layer_norm",
    "gate": "wi_0", "up": "wi_1", "down": "wo"}


def published_names(config):
    """Return {our name: published name} of all tensors of a model."""
    with torch.device("meta"):  # names only
        names = dict.fromkeys(MT5(config).state_dict())
    for ours in names:
        names[ours] = ".".join(PUBLISHED.get(part, part) for part in ours.split("."))
        if ours.startswith("encoder"):  # no cross-attention: its feed-forward comes one earlier
            names[ours] = names[ours].replace("layer.2", "layer.1")
    return names


def convert(source, target, trim=()):
    """Write the mT5 in the hub folder source to the checkpoint file target; print what was done.

    trim: text files, or tables of texts; where given, only the pieces that they need are kept, and
    their rows of embedding and head. Raises FileNotFoundError, ValueError.
    """
    folder = Path(source)
    settings, tokenizer = read_settings(folder), read_tokenizer(folder)
    published = read_weights(folder)
    with whole(folder, "the weights of an mT5, not of T5 1.0 or umT5"):
        if settings.get("tie_word_embeddings"):
            published.setdefault("lm_head.weight", published["shared.weight"])
        config = infer_config(settings, published)
        model = build(config, our_weights(published, config))
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"room for at most {config.vocab_size} pieces, not {len(tokenizer)}")
    if trim:
        kept = tokenizer.needed(text for path in trim for _, row in each_row(str(path))
                                for text in row.values() if isinstance(text, str))
        tokenizer, config.vocab_size = tokenizer.only(kept), len(kept)
        for layer in (model.embedding, model.head):
            layer.weight = nn.Parameter(layer.weight[kept])
    save(target, model, tokenizer)
    print(f"{target}: {sum(weight.numel() for weight in model.parameters()):,} parameters, "
          f"{len(tokenizer):,} pieces")


def read_settings(folder):
    """Return the dict in config.json; raises ValueError where settings are not those of an mT5."""
    for path in folder.glob("*config.json"):  # generation_config.json may have its own
        found = read_json(path)
        if found.get("model_type") == "t5":  # which scales what the head gets unless told not to
            found.setdefault("scale_decoder_outputs", found.get("tie_word_embeddings") is not False)
        for name, value in found.items():
            if name in EXPECTED and value not in [*EXPECTED[name], None]:
                raise ValueError(f"{path}: expected {name} {EXPECTED[name][0]!r}, as mT5 has it, "
                                 f"found {value!r:.80}: not supported")
    return read_json(folder / "config.json")


def read_json(path):
    """Return the dict in a JSON file."""
    with whole(path, "a JSON object"):
        return dict(json.loads(path.read_bytes()))


def read_tokenizer(folder):
    """Return the Tokenizer of a hub folder; raises ValueError where other files add tokens."""
    path = folder / "spiece.model"
    with whole(path, "mT5's pieces (copy it from the model that this one was tuned from)"):
        tokenizer = Tokenizer(path.read_bytes())
    known = {tokenizer.pieces.id_to_piece(i) for i in range(len(tokenizer))}
    known |= {f"<extra_id_{i}>" for i in range(100)}  # mT5's pieces begin with a space
    for path in folder.glob("*token*.json"):
        content = read_json(path)
        with whole(path, "added tokens as objects that have content"):
            # tokenizer.json has the one, tokenizer_config.json the other; added_tokens.json neither
            tokens = content.get("added_tokens") or content.get("added_tokens_decoder", {}).values()
            listed = {str(token["content"]) for token in tokens}
            added = sorted((set(content) if path.name == "added_tokens.json" else listed) - known)
        if added:
            raise ValueError(f"{path}: expected no added tokens, found {' '.join(added)!r:.80}")
    return tokenizer


def read_weights(folder):
    """Return {published name: tensor} from a hub folder's weights, whole or in shards.

    By their usual name, else by index, else the shards of one save; what else lies there, of an
    earlier save or in another precision, is left alone.
    """
    paths = [path for name in ("model.safetensors", "pytorch_model.bin")
             for path in (folder / name, folder / f"{name}.index.json") if path.exists()][:1]
    paths = paths or [*folder.glob("model-*.safetensors"), *folder.glob("pytorch_model-*.bin")]
    if len({path.name.partition("-of-")[2] for path in paths}) != 1:
        raise FileNotFoundError(f"{folder}: expected model.safetensors or pytorch_model.bin, or "
                                f"shards and their index, found {len(paths)} shards without one")
    if paths[0].suffix == ".json":
        with whole(paths[0], "an index of shards"):
            paths = {folder / name for name in read_json(paths[0])["weight_map"].values()}
    weights = {}
    for path in paths:
        with whole(path, "weights of a model"):
            weights |= (read_safetensors(path) if path.suffix == ".safetensors" else
                        torch.load(path, map_location="cpu", weights_only=True))
    return weights


def read_safetensors(path):
    """Return {name: tensor} of a safetensors file, mapped rather than read.

    The file: the header's length (8 bytes, lowest first), the header (JSON: dtype, shape, first and
    last byte of each tensor), the tensors' bytes.
    """
    content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    start = 8 + int.from_bytes(content[:8].numpy().tobytes(), "little")
    header, found = json.loads(content[8:start].numpy().tobytes()), {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        dtype, (first, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        found[name] = content[start:].narrow(0, first, end - first).view(dtype).view(entry["shape"])
    return found


def infer_config(settings, published):
    """Return the MT5Config of published weights: sizes from shapes, the rest from settings."""
    first = "encoder.block.0.layer"
    vocab_size, d_model = published["shared.weight"].shape
    buckets, heads = published[f"{first}.0.SelfAttention.relative_attention_bias.weight"].shape
    inner = len(published[f"{first}.0.SelfAttention.q.weight"])
    d_ff = len(published[f"{first}.1.DenseReluDense.wi_0.weight"])
    stacks = [name.split(".")[0] for name in published if name.endswith(".0.layer_norm.weight")]
    config = MT5Config(vocab_size, d_model, inner // heads, d_ff, stacks.count("encoder"),
                       stacks.count("decoder"), heads, buckets)
    for name in ("relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon"):
        setattr(config, name, settings.get(name, getattr(config, name)))
    for name, value in asdict(config).items():
        if settings.get(name, value) != value:
            print(f"contradicts the weights: {name} {settings[name]!r:.40} (weights: {value})")
    return config


def our_weights(published, config):
    """Return {our name: float32 tensor} of all published ones but copies, which are printed.

    Each has memory of its own, whatever shared one in the file: two weights in one would both move.
    """
    ours = {theirs: name for name, theirs in published_names(config).items()}
    weights = {}
    for name, tensor in published.items():
        if name == STRAY or name in ALIASES and tensor.equal(published["shared.weight"]):
            print(f"ignored: {name}, never used or a copy of shared.weight")
        elif not tensor.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")
        else:
            weights[ours.get(name, name)] = tensor.to(torch.float32, copy=True)
    return weights


def export(checkpoint, folder):
    """Write the checkpoint as a hub folder that transformers loads; print what was written.

    Raises ValueError where the folder has files: those of an earlier save might be read instead.
    """
    model, tokenizer = load(checkpoint)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if found := sorted(folder.iterdir()):
        raise ValueError(f"{folder}: expected an empty or a new folder, found {found[0].name}")
    settings = {name: values[0] for name, values in EXPECTED.items()} | asdict(model.config)
    settings |= {"architectures": ["MT5ForConditionalGeneration"], "tie_word_embeddings": False}
    write_file(folder / "config.json", json.dumps(settings, indent=2))
    names = published_names(model.config)
    weights = {names[name]: tensor.float() for name, tensor in model.state_dict().items()}
    write_file(folder / "pytorch_model.bin", lambda file: torch.save(weights, file))
    if any(tokenizer.pieces.get_score(i) % 1 for i in range(len(tokenizer))):
        write_file(folder / "spiece.model", tokenizer.model)
        write_file(folder / "tokenizer_config.json",
                   json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    else:  # scores of byte pairs are whole numbers, those of a unigram model logarithms
        print("no tokenizer is written: transformers would take its byte pairs (BPE) for unigrams")
    print(f"{folder}: {sum(weight.numel() for weight in weights.values()):,} parameters")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="model.py", description="Converts mT5 checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert", help="hub folder to one checkpoint file")
    command.add_argument("source", metavar="SRC", help="folder: config.json, weights, spiece.model")
    command.add_argument("target", metavar="DST", help="checkpoint file to write")
    command.add_argument("--trim", nargs="+", metavar="FILE", default=[],
                         help="keep only the pieces that these texts need (default: keep all)")
    command = commands.add_parser("export", help="checkpoint file to a folder for transformers")
    command.add_argument("checkpoint", metavar="CHECKPOINT")
    command.add_argument("folder", metavar="DIR", help="folder to write")
    args = vars(parser.parse_args(argv))
    try:
        {"convert": convert, "export": export}[args.pop("command")](**args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"model.py: {error}\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever the console can show
    main()
