"""What is said once, until another reason comes."""

from kvstore.said_once import SaidOnce


def test_a_reason_is_news_until_it_was_said_and_again_when_another_one_or_none_came_between() -> None:
    said = SaidOnce()
    reasons = ["a", "a", "b", "b", "a", "", "a", ""]
    assert [said.is_news(reason) for reason in reasons] == [True, False, True, False, True, False, True, False]
