"""The CLIP vocabulary of the embedded family: byte-level BPE over words of landscape captions.

The layout is CLIP's: the 256 byte symbols, the same ones ending a word, the merges in order, then
the two specials. So any text tokenizes, common caption words are one token, and ``!`` is id 0,
with which the second tokenizer pads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from tools.embedded_model.architecture import MAX_TOKENS, Config

START = "<|startoftext|>"
END = "<|endoftext|>"
END_OF_WORD = "</w>"
VOCABULARY_SIZE = 1600
CORPUS = Path(__file__).with_name("corpus.txt")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids, and the merges in the order of their rank."""

    ids: dict[str, int]
    merges: list[tuple[str, str]]

    def special_tokens(self, pad: str) -> Config:
        """What a text encoder's config says about the vocabulary, for one that pads with ``pad``.

        The end id must be right: transformers takes 2 as the sign of configs from before it
        looked for the end token, and then pools another position.
        """
        return {
            "vocab_size": len(self.ids),
            "bos_token_id": self.ids[START],
            "eos_token_id": self.ids[END],
            "pad_token_id": self.ids[pad],
        }


def byte_symbols() -> list[str]:
    """The printable stand-ins for the 256 bytes, in CLIP's order (``!`` first)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    plain += range(ord("®"), ord("ÿ") + 1)
    moved = 256 - len(plain)
    return [chr(code) for code in plain] + [chr(256 + i) for i in range(moved)]


def train_vocabulary(corpus: Path = CORPUS, size: int = VOCABULARY_SIZE) -> Vocabulary:
    """Merges learned from ``corpus``; at most ``size`` tokens, specials included."""
    symbols = byte_symbols()
    symbols += [symbol + END_OF_WORD for symbol in symbols]
    merges = _train_merges(corpus, symbols)[: size - len(symbols) - 2]
    tokens = [*symbols, *(left + right for left, right in merges), START, END]
    return Vocabulary({token: i for i, token in enumerate(tokens)}, merges)


def _train_merges(corpus: Path, symbols: list[str]) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(BPE(end_of_word_suffix=END_OF_WORD))
    # The very splitter that will use the merges: with any other some would never apply.
    template = CLIPTokenizer().backend_tokenizer
    tokenizer.normalizer = template.normalizer
    tokenizer.pre_tokenizer = template.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=2 * VOCABULARY_SIZE,
        min_frequency=1,
        end_of_word_suffix=END_OF_WORD,
        # Gives the symbols fixed ids, which decide between pairs of equal frequency. Left alone
        # the trainer numbers them in the order of a hash table, another one in each run.
        special_tokens=symbols,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.read_text("utf-8").splitlines(), trainer)
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def write_tokenizer(folder: Path, vocabulary: Vocabulary, pad: str) -> None:
    """The four files of a CLIP tokenizer as SDXL's repository holds them."""
    folder.mkdir(parents=True, exist_ok=True)
    specials = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = specials | {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "add_prefix_space": False,
        "do_lower_case": True,
    }
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in vocabulary.merges), ""])
    (folder / "merges.txt").write_text(merges, "utf-8")
    _write_json(folder / "vocab.json", vocabulary.ids, indent=None)
    _write_json(folder / "special_tokens_map.json", specials)
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: object, indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", "utf-8")
