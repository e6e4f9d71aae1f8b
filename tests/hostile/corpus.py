"""The hostile corpus: every case of every kind."""

from hostile.cases import Case
from hostile.config_cases import config_cases
from hostile.folder_cases import folder_cases
from hostile.header_cases import header_cases
from hostile.json_cases import json_cases
from hostile.output_cases import output_cases
from hostile.pickle_cases import pickle_cases
from hostile.tokenizer_cases import tokenizer_cases


def corpus() -> list[Case]:
    """All cases; names are unique."""
    cases = [
        *header_cases(),
        *json_cases(),
        *folder_cases(),
        *config_cases(),
        *pickle_cases(),
        *output_cases(),
        *tokenizer_cases(),
    ]
    assert len({case.name for case in cases}) == len(cases)
    return cases
