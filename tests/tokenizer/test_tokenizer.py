from __future__ import annotations

import base64
import contextlib
import io
import json
import random
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import regex  # type: ignore[import-untyped]
import sentencepiece
import tiktoken
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ckpt_convert.errors import ConfigError, CorruptFileError, InputError
from ckpt_convert.models.core.tokenizers import LLAMA_3
from ckpt_convert.tokenizer import translation
from ckpt_convert.tokenizer.sentencepiece_model import parse_model
from ckpt_convert.tokenizer.translation import hf_to_tiktoken, sentencepiece_to_hf, tiktoken_to_hf

# llama_models/llama3/tokenizer.py
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

STRINGS = [
    "",
    " ",
    "  ",
    " " * 37,
    "\n",
    "\r\n\r\n \t x",
    "hello",
    " hello",
    "   hello",
    "hello world ",
    "hello  world   and    more",
    "def main(argv: list[str]) -> int:\n    return len(argv)  # 1234567890\n",
    "\tif x:\n\t\tself.assertEqual(0x1F, 31)\n",
    "I'll SHE'D we'Ve can't",
    "0 12 345 6789 3.14159 1e-05",
    "Größe, naïve, straße, ﬁ, İstanbul",
    "Привет, мир. Γειά σου Κόσμε.",
    "日本語の文字列、漢字とかなとカナ。 한국어 문장.",
    "مرحبا بالعالم हिन्दी ไทย",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b \ufeff \u00a0 \u3000 \u2028",
    "\x00\x01\x7f\x80 control",
    "▁ ▁▁ lower one eighth block",
    "<0x0A> <unknown> [INST] <|not_special|>",
    "a" * 61,
    "aba" * 20 + "ab" * 20,
    "=" * 90 + "\n" + "-#" * 40,
    "𝕌𝕟𝕚𝕔𝕠𝕕𝕖 \U0010fffd",
]
POOLS = [
    "ab ",
    "   ",
    " \t\n\r",
    "selfrtun_de ",
    "aA'sStTvVe ",
    "0123456789,. ",
    "日本語漢字かな ",
    "😀👩\u200dé\u0301ñßſ ",
    "\u00a0\u2003\u3000 x",
    "=-_*#/\\ ()\"'",
    "<0x0A>/unk ",
    "▁ a",
]


def random_strings(count: int, seed: int = 0) -> Iterator[str]:
    chosen = random.Random(seed)
    for _ in range(count):
        pool = chosen.choice(POOLS) + chosen.choice(POOLS)
        yield "".join(chosen.choices(pool, k=chosen.randint(1, 40)))


def corpus(files: int) -> list[str]:
    """Lines of the standard library, and of the other scripts above so that those get tokens too."""
    folder = Path(sysconfig.get_path("stdlib"))
    lines = [
        line[:1000]
        for path in sorted(folder.glob("*.py"))[:files]
        for line in path.read_text("utf-8", errors="replace").splitlines(keepends=True)
    ]
    return lines + STRINGS[15:19] * 20


# -- Llama 3: tiktoken ranks


def train_byte_level(vocab_size: int, seed: int | None) -> list[bytes]:
    """Base tokens of a small byte-level BPE, in the order of their ids; the bytes shuffled if there is a seed."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(corpus(60), trainer)
    byte_of = {char: bytes([byte]) for byte, char in gpt2_alphabet().items()}
    by_id = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    tokens = [b"".join(byte_of[char] for char in token) for token, _ in by_id]
    if seed is not None:
        single = tokens[:256]
        random.Random(seed).shuffle(single)
        tokens[:256] = single
    return tokens


def gpt2_alphabet() -> dict[int, str]:
    """GPT-2's bytes_to_unicode, written down again from its definition."""
    own = [b for b in range(256) if 0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or b >= 0xAE]
    table = {b: chr(b) for b in own}
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + len(table) - len(own))
    return table


