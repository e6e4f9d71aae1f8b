"""Patterns of `ignore` and `targets`: real ones match as Python's `re` does, hostile ones are refused."""

import random
import re
import time

import pytest

from llama4_quant.errors import ConfigError
from llama4_quant.formats import patterns
from llama4_quant.formats.patterns import Patterns

NAMES = [
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "language_model.model.layers.47.feed_forward.experts.127.gate_proj",
    "language_model.model.layers.3.feed_forward.router",
    "vision_model.model.layers.33.mlp.fc1",
    "multi_modal_projector.linear_1",
]
REAL = [  # of checkpoints on the Hub, and of the recipes of llm-compressor
    "re:.*lm_head",
    "re:.*self_attn",
    "re:.*router",
    "re:.*vision_model.*",
    "re:.*multi_modal_projector.*",
    "re:vision_model.*",
    "re:.*mlp.gate$",
    r"re:.*layers\.[0-9]+\.feed_forward\.(gate|up|down)_proj$",
    r"re:.*layers\.(0|1|2|3|4|5|6|7|8|9|10|11|12|13|14|15)\..*",
    r"re:^(?!.*experts).*$",
    r"re:^language_model\.model\.layers\.\d+\.feed_forward\.experts\.\d+\.(?:gate|up|down)_proj$",
    r"re:(?P<tower>vision|language)_model\.",
    "re:.*(gate|up)_proj",
    r"re:.*\.q_proj",
    "re:model.layers.[0-3]?.*",
]


@pytest.mark.parametrize("item", REAL)
def test_real_patterns_match_as_they_do_in_python(item: str) -> None:
    made = Patterns([item], "here")
    for name in NAMES:
        assert (made.first_match(name) == item) is (re.match(item.removeprefix("re:"), name) is not None)


def test_the_alphabetically_first_pattern_wins_and_names_are_no_patterns() -> None:
    made = Patterns(["re:b.*", "re:.*", "re:a", "lm_head"], "here")
    assert made.first_match("bx") == "re:.*"
    assert "lm_head" in made
    assert "re:a" not in made
    assert made.items == ("re:b.*", "re:.*", "re:a", "lm_head")
    assert Patterns(["lm_head"], "here").first_match("lm_head") is None


def test_random_patterns_are_quick_or_refused() -> None:
    """The count of ways is an upper bound: no pattern that it lets through takes long for a name made for it."""
    rng = random.Random(0)
    pieces = [
        "a",
        "b",
        ".",
        "[ab]",
        "a*",
        ".*",
        ".+?",
        "a?",
        "(",
        "(?:",
        "(?=",
        ")",
        ")",
        ")?",
        ")*",
        "|",
        "{2}",
        "\\",
        "+",
    ]
    num_accepted = 0
    for _ in range(20_000):
        pattern = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 14)))
        try:
            made = Patterns([f"re:{pattern}$"], "here")
        except ConfigError:
            continue
        num_accepted += 1
        for name in ("a" * 64, "ab" * 32, "a" * 63 + "!"):
            started = time.process_time()
            made.first_match(name)
            assert time.process_time() - started < 0.5, (pattern, name)
    assert num_accepted > 1000


def test_many_slow_matches_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.02)
    made = Patterns(["re:.*a.*a.*b"], "config.json: ignore")
    with pytest.raises(ConfigError, match=r"config.json: ignore: matching its patterns takes more than 0.02 s"):
        any(made.first_match("a" * 64) for _ in range(10_000))
