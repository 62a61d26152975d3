"""Text to batches: tokenizer, file readers, batches, span corruption, and the toy world.

Shapes: B sentences, S source tokens, T target tokens.
"""

import os
from pathlib import Path

import sentencepiece

PAD, EOS, UNK = 0, 1, 2  # mT5's ids; the decoder also starts with PAD
IGNORE = -100  # label of padding: no loss there


class Tokenizer:
    """mT5's tokenizer: a SentencePiece model, `</s>` after each text, and sentinels.

    model: the bytes of a SentencePiece model (`spiece.model`).
    """

    def __init__(self, model):
        self.model = bytes(model)
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError:
            raise ValueError("expected a SentencePiece model, found other bytes") from None

    def __len__(self):
        return self.pieces.get_piece_size()

    def encode(self, text):
        """Return the ids of text, `</s>` at the end. Line breaks and tabs become spaces."""
        return self.pieces.encode(text) + [EOS]

    def decode(self, ids):
        """Return the text of ids up to `</s>`, padding left out; sentinels are shown as text."""
        ids = [int(i) for i in ids]
        ids = ids[:ids.index(EOS)] if EOS in ids else ids
        return self.pieces.decode([i for i in ids if i not in (PAD, EOS, IGNORE)])

    def sentinels(self):
        """Return the ids of `<extra_id_0>`, `<extra_id_1>`, … as far as the vocabulary has them.

        mT5 spells them with SentencePiece's space sign in front, our toy vocabulary without.
        """
        ids = []
        for i in range(100):
            found = [self.pieces.piece_to_id(f"{space}<extra_id_{i}>") for space in ("▁", "")]
            found = [piece for piece in found if piece != self.pieces.unk_id()]
            if not found:
                break
            ids.append(found[0])
        return ids


def write_file(path, content):
    """Write bytes or str to path under a temporary name, flush it to disk, then rename it.

    A reader sees the old file or the whole new one, never a part. Raises OSError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