def rank_file(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def bpe_by_rank(tokens: list[bytes], text: str) -> list[int]:
    """tiktoken's algorithm at its plainest: join the lowest-ranked adjacent pair until no pair is a token."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    ids: list[int] = []
    for word in regex.findall(LLAMA3_PATTERN, text):
        parts = [bytes([byte]) for byte in word.encode()]
        if word.encode() in ranks:
            parts = [word.encode()]
        while True:
            pairs = [(ranks.get(parts[i] + parts[i + 1], 1 << 30), i) for i in range(len(parts) - 1)]
            rank, i = min(pairs, default=(1 << 30, 0))
            if rank == 1 << 30:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.fixture(scope="module", params=[(300, None), (2000, 1), (6000, None)], ids=["300", "2000-shuffled", "6000"])
def llama3_tokens(request: pytest.FixtureRequest) -> list[bytes]:
    vocab_size, seed = request.param
    return train_byte_level(vocab_size, seed)


@pytest.fixture(scope="module")
def small_tokens() -> list[bytes]:
    return train_byte_level(400, None)


def converted(files: dict[str, bytes]) -> Tokenizer:
    return Tokenizer.from_str(files["tokenizer.json"].decode())


def test_ids_equal_plain_bpe_by_rank_behind_the_begin_token(llama3_tokens: list[bytes]) -> None:
    ours = converted(tiktoken_to_hf(LLAMA_3, rank_file(llama3_tokens)))

    for text in [*STRINGS, *random_strings(300)]:
        assert ours.encode(text).ids == [len(llama3_tokens), *bpe_by_rank(llama3_tokens, text)], text


def test_ids_equal_tiktoken(llama3_tokens: list[bytes]) -> None:
    ours = converted(tiktoken_to_hf(LLAMA_3, rank_file(llama3_tokens)))
    ranks = {token: rank for rank, token in enumerate(llama3_tokens)}
    theirs = tiktoken.Encoding("test", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})

    for text in [*STRINGS, *random_strings(4000), *corpus(3)]:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode_ordinary(text), text


def test_decoding_gives_the_text_back(llama3_tokens: list[bytes]) -> None:
    ours = converted(tiktoken_to_hf(LLAMA_3, rank_file(llama3_tokens)))

    for text in STRINGS:
        assert ours.decode(ours.encode(text).ids) == text


def test_special_tokens_follow_behind_the_ranks_at_meta_s_places(small_tokens: list[bytes]) -> None:
    ours = converted(tiktoken_to_hf(LLAMA_3, rank_file(small_tokens)))
    places = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|reserved_special_token_0|>": 2,
        "<|finetune_right_pad_id|>": 4,
        "<|reserved_special_token_2|>": 5,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eom_id|>": 8,
        "<|eot_id|>": 9,
        "<|python_tag|>": 10,
        "<|reserved_special_token_3|>": 11,
        "<|reserved_special_token_247|>": 255,
    }

    assert ours.get_vocab_size() == len(small_tokens) + 256
    assert {name: ours.get_vocab()[name] - len(small_tokens) for name in places} == places
    assert ours.encode("a<|eot_id|>", add_special_tokens=False).ids == [
        small_tokens.index(b"a"),
        len(small_tokens) + 9,
    ]
    assert ours.encode("a", "b").ids[::2] == [len(small_tokens)] * 2


def auto_tokenizer(folder: Path, files: dict[str, bytes], model_type: str | None) -> Any:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("model_type", [None, "llama"])
def test_transformers_loads_the_directory(small_tokens: list[bytes], tmp_path: Path, model_type: str | None) -> None:
    data = rank_file(small_tokens)
    loaded = auto_tokenizer(tmp_path, {**tiktoken_to_hf(LLAMA_3, data), "tokenizer.model": data}, model_type)

    for text in STRINGS:
        encoded = loaded(text)
        assert encoded["input_ids"] == [len(small_tokens), *bpe_by_rank(small_tokens, text)], text
        assert set(encoded) == {"input_ids", "attention_mask"}
        assert loaded.decode(encoded["input_ids"], skip_special_tokens=True) == text
    assert (loaded.bos_token_id, loaded.eos_token_id) == (len(small_tokens), len(small_tokens) + 1)
    assert loaded.chat_template is None
    assert loaded.model_max_length > 1 << 40


def test_the_reverse_is_byte_exact(llama3_tokens: list[bytes]) -> None:
    data = rank_file(llama3_tokens)

    assert hf_to_tiktoken(LLAMA_3, tiktoken_to_hf(LLAMA_3, data)["tokenizer.json"]) == data


def test_the_reverse_is_byte_exact_after_the_tokenizers_package_wrote_the_file(small_tokens: list[bytes]) -> None:
    data = rank_file(small_tokens)

    assert hf_to_tiktoken(LLAMA_3, converted(tiktoken_to_hf(LLAMA_3, data)).to_str(pretty=True).encode()) == data


def test_lines_may_come_in_any_order_and_the_reverse_sorts_them(small_tokens: list[bytes]) -> None:
    data = rank_file(small_tokens)
    shuffled = data.splitlines(keepends=True)
    random.Random(3).shuffle(shuffled)

    assert tiktoken_to_hf(LLAMA_3, b"\n".join(shuffled)) == tiktoken_to_hf(LLAMA_3, data)


def test_no_file_asks_for_token_types_or_changes_decoded_text(small_tokens: list[bytes], llama2: bytes) -> None:
    for files in (tiktoken_to_hf(LLAMA_3, rank_file(small_tokens)), sentencepiece_to_hf(llama2)):
        config = json.loads(files["tokenizer_config.json"])

        assert config["model_input_names"] == ["input_ids", "attention_mask"]
        assert config["clean_up_tokenization_spaces"] is False
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_files_do_not_depend_on_anything_but_the_input(small_tokens: list[bytes]) -> None:
    assert tiktoken_to_hf(LLAMA_3, rank_file(small_tokens)) == tiktoken_to_hf(LLAMA_3, rank_file(small_tokens))


def test_an_embedding_with_more_rows_fits_and_one_with_fewer_does_not(small_tokens: list[bytes]) -> None:
    data = rank_file(small_tokens)
    enough = len(small_tokens) + 256

    assert tiktoken_to_hf(LLAMA_3, data, vocab_size=enough) == tiktoken_to_hf(LLAMA_3, data, vocab_size=enough + 64)
    with pytest.raises(ConfigError, match=f"at most {enough - 1} tokens.* found {enough}"):
        tiktoken_to_hf(LLAMA_3, data, vocab_size=enough - 1)


BYTES = [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "256 bytes"),
        (rank_file(BYTES[:-1]), "found none for 255"),
        (rank_file(BYTES) + b"YWI= 257\n", "found 257 for 256"),
        (rank_file(BYTES) + b"YWI= 255\n", "found"),
        (rank_file(BYTES) + b"AA== 256\n", "line 257.*second time"),
        (rank_file(BYTES) + b"YWI 256\n", "line 257"),
        (rank_file(BYTES) + b"YW?I 256\n", "line 257"),
        (rank_file(BYTES) + b" 256\n", "line 257"),
        (rank_file(BYTES) + b"YWI= -1\n", "line 257"),
        (rank_file(BYTES) + b"YWI= 256 x\n", "line 257"),
        (rank_file(BYTES) + b"YWI= " + b"9" * 5000, "line 257"),
        (rank_file(BYTES) + base64.b64encode(b"a" * 5000) + b" 256\n", "1 to 4096 bytes, found 5000"),
    ],
)
def test_malformed_ranks_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(CorruptFileError, match=message):
        tiktoken_to_hf(LLAMA_3, data)


def test_llama_4_s_ranks_are_refused() -> None:
    pairs = (bytes([a, b, c]) for a in range(256) for b in range(256) for c in range(4))
    tokens = [*BYTES, *(pair for _, pair in zip(range(200_000 - 256), pairs, strict=False))]

    with pytest.raises(ConfigError, match="Llama 4"):
        tiktoken_to_hf(LLAMA_3, rank_file(tokens))


# -- Llama 3: what has no tokenizer.model


Change = Callable[[dict[str, Any]], object]


def set_model(**changes: object) -> Change:
    return lambda document: document["model"].update(changes)


def set_pattern(pattern: str) -> Change:
    return lambda document: document["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": pattern})


def rename_token(old: str, new: str) -> Change:
    def change(document: dict[str, Any]) -> None:
        vocab = document["model"]["vocab"]
        vocab[new] = vocab.pop(old)

    return change


def swap_merges(document: dict[str, Any]) -> None:
    merges = document["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]


def add_token(name: str, index: int) -> Change:
    return lambda document: document["added_tokens"].append({"id": index, "content": name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_model(ignore_merges=False), "no `ignore_merges`"),
        (set_model(type="Unigram"), "Unigram"),
        (set_model(byte_fallback=True), "byte_fallback"),
        (set_model(unk_token="<unk>"), "unk_token"),
        (set_model(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (set_pattern(GPT2_PATTERN), "pre-tokenizer other than Llama 3's"),
        (set_pattern(LLAMA3_PATTERN.replace("{1,3}", "")), "pre-tokenizer other than Llama 3's"),
        (lambda document: document.update(pre_tokenizer=None), "pre-tokenizer other than Llama 3's"),
        (lambda document: document["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "pre-tokenizer"),
        (lambda document: document["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True), "pre-tokenizer"),
        (lambda document: document.update(normalizer={"type": "NFC"}), "normalizer"),
        (lambda document: document["model"]["merges"].pop(), "1 of .* splits are not merges"),
        (lambda document: document["model"]["merges"].append("! !"), "1 merges are no splits"),
        (lambda document: document["model"]["merges"].append(document["model"]["merges"][-1]), "repeated"),
        (swap_merges, "order of the ids"),
        (rename_token("!", "世"), "outside the byte alphabet: '世'"),
        (rename_token("!", ""), "outside the byte alphabet"),
        (lambda document: document["model"]["vocab"].pop("in"), "holes in the ids"),
        (lambda document: document["model"]["vocab"].update({"in": 0}), "more than one token"),
        (add_token("in", 256), "holes in the ids"),
    ],
)
def test_a_tokenizer_that_tiktoken_would_not_follow_is_refused_with_the_reason(change: Change, message: str) -> None:
    document = json.loads(
        tiktoken_to_hf(LLAMA_3, rank_file([*BYTES, b"in", b"ing", b"the", b" t", b"he"]))["tokenizer.json"]
    )
    assert document["model"]["vocab"]["in"] == 256
    change(document)

    with pytest.raises(ConfigError, match=message):
        hf_to_tiktoken(LLAMA_3, json.dumps(document).encode())


def test_all_reasons_come_at_once() -> None:
    document = json.loads(tiktoken_to_hf(LLAMA_3, rank_file(BYTES))["tokenizer.json"])
    set_model(ignore_merges=False)(document)
    set_pattern(GPT2_PATTERN)(document)

    with pytest.raises(ConfigError, match=r"ignore_merges.*pre-tokenizer"):
        hf_to_tiktoken(LLAMA_3, json.dumps(document).encode())


def test_a_byte_level_bpe_as_the_tokenizers_package_trains_it_is_refused() -> None:
    trained = Tokenizer(models.BPE(ignore_merges=True))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(corpus(5), trainer)

    with pytest.raises(ConfigError, match="splits are not merges"):
        hf_to_tiktoken(LLAMA_3, trained.to_str().encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"{",
        b"[" * 100_000,
        b"{}",
        b'{"model": []}',
        b'{"model": {"vocab": []}}',
        b'{"model": {"vocab": {"a": "0"}, "merges": []}}',
        b'{"model": {"vocab": {"a": true}, "merges": []}}',
        b'{"model": {"vocab": {"a": 0}}}',
        b'{"model": {"vocab": {"a": 0}, "merges": ["a"]}}',
        b'{"model": {"vocab": {"a": 0}, "merges": [["a", 1]]}}',
        b'{"added_tokens": [{"id": 1}], "model": {"vocab": {"a": 0}, "merges": []}}',
        b'{"added_tokens": 7, "model": {"vocab": {"a": 0}, "merges": []}}',
        b'{"model": {"vocab": {"a": ' + b"9" * 5000 + b"}}}",
    ],
)
def test_malformed_json_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json: expected .* found"):
        hf_to_tiktoken(LLAMA_3, data)


def test_an_added_token_may_stand_in_the_vocabulary_too() -> None:
    data = rank_file([*BYTES, b"in"])
    document = json.loads(tiktoken_to_hf(LLAMA_3, data)["tokenizer.json"])
    document["model"]["vocab"].update({token["content"]: token["id"] for token in document["added_tokens"]})

    assert hf_to_tiktoken(LLAMA_3, json.dumps(document).encode()) == data


# -- SentencePiece


def train_sentencepiece(lines: list[str], **changes: Any) -> bytes:
    """As Llama 2's was trained, but small."""
    arguments: dict[str, Any] = {
        "vocab_size": 1200,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "split_digits": True,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.9995,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **(arguments | changes))
    return model.getvalue()


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return [line.rstrip("\n") for line in corpus(25)]


@pytest.fixture(scope="module")
def llama2(lines: list[str]) -> bytes:
    return train_sentencepiece(lines)


def parsed(data: bytes) -> Any:
    protos: Any = sentencepiece_model_pb2
    proto = protos.ModelProto()
    proto.ParseFromString(data)
    return proto


def edit(data: bytes, change: Callable[[Any], object]) -> bytes:
    proto = parsed(data)
    change(proto)
    return bytes(proto.SerializeToString())


def assert_ids_equal_sentencepiece(data: bytes, texts: list[str]) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    ours = converted(sentencepiece_to_hf(data))
    for text in texts:
        assert ours.encode(text).ids == theirs.encode(text, add_bos=True), text


TEXTS = [*STRINGS, *random_strings(3000, seed=1)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vocab_size": 3000},
        {"byte_fallback": False},
        {"add_dummy_prefix": False},
        {"pad_id": 3},
        {"control_symbols": ["[INST]"]},
    ],
    ids=str,
)
def test_ids_equal_sentencepiece(lines: list[str], changes: dict[str, Any]) -> None:
    texts = [text for text in TEXTS if "[INST]" not in text]

    assert_ids_equal_sentencepiece(train_sentencepiece(lines, **changes), [*texts, *lines[::40]])


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_ids_equal_sentencepiece_on_any_text(llama2: bytes, text: str) -> None:
    if not any(token in text for token in ("<s>", "</s>", "<unk>")):
        assert_ids_equal_sentencepiece(llama2, [text])


