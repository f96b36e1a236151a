"""Changes of a text by characters: slips of the finger, and Chinese characters that sound or look alike."""

import numpy as np

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_ALIKE = (
    # Alike in sound.
    "的地得", "在再", "他她它", "做作坐座", "那哪", "带戴代", "以已", "象像向", "即既", "未味", "园圆元员", "进近",
    "分份", "和合河", "长常场", "心新", "是事市", "时十实", "有又友", "工公功", "生声升", "同童铜", "力利立",
    "情请清晴",
    "文闻问", "高糕", "明名", "里理李", "面棉", "到道", "后候厚", "话画化", "性姓", "记计纪", "其期奇", "必毕", "竟境",
    "部布步", "只支枝", "书叔", "电店", "成城程", "见件建", "意义易", "知之", "想响", "行形型", "应英", "会汇",
    # Alike in shape.
    "己已巳", "人入", "未末", "土士", "日曰", "大太犬", "天夫", "午牛", "千干于", "子孑", "刀力", "今令", "贝见",
    "休体",
    "拔拨", "候侯", "折拆", "辩辨", "栗粟", "析折", "晴睛", "渴喝", "跑抱", "狠狼", "幻幼", "贷货", "侍待", "处外",
    "没设", "住往", "银很", "蓝篮", "温湿", "微徽", "治冶", "准淮",
)  # fmt: skip


def _neighbours() -> dict[str, str]:
    """The keys beside each letter: those left and right, and those above and below."""
    found: dict[str, str] = {}
    for number, row in enumerate(_ROWS):
        for place, letter in enumerate(row):
            sides = row[max(0, place - 1) : place] + row[place + 1 : place + 2]
            above = _ROWS[number - 1][place : place + 2] if number else ""
            below = _ROWS[number + 1][max(0, place - 1) : place + 1] if number + 1 < len(_ROWS) else ""
            found[letter] = sides + above + below
    return found


def _alike() -> dict[str, str]:
    found: dict[str, str] = {}
    for group in _ALIKE:
        for sign in group:
            found[sign] = found.get(sign, "") + group.replace(sign, "")
    return found


NEIGHBOURS = _neighbours()
ALIKE = _alike()


def typos(text: str, ratio: float, chance: np.random.Generator) -> str:
    """Letters become a neighbour on the keyboard, double, or go."""
    letters = [place for place, sign in enumerate(text) if sign.lower() in NEIGHBOURS]
    after = list(text)
    for place in _some(letters, ratio, chance):
        after[place] = _slip(text[place], chance)
    return "".join(after)


def similar(text: str, ratio: float, chance: np.random.Generator) -> str:
    """Chinese characters become others that sound or look alike, of a small table."""
    known = [place for place, sign in enumerate(text) if sign in ALIKE]
    after = list(text)
    for place in _some(known, ratio, chance):
        after[place] = _one(ALIKE[text[place]], chance)
    return "".join(after)


def _slip(sign: str, chance: np.random.Generator) -> str:
    kind = int(chance.integers(3))
    if kind == 0:
        other = _one(NEIGHBOURS[sign.lower()], chance)
        return other.upper() if sign.isupper() else other
    return sign * 2 if kind == 1 else ""


def _some(places: list[int], ratio: float, chance: np.random.Generator) -> list[int]:
    count = max(1, round(ratio * len(places))) if places else 0
    return [int(n) for n in chance.permutation(np.asarray(places, dtype=np.int64))[:count]]


def _one(choices: str, chance: np.random.Generator) -> str:
    return choices[int(chance.integers(len(choices)))]
