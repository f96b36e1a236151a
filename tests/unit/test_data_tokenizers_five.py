"""All five algorithms: exact round trip, the ids of plain AutoTokenizer, and what can go wrong."""

import json
import os
import random
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizing import train_tokenizer
from transformers import AutoTokenizer

from llmkit.data.tokenizers import (
    LightTokenizer,
    encode_documents,
    eos_id,
    fingerprint,
    learn,
    load_tokenizer,
    open_tokenizer,
    pieces,
    special_ids,
)
from llmkit.data.tokenizers.learn import within_memory
from llmkit.data.tokenizers.measure import measure_tokenizer
from llmkit.data.tokenizers.patterns import portions
from llmkit.errors import DataError, MissingError, RecipeError
from llmkit.recipe.schema import TextForm, Tokenize

ALGORITHMS = ("bpe", "wordpiece", "unigram", "chars", "words")
BERT = ("wordpiece", "chars")

CHINESE = """
晋太元中，武陵人捕鱼为业。缘溪行，忘路之远近。忽逢桃花林，夹岸数百步，中无杂树，芳草鲜美，落英缤纷。渔人甚异之，复前行，欲穷其林。
林尽水源，便得一山，山有小口，仿佛若有光。便舍船，从口入。初极狭，才通人。复行数十步，豁然开朗。土地平旷，屋舍俨然，有良田美池桑竹之属。
阡陌交通，鸡犬相闻。其中往来种作，男女衣着，悉如外人。黄发垂髫，并怡然自乐。见渔人，乃大惊，问所从来。具答之。便要还家，设酒杀鸡作食。
山不在高，有仙则名。水不在深，有龙则灵。斯是陋室，惟吾德馨。苔痕上阶绿，草色入帘青。谈笑有鸿儒，往来无白丁。可以调素琴，阅金经。
庆历四年春，滕子京谪守巴陵郡。越明年，政通人和，百废具兴。乃重修岳阳楼，增其旧制，刻唐贤今人诗赋于其上。属予作文以记之。
予观夫巴陵胜状，在洞庭一湖。衔远山，吞长江，浩浩汤汤，横无际涯；朝晖夕阴，气象万千。此则岳阳楼之大观也，前人之述备矣。
若夫淫雨霏霏，连月不开，阴风怒号，浊浪排空；日星隐曜，山岳潜形；商旅不行，樯倾楫摧；薄暮冥冥，虎啸猿啼。
至若春和景明，波澜不惊，上下天光，一碧万顷；沙鸥翔集，锦鳞游泳；岸芷汀兰，郁郁青青。不以物喜，不以己悲；先天下之忧而忧，后天下之乐而乐。
语言模型的训练从原始文本开始。我们先学习分词器，再把文本变成编号，最后让模型预测下一个编号。分词器决定了模型看到的世界。
如果分词器不能还原文本，模型就会丢失信息。所以我们要求每一段文本都能准确地还原，包括空格、换行和标点符号。
今天天气很好，我们去公园散步。公园里有很多人，有的人在跑步，有的人在下棋，还有孩子们在放风筝。我们在湖边坐了一会儿，看见了几只白色的水鸟。
北京是中国的首都，上海是中国最大的城市之一。每年有很多人从世界各地来到中国旅游，他们喜欢中国的历史、文化和美食。
计算机科学是一门研究计算的学科。程序员用编程语言写程序，计算机按照程序执行任务。人工智能的发展离不开数据、算法和算力。
她从小喜欢读书，长大以后在图书馆工作。每天早上八点她走路去上班，晚上六点回家。周末的时候，她常常和朋友们一起去爬山。
""".strip()


def english(most_chars=150_000):
    lines = []
    for name in ("textwrap", "argparse", "statistics", "ast", "dis", "string", "heapq"):
        path = Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py"
        lines += path.read_text(encoding="utf-8").split("\n\n")
    kept, total = [], 0
    for part in lines:
        total += len(part)
        if total > most_chars:
            break
        kept.append(part)
    return kept