def test_bytes_stand_in_for_what_is_no_piece(llama2: bytes) -> None:
    ours = converted(sentencepiece_to_hf(llama2))

    assert ours.encode("😀").tokens == ["<s>", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]


def test_text_that_spells_a_byte_piece_is_text(llama2: bytes) -> None:
    ours = converted(sentencepiece_to_hf(llama2))

    assert "<0x0A>" not in ours.encode("<0x0A>").tokens
    assert "<0x0A>" in ours.encode("\n").tokens


def test_pieces_never_join_to_a_byte_or_control_piece(llama2: bytes) -> None:
    def change(proto: Any) -> None:
        for score, text in enumerate(["<0", "0A>", "x0A>", "<0x0", "/s", "</s"], start=90_000):
            proto.pieces.add(piece=text, score=-float(score))

    data = edit(llama2, change)
    merges = json.loads(sentencepiece_to_hf(data)["tokenizer.json"])["model"]["merges"]

    assert {"<0 x0A>", "<0x0 A>", "</s >"}.isdisjoint(merges)
    assert "x 0A>" in merges
    assert_ids_equal_sentencepiece(data, ["<0x0A>", "a<0x0A><0x0A>b"])


def test_decoding_gives_the_text_back_as_sentencepiece_does(llama2: bytes) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=llama2)
    ours = converted(sentencepiece_to_hf(llama2))

    for text in STRINGS:
        assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs.encode(text)), text


