"""Meta's original layout: every weight of a random model read back bit for bit; hostile pickles: tests/hostile."""

import io
import json
from pathlib import Path

import pytest
import torch
from checkpoint.checkpoint_files import num_descriptors, same_bits
from checkpoint.meta_files import meta_shards, params_json, write_meta
from checkpoints import make_checkpoint, multimodal_config, random_tensors, text_config
from hostile.pickle_cases import rewrite

from llama4_quant.architecture import Llama4Config, tensor_specs
from llama4_quant.checkpoint import meta
from llama4_quant.checkpoint.meta import MetaReader, is_meta_layout
from llama4_quant.checkpoint.meta_params import Params, Widths
from llama4_quant.checkpoint.source import open_source
from llama4_quant.errors import CheckpointError, ConfigError
from llama4_quant.planning.make import make_plan

CONFIG = multimodal_config()
TENSORS = random_tensors(CONFIG)


def meta_folder(folder: Path, num_ranks: int = 2, *, fused: bool = True, **params: object) -> Path:
    shards = meta_shards(CONFIG, TENSORS, num_ranks, fused=fused)
    return write_meta(folder, params_json(CONFIG) | params, shards)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_tensor_equals_the_hugging_face_one(tmp_path: Path, num_ranks: int, *, fused: bool) -> None:
    folder = meta_folder(tmp_path / "meta", num_ranks, fused=fused)
    with open_source(str(folder)) as reader:
        assert isinstance(reader, MetaReader)
        config = Llama4Config.from_dict(reader.config)
        assert config.text == Llama4Config.from_dict(multimodal_config(**UNSAID)).text
        assert config.vision == Llama4Config.from_dict(CONFIG).vision
        assert {spec.name for spec in tensor_specs(config)} == set(reader.tensors)
        make_plan(config, None, reader.tensors)
        for name, expected in TENSORS.items():
            assert same_bits(reader.read(name), expected), name
            assert reader.tensors[name].nbytes == expected.nbytes


UNSAID = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 262_144}
"""What params.json does not say."""


def test_text_only_models_have_no_prefix(tmp_path: Path) -> None:
    config = text_config(num_hidden_layers=2, interleave_moe_layer_step=1)
    tensors = random_tensors(config)
    folder = write_meta(tmp_path, params_json(config), meta_shards(config, tensors, 2, fused=True))
    with open_source(str(folder)) as reader:
        parsed = Llama4Config.from_dict(reader.config)
        assert parsed.vision is None
        assert parsed.text.moe_layers == (0, 1)
        # No dense layer says its width: Meta's rule gives int(0.75 * (8 * 128 // 3)) = 255, up to a multiple of 64.
        assert parsed.text.intermediate_size_mlp == 256
        for name, expected in tensors.items():
            assert same_bits(reader.read(name), expected), name


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_rows_of_one_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(meta, "SCRATCH_BYTES", 5 * 64)  # a few rows of a rank at a time
    fused = f"language_model.model.layers.1.feed_forward.experts.{name}"
    with MetaReader.open(meta_folder(tmp_path / "meta", 4)) as reader:
        for expert, start, stop in ((0, 0, 128), (3, 0, 128), (1, 5, 6), (2, 31, 33), (1, 17, 100), (0, 4, 4)):
            expected = TENSORS[fused][expert, start:stop]
            out = torch.full_like(expected, torch.nan).contiguous()
            assert reader.read_slice(fused, expert, start, stop, out=out) is out
            assert same_bits(out, expected), (expert, start, stop)
        assert same_bits(reader.read_rows(fused, 1, 3), TENSORS[fused][1:3])
        with pytest.raises(CheckpointError, match="rows 0 to 129 of dimension 1 do not exist"):
            reader.read_slice(fused, 0, 0, 129)


@pytest.mark.parametrize(
    "name",
    [
        "language_model.lm_head.weight",
        "language_model.model.layers.0.self_attn.k_proj.weight",
        "language_model.model.layers.0.self_attn.o_proj.weight",
        "language_model.model.layers.1.feed_forward.router.weight",
        "vision_model.model.layers.1.mlp.fc1.bias",
        "vision_model.model.layers.1.mlp.fc2.bias",
    ],
)
def test_rows_of_other_tensors(tmp_path: Path, name: str) -> None:
    with MetaReader.open(meta_folder(tmp_path / "meta", 2)) as reader:
        expected = TENSORS[name]
        for start in range(0, len(expected), 3):
            assert same_bits(reader.read_rows(name, start, start + 1), expected[start : start + 1])
        assert same_bits(reader.read_rows(name, 1, len(expected) - 1), expected[1:-1])


def test_files_are_known_and_not_mapped(tmp_path: Path) -> None:
    with MetaReader.open(meta_folder(tmp_path / "meta", 2)) as reader:
        mapped = Path("/proc/self/maps").read_text()
        assert "consolidated" not in mapped  # the files are not mapped either
        assert all(str(path) in {str(p) for p in reader.files} for path in (tmp_path / "meta").glob("*.pth"))
        assert tmp_path / "meta" / "params.json" in reader.files


def test_closing_closes_the_files(tmp_path: Path) -> None:
    before = num_descriptors()
    with MetaReader.open(meta_folder(tmp_path / "meta", 4)) as reader:
        assert num_descriptors() == before + 4
    assert num_descriptors() == before
    with pytest.raises(CheckpointError, match="the checkpoint is closed"):
        reader.read("language_model.lm_head.weight")


