"""`generate` with many prompts, stop strings and JSON; the answers are those of the library."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from cli_runs import CliRun, run_cli

from llama4_quant.runtime.pipeline import Pipeline, user_message
from llama4_quant.sample import SAMPLE_DIR, shapes

QUESTIONS = ("What is `len`?", "Return a new list", "What is a tuple?")
FEW = ("--max-new-tokens", 8, "--dtype", "float32")


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    loaded = Pipeline.from_pretrained(SAMPLE_DIR, dtype="float32")
    settings = replace(loaded.settings, max_new_tokens=8)
    return Pipeline(loaded.model, loaded.tokenizer, settings, processor=loaded.processor)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "shape.png"
    shapes.draw(shapes.scenes(held_out=True)[2], random.Random(2)).save(path)
    return path


def _generate(*arguments: object, stdin: str = "") -> CliRun:
    ran = run_cli("generate", SAMPLE_DIR, *FEW, *arguments, stdin=stdin)
    assert ran.code == 0, ran.err
    return ran


def _texts(ran: CliRun) -> list[str]:
    return [json.loads(line)["text"] for line in ran.out.splitlines()]


def test_several_prompts_as_text(pipeline: Pipeline) -> None:
    ran = _generate("--prompt", QUESTIONS[0], "--prompt", QUESTIONS[1])
    answers = ["".join(pipeline.chat([user_message(text)])) for text in QUESTIONS[:2]]
    assert ran.out == "".join(f"> {text}\n{answer}\n\n" for text, answer in zip(QUESTIONS, answers, strict=False))
    assert "ended by length (2)" in ran.err


def test_json_says_all(pipeline: Pipeline) -> None:
    ran = _generate("--prompt", QUESTIONS[0], "--prompt", QUESTIONS[1], "--json", "--logprobs")
    records = [json.loads(line) for line in ran.out.splitlines()]
    assert [record["index"] for record in records] == [0, 1]
    for record, text in zip(records, QUESTIONS, strict=False):
        stream = pipeline.chat([user_message(text)], settings=replace(pipeline.settings, logprobs=True))
        list(stream)
        expected = stream.completion
        assert record["prompt"] == text
        for name in ("text", "finish_reason", "num_prompt_tokens", "num_new_tokens"):
            assert record[name] == getattr(expected, name)
        assert tuple(record["token_ids"]) == expected.token_ids
        # float32 logits of a batch and of a row alone differ by rounding, far below 1e-3
        assert record["logprobs"] == pytest.approx(expected.logprobs, abs=1e-3)
        assert record["first_token_seconds"] > record["prefill_seconds"] > 0
        assert record["decode_tokens_per_second"] > 0
        assert record["prefill_tokens_per_second"] > 0
        assert record["peak_memory_bytes"] > 50 * 2**20  # torch alone is more


def test_prompts_of_files(tmp_path: Path, pipeline: Pipeline, image: Path) -> None:
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text(f"{QUESTIONS[0]}\n\n  {QUESTIONS[1]}  \n", encoding="utf-8")
    records = [{"prompt": QUESTIONS[0]}, {"prompt": shapes.QUESTIONS[0], "images": [str(image)], "system": "Be brief."}]
    objects.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    first, second = (pipeline.chat([user_message(text)]) for text in QUESTIONS[:2])
    expected = ["".join(first), "".join(second)]
    assert _texts(_generate("--prompts", lines, "--json")) == expected
    assert _texts(_generate("--prompts", "-", "--json", stdin=lines.read_text())) == expected
    assert _texts(_generate("--prompt", QUESTIONS[1], "--prompts", lines, "--json")) == [expected[1], *expected]
    system = {"role": "system", "content": "Be brief."}
    seen = "".join(pipeline.chat([system, user_message(shapes.QUESTIONS[0], 1)], [image]))
    assert _texts(_generate("--prompts", objects, "--json")) == [expected[0], seen]


def test_images_are_shown_with_every_prompt(pipeline: Pipeline, image: Path) -> None:
    ran = _generate("--image", image, "--prompt", shapes.QUESTIONS[0], "--prompt", shapes.QUESTIONS[1], "--json")
    for text, question in zip(_texts(ran), shapes.QUESTIONS, strict=False):
        assert text == "".join(pipeline.chat([user_message(question, 1)], [image]))


def test_batches_do_not_change_samples(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*QUESTIONS, *QUESTIONS]), encoding="utf-8")
    sampled = ("--prompts", path, "--json", "--temperature", 1, "--top-p", 0.95, "--seed", 5)
    whole = _texts(_generate(*sampled))
    assert _texts(_generate(*sampled, "--batch-size", 4)) == whole
    assert len(set(whole)) > len(QUESTIONS)  # equal prompts have other random numbers


def test_stop_and_finish_reasons() -> None:
    whole = _texts(_generate("--prompt", QUESTIONS[0], "--json"))[0]
    stop = whole[4:7]
    record = json.loads(_generate("--prompt", QUESTIONS[0], "--stop", "\x00", "--stop", stop, "--json").out)
    assert record["text"] == whole[: whole.index(stop)]
    assert record["finish_reason"] == "stop"
    ran = _generate("--prompt", QUESTIONS[0], "--stop", stop)
    assert ran.out == record["text"] + "\n"
    assert ran.err.endswith("ended by stop\n")
    record = json.loads(run_cli("generate", SAMPLE_DIR, "--prompt", QUESTIONS[0], "--json").out)
    assert record["finish_reason"] == "eos"


def test_quiet() -> None:
    assert _generate("--prompt", QUESTIONS[0], "--quiet").err == ""


def test_penalties_reach_the_sampler() -> None:
    prompt = ("--prompt", QUESTIONS[0])
    plain = _generate(*prompt).out
    for flag, value in (("--repetition-penalty", 0.01), ("--presence-penalty", -30), ("--frequency-penalty", -30)):
        assert _generate(*prompt, flag, value).out != plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to answer; give --prompt TEXT or --prompts FILE"),
        (["--prompts", "{tmp}/empty.txt"], "expected a prompt per line, and there is none"),
        (["--prompts", "{tmp}/bad.jsonl"], "bad.jsonl, line 2: this is not JSON"),
        (["--prompts", "{tmp}/key.jsonl"], "key.jsonl, line 1: unknown 'image'; known keys: prompt, images, system"),
        (["--prompts", "{tmp}/type.jsonl"], "type.jsonl, line 1: images is 'a.png', expected a list of files"),
        (["--prompts", "{tmp}/list.jsonl"], "list.jsonl, line 1 is [1], expected an object like"),
        (["--prompt", "x", "--raw", "--system", "y"], "--system goes through the chat template"),
        (["--prompt", "x", "--min-p", "2"], "min_p is 2.0, expected 0 to 1"),
        (["--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty is 0.0, expected"),
        (["--prompt", "x", "--stop", ""], "stop is ('',), expected a tuple of texts"),
    ],
)
def test_mistakes_with_prompts(tmp_path: Path, arguments: list[str], message: str) -> None:
    for name, text in {
        "empty.txt": "\n \n",
        "bad.jsonl": '{"prompt": "x"}\n{"prompt"',
        "key.jsonl": '{"prompt": "x", "image": "a.png"}',
        "type.jsonl": '{"prompt": "x", "images": "a.png"}',
        "list.jsonl": "[1]",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    ran = run_cli("generate", SAMPLE_DIR, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
    assert message in ran.err