def one_score_for_runs(char: str) -> Callable[[Any], object]:
    """As in Mistral's tokenizer.model: every run of spaces has one score, below all others."""

    def change(proto: Any) -> None:
        for piece in proto.pieces:
            if piece.piece and set(piece.piece) == {char}:
                piece.score = -1e9

    return change


def test_runs_of_spaces_with_one_score_follow_sentencepiece(lines: list[str]) -> None:
    # Llama and Mistral split text at spaces when they are trained: then no piece has two and something else.
    data = edit(train_sentencepiece(lines), one_score_for_runs("▁"))
    runs = [" " * n for n in range(1, 130)]
    chosen = random.Random(4)
    mixed = ["".join(chosen.choices([*runs[:40], "a", "1", "return", "\n", "é"], k=8)) for _ in range(500)]

    assert sum(piece.score == -1e9 for piece in parse_model(data).pieces) > 4
    assert_ids_equal_sentencepiece(data, [*TEXTS, *runs, *mixed, *("x" + run + "y" for run in runs)])


@given(st.sets(st.integers(2, 20), min_size=1, max_size=10))
@settings(max_examples=60, deadline=None)
def test_runs_of_any_lengths_with_one_score_follow_sentencepiece(llama2: bytes, lengths: set[int]) -> None:
    def change(proto: Any) -> None:
        kept = [piece for piece in proto.pieces if "▁▁" not in piece.piece]
        added = [type(kept[0])(piece="▁" * length, score=-1e9) for length in sorted(lengths)]
        del proto.pieces[:]
        proto.pieces.extend(kept + added)

    assert_ids_equal_sentencepiece(edit(llama2, change), [" " * n for n in range(1, 90)])