def test_hugging_face_folders_are_not_meta_layout(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf")
    assert not is_meta_layout(folder)
    (folder / "consolidated.00.pth").write_bytes(b"")  # some repositories hold both: safetensors win
    assert not is_meta_layout(folder)
    assert not is_meta_layout(tmp_path / "nothing")


def test_ranks_that_disagree(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "meta", 2)
    rewrite(folder / "consolidated.01.pth", **{"output.weight": torch.ones(48, 128)})
    with pytest.raises(
        CheckpointError,
        match=r"consolidated.01.pth: tensor output.weight: .* \[48, 128\] as in .*, found torch.float32",
    ):
        MetaReader.open(folder)
    rewrite(folder / "consolidated.01.pth", **{"output.weight": None})
    with pytest.raises(CheckpointError, match=r"tensor output.weight: .* found nothing; the files are not of one"):
        MetaReader.open(folder)


def test_missing_files(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "meta", 4)
    (folder / "consolidated.03.pth").rename(tmp_path / "kept")
    with pytest.raises(ConfigError, match=r"vocab_size is 96, but .* together have 72 rows; are files missing"):
        MetaReader.open(folder)
    (tmp_path / "kept").rename(folder / "consolidated.03.pth")
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"expected consolidated.00.pth to consolidated.03.pth without a gap"):
        MetaReader.open(folder)
    (folder / "consolidated.00.pth").unlink()
    (folder / "consolidated.00.pth").symlink_to("/etc/hostname")
    (folder / "consolidated.01.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="expected a file inside"):
        MetaReader.open(folder)
    (folder / "params.json").unlink()
    (folder / "consolidated.00.pth").unlink()
    torch.save({}, folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"params.json: this file is missing"):
        MetaReader.open(folder)


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "meta", 1)
    torch.save({}, folder / "int4_scales_0.pt")
    with pytest.raises(CheckpointError, match=r"already quantized .*int4_scales_0.pt"):
        MetaReader.open(folder)


def test_extra_state_may_hold_bytes_and_nothing_else(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "meta", 1)
    rewrite(folder / "consolidated.00.pth", **{"layers.0.attention.wo._extra_state": io.BytesIO(b"abc")})
    with MetaReader.open(folder) as reader:
        assert set(reader.tensors) == set(TENSORS)
    assert io.BytesIO not in torch.serialization.get_safe_globals()


def params(**changes: object) -> Params:
    return Params(params_json(CONFIG) | changes, "params.json")


WIDTHS = Widths(vocab_size=96, intermediate_size=128, intermediate_size_mlp=256)


def test_params_of_scout_give_the_hub_configuration() -> None:
    """The published params.json values give the published config.json (but for what they do not say)."""
    scout = {
        "dim": 5120,
        "n_layers": 48,
        "n_heads": 40,
        "n_kv_heads": 8,
        "vocab_size": 202048,
        "multiple_of": 2048,
        "ffn_dim_multiplier": 1.2,
        "ffn_exp": 4.0,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
        "use_qk_norm": True,
        "attention_chunk_size": 8192,
        "nope_layer_interval": 4,
        "attn_temperature_tuning": True,
        "vision_args": {
            "image_size": {"height": 336, "width": 336},
            "patch_size": {"height": 14, "width": 14},
            "dim": 1408,
            "n_layers": 34,
            "n_heads": 16,
            "mlp_ratio": 4.0,
            "output_dim": 4096,
            "pixel_shuffle_ratio": 0.5,
        },
        "moe_args": {"num_experts": 16, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1},
    }
    widths = Widths(vocab_size=202048, intermediate_size=8192, intermediate_size_mlp=None)
    made = Llama4Config.from_dict(Params({"model": scout}, "params.json").config(widths))
    published = json.loads((Path(__file__).parents[1] / "data" / "scout.json").read_text())
    published["text_config"]["max_position_embeddings"] = 262_144
    expected = Llama4Config.from_dict(published)
    assert (made.text, made.vision, made.image_token_index) == (expected.text, expected.vision, 200092)
    assert made.architecture == expected.architecture


def test_defaults_of_params() -> None:
    bare = {"dim": 64, "n_layers": 3, "n_heads": 4, "vocab_size": -1}
    text = Llama4Config.from_dict(Params(bare, "params.json").config(WIDTHS)).text
    assert text.num_key_value_heads == 4
    assert text.moe_layers == ()
    assert text.rope_layers == (True, True, True)
    assert (text.attention_chunk_size, text.use_qk_norm, text.attn_temperature_tuning) == (None, False, False)
    assert (text.rope_scaling, text.rope_theta, text.rms_norm_eps) == (None, 500_000.0, 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": "5120"}, "params.json: dim is '5120', expected an integer"),
        ({"n_layers": 10**9}, "n_layers is 1000000000, expected an integer from 1 to 1024"),
        ({"vocab_size": 95}, "vocab_size is 95, but the embeddings .* have 96 rows"),
        ({"lora_args": {"rank": 8}}, "lora_args is .*; start from the BF16 model"),
        ({"quantization_args": {"scheme": None, "group_size": 32}}, "quantization_args is"),
        ({"moe_args": []}, "moe_args is .*, expected an object"),
        ({"vision_args": {"dim": 8}}, "params.json: vision_args: output_dim is missing"),
    ],
)
def test_unusable_params(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        params(**changes).config(WIDTHS)


def test_images_must_be_square() -> None:
    vision = params_json(CONFIG)["vision_args"] | {"image_size": {"height": 28, "width": 35}}
    with pytest.raises(ConfigError, match="image_size: 28 x 35 is not square"):
        params(vision_args=vision).config(WIDTHS)