ENGLISH = english()
CORPUS = [*ENGLISH, *CHINESE.splitlines()]

TRICKY = [
    "",
    " ",
    "#",
    "##",
    "a##b ##c ### #",
    "\u2581<0x41>\u2582\u2583",
    "<|endoftext|><|pad|><|unk|><|user|> [PAD][UNK] [CLS][SEP][MASK]",
    "从前有座山，山里有座庙。龘靐齉，𠮷野家、㐀。",
    "def f(x):\n\treturn {'a': [1, 2.5e-3]}  # 中文##\r\n\r\n\n   \n",
    "😀👩‍👩‍👧 e\u0301\u0302 \u00e9 \ufb01 ½ Ⅷ",
    "\x00\x01\x7f\x85\u2028\u3000\u00a0\u200b\ufeff\uffff\U0010ffff",
    "Ġthe Ċ ĉ âĢĻ",
    "مرحبا नमस्ते 한국어 ภาษาไทย ひらがなカタカナー々〇",
    "don't I'LL 'ſ",
    "x" * 100_000,
    "中" * 50_000 + "a" * 3,
    " " * 50_000 + "\n" * 50_000 + "\t" * 50_000,
    "#" * 50_000 + "!" * 50_000,
    "e\u0301" * 20_000,
]


def spec_of(algorithm, **changes):
    return Tokenize(**{"algorithm": algorithm, "vocab_size": 1800, "special_tokens": ["<|user|>"], **changes})


def ids_of(text, tokenizer):
    ((_, ids),) = encode_documents([text], tokenizer)
    return ids.tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in ALGORITHMS}
    figures = {
        name: learn(CORPUS, CORPUS[::7], spec_of(name), folder, 64) for name, folder in folders.items()
    }
    return folders, figures


@pytest.fixture(scope="module", params=ALGORITHMS)
def one(request, made):
    folders, figures = made
    folder = folders[request.param]
    return request.param, AutoTokenizer.from_pretrained(str(folder)), open_tokenizer(str(folder)), figures


def check_exact(text, plain, light):
    ids = ids_of(text, light)
    assert light.decode(ids) == text
    assert plain.decode(ids, skip_special_tokens=False) == text
    assert not set(ids) & set(light.all_special_ids)
    assert ids == plain(text, split_special_tokens=True, verbose=False)["input_ids"]
    return ids


@pytest.mark.parametrize("text", TRICKY, ids=lambda text: repr(text[:12]))
def test_every_text_comes_back_and_plain_auto_tokenizer_gives_the_same_ids(one, text):
    _, plain, light, _ = one
    check_exact(text, plain, light)