@pytest.mark.parametrize("model_type", [None, "llama", "mistral"])
def test_transformers_loads_the_sentencepiece_directory(llama2: bytes, tmp_path: Path, model_type: str | None) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=llama2)
    loaded = auto_tokenizer(tmp_path, {**sentencepiece_to_hf(llama2), "tokenizer.model": llama2}, model_type)

    for text in STRINGS:
        encoded = loaded(text)
        assert encoded["input_ids"] == theirs.encode(text, add_bos=True), text
        assert set(encoded) == {"input_ids", "attention_mask"}
        assert loaded.decode(encoded["input_ids"], skip_special_tokens=True) == theirs.decode(theirs.encode(text))
    assert (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert loaded.pad_token is None
    assert loaded.chat_template is None


def test_user_defined_symbols_are_found_and_said_to_differ_in_spaces(lines: list[str]) -> None:
    data = train_sentencepiece(lines, user_defined_symbols=["[REF]"])
    made = translation.generated_for_hf(LLAMA_3, data)
    ours = converted(made.files)

    assert_ids_equal_sentencepiece(data, [*TEXTS, "a[REF]"])
    assert "".join(ours.encode("a[REF]b").tokens) == "<s>▁a[REF]▁b"
    assert ours.decode(ours.encode("a[REF]").ids) == "a[REF]"
    assert "user-defined" in made.notices[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizer 'nmt_nfkc' instead of identity"),
        ({"model_type": "unigram", "vocab_size": 600}, "unigram instead of BPE"),
        ({"model_type": "char"}, "char instead of BPE"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"user_defined_symbols": ["▁<PRE>"]}, "user-defined symbols with spaces"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_settings_than_llamas_are_refused(lines: list[str], changes: dict[str, Any], message: str) -> None:
    data = train_sentencepiece(lines[:4000], **changes)

    with pytest.raises(ConfigError, match=message):
        sentencepiece_to_hf(data)


def test_equal_scores_are_refused_where_the_order_matters(llama2: bytes) -> None:
    def change(proto: Any) -> None:
        for piece in proto.pieces:
            if piece.piece in ("in", "re"):
                piece.score = 0.0

    with pytest.raises(ConfigError, match=r"equal scores.*'in'"):
        sentencepiece_to_hf(edit(llama2, change))


def test_pieces_of_characters_that_are_no_pieces_are_refused(llama2: bytes) -> None:
    def change(proto: Any) -> None:
        proto.pieces.add(piece="世界", score=-1.5)

    with pytest.raises(ConfigError, match="characters that are no pieces: '世', '界'"):
        sentencepiece_to_hf(edit(llama2, change))


def test_unused_pieces_and_unescaped_spaces_are_refused_together(llama2: bytes) -> None:
    def change(proto: Any) -> None:
        proto.pieces[400].type = 5
        proto.normalizer_spec.escape_whitespaces = False

    with pytest.raises(ConfigError, match=r"escape_whitespaces.*unused pieces"):
        sentencepiece_to_hf(edit(llama2, change))


def test_a_smaller_embedding_is_refused(llama2: bytes) -> None:
    with pytest.raises(ConfigError, match=r"at most 1199 tokens.* found 1200"):
        sentencepiece_to_hf(llama2, vocab_size=1199)


def test_the_proto_is_read_as_protobuf_reads_it(llama2: bytes) -> None:
    proto = parsed(llama2)
    model = parse_model(llama2)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec

    assert [(p.text, p.score, p.type) for p in model.pieces] == [(p.piece, p.score, p.type) for p in proto.pieces]
    assert (model.unk_id, model.bos_id, model.eos_id, model.pad_id) == (
        trainer.unk_id,
        trainer.bos_id,
        trainer.eos_id,
        trainer.pad_id,
    )
    assert (model.model_type, model.byte_fallback, model.whitespace_suffix) == (
        trainer.model_type,
        trainer.byte_fallback,
        trainer.treat_whitespace_as_suffix,
    )
    assert (model.normalizer, model.dummy_prefix, model.remove_extra_whitespaces, model.escape_whitespaces) == (
        normalizer.name,
        normalizer.add_dummy_prefix,
        normalizer.remove_extra_whitespaces,
        normalizer.escape_whitespaces,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda proto: proto.pieces.add(piece="in", score=0.0), "once"),
        (lambda proto: proto.pieces.add(piece="", score=0.0), "text of 1 to"),
        (lambda proto: proto.pieces.add(piece="x" * 5000, score=0.0), "text of 1 to"),
        (lambda proto: proto.pieces.add(piece="xyzzy", score=float("nan")), "finite score"),
        (lambda proto: proto.pieces.add(piece="<unk2>", score=0.0, type=2), "one unknown piece"),
        (lambda proto: setattr(proto.trainer_spec, "bos_id", 9999), "bos"),
        (lambda proto: setattr(proto.trainer_spec, "eos_id", 400), "eos"),
        (lambda proto: proto.pieces.__delitem__(10), "256 bytes"),
        (lambda proto: proto.ClearField("pieces"), "pieces"),
    ],
)
def test_models_that_contradict_themselves_are_refused(llama2: bytes, change: Change, message: str) -> None:
    with pytest.raises(CorruptFileError, match=message):
        sentencepiece_to_hf(edit(llama2, change))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_damaged_models_are_refused_and_nothing_else_happens(llama2: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(llama2) - 1))
    damaged = bytearray(llama2[: data.draw(st.sampled_from([at, len(llama2)]))])
    if at < len(damaged):
        damaged[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InputError):
        assert set(sentencepiece_to_hf(bytes(damaged))) == {"tokenizer.json", "tokenizer_config.json"}


