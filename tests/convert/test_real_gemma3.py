"""A real GGUF of another family: Gemma 3 270M in K-quants, with its SentencePiece vocabulary of 262144 tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import sentencepiece
from mlx_lm.utils import load_model
from sentencepiece import sentencepiece_model_pb2

from ifprune_convert.export import export_selection
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_convert.readers.gguf_header import read_header
from ifprune_mlx import Checkpoint, generate, load
from tests.ifprune_mlx.reference import random_selection

pytestmark = pytest.mark.real

TEXT = (
    "The Solar System consists of the Sun and the objects that orbit it. It formed about 4.6 billion years ago when a "
    "dense region of a molecular cloud collapsed, creating the Sun and a protoplanetary disc. The four largest planets "
    "are Jupiter, Saturn, Uranus and Neptune."
)
TEXTS = [
    TEXT,
    "Der schnelle braune Fuchs springt über den faulen Hund. Größe: 3,14 €",
    "L'été dernier, nous avons mangé des crêpes à la plage ; c'était délicieux !",
    "Широкая электрификация южных губерний даст мощный толчок подъёму сельского хозяйства.",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "def f(x):\n    if x > 10:\n\t\treturn {'a': [x ** 2, 0x1F]}  # été\n\n\n\nprint(f(3))\r\n",
    "👩‍👩‍👧 😀 ½ ﬁ \u200b \ue000 <table>  <tr>\n</tr> <0x41> 1234567890",
    "",
    " leading and trailing ",
]


@pytest.fixture(scope="module")
def folder(gemma3_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its IFP checkpoint in float32."""
    out = tmp_path_factory.mktemp("gemma3") / "checkpoint"
    convert(open_source(gemma3_gguf), out, Options(dtype=mx.float32))
    return out


def mean_nll(model: Any, ids: list[int]) -> float:
    """In nats a token."""
    logits = model(mx.array([ids]))[0, :-1].astype(mx.float32)
    picked = mx.take_along_axis(logits, mx.array(ids[1:])[:, None], axis=-1)[:, 0]
    return float((mx.logsumexp(logits, axis=-1) - picked).mean())


def test_it_generates_sensible_text(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.manifest["licence"] == "gemma"
    assert checkpoint.config["eos_token_id"] == [1, 106]
    model, tokenizer = load(folder)
    counted = generate(model, tokenizer, "One, two, three, four, five, six,", dense=True, max_tokens=8)
    assert counted.startswith(" seven, eight, nine, ten"), counted
    ids = tokenizer.encode(TEXT)
    assert ids[0] == 2
    assert mean_nll(model, ids) < 2.3
    # Without its bos token it is a much worse model, which shows that the token is put there.
    assert mean_nll(model, ids[1:]) > 3
    # A base model has no chat template: messages become plain lines.
    assert not tokenizer.has_chat_template
    answer = generate(model, tokenizer, [{"role": "user", "content": "2, 4, 6, 8,"}], dense=True, max_tokens=4)
    assert answer.strip()
    model.close()


def test_a_selection_is_exported_as_it_is_sliced(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder)
    ids = tokenizer.encode(TEXT)
    dense = mean_nll(model, ids)
    selection = random_selection([2048] * 18, [1984] * 18, seed=0)
    model.switch(selection)
    sliced = model(mx.array([ids]))
    assert abs(mean_nll(model, ids) - dense) < 1
    export_selection(Checkpoint.open(folder), selection, tmp_path / "out")
    plain, config = load_model(tmp_path / "out")
    assert config["intermediate_size"] == 1984
    assert mx.abs(plain(mx.array([ids])) - sliced).max() < 1e-3
    model.close()


def test_the_ids_are_those_of_sentencepiece(folder: Path, gemma3_gguf: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=gemma_model(gemma3_gguf))
    model, tokenizer = load(folder)
    model.close()
    dice = random.Random(0)
    letters = "aaabbc  \n\n\t<>/=-_.,'\"0123456789éß" + "".join(TEXTS[3:9])
    texts = TEXTS + ["".join(dice.choices(letters, k=dice.randrange(1, 80))) for _ in range(300)]
    texts += [letter * count for letter in " \n\ta=-0▁" for count in range(1, 70)]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text), text
        assert tokenizer.decode(ids) == text.replace("▁", " ")


def gemma_model(path: Path) -> bytes:
    """The file's vocabulary as the tokenizer.model that it was made from, in what matters to encoding."""
    metadata, _ = read_header(path)
    lists = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    model = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(*lists, strict=True):
        user_defined = token.replace(" ", "▁") if kind == 4 else token
        model.pieces.add(piece=user_defined, score=score, type=2 if token == "<unk>" else kind)
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id, model.trainer_spec.bos_id = 3, 2
    model.trainer_spec.eos_id, model.trainer_spec.pad_id = 1, 0
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return bytes(model.SerializeToString())