SNIPPETS = [
    "#",
    "##",
    " ",
    "\n",
    "\r",
    "中",
    "文章",
    "the",
    "'s",
    "1",
    "e\u0301",
    "😀",
    "<|",
    "|>",
    "[",
    "SEP]",
    "\u2581",
]
ANY_TEXT = st.lists(
    st.one_of(st.sampled_from(SNIPPETS), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
    max_size=30,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
@example("a\r##\u2028 <|endoftext|>")
def test_any_text_comes_back(made, text):
    for name, folder in made[0].items():
        plain, light = _opened(name, folder)
        ids = check_exact(text, plain, light)
        found = pieces(light, text)
        assert [piece.id for piece in found] == ids
        assert b"".join(_raw(piece) for piece in found) == text.encode()
        assert [piece.start for piece in found[1:]] == [piece.end for piece in found[:-1]]


_OPENED = {}


def _opened(name, folder):
    if name not in _OPENED:
        _OPENED[name] = (AutoTokenizer.from_pretrained(str(folder)), open_tokenizer(str(folder)))
    return _OPENED[name]


def _raw(piece):
    return piece.content if isinstance(piece.content, bytes) else piece.content.encode()


def test_long_texts_are_encoded_in_parts_with_the_same_ids(one):
    _, plain, light, _ = one
    for text in (
        "\n".join(CORPUS[-200:]),
        CHINESE * 3,
        "don't " * 2000,
        "x" * 3000 + " y",
        "ab1.5e\u0301. z\u0301",
    ):
        whole = plain(text, split_special_tokens=True, verbose=False)["input_ids"]
        for size in (7, 1000, 20_000):
            ((_, ids),) = encode_documents([text], light, batch_chars=size)
            assert ids.tolist() == whole
    parts = list(portions("\n".join(CORPUS), 1000))
    assert "".join(parts) == "\n".join(CORPUS)
    assert 900 < len("".join(parts)) / len(parts) < 1100


def test_light_loader_equals_auto_tokenizer(one):
    name, plain, light, _ = one
    assert isinstance(light, LightTokenizer)
    assert fingerprint(light) == fingerprint(plain)
    assert light.special_tokens_map == plain.special_tokens_map
    assert light.get_vocab() == plain.get_vocab()
    assert len(light) == len(plain)
    assert light.all_special_ids == sorted(plain.all_special_ids)
    assert special_ids(light) == special_ids(plain)
    assert eos_id(light) == plain.eos_token_id
    assert plain.model_max_length == 64
    assert plain.convert_ids_to_tokens(range(3)) == (
        ["[PAD]", "[UNK]", "[CLS]"] if name in BERT else ["<|endoftext|>", "<|pad|>", "<|user|>"]
    )
    assert (plain.eos_token, plain.bos_token) == (
        ("[SEP]", "[CLS]") if name in BERT else ("<|endoftext|>",) * 2
    )


def test_figures(one):
    name, _, light, all_figures = one
    figures = all_figures[name]
    measured = CORPUS[::7]
    num_tokens = sum(len(ids_of(text, light)) for text in measured)
    assert figures["round_trip"] is True
    assert figures["round_trip_documents"] == len(measured)
    assert figures["unknown_ratio"] == 0
    assert figures["vocab_size"] == len(light) <= 1800
    assert figures["chars_per_token"] == round(sum(map(len, measured)) / num_tokens, 4)
    assert figures["bytes_per_token"] == round(sum(len(t.encode()) for t in measured) / num_tokens, 4)
    han = [text for text in measured if "。" in text]
    assert figures["han_documents"] == len(han) == 2
    han_tokens = sum(len(ids_of(text, light)) for text in han)
    assert figures["han_chars_per_token"] == round(sum(map(len, han)) / han_tokens, 4)
    assert all(figures["splits"])
    assert len(set(light.get_vocab().values())) == len(light)
    json.dumps(figures)
    # So little text cannot tell which entries are of no use.
    assert num_tokens < 10 * len(light)
    assert "used_ratio" not in figures


def test_what_the_vocabulary_is_used_for(one):
    name, _, light, _ = one
    measured = CORPUS * (20 * len(light) // sum(len(ids_of(text, light)) for text in CORPUS) + 1)
    figures = measure_tokenizer(light, measured)
    used = {number for text in CORPUS for number in ids_of(text, light)}
    assert figures["used_ratio"] == round(len(used) / len(light), 4)
    # Beginnings and continuations (`##`) are shown alike.
    for entry in figures["wasteful_tokens"] if name not in ("wordpiece", "chars") else ():
        assert not any(entry.encode() == _raw(p) for text in CORPUS for p in pieces(light, text)), (
            name,
            entry,
        )


def test_fertility_is_that_of_a_sensible_tokenizer(made, tmp_path):
    assert all(made[1][name]["latin_chars_per_token"] > 2.5 for name in ALGORITHMS)
    for name in ALGORITHMS:
        figures = learn([CHINESE], [], spec_of(name), tmp_path)
        assert figures["han_chars_per_token"] > (0.75 if name in ("bpe", "wordpiece") else 0.95), name
    assert figures["jieba_recall"] > 0.99
    light = open_tokenizer(str(tmp_path))
    assert [piece.content for piece in pieces(light, "我们有很多人")] == ["我们", "有", "很多", "人"]


def test_order_of_documents_does_not_matter(made, tmp_path):
    for name, folder in made[0].items():
        other = tmp_path / name
        other.mkdir()
        train_tokenizer(
            random.Random(3).sample(CORPUS, len(CORPUS)), spec_of(name), folder=other, max_length=64
        )
        assert (other / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes(), name


def test_another_process_learns_the_same_on_any_number_of_cores(made, tmp_path):
    script = (
        "import json, sys; from pathlib import Path; from llmkit.data.tokenizers import learn\n"
        "from llmkit.recipe.schema import Tokenize\n"
        "for name, folder in json.loads(sys.argv[1]).items():\n"
        "    Path(folder).mkdir()\n"
        "    learn(json.loads(sys.argv[2]), [], Tokenize(algorithm=name, vocab_size=900), Path(folder))\n"
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules\n"
    )
    texts = [*CORPUS[:40], *CHINESE.splitlines()]
    written = []
    for seed, cores in (("1", "1"), ("2", "2")):
        folders = {name: str(tmp_path / f"{name}{seed}") for name in ALGORITHMS}
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": cores}
        command = [sys.executable, "-c", script, json.dumps(folders), json.dumps(texts)]
        subprocess.run(command, check=True, env=environment)
        written.append([(Path(folder) / "tokenizer.json").read_bytes() for folder in folders.values()])
    assert written[0] == written[1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("text", ["a", "中", "\n", "aaaa bbbb aaaa", "中中 \U0010ffff"])
def test_tiny_text(algorithm, byte_fallback, text, tmp_path):
    figures = learn([text], [], spec_of(algorithm, byte_fallback=byte_fallback), tmp_path)
    assert figures["measured_on"] == "the sample"
    assert figures["round_trip"] is True
    assert "fewer than the 1,800 asked for" in figures["note"]
    assert figures["vocab_size"] == len(open_tokenizer(str(tmp_path)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_endless_word(algorithm, tmp_path):
    text = "".join(random.Random(0).choices("ACGTacgt", k=60_000))
    assert learn([text], [], spec_of(algorithm), tmp_path)["round_trip"] is True


@pytest.mark.parametrize("algorithm", ["wordpiece", "unigram", "chars", "words"])
def test_without_byte_fallback_the_rare_is_unknown(algorithm, tmp_path):
    figures = learn(CORPUS, ["the 😀 of", *CORPUS[:5]], spec_of(algorithm, byte_fallback=False), tmp_path)
    light, plain = open_tokenizer(str(tmp_path)), load_tokenizer(str(tmp_path))
    assert fingerprint(light) == fingerprint(plain)
    ids = ids_of("the 😀 of", light)
    assert plain.unk_token_id in ids
    assert plain.decode(ids).startswith("the")
    assert plain.decode(ids).endswith("of")
    assert figures["unknown_ratio"] > 0
    assert figures["round_trip_failures"] >= 1
    assert (
        "'😀 of'" in figures["round_trip_first_failure"] or "' 😀 of'" in figures["round_trip_first_failure"]
    )
    for text in CORPUS[:40]:
        if plain.unk_token_id not in ids_of(text, light):
            assert light.decode(ids_of(text, light)) == text
    assert not {plain.pad_token_id, plain.eos_token_id} & set(
        ids_of("a<|pad|> [PAD] [SEP] <|endoftext|>", light)
    )


def test_bpe_always_spells_by_bytes(tmp_path):
    learn(CORPUS, [], spec_of("bpe", byte_fallback=False), tmp_path)
    light = open_tokenizer(str(tmp_path))
    assert light.decode(ids_of("龘😀", light)) == "龘😀"


def test_chars_gives_each_han_character_one_token(tmp_path):
    learn([CHINESE], [], spec_of("chars"), tmp_path)
    light = open_tokenizer(str(tmp_path))
    han = [char for char in CHINESE if "\u4e00" <= char <= "\u9fff"]
    shown = [piece.content for piece in pieces(light, CHINESE)]
    assert [piece for piece in shown if isinstance(piece, bytes) or piece[-1] in set(han)] == han
    # Rare ones are spelt by bytes, and no entry is spent on parts of them.
    rare = pieces(light, "龘")
    assert [piece.content for piece in rare] == [bytes([byte]) for byte in "龘".encode()]
    learn([CHINESE], [], spec_of("chars", vocab_size=540 + 8), tmp_path)
    small = open_tokenizer(str(tmp_path))
    most = sorted(set(han), key=lambda char: -CHINESE.count(char))[:10]
    assert all(len(ids_of(char, small)) == 1 for char in most)
    assert len(ids_of("髫", small)) == 3


def test_words_keeps_every_word_of_its_vocabulary_whole(made):
    light = open_tokenizer(str(made[0]["words"]))
    cut = light.backend_tokenizer.pre_tokenizer
    checked = 0
    for number in range(3, len(light)):
        word = light.decode([number])
        if (
            "\ufffd" not in word
            and len(cut.pre_tokenize_str(word)) == 1
            and not "\u4e00" <= word[0] <= "\u9fff"
        ):
            assert ids_of(word, light) == [number], word
            checked += 1
    assert checked > 1000


def test_words_without_rjieba(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rjieba", None)
    with pytest.raises(MissingError) as caught:
        learn([CHINESE], [], spec_of("words"), tmp_path)
    assert caught.value.hint == "pip install 'llmkit[zh]'"
    assert learn(ENGLISH, [], spec_of("words"), tmp_path)["round_trip"] is True


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_normalising(algorithm, tmp_path):
    form = TextForm(unicode="nfkc", lowercase=True, strip_accents=True)
    figures = learn(CORPUS, ["Ｃafé ﬁne ÉCOLE 한국"], spec_of(algorithm, normalise=form), tmp_path)
    assert figures["round_trip"] is True
    assert figures["round_trip_of"] == "normalised text"
    light, plain = open_tokenizer(str(tmp_path)), load_tokenizer(str(tmp_path))
    ids = ids_of("Ｃafé ﬁne ÉCOLE 한국", light)
    assert light.decode(ids) == plain.decode(ids) == "cafe fine ecole 한국"
    shown = pieces(light, "Ｃafé ﬁne")
    assert "".join(p.content for p in shown if isinstance(p.content, str)) == "Ｃafé ﬁne"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_chatml(algorithm, tmp_path):
    learn(CORPUS, [], spec_of(algorithm, chat_template="chatml"), tmp_path)
    plain = AutoTokenizer.from_pretrained(str(tmp_path))
    messages = [{"role": "user", "content": "你好 there"}, {"role": "assistant", "content": "Hi"}]
    text = plain.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\n你好 there<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
    asked = plain.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n")
    ids = plain(text)["input_ids"]
    start, end = plain.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(start), ids.count(end)) == (2, 2)
    assert plain.decode(ids) == text
    light = open_tokenizer(str(tmp_path))
    assert isinstance(light, LightTokenizer)
    assert not {start, end} & set(ids_of(text, light))


def test_a_chat_template_of_ones_own(tmp_path):
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}\n{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
    )
    learn(CORPUS, [], spec_of("bpe", chat_template="mine.jinja"), tmp_path, base=tmp_path)
    plain = AutoTokenizer.from_pretrained(str(tmp_path))
    assert plain.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    (tmp_path / "mine.jinja").write_text("{{ a }}\n{% for m in %}\n")
    with pytest.raises(RecipeError, match=r"mine\.jinja:2: .*not valid Jinja.*\n    \{% for m in %\}"):
        learn(CORPUS, [], spec_of("bpe", chat_template="mine.jinja"), tmp_path, base=tmp_path)
    with pytest.raises(MissingError, match="no such file"):
        learn(CORPUS, [], spec_of("bpe", chat_template="other.jinja"), tmp_path, base=tmp_path)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("token", "why"),
    [("the", "taken for it"), ("!", "taken for it"), ("<|é|>", "decoded"), (" ", "decoded")],
)
def test_special_tokens_that_cannot_be(algorithm, token, why, tmp_path):
    with pytest.raises(RecipeError, match=why):
        learn(["the ... cat"] * 9, [], spec_of(algorithm, special_tokens=[token]), tmp_path)


def test_a_special_token_in_any_script(tmp_path):
    for algorithm in ALGORITHMS:
        learn(CORPUS, [], spec_of(algorithm, special_tokens=["<|用户|>"]), tmp_path)
        plain = AutoTokenizer.from_pretrained(str(tmp_path))
        assert plain.decode(plain("a<|用户|>b")["input_ids"]) == "a<|用户|>b"
        assert plain.convert_tokens_to_ids("<|用户|>") in plain("a<|用户|>b")["input_ids"]


def test_what_no_text_can_make_work(tmp_path):
    with pytest.raises(
        RecipeError, match="511 bytes as beginnings and as continuations and 6 special tokens need 517"
    ):
        learn(CORPUS, [], spec_of("wordpiece", vocab_size=516), tmp_path)
    assert learn(CORPUS, [], spec_of("wordpiece", vocab_size=517), tmp_path)["round_trip"] is True
    assert learn(CORPUS, [], spec_of("unigram", vocab_size=259), tmp_path)["round_trip"] is True
    with pytest.raises(RecipeError, match="more than can be counted"):
        learn(CORPUS, [], spec_of("bpe", sample=2_000_000_001), tmp_path)
    with pytest.raises(DataError, match="no text"):
        learn(["", ""], [], spec_of("bpe"), tmp_path)


def test_the_light_loader_leaves_to_transformers_what_it_may_change(made, tmp_path):
    folder = made[0]["bpe"]
    names = ("tokenizer.json", "tokenizer_config.json")
    config = json.loads((folder / names[1]).read_text())
    changes = [
        {"tokenizer_class": "LlamaTokenizer"},
        {"add_bos_token": True},
        {"added_tokens_decoder": {}},
        {"eos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True}},
        {"cls_token": "[NEW]"},
    ]
    for number, change in enumerate(changes):
        other = tmp_path / str(number)
        other.mkdir()
        (other / names[0]).write_bytes((folder / names[0]).read_bytes())
        (other / names[1]).write_text(json.dumps(config | change))
        assert not isinstance(open_tokenizer(str(other)), LightTokenizer), change
    (other / names[1]).write_text(json.dumps(config))
    assert isinstance(open_tokenizer(str(other)), LightTokenizer)
    (other / "config.json").write_text('{"model_type": "qwen2"}')
    assert not isinstance(open_tokenizer(str(other)), LightTokenizer)
    with pytest.raises(MissingError, match="no such folder"):
        open_tokenizer(str(tmp_path / "absent"))


def test_pieces_of_another_familys_tokenizer(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = [("<unk>", 0.0), ("\u2581the", -1.0), ("\u2581", -3.0), ("a", -2.0)]
    vocabulary += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    backend = Tokenizer(models.Unigram(vocabulary, 0, True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    found = pieces(LightTokenizer(backend, "x", {}), "the 中a")
    assert [piece.token for piece in found] == ["\u2581the", "\u2581", "<0xE4>", "<0xB8>", "<0xAD>", "a"]
    assert [piece.content for piece in found] == ["the", " ", b"\xe4", b"\xb8", b"\xad", "a"]


def test_what_is_learnt_from_is_bounded_by_its_different_words():
    repeated = ["the same words again"] * 50
    assert within_memory(repeated, 30) == repeated
    different = [f"{'x' * number} {'y' * number}" for number in range(1, 20)]
    kept = within_memory(different, 30)
    assert kept == different[: len(kept)]
    assert sum(2 * number for number in range(1, len(kept) + 1)) <= 30
    assert sum(2 * number for number in range(1, len(kept) + 2)) > 30
    assert within_memory(["z" * 100], 30) == ["z" * 100]
    assert len(within_memory(["春天来了", "夏天走了", "秋天到了"], 24)) == 2