# -- Both


def test_kinds_are_told_by_their_first_bytes(llama2: bytes, small_tokens: list[bytes]) -> None:
    assert translation.tokenizer_kind(rank_file(small_tokens)) == "tiktoken"
    assert translation.tokenizer_kind(rank_file(small_tokens).replace(b"\n", b"\r\n")) == "tiktoken"
    assert translation.tokenizer_kind(llama2) == "sentencepiece"
    for other in (b"", b"\n", b"{}", b"hello world\n", b"\x80\x02}", b"PK\x03\x04", b"a" * (1 << 20)):
        assert translation.tokenizer_kind(other) == "unknown"


def test_files_for_hf_from_ranks_come_with_what_was_assumed(small_tokens: list[bytes]) -> None:
    size = len(small_tokens) + 256
    made = translation.generated_for_hf(LLAMA_3, rank_file(small_tokens), size)

    assert made.files == tiktoken_to_hf(LLAMA_3, rank_file(small_tokens))
    assert set(made.files) == {"tokenizer.json", "tokenizer_config.json"}
    assert "Llama 3.1's names" in made.notices[0]
    assert f"{len(small_tokens)} tokens where Llama 3's has 128000" in made.notices[1]
    assert "rows behind" in translation.generated_for_hf(LLAMA_3, rank_file(small_tokens), size + 64).notices[2]


