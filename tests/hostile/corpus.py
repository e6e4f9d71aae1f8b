"""The hostile corpus: every case of every kind."""

from hostile.cases import Case
from hostile.config_cases import config_cases
from hostile.folder_cases import folder_cases
from hostile.header_cases import header_cases
from hostile.json_cases import json_cases
from hostile.output_cases import output_cases
from hostile.pickle_cases import pickle_cases
from hostile.tokenizer_cases import tokenizer_cases

KINDS = {
    "headers": header_cases,
    "texts of JSON": json_cases,
    "folders": folder_cases,
    "configurations": config_cases,
    "pickles": pickle_cases,
    "outputs": output_cases,
    "tokenizers and templates": tokenizer_cases,
}


def corpus() -> list[Case]:
    """All cases; names are unique."""
    cases = [case for cases_of_kind in KINDS.values() for case in cases_of_kind()]
    assert len({case.name for case in cases}) == len(cases)
    return cases
