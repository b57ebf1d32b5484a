from llmos_cli.data.dedup import Duplicates, shingles
from llmos_cli.formats.ids import object_id

LEAR = (
    "Nothing will come of nothing: speak again. Unhappy that I am, I cannot heave my heart into my mouth: I love your "
    "majesty according to my bond; nor more nor less. How, how, Cordelia! mend your speech a little, lest it may mar "
    "your fortunes. Good my lord, you have begot me, bred me, loved me: I return those duties back as are right fit, "
    "obey you, love you, and most honour you. Why have my sisters husbands, if they say they love you all?"
)
HOTEL = (
    "房间很干净,服务员的态度也很好,早餐的种类比较多,离地铁站只有五分钟的路程,下次来北京出差还会选择住这里,推荐给大家。"
)


def asked(kind: str, *texts: str) -> list[tuple[str, tuple[int, int]] | None]:
    known = Duplicates(kind)  # type: ignore[arg-type]
    return [known.twin(object_id(text.encode()), text, (0, number)) for number, text in enumerate(texts, 1)]


def test_equal_texts_are_found_and_the_first_stays() -> None:
    assert asked("exact", LEAR, HOTEL, LEAR, LEAR + ".") == [None, None, ("equal", (0, 1)), None]


def test_near_texts_are_found_whatever_their_case_and_marks_in_any_script() -> None:
    shouted = LEAR.upper().replace(":", " -")
    assert asked("near", LEAR, shouted) == [None, ("near", (0, 1))]
    assert asked("near", HOTEL, HOTEL.replace("。", "!")) == [None, ("near", (0, 1))]


def test_a_document_that_went_is_never_named_as_the_one_that_stays() -> None:
    assert asked("near", LEAR, LEAR.upper(), LEAR.upper()) == [None, ("near", (0, 1)), ("equal", (0, 1))]


def test_other_texts_and_those_that_share_half_stay() -> None:
    half = LEAR[: len(LEAR) // 2]
    assert asked("near", LEAR, half, HOTEL, half + HOTEL) == [None, None, None, None]


def test_texts_without_words_are_told_apart() -> None:
    assert asked("near", "...", "!?", "") == [None, None, None]


def test_a_short_text_is_one_shingle() -> None:
    assert list(shingles("To be")) == ["to be"]
    assert list(shingles("很好 ok")) == ["很 好 ok"]