def test_files_for_hf_from_sentencepiece_need_no_notice(llama2: bytes) -> None:
    made = translation.generated_for_hf(LLAMA_3, llama2, 1200)

    assert made == translation.GeneratedTokenizer(sentencepiece_to_hf(llama2), ())
    assert "1200 tokens, the embedding 1264 rows" in translation.generated_for_hf(LLAMA_3, llama2, 1264).notices[0]


@pytest.mark.parametrize("data", [b"", b"{}", b"YQ== 0\n", b"\x0a\x03\x0a\x01a"])
def test_what_cannot_be_translated_gives_no_files_and_the_reason(data: bytes) -> None:
    made = translation.generated_for_hf(LLAMA_3, data, 1000)

    assert made.files == {}
    assert len(made.notices) == 1
    assert made.notices[0].startswith("no tokenizer.json was made: tokenizer.model: expected")


def test_the_model_for_meta_comes_from_tokenizer_json(small_tokens: list[bytes]) -> None:
    data = rank_file(small_tokens)

    assert translation.generated_for_meta(LLAMA_3, tiktoken_to_hf(LLAMA_3, data)) == translation.GeneratedTokenizer(
        {"tokenizer.model": data}
    )


def test_a_model_that_is_there_is_not_made_again(small_tokens: list[bytes]) -> None:
    files = {**tiktoken_to_hf(LLAMA_3, rank_file(small_tokens)), "tokenizer.model": b"as it was"}

    assert translation.generated_for_meta(LLAMA_3, files) == translation.GeneratedTokenizer({})


@pytest.mark.parametrize("files", [{}, {"vocab.json": b"{}"}, {"tokenizer.json": b"{}"}, {"tokenizer.json": b"\xff"}])
def test_no_model_for_meta_comes_with_the_reason(files: dict[str, bytes]) -> None:
    made = translation.generated_for_meta(LLAMA_3, files)

    assert made.files == {}
    assert len(made.notices) == 1
    assert made.notices[0].startswith("no tokenizer.model was made: ")


def test_a_sentencepiece_tokenizer_json_gives_no_model_for_meta(llama2: bytes) -> None:
    assert translation.generated_for_meta(LLAMA_3, sentencepiece_to_hf(llama2)).files == {}


def test_special_tokens_that_meta_does_not_know_are_named() -> None:
    document = json.loads(tiktoken_to_hf(LLAMA_3, rank_file(BYTES))["tokenizer.json"])
    document["added_tokens"][2]["content"] = "<|im_start|>"
    document["added_tokens"][4]["content"] = "<|reserved_special_token_2|>"  # Llama 3's name for it
    document["added_tokens"].append({"id": 512, "content": "<|image|>"})
    made = translation.generated_for_meta(LLAMA_3, {"tokenizer.json": json.dumps(document).encode()})

    assert made.files == {"tokenizer.model": rank_file(BYTES)}
    [notice] = made.notices
    assert "<|im_start|> (258), <|image|> (512) of" in notice


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, ckpt_convert.tokenizer.translation, ckpt_convert.checkpoint.checklist; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert {"torch", "transformers", "tokenizers", "sentencepiece", "google.protobuf"}.isdisjoint(modules)
